"""The small convolutional network for images of 28x28 and 32x32, down to digits of 8x8."""
from mxnet.gluon import HybridBlock, nn

from gn_gluon.models.blocks import Convolution, Dense, Flatten, check_channels


class ConvNet(HybridBlock):
    """A 3x3 convolution, norm, ReLU and 2x2 max pooling per stage; then dropout and a classifier.

    norm : called as norm(in_channels=c, activation='relu'), see gn_gluon.norm.
    num_classes : 10. channels : one number per stage, each stage halves the image; (64, 128, 256, 512).
    dropout : the share of the last features dropped in training, 0.5.
    Input (N, C, H, W) of at least 2 ** len(channels) pixels a side, output (N, num_classes) logits.

    Raises UserError for a channel number that is not positive.
    """

    def __init__(self, norm, num_classes=10, channels=(64, 128, 256, 512), dropout=0.5, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        check_channels('ConvNet', channels)
        with self.name_scope():
            self.features = nn.HybridSequential(prefix='')
            with self.features.name_scope():
                in_channels = 0
                for width in channels:
                    self.features.add(Convolution(in_channels, width, 3), norm(in_channels=width, activation='relu'),
                                      nn.MaxPool2D(2))
                    in_channels = width
                self.features.add(Flatten(), nn.Dropout(dropout))
            self.output = Dense(num_classes)

    def hybrid_forward(self, F, x):
        return self.output(self.features(x))
