"""The norm layers against float64, in every way that a network may call them."""
import warnings

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import SymbolBlock, nn

from gn_gluon import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm
from gn_gluon.errors import UserError
from gn_gluon.norm.operator import active_operator

BFLOAT16 = np.dtype([('bfloat16', np.uint16)])
EVERY_NORM = (GroupNorm, LayerNorm, InstanceNorm, BatchNorm, BatchRenorm, NoNorm)


# ------------------------------------------------------------------------------------ the reference, in float64

def per_channel(vector, like):
    return np.reshape(vector, (1, -1) + (1,) * (like.ndim - 2))


def all_but_channels(x):
    return (0,) + tuple(range(2, x.ndim))


def reference(x, gamma, beta, dy, groups, residual=None, activation=None, epsilon=1e-5):
    """Output and gradients (y, dx, dgamma, dbeta, dresidual) of GN, written out (Wu & He, equations 1, 2, 6, 7)."""
    x, dy = x.astype('float64'), dy.astype('float64')
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred ** 2).mean(-1, keepdims=True) + epsilon)
    x_hat = centred * inverse
    y = x_hat.reshape(x.shape) * per_channel(gamma, x) + per_channel(beta, x)
    if residual is not None:
        y = y + residual
    if activation == 'relu':
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    dx_hat = (dy * per_channel(gamma, x)).reshape(x_hat.shape)
    dx = inverse * (dx_hat - dx_hat.mean(-1, keepdims=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdims=True))
    return (y, dx.reshape(x.shape), (dy * x_hat.reshape(x.shape)).sum(all_but_channels(x)),
            dy.sum(all_but_channels(x)), dy)


def relative_error(got, wanted):
    got = got.asnumpy() if isinstance(got, mx.nd.NDArray) else got
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def made(layer, gamma, beta, hybridize=False):
    """`layer` with these parameters, hybridized as the training loop does it if wanted."""
    layer.gamma.shape = layer.beta.shape = gamma.shape
    layer.initialize()
    layer.gamma.set_data(mx.nd.array(gamma))
    layer.beta.set_data(mx.nd.array(beta))
    if hybridize:
        layer.hybridize(static_alloc=True, static_shape=True)
    return layer


def example(shape, mean=0., seed=0):
    """x, residual, gamma, beta, dy in float32."""
    random = np.random.RandomState(seed)
    x, residual, dy = random.normal(mean, 1, shape), random.normal(0, 1, shape), random.normal(0, 1, shape)
    gamma, beta = random.uniform(.5, 1.5, shape[1]), random.normal(0, 1, shape[1])
    return [array.astype('float32') for array in (x, residual, gamma, beta, dy)]


# ------------------------------------------------------------------------------------ group, layer, instance norm

