"""The paper's 8 GPUs on fewer devices: the same update, the same running statistics."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon

from gn_gluon import BatchNorm, BatchRenorm, GroupNorm, optim
from gn_gluon.errors import UserError
from gn_gluon.models import ConvNet
from gn_gluon.replicas import Replicas, parse_devices

UPDATES = 5


def group_norm(**kwargs):
    return GroupNorm(num_groups=4, **kwargs)


def train(norm, devices, num_replicas, batch_per_replica, images_at_once=1):
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
    _, whole = train(group_norm, [mx.cpu()], 1, 16)
    assert distance(replicas, whole, start) <= 1e-4


@pytest.mark.parametrize('images_at_once, passes', [(1, 8), (4, 4), (7, 4), (16, 1), (32, 1)])
def test_replicas_that_go_through_the_network_together_make_the_same_update(images_at_once, passes):
    net = ConvNet(norm=group_norm, num_classes=4, channels=(8,))
    assert len(Replicas(net, None, [mx.cpu()], 8, 2, images_at_once).passes[0]) == passes
    net = ConvNet(norm=BatchNorm, num_classes=4, channels=(8,))
    assert len(Replicas(net, None, [mx.cpu()], 8, 2, images_at_once).passes[0]) == 8
    start, alone = train(group_norm, [mx.cpu()], 8, 2)
    _, together = train(group_norm, [mx.cpu()], 8, 2, images_at_once)
    assert distance(alone, together, start) <= 1e-5


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
