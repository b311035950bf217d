"""tools/convert_weights.py: published files give the logits that their own definition gives on the same photograph.

The definition is written here once more, in NumPy and float64, from the sources of each format; so are its names.
"""
import importlib.util
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile

import cv2
import mxnet as mx
import numpy as np
import pytest
import sklearn.datasets
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import save_file
from sklearn.datasets import load_sample_image

from gn_gluon import config
from gn_gluon.checkpoint import load_parameters
from gn_gluon.convert import convert, to_torchvision
from gn_gluon.convert.read import read_arrays
from gn_gluon.data import ImageNet
from gn_gluon.errors import UserError
from gn_gluon.experiment import Experiment
from gn_gluon.models import ResNet, resnet
from gn_gluon.norm import BatchNorm, GroupNorm

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGE_SIZE = 64
#: Networks of the plan, of which 50 and 101 are here smaller: blocks of each stage, channels and classes.
SMALL = {50: ((1, 2, 1, 1), (128, 128, 256, 256), 12), 101: ((1, 2, 2, 1), (128, 128, 256, 256), 12)}
RESNET50 = ((3, 4, 6, 3), (256, 512, 1024, 2048), 2)


# Names: of convolution, gamma and beta of a layer; `part` is 'stem', 'shortcut', or 1 to 3 within the block.

def torchvision(stage, block, part, gamma='weight', beta='bias'):
    conv, norm = {'stem': ('conv1', 'bn1'), 'shortcut': ('downsample.0', 'downsample.1')}.get(
        part, (f'conv{part}', f'bn{part}'))
    place = '' if part == 'stem' else f'layer{stage + 1}.{block}.'
    return f'{place}{conv}.weight', f'{place}{norm}.{gamma}', f'{place}{norm}.{beta}'


def gluoncv(stage, block, part):
    return torchvision(stage, block, part, 'gamma', 'beta')


def detectron(stage, block, part):
    layer = {'stem': 'conv1', 'shortcut': f'res{stage + 2}_{block}_branch1'}.get(
        part, f'res{stage + 2}_{block}_branch2{" abc"[part] if part in (1, 2, 3) else ""}')
    return f'{layer}_w', f'{layer}_gn_s', f'{layer}_gn_b'


def tensorpack(stage, block, part):
    layer = 'conv0' if part == 'stem' else 'group{}/block{}/{}'.format(
        stage, block, 'convshortcut' if part == 'shortcut' else f'conv{part}')
    return f'{layer}/W', f'{layer}/gn/gamma', f'{layer}/gn/beta'


OUTPUT = {torchvision: ('fc.weight', 'fc.bias'), gluoncv: ('fc.weight', 'fc.bias'), detectron: ('pred_w', 'pred_b'),
          tensorpack: ('linear/W', 'linear/b')}


def layers(network):
    """(stage, block, part, input channels, output channels, kernel) of each convolution."""
    all_blocks, all_channels, _ = network
    yield 0, 0, 'stem', 3, 64, 7
    before = 64
    for stage, (blocks, channels) in enumerate(zip(all_blocks, all_channels)):
        for block in range(blocks):
            inner = channels // 4
            if block == 0 and (stage > 0 or before != channels):
                yield stage, block, 'shortcut', before, channels, 1
            yield stage, block, 1, before, inner, 1
            yield stage, block, 2, inner, inner, 3
            yield stage, block, 3, inner, channels, 1
            before = channels


def random_weights(naming, network=SMALL[50]):
    """Dict of float32 arrays, kernels (out, in, h, w), by the names that `naming` gives."""
    random = np.random.RandomState(0)
    weights = {}
    for stage, block, part, before, channels, kernel in layers(network):
        conv, gamma, beta = naming(stage, block, part)
        weights[conv] = random.normal(0, (2 / (channels * kernel ** 2)) ** 0.5, (channels, before, kernel, kernel))
        weights[gamma], weights[beta] = random.uniform(0.5, 1.5, channels), random.normal(0, 0.3, channels)
    weight, bias = OUTPUT[naming]
    _, channels, num_classes = network
    weights[weight] = random.normal(0, 0.1, (num_classes, channels[-1]))
    weights[bias] = random.normal(0, 1, num_classes)
    return {name: array.astype(np.float32) for name, array in weights.items()}


# The definition, in float64.

