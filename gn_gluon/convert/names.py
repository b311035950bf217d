"""What the parameters of our ResNet (models.ResNet) are called where others publish theirs."""
import mxnet as mx
import numpy as np

from gn_gluon.errors import UserError
from gn_gluon.models.resnet import BLOCKS


class Names:
    """The names of one format.

    Arguments:
        stem, branch, shortcut: each the names of a convolution and of the norm after it. In `branch` and `shortcut`
            {stage} counts from `first_stage` and {block} from 0; in `branch` {number} is 1 to 3 and {letter} a to c.
        output: the name of the classifier.
        endings: what follows a layer's name, for each of our names of parameters ('gamma').
    """

    def __init__(self, stem, branch, shortcut, output, endings, first_stage=1):
        self._stem, self._branch, self._shortcut, self._output = stem, branch, shortcut, output
        self._endings, self._first_stage = endings, first_stage

    def table(self, parameters):
        """Dict from our name of each of our ResNet's `parameters` to this format's."""
        blocks = len({name.split('.')[1] for name in parameters if name.endswith('.conv1.weight')})
        stages = next((stages for stages in BLOCKS.values() if sum(stages) == blocks), None)
        if stages is None:
            raise UserError(f'a network with {blocks} blocks is not one of the ResNets that have names elsewhere, of '
                            f'depth {" or ".join(map(str, BLOCKS))}')
        layers = dict(self._layers(stages))
        return {name: layers[layer] + self._endings[kind]
                for name, layer, kind in ((name, *name.rsplit('.', 1)) for name in parameters)}

    def _layers(self, stages):
        yield from zip(('features.0', 'features.1'), self._stem)
        places = [(stage, block) for stage, blocks in enumerate(stages, self._first_stage) for block in range(blocks)]
        for index, (stage, block) in enumerate(places, 3):  # after convolution, norm and pooling
            for ours, theirs in zip(('shortcut.0', 'shortcut.1'), self._shortcut):
                yield f'features.{index}.{ours}', theirs.format(stage=stage, block=block)
            for number, letter in enumerate('abc', 1):
                for ours, theirs in zip(('conv', 'norm'), self._branch):
                    yield (f'features.{index}.{ours}{number}',
                           theirs.format(stage=stage, block=block, number=number, letter=letter))
        yield 'output', self._output


_TORCHVISION = {
    'stem': ('conv1', 'bn1'),
    'branch': ('layer{stage}.{block}.conv{number}', 'layer{stage}.{block}.bn{number}'),
    'shortcut': ('layer{stage}.{block}.downsample.0', 'layer{stage}.{block}.downsample.1'),
    'output': 'fc'}
_SAME_ENDINGS = {kind: '.' + kind for kind in ('weight', 'bias', 'gamma', 'beta', 'running_mean', 'running_var')}

TORCHVISION = Names(**_TORCHVISION, endings=dict(_SAME_ENDINGS, gamma='.weight', beta='.bias'))
GLUONCV = Names(**_TORCHVISION, endings=_SAME_ENDINGS)
DETECTRON = Names(
    stem=('conv1', 'conv1_gn'),
    branch=('res{stage}_{block}_branch2{letter}', 'res{stage}_{block}_branch2{letter}_gn'),
    shortcut=('res{stage}_{block}_branch1', 'res{stage}_{block}_branch1_gn'),
    output='pred',
    endings={'weight': '_w', 'bias': '_b', 'gamma': '_s', 'beta': '_b'},
    first_stage=2)
TENSORPACK = Names(
    stem=('conv0', 'conv0/gn'),
    branch=('group{stage}/block{block}/conv{number}', 'group{stage}/block{block}/conv{number}/gn'),
    shortcut=('group{stage}/block{block}/convshortcut', 'group{stage}/block{block}/convshortcut/gn'),
    output='linear',
    endings={'weight': '/W', 'bias': '/b', 'gamma': '/gamma', 'beta': '/beta'},
    first_stage=0)


def to_torchvision(parameters):
    """The parameters of our ResNet named as PyTorch's ResNets name theirs: dict from name to NumPy array.

    Arguments:
        parameters: dict from our name, as of net._collect_params_with_prefix(), to an NDArray or a NumPy array.
    """
    table = TORCHVISION.table(parameters)
    mx.nd.waitall()  # a forward pass that is under way changes the layout of its weights while asnumpy reads them
    return {table[name]: array if isinstance(array, np.ndarray) else array.asnumpy()
            for name, array in parameters.items()}
