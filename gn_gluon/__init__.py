"""Group Normalization (Wu & He, 2018) for MXNet Gluon: the norm layers, and the experiments of the paper."""
from gn_gluon import compat  # noqa: F401 - first: it makes MXNet importable
from gn_gluon.norm import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm

__version__ = '0.1.0'
__all__ = ['BatchNorm', 'BatchRenorm', 'GroupNorm', 'InstanceNorm', 'LayerNorm', 'NoNorm']
