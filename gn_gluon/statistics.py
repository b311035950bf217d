"""BN's statistics in evaluation: the running averages, those of the batch itself, or recomputed ("precise BN").

The differences between the three are what small batches break. MXNet's own BatchNorm cannot give the last two: on the
CPU a forward pass in training mode leaves no moments behind, and that mode switches dropout on. So the network stays in
inference mode, and just before a layer is called the moments of its input take the place of its running statistics.
"""
import contextlib

import mxnet as mx
import numpy as np

from gn_gluon.loop import predictions
from gn_gluon.norm import BatchNorm


def layers_with_running_statistics(net):
    """The BatchNorm and BatchRenorm layers of a network."""
    layers = []
    net.apply(lambda block: layers.append(block) if isinstance(block, BatchNorm) else None)
    return list(dict.fromkeys(layers))


def moments(x):
    """Mean and biased variance over all but the channels of an NDArray (N, C, ...): two float32 NDArrays (C,).

    Within 1e-6 of float64 even where the mean is a thousand deviations. As in norm.composed, sums are products with
    ones: MXNet's own reductions take many times as long.
    """
    # First out of oneDNN's own layout: a bfloat16 array there does not survive astype.
    pixels = mx.nd.reshape(x, (0, 0, -1)).astype('float32', copy=False)
    weights = mx.nd.full((1, pixels.shape[2]), 1 / pixels.shape[2], ctx=x.context)

    def mean_over_pixels(values):
        return mx.nd.mean(mx.nd.dot(values, weights, transpose_b=True), axis=0, keepdims=True)

    rough_mean = mean_over_pixels(pixels)
    centred = mx.nd.broadcast_sub(pixels, rough_mean)
    mean = rough_mean + mean_over_pixels(centred)
    return mean.reshape(-1), mean_over_pixels(mx.nd.square(centred)).reshape(-1)


@contextlib.contextmanager
def eager(net):
    """Inside, a network that was hybridized as a whole runs layer by layer, so that its layers' hooks are called."""
    active, flags = net._active, dict(net._flags)
    net.hybridize(False)
    try:
        yield
    finally:
        net.hybridize(active, **flags)


@contextlib.contextmanager
def _restored(layers):
    """Puts the layers' running statistics back at the end. Yields copies: {(layer, context): (mean, variance)}."""
    kept = {(layer, context): (layer.running_mean.data(context).copy(), layer.running_var.data(context).copy())
            for layer in layers for context in layer.running_mean.list_ctx()}
    try:
        yield kept
    finally:
        for (layer, context), statistics in kept.items():
            _write(layer, context, statistics)


def _write(layer, context, statistics):
    for parameter, values in zip((layer.running_mean, layer.running_var), statistics):
        values.copyto(parameter.data(context))


@contextlib.contextmanager
def batch_statistics(net, on_moments=None):
    """Inside, BatchNorm layers normalise by the moments of the batch that they are given, as in a training step.

    BatchRenorm applies its r and d, from its running statistics, too. Unlike `autograd.train_mode()` this leaves
    dropout off, and afterwards all is as before, running statistics included.

    Arguments:
        net: initialized network; to be called in inference mode.
        on_moments: called as on_moments(layer, mean, variance) with the moments (NDArrays, (C,)) of each layer's input
            in each forward pass.
    """
    layers = layers_with_running_statistics(net)
    with _restored(layers) as running, eager(net), contextlib.ExitStack() as hooks:

        def use_moments(layer, inputs):
            context = inputs[0].context
            mean, variance = moments(inputs[0])
            if on_moments is not None:
                on_moments(layer, mean, variance)
            _write(layer, context, layer.training_statistics(mean, variance, *running[layer, context]))

        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(use_moments))
        yield


@contextlib.contextmanager
def running_statistics(statistics):
    """Inside, layers have other running statistics: a dict from layer to (mean, variance), as of population_moments."""
    with _restored(statistics):
        for layer, (mean, variance) in statistics.items():
            layer.running_mean.set_data(mx.nd.array(mean))
            layer.running_var.set_data(mx.nd.array(variance))
        yield


def population_moments(net, devices, batches):
    """Mean and biased variance of what enters each BatchNorm layer, over all images of `batches`.

    The PreciseBN of Wu & Johnson (2021, "Rethinking 'Batch' in BatchNorm", Sec. 3): one pass with fixed weights, in
    which every layer before normalises by the batch at hand, as in training. The batches are pooled as in their
    appendix, which small batches need: the mean of the variances within batches plus the variance of the batches'
    means, hence the variance of all images together.

    Arguments:
        net: network initialized on `devices`; it is left as it was.
        devices: list of contexts.
        batches: iterable of loader.Batch of one size, such as augmented training images.
    Returns a dict from layer to (mean, variance), two float64 (C,), and the number of images.
    """
    populations, num_images, fresh = {}, 0, []
    with batch_statistics(net, lambda *layer_and_moments: fresh.append(layer_and_moments)):
        for batch, _ in predictions(net, devices, batches):
            num_images += len(batch.images)
            for layer, mean, variance in fresh:
                populations.setdefault(layer, _Population()).add(mean.asnumpy(), variance.asnumpy())
            fresh.clear()
    return {layer: population.moments() for layer, population in populations.items()}, num_images


class _Population:
    """Pools the moments of batches of one size in float64, without differences of large numbers (Welford 1962)."""

    def __init__(self):
        self._count, self._mean, self._within, self._between = 0, 0.0, 0.0, 0.0

    def add(self, mean, variance):
        self._count += 1
        difference = mean.astype(np.float64) - self._mean
        self._mean = self._mean + difference / self._count
        self._between = self._between + difference * (mean - self._mean)
        self._within = self._within + variance

    def moments(self):
        return self._mean, (self._within + self._between) / self._count
