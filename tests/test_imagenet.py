"""Packed ImageNet: the recipe against plain NumPy, the same bits with any number of threads, damaged files."""
import hashlib
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile

import cv2
import mxnet as mx
import numpy as np
import pytest
import scipy.stats

from gn_gluon import data
from gn_gluon.data import augment, imagenet, loader, records
from gn_gluon.errors import UserError

SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'shared', 'data')
GREY = np.array([0.299, 0.587, 0.114])


# -------------------------------------------------------------------------------------- a packed data set

def write_packed(folder, splits, classes):
    """Pack {'train': [(label, JPEG bytes), ...], 'val': ...} as tools/pack_imagenet.py does."""
    os.makedirs(folder, exist_ok=True)
    manifest = {'format': 1, 'num_classes': len(classes), 'resize': None, 'quality': None, 'seed': 0, 'splits': {},
                'left_out': []}
    for split, images in splits.items():
        paths = [os.path.join(folder, f'{split}.{kind}') for kind in ('rec', 'idx')]
        file = mx.recordio.MXIndexedRecordIO(paths[1], paths[0], 'w')
        for i, (label, jpeg) in enumerate(images):
            file.write_idx(i, mx.recordio.pack(mx.recordio.IRHeader(0, float(label), i, 0), jpeg))
        file.close()
        manifest['splits'][split] = {'num_images': len(images), 'images_per_class': []}
    with open(os.path.join(folder, 'classes.txt'), 'w') as file:
        file.write(''.join(line + '\n' for line in classes))
    sign(folder, manifest)
    return str(folder)


def sign(folder, manifest=None):
    """Write the manifest of the files as they are now."""
    path = os.path.join(folder, 'manifest.json')
    if manifest is None:
        with open(path) as file:
            manifest = json.load(file)

    def read(name):
        with open(os.path.join(folder, name), 'rb') as file:
            return file.read()

    manifest['classes_sha256'] = hashlib.sha256(read('classes.txt')).hexdigest()
    for split, about in manifest['splits'].items():
        for kind in ('rec', 'idx'):
            contents = read(f'{split}.{kind}')
            about[f'{kind}_bytes'], about[f'{kind}_sha256'] = len(contents), hashlib.sha256(contents).hexdigest()
    with open(path, 'w') as file:
        json.dump(manifest, file)


def jpeg(seed, height, width, grey=False):
    """A JPEG image of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4) if grey else (4, 4, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


SHAPES = [(60, 90), (90, 60), (48, 48), (33, 200), (7, 5), (1, 1), (64, 64)]
CLASSES = ['n01\tgoldfish, Carassius auratus', 'n02\ttench', 'n03', 'n04\tcock', 'n05\then']
NUM_TRAIN, NUM_VALIDATION, SIZE = 41, 11, 32


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """A folder of images of all shapes, one of them grey; label = number modulo 5."""
    def split(number, seed):
        return [(i % 5, jpeg(seed + i, *SHAPES[i % len(SHAPES)], grey=i == 3)) for i in range(number)]

    return write_packed(tmp_path_factory.mktemp('packed'), {'train': split(NUM_TRAIN, 0),
                                                            'val': split(NUM_VALIDATION, 100)}, CLASSES)


@pytest.fixture
def copied(packed, tmp_path):
    """A copy to damage."""
    for name in os.listdir(packed):
        with open(os.path.join(packed, name), 'rb') as file:
            (tmp_path / name).write_bytes(file.read())
    return tmp_path


def loaded(folder, **arguments):
    dataset = data.ImageNet(str(folder), **dict({'image_size': SIZE}, **arguments))
    dataset.load()
    return dataset


def decoded(dataset, split, i):
    """RGB (h, w, 3) uint8 of one record, read by MXNet."""
    path = os.path.join(dataset.data_dir, split)
    file = mx.recordio.MXIndexedRecordIO(path + '.idx', path + '.rec', 'r')
    return mx.image.imdecode(mx.recordio.unpack(file.read_idx(i))[1]).asnumpy()


# ----------------------------------------------------------------------------------------------- the crop

def reference_crop(rng, height, width):
    """The crop as the paper's references draw it: (row, column, height, width), None where no attempt fits."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        aspect = rng.uniform(3 / 4, 4 / 3)
        w, h = int(np.sqrt(area * aspect) + 0.5), int(np.sqrt(area / aspect) + 0.5)
        if rng.random() < 0.5:
            w, h = h, w
        if h <= height and w <= width:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return None