def paddings(size, kernel, stride, same):
    """Before and after; 'SAME' as TensorFlow's documentation defines it."""
    if not same:
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def windows(x, kernel, stride, same, value=0.0):
    pads = [paddings(size, kernel, stride, same) for size in x.shape[1:]]
    x = np.pad(x, [(0, 0), *pads], constant_values=value)
    return sliding_window_view(x, (kernel, kernel), (1, 2))[:, ::stride, ::stride]


def reference(image, weights, naming, network, same=False):
    """Logits (classes,) of one image (3, H, W) in the format's own colours and scale."""
    def conv_norm(x, stage, block, part, stride=1):
        conv, gamma, beta = (weights[name].astype(np.float64) for name in naming(stage, block, part))
        x = np.einsum('chwij,ocij->ohw', windows(x, conv.shape[2], stride, same), conv, optimize=True)
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
        return groups.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]

    x = np.maximum(conv_norm(image.astype(np.float64), 0, 0, 'stem', 2), 0)
    x = windows(x, 3, 2, same, -np.inf).max((3, 4))
    for stage, block, part, *_ in layers(network):
        stride = 2 if stage > 0 and block == 0 else 1
        if part == 'shortcut':
            residual = conv_norm(x, stage, block, part, stride)
        elif part == 1:
            residual = residual if block == 0 else x
            y = np.maximum(conv_norm(x, stage, block, 1), 0)
        elif part == 2:
            y = np.maximum(conv_norm(y, stage, block, 2, stride), 0)
        elif part == 3:
            x = np.maximum(conv_norm(y, stage, block, 3) + residual, 0)
    weight, bias = (weights[name] for name in OUTPUT[naming])
    return weight @ x.mean((1, 2)) + bias


# The files.

def write_npz(path, weights):
    """As Tensorpack's: kernels (h, w, in, out), the classifier (in, out), and what else its checkpoints hold."""
    arrays = {name: array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, (0,)))
              for name, array in weights.items()}
    np.savez(path, **{name + ':0': array for name, array in arrays.items()}, **{'conv0/W/Momentum:0': np.zeros(3)})


def write_pkl(path, weights):
    """As Detectron's: Python 2's protocol, blobs and their momentum."""
    blobs = dict(weights, conv1_w_momentum=np.zeros(3, np.float32))
    with open(path, 'wb') as file:
        pickle.dump({'blobs': blobs, 'cfg': 'MODEL:\n  TYPE: generalized_rcnn\n'}, file, 2)


def write_params(path, weights):
    mx.nd.save(str(path), {name: mx.nd.array(array) for name, array in weights.items()})


def opcodes(value):
    """A pickle of `value` without its first and last opcodes, to be put into another."""
    return pickle.dumps(value, 2)[2:-1]


def pickled_tensor(key, shape, strides, offset=0, number=None, kind=b'FloatStorage'):
    """What PyTorch writes for a tensor: _rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())."""
    number = int(np.prod(shape)) if number is None else number
    storage = (b'(' + opcodes('storage') + b'ctorch\n' + kind + b'\n' + opcodes(key) + opcodes('cuda:0')
               + opcodes(number))
    return storage, (opcodes(offset) + opcodes(tuple(shape)) + opcodes(tuple(strides)) + b'\x89ccollections\n'
                     b'OrderedDict\n)RtR')


def pickled_state_dict(weights, legacy):
    """The pickle of {'epoch': 90, 'state_dict': OrderedDict of tensors}, which has no magic number yet."""
    content = b'\x80\x02}(' + opcodes('epoch') + opcodes(90) + opcodes('state_dict') + b'ccollections\nOrderedDict\n)R('
    for key, (name, array) in enumerate(weights.items()):
        strides = np.array(array.strides) // array.itemsize
        storage, rest = pickled_tensor(str(key), array.shape, strides.tolist())
        content += opcodes(name) + b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + (b'N' if legacy else b'')
        content += b'tQ' + rest
    return content + b'uu.'


