"""Which operator computes the norms, and why: said by `python -m gn_gluon.info`."""
import os

from gn_gluon.errors import UserError


def active_operator(environ=os.environ):
    """The operator behind the norm layers, as (name, reason).

    This version has one, 'composed': stock MXNet operators. GN_GLUON_OPERATOR=composed asks for it by name.
    Raises UserError when GN_GLUON_OPERATOR asks for another.
    """
    wanted = environ.get('GN_GLUON_OPERATOR')
    if wanted and wanted != 'composed':
        raise UserError(f'GN_GLUON_OPERATOR={wanted} in the environment, but this version offers only '
                        'composed; unset it or set it to composed')
    return 'composed', 'composed of stock MXNet operators, ' + (
        'as GN_GLUON_OPERATOR asks' if wanted else 'the only one of this version')
