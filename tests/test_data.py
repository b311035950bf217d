"""Readers on files in the official formats, made here or real; order, batches and augmentation."""
import gzip
import json
import os
import pickle
import struct
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pytest
import scipy.io

from gn_gluon import data
from gn_gluon.data import loader
from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import channel_statistics
from gn_gluon.errors import UserError

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, '..', '..', 'shared', 'data')


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cut(path, keep=0.6):
    """Keep the first part of a file only."""
    with open(path, 'r+b') as file:
        file.truncate(int(os.path.getsize(path) * keep))


def refused(dataset, *words):
    """Loading must fail with one sentence that has all `words` in it."""
    with pytest.raises(UserError) as caught:
        dataset.load()
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert word in message, message
    return message


# ------------------------------------------------------------------------------------------------- MNIST

class TinyMNIST(data.MNIST):
    num_train = 12
    num_validation = 5


def write_idx(path, array, magic=None, shape=None):
    magic = magic or (0x803 if array.ndim == 3 else 0x801)
    shape = shape or array.shape
    with gzip.open(path, 'wb') as file:
        file.write(struct.pack(f'>{1 + len(shape)}I', magic, *shape) + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    write_idx(tmp_path / 'train-images-idx3-ubyte.gz', noise(0, 12, 28, 28))
    write_idx(tmp_path / 'train-labels-idx1-ubyte.gz', np.arange(12, dtype=np.uint8) % 10)
    write_idx(tmp_path / 't10k-images-idx3-ubyte.gz', noise(1, 5, 28, 28))
    write_idx(tmp_path / 't10k-labels-idx1-ubyte.gz', np.arange(5, dtype=np.uint8))
    return tmp_path


def test_mnist_reads_the_idx_files(mnist):
    dataset = TinyMNIST(str(mnist))
    dataset.load()
    np.testing.assert_array_equal(dataset.train_images[..., 0], noise(0, 12, 28, 28))
    np.testing.assert_array_equal(dataset.validation_images[..., 0], noise(1, 5, 28, 28))
    np.testing.assert_array_equal(dataset.train_labels, np.arange(12) % 10)
    assert dataset.validation_labels.dtype == np.int32


@pytest.mark.parametrize('file, array, kwargs, words', [
    ('train-images-idx3-ubyte.gz', noise(0, 12, 28, 28), {'magic': 0x801}, ['does not begin as an idx file of images']),
    ('t10k-labels-idx1-ubyte.gz', noise(0, 5), {'magic': 0x803}, ['does not begin as an idx file of labels']),
    ('t10k-images-idx3-ubyte.gz', noise(0, 4, 28, 28), {}, ['holds 4 x 28 x 28 values, not 5 x 28 x 28']),
    ('train-images-idx3-ubyte.gz', noise(0, 12, 28, 27), {}, ['12 x 28 x 27']),
    ('t10k-images-idx3-ubyte.gz', noise(0, 4, 28, 28), {'shape': (5, 28, 28)}, ['shorter', '3936']),
    ('t10k-labels-idx1-ubyte.gz', noise(0, 6), {'shape': (5,)}, ['longer']),
    ('train-labels-idx1-ubyte.gz', np.full(12, 10, np.uint8), {}, ['train image 0', 'label 10', '0 to 9']),
])
def test_mnist_refuses_an_idx_file_of_other_contents(mnist, file, array, kwargs, words):
    write_idx(mnist / file, array, **kwargs)
    refused(TinyMNIST(str(mnist)), *words)


def test_mnist_refuses_cut_and_damaged_files(mnist):
    path = mnist / 't10k-images-idx3-ubyte.gz'
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b'not gzip at all', whole[:60] + b'\0\0\0\0' + whole[64:]):
        path.write_bytes(broken)
        refused(TinyMNIST(str(mnist)), str(path), 'is damaged', 'python tools/download.py --dataset MNIST --out')
    path.write_bytes(b'')
    refused(TinyMNIST(str(mnist)), str(path), 'is empty')
    path.unlink()
    refused(TinyMNIST(str(mnist)), path.name, 'is not in')