def our_crops(number, height, width):
    draws = loader.epoch_draws(number, 22, 0, 0)
    shapes = augment.crop_shapes(draws[:, :20].reshape(number, 10, 2)).tolist()
    return np.array([augment.place_crop(height, width, *one) for one in zip(shapes, draws[:, 20:].tolist())])


@pytest.mark.parametrize('height, width', [(375, 500), (500, 375), (256, 256)])
def test_crops_are_distributed_as_those_of_the_reference(height, width):
    rng = np.random.default_rng(0)
    expected = [reference_crop(rng, height, width) for _ in range(6000)]
    expected = np.array([crop for crop in expected if crop is not None])
    found = our_crops(6000, height, width)
    assert (found[:, 0] + found[:, 2] <= height).all() and (found[:, 1] + found[:, 3] <= width).all()
    for statistic in (lambda c: c[:, 2] * c[:, 3], lambda c: c[:, 2] / c[:, 3], lambda c: c[:, 0], lambda c: c[:, 1]):
        assert scipy.stats.ks_2samp(statistic(found), statistic(expected)).pvalue > 0.01
    area, aspect = found[:, 2] * found[:, 3] / (height * width), found[:, 2] / found[:, 3]
    assert 0.079 < area.min() < 0.085 and area.max() > 0.97
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.36


def test_where_every_crop_fits_its_area_and_aspect_are_those_of_the_paper():
    """With room on all sides the first attempt counts, so that the laws are known in closed form."""
    shapes = augment.crop_shapes(loader.epoch_draws(20000, 2, 0, 0).reshape(-1, 1, 2))[:, 0]
    area, aspect = shapes.prod(1), shapes[:, 0] / shapes[:, 1]
    assert scipy.stats.kstest(area, scipy.stats.uniform(0.08, 0.92).cdf).pvalue > 0.01

    def cdf(x):  # half of the ratios are uniform in 3/4 to 4/3, half are the inverses of such
        return (np.clip((x - 3 / 4) / (7 / 12), 0, 1) + np.clip((4 / 3 - 1 / x) / (7 / 12), 0, 1)) / 2

    assert scipy.stats.kstest(aspect, cdf).pvalue > 0.01
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.02


def test_a_crop_that_never_fits_becomes_the_centre_square_and_draws_at_the_edge_stay_inside():
    np.testing.assert_array_equal(our_crops(50, 40, 4000), np.tile([0, 1980, 40, 40], (50, 1)))
    np.testing.assert_array_equal(our_crops(50, 1, 1), np.tile([0, 0, 1, 1], (50, 1)))
    last = 1 - 2.0 ** -24  # the largest float32 that the loader draws
    for size in (5, 224, 4001):
        for draw, at_the_end in ((0, False), (last, True)):
            top, left, height, width = augment.place_crop(size, size, [(0.5, 0.75)], [draw, draw])
            assert (top, left) == ((size - height, size - width) if at_the_end else (0, 0))
        for draw in (0, last):
            shapes = augment.crop_shapes(np.full((1, 10, 2), draw, np.float32))[0]
            top, left, height, width = augment.place_crop(size, size, shapes, [draw, draw])
            assert 0 <= top <= size - height and 0 <= left <= size - width


# ------------------------------------------------------------------------------------- jitter and lighting

