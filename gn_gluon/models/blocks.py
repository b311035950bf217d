"""What the networks share: their initialisation (Sec. 4.1 of the paper), convolutions and dense layers."""
import mxnet as mx
from mxnet.gluon import nn

from gn_gluon.errors import UserError
from gn_gluon.precision import narrow, to

# He et al. (2015): normal, variance 2 / fan-out. mx.init.MSRAPrelu() is another one (average fan, slope 0.25).
HE_FAN_OUT = mx.init.Xavier('gaussian', 'out', 2)
CLASSIFIER = mx.init.Normal(0.01)


class Convolution(nn.Conv2D):
    """A square convolution that keeps the image size up to its stride; the norm after it has the bias.

    in_channels : 0 for the first of a network, which takes images. padding : 'symmetric', or 'same' for TensorFlow's,
    which where the stride is 2 and the size is even has one row and column less at the top and left. After
    cast('bfloat16') or cast('float16') it works in that type, with float32 weights, whose grad_req must be settled
    before the first call; the first convolution then takes images of float32 all the same.
    """

    def __init__(self, in_channels, channels, kernel, stride=1, padding='symmetric'):
        # One pixel more all round, and the first row and column of the output left out: Pad takes no bfloat16.
        self._leaves_out = padding == 'same' and stride == 2 and kernel > 1
        super().__init__(channels, kernel, stride, kernel // 2 + self._leaves_out, use_bias=False,
                         weight_initializer=HE_FAN_OUT, in_channels=in_channels)
        self._takes_images = not in_channels
        self._narrow = None

    def cast(self, dtype):
        self._narrow = narrow(dtype)
        super().cast('float32' if self._narrow else dtype)

    def hybrid_forward(self, F, x, weight):
        if self._narrow:
            weight = to(F, weight, self._narrow, adds=self.weight.grad_req == 'add')
            x = to(F, x, self._narrow) if self._takes_images else x
        y = super().hybrid_forward(F, x, weight)
        return F.slice(y, begin=(None, None, 1, 1), end=(None, None, None, None)) if self._leaves_out else y


class Flatten(nn.Flatten):
    """nn.Flatten whose output is float32, also when the network before it is cast to bfloat16 or float16."""

    _widens = False

    def cast(self, dtype):
        self._widens = narrow(dtype) is not None
        super().cast(dtype)

    def hybrid_forward(self, F, x):
        return super().hybrid_forward(F, to(F, x, 'float32') if self._widens else x)


class GlobalAverage(Flatten):
    """The mean over all pixels, (N, C, H, W) to (N, C) in float32.

    nn.GlobalAvgPool2D is oneDNN's, whose gradient takes a tenth of a CIFAR ResNet's step; this is MXNet's other one.
    """

    def hybrid_forward(self, F, x):
        x = to(F, x, 'float32') if self._widens else x
        return F.flatten(F.contrib.AdaptiveAvgPooling2D(x, output_size=1))


class Dense(nn.Dense):
    """nn.Dense that stays in float32 when its network is cast to bfloat16 or float16."""

    def __init__(self, units, activation=None, in_units=0):
        super().__init__(units, activation, weight_initializer=CLASSIFIER, in_units=in_units)

    def cast(self, dtype):
        super().cast('float32' if narrow(dtype) else dtype)


def check_channels(model, channels):
    """Raises UserError unless `channels`, an argument of `model`, is a list of positive numbers."""
    if not channels or min(channels) < 1:
        raise UserError(f'channels={tuple(channels)} in {model}: give one positive number for each stage')
