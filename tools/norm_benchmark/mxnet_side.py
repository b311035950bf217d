"""What a worker of MXNet runs: each function returned takes a step, synchronizes and gives the seconds it took."""
import functools
import time

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import HybridBlock, loss, nn

from gn_gluon import GroupNorm, optim
from gn_gluon.errors import UserError
from gn_gluon.norm.operator import active_operator
from norm_benchmark.contestants import NETWORKS

BFLOAT16 = np.dtype([('bfloat16', np.uint16)])
STATIC = {'static_alloc': True, 'static_shape': True}  # as training hybridizes


class StockNorm(HybridBlock):
    """Gluon's own layers in the place of a norm of gn_gluon: norm, then the sum, then Activation('relu').

    `fuses` is for BatchNorm: together with a ReLU that follows at once it is nn.BatchNormReLU.
    """

    def __init__(self, layer, fuses, in_channels, activation=None, gamma_initializer='ones', prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        self._activation = activation
        self._fuses = fuses
        with self.name_scope():
            self.norm = layer(in_channels=in_channels, gamma_initializer=gamma_initializer)

    def hybrid_forward(self, F, x, residual=None):
        if self._fuses:
            # All that nn.BatchNormReLU adds; only now is it known whether a sum comes between.
            self.norm.fuse_relu = fused = residual is None and self._activation == 'relu'
            if fused:
                return self.norm(x)
        y = self.norm(x)
        if residual is not None:
            y = y + residual
        # not F.relu, which is none of oneDNN's operators and would slow BN down
        return y if self._activation is None else F.Activation(y, act_type=self._activation)


def _stock_group_norm(num_groups, in_channels, gamma_initializer):
    return nn.GroupNorm(num_groups, gamma_initializer=gamma_initializer)  # counts the channels by itself


def choose_norm(case):
    """What the networks take as their norm. Raises UserError when the operator cannot be had."""
    contestant = case['contestant']
    if contestant['operator']:
        operator, reason = active_operator()
        if operator != contestant['operator']:
            raise UserError(reason)
        return functools.partial(GroupNorm, case['num_groups'])
    if contestant['norm'] == 'gn':
        return functools.partial(StockNorm, functools.partial(_stock_group_norm, case['num_groups']), False)
    return functools.partial(StockNorm, nn.BatchNorm, contestant['norm'] == 'bn-relu')


def build(case, **hybridize):
    """The steps of a case, {name: function}; a network has the one, '', and layers one each."""
    mx.random.seed(0)
    np.random.seed(0)
    norm = choose_norm(case)
    if case['what'] == 'layer':
        return {layer['name']: _layer_step(case, norm, layer) for layer in case['layers']}
    images = mx.nd.random.normal(shape=(case['batch'], 3, case['image_size'], case['image_size']))
    net = NETWORKS[case['network']].model(norm, case['num_classes'])
    net.infer_shape(images)
    net.initialize()
    net.cast(case['contestant']['dtype'])
    net.hybridize(**STATIC, **hybridize)
    step = _inference_step(net, images) if case['what'] == 'inference' else _training_step(case, net, images)
    return {'': step}


def _training_step(case, net, images):
    """Forward, backward and the project's own update (optim.Updater), the same for every norm."""
    labels = mx.nd.array(np.random.randint(0, case['num_classes'], case['batch']))
    cross_entropy = loss.SoftmaxCrossEntropyLoss()
    cross_entropy.hybridize(**STATIC)
    updater = optim.Updater(net._collect_params_with_prefix(), optim.SGD(momentum=0.9, nesterov=True), 1e-4)

    def step():
        start = time.perf_counter()
        with autograd.record():
            losses = cross_entropy(net(images), labels)
        losses.backward()
        updater.update(case['learning_rate'], case['batch'])
        total = losses.asnumpy().sum()
        mx.nd.waitall()
        seconds = time.perf_counter() - start
        if not np.isfinite(total):
            raise ArithmeticError(f'the training loss is {total}')
        return seconds
    return step


def _inference_step(net, images):
    def step():
        start = time.perf_counter()
        net(images).wait_to_read()
        mx.nd.waitall()
        return time.perf_counter() - start
    return step


def _layer_step(case, norm, layer):
    """Forward and backward of one norm, its inputs in the memory layout in which a convolution leaves them."""
    channels, size = layer['channels'], layer['size']
    source = mx.nd.random.normal(shape=(case['batch'], 16, size, size))
    weight = mx.nd.random.normal(shape=(channels, 16, 1, 1))
    if case['contestant']['dtype'] == 'bfloat16':
        source, weight = (mx.nd.amp_cast(array, dtype=BFLOAT16) for array in (source, weight))

    def convolve(**out):
        return mx.nd.Convolution(source, weight, num_filter=channels, kernel=(1, 1), no_bias=True, **out)

    inputs = [convolve() for _ in range(2 if layer['residual'] else 1)]
    gradient = convolve()
    for array in inputs:
        array.attach_grad()
    block = norm(in_channels=channels, activation='relu' if layer['relu'] else None)
    block.initialize()
    block.cast(case['contestant']['dtype'])
    block.hybridize(**STATIC)

    def step():
        for array in inputs + [gradient]:
            convolve(out=array)  # again, since an operator may have put its input into another layout for good
        mx.nd.waitall()
        start = time.perf_counter()
        with autograd.record():
            y = block(*inputs)
        y.backward(gradient)
        mx.nd.waitall()
        return time.perf_counter() - start
    return step