def plain_jitter(image, draws, order, strength=0.4):
    """Brightness, contrast and saturation (0, 1, 2) one after another, as defined: float64 RGB (h, w, 3)."""
    def brightness(image, alpha):
        return alpha * image

    def contrast(image, alpha):
        return alpha * image + (1 - alpha) * (image @ GREY).mean()

    def saturation(image, alpha):
        return alpha * image + (1 - alpha) * (image @ GREY)[..., None]

    for which in order:
        image = (brightness, contrast, saturation)[which](image, 1 + strength * (2 * float(draws[which]) - 1))
    return image


def plain_lighting(draws):
    alpha = 0.1 * scipy.stats.norm.ppf(draws.astype(np.float64) + 2.0 ** -25)
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    return 255 * vectors @ (alpha * [0.2175, 0.0188, 0.0045])


def test_jitter_equals_one_step_after_another_in_all_six_orders():
    draws = loader.epoch_draws(60, 3, 0, 0)
    image = np.random.default_rng(1).random((5, 7, 3)) * 255
    greys = image @ GREY
    for row, pixel, grey, mean in zip(draws, *augment.colour_jitter(draws)):
        found = pixel * image + grey * greys[..., None] + mean * greys.mean()
        for order in itertools.permutations(range(3)):
            np.testing.assert_allclose(found, plain_jitter(image, row, order), rtol=1e-12)


def test_each_jitter_is_uniform_from_0_6_to_1_4():
    draws = loader.epoch_draws(20000, 3, 0, 0)
    for which in range(3):
        alone = np.full_like(draws, 0.5)
        alone[:, which] = draws[:, which]
        pixel, _, _ = augment.colour_jitter(alone)
        assert scipy.stats.kstest(pixel, scipy.stats.uniform(0.6, 0.8).cdf).pvalue > 0.01
        assert 0.6 <= pixel.min() < 0.601 and 1.399 < pixel.max() <= 1.4
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03


def test_lighting_is_normal_along_the_principal_components():
    draws = loader.epoch_draws(30000, 3, 0, 0)
    found = augment.pca_lighting(draws)
    for row, added in zip(draws[:50], found):
        np.testing.assert_allclose(added, plain_lighting(row), rtol=1e-9, atol=1e-12)
    along = np.linalg.solve(augment.EIGENVECTORS, found.T)
    for component, eigenvalue in zip(along, [0.2175, 0.0188, 0.0045]):
        assert scipy.stats.kstest(component, scipy.stats.norm(0, 0.1 * 255 * eigenvalue).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(along) - np.eye(3)).max() < 0.03
    assert np.isfinite(augment.pca_lighting(np.float32([[0, 1 - 2.0 ** -24, 0.5]]))).all()


# ------------------------------------------------------------------------------------------- whole images

