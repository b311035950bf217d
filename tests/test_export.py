"""gn_gluon.export: other programs compute what we compute, from files that need nothing of ours."""
import functools
import json
import os
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest

from gn_gluon import BatchNorm, BatchRenorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm, compat, export, train
from gn_gluon.checkpoint import load_parameters
from gn_gluon.data import ImageNet
from gn_gluon.errors import UserError
from gn_gluon.models import VGG16, CifarResNet, ConvNet, ResNet
from gn_gluon.norm.exported import norm_layers

NORMS = {'gn': functools.partial(GroupNorm, num_groups=4), 'gn_c': functools.partial(GroupNorm, channels_per_group=4),
         'ln': LayerNorm, 'in': InstanceNorm, 'bn': BatchNorm, 'br': BatchRenorm, 'none': NoNorm}
MODELS = {
    'resnet50': functools.partial(ResNet, num_classes=7),
    'resnet50_same': functools.partial(ResNet, num_classes=7, padding='same'),
    'cifar_resnet': functools.partial(CifarResNet, depth=8),
    'pre_activation': functools.partial(CifarResNet, depth=8, pre_activation=True),
    'vgg16': functools.partial(VGG16, num_classes=7, hidden=32),
    'convnet': functools.partial(ConvNet, channels=(8, 16))}
NO_ONNX, NO_ONNXRUNTIME, NO_SAFETENSORS = (
    f"{package} is not installed: pip install '.[test]'" for package in ('onnx', 'onnxruntime', 'safetensors'))
TOLERANCE = {'rtol': 1e-4, 'atol': 1e-4}


