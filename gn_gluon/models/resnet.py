"""ResNet-50 and ResNet-101 for ImageNet (He et al. 2016), as the paper trains them (Sec. 4.1)."""
from mxnet.gluon import HybridBlock, nn

from gn_gluon.errors import UserError
from gn_gluon.models.blocks import Convolution, Dense, GlobalAverage

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CHANNELS = (256, 512, 1024, 2048)


class Bottleneck(HybridBlock):
    """Convolutions 1x1, 3x3 and 1x1, each followed by its norm; ReLU after the sum. The 3x3 one has the stride.

    Where the shape changes, the shortcut is a 1x1 convolution and a norm.
    """

    def __init__(self, norm, in_channels, channels, stride, padding, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        inner = channels // 4
        with self.name_scope():
            self.conv1 = Convolution(in_channels, inner, 1)
            self.norm1 = norm(in_channels=inner, activation='relu')
            self.conv2 = Convolution(inner, inner, 3, stride, padding)
            self.norm2 = norm(in_channels=inner, activation='relu')
            self.conv3 = Convolution(inner, channels, 1)
            self.norm3 = norm(in_channels=channels, activation='relu', gamma_initializer='zeros')
            self.shortcut = None
            if in_channels != channels or stride != 1:
                self.shortcut = nn.HybridSequential(prefix='shortcut_')
                with self.shortcut.name_scope():
                    self.shortcut.add(Convolution(in_channels, channels, 1, stride), norm(in_channels=channels))

    def hybrid_forward(self, F, x):
        residual = x if self.shortcut is None else self.shortcut(x)
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), residual)


class ResNet(HybridBlock):
    """ResNet with bottlenecks, the stride of a stage on the 3x3 convolution of its first block.

    norm : called as norm(in_channels=c, activation='relu') and so on, see gn_gluon.norm.
    num_classes : 1000. depth : 50 or 101. padding : 'symmetric', or 'same' for weights that were trained with
    TensorFlow's, which where the stride is 2 pads one row and column less at the top and left.
    Input (N, 3, 224, 224) or another multiple of 32, output (N, num_classes) logits.

    25,557,032 and 44,549,160 parameters for 1000 classes, 4.09 and 7.80 G multiply-adds at 224. Raises UserError for
    another depth or padding.
    """

    def __init__(self, norm, num_classes=1000, depth=50, padding='symmetric', prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        if depth not in BLOCKS:
            raise UserError(f'depth={depth} in ResNet: give one of ' + ', '.join(map(str, BLOCKS)))
        if padding not in ('symmetric', 'same'):
            raise UserError(f"padding={padding!r} in ResNet: give 'symmetric' or 'same'")
        self.padding = padding
        with self.name_scope():
            self.features = nn.HybridSequential(prefix='')
            with self.features.name_scope():
                # As 'same', the last windows are cut off, which MXNet calls ceil_mode.
                pool = nn.MaxPool2D(3, 2, 0, ceil_mode=True) if padding == 'same' else nn.MaxPool2D(3, 2, 1)
                self.features.add(Convolution(0, 64, 7, 2, padding), norm(in_channels=64, activation='relu'), pool)
                in_channels = 64
                for stage, (blocks, channels) in enumerate(zip(BLOCKS[depth], CHANNELS)):
                    for index in range(blocks):
                        stride = 2 if stage > 0 and index == 0 else 1
                        self.features.add(Bottleneck(norm, in_channels, channels, stride, padding))
                        in_channels = channels
                self.features.add(GlobalAverage())
            self.output = Dense(num_classes, in_units=in_channels)

    def hybrid_forward(self, F, x):
        return self.output(self.features(x))