def normalized(image):
    return ((image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


def test_training_images_equal_a_plain_reference(packed):
    dataset = loaded(packed)
    draws = loader.epoch_draws(NUM_TRAIN, dataset.num_draws, 0, 0)
    found = dataset.train_batch(np.arange(NUM_TRAIN), draws)
    assert found.dtype == np.float32 and found.shape == (NUM_TRAIN, 3, SIZE, SIZE)
    flipped = 0
    for i, row in enumerate(draws):
        image = decoded(dataset, 'train', i)
        top, left, height, width = augment.place_crop(
            *image.shape[:2], augment.crop_shapes(row[None, :20].reshape(1, 10, 2))[0], row[20:22].tolist())
        image = cv2.resize(image[top:top + height, left:left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        image = plain_jitter(image.astype(np.float64), row[23:26], (2, 0, 1)) + plain_lighting(row[26:29])
        if row[22] < 0.5:
            image, flipped = image[:, ::-1], flipped + 1
        np.testing.assert_allclose(found[i], normalized(image), atol=2e-5, err_msg=f'image {i}')
    assert 10 < flipped < 31
    assert found.max() > 2.65  # (1 - 0.485) / 0.229 and the like: beyond 255, for nothing is clipped


def test_validation_images_are_the_centre_of_the_resized_image(packed):
    dataset = loaded(packed)
    assert dataset.resize == 37  # 32 * 256 / 224
    found = dataset.validation_batch(np.arange(NUM_VALIDATION))
    for i in range(NUM_VALIDATION):
        image = decoded(dataset, 'val', i)
        height, width = image.shape[:2]
        long = round(37 * max(height, width) / min(height, width))
        image = cv2.resize(image, (37, long) if width < height else (long, 37), interpolation=cv2.INTER_LINEAR)
        top, left = (image.shape[0] - SIZE) // 2, (image.shape[1] - SIZE) // 2
        np.testing.assert_allclose(found[i], normalized(image[top:top + SIZE, left:left + SIZE]), atol=2e-5)
        np.testing.assert_array_equal(dataset.preprocess(decoded(dataset, 'val', i)), found[i])
    assert data.ImageNet().resize == 256 and data.ImageNet().image_shape == (3, 224, 224)


def test_an_orientation_in_exif_is_ignored(tmp_path):
    plain = jpeg(0, 40, 70)
    tiff = b'II*\0\x08\0\0\0\x01\0' + struct.pack('<HHII', 0x112, 3, 1, 6) + bytes(4)
    exif = b'\xff\xe1' + struct.pack('>H', 8 + len(tiff)) + b'Exif\0\0' + tiff
    turned = plain[:2] + exif + plain[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (70, 40, 3)
    images = [(0, plain), (0, turned)]
    dataset = loaded(write_packed(tmp_path, {'train': images, 'val': images}, CLASSES))
    both = dataset.validation_batch(np.arange(2))
    np.testing.assert_array_equal(both[0], both[1])
    draws = loader.epoch_draws(1, dataset.num_draws, 0, 0)
    both = dataset.train_batch(np.arange(2), np.concatenate([draws, draws]))
    np.testing.assert_array_equal(both[0], both[1])


# ------------------------------------------------------------------------------------- order and threads

def epoch(dataset, batch_size, epoch=0, **arguments):
    return list(loader.train_batches(dataset, batch_size, seed=3, epoch=epoch, **arguments))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_any_number_of_workers_gives_the_same_bits_whatever_the_batch(packed):
    expected = epoch(loaded(packed, workers=1), 8)
    assert len(expected) == NUM_TRAIN // 8
    for workers in (2, 3, 64):
        assert_same(epoch(loaded(packed, workers=workers), 8), expected)
    one_by_one = epoch(loaded(packed, workers=3), 1)
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in one_by_one])[:40],
                                  np.concatenate([batch.images for batch in expected]))
    assert not np.array_equal(epoch(loaded(packed), 8, epoch=1)[0].images, expected[0].images)


def test_labels_are_those_that_were_packed(packed):
    dataset = loaded(packed)
    order = loader.epoch_order(NUM_TRAIN, 3, 0)
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in epoch(dataset, 10)]), order[:40] % 5)
    assert dataset.train_labels[np.arange(3)].dtype == np.int32
    assert dataset.class_names == ['goldfish', 'tench', 'n03', 'cock', 'hen'] and dataset.num_classes == 5


def test_an_epoch_resumed_reads_only_what_is_left_of_it(packed, monkeypatch):
    dataset = loaded(packed)
    expected = epoch(dataset, 6)
    read, original = [], records.RecordFile.read

    def note(self, i):
        read.append(int(i))
        return original(self, i)

    monkeypatch.setattr(records.RecordFile, 'read', note)
    for start_step in (1, 4, 6):
        del read[:]
        assert_same(epoch(dataset, 6, start_step=start_step), expected[start_step:])
        assert sorted(read) == sorted(loader.epoch_order(NUM_TRAIN, 3, 0)[6 * start_step:36])


def test_the_parts_of_an_update_make_up_what_one_process_would_have(packed):
    dataset = loaded(packed)
    expected = epoch(dataset, 6)
    parts = [epoch(dataset, 6, rows=rows) for rows in (slice(0, 3), slice(3, 5), slice(5, 6))]
    for step, whole in enumerate(expected):
        np.testing.assert_array_equal(np.concatenate([part[step].images for part in parts]), whole.images)
        np.testing.assert_array_equal(np.concatenate([part[step].labels for part in parts]), whole.labels)
    assert {len(part) for part in parts} == {len(expected)} and parts[0][0].num_samples == 3