def network(model, norm, seed=0):
    """A network whose parameters are all random, so that none can be lost or exchanged; and images (5, C, H, W)."""
    net = MODELS[model](norm=NORMS[norm])
    size = 96 if model.startswith('resnet') else 32
    mx.random.seed(seed)
    rng = np.random.RandomState(seed)
    # Patches and noise: of noise alone all global averages are the same.
    images = (np.kron(rng.normal(size=(5, 3, 4, 4)), np.ones((size // 4, size // 4)))
              + rng.normal(size=(5, 3, size, size))).astype('float32')
    net.initialize()
    net(mx.nd.array(images[:1]))
    for name, parameter in net._collect_params_with_prefix().items():
        kind, shape = name.split('.')[-1], parameter.shape
        if kind in ('gamma', 'running_var'):
            parameter.set_data(mx.nd.array(rng.uniform(0.4, 1.2, shape)))
        elif len(shape) == 2:
            parameter.set_data(mx.nd.array(rng.normal(0, (2 / shape[1]) ** 0.5, shape)))
        elif kind != 'weight':
            parameter.set_data(mx.nd.array(rng.normal(0, 0.3, shape)))
    net.hybridize(static_alloc=True, static_shape=True)
    return net, images


def logits(net, images):
    expected = net(mx.nd.array(images)).asnumpy()
    assert np.ptp(expected, axis=0).max() > 0.02  # what hardly depends on the image would agree with anything
    return expected


# ------------------------------------------------------------------------------------ MXNet's own format

STOCK_MXNET = '''
import builtins, sys
import numpy as np
for name in ALIASES:
    setattr(np, name, getattr(builtins, name))
try:
    import distutils
except ImportError:
    import setuptools
import mxnet as mx
for prefix in sys.argv[1:]:
    images = np.load(prefix + '.npy')
    block = mx.gluon.SymbolBlock.imports(prefix + '-symbol.json', ['data'], prefix + '-0000.params')
    np.save(prefix + '_eager5.npy', block(mx.nd.array(images)).asnumpy())
    np.save(prefix + '_eager1.npy', block(mx.nd.array(images[:1])).asnumpy())
    block.hybridize(static_alloc=True)
    np.save(prefix + '_hybrid5.npy', block(mx.nd.array(images)).asnumpy())
    module = mx.mod.Module.load(prefix, 0, label_names=None)
    module.bind([('data', images.shape)], for_training=False)
    np.save(prefix + '_module5.npy', module.predict(mx.io.NDArrayIter(images, batch_size=5)).asnumpy())
assert not any('gn_gluon' in name for name in list(sys.modules) + dir(mx.nd))
'''


def check_in_stock_mxnet(folder, cases):
    expected = {}
    for model, norm in cases:
        net, images = network(model, norm)
        prefix = str(folder / f'{model}_{norm}')
        expected[prefix] = logits(net, images)
        np.save(prefix + '.npy', images)
        if model == 'cifar_resnet':
            net.cast('bfloat16')  # as after a training in it
        assert export.write_symbol(net, prefix) == [prefix + '-symbol.json', prefix + '-0000.params']
    script = STOCK_MXNET.replace('ALIASES', repr(compat.REMOVED_NUMPY_ALIASES))
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, *expected], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    for prefix, wanted in expected.items():
        for how in ('eager5', 'eager1', 'hybrid5', 'module5'):
            found = np.load(f'{prefix}_{how}.npy')
            np.testing.assert_allclose(found, wanted[:len(found)], **TOLERANCE, err_msg=f'{prefix} {how}')


def test_stock_mxnet_runs_what_was_exported_at_any_batch_size(tmp_path):
    check_in_stock_mxnet(tmp_path, [('cifar_resnet', norm) for norm in NORMS] + [
        ('pre_activation', 'gn'), ('convnet', 'gn')])


@pytest.mark.slow
def test_stock_mxnet_runs_the_large_networks(tmp_path):
    check_in_stock_mxnet(tmp_path, [('resnet50', 'gn'), ('resnet50_same', 'gn'), ('resnet50', 'bn'), ('vgg16', 'gn')])


def test_exported_parameters_load_into_our_network_and_name_no_other(tmp_path):
    net, images = network('cifar_resnet', 'bn')
    export.write_symbol(net, str(tmp_path / 'out'))
    again, _ = network('cifar_resnet', 'bn', seed=1)
    load_parameters(str(tmp_path / 'out-0000.params'), again._collect_params_with_prefix())
    np.testing.assert_array_equal(logits(again, images), logits(net, images))
    assert net.prefix not in (tmp_path / 'out-symbol.json').read_text()  # it counts the networks made so far


# ------------------------------------------------------------------------------------ ONNX

def check_in_onnxruntime(folder, model, norm, opset):
    onnx = pytest.importorskip('onnx', reason=NO_ONNX)
    onnxruntime = pytest.importorskip('onnxruntime', reason=NO_ONNXRUNTIME)
    net, images = network(model, norm)
    if model == 'pre_activation':
        net.cast('bfloat16')  # as after a training in it; the export makes it float32 again
    path = str(folder / 'model.onnx')
    assert export.write_onnx(net, path, images.shape[1:], {'norm': norm}, opset) == [path]
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [('', opset)]
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [('data', ['N', *images.shape[1:]])]
    assert [(value.name, value.shape[0]) for value in session.get_outputs()] == [('logits', 'N')]
    assert session.get_modelmeta().custom_metadata_map == {'norm': norm}
    for batch in (images[:1], images):
        np.testing.assert_allclose(session.run(['logits'], {'data': batch})[0], logits(net, images)[:len(batch)],
                                   **TOLERANCE)
    return net, written


@pytest.mark.parametrize('opset', export.OPSETS)
@pytest.mark.parametrize('model, norm', [('cifar_resnet', norm) for norm in NORMS] + [
    ('pre_activation', 'gn'), ('convnet', 'gn')])
def test_onnxruntime_agrees_at_batches_of_1_and_5(tmp_path, model, norm, opset):
    net, written = check_in_onnxruntime(tmp_path, model, norm, opset)
    nodes = [node for node in written.graph.node if node.op_type == 'GroupNormalization']
    is_group_norm = norm in ('gn', 'gn_c', 'ln', 'in')
    assert len(nodes) == (len(norm_layers(net)) if is_group_norm and opset == 21 else 0)
    # constants are folded, so that every convolution's weights are there for a compiler to see
    initializers = {array.name for array in written.graph.initializer}
    assert all(node.input[1] in initializers for node in written.graph.node if node.op_type == 'Conv')


@pytest.mark.slow
@pytest.mark.parametrize('model, norm, opset', [
    (model, norm, 21) for model in ('resnet50', 'pre_activation', 'vgg16', 'convnet') for norm in NORMS] + [
    ('resnet50', 'gn', 18), ('vgg16', 'gn', 18), ('resnet50_same', 'gn', 21), ('resnet50_same', 'bn', 21)])
def test_onnxruntime_agrees_on_every_network_with_every_norm(tmp_path, model, norm, opset):
    check_in_onnxruntime(tmp_path, model, norm, opset)


@pytest.mark.parametrize('layer, name', [
    (mx.gluon.nn.LeakyReLU(0.1), 'LeakyReLU'), (mx.gluon.nn.AvgPool2D(), 'Pooling with pool_type=avg'),
    (mx.gluon.nn.BatchNorm(scale=False), 'BatchNorm with fix_gamma=True')], ids=['unknown', 'variant', 'fixed_gamma'])
def test_an_operator_without_translation_is_named(tmp_path, layer, name):
    pytest.importorskip('onnx', reason=NO_ONNX)
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Conv2D(4, 3), layer, mx.gluon.nn.Dense(2))
    net.initialize()
    net(mx.nd.zeros((1, 3, 8, 8)))
    with pytest.raises(UserError, match=f'the operator {name} of this network'):
        export.write_onnx(net, str(tmp_path / 'model.onnx'), (3, 8, 8), {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ safetensors

def torchvision_resnet():
    """Name and shape of each tensor of torchvision's resnet50(num_classes=7).state_dict(), and our name for it."""
    norm = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'running_mean', 'running_var': 'running_var'}
    tensors = []

    def layers(ours, theirs, channels, in_channels, kernel):
        (our_conv, our_norm), (conv, bn) = ours, theirs
        tensors.append((f'{conv}.weight', (channels, in_channels, kernel, kernel), f'{our_conv}.weight'))
        tensors.extend((f'{bn}.{kind}', (channels,), f'{our_norm}.{ours}') for kind, ours in norm.items())

    layers(('features.0', 'features.1'), ('conv1', 'bn1'), 64, 3, 7)
    in_channels, number = 64, 3
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 * 2 ** stage
        for block in range(blocks):
            ours, theirs = f'features.{number}', f'layer{stage + 1}.{block}'
            for i, channels, inputs, kernel in ((1, inner, in_channels, 1), (2, inner, inner, 3),
                                                (3, 4 * inner, inner, 1)):
                layers((f'{ours}.conv{i}', f'{ours}.norm{i}'), (f'{theirs}.conv{i}', f'{theirs}.bn{i}'), channels,
                       inputs, kernel)
            if block == 0:
                layers((f'{ours}.shortcut.0', f'{ours}.shortcut.1'),
                       (f'{theirs}.downsample.0', f'{theirs}.downsample.1'), 4 * inner, in_channels, 1)
            in_channels, number = 4 * inner, number + 1
    return tensors + [('fc.weight', (7, in_channels), 'output.weight'), ('fc.bias', (7,), 'output.bias')]


def test_safetensors_of_a_resnet_are_torchvisions_tensors(tmp_path):
    safetensors = pytest.importorskip('safetensors', reason=NO_SAFETENSORS)
    net, _ = network('resnet50', 'br')
    path = str(tmp_path / 'weights.safetensors')
    export.write_safetensors(net, path, {'norm': 'BatchRenorm'})
    with safetensors.safe_open(path, 'numpy') as file:
        assert file.metadata() == {'norm': 'BatchRenorm'}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    ours = net._collect_params_with_prefix()
    expected = torchvision_resnet()
    assert {name: array.shape for name, array in found.items()} == {name: shape for name, shape, _ in expected}
    for name, _, our_name in expected:
        np.testing.assert_array_equal(found[name], ours[our_name].data().asnumpy(), err_msg=name)


@pytest.mark.parametrize('model, norm', [
    ('cifar_resnet', 'gn'), ('resnet50', 'none'), pytest.param('resnet50_same', 'gn', marks=pytest.mark.slow)])
def test_safetensors_of_networks_that_pytorch_lacks_keep_our_names(tmp_path, model, norm):
    numpy_side = pytest.importorskip('safetensors.numpy', reason=NO_SAFETENSORS)
    net, _ = network(model, norm)
    export.write_safetensors(net, str(tmp_path / 'weights.safetensors'), {})
    found = numpy_side.load_file(str(tmp_path / 'weights.safetensors'))
    assert set(found) == set(net._collect_params_with_prefix())


TORCHVISION = '''
import sys
import numpy as np, torch, torchvision
from safetensors.torch import load_file
folder, norm = sys.argv[1:]
layer = {'gn': lambda c: torch.nn.GroupNorm(4, c), 'in': lambda c: torch.nn.GroupNorm(c, c), 'bn': None}[norm]
net = torchvision.models.resnet50(num_classes=7, norm_layer=layer).eval()
net.load_state_dict(load_file(folder + '/weights.safetensors'), strict=True)
with torch.no_grad():
    np.save(folder + '/theirs.npy', net(torch.from_numpy(np.load(folder + '/images.npy'))).numpy())
'''


@pytest.mark.parametrize('norm', ['gn', 'in', 'bn'])
def test_torchvision_computes_the_same_with_our_weights(tmp_path, norm):
    pytest.importorskip('safetensors', reason=NO_SAFETENSORS)
    # One built for another PyTorch is there, but cannot be imported.
    if subprocess.run([sys.executable, '-c', 'import torchvision'], stderr=subprocess.DEVNULL).returncode:
        pytest.skip('PyTorch with torchvision is not installed, or does not work')
    net, images = network('resnet50', norm)
    export.write_safetensors(net, str(tmp_path / 'weights.safetensors'), {})
    np.save(str(tmp_path / 'images.npy'), images)
    result = subprocess.run([sys.executable, '-c', TORCHVISION, str(tmp_path), norm], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    np.testing.assert_allclose(np.load(str(tmp_path / 'theirs.npy')), logits(net, images), **TOLERANCE)


# ------------------------------------------------------------------------------------ the command

@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('export') / 'run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train', '--gin_file', 'gin/digits_gn_bs2.gin', '--workdir', folder,
                                    '--gin_bindings', 'train.num_epochs = 1', '--gin_bindings',
                                    'Digits.num_train = 256'])
        train.main()
    return folder


def exported(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export', *map(str, arguments)])
    export.main()


def test_a_run_folder_becomes_a_model_that_says_how_to_feed_it(run_folder, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip('onnxruntime', reason=NO_ONNXRUNTIME)
    path = tmp_path / 'digits.onnx'
    exported(monkeypatch, '--workdir', run_folder, '--checkpoint', 'best', '--format', 'onnx', '--out', path)
    assert f'wrote {path}' in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata['model'], metadata['norm'], metadata['num_groups']) == ('ConvNet', 'GroupNorm', '8')
    assert json.loads(metadata['class_names']) == [str(digit) for digit in range(10)]

    # The metadata alone lead from a picture to our prediction.
    from gn_gluon import experiment
    built = experiment.trained(experiment.recorded_experiment(run_folder)[0], run_folder, 'best')
    picture = np.random.RandomState(0).choice([0, 255], (8, 8)).astype('uint8')
    mean, std = (np.array(json.loads(metadata[name])) for name in ('mean', 'std'))
    data = ((picture - mean.reshape(1, -1, 1, 1)) / std.reshape(1, -1, 1, 1)).astype('float32')
    ours = built.dataset.preprocess(np.repeat(picture[..., None], 3, axis=2))[None]
    expected = built.net(mx.nd.array(ours)).asnumpy()
    np.testing.assert_allclose(session.run(None, {'data': data})[0], expected, **TOLERANCE)


def test_the_three_formats_are_written_from_a_gin_file_and_a_params_file(run_folder, tmp_path, monkeypatch):
    pytest.importorskip('safetensors', reason=NO_SAFETENSORS)
    given = ['--gin_file', 'gin/digits_gn_bs2.gin', '--workdir', tmp_path / 'none', '--checkpoint',
             os.path.join(run_folder, 'last', 'net.params')]
    exported(monkeypatch, *given, '--format', 'symbol', '--out', tmp_path / 'digits')
    exported(monkeypatch, *given, '--format', 'safetensors', '--out', tmp_path / 'digits.safetensors')
    assert {path.name for path in tmp_path.iterdir()} == {'digits-symbol.json', 'digits-0000.params',
                                                          'digits.safetensors'}


def test_imagenets_normalization_is_the_published_one():
    found = export.normalization(ImageNet(image_size=32))
    np.testing.assert_allclose(found['mean'], 255 * np.array([0.485, 0.456, 0.406]), atol=1e-3)
    np.testing.assert_allclose(found['std'], 255 * np.array([0.229, 0.224, 0.225]), atol=1e-3)


@pytest.mark.parametrize('arguments, said', [
    (['--format', 'onnx'], 'neither --gin_file nor --workdir'),
    (['--format', 'symbol', '--opset', '18', '--workdir', 'nowhere'], '--opset 18 is of --format onnx'),
    (['--format', 'symbol', '--workdir', 'nowhere'], 'no run in nowhere'),
    (['--format', 'symbol', '--workdir', 'nowhere', '--out', 'missing/out'], 'the folder missing of --out'),
    (['--format', 'onnx', '--workdir', 'nowhere'], r"needs the package onnx, .* pip install '\.\[export\]'"),
    (['--format', 'safetensors', '--workdir', 'nowhere'], 'needs the package safetensors'),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    if 'needs' in said:
        for package in ('onnx', 'safetensors'):
            monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with pytest.raises(UserError, match=said):
        exported(monkeypatch, *['--out', 'out'], *arguments)
