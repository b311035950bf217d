"""Training in bfloat16: float32 parameters, gradients near those of float32, and refusals in words."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from gn_gluon import GroupNorm, LayerNorm, compat, precision
from gn_gluon.errors import UserError
from gn_gluon.models import VGG16, CifarResNet, ConvNet, ResNet


def group_norm(**arguments):
    return GroupNorm(8, **arguments)


NETWORKS = {
    'cifar_resnet': (lambda norm: CifarResNet(norm), (8, 3, 32, 32)),
    'pre_activation': (lambda norm: CifarResNet(norm, pre_activation=True), (8, 3, 32, 32)),
    'convnet': (lambda norm: ConvNet(norm, dropout=0), (8, 3, 32, 32)),
    'resnet50': (lambda norm: ResNet(norm, num_classes=10), (4, 3, 64, 64)),
    'vgg16': (lambda norm: VGG16(norm, num_classes=10, hidden=64, dropout=0), (2, 3, 64, 64)),
}


def gradients(net, images, labels, request='write', passes=1):
    parameters = net._collect_params_with_prefix()
    for parameter in parameters.values():
        parameter.grad_req = request
        parameter.zero_grad()
    net.hybridize(static_alloc=True, static_shape=True)
    for _ in range(passes):
        with autograd.record():
            logits = net(images)
            loss = gluon.loss.SoftmaxCrossEntropyLoss()(logits, labels)
        loss.backward()
    assert logits.dtype == np.float32
    assert all(np.dtype(parameter.dtype) == np.float32 for parameter in parameters.values())
    return np.concatenate([parameter.grad().asnumpy().ravel() for parameter in parameters.values()])


@pytest.mark.skipif('avx512f' not in compat.processor_flags(), reason='oneDNN has bfloat16 for AVX-512 only')
@pytest.mark.parametrize('norm', [group_norm, LayerNorm], ids=['gn', 'ln'])
@pytest.mark.parametrize('network', sorted(NETWORKS))
def test_gradients_in_bfloat16_are_near_those_in_float32_and_add_up(network, norm):
    make, shape = NETWORKS[network]
    random = np.random.RandomState(0)
    images, labels = mx.nd.array(random.normal(size=shape)), mx.nd.array(random.randint(0, 10, shape[0]))
    mx.random.seed(0)
    net = make(norm)
    net.initialize()
    net(images)
    for parameter in net.collect_params('.*gamma').values():
        parameter.set_data(mx.nd.ones(parameter.shape))
    wanted = gradients(net, images, labels)
    net.cast('bfloat16')
    got = gradients(net, images, labels)
    # 8 bits of precision in up to 50 layers, one after another
    assert np.linalg.norm(got - wanted) < 0.15 * np.linalg.norm(wanted)
    np.testing.assert_allclose(gradients(net, images, labels, 'add', passes=2), 2 * got, rtol=1e-4,
                               atol=1e-4 * np.abs(got).max())
    net.cast('float32')
    np.testing.assert_array_equal(gradients(net, images, labels), wanted)


def test_a_type_that_the_device_cannot_train_in_is_refused(monkeypatch):
    with pytest.raises(UserError, match="'float16' is for GPUs"):
        precision.check_trainable('float16', [mx.cpu()])
    with pytest.raises(UserError, match="'bfloat16' is for CPUs"):
        precision.check_trainable('bfloat16', [mx.gpu(0)])
    monkeypatch.setattr(compat, 'processor_flags', lambda: ('avx2', 'avx512f'))
    with pytest.raises(UserError, match='AMX or AVX512_BF16'):
        precision.check_trainable('bfloat16', [mx.cpu()])
    monkeypatch.setattr(compat, 'processor_flags', lambda: ('amx_bf16',))
    precision.check_trainable('bfloat16', [mx.cpu()])


def test_amx_is_asked_for_only_where_it_is_and_the_user_keeps_his_choice():
    environ = {}
    compat.allow_amx(environ, ('avx512f', 'avx512_bf16'))
    assert environ == {}
    environ = {'DNNL_MAX_CPU_ISA': 'AVX2'}
    compat.allow_amx(environ, ('amx_tile', 'amx_bf16'))
    assert environ == {'DNNL_MAX_CPU_ISA': 'AVX2'}
