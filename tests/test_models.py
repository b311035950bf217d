"""The networks against published figures and against what the paper says of their initialisation."""
import functools

import mxnet as mx
import numpy as np
import pytest

from gn_gluon import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm
from gn_gluon.errors import UserError
from gn_gluon.models import VGG16, CifarResNet, ConvNet, ResNet, count_multiply_adds, count_parameters

GN8 = functools.partial(GroupNorm, num_groups=8)
EVERY_NORM = (GN8, LayerNorm, InstanceNorm, BatchNorm, BatchRenorm, NoNorm)


# ------------------------------------------------------------------------------------ published figures

@pytest.mark.parametrize('make, input_shape, parameters', [
    (lambda: ResNet(GroupNorm), (3, 224, 224), 25557032),
    (lambda: ResNet(BatchNorm), (3, 224, 224), 25557032),
    (lambda: ResNet(GroupNorm, depth=101), (3, 224, 224), 44549160),
    (lambda: VGG16(NoNorm), (3, 224, 224), 138357544),
    (lambda: CifarResNet(GN8, depth=20), (3, 32, 32), 269722),
], ids=['resnet50_gn', 'resnet50_bn', 'resnet101', 'vgg16_without_norm', 'cifar_resnet20'])
def test_parameters_are_as_published(make, input_shape, parameters):
    assert count_parameters(make(), input_shape) == parameters


@pytest.mark.parametrize('make, giga', [
    (lambda: ResNet(GroupNorm), 4.09),
    (lambda: ResNet(BatchNorm, depth=101), 7.80),
    (lambda: VGG16(NoNorm), 15.47),
], ids=['resnet50', 'resnet101', 'vgg16'])
def test_multiply_adds_at_224_are_as_published(make, giga):
    assert round(count_multiply_adds(make(), (3, 224, 224)) / 1e9, 2) == giga


def test_counts_are_those_of_the_initialized_network():
    net = CifarResNet(BatchNorm, depth=8)
    net.initialize()
    net(mx.nd.zeros((1, 3, 32, 32)))
    trained = [p for p in net.collect_params().values() if p.grad_req != 'null']
    assert count_parameters(net, (3, 32, 32)) == sum(int(np.prod(parameter.shape)) for parameter in trained)


# ------------------------------------------------------------------------------------ structure

def initialized(net, shape=(2, 3, 32, 32)):
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    net(mx.nd.zeros(shape)).wait_to_read()
    return net


@pytest.mark.parametrize('net, last, blocks', [
    (ResNet(GroupNorm), 'norm3', 16), (CifarResNet(GN8, depth=20), 'norm2', 9)], ids=['resnet50', 'cifar_resnet20'])
def test_exactly_the_last_gamma_of_each_residual_block_is_zero(net, last, blocks):
    net.collect_params('.*gamma').initialize()
    gammas = {name: parameter.data().asnumpy() for name, parameter in net._collect_params_with_prefix().items()
              if name.endswith('gamma')}
    zero = {name for name, gamma in gammas.items() if (gamma == 0).all()}
    assert zero == {name for name in gammas if name.endswith(f'.{last}.gamma')}
    assert len(zero) == blocks
    assert all((gammas[name] == 1).all() for name in gammas if name not in zero)


def test_no_gamma_is_zero_where_a_relu_would_keep_it_there():
    net = initialized(CifarResNet(GN8, depth=8, pre_activation=True))
    assert all((parameter.data().asnumpy() == 1).all() for parameter in net.collect_params('.*gamma').values())


def test_the_stride_of_a_bottleneck_is_on_its_3x3_convolution():
    operators = ResNet(GroupNorm)(mx.sym.var('data')).attr_dict()
    strided = {name: operator['kernel'] for name, operator in operators.items()
               if 'num_filter' in operator and operator['stride'] == '(2, 2)'}
    assert sorted(strided.values()) == ['(1, 1)'] * 3 + ['(3, 3)'] * 3 + ['(7, 7)']
    assert all('shortcut' in name for name, kernel in strided.items() if kernel == '(1, 1)')


@pytest.mark.parametrize('make', [lambda: ResNet(GroupNorm), lambda: CifarResNet(GN8, depth=32),
                                  lambda: VGG16(GroupNorm, num_classes=100, hidden=512), lambda: ConvNet(GroupNorm)],
                         ids=['resnet50', 'cifar_resnet', 'vgg16', 'convnet'])
def test_convolutions_are_he_normal_by_fan_out_without_bias_and_dense_layers_normal_001(make):
    net = initialized(make(), (1, 3, 32, 32))
    convolutions = 0
    for name, parameter in net.collect_params().items():
        weights = parameter.data().asnumpy()
        if weights.ndim == 4:
            wanted = np.sqrt(2 / (weights.shape[0] * weights.shape[2] * weights.shape[3]))
            convolutions += 1
        elif weights.ndim == 2:
            wanted = .01
        else:
            assert name.endswith(('gamma', 'beta')) or ('dense' in name and name.endswith('bias'))
            continue
        tolerance = 5 / np.sqrt(2 * weights.size)  # five standard errors of a standard deviation
        assert abs(weights.std() / wanted - 1) < tolerance, name
        assert abs(weights.mean()) < 5 * wanted / np.sqrt(weights.size), name
        assert np.abs(weights).max() > 2 * wanted, name  # normal, not uniform
    assert convolutions


