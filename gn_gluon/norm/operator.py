"""Which operator computes GroupNorm, LayerNorm and InstanceNorm: the fastest that is right on this machine.

native:     in oneDNN's own layouts, inside one known build of MXNet (native/onednn.cc);
extension:  through MXNet's public extension interface, on the CPU or a GPU (native/extension.cc);
composed:   of stock MXNet operators (composed.py).

GN_GLUON_OPERATOR=native|extension|composed in the environment forces one.
"""
import ctypes
import functools
import os
import sys

import mxnet as mx

from gn_gluon.errors import UserError
from gn_gluon.norm import build

TIERS = ('native', 'extension', 'composed')
#: libmxnet.so of the wheels that native/mxnet_inside.h was written for. MXNet is retired: there will be no others.
KNOWN_WHEELS = {'b4e7f881e385e342fd6b8316b34fde03ccaaf74d649999de2333ee5b4d8f2ba0': 'mxnet 1.9.1 for Linux x86-64'}

_WHAT = {'native': "native: in oneDNN's layouts", 'extension': "extension: through MXNet's extension interface",
         'composed': 'composed of stock MXNet operators'}


@functools.lru_cache(maxsize=None)
def active_operator():
    """The operator in use, as (name, reason). Chosen, and compiled if it never was, at the first call.

    Raises UserError when GN_GLUON_OPERATOR names none, or one that this machine cannot use.
    """
    wanted = os.environ.get('GN_GLUON_OPERATOR')
    if wanted:
        if wanted not in TIERS:
            raise UserError(f'GN_GLUON_OPERATOR={wanted} in the environment is none of ' + ', '.join(TIERS))
        try:
            return wanted, f'{_load(wanted)}, as GN_GLUON_OPERATOR asks'
        except build.BuildError as problem:
            raise UserError(f'GN_GLUON_OPERATOR={wanted} in the environment, but {problem}') from None
    reasons = []
    for tier in TIERS[:-1]:
        try:
            return tier, '; '.join([_load(tier)] + reasons)
        except build.BuildError as problem:
            reasons.append(f'not {tier}, since {problem}')
    return 'composed', '; '.join([_load('composed')] + reasons)


def _load(tier):
    """Make the operator of `tier` known to MXNet; returns a description. Raises BuildError if that is impossible."""
    if tier == 'composed':
        return _WHAT[tier]
    if sys.platform != 'linux':
        raise build.BuildError(f'the operators are for Linux, this is {sys.platform}')
    if tier == 'native' and build.wheel_sha256() not in KNOWN_WHEELS:
        raise build.BuildError('this libmxnet.so is not that of ' + ' or '.join(KNOWN_WHEELS.values()))
    folder = build.built()
    problem = build.self_test(folder, tier)
    if problem:
        raise build.BuildError(problem)
    load(tier, folder)
    return f'{_WHAT[tier]}, {instruction_set(folder)} kernels'


def load(tier, folder):
    """Load the libraries of `tier` from a folder of the cache into this process, untested. Raises BuildError."""
    extension = os.path.join(folder, 'libextension.so')
    if not hasattr(mx.nd, 'gn_gluon_group_norm'):
        mx.library.load(extension, verbose=False)
    if tier == 'native':
        library = ctypes.CDLL(os.path.join(folder, 'libnative.so'))
        library.gn_gluon_install.restype = ctypes.c_char_p
        problem = library.gn_gluon_install()
        if problem:
            raise build.BuildError(problem.decode())
        ctypes.CDLL(extension).gn_gluon_takes_bfloat16()


def instruction_set(folder):
    """The instruction set that the kernels of a loaded library run with: 'avx512', 'avx2' or 'baseline'."""
    library = ctypes.CDLL(os.path.join(folder, 'libextension.so'))
    library.gn_gluon_instruction_set.restype = ctypes.c_char_p
    return library.gn_gluon_instruction_set().decode()


def takes(dtype):
    """Whether the active operator is more than a composition, and computes inputs of `dtype` (None: not known)."""
    tier = active_operator()[0]
    return {'native': dtype in (None, 'float32', 'float16', 'bfloat16'),
            'extension': dtype in (None, 'float32', 'float16'), 'composed': False}[tier]


def group_norm(F, x, gamma, beta, residual, groups, epsilon, relu):
    """As composed.group_norm, with `groups` a pair (argument, number) and ReLU the one activation."""
    inputs = [x, gamma, beta] + ([] if residual is None else [residual])
    if active_operator()[0] == 'extension':
        # The interface does not hear of grad_req 'add' and overwrites: what comes between adds.
        inputs = [F.identity(array) for array in inputs]
    outputs = F.gn_gluon_group_norm(*inputs, epsilon=epsilon, relu=int(relu), residual=int(residual is not None),
                                    **{groups[0]: groups[1]})
    return outputs[0] if isinstance(outputs, (list, mx.sym.Symbol)) else outputs


def updates_fast():
    """Whether `nesterov_update` can be used: for float32 arrays on the CPU."""
    return active_operator()[0] == 'native'


def nesterov_update(weights, gradients, velocities, rates, decays, momentum, rescale):
    """One step of gradient descent with Nesterov momentum, in place, of lists of arrays (native/nesterov.h).

    weights, gradients, velocities : lists of NDArrays. rates, decays : learning rate and weight decay of each.
    momentum, rescale : numbers; the gradients are multiplied by `rescale`. As in MXNet's NAG, a velocity is a step that
    is added to the weight: it holds the rate, and points downhill.
    """
    arrays = [array for arrays in zip(weights, gradients, velocities) for array in arrays]
    mx.nd.gn_gluon_nesterov_update(*arrays, num_arrays=len(weights), momentum=repr(momentum), rescale=repr(rescale),
                                   rates=' '.join(map(repr, rates)), decays=' '.join(map(repr, decays)))