def test_a_missing_folder_names_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(data.CIFAR10(), 'datasets/cifar10', 'python tools/download.py --dataset CIFAR10 --out datasets')
    refused(data.FashionMNIST('elsewhere/fashion'), 'elsewhere/fashion', '--dataset Fashion --out elsewhere')
    refused(data.SVHN('svhn'), '--dataset SVHN --out .')
    refused(data.TinyImageNet(), 'datasets/tiny_imagenet', '--dataset TinyImageNet --out datasets')
    refused(data.H5Dataset(), 'datasets/h5')


def test_limits_take_the_first_images_and_are_checked(mnist):
    dataset = TinyMNIST(str(mnist), num_train=7, num_validation=2)
    assert (dataset.num_train, dataset.num_validation) == (7, 2)
    dataset.load()
    assert len(dataset.train_images) == 7 and len(dataset.validation_labels) == 2
    assert dataset.mean == pytest.approx(noise(0, 12, 28, 28)[:7].mean())
    for wrong in (0, -1, 13, 2.5):
        with pytest.raises(UserError, match='num_train = .* is not a whole number between 1 and 12'):
            TinyMNIST(str(mnist), num_train=wrong)


# ------------------------------------------------------------------------------------------------- CIFAR

class TinyCIFAR(data.CIFAR10):
    num_train = 20
    num_validation = 3


