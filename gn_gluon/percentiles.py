"""The percentiles of a layer's responses over training, as in Figure 6 of the paper."""
import itertools
import math

import mxnet as mx
import numpy as np

from gn_gluon.data import loader
from gn_gluon.errors import UserError
from gn_gluon.loop import predictions
from gn_gluon.statistics import eager

#: As in Figure 6.
PERCENTILES = (1, 20, 80, 99)


class Percentiles:
    """Measures {1, 20, 80, 99} percentiles of one layer's responses; what a gin file binds as `percentiles.*`.

    They are taken before the first update and then `times_per_epoch` times, over all pixels and channels of the same
    validation images each time, in inference mode (BN: running statistics; no dropout). A norm's response is what it
    gives before the activation that it fuses; every other layer's is its output as it is.

    Figure 6 shows conv5_3 of VGG-16 before norm and ReLU. That is layer 'features.28' of VGG16; in the network without
    norm 'features.29', where NoNorm holds the bias of that convolution.

    Arguments:
        net: the network.
        layer: name of the layer, such as 'features.28' or 'features.3.norm2'; None: nothing is measured.
        num_images: validation images, the first of a random order that is the same in every run of one seed.
        times_per_epoch: evenly spread, the last at the end of the epoch.
    Raises UserError, listing the layers, when the network has no such layer.
    """

    def __init__(self, net, layer=None, num_images=100, times_per_epoch=1):
        for name, value in (('num_images', num_images), ('times_per_epoch', times_per_epoch)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f'percentiles.{name} = {value!r} must be a whole number above 0')
        self.layer, self.num_images, self.times_per_epoch = layer, num_images, times_per_epoch
        self._net = net
        if layer is not None:
            layers = dict(_layers(net))
            if layer not in layers:
                raise UserError(f'percentiles.layer = {layer!r} is no layer of {type(net).__name__}; there are '
                                + _listed(layers))
            self._block = layers[layer]

    def due(self, step, steps_per_epoch):
        """Whether to measure after update `step` of an epoch; step 0 is the start of training."""
        if self.layer is None:
            return False
        return step == 0 or (step * self.times_per_epoch // steps_per_epoch
                             > (step - 1) * self.times_per_epoch // steps_per_epoch)

    def measure(self, dataset, seed, device, images_at_once):
        """One measurement: a dict of layer, num_images and percentiles (from '1' to '99')."""
        num_images = min(self.num_images, dataset.num_validation)
        batch_size = min(images_at_once, num_images)
        batches = itertools.islice(loader.full_validation_batches(dataset, batch_size, seed),
                                   math.ceil(num_images / batch_size))
        responses = []

        def keep(block, inputs, output):
            if hasattr(block, 'before_activation'):
                output = block.before_activation(*inputs)
            # Reshaped first, for the reason that statistics.moments has.
            responses.append(mx.nd.reshape(output, (-2,)).astype('float32', copy=False).asnumpy())

        mx.nd.waitall()  # an update may still be running on in the compiled network, which `eager` discards
        with eager(self._net), self._block.register_forward_hook(keep):
            for _ in predictions(self._net, [device], batches):
                pass
        values = np.percentile(np.concatenate(responses)[:num_images], PERCENTILES)
        return {'layer': self.layer, 'num_images': num_images,
                'percentiles': {str(which): float(value) for which, value in zip(PERCENTILES, values)}}


def _layers(block, prefix=''):
    """All layers below `block`, as (name, layer); the names are those that parameters begin with."""
    for name, child in block._children.items():
        yield prefix + name, child
        yield from _layers(child, prefix + name + '.')


def _listed(layers):
    """Names of the layers that have parameters, kind by kind: 'Conv2D features.0, features.3; Dense output'."""
    kinds = {}
    for name, layer in layers.items():
        if layer._reg_params:
            kinds.setdefault(type(layer).__name__, []).append(name)
    return '; '.join(f"{kind} {', '.join(names)}" for kind, names in kinds.items())
