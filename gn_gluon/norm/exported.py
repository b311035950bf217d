"""The norms in a graph that goes into a file: as they evaluate, of operators that stock MXNet has."""
import contextlib
import functools

from gn_gluon.norm import composed
from gn_gluon.norm.layers import BatchNorm, GroupNorm, NoNorm


def norm_layers(net):
    """The norm layers of a network, in its order."""
    layers = []
    net.apply(lambda block: layers.append(block) if isinstance(block, (GroupNorm, BatchNorm, NoNorm)) else None)
    return list(dict.fromkeys(layers))


def norm_settings(net):
    """Which norm a network has: a dict of norm (its class's name), epsilon, num_groups or channels_per_group."""
    layer = norm_layers(net)[0]
    settings = {'norm': type(layer).__name__}
    if not isinstance(layer, NoNorm):
        settings['epsilon'] = layer._epsilon
    if isinstance(layer, GroupNorm):
        settings[layer._argument] = layer._count
    return settings


@contextlib.contextmanager
def norms_as_evaluated(net, group_norm):
    """Inside, the norm layers of `net`, a float32 network of images, are traced as they evaluate.

    GroupNorm, LayerNorm and InstanceNorm are `group_norm`, which is `composed_group_norm` or `one_node`; BatchRenorm is
    BatchNorm, NoNorm the addition of its beta.
    """
    layers = norm_layers(net)
    for layer in layers:
        layer.hybrid_forward = _form(layer, group_norm)
    try:
        yield
    finally:
        for layer in layers:
            del layer.hybrid_forward


def _form(layer, group_norm):
    if isinstance(layer, GroupNorm):
        return functools.partial(_group_norm, layer, group_norm)
    return functools.partial(BatchNorm.hybrid_forward if isinstance(layer, BatchNorm) else _bias, layer)


def _group_norm(layer, group_norm, F, x, residual=None, gamma=None, beta=None):
    y = group_norm(F, x, gamma, beta, layer.num_groups, layer._epsilon)
    return composed.finish(F, y, residual, layer._activation)


def _bias(layer, F, x, residual=None, beta=None):
    return composed.finish(F, F.broadcast_add(x, F.reshape(beta, (1, -1, 1, 1))), residual, layer._activation)


def composed_group_norm(F, x, gamma, beta, num_groups, epsilon):
    """composed.group_norm: runs wherever MXNet does."""
    return composed.group_norm(F, x, gamma, beta, None, (num_groups, -1), epsilon, None, 'float32')


def one_node(F, x, gamma, beta, num_groups, epsilon):
    """One node with gamma and beta per channel, to be read and not to be run: MXNet's operator has them per group."""
    return F.GroupNorm(x, gamma, beta, num_groups=num_groups, eps=epsilon)