def write_pth(path, weights):
    """torch.save of today: a zip archive of the pickle and of each storage."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickled_state_dict(weights, legacy=False))
        for key, array in enumerate(weights.values()):
            archive.writestr(f'archive/data/{key}', array.tobytes())


def write_legacy_pth(path, weights):
    """torch.save until PyTorch 1.6, of a network in DataParallel: pickles, then each storage after its length."""
    weights = {'module.' + name: array for name, array in weights.items()}
    with open(path, 'wb') as file:
        for head in (0x1950a86a20f9469cfc6c, 1001, {'protocol_version': 1001, 'little_endian': True}):
            pickle.dump(head, file, 2)
        file.write(pickled_state_dict(weights, legacy=True))
        pickle.dump([str(key) for key in range(len(weights))], file, 2)
        for array in weights.values():
            file.write(struct.pack('<q', array.size) + array.tobytes())


@pytest.fixture
def small_networks(monkeypatch):
    for depth, (blocks, channels, _) in SMALL.items():
        monkeypatch.setitem(resnet.BLOCKS, depth, blocks)
        monkeypatch.setattr(resnet, 'CHANNELS', channels)


@pytest.fixture(scope='module')
def photograph():
    """(h, w, 3) uint8, RGB."""
    return load_sample_image('china.jpg')


def centre(photograph):
    """The pixels that a validation image of IMAGE_SIZE shows, (3, H, W) float64, RGB, 0 to 255."""
    height, width = photograph.shape[:2]
    scale = round(IMAGE_SIZE * 256 / 224) / height
    image = cv2.resize(photograph, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_LINEAR)
    top, left = ((size - IMAGE_SIZE) // 2 for size in image.shape[:2])
    return image[top:top + IMAGE_SIZE, left:left + IMAGE_SIZE].transpose(2, 0, 1).astype(np.float64)


MEAN, STD = (255 * np.array(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalized(rgb):
    return (rgb - MEAN) / STD


def normalized_bgr(rgb):
    return normalized(rgb)[::-1]


def minus_detectrons_means(rgb):
    return rgb[::-1] - np.array([102.9801, 115.9465, 122.7717])[:, None, None]


def our_logits(made, out, photograph):
    """As gn_gluon.eval has them with the recipe and the gin file that the converter names."""
    config.parse([made.recipe] + ([made.gin_file] if made.gin_file else []),
                 [f'ImageNet.image_size = {IMAGE_SIZE}'])
    experiment = config.make(Experiment)
    net = experiment.model(norm=experiment.norm, num_classes=made.num_classes)
    net.infer_shape(mx.nd.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE)))
    net.initialize()
    net.hybridize()
    load_parameters(out, net._collect_params_with_prefix())
    return net(mx.nd.array(config.configured(ImageNet)().preprocess(photograph)[None])).asnumpy()[0]


@pytest.mark.parametrize('file_name, write, naming, image, depth, format_name, same', [
    ('resnet50_gn.pth', write_pth, torchvision, normalized, 50, 'torchvision', False),
    ('model.pth', write_legacy_pth, torchvision, normalized, 101, 'torchvision', False),
    ('model.safetensors', lambda path, weights: save_file(weights, path), torchvision, normalized, 50, 'torchvision',
     False),
    ('R-50-GN.pkl', write_pkl, detectron, minus_detectrons_means, 50, 'detectron', False),
    ('R-101-GN.pkl', write_pkl, detectron, minus_detectrons_means, 101, 'detectron', False),
    ('ImageNet-R50-GroupNorm32.npz', write_npz, tensorpack, normalized_bgr, 50, 'tensorpack', True),
    ('ImageNet-R50-GroupNorm32-AlignPadding.npz', write_npz, tensorpack, normalized_bgr, 50, 'tensorpack', False),
    ('resnet50_v1b_gn.params', write_params, gluoncv, normalized, 50, 'gluoncv', False)])
def test_a_converted_file_gives_its_own_logits(tmp_path, small_networks, photograph, file_name, write, naming, image,
                                               depth, format_name, same):
    weights = random_weights(naming, SMALL[depth])
    write(str(tmp_path / file_name), weights)
    made = convert(str(tmp_path / file_name), str(tmp_path / 'weights.params'))
    assert (made.format_name, made.norm, made.depth, made.num_classes) == (format_name, GroupNorm, depth, 12)

    expected = reference(image(centre(photograph)), weights, naming, SMALL[depth], same)
    ours = our_logits(made, str(tmp_path / 'weights.params'), photograph)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_the_commands_from_the_published_file_to_its_error(tmp_path):
    for split in ('train', 'val'):
        for image in ('china.jpg', 'flower.jpg'):
            (tmp_path / 'images' / split / image).mkdir(parents=True)
            shutil.copy(os.path.join(os.path.dirname(sklearn.datasets.__file__), 'images', image),
                        tmp_path / 'images' / split / image)
    weights = random_weights(detectron, RESNET50)
    write_pkl(str(tmp_path / 'R-50-GN.pkl'), weights)
    logits = np.array([reference(minus_detectrons_means(centre(load_sample_image(image))), weights, detectron, RESNET50)
                       for image in ('china.jpg', 'flower.jpg')])
    expected = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits.diagonal()

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=CLONE),
                              stdout=subprocess.PIPE, text=True, check=True).stdout

    run(os.path.join(CLONE, 'tools', 'pack_imagenet.py'), '--src', 'images', '--out', 'datasets/imagenet')
    output = run(os.path.join(CLONE, 'tools', 'convert_weights.py'), 'R-50-GN.pkl', '--out', 'weights.params')
    assert 'weights.gin: ImageNet.mean = (122.7717, 115.9465, 102.9801)' in output
    command = re.search('next: python (.*)', output).group(1).split()
    result = json.loads(run(*command, '--gin_bindings', f'ImageNet.image_size = {IMAGE_SIZE}', '--json'))
    assert result['num_samples'] == 2
    assert result['loss'] == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.parametrize('norm, num_parameters', [(GroupNorm, 161), (BatchNorm, 267)])
def test_our_weights_named_as_torchvisions_come_back_the_same(tmp_path, norm, num_parameters):
    net = ResNet(norm, num_classes=3)
    net.initialize()
    net(mx.nd.zeros((1, 3, 32, 32)))
    ours = {name: parameter.data() for name, parameter in net._collect_params_with_prefix().items()}
    theirs = to_torchvision(ours)
    assert len(theirs) == num_parameters
    assert theirs['layer4.2.conv3.weight'].shape == (2048, 512, 1, 1)
    save_file(dict(theirs, **{'bn1.num_batches_tracked': np.array(7)}), str(tmp_path / 'ours.safetensors'))
    made = convert(str(tmp_path / 'ours.safetensors'), str(tmp_path / 'back.params'))
    assert made.norm is norm
    back = mx.nd.load(str(tmp_path / 'back.params'))
    assert set(back) == set(ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(back[name].asnumpy(), array.asnumpy())


def test_tensors_may_be_views_of_one_storage_and_of_bfloat16(tmp_path):
    memory = np.arange(20, dtype=np.float32)
    storage, rest = pickled_tensor('0', (3, 2), (1, 5), offset=4, number=20, kind=b'BFloat16Storage')
    with zipfile.ZipFile(tmp_path / 'views.pth', 'w') as archive:
        archive.writestr('views/data.pkl', b'\x80\x02}(' + opcodes('weight') + b'ctorch._utils\n_rebuild_tensor_v2\n('
                         + storage + b'tQ' + rest + b'u.')
        archive.writestr('views/data/0', (memory.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    np.testing.assert_array_equal(read_arrays(str(tmp_path / 'views.pth'))['weight'], [[4, 9], [5, 10], [6, 11]])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('file_name', ['malicious.pkl', 'malicious.pth'])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path, file_name):
    path, content = str(tmp_path / file_name), pickle.dumps({'blobs': {'conv1_w': Malicious(tmp_path / 'ran')}}, 2)
    if file_name.endswith('.pkl'):
        (tmp_path / file_name).write_bytes(content)
    else:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', content)
    with pytest.raises(UserError, match=f'{file_name} wants to call posix.system'):
        convert(path, str(tmp_path / 'weights.params'))
    assert os.listdir(tmp_path) == [file_name]


def without(name):
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize('change, message', [
    (without('pred_w'), r'not a whole ResNet-50 as detectron names it: 1 parameters are missing \(pred_w\), 0 are'),
    (lambda weights: weights.update(fc6_w=np.zeros(3)), r'0 parameters are missing \(none\), 1 are unknown \(fc6_w\)'),
    (lambda weights: weights.update(conv1_w=np.zeros((64, 4, 7, 7))),
     r'conv1_w has shape \(64, 4, 7, 7\), and cannot be the \(64, 3, 7, 7\) of our ResNet-50'),
    (lambda weights: [weights.pop(name) for name in list(weights)[3:]], 'of no network that is known'),
    (lambda weights: weights.clear(), r'has 0 arrays \(\.\.\.\) of no network')])
def test_a_file_that_is_not_whole_is_refused(tmp_path, small_networks, change, message):
    weights = random_weights(detectron)
    change(weights)
    with open(tmp_path / 'weights.pkl', 'wb') as file:
        pickle.dump(weights, file, 2)
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / 'weights.pkl'), str(tmp_path / 'weights.params'))
    assert os.listdir(tmp_path) == ['weights.pkl']


@pytest.mark.parametrize('write', [write_pth, write_legacy_pth, write_npz, write_pkl, write_params,
                                   lambda path, weights: save_file(weights, path)])
def test_a_cut_file_is_refused(tmp_path, write):
    path = str(tmp_path / 'weights')
    write(path, {'a': np.arange(1000, dtype=np.float32), 'b': np.ones(1000, np.float32)})
    path = next(os.path.join(tmp_path, name) for name in os.listdir(tmp_path))  # np.savez appends .npz
    os.truncate(path, os.path.getsize(path) - 1000)
    with pytest.raises(UserError, match='is cut, or is no file of arrays'):
        read_arrays(path)


def test_what_cannot_be_read_or_bound_is_refused(tmp_path):
    for path, message in ((tmp_path / 'absent.pth', 'No such file'), (tmp_path, 'Is a directory')):
        with pytest.raises(UserError, match=f'cannot read {path}: {message}'):
            read_arrays(str(path))
    with pytest.raises(UserError, match="padding='valid' in ResNet: give 'symmetric' or 'same'"):
        ResNet(GroupNorm, padding='valid')
    for mean in (0.5, (1, 2), ('a', 'b', 'c'), (0, 0, 256)):
        with pytest.raises(UserError, match='ImageNet.mean = .* must be three numbers from 0 to 255'):
            ImageNet(mean=mean)


WITH_TORCH = """
import sys, numpy as np, torch
torch.manual_seed(0)
memory = torch.randn(4, 6)
tensors = {'matrix': memory, 'view': memory[1:, ::2].t(), 'parameter': torch.nn.Parameter(torch.randn(3)),
           'half': torch.randn(5).half(), 'bfloat16': torch.randn(5).bfloat16(), 'count': torch.tensor(7)}
