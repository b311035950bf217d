"""Your own images: an HDF5 file and a list of ids."""
import os

import h5py
import numpy as np

from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import ArrayDataset
from gn_gluon.errors import UserError


class H5Dataset(ArrayDataset):
    """A folder with `data.hy` (or `data.hdf5`) and `id.txt`: your own data set, without a line of code.

    Each line of `id.txt` names a group of the HDF5 file, which holds `image`, (h, w, c) uint8 with the same
    h, w and c in all (square or not, any number of channels), and `label`, one-hot. The length of the labels
    is the number of classes. The last images of `id.txt`, in the order of the file, validate; so shuffle it
    when you write it.

    Arguments:
        data_dir: the folder; default datasets/h5.
        num_train, num_validation: use the first so many images of each part only; default all.
        validation_fraction: part of the images that validates, in (0, 1): rounded, and at least one image on
            either side.
        pad: training images are padded by so many pixels on each side and cropped; default 0.
        flip: training images are mirrored left to right half of the time; default False.
    `load` raises UserError that names the file and the id for anything that is not as said.
    """

    name = 'h5'

    def __init__(self, data_dir=None, num_train=None, num_validation=None, validation_fraction=0.2, pad=0,
                 flip=False):
        if not 0 < validation_fraction < 1:
            raise UserError(f'H5Dataset.validation_fraction = {validation_fraction} is not between 0 and 1')
        if pad < 0:
            raise UserError(f'H5Dataset.pad = {pad} is negative')
        super().__init__(data_dir, num_train, num_validation)
        self.validation_fraction = validation_fraction
        self.pad = pad
        self.flip = flip
        self.num_draws = 3 if pad or flip else 0

    def how_to_get(self):
        return 'make it as this describes: python -m pydoc gn_gluon.data.H5Dataset'

    def read(self):
        folder = self.source()
        ids = self._read_ids(self.find('id.txt'))
        present = [file for file in ('data.hy', 'data.hdf5') if os.path.isfile(os.path.join(folder, file))]
        if not present:
            raise UserError(f'neither data.hy nor data.hdf5 is in {folder}; {self.how_to_get()}')
        path = self.find(present[0])
        try:
            with h5py.File(path, 'r') as file:
                images, labels = self._read_groups(file, path, ids)
        except (OSError, RuntimeError, KeyError) as error:
            raise self.damaged(path, f'cannot be read as HDF5 ({error})') from None
        self.image_shape = (images.shape[3], *images.shape[1:3])
        num_validation = min(max(1, round(len(ids) * self.validation_fraction)), len(ids) - 1)
        num_train = len(ids) - num_validation
        return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]

    def _read_ids(self, path):
        try:
            with open(path, encoding='utf-8') as file:
                ids = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError:
            raise self.damaged(path, 'is not a text file') from None
        if len(ids) < 2:
            raise self.damaged(path, f'names {len(ids)} images, but at least 2 are needed, '
                                     'one to train and one to validate')
        seen = set()
        for number, name in enumerate(ids, 1):
            if name in seen:
                raise self.damaged(path, f'names {name} twice (the second time as image {number})')
            seen.add(name)
        return ids

    def _read_groups(self, file, path, ids):
        images = labels = None
        for i, name in enumerate(ids):
            image, label = self._read_group(file, path, name)
            if images is None:
                images = np.empty((len(ids), *image.shape), np.uint8)
                labels = np.empty(len(ids), np.int32)
                self.num_classes = len(label)
            if image.shape != images.shape[1:]:
                raise self.damaged(path, f'has an image of shape {image.shape} under {name}, but '
                                         f'{images.shape[1:]} under {ids[0]}')
            if len(label) != self.num_classes:
                raise self.damaged(path, f'has a label of length {len(label)} under {name}, but '
                                         f'{self.num_classes} under {ids[0]}')
            images[i] = image
            labels[i] = label.argmax()
        return images, labels

    def _read_group(self, file, path, name):
        group = file.get(name)
        if not isinstance(group, h5py.Group):
            raise self.damaged(path, f'has no group {name}, which id.txt names')
        for key in ('image', 'label'):
            if not isinstance(group.get(key), h5py.Dataset):
                raise self.damaged(path, f'has no {key} under {name}')
        image, label = group['image'][()], group['label'][()]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or not image.size:
            raise self.damaged(path, f'has an image under {name} that is not (h, w, c) uint8')
        one_hot = isinstance(label, np.ndarray) and label.ndim == 1 and label.dtype.kind in 'biuf'
        if not one_hot or np.count_nonzero(label) != 1 or label.max() != 1:
            raise self.damaged(path, f'has a label under {name} that is not one-hot')
        return image, label

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, self.pad, self.flip) if self.num_draws else images
