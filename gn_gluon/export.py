"""python -m gn_gluon.export --workdir RUN --format onnx --out FILE: a run's network for other programs."""
import importlib.util
import json
import os
import re

from absl.flags import argparse_flags

from gn_gluon.errors import UserError, command
from gn_gluon.train import add_checkpoint_flag, add_run_flags, named_workdir

#: What each format is, and the package that writes it.
FORMATS = {
    'symbol': ('OUT-symbol.json and OUT-0000.params for MXNet itself, without gn_gluon', None),
    'onnx': ('a model for ONNX Runtime and others', 'onnx'),
    'safetensors': ("the weights alone: of ResNet as torchvision's resnet50 and resnet101 take them, of other networks "
                    'under their names here', 'safetensors')}
OPSETS = (21, 18)


def traced(net, group_norm):
    """The graph of a network, (N, C, H, W) float32 `data` to logits.

    Arguments:
        net: initialized network of gn_gluon.models; it is cast to float32, in case it was trained in less.
        group_norm: what GroupNorm, LayerNorm and InstanceNorm are in it, see norm.exported.
    Returns (symbol, arrays): arrays is a dict of NDArrays by the symbol's names for its parameters, which are those of
    a checkpoint ('features.0.weight').
    """
    import mxnet as mx

    from gn_gluon.norm.exported import norms_as_evaluated
    net.cast('float32')
    with norms_as_evaluated(net, group_norm):
        graph = json.loads(net(mx.sym.var('data')).tojson())
    parameters = net._collect_params_with_prefix()
    names = {parameter.name: name for name, parameter in parameters.items()}
    for node in graph['nodes']:
        # Gluon's prefix counts the networks that the process has made.
        node['name'] = names.get(node['name'], re.sub('^' + net.prefix, '', node['name']))
    return mx.sym.load_json(json.dumps(graph)), {name: array.list_data()[0] for name, array in parameters.items()}


def write_symbol(net, prefix):
    """Write `prefix`-symbol.json and `prefix`-0000.params, as gluon.SymbolBlock.imports and mx.mod read them.

    All of their operators are stock MXNet's, whatever computes the norms here. Batches may have any size. The arrays
    are named as in a checkpoint, behind 'arg:' and 'aux:', so that --checkpoint takes the .params file too. Returns the
    paths.
    """
    from gn_gluon.checkpoint import write_arrays, write_text
    from gn_gluon.norm.exported import composed_group_norm
    symbol, arrays = traced(net, composed_group_norm)
    states = symbol.list_auxiliary_states()
    paths = [f'{prefix}-symbol.json', f'{prefix}-0000.params']
    write_arrays(paths[1], {('aux:' if name in states else 'arg:') + name: array for name, array in arrays.items()})
    write_text(paths[0], symbol.tojson())
    return paths


def write_onnx(net, path, image_shape, metadata, opset=21):
    """Write an ONNX model: input `data` (N, C, H, W), output `logits` (N, num_classes), float32, N any number.

    Arguments:
        net: as of `traced`.
        image_shape: (C, H, W).
        metadata: dict of str, see `describe`.
        opset: 21, or 18 for older runtimes.
    Returns the paths. Raises UserError for an operator that has no translation.
    """
    from gn_gluon.checkpoint import write_bytes
    from gn_gluon.norm.exported import one_node
    from gn_gluon.onnx_graph import onnx_model
    symbol, arrays = traced(net, one_node)
    write_bytes(path, onnx_model(symbol, arrays, image_shape, opset, metadata).SerializeToString())
    return [path]


def write_safetensors(net, path, metadata):
    """Write the weights, float32, with `metadata` (dict of str) in the header.

    Those of a ResNet load into torchvision.models.resnet50 or resnet101 with the norm_layer that the metadata name, as
    lambda channels: torch.nn.GroupNorm(32, channels), by load_state_dict(strict=True). A ResNet of padding='same' or
    with NoNorm, and CifarResNet, ConvNet and VGG16, have no namesake in PyTorch: their names are those of a checkpoint
    here. Returns the paths.
    """
    from safetensors.numpy import save

    from gn_gluon.checkpoint import write_bytes
    from gn_gluon.convert import to_torchvision
    from gn_gluon.models import ResNet
    from gn_gluon.norm import NoNorm
    from gn_gluon.norm.exported import norm_layers
    arrays = {name: parameter.list_data()[0].asnumpy()
              for name, parameter in net._collect_params_with_prefix().items()}
    if isinstance(net, ResNet) and net.padding == 'symmetric' and not isinstance(norm_layers(net)[0], NoNorm):
        arrays = to_torchvision(arrays)
    write_bytes(path, save(arrays, metadata))
    return [path]