def test_parts_of_the_validation_images_hold_every_one_once_whatever_their_batches(packed):
    dataset = loaded(packed)
    bounds = [0, 4, 4, NUM_VALIDATION]
    labels = [batch.labels[:batch.num_samples] for first, after, size in zip(bounds, bounds[1:], (3, 5, 2))
              for batch in loader.validation_batches(dataset, size, first, after)]
    np.testing.assert_array_equal(np.concatenate(labels), np.arange(NUM_VALIDATION) % 5)


@pytest.mark.parametrize('batch_size', [1, 4, 10, 11, 12, 50])
def test_every_validation_image_comes_exactly_once(packed, batch_size):
    dataset = loaded(packed)
    batches = list(loader.validation_batches(dataset, batch_size))
    images = np.concatenate([batch.images[:batch.num_samples] for batch in batches])
    labels = np.concatenate([batch.labels[:batch.num_samples] for batch in batches])
    np.testing.assert_array_equal(images, dataset.validation_batch(np.arange(NUM_VALIDATION)))
    np.testing.assert_array_equal(labels, np.arange(NUM_VALIDATION) % 5)


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    memory = imagenet.Memory()
    first = memory.take((4, 5))
    address = first.ctypes.data
    part = first[1:, :2].T.reshape(-1)[:0], first[2:]
    del first
    second = memory.take((4, 5))
    assert not np.shares_memory(second, part[1])
    del part
    third = memory.take((2, 3, 3))
    assert third.ctypes.data == address and third.shape == (2, 3, 3)
    del third
    assert memory.take((4, 6)).shape == (4, 6)


# ---------------------------------------------------------------------------- counts, arguments, bad files

def test_counts_are_official_without_a_folder_and_the_manifests_with_one(packed, tmp_path):
    dataset = data.ImageNet(str(tmp_path / 'nowhere'))
    assert (dataset.num_classes, dataset.num_train, dataset.num_validation) == (1000, 1281167, 50000)
    dataset = data.ImageNet(packed)
    assert (dataset.num_classes, dataset.num_train, dataset.num_validation) == (None, None, None)
    dataset.load()
    assert (dataset.num_classes, dataset.num_train, dataset.num_validation) == (5, NUM_TRAIN, NUM_VALIDATION)
    dataset = loaded(packed, num_train=7, num_validation=3)
    assert (dataset.num_train, dataset.num_validation) == (7, 3)
    assert sum(batch.num_samples for batch in loader.validation_batches(dataset, 2)) == 3


def test_a_described_data_set_preprocesses_without_its_files(packed):
    dataset = loaded(packed)
    restored = data.ImageNet('nowhere', image_size=SIZE)
    restored.restore(json.loads(json.dumps(dataset.describe())))
    assert restored.num_classes == 5 and restored.class_names[0] == 'goldfish'
    image = decoded(dataset, 'val', 0)
    np.testing.assert_array_equal(restored.preprocess(image), dataset.preprocess(image))
    with pytest.raises(UserError, match='uint8 is needed'):
        restored.preprocess(image[..., 0])


