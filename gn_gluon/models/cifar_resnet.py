"""ResNets for 32x32 images (He et al. 2016, "Deep Residual Learning", Sec. 4.2, and "Identity Mappings", Sec. 3)."""
import mxnet as mx
from mxnet.gluon import HybridBlock, nn

from gn_gluon.errors import UserError
from gn_gluon.models.blocks import Convolution, Dense, GlobalAverage, check_channels
from gn_gluon.precision import narrow, to


class Shortcut(HybridBlock):
    """No parameters (option A): every stride-th pixel, and channels of zeros after those that are there.

    Input (N, in_channels, H, W), output (N, channels, H / stride, W / stride).
    """

    def __init__(self, in_channels, channels, stride, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        self._in_channels = in_channels
        self._channels = channels
        self._stride = stride
        self._narrow = None

    def cast(self, dtype):
        self._narrow = narrow(dtype)
        super().cast(dtype)

    def hybrid_forward(self, F, x):
        if self._stride == 1 and self._in_channels == self._channels:
            return x
        # A convolution by the identity: exact, and x stays in oneDNN's layout. (Pad is many times as slow, and the
        # gradient of concat aborts: oneDNN cannot split blocks of 16 channels.)
        device = {} if F is mx.sym else {'ctx': x.context}
        identity = F.expand_dims(F.expand_dims(F.eye(self._channels, self._in_channels, **device), axis=2), axis=3)
        if self._narrow:
            identity = to(F, identity, self._narrow, adds=False)
        return F.Convolution(x, identity, kernel=(1, 1), stride=(self._stride, self._stride),
                             num_filter=self._channels, no_bias=True)


class PostActivationBlock(HybridBlock):
    """Two 3x3 convolutions, each followed by its norm; ReLU after the sum."""

    def __init__(self, norm, in_channels, channels, stride, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        with self.name_scope():
            self.conv1 = Convolution(in_channels, channels, 3, stride)
            self.norm1 = norm(in_channels=channels, activation='relu')
            self.conv2 = Convolution(channels, channels, 3)
            self.norm2 = norm(in_channels=channels, activation='relu', gamma_initializer='zeros')
            self.shortcut = Shortcut(in_channels, channels, stride)

    def hybrid_forward(self, F, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), self.shortcut(x))


class PreActivationBlock(HybridBlock):
    """Norm and ReLU before each of two 3x3 convolutions; nothing after the sum.

    No gamma starts at zero here: the ReLU behind it would let no gradient through. In the network's `first` block norm
    and ReLU precede the branching, as the paper has it (Sec. 3, implementation details).
    """

    def __init__(self, norm, in_channels, channels, stride, first, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        self._first = first
        with self.name_scope():
            self.norm1 = norm(in_channels=in_channels, activation='relu')
            self.conv1 = Convolution(in_channels, channels, 3, stride)
            self.norm2 = norm(in_channels=channels, activation='relu')
            self.conv2 = Convolution(channels, channels, 3)
            self.shortcut = Shortcut(in_channels, channels, stride)

    def hybrid_forward(self, F, x):
        activated = self.norm1(x)
        if self._first:
            x = activated
        return self.conv2(self.norm2(self.conv1(activated))) + self.shortcut(x)


class CifarResNet(HybridBlock):
    """ResNet of depth 6n + 2: a 3x3 convolution, three stages of n blocks, global average pooling, a classifier.

    norm : called as norm(in_channels=c, activation='relu') and so on, see gn_gluon.norm.
    num_classes : 10. depth : 20; the published ones are 20, 32, 44, 56, 110.
    pre_activation : False for the network of "Deep Residual Learning", True for that of "Identity Mappings".
    channels : of the three stages, none less than the one before; (16, 32, 64) as published.
    Input (N, 3, 32, 32) or any image from 4x4 on, output (N, num_classes) logits.

    Depth 20 has 269,722 parameters for 10 classes. Raises UserError for a depth that is not 6n + 2.
    """

    def __init__(self, norm, num_classes=10, depth=20, pre_activation=False, channels=(16, 32, 64), prefix=None,
                 params=None):
        super().__init__(prefix=prefix, params=params)
        if depth < 8 or depth % 6 != 2:
            raise UserError(f'depth={depth} in CifarResNet: give 6n + 2, as 20, 32, 44, 56 or 110')
        check_channels('CifarResNet', channels)
        if len(channels) != 3 or sorted(channels) != list(channels):
            raise UserError(f'channels={tuple(channels)} in CifarResNet: give three numbers, none less than the one '
                            'before')
        with self.name_scope():
            self.features = nn.HybridSequential(prefix='')
            with self.features.name_scope():
                self.features.add(Convolution(0, channels[0], 3))
                if not pre_activation:
                    self.features.add(norm(in_channels=channels[0], activation='relu'))
                in_channels = channels[0]
                for stage, width in enumerate(channels):
                    for index in range((depth - 2) // 6):
                        stride = 2 if stage > 0 and index == 0 else 1
                        if pre_activation:
                            block = PreActivationBlock(norm, in_channels, width, stride, first=stage == index == 0)
                        else:
                            block = PostActivationBlock(norm, in_channels, width, stride)
                        self.features.add(block)
                        in_channels = width
                if pre_activation:
                    self.features.add(norm(in_channels=in_channels, activation='relu'))
                self.features.add(GlobalAverage())
            self.output = Dense(num_classes, in_units=in_channels)

    def hybrid_forward(self, F, x):
        return self.output(self.features(x))
