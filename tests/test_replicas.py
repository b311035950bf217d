"""The paper's 8 GPUs on fewer devices: the same update, the same running statistics."""
import gc

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon

from gn_gluon import BatchNorm, BatchRenorm, GroupNorm, optim
from gn_gluon.data.loader import Batch
from gn_gluon.errors import UserError
from gn_gluon.loop import evaluate, train_epoch
from gn_gluon.metrics import Metrics
from gn_gluon.models import ConvNet, ResNet
from gn_gluon.replicas import Replicas, check_kvstore, parse_devices

UPDATES = 5


def group_norm(**kwargs):
    return GroupNorm(num_groups=4, **kwargs)


def train(norm, devices, num_replicas, batch_per_replica, images_at_once=2):
    """Returns weights before and after, by name, of the same training on the given layout."""
    mx.random.seed(0)
    net = ConvNet(norm=norm, num_classes=4, channels=(8, 16), dropout=0)
    net.infer_shape(mx.nd.zeros((1, 3, 8, 8)))
    net.initialize(ctx=devices)
    net.hybridize(static_alloc=True, static_shape=True)
    parameters = net._collect_params_with_prefix()
    for parameter in parameters.values():
        parameter._finish_deferred_init()
    before = {name: p.list_data()[0].asnumpy() for name, p in parameters.items()}
    replicas = Replicas(net, gluon.loss.SoftmaxCrossEntropyLoss(), devices, num_replicas, batch_per_replica,
                        images_at_once)
    updater = optim.Updater(parameters, optim.SGD(), weight_decay=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        images, labels = rng.normal(size=(16, 3, 8, 8)).astype(np.float32), rng.integers(0, 4, 16)
        logits = replicas.compute_gradients(images, labels)
        assert sum(len(part) for part in logits) == 16
        updater.update(0.05, 16)
    for parameter in parameters.values():  # every device must hold the same
        copies = [data.asnumpy() for data in parameter.list_data()]
        assert all(np.array_equal(copies[0], copy) for copy in copies)
    return before, {name: p.list_data()[0].asnumpy() for name, p in parameters.items()}


def distance(a, b, start):
    """||a - b|| / ||a - start|| over the trainable weights."""
    names = [name for name in a if 'running' not in name]
    return (np.sqrt(sum(((a[n] - b[n]) ** 2).sum() for n in names))
            / np.sqrt(sum(((a[n] - start[n]) ** 2).sum() for n in names)))


@pytest.mark.parametrize('norm', [group_norm, BatchNorm, BatchRenorm])
@pytest.mark.parametrize('num_devices', [3, 8])
def test_eight_replicas_on_one_device_equal_eight_on_several(norm, num_devices):
    start, one = train(norm, [mx.cpu()], 8, 2)
    _, several = train(norm, [mx.cpu(i) for i in range(num_devices)], 8, 2)
    assert distance(one, several, start) <= 1e-5
    for name in one:
        if 'running' in name:
            np.testing.assert_allclose(one[name], several[name], rtol=1e-6, atol=1e-6)
            assert not np.array_equal(one[name], start[name])


def test_group_norm_of_eight_replicas_equals_one_batch_of_sixteen():
    start, replicas = train(group_norm, [mx.cpu()], 8, 2)
    _, whole = train(group_norm, [mx.cpu()], 1, 16, images_at_once=16)
    assert distance(replicas, whole, start) <= 1e-4


@pytest.mark.parametrize('images_at_once, passes', [(1, 16), (2, 8), (4, 4), (7, 4), (16, 1), (32, 1)])
def test_replicas_that_go_through_the_network_together_make_the_same_update(images_at_once, passes):
    net = ConvNet(norm=group_norm, num_classes=4, channels=(8,))
    assert len(Replicas(net, None, [mx.cpu()], 8, 2, images_at_once).passes[0]) == passes
    net = ConvNet(norm=BatchNorm, num_classes=4, channels=(8,))
    assert len(Replicas(net, None, [mx.cpu()], 8, 2, images_at_once).passes[0]) == 8
    start, alone = train(group_norm, [mx.cpu()], 8, 2)
    _, together = train(group_norm, [mx.cpu()], 8, 2, images_at_once)
    assert distance(alone, together, start) <= 1e-5


def test_one_large_replica_in_parts_makes_the_same_update_where_samples_are_kept_apart():
    start, whole = train(group_norm, [mx.cpu()], 1, 16, images_at_once=16)
    _, parts = train(group_norm, [mx.cpu()], 1, 16, images_at_once=5)  # 4 x 4 images
    assert distance(whole, parts, start) <= 1e-5


def test_batch_norm_sees_two_images_at_a_time_not_sixteen():
    start, replicas = train(BatchNorm, [mx.cpu()], 8, 2)
    _, whole = train(BatchNorm, [mx.cpu()], 1, 16)
    assert distance(replicas, whole, start) > 1e-2


def test_running_statistics_become_the_mean_over_replicas():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 3, 8, 8)).astype(np.float32)
    alone = []
    for rows in [slice(0, 16)] + [slice(2 * i, 2 * i + 2) for i in range(8)]:
        mx.random.seed(0)
        net = gluon.nn.HybridSequential()
        net.add(BatchNorm(in_channels=3), gluon.nn.Dense(4, in_units=192))
        net.initialize()
        num_replicas = 8 if rows.stop - rows.start == 16 else 1
        replicas = Replicas(net, gluon.loss.SoftmaxCrossEntropyLoss(), [mx.cpu()], num_replicas, 2)
        replicas.compute_gradients(images[rows], np.zeros(rows.stop - rows.start))
        alone.append({name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()
                      if 'running' in name})
    together = alone.pop(0)
    assert len(together) == 2
    for name, value in together.items():
        np.testing.assert_allclose(value, np.mean([each[name] for each in alone], axis=0), rtol=1e-6, atol=1e-7)