LAYERS = {
    'gn8': (lambda: GroupNorm(num_groups=8), 24, lambda channels: 8),
    'gn_3_per_group': (lambda: GroupNorm(channels_per_group=3), 24, lambda channels: channels // 3),
    'gn_default': (GroupNorm, 64, lambda channels: 32),
    'ln': (LayerNorm, 24, lambda channels: 1),
    'in': (InstanceNorm, 24, lambda channels: channels),
}


@pytest.mark.parametrize('mean', [0, 1e3], ids=['mean0', 'mean1e3'])
@pytest.mark.parametrize('name, pixels', [
    (name, pixels) for name in LAYERS for pixels in [(), (35,), (7, 7), (5, 7), (1, 1), (3, 2, 5)]
    if name != 'in' or np.prod(pixels) > 1])  # a group of one value has its own test
def test_output_and_gradients_equal_float64(name, pixels, mean):
    make, channels, groups = LAYERS[name]
    x, _, gamma, beta, dy = example((3, channels) + pixels, mean)
    wanted = reference(x, gamma, beta, dy, groups(channels))
    for hybridize in (False, True):
        layer = made(make(), gamma, beta, hybridize)
        data = mx.nd.array(x)
        data.attach_grad()
        for _ in range(2):  # the second pass reuses the memory of the first
            with mx.autograd.record():
                y = layer(data)
            y.backward(mx.nd.array(dy))
        assert relative_error(y, wanted[0]) < 1e-5
        for gradient, expected in zip((data.grad, layer.gamma.grad(), layer.beta.grad()), wanted[1:]):
            assert relative_error(gradient, expected) < 1e-4


@pytest.mark.parametrize('shape', [(1, 24, 7, 7), (2, 64, 56, 56)], ids=str)
@pytest.mark.parametrize('hybridize', [False, True])
def test_residual_and_activation_in_one_call_equal_float64(shape, hybridize):
    x, residual, gamma, beta, dy = example(shape, mean=1e3)
    wanted = reference(x, gamma, beta, dy, 8, residual, 'relu')
    layer = made(GroupNorm(num_groups=8, activation='relu'), gamma, beta, hybridize)
    data, other = mx.nd.array(x), mx.nd.array(residual)
    data.attach_grad()
    other.attach_grad()
    with mx.autograd.record():
        y = layer(data, other)
    y.backward(mx.nd.array(dy))
    assert relative_error(y, wanted[0]) < 1e-5
    for gradient, expected in zip((data.grad, layer.gamma.grad(), layer.beta.grad(), other.grad), wanted[1:]):
        assert relative_error(gradient, expected) < 1e-4


def test_a_layer_may_be_called_with_a_residual_after_a_call_without():
    x, residual, gamma, beta, _ = (mx.nd.array(array) for array in example((2, 8, 3, 3)))
    layer = made(GroupNorm(num_groups=4), gamma, beta, hybridize=True)
    plain = layer(x).asnumpy()
    np.testing.assert_allclose(layer(x, residual).asnumpy(), plain + residual.asnumpy(), rtol=1e-5, atol=1e-6)
    assert (layer(x).asnumpy() == plain).all()


@pytest.mark.parametrize('make', [lambda: GroupNorm(num_groups=8), LayerNorm, InstanceNorm], ids=['gn', 'ln', 'in'])
@pytest.mark.parametrize('pixels', [(7, 7), (35,), (16, 16), (1, 3, 5)], ids=str)
def test_a_sample_depends_on_no_other_sample_bit_for_bit(make, pixels):
    x, _, gamma, beta, _ = example((17, 24) + pixels, mean=3)
    layer = made(make(), gamma, beta, hybridize=True)
    together = layer(mx.nd.array(x)).asnumpy()
    for size in (1, 2, 3, 16):
        others = x[:size].copy()
        others[1:] = 1e9
        assert (layer(mx.nd.array(x[:size])).asnumpy() == together[:size]).all()
        assert (layer(mx.nd.array(others)).asnumpy()[0] == together[0]).all()


def test_training_and_inference_of_gn_are_the_same():
    x, _, gamma, beta, _ = example((2, 24, 5, 7))
    layer = made(GroupNorm(num_groups=8), gamma, beta, hybridize=True)
    with mx.autograd.train_mode():
        training = layer(mx.nd.array(x)).asnumpy()
    assert (layer(mx.nd.array(x)).asnumpy() == training).all()


@pytest.mark.parametrize('hybridize', [False, True])
def test_a_group_of_one_value_gives_beta_zero_gradients_and_one_warning(hybridize):
    x, _, gamma, beta, dy = example((2, 8, 1, 1), mean=50)
    layer = made(InstanceNorm(), gamma, beta, hybridize)
    data = mx.nd.array(x)
    data.attach_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            with mx.autograd.record():
                y = layer(data)
            y.backward(mx.nd.array(dy))
    assert sum('single value' in str(warning.message) for warning in caught) == 1
    assert (y.asnumpy() == np.broadcast_to(per_channel(beta, x), x.shape)).all()
    assert (data.grad.asnumpy() == 0).all()
    assert (layer.gamma.grad().asnumpy() == 0).all()


def test_a_constant_image_gives_beta():
    x, _, gamma, beta, _ = example((2, 8, 5, 5))
    y = made(GroupNorm(num_groups=4), gamma, beta)(mx.nd.ones(x.shape) * 1e4).asnumpy()
    np.testing.assert_allclose(y, np.broadcast_to(per_channel(beta, x), x.shape), atol=1e-6)


# ------------------------------------------------------------------------------------ what the layers refuse

@pytest.mark.parametrize('arguments, found', [
    ({'num_groups': 8, 'channels_per_group': 3}, 'both num_groups=8 and channels_per_group=3'),
    ({'num_groups': 0}, 'num_groups=0'),
    ({'num_groups': -4}, 'num_groups=-4'),
    ({'channels_per_group': 0}, 'channels_per_group=0'),
    ({'in_channels': -3}, 'in_channels=-3'),
    ({'activation': 'gelu'}, "activation='gelu'"),
    ({'in_channels': 24}, 'num_groups=32 does not divide the 24 channels of GroupNorm .*groupnorm'),
    ({'in_channels': 24, 'channels_per_group': 7}, 'channels_per_group=7 does not divide the 24 channels'),
])
def test_bad_arguments_are_refused_by_name(arguments, found):
    with pytest.raises(UserError, match=found):
        GroupNorm(**arguments)


@pytest.mark.parametrize('hybridize', [False, True], ids=['eager', 'hybridized'])
@pytest.mark.parametrize('in_parent', [False, True], ids=['alone', 'in_a_network'])
def test_groups_that_do_not_divide_channels_known_late_are_refused(hybridize, in_parent):
    layer = GroupNorm(prefix='stem_')
    net = layer
    if in_parent:
        net = nn.HybridSequential()
        net.add(nn.Conv2D(24, 3, use_bias=False), nn.MaxPool2D(2), layer)
    net.initialize()
    if hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    with pytest.raises(UserError, match='num_groups=32 does not divide the 24 channels of GroupNorm stem'):
        net(mx.nd.ones((2, 24, 8, 8)))


# ------------------------------------------------------------------------------------ how networks use the layers

def network(norm):
    """Norms behind a convolution, a Flatten, a dense layer, and on the data itself; no shape is given."""
    net = nn.HybridSequential()
    net.add(norm(), nn.Conv2D(64, 3, use_bias=False), norm(activation='relu'), nn.MaxPool2D(2), nn.Flatten(), norm(),
            nn.Dense(32), norm(), nn.Dense(3))
    return net


@pytest.mark.filterwarnings('ignore:.*single value')
@pytest.mark.parametrize('norm', EVERY_NORM)
def test_deferred_shapes_in_a_hybridized_network_and_after_export(norm, tmp_path):
    x = mx.nd.array(example((2, 32, 8, 8))[0])
    net = network(norm)
    net.initialize(mx.init.Xavier())
    with mx.autograd.record():
        net(x)
    eager = net(x)
    shapes = [block.beta.shape for block in (net[0], net[2], net[5], net[7])]
    assert shapes == [(32,), (64,), (576,), (32,)]

    weights = str(tmp_path / 'net.params')
    net.save_parameters(weights)
    hybrid = network(norm)
    hybrid.load_parameters(weights)
    hybrid.hybridize(static_alloc=True, static_shape=True)
    fresh = network(norm)
    fresh.initialize()
    fresh.hybridize(static_alloc=True, static_shape=True)
    with mx.autograd.record():
        loss = fresh(x).sum()
    loss.backward()
    assert [block.beta.shape for block in (fresh[0], fresh[2], fresh[5], fresh[7])] == shapes
    np.testing.assert_allclose(hybrid(x).asnumpy(), eager.asnumpy(), rtol=1e-4, atol=1e-5)

    hybrid.export(str(tmp_path / 'net'))
    imported = SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), ['data'], str(tmp_path / 'net-0000.params'))
    np.testing.assert_allclose(imported(x).asnumpy(), eager.asnumpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('norm', EVERY_NORM)
@pytest.mark.parametrize('hybridize', [False, True], ids=['eager', 'hybridized'])
def test_grad_req_add_sums_over_passes_and_null_leaves_nothing(norm, hybridize):
    """Replicas that share a device accumulate their gradients."""
    x, _, _, _, dy = example((4, 32, 5, 5))
    layer = norm(in_channels=32)
    layer.initialize()
    if hybridize:
        layer.hybridize(static_alloc=True, static_shape=True)
    gradients = {}
    for request in ('write', 'add', 'null'):
        trained = [parameter for name, parameter in layer.collect_params().items() if 'running' not in name]
        for parameter in trained:
            parameter.grad_req = request
            if request != 'null':
                parameter.zero_grad()
        data = mx.nd.array(x)
        data.attach_grad(grad_req='write' if request == 'null' else request)
        for _ in range(3):
            with mx.autograd.record():
                y = layer(data)
            y.backward(mx.nd.array(dy))
        gradients[request] = [data.grad.asnumpy()]
        if request != 'null':
            gradients[request] += [parameter.grad().asnumpy() for parameter in trained]
    if norm is not BatchRenorm:  # whose r and d move with the running statistics
        for once, thrice in zip(gradients['write'], gradients['add']):
            np.testing.assert_allclose(thrice, 3 * once, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradients['null'][0], gradients['write'][0], rtol=1e-4, atol=1e-5)
    assert np.abs(gradients['add'][-1]).max() > 2 * np.abs(gradients['write'][-1]).max()


@pytest.mark.parametrize('dtype, rounding', [('float16', 1e-3), (BFLOAT16, 8e-3)], ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('way', ['eager', 'hybridized', 'in_a_network'])
@pytest.mark.parametrize('norm', EVERY_NORM)
def test_half_precision_in_and_out_with_float32_inside(norm, way, dtype, rounding):
    x, residual, _, _, _ = example((2, 32, 64, 64), mean=8)  # sums beyond the largest float16
    layer = norm()
    layer.initialize()
    net = layer
    if way == 'in_a_network':
        net = nn.HybridSequential()
        net.add(layer)
        # MXNet computes float16 on no CPU by itself, and its extension interface has no bfloat16.
        if dtype == 'float16' or active_operator()[0] == 'extension':
            net.cast(dtype)
    if way != 'eager':
        net.hybridize(static_alloc=True, static_shape=True)
    data = mx.nd.amp_cast(mx.nd.array(x), dtype=dtype)
    data.attach_grad()
    with mx.autograd.record():
        y = net(data)
    y.backward(mx.nd.amp_cast(mx.nd.array(residual), dtype=dtype))
    assert y.dtype == data.grad.dtype == data.dtype
    assert all(np.dtype(parameter.dtype) == np.float32 for parameter in layer.collect_params().values())
    in_float32 = norm(in_channels=32)
    in_float32.initialize()
    with mx.autograd.train_mode():
        wanted = in_float32(mx.nd.cast(data, 'float32'))
    assert relative_error(mx.nd.cast(y, 'float32'), wanted.asnumpy()) < rounding


@pytest.mark.parametrize('norm', EVERY_NORM)
def test_cast_keeps_the_parameters_float32(norm):
    net = nn.HybridSequential()
    net.add(nn.Dense(32), norm(in_channels=32))
    net.initialize()
    net.cast('float16')
    assert net[0].weight.dtype == 'float16'
    assert all(np.dtype(parameter.dtype) == np.float32 for parameter in net[1].collect_params().values())


def test_a_cast_back_to_float32_leaves_a_float32_network():
    net = nn.HybridSequential()
    net.add(GroupNorm(in_channels=32))
    net.initialize()
    net.hybridize()
    x = mx.nd.array(example((2, 32, 4, 4))[0])
    before = net(x).asnumpy()
    net.cast('float16')
    assert net(x.astype('float16')).dtype == np.float16
    net.cast('float32')
    assert (net(x).asnumpy() == before).all()


# ------------------------------------------------------------------------------------ batch norm and renorm

def renorm_reference(x, gamma, beta, dy, mean, variance, r_max, d_max, epsilon=1e-5):
    """Output and gradients of Batch Renormalization (Ioffe 2017, algorithm 1) in training; r = 1, d = 0 is BN."""
    axes = all_but_channels(x)
    batch_mean, batch_variance = x.mean(axes), x.var(axes)
    deviation, batch_deviation = np.sqrt(variance + epsilon), np.sqrt(batch_variance + epsilon)
    r = np.clip(batch_deviation / deviation, 1 / r_max, r_max)
    d = np.clip((batch_mean - mean) / deviation, -d_max, d_max)
    x_hat = (x - per_channel(batch_mean, x)) / per_channel(batch_deviation, x)
    renormalised = x_hat * per_channel(r, x) + per_channel(d, x)
    dx_hat = dy * per_channel(gamma * r, x)
    dx = (dx_hat - dx_hat.mean(axes, keepdims=True) - x_hat * (dx_hat * x_hat).mean(axes, keepdims=True)
          ) / per_channel(batch_deviation, x)
    return (renormalised * per_channel(gamma, x) + per_channel(beta, x), dx, (dy * renormalised).sum(axes),
            dy.sum(axes)), batch_mean, batch_variance


@pytest.mark.parametrize('hybridize', [False, True], ids=['eager', 'hybridized'])
@pytest.mark.parametrize('norm, r_max, d_max', [(BatchNorm, 1, 0), (BatchRenorm, 1.5, .5), (BatchRenorm, 9, 9)])
def test_batch_norm_and_renorm_equal_float64_over_steps(norm, r_max, d_max, hybridize):
    channels = 6
    mean, variance = np.zeros(channels), np.ones(channels)
    arguments = {'r_max': r_max, 'd_max': d_max} if norm is BatchRenorm else {}
    layer = None
    clipped = []
    for step in range(4):
        x, _, gamma, beta, dy = example((4, channels, 5, 7), mean=.4, seed=step)
        x *= np.linspace(.3, 2, channels).reshape(1, -1, 1, 1)
        layer = layer or made(norm(**arguments), gamma, beta, hybridize)
        layer.gamma.set_data(mx.nd.array(gamma))
        layer.beta.set_data(mx.nd.array(beta))
        data = mx.nd.array(x)
        data.attach_grad()
        with mx.autograd.record():
            y = layer(data)
        y.backward(mx.nd.array(dy))
        wanted, batch_mean, batch_variance = renorm_reference(x.astype('float64'), gamma, beta, dy, mean, variance,
                                                              r_max, d_max)
        clipped += list(np.sqrt(batch_variance / variance) > r_max)
        for got, expected in zip((y, data.grad, layer.gamma.grad(), layer.beta.grad()), wanted):
            assert relative_error(got, expected) < 1e-4
        mean, variance = .9 * mean + .1 * batch_mean, .9 * variance + .1 * batch_variance  # once a step
        assert relative_error(layer.running_mean.data(), mean) < 1e-5
        assert relative_error(layer.running_var.data(), variance) < 1e-5
    assert norm is BatchNorm or any(clipped) == (r_max == 1.5)  # the limits take part, or do not
    inference = (x - per_channel(mean, x)) / np.sqrt(per_channel(variance, x) + 1e-5)
    assert relative_error(layer(data), inference * per_channel(gamma, x) + per_channel(beta, x)) < 1e-5
    assert relative_error(layer.running_mean.data(), mean) < 1e-5  # inference updates nothing


def test_no_norm_adds_a_bias_and_a_residual():
    x, residual, _, beta, dy = example((2, 24, 5, 7))
    layer = NoNorm(in_channels=24, activation='relu')
    layer.initialize()
    layer.beta.set_data(mx.nd.array(beta))
    layer.hybridize()
    data = mx.nd.array(x)
    data.attach_grad()
    with mx.autograd.record():
        y = layer(data, mx.nd.array(residual))
    y.backward(mx.nd.array(dy))
    wanted = x.astype('float64') + per_channel(beta, x) + residual
    assert relative_error(y, np.maximum(wanted, 0)) < 1e-6
    assert relative_error(data.grad, dy * (wanted > 0)) < 1e-6
    assert relative_error(layer.beta.grad(), (dy * (wanted > 0)).sum((0, 2, 3))) < 1e-5
    assert list(layer.collect_params()) == [layer.prefix + 'beta']


@pytest.mark.parametrize('norm', EVERY_NORM)
def test_parameters_that_are_not_to_be_trained_have_no_gradient(norm):
    layer = norm(center=False, scale=False, in_channels=32)
    assert {parameter.grad_req for parameter in layer.collect_params().values()} == {'null'}
