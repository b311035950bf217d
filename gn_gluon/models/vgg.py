"""VGG-16 (Simonyan & Zisserman 2015, configuration D) with a norm after each convolution (Sec. 4.1 of the paper)."""
from mxnet.gluon import HybridBlock, nn

from gn_gluon.models.blocks import Convolution, Dense, Flatten

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(HybridBlock):
    """Thirteen 3x3 convolutions in five stages, each stage ending in 2x2 max pooling, and three dense layers.

    norm : called as norm(in_channels=c, activation='relu'), see gn_gluon.norm; NoNorm makes the network without norm,
    of 138,357,544 parameters for 1000 classes and 15.47 G multiply-adds at 224.
    num_classes : 1000. dropout : after the first two dense layers, 0.5. hidden : their units, 4096.
    Input (N, 3, 224, 224) or another multiple of 32, output (N, num_classes) logits.
    """

    def __init__(self, norm, num_classes=1000, dropout=0.5, hidden=4096, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        with self.name_scope():
            self.features = nn.HybridSequential(prefix='')
            with self.features.name_scope():
                in_channels = 0
                for stage in STAGES:
                    for channels in stage:
                        self.features.add(Convolution(in_channels, channels, 3),
                                          norm(in_channels=channels, activation='relu'))
                        in_channels = channels
                    self.features.add(nn.MaxPool2D(2))
                self.features.add(Flatten())
                in_units = 0
                for _ in range(2):
                    self.features.add(Dense(hidden, 'relu', in_units),
                                      nn.Dropout(dropout))
                    in_units = hidden
            self.output = Dense(num_classes, in_units=hidden)

    def hybrid_forward(self, F, x):
        return self.output(self.features(x))