def test_devices_are_named_one_by_one_or_as_a_range():
    assert parse_devices('cpu', 2) == [mx.cpu(0)]
    assert parse_devices('cpu(0-7)', 8) == [mx.cpu(i) for i in range(8)]
    assert parse_devices(('cpu(1)', 'cpu(3)'), 2) == [mx.cpu(1), mx.cpu(3)]
    assert len(parse_devices('auto', 1)) == 1


@pytest.mark.parametrize('devices', ['tpu', 'gpu(64)', (), ('cpu(0)', 'cpu(0)'), 'cpu(0-2)'])
def test_a_device_that_is_none_missing_doubled_or_idle_is_refused(devices):
    with pytest.raises(UserError, match='train.devices'):
        parse_devices(devices, 2)


def test_nccl_is_refused_where_it_cannot_work():
    check_kvstore('device', [mx.cpu(0), mx.cpu(1)])
    with pytest.raises(UserError, match='is for GPUs'):
        check_kvstore('nccl', [mx.cpu()])
    if mx.runtime.Features().is_enabled('NCCL'):
        check_kvstore('nccl', [mx.gpu()])
    else:
        with pytest.raises(UserError, match='has no NCCL'):
            check_kvstore('nccl', [mx.gpu()])


class Raises(gluon.HybridBlock):
    """A norm that keeps samples apart, and fails as MXNet does."""

    def __init__(self, message):
        super().__init__()
        self.message = message

    def forward(self, x):
        raise mx.MXNetError(self.message)


@pytest.mark.parametrize('message', [
    'Traceback (most recent call last):\n  File "../src/storage/./pooled_storage_manager.h", line 161\n'
    'MXNetError: cudaMalloc retry failed: out of memory',
    'Check failed: e == CUDNN_STATUS_SUCCESS (2 vs. 0) : cuDNN: CUDNN_STATUS_ALLOC_FAILED'])
def test_a_full_gpu_is_told_how_to_keep_the_replicas(message):
    replicas = Replicas(Raises(message), gluon.loss.L2Loss(), [mx.cpu()], 8, 2, images_at_once=4)
    batch = Batch(np.zeros((16, 3, 8, 8), np.float32), np.zeros(16, np.int32), 16)
    parameter = gluon.Parameter('weight', shape=(1,))
    parameter.initialize()
    updater = optim.Updater({'weight': parameter}, optim.SGD())
    with pytest.raises(UserError, match='^out of memory .*lower train.images_at_once below 4'):
        train_epoch(replicas, updater, [batch], Metrics(), lambda _: 0.1, 0, lambda *_: None)
    with pytest.raises(UserError, match='^out of memory .*lower train.validation_batch'):
        evaluate(replicas.net, [mx.cpu()], [batch])
    replicas.net.message = 'Shape inconsistent'
    with pytest.raises(mx.MXNetError, match='Shape inconsistent'):
        train_epoch(replicas, updater, [batch], Metrics(), lambda _: 0.1, 0, lambda *_: None)


def test_batch_norm_is_not_told_to_split_its_replicas():
    net = ConvNet(norm=BatchNorm, num_classes=4, channels=(8,))
    assert 'images_at_once' not in Replicas(net, None, [mx.cpu()], 8, 2).memory_hint()


@pytest.mark.slow
@pytest.mark.parametrize('norm', [GroupNorm, BatchNorm])
def test_a_resnet_50_on_eight_devices_makes_the_update_of_one_that_accumulates(norm):
    """8 x 2 images of 64 pixels: the layout of resnet50_{gn,bn}_bs2 in small. 5 GB."""
    layouts = [([mx.cpu()], 8, 2), ([mx.cpu(i) for i in range(8)], 8, 2)]
    if norm is GroupNorm:
        layouts.append(([mx.cpu()], 1, 16))
    start = one = None
    for devices, num_replicas, batch_per_replica in layouts:
        before, after = one_update_of_resnet50(norm, devices, num_replicas, batch_per_replica)
        gc.collect()  # the network before takes room
        if one is None:
            start, one = before, after
        assert all(np.array_equal(before[name], start[name]) for name in start)
        assert distance(one, after, start) <= 1e-3
    assert all(not np.array_equal(one[name], start[name]) for name in start)


def one_update_of_resnet50(norm, devices, num_replicas, batch_per_replica):
    """Weights by name before and after it; every replica alone but for one of 16 images."""
    mx.random.seed(0)
    net = ResNet(norm, num_classes=200)
    net.infer_shape(mx.nd.zeros((1, 3, 64, 64)))
    net.initialize(ctx=devices)
    net.hybridize(static_alloc=True, static_shape=True)
    parameters = net._collect_params_with_prefix()
    for name, parameter in parameters.items():
        parameter._finish_deferred_init()
        if name.endswith('norm3.gamma'):  # at 0 it would keep all gradients out of its branch
            parameter.set_data(mx.nd.ones(parameter.shape) / 2)
    before = {name: p.list_data()[0].asnumpy() for name, p in parameters.items()}
    replicas = Replicas(net, gluon.loss.SoftmaxCrossEntropyLoss(), devices, num_replicas, batch_per_replica,
                        images_at_once=batch_per_replica)
    updater = optim.Updater(parameters, optim.SGD(), weight_decay=1e-4)
    rng = np.random.default_rng(0)
    replicas.compute_gradients(rng.normal(size=(16, 3, 64, 64)).astype(np.float32), rng.integers(0, 200, 16))
    updater.update(0.00625, 16)
    return before, {name: p.list_data()[0].asnumpy() for name, p in parameters.items()}
