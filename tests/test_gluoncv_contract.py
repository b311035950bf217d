"""Our GroupNorm as `norm_layer` of GluonCV's own networks."""
import functools

import mxnet as mx
import numpy as np
import pytest
from gluoncv import model_zoo
from mxnet import gluon

from gn_gluon import GroupNorm


@pytest.mark.parametrize('make, groups, size', [
    (functools.partial(model_zoo.resnet50_v1b, last_gamma=True), 32, 64),
    (model_zoo.cifar_resnet20_v1, 8, 32),
], ids=['resnet50_v1b', 'cifar_resnet20_v1'])
def test_hybridized_training_step_of_a_gluoncv_network_without_running_statistics(make, groups, size):
    mx.random.seed(0)
    net = make(norm_layer=GroupNorm, norm_kwargs={'num_groups': groups}, classes=10)
    net.initialize(mx.init.Xavier())
    net.hybridize(static_alloc=True, static_shape=True)
    loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
    x, labels = mx.nd.random.uniform(shape=(2, 3, size, size)), mx.nd.array([3, 7])
    losses = []
    for step in range(4):
        with mx.autograd.record():
            loss = loss_of(net(x), labels)
        loss.backward()
        if step == 0:  # Trainer sees parameters of known shape
            norms = [name for name in net.collect_params() if name.endswith('gamma')]
            assert len(norms) > 18
            assert not [name for name in net.collect_params() if 'running' in name]
            assert all('groupnorm' in name for name in norms)
            trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': .01})
        trainer.step(2)
        losses.append(float(loss.mean().asscalar()))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
