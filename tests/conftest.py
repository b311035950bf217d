"""What every test module needs before its own imports."""
import os
import warnings

os.environ.setdefault('MPLBACKEND', 'Agg')

with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)  # MXNet's own
    import gn_gluon  # noqa: F401 - first: it makes MXNet importable, whatever a test module imports first