@pytest.mark.parametrize('arguments, message', [
    ({'image_size': 0}, 'ImageNet.image_size = 0 is not a whole number'),
    ({'workers': 0}, 'ImageNet.workers = 0 is not a whole number'),
    ({'resize': 200}, 'ImageNet.resize = 200 is less than the ImageNet.image_size = 224'),
    ({'num_train': 1281168}, 'ImageNet.num_train = 1281168 is not a whole number between 1 and 1281167'),
])
def test_arguments_are_checked(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        data.ImageNet(str(tmp_path), **arguments)


def refused(function, *words):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert word in message, message


def test_files_that_are_not_those_packed_are_refused_before_the_first_image(copied):
    refused(lambda: loaded(copied / 'absent'), 'absent', 'tools/pack_imagenet.py')
    refused(lambda: loaded(copied, num_train=42), '41 training images', 'ImageNet.num_train = 42')
    for name in ('train.rec', 'val.idx', 'classes.txt'):
        whole = (copied / name).read_bytes()
        for broken in (whole[:-4], whole + b'more', None):
            if broken is None:
                (copied / name).unlink()
            else:
                (copied / name).write_bytes(broken)
            refused(lambda: loaded(copied), str(copied / name))
        (copied / name).write_bytes(whole)
    loaded(copied)


def damage(folder, i, change):
    """Apply `change` to the bytes of training record `i`, which begin with those of RecordIO."""
    offsets = np.loadtxt(folder / 'train.idx', dtype=int)[:, 1]
    contents = bytearray((folder / 'train.rec').read_bytes())
    record = bytearray(contents[offsets[i]:offsets[i + 1]])
    size = len(record)
    change(record)
    assert len(record) == size
    contents[offsets[i]:offsets[i + 1]] = record
    (folder / 'train.rec').write_bytes(contents)


def no_magic(record):
    record[:4] = bytes(4)


def no_image(record):
    record[32:] = bytes(len(record) - 32)


def other_label(record):
    record[12:16] = struct.pack('<f', 5)


def no_label(record):
    record[12:16] = struct.pack('<f', float('nan'))


@pytest.mark.parametrize('change, word', [(no_magic, 'part of a record'), (no_image, 'OpenCV cannot decode'),
                                          (other_label, 'label 5 is outside the 5 classes'), (no_label, 'label nan')])
def test_a_damaged_record_is_one_sentence_that_names_it(copied, change, word):
    damage(copied, 20, change)
    dataset = loaded(copied, workers=2)
    refused(lambda: epoch(dataset, 10), str(copied / 'train.rec'), 'record 20', word)
    draws = loader.epoch_draws(20, dataset.num_draws, 0, 0)
    assert np.isfinite(dataset.train_batch(np.arange(20), draws)).all()  # the threads go on


@pytest.mark.parametrize('broken', [b'', jpeg(0, 40, 50)[:500], b'no JPEG at all'])
def test_a_packed_image_that_does_not_decode_is_one_sentence(tmp_path, broken):
    images = [(0, jpeg(0, 40, 50)), (1, broken)]
    dataset = loaded(write_packed(tmp_path, {'train': images[:1], 'val': images}, CLASSES))
    refused(lambda: dataset.validation_batch(np.arange(2)), 'val.rec', 'record 1', 'OpenCV cannot decode')


# --------------------------------------------------------------------------------- in a run of its own

CONFIG = f"""
train.norm = @GroupNorm
GroupNorm.num_groups = 4
train.model = @ConvNet
ConvNet.channels = (8, 16)
train.dataset = @ImageNet
ImageNet.image_size = {SIZE}
train.optimizer = @SGD
train.schedule = @StepSchedule
StepSchedule.epochs = (1,)
train.num_replicas = 2
train.batch_per_replica = 4
train.num_epochs = 2
train.learning_rate = 0.05
checkpoint.minutes = 1e-6
"""

# Kills itself in the middle of the second epoch, while the threads decode.
KILLED = """
import os, signal, sys
import gn_gluon
from gn_gluon import optim, train
update, calls = optim.Updater.update, []
def counted(*args):
    calls.append(0)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
optim.Updater.update = counted
train.main()
"""


def python(*arguments):
    clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=clone, capture_output=True, text=True)


def command(code, folder, data_dir, workdir, *bindings):
    bindings = [flag for binding in bindings for flag in ('--gin_bindings', binding)]
    return python(*code, '--gin_file', folder / 'run.gin', '--data_dir', data_dir, '--workdir', folder / workdir,
                  *bindings)