class Python2Pickler(pickle._Pickler):
    """Writes bytes and str as Python 2 wrote its str, as in the official batches."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)

    dispatch[bytes] = dispatch[str] = save_python2_string


def write_batch(path, rows, labels):
    with open(path, 'wb') as file:
        Python2Pickler(file, 2).dump({'batch_label': 'made up', 'labels': list(labels), 'data': rows,
                                      'filenames': ['x.png'] * len(rows)})


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    for number in range(1, 6):
        write_batch(folder / f'data_batch_{number}', noise(number, 4, 3072), [number] * 4)
    write_batch(folder / 'test_batch', noise(6, 3, 3072), [7, 8, 9])
    return folder


def test_cifar_reads_batches_in_both_places_and_channels_in_order(cifar):
    assert b'cnumpy.core.multiarray\n_reconstruct' in (cifar / 'test_batch').read_bytes()
    for folder in (cifar, cifar.parent):
        dataset = TinyCIFAR(str(folder))
        dataset.load()
        rows = noise(2, 4, 3072)
        np.testing.assert_array_equal(dataset.train_images[4:8, ..., 2].reshape(4, -1), rows[:, 2048:])  # blue
        np.testing.assert_array_equal(dataset.train_labels, np.repeat(np.arange(1, 6), 4))
        np.testing.assert_array_equal(dataset.validation_labels, [7, 8, 9])


def test_cifar_reads_a_pickle_of_python_3_with_bytes_keys(cifar):
    (cifar / 'test_batch').write_bytes(pickle.dumps({b'data': noise(6, 3, 3072), b'labels': [1, 2, 3]}, 4))
    dataset = TinyCIFAR(str(cifar))
    dataset.load()
    np.testing.assert_array_equal(dataset.validation_labels, [1, 2, 3])


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_before_it_does(cifar, tmp_path, protocol):
    target = str(tmp_path / 'harmed')
    (cifar / 'data_batch_3').write_bytes(pickle.dumps({'data': Attack(target)}, protocol))
    refused(TinyCIFAR(str(cifar)), 'data_batch_3', 'mkdir')
    assert not os.path.exists(target)


def test_cifar_refuses_cut_and_wrong_batches(cifar):
    path = cifar / 'data_batch_2'
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:len(whole) // 2], b'\x80', b'junk', pickle.dumps([1, 2]), pickle.dumps({})):
        path.write_bytes(broken)
        refused(TinyCIFAR(str(cifar)), str(path), 'cannot be read as a batch of CIFAR-10', '--dataset CIFAR10')
    rows = noise(0, 4, 3072)
    for pixels, labels in ((rows[:3], [0] * 3), (rows, [0] * 3), (rows.astype(float), [0] * 4), (rows[:, :9], [0] * 4),
                           (rows, [0.5] * 4)):
        write_batch(path, pixels, labels)
        refused(TinyCIFAR(str(cifar)), str(path), 'does not hold 4 images of 3,072 bytes and their labels')
    write_batch(path, rows, [0, 1, 10, 2])
    refused(TinyCIFAR(str(cifar)), 'train image 6', 'label 10', '0 to 9')
    path.write_bytes(b'')
    refused(TinyCIFAR(str(cifar)), str(path), 'is empty')


def test_per_pixel_mean_is_the_mean_image_and_scale_128(cifar):
    dataset = TinyCIFAR(str(cifar), per_pixel_mean=True)
    dataset.load()
    batch = dataset.normalize(dataset.train_images)
    expected = (dataset.train_images - dataset.train_images.mean(0)).transpose(0, 3, 1, 2) / 128
    np.testing.assert_allclose(batch, expected, atol=1e-6)


# -------------------------------------------------------------------------------------------------- SVHN

class TinySVHN(data.SVHN):
    num_train = 6
    num_validation = 3
    num_extra = 4


def write_mat(path, images, labels):
    scipy.io.savemat(path, {'X': images, 'y': labels}, do_compression=True)


@pytest.fixture
def svhn(tmp_path):
    write_mat(tmp_path / 'train_32x32.mat', noise(0, 32, 32, 3, 6), np.array([[1, 2, 9, 10, 10, 5]], np.uint8).T)
    write_mat(tmp_path / 'test_32x32.mat', noise(1, 32, 32, 3, 3), np.array([[3, 10, 4]], np.uint8).T)
    return tmp_path


def test_svhn_reads_mat_files_and_label_10_is_digit_0(svhn):
    dataset = TinySVHN(str(svhn))
    dataset.load()
    np.testing.assert_array_equal(dataset.train_labels, [1, 2, 9, 0, 0, 5])
    np.testing.assert_array_equal(dataset.train_images[4], noise(0, 32, 32, 3, 6)[..., 4])
    assert dataset.train_images.flags.c_contiguous


def test_svhn_takes_the_extra_images_only_when_told(svhn):
    refused(TinySVHN(str(svhn), extra=True), 'extra_32x32.mat', '--dataset SVHN SVHNExtra')
    write_mat(svhn / 'extra_32x32.mat', noise(2, 32, 32, 3, 4), np.full((4, 1), 7, np.uint8))
    dataset = TinySVHN(str(svhn), extra=True)
    assert dataset.num_train == 10
    dataset.load()
    np.testing.assert_array_equal(dataset.train_labels, [1, 2, 9, 0, 0, 5, 7, 7, 7, 7])


def test_svhn_refuses_damaged_files_and_labels(svhn):
    path = svhn / 'test_32x32.mat'
    images, labels = noise(1, 32, 32, 3, 3), np.array([[3, 10, 4]], np.uint8).T
    for label in (0, 11):
        write_mat(path, images, np.array([[3, 1, label]], np.uint8).T)
        refused(TinySVHN(str(svhn)), str(path), f'gives image 2 the label {label}')
    for wrong in ((images[..., :2], labels[:2]), (images, labels[:2]), (images.astype(float), labels)):
        write_mat(path, *wrong)
        refused(TinySVHN(str(svhn)), str(path), 'not 3 images of 32 x 32 x 3')
    write_mat(path, images, labels)
    cut(path)
    refused(TinySVHN(str(svhn)), str(path), 'cannot be read as a MATLAB 5 file')
    path.write_bytes(b'no matrix here, and not even enough of it' * 9)
    refused(TinySVHN(str(svhn)), str(path), 'cannot be read as a MATLAB 5 file')
    scipy.io.savemat(path, {'X': images})
    refused(TinySVHN(str(svhn)), str(path), 'y')


# ----------------------------------------------------------------------------------------- Tiny ImageNet

class TinierImageNet(data.TinyImageNet):
    num_classes = 3
    official_train_per_class = 12
    official_validation_per_class = 2

    def __init__(self, data_dir, num_train=None, train_per_class=12, validation_per_class=2):
        super().__init__(data_dir, num_train, None, train_per_class, validation_per_class)


WNIDS = ['n03', 'n01', 'n02']


def flat_colour(wnid, number):
    """RGB that tells class and number of an image after JPEG coding."""
    return np.array([int(wnid[1:]) * 60, number * 20, 128])


@pytest.fixture
def tiny_imagenet(tmp_path):
    root = tmp_path / 'tiny-imagenet-200'
    (root / 'val' / 'images').mkdir(parents=True)
    (root / 'wnids.txt').write_text('\n'.join(WNIDS) + '\n')
    (root / 'words.txt').write_text('n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\tteapot\n')

    def write(path, wnid, number):
        image = np.broadcast_to(flat_colour(wnid, number)[::-1], (64, 64, 3)).astype(np.uint8)
        assert cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 95])

    lines = []
    for wnid in WNIDS:
        (root / 'train' / wnid / 'images').mkdir(parents=True)
        for number in range(12):
            write(root / 'train' / wnid / 'images' / f'{wnid}_{number}.JPEG', wnid, number)
        for number in range(2):
            name = f'val_{len(lines)}.JPEG'
            write(root / 'val' / 'images' / name, wnid, number)
            lines.append(f'{name}\t{wnid}\t0\t0\t62\t62\n')
    (root / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    return root


def test_tiny_imagenet_labels_by_sorted_wnid_and_interleaves_classes_in_rgb(tiny_imagenet):
    for folder in (tiny_imagenet, tiny_imagenet.parent):
        dataset = TinierImageNet(str(folder), num_train=35)
        dataset.load()
        assert dataset.class_names == ['goldfish', 'bullfrog', 'teapot']
        np.testing.assert_array_equal(dataset.train_labels, np.tile([0, 1, 2], 12)[:35])
        expected = [flat_colour(f'n0{i % 3 + 1}', i // 3) for i in range(35)]
        np.testing.assert_allclose(dataset.train_images.mean((1, 2)), expected, atol=3)
        np.testing.assert_array_equal(dataset.validation_labels, [0, 1, 2] * 2)
        assert dataset.train_images.dtype == np.uint8


def test_tiny_imagenet_accepts_a_subset_only_when_told(tiny_imagenet):
    (tiny_imagenet / 'train' / 'n02' / 'images' / 'n02_11.JPEG').unlink()
    refused(TinierImageNet(str(tiny_imagenet)), 'n02', 'has 11 images, not 12', 'TinyImageNet.train_per_class = 11')
    dataset = TinierImageNet(str(tiny_imagenet), train_per_class=11)
    dataset.load()
    assert dataset.num_train == 33
    annotations = tiny_imagenet / 'val' / 'val_annotations.txt'
    annotations.write_text(''.join(annotations.read_text().splitlines(keepends=True)[1:]))
    refused(TinierImageNet(str(tiny_imagenet), train_per_class=11), '1 images of class n03',
            'TinyImageNet.validation_per_class = 1')
    with pytest.raises(UserError, match='train_per_class = 13 is not a whole number between 1 and 12'):
        TinierImageNet(str(tiny_imagenet), train_per_class=13)


def test_a_grayscale_jpeg_becomes_three_equal_channels(tiny_imagenet):
    path = tiny_imagenet / 'train' / 'n01' / 'images' / 'n01_0.JPEG'
    assert cv2.imwrite(str(path), np.arange(4096, dtype=np.uint8).reshape(64, 64))
    dataset = TinierImageNet(str(tiny_imagenet))
    dataset.load()
    image = dataset.train_images[0]
    assert image.std() > 50
    np.testing.assert_array_equal(image[..., 0], image[..., 1])
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_tiny_imagenet_names_the_file_that_is_wrong(tiny_imagenet):
    dataset = TinierImageNet(str(tiny_imagenet))
    path = tiny_imagenet / 'train' / 'n02' / 'images' / 'n02_7.JPEG'
    whole = path.read_bytes()
    cv2.imwrite(str(path), noise(0, 64, 64, 3), [cv2.IMWRITE_JPEG_QUALITY, 95])
    cut(path)
    refused(dataset, str(path), 'cannot be decoded as a JPEG image')
    path.write_bytes(b'')
    refused(dataset, str(path), 'cannot be decoded')
    cv2.imwrite(str(path), noise(0, 32, 64, 3))
    refused(dataset, str(path), 'is 32 x 64 pixels, not 64 x 64')
    path.write_bytes(whole)

    annotations = tiny_imagenet / 'val' / 'val_annotations.txt'
    lines = annotations.read_text()
    for line in ('val_0.JPEG\tn99\t0\t0\t1\t1\n', '../../wnids.txt\tn01\t0\t0\t1\t1\n', 'val_0.JPEG\n'):
        annotations.write_text(lines + line)
        refused(dataset, str(annotations), 'line 7')
    annotations.write_text(lines)
    missing = tiny_imagenet / 'val' / 'images' / 'val_3.JPEG'
    missing.unlink()
    refused(dataset, str(missing), 'No such file')
    (tiny_imagenet / 'wnids.txt').write_text('n01\nn02\n')
    refused(dataset, 'wnids.txt', 'lists 2 classes, not 3')


# ---------------------------------------------------------------------------------------------------- h5

def one_hot(label, classes=4):
    return np.eye(classes)[label].astype(bool)


@pytest.fixture
def h5(tmp_path):
    with h5py.File(tmp_path / 'data.hy', 'w') as file:
        for i in range(11):
            group = file.create_group(f'image {i}')
            group['image'] = noise(i, 6, 9, 2)
            group['label'] = one_hot(i % 4)
    (tmp_path / 'id.txt').write_text(''.join(f'image {i}\n' for i in reversed(range(11))))
    return tmp_path


def test_h5_validates_on_the_last_fifth_of_id_txt_in_file_order(h5):
    dataset = data.H5Dataset(str(h5))
    dataset.load()
    assert (dataset.num_classes, dataset.image_shape) == (4, (2, 6, 9))
    assert (dataset.num_train, dataset.num_validation) == (9, 2)
    np.testing.assert_array_equal(dataset.train_labels, [i % 4 for i in range(10, 1, -1)])
    np.testing.assert_array_equal(dataset.validation_labels, [1, 0])
    np.testing.assert_array_equal(dataset.validation_images[1], noise(0, 6, 9, 2))
    os.rename(h5 / 'data.hy', h5 / 'data.hdf5')
    again = data.H5Dataset(str(h5), num_train=3, validation_fraction=0.5)
    again.load()
    assert (again.num_train, again.num_validation) == (3, 6)
    batch = again.train_batch(np.array([2, 0]), np.zeros((2, 0)))
    assert batch.shape == (2, 2, 6, 9)


@pytest.mark.parametrize('fraction, num_validation', [(0.001, 1), (0.999, 10)])
def test_h5_leaves_at_least_one_image_on_either_side(h5, fraction, num_validation):
    dataset = data.H5Dataset(str(h5), validation_fraction=fraction)
    dataset.load()
    assert (dataset.num_train, dataset.num_validation) == (11 - num_validation, num_validation)


def test_h5_augments_only_when_told(h5):
    plain, augmented = data.H5Dataset(str(h5)), data.H5Dataset(str(h5), pad=1, flip=True)
    for dataset in (plain, augmented):
        dataset.load()
    assert (plain.num_draws, augmented.num_draws) == (0, 3)
    draws = np.array([[0.5, 0.5, 0.0]])  # no shift, mirrored
    np.testing.assert_array_equal(augmented.train_batch(np.array([3]), draws),
                                  plain.train_batch(np.array([3]), draws[:, :0])[..., ::-1])


def break_h5(key, value):
    def change(file):
        del file[f'image 5/{key}']
        if value is not None:
            file[f'image 5/{key}'] = value
    return change


@pytest.mark.parametrize('change, words', [
    (break_h5('image', noise(0, 9, 6, 2)), ['(9, 6, 2)', '(6, 9, 2) under image 10']),
    (break_h5('image', noise(0, 6, 9)), ['not (h, w, c) uint8']),
    (break_h5('image', np.zeros((6, 9, 2))), ['not (h, w, c) uint8']),
    (break_h5('image', h5py.Empty('u1')), ['not (h, w, c) uint8']),
    (break_h5('image', None), ['no image']),
    (break_h5('label', None), ['no label']),
    (break_h5('label', one_hot(1) | one_hot(2)), ['not one-hot']),
    (break_h5('label', np.zeros(4)), ['not one-hot']),
    (break_h5('label', np.array([0, 2, 0, 0])), ['not one-hot']),
    (break_h5('label', 3), ['not one-hot']),
    (break_h5('label', one_hot(1, classes=5)), ['length 5', '4 under image 10']),
    (lambda file: file.pop('image 5'), ['no group']),
])
def test_h5_names_the_id_that_is_wrong(h5, change, words):
    with h5py.File(h5 / 'data.hy', 'r+') as file:
        change(file)
    refused(data.H5Dataset(str(h5)), str(h5 / 'data.hy'), 'image 5', *words)


def test_h5_refuses_wrong_files_and_arguments(h5):
    dataset = data.H5Dataset(str(h5))
    ids = (h5 / 'id.txt').read_text()
    (h5 / 'id.txt').write_text(ids + 'image 7\n')
    refused(dataset, 'id.txt', 'names image 7 twice')
    (h5 / 'id.txt').write_text('\n\n')
    refused(dataset, 'id.txt', 'names 0 images')
    (h5 / 'id.txt').write_text('')
    refused(dataset, 'id.txt', 'is empty')
    (h5 / 'id.txt').write_text(ids)
    cut(h5 / 'data.hy')
    refused(dataset, 'data.hy', 'cannot be read as HDF5')
    (h5 / 'data.hy').write_bytes(b'text' * 1000)
    refused(dataset, 'data.hy', 'cannot be read as HDF5')
    (h5 / 'data.hy').unlink()
    refused(dataset, 'neither data.hy nor data.hdf5')
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(UserError, match='H5Dataset.validation_fraction'):
            data.H5Dataset(str(h5), validation_fraction=fraction)


# -------------------------------------------------------------------------------- statistics, preprocess

def test_channel_statistics_equal_those_of_float64():
    images = noise(0, 1025, 5, 3, 3) // np.array([1, 2, 3], np.uint8)  # more than one chunk
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-12)


def test_preprocess_of_a_stored_image_is_its_validation_image(cifar):
    dataset = TinyCIFAR(str(cifar))
    dataset.load()
    for i in range(3):
        np.testing.assert_array_equal(dataset.preprocess(dataset.validation_images[i]),
                                      dataset.validation_batch(np.array([i]))[0])


def test_a_described_data_set_preprocesses_without_its_files(cifar):
    for per_pixel_mean in (False, True):
        dataset = TinyCIFAR(str(cifar), per_pixel_mean=per_pixel_mean)
        dataset.load()
        restored = TinyCIFAR('nowhere', per_pixel_mean=per_pixel_mean)
        restored.restore(json.loads(json.dumps(dataset.describe())))
        image = noise(0, 50, 40, 3)
        np.testing.assert_array_equal(restored.preprocess(image), dataset.preprocess(image))


def test_preprocess_cuts_the_centre_and_never_distorts(cifar):
    dataset = TinyCIFAR(str(cifar))
    dataset.load()
    image = np.repeat(np.repeat(dataset.validation_images[0], 3, 0), 3, 1)
    sides = np.zeros((96, 48, 3), np.uint8)
    wide = np.concatenate([sides, image, sides], axis=1)
    expected = dataset.validation_batch(np.array([0]))[0]
    np.testing.assert_allclose(dataset.preprocess(wide), expected, atol=0.02)
    np.testing.assert_allclose(dataset.preprocess(wide.transpose(1, 0, 2)), expected.transpose(0, 2, 1), atol=0.02)
    for shape in ((1, 1, 3), (3, 500, 3), (700, 33, 3)):
        assert dataset.preprocess(noise(0, *shape)).shape == (3, 32, 32)
    for wrong in (noise(0, 32, 32), noise(0, 32, 32, 4), noise(0, 32, 32, 3).astype(np.float32)):
        with pytest.raises(UserError, match='uint8 is needed'):
            dataset.preprocess(wrong)


def test_preprocess_for_grey_images_and_for_the_digits_scale(mnist, h5):
    dataset = TinyMNIST(str(mnist))
    dataset.load()
    grey = np.repeat(dataset.validation_images[0], 3, -1)
    np.testing.assert_array_equal(dataset.preprocess(grey), dataset.validation_batch(np.array([0]))[0])
    red, blue = np.zeros((2, 28, 28, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 255
    difference = (dataset.preprocess(red) - dataset.preprocess(blue)) * dataset.std
    np.testing.assert_allclose(difference, 255 * (0.299 - 0.114), atol=1)
    digits = data.Digits()
    digits.load()
    stored = digits.validation_images[0]
    bright = np.repeat(np.round(stored * (255 / 16)).astype(np.uint8), 3, -1)
    np.testing.assert_array_equal(digits.preprocess(bright), digits.validation_batch(np.array([0]))[0])
    two_channels = data.H5Dataset(str(h5))
    two_channels.load()
    with pytest.raises(UserError, match='2 channels'):
        two_channels.preprocess(grey)


# ------------------------------------------------------------------------------------------ augmentation

def test_pad_crop_flip_equals_its_definition_on_images_that_are_not_square():
    images = noise(0, 40, 5, 7, 2)
    draws = np.random.default_rng(1).random((40, 3))
    for flip in (True, False):
        result = pad_crop_flip(images, draws, pad=2, flip=flip)
        for image, (a, b, c), cropped in zip(images, draws, result):
            row, column = int(a * 5) - 2, int(b * 5) - 2
            for y in range(5):
                for x in range(7):
                    source_x = (6 - x if flip and c < 0.5 else x) + column
                    inside = 0 <= y + row < 5 and 0 <= source_x < 7
                    expected = image[y + row, source_x] if inside else 0
                    np.testing.assert_array_equal(cropped[y, x], expected)


def test_every_shift_occurs_and_the_largest_draw_stays_inside():
    image = np.zeros((1, 3, 3, 1), np.uint8)
    image[0, 1, 1] = 1
    last = 1 - 2.0 ** -24  # the largest float32 that the loader draws
    grid = np.array([[a, b, 0.9] for a in (0, 0.4, last) for b in (0, 0.4, last)], np.float32)
    shifted = pad_crop_flip(np.repeat(image, 9, 0), grid, pad=1)
    assert {tuple(np.argwhere(s[..., 0])[0]) for s in shifted} == {(y, x) for y in range(3) for x in range(3)}
    largest = np.full((1, 3), last, np.float32)
    for pad in (1, 2, 4, 8, 16, 31):
        assert pad_crop_flip(image, largest, pad).shape == image.shape


# ------------------------------------------------------------------------------------------------ loader

@pytest.fixture(scope='module')
def digits():
    dataset = data.Digits()
    dataset.load()
    return dataset


def same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.num_samples == b.num_samples


def test_a_resumed_epoch_gives_the_rest_of_the_undisturbed_one(digits):
    whole = list(loader.train_batches(digits, 100, seed=3, epoch=2))
    for start_step in (0, 1, 9, 13, 14):
        same(loader.train_batches(digits, 100, seed=3, epoch=2, start_step=start_step), whole[start_step:])


def test_batch_size_does_not_change_a_samples_place_or_augmentation(digits):
    def epoch(batch_size):
        batches = list(loader.train_batches(digits, batch_size, seed=0, epoch=5))
        return [np.concatenate(arrays) for arrays in list(zip(*batches))[:2]]

    images, labels = epoch(1)
    for batch_size in (7, 32, 1437):
        some_images, some_labels = epoch(batch_size)
        np.testing.assert_array_equal(some_images, images[:len(some_images)])
        np.testing.assert_array_equal(some_labels, labels[:len(some_labels)])


def test_order_and_augmentation_change_with_seed_and_epoch(digits):
    orders = {tuple(loader.epoch_order(1437, seed, epoch)) for seed in range(3) for epoch in range(3)}
    draws = {loader.epoch_draws(1437, 3, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == len(draws) == 9
    assert not np.array_equal(np.argsort(loader.epoch_draws(1437, 3, 0, 0)[:, 0]), loader.epoch_order(1437, 0, 0))


@pytest.mark.parametrize('batch_size', [1436, 1437, 719, 100])
def test_training_drops_the_remainder_and_repeats_nothing(digits, batch_size):
    steps = 1437 // batch_size
    batches = list(loader.train_batches(digits, batch_size, seed=0, epoch=0))
    order = loader.epoch_order(1437, 0, 0)
    assert len(set(order)) == 1437
    assert [batch.images.shape for batch in batches] == [(batch_size, 1, 8, 8)] * steps
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]),
                                  digits.train_labels[order[:steps * batch_size]])


@pytest.mark.parametrize('batch_size', [359, 360, 361, 1, 7, 1000])
def test_validation_sees_every_image_exactly_once_and_masks_padding(digits, batch_size):
    batches = list(loader.validation_batches(digits, batch_size))
    assert {batch.images.shape for batch in batches} == {(batch_size, 1, 8, 8)}
    images = np.concatenate([batch.images[:batch.num_samples] for batch in batches])
    np.testing.assert_array_equal(images, digits.normalize(digits.validation_images))
    labels = np.concatenate([batch.labels[:batch.num_samples] for batch in batches])
    np.testing.assert_array_equal(labels, digits.validation_labels)


def test_an_error_while_a_batch_is_made_reaches_the_training_loop():
    def make_batch(step):
        if step == 2:
            raise UserError('a broken sample')
        return step

    taken = []
    with pytest.raises(UserError, match='a broken sample'):
        for batch in loader.Prefetcher(make_batch, range(5)):
            taken.append(batch)
    assert taken == [0, 1]


# ------------------------------------------------------------------------------------------ the real sets

@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
    """A function that lays out one of the packed real data sets as its official download would be."""
    script = os.path.join(SHARED, 'unpack.py')
    if not os.path.exists(script):
        pytest.skip('the packed real data sets are not in ../shared/data')

    def unpack(name):
        folder = str(tmp_path_factory.mktemp(name))
        subprocess.run([sys.executable, script, name, folder], check=True, capture_output=True)
        return folder
    return unpack


def test_real_mnist(unpacked):
    dataset = data.MNIST(unpacked('mnist'))
    dataset.load()
    assert dataset.train_images.shape == (60000, 28, 28, 1) and dataset.validation_images.shape == (10000, 28, 28, 1)
    np.testing.assert_array_equal(dataset.train_labels[:10], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4])
    np.testing.assert_array_equal(dataset.validation_labels[:10], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9])
    np.testing.assert_allclose([dataset.mean[0] / 255, dataset.std[0] / 255], [0.1307, 0.3081], atol=5e-5)


def test_real_fashion_mnist(unpacked):
    dataset = data.FashionMNIST(unpacked('fashion-mnist'))
    dataset.load()
    assert dataset.train_images.shape == (60000, 28, 28, 1) and dataset.validation_images.shape == (10000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), [6000] * 10)
    assert dataset.class_names[dataset.train_labels[0]] == 'ankle boot'
    np.testing.assert_allclose([dataset.mean[0] / 255, dataset.std[0] / 255], [0.2860, 0.3530], atol=5e-5)


def test_real_cifar10(unpacked):
    dataset = data.CIFAR10(unpacked('cifar10'))
    dataset.load()
    assert dataset.train_images.shape == (50000, 32, 32, 3) and dataset.validation_images.shape == (10000, 32, 32, 3)
    np.testing.assert_array_equal(dataset.train_labels[:5], [6, 9, 9, 4, 1])  # frog, truck, truck, deer, automobile
    np.testing.assert_array_equal(dataset.validation_labels[:5], [3, 8, 8, 0, 6])
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), [5000] * 10)
    np.testing.assert_allclose(dataset.mean / 255, [0.4913, 0.4821, 0.4465], atol=6e-5)
    np.testing.assert_allclose(dataset.std / 255, [0.2452, 0.2428, 0.2606], atol=6e-5)
    images = np.concatenate([batch.images for batch in loader.validation_batches(dataset, 1000)])
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(images.std((0, 2, 3)), 1, atol=0.05)


def test_real_tiny_imagenet_subset(unpacked):
    folder = unpacked('tiny-imagenet')
    refused(data.TinyImageNet(folder), 'has 50 images, not 500', 'TinyImageNet.train_per_class = 50')
    dataset = data.TinyImageNet(folder, train_per_class=50, validation_per_class=10)
    dataset.load()
    assert dataset.train_images.shape == (10000, 64, 64, 3) and dataset.validation_images.shape == (2000, 64, 64, 3)
    assert len(set(dataset.class_names)) > 190 and dataset.class_names[0] == 'goldfish'
    grey = (dataset.train_images == dataset.train_images[..., :1]).all((1, 2, 3))
    assert 194 <= grey.sum() < 230  # 194 files have one channel; a few of three channels look grey
    goldfish = dataset.train_images[dataset.train_labels == 0].mean((0, 1, 2))
    assert goldfish[0] > goldfish[2] + 20  # orange: red comes first