optimizer = torch.optim.SGD([tensors['parameter']], 0.1, momentum=0.9)
tensors['parameter'].sum().backward()
optimizer.step()
checkpoint = {'epoch': 3, 'best': torch.tensor(0.5), 'state_dict': tensors, 'optimizer': optimizer.state_dict()}
torch.save(checkpoint, 'new.pth')
torch.save(checkpoint, 'legacy.pth', _use_new_zipfile_serialization=False)
np.savez('expected.npz', **{name: tensor.detach().float().numpy() for name, tensor in tensors.items()})
"""


def test_what_pytorch_itself_writes_is_read(tmp_path):
    if importlib.util.find_spec('torch') is None:
        pytest.skip('PyTorch is not installed')
    subprocess.run([sys.executable, '-c', WITH_TORCH], cwd=tmp_path, check=True)
    expected = np.load(tmp_path / 'expected.npz')
    for name in ('new.pth', 'legacy.pth'):
        arrays = read_arrays(str(tmp_path / name))
        assert set(arrays) == set(expected)
        for key, array in arrays.items():
            np.testing.assert_array_equal(array.astype(np.float32), expected[key])


WITH_TORCHVISION = """
import numpy as np, torch, torchvision
torch.manual_seed(0)
net = torchvision.models.resnet50(norm_layer=lambda channels: torch.nn.GroupNorm(32, channels), num_classes=5)
with torch.no_grad():
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    np.save('logits.npy', net.eval()(torch.from_numpy(np.load('image.npy')).float()).numpy())
torch.save(net.state_dict(), 'resnet50_gn.pth')
"""


@pytest.mark.slow
def test_torchvisions_resnet50_gives_the_same_logits(tmp_path, photograph):
    if importlib.util.find_spec('torch') is None or importlib.util.find_spec('torchvision') is None:
        pytest.skip('PyTorch and its torchvision are not installed')
    np.save(tmp_path / 'image.npy', normalized(centre(photograph))[None])
    subprocess.run([sys.executable, '-c', WITH_TORCHVISION], cwd=tmp_path, check=True)
    made = convert(str(tmp_path / 'resnet50_gn.pth'), str(tmp_path / 'weights.params'))
    expected = np.load(tmp_path / 'logits.npy')[0]
    ours = our_logits(made, str(tmp_path / 'weights.params'), photograph)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