@pytest.mark.slow
def test_a_run_killed_in_an_epoch_ends_the_same_with_other_workers(packed, tmp_path):
    (tmp_path / 'run.gin').write_text(CONFIG)
    train = ['-m', 'gn_gluon.train']
    for code, workdir, workers, status in ((train, 'whole', 1, 0), (['-c', KILLED], 'killed', 2, -signal.SIGKILL),
                                           (train, 'killed', 3, 0)):
        result = command(code, tmp_path, packed, workdir, f'ImageNet.workers = {workers}')
        assert result.returncode == status, result.stderr
    whole, killed = ((tmp_path / name / 'last' / 'net.params').read_bytes() for name in ('whole', 'killed'))
    assert whole == killed
    result = command(['-m', 'gn_gluon.eval', '--json'], tmp_path, packed, 'whole')
    assert json.loads(result.stdout)['num_samples'] == NUM_VALIDATION


@pytest.mark.slow
def test_a_run_refuses_other_images_and_a_set_without_validation(packed, copied, tmp_path):
    (tmp_path / 'run.gin').write_text(CONFIG)
    assert command(['-m', 'gn_gluon.train'], tmp_path, packed, 'run', 'train.num_epochs = 1').returncode == 0
    damage(copied, 3, no_image)
    sign(copied)
    result = command(['-m', 'gn_gluon.train'], tmp_path, copied, 'run', 'train.num_epochs = 1')
    assert result.returncode == 2 and 'was trained on other data (rec_sha256' in result.stderr, result.stderr
    alone = write_packed(tmp_path / 'alone', {'train': [(0, jpeg(0, 40, 50))] * 8, 'val': []}, CLASSES)
    result = command(['-m', 'gn_gluon.train'], tmp_path, alone, 'other')
    assert result.returncode == 2 and 'holds no validation images' in result.stderr, result.stderr


@pytest.mark.slow
def test_the_benchmark_measures_both_pipelines_on_the_same_images(tmp_path):
    images = [(i % 5, jpeg(i, 60, 90)) for i in range(20)]
    folder = write_packed(tmp_path / 'packed', {'train': images, 'val': []}, CLASSES)
    found = tmp_path / 'found.json'
    result = python('tools/bench_data.py', '--data', folder, '--batch', 5, '--images', 30, '--rounds', 2, '--json',
                    found)
    assert result.returncode == 0, result.stderr
    rows = json.loads(found.read_text())['rows']
    assert [row['contestant'] for row in rows] == ['gn_gluon', 'ImageRecordIter'] and 'ratio' in result.stdout
    for row in rows:
        first, median, third = row['images_per_second_and_core']
        assert 0 < first <= median <= third and len(row['turns']) == 2 and row['turns'][0]['images'] == 40
    result = python('tools/bench_data.py', '--data', tmp_path)
    assert result.returncode == 2 and 'manifest.json not found' in result.stderr


# --------------------------------------------------------------------------------------------- real images

@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    """The 1,000 real images, packed as they are, for training and, every tenth, for validation."""
    path = os.path.join(SHARED, 'imagenet-sample.tar')
    if not os.path.exists(path):
        pytest.skip('the packed real data sets are not in ../shared/data')
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    names = sorted(name for name in files if name.endswith('.JPEG'))
    assert len(names) == 1000
    images = [(i, files[name]) for i, name in enumerate(names)]
    return write_packed(tmp_path_factory.mktemp('sample'), {'train': images, 'val': images[::10]},
                        [name.split('/')[-2] for name in names])


def test_real_images_are_normalized_and_keep_their_labels(sample):
    dataset = loaded(sample, image_size=64)
    assert dataset.num_classes == 1000 and dataset.num_train == 1000 and dataset.num_validation == 100
    batches = epoch(dataset, 100)
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(np.sort(labels), np.arange(1000))
    images = np.concatenate([batch.images for batch in batches])
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=0.15)
    batches = list(loader.validation_batches(dataset, 30))
    labels, images = (np.concatenate([getattr(batch, what)[:batch.num_samples] for batch in batches])
                      for what in ('labels', 'images'))
    np.testing.assert_array_equal(labels, np.arange(0, 1000, 10))
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=0.15)
    np.testing.assert_allclose(images.std((2, 3)).mean(0), 1, atol=0.08)  # the mean over images, not that of all pixels