def describe(built):
    """What a user of the exported network of an experiment.Built must know: a dict of str, numbers and lists as JSON.

    model, and padding where it has that argument; norm, num_groups or channels_per_group, epsilon; image_shape
    (C, H, W), class_names; mean and std, to be subtracted from and to divide the pixels of an RGB (or grey) image of 0
    to 255, for each channel or, (C, H, W), for each pixel; resize, the shorter side of an image before its centre is
    cut out, where that is not the one of image_shape. What is not known is left out.
    """
    from gn_gluon.norm.exported import norm_settings
    dataset = built.dataset
    known = dict(norm_settings(built.net), model=type(built.net).__name__,
                 padding=getattr(built.net, 'padding', None), image_shape=dataset.image_shape,
                 class_names=dataset.class_names, resize=getattr(dataset, 'resize', None), **normalization(dataset))
    return {name: value if isinstance(value, str) else json.dumps(value)
            for name, value in known.items() if value is not None}


def normalization(dataset):
    """The `mean` and `std` of `describe` for a data set, by what it makes of a black and a white image; {} if unknown.

    So they are on the scale of image files, whatever the scale that the data set stores.
    """
    import numpy as np
    channels, height, width = dataset.image_shape
    if channels not in (1, 3) or getattr(dataset, 'mean', 0) is None:
        return {}
    black, white = (dataset.preprocess(np.full((height, width, 3), value, np.uint8)).astype(np.float64)
                    for value in (0, 255))
    std = 255 / (white - black)
    statistics = {'mean': -black * std, 'std': std}
    for name, values in statistics.items():
        values = values.round(4)
        if (values == values[:, :1, :1]).all():
            values = values[:, 0, 0]
        statistics[name] = values.tolist()
    return statistics


def main():
    """The command line."""
    parser = argparse_flags.ArgumentParser(
        prog='python -m gn_gluon.export', description=__doc__,
        epilog='The network evaluates as here to 1e-4; it is float32 whatever it was trained in, and takes batches of '
               'any size.')
    add_run_flags(parser)
    add_checkpoint_flag(parser)
    parser.add_argument('--format', required=True, choices=FORMATS,
                        help='; '.join(f'{name}: {what}' for name, (what, _) in FORMATS.items()))
    parser.add_argument('--out', required=True, metavar='PATH',
                        help='the file, or with --format symbol what both names begin with')
    parser.add_argument('--opset', type=int, choices=OPSETS,
                        help=f'of ONNX (default: {OPSETS[0]}); {OPSETS[1]} is for runtimes that do not know '
                             f'{OPSETS[0]}')
    flags = parser.parse_args()
    workdir = named_workdir(
        flags, 'python -m gn_gluon.export --workdir runs/digits_gn_bs2 --format onnx --out digits.onnx')
    if flags.opset and flags.format != 'onnx':
        raise UserError(f'--opset {flags.opset} is of --format onnx only; leave it out')
    package = FORMATS[flags.format][1]
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f'--format {flags.format} needs the package {package}, which is not installed; install it, in '
                        "the clone, with: pip install '.[export]'")
    folder = os.path.dirname(flags.out)
    if folder and not os.path.isdir(folder):
        raise UserError(f'the folder {folder} of --out does not exist; make it, or choose another')
    from gn_gluon import config, experiment  # here: experiment imports all the rest
    made, bindings = experiment.recorded_experiment(
        workdir, flags.gin_file, flags.gin_bindings, needs_run=flags.checkpoint in ('last', 'best'))
    built = experiment.trained(made, workdir, flags.checkpoint)
    config.refuse_unused(bindings)
    if flags.format == 'symbol':
        paths = write_symbol(built.net, flags.out)
    elif flags.format == 'onnx':
        paths = write_onnx(built.net, flags.out, built.dataset.image_shape, describe(built), flags.opset or OPSETS[0])
    else:
        paths = write_safetensors(built.net, flags.out, describe(built))
    print('{}, {}: wrote {}'.format(type(built.net).__name__, made.norm.__name__, ' and '.join(paths)))


if __name__ == '__main__':
    command(main)
