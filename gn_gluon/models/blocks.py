"""What the networks share: their initialisation (Sec. 4.1 of the paper) and the convolution before a norm."""
import mxnet as mx
from mxnet.gluon import nn

from gn_gluon.errors import UserError

# He et al. (2015): normal, variance 2 / fan-out. mx.init.MSRAPrelu() is another one (average fan, slope 0.25).
HE_FAN_OUT = mx.init.Xavier('gaussian', 'out', 2)
CLASSIFIER = mx.init.Normal(0.01)


def convolution(in_channels, channels, kernel, stride=1):
    """A square convolution that keeps the image size up to its stride; the norm after it has the bias."""
    return nn.Conv2D(channels, kernel, stride, kernel // 2, use_bias=False, weight_initializer=HE_FAN_OUT,
                     in_channels=in_channels)


def check_channels(model, channels):
    """Raises UserError unless `channels`, an argument of `model`, is a list of positive numbers."""
    if not channels or min(channels) < 1:
        raise UserError(f'channels={tuple(channels)} in {model}: give one positive number for each stage')
