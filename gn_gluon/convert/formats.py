"""ResNets published elsewhere become ours: which format a file has, what differs from ours, whether all is there."""
import os
import re
from typing import Callable, NamedTuple

import mxnet as mx
import numpy as np

from gn_gluon.checkpoint import write_arrays, write_text
from gn_gluon.convert import names
from gn_gluon.convert.read import read_arrays
from gn_gluon.data.imagenet import STD
from gn_gluon.errors import UserError
from gn_gluon.models import ResNet
from gn_gluon.models.resnet import BLOCKS
from gn_gluon.norm import BatchNorm, GroupNorm


class Format(NamedTuple):
    """How the weights that someone publishes differ from ours. The mean of their images is among the bindings.

    names : names.Names. norms : those that their networks have. ignored : regular expression of the names of what is no
    parameter. axes : dict from the number of an array's dimensions to the order in which ours has them. bgr : whether
    their images are BGR. std : what their images (R, G, B) are divided by. bindings : from the path of a file, the gin
    statements that it needs.
    """

    names: names.Names
    norms: tuple = (GroupNorm,)
    ignored: str = ''
    axes: dict = {}
    bgr: bool = False
    std: np.ndarray = STD
    bindings: Callable = lambda path: ()


FORMATS = {
    'torchvision': Format(names.TORCHVISION, (GroupNorm, BatchNorm), ignored=r'.*\.num_batches_tracked'),
    # Its names are torchvision's; its validation images are 94 % of the shorter side.
    'timm': Format(names.TORCHVISION, bindings=lambda path: ('ImageNet.resize = 238',)),
    # detectron/core/config.py: PIXEL_MEANS, which are BGR.
    'detectron': Format(
        names.DETECTRON, ignored='.*_momentum', bgr=True, std=np.ones(3),
        bindings=lambda path: ('ImageNet.mean = (122.7717, 115.9465, 102.9801)',)),
    # Its model zoo marks by name what was trained with symmetric padding (examples/FasterRCNN/config.py).
    'tensorpack': Format(
        names.TENSORPACK, ignored='.*/Momentum|global_step|learning_rate', axes={4: (3, 2, 0, 1), 2: (1, 0)}, bgr=True,
        bindings=lambda path: () if 'AlignPadding' in os.path.basename(path) else ("ResNet.padding = 'same'",)),
    'gluoncv': Format(names.GLUONCV, (GroupNorm, BatchNorm))}


class Converted(NamedTuple):
    """What `convert` made: format's name, norm, depth, number of classes, recipe, and gin file of bindings or None."""

    format_name: str
    norm: type
    depth: int
    num_classes: int
    recipe: str
    bindings: tuple
    gin_file: str


def convert(path, out, format_name=None):
    """Write the weights in the file `path` as those of our ResNet to `out`, and what they need in gin beside it.

    Arguments:
        path: file of a format in FORMATS.
        out: path of the .params file; bindings, if any, are written to the same name with .gin.
        format_name: key of FORMATS; None: the one whose names the file has.
    Returns Converted. Raises UserError when the file cannot be read, is of no known format, or is not whole.
    """
    arrays = read_arrays(path)
    format_name, norm, depth, table, arrays = _recognize(path, arrays, format_name)
    format_ = FORMATS[format_name]
    parameters = {name: _reordered(arrays[theirs], format_.axes) for name, theirs in table.items()}
    num_classes = parameters['output.bias'].size
    for name, shape in _shapes(norm, depth, num_classes).items():
        if parameters[name].shape != shape:
            raise UserError(f'{path}: {table[name]} has shape {arrays[table[name]].shape}, and cannot be the {shape} '
                            f'of our ResNet-{depth}; it is of another network')
    parameters['features.0.weight'] = _for_our_images(parameters['features.0.weight'], format_)
    write_arrays(out, {name: mx.nd.array(array) for name, array in parameters.items()})
    bindings, gin_file = format_.bindings(path), None
    recipe = f"gin/resnet{depth}_{'gn' if norm is GroupNorm else 'bn'}_bs32.gin"
    if bindings:
        gin_file = os.path.splitext(out)[0] + '.gin'
        write_text(gin_file, '\n'.join((f'# What {os.path.basename(out)} needs on top of {recipe}.', *bindings, '')))
    return Converted(format_name, norm, depth, num_classes, recipe, bindings, gin_file)


def _recognize(path, arrays, format_name):
    """The network whose names fit best: name of its format, norm, depth, table of names, and the arrays by them."""
    considered = FORMATS if format_name is None else [format_name]
    candidates = []
    for name in considered:
        format_ = FORMATS[name]
        kept = {theirs: array for theirs, array in arrays.items() if not re.fullmatch(format_.ignored, theirs)}
        for norm in format_.norms:
            for depth in BLOCKS:
                table = format_.names.table(_shapes(norm, depth))
                missing, extra = sorted(set(table.values()) - set(kept)), sorted(set(kept) - set(table.values()))
                candidates.append((len(missing) + len(extra), missing, extra, (name, norm, depth, table, kept)))
    _, missing, extra, best = min(candidates, key=lambda candidate: candidate[0])
    name, norm, depth, table, _ = best
    if len(missing) > len(table) // 2:
        raise UserError(f'{path} has {len(arrays)} arrays ({next(iter(arrays), "")}...) of no network that is known: '
                        f'ResNet-50 or ResNet-101 in the names of {", ".join(considered)}')
    if missing or extra:
        raise UserError('{} is not a whole ResNet-{} as {} names it: {} parameters are missing ({}), {} are unknown '
                        '({})'.format(path, depth, name, len(missing), missing[0] if missing else 'none', len(extra),
                                      extra[0] if extra else 'none'))
    return best


def _shapes(norm, depth, num_classes=1000):
    """Dict from the name of each parameter of our ResNet to its shape."""
    net = ResNet(norm, num_classes, depth)
    net.infer_shape(mx.nd.zeros((1, 3, 32, 32)))
    return {name: parameter.shape for name, parameter in net._collect_params_with_prefix().items()}


def _reordered(array, axes):
    """Their array in the order of ours."""
    return np.asarray(array, np.float32).transpose(axes.get(array.ndim, range(array.ndim)))


def _for_our_images(weight, format_):
    """The first convolution's weights, which take up how their images differ from ours, but for the mean."""
    weight = weight[:, ::-1] if format_.bgr else weight
    return weight * (STD / format_.std).astype(np.float32)[:, None, None]