@pytest.mark.parametrize('pre_activation', [False, True])
def test_shortcuts_of_a_cifar_resnet_take_every_second_pixel_and_add_channels_of_zeros(pre_activation):
    net = CifarResNet(NoNorm, depth=8, pre_activation=pre_activation)
    x = mx.nd.random.uniform(shape=(2, 16, 8, 8))
    shortcut = next(block for block in net.features if getattr(block, 'shortcut', None) is not None
                    and block.shortcut._stride == 2).shortcut
    y = shortcut(x).asnumpy()
    assert y.shape == (2, 32, 4, 4)
    assert (y[:, :16] == x.asnumpy()[:, :, ::2, ::2]).all()
    assert (y[:, 16:] == 0).all()
    assert not list(shortcut.collect_params())


def test_a_pre_activation_network_is_the_identity_between_its_first_activation_and_its_last_norm():
    """With its convolutions silenced but the first, a stage-1 block passes on relu(norm(conv(x))) and nothing else."""
    net = initialized(CifarResNet(GN8, depth=8, pre_activation=True))
    x = mx.nd.random.uniform(shape=(2, 3, 32, 32))
    first, block = net.features[0], net.features[1]
    block.conv2.weight.set_data(mx.nd.zeros(block.conv2.weight.shape))
    np.testing.assert_array_equal(block(first(x)).asnumpy(), block.norm1(first(x)).asnumpy())
    later = net.features[2]
    later.conv2.weight.set_data(mx.nd.zeros(later.conv2.weight.shape))
    y = mx.nd.random.normal(shape=(2, 16, 8, 8))
    np.testing.assert_array_equal(later(y).asnumpy()[:, :16], y.asnumpy()[:, :, ::2, ::2])


@pytest.mark.parametrize('shape, channels', [((2, 1, 28, 28), (64, 128, 256, 512)), ((2, 3, 32, 32), (16, 32)),
                                             ((2, 1, 8, 8), (32, 64))])
def test_the_small_network_normalises_before_its_activation_once(shape, channels):
    net = ConvNet(GN8, channels=channels)
    assert initialized(net, shape)(mx.nd.zeros(shape)).shape == (2, 10)
    kinds = [type(block).__name__ for block in net.features]
    assert kinds == ['Convolution', 'GroupNorm', 'MaxPool2D'] * len(channels) + ['Flatten', 'Dropout']


# ------------------------------------------------------------------------------------ every network, every norm

@pytest.mark.parametrize('norm', EVERY_NORM, ids=['gn', 'ln', 'in', 'bn', 'brn', 'none'])
@pytest.mark.parametrize('make, shape', [
    (lambda norm: ResNet(norm, num_classes=10), (2, 3, 64, 64)),
    (lambda norm: CifarResNet(norm, depth=14), (2, 3, 16, 16)),
    (lambda norm: CifarResNet(norm, depth=8, pre_activation=True, channels=(8, 16, 24)), (2, 1, 8, 8)),
    (lambda norm: VGG16(norm, num_classes=10, hidden=64), (2, 3, 32, 32)),
    (lambda norm: ConvNet(norm, channels=(32, 64)), (2, 1, 8, 8)),
], ids=['resnet50', 'cifar_resnet', 'pre_activation', 'vgg16', 'convnet'])
def test_every_network_trains_with_every_norm(make, shape, norm):
    mx.random.seed(0)
    net = make(norm)
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    x, labels = mx.nd.random.uniform(shape=shape), mx.nd.array([1, 2])
    with mx.autograd.record():
        y = net(x)
        loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(y, labels).sum()
    loss.backward()
    assert y.shape == (2, 10)
    assert np.isfinite(loss.asscalar())
    assert np.isfinite(net(x).asnumpy()).all()
    gradients = {name: parameter.grad().asnumpy() for name, parameter in net.collect_params().items()
                 if parameter.grad_req != 'null'}
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert gradients[net.output.weight.name].any()


# ------------------------------------------------------------------------------------ what the networks refuse

@pytest.mark.parametrize('make, found', [
    (lambda: ResNet(GroupNorm, depth=34), 'depth=34 in ResNet: give one of 50, 101'),
    (lambda: CifarResNet(GN8, depth=21), r'depth=21 in CifarResNet: give 6n \+ 2'),
    (lambda: CifarResNet(GN8, depth=2), 'depth=2 in CifarResNet'),
    (lambda: CifarResNet(GN8, channels=(16, 48, 32)), r'channels=\(16, 48, 32\) in CifarResNet'),
    (lambda: CifarResNet(GN8, channels=(16, 32)), r'channels=\(16, 32\) in CifarResNet'),
    (lambda: ConvNet(GN8, channels=(16, 0)), r'channels=\(16, 0\) in ConvNet'),
    (lambda: ConvNet(GN8, channels=()), r'channels=\(\) in ConvNet'),
    (lambda: ConvNet(GroupNorm, channels=(48,)), 'num_groups=32 does not divide the 48 channels'),
])
def test_what_is_not_offered_is_refused_by_its_value(make, found):
    with pytest.raises(UserError, match=found):
        make()
