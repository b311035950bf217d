"""What every data set offers, and the kind that fits in memory."""
import numbers
import os

import cv2
import numpy as np

from gn_gluon.errors import UserError


class Dataset:
    """Random access to the samples of one data set.

    A data set says how one sample becomes a normalized (and, for training, augmented) image; `loader` decides
    the order. It is cheap to make and touches no file before `load`, so that a plan can be printed without
    data.

    Attributes, known after `load` and, where the official data set fixes them, before:
        name: the folder below `datasets/` that holds its files; None when it needs no files.
        num_classes: number of classes; labels are 0 .. num_classes - 1.
        image_shape: (C, H, W) of a batch's images.
        num_train, num_validation: numbers of images; None while unknown.
        class_names: list of str, or None.
        num_draws: how many random numbers in [0, 1) the augmentation of one image takes.
        train_labels, validation_labels: (n,) int32.
    """

    name = None
    num_classes = None
    image_shape = None
    num_train = None
    num_validation = None
    class_names = None
    num_draws = 0
    train_labels = None
    validation_labels = None

    def load(self):
        """Read and check the files. Raises UserError: which file, what is wrong with it, what to do."""
        raise TypeError(f'{type(self).__name__} must define load()')

    def train_batch(self, indices, draws):
        """Training images `indices` (n,), augmented by `draws` (n, num_draws): (n, C, H, W) float32."""
        raise TypeError(f'{type(self).__name__} must define train_batch()')

    def validation_batch(self, indices):
        """Validation images `indices` (n,), never augmented: (n, C, H, W) float32."""
        raise TypeError(f'{type(self).__name__} must define validation_batch()')

    def describe(self):
        """What `restore` needs to do without the files: a dict that JSON can hold."""
        return {'num_classes': self.num_classes, 'image_shape': list(self.image_shape), 'num_train': self.num_train,
                'num_validation': self.num_validation, 'class_names': self.class_names}

    def restore(self, description):
        """Take up what `describe` returned, instead of `load`: enough for `preprocess`."""
        vars(self).update(description, image_shape=tuple(description['image_shape']))

    def preprocess(self, image):
        """One uint8 RGB image (h, w, 3) of any size as a validation image would be: (C, H, W) float32."""
        raise UserError(f'{type(self).__name__} does not classify image files')


class ArrayDataset(Dataset):
    """A data set whose images are held in memory as uint8 (n, H, W, C) and normalized batch by batch.

    Subclasses set the attributes and define `read`, which returns
    (train_images, train_labels, validation_images, validation_labels).
    `num_train` and `num_validation` below the official count take the first images only.
    """

    #: The name that `tools/download.py --dataset` knows it by; None when it cannot be downloaded.
    download_name = None
    #: Per channel, (C,), or a whole image, (H, W, C), on the scale of the stored images. None: measured on
    #: the training images that are used.
    mean = None
    std = None

    def __init__(self, data_dir=None, num_train=None, num_validation=None):
        for what, asked, official in (('num_train', num_train, self.num_train),
                                      ('num_validation', num_validation, self.num_validation)):
            if asked is not None:
                check_number(f'{type(self).__name__}.{what}', asked, official)
        self.data_dir = data_dir
        self.num_train = num_train or self.num_train
        self.num_validation = num_validation or self.num_validation

    def read(self):
        """Read the files: (train_images, train_labels, validation_images, validation_labels), as stored."""
        raise TypeError(f'{type(self).__name__} must define read()')

    def load(self):
        train_images, train_labels, validation_images, validation_labels = self.read()
        self.train_images, self.train_labels = self._first(
            'train', train_images, train_labels, self.num_train)
        self.validation_images, self.validation_labels = self._first(
            'validation', validation_images, validation_labels, self.num_validation)
        self.num_train = len(self.train_labels)
        self.num_validation = len(self.validation_labels)
        if self.mean is None:
            self.mean, self.std = self.measure()

    def measure(self):
        """Mean and standard deviation of the training images for `normalize`: by default per channel."""
        return channel_statistics(self.train_images)

    def describe(self):
        return dict(super().describe(), mean=np.asarray(self.mean).tolist(), std=np.asarray(self.std).tolist())

    def _first(self, split, images, labels, number):
        labels = np.asarray(labels).astype(np.int32)
        if len(images) != len(labels) or not len(images):
            raise UserError(f'{self.source()}: {len(images)} {split} images but {len(labels)} labels')
        outside = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(outside):
            raise UserError(f'{self.source()}: {split} image {outside[0]} has label {labels[outside[0]]}, '
                            f'outside the {self.num_classes} classes 0 to {self.num_classes - 1}')
        if number is not None and len(images) < number:
            raise UserError(f'{self.source()}: {len(images)} {split} images found, {number} expected')
        return images[:number], labels[:number]

    def source(self):
        """Where the data came from: the folder, or the class when it needs none."""
        if self.name is None:
            return type(self).__name__
        return self.data_dir or os.path.join('datasets', self.name)

    def how_to_get(self):
        """What to do when a file is missing or damaged, for an error message."""
        folder = os.path.normpath(self.source())
        beside = os.path.dirname(folder) if os.path.basename(folder) == self.name else 'datasets'
        return 'fetch it with: python tools/download.py --dataset {} --out {}'.format(
            self.download_name, beside or '.')

    def find(self, file, inner=''):
        """Path of `file` in the folder of this data set or in `inner`, which the official archive unpacks.

        Raises UserError if it is in neither or empty.
        """
        source = self.source()
        if not os.path.isdir(source):
            raise UserError(f'{source}, the folder of {type(self).__name__}, is missing; {self.how_to_get()}')
        for folder in (os.path.join(source, inner), source):
            path = os.path.join(folder, file)
            if os.path.isfile(path):
                if not os.path.getsize(path):
                    raise UserError(f'{path} is empty; {self.how_to_get()}')
                return path
        raise UserError('{} is not in {}{}; {}'.format(
            file, source, ' or its folder ' + inner if inner else '', self.how_to_get()))

    def damaged(self, path, what):
        """The UserError for a file whose contents are wrong: `what`, in words."""
        return UserError(f'{path} {what}; {self.how_to_get()}')

    def augment(self, images, draws):
        """Augment stored images (n, H, W, C) by `draws` (n, num_draws) in [0, 1). By default nothing."""
        return images

    def train_batch(self, indices, draws):
        return self.normalize(self.augment(self.train_images[indices], draws))

    def validation_batch(self, indices):
        return self.normalize(self.validation_images[indices])

    def normalize(self, images):
        """(n, H, W, C) uint8 to (n, C, H, W) float32: minus the mean, divided by the standard deviation."""
        # Transposed while it is converted, then scaled with the channels outermost: a tenth of the time.
        normalized = images.transpose(0, 3, 1, 2).astype(np.float32, order='C')
        normalized -= _channels_first(self.mean)
        normalized *= 1 / _channels_first(self.std)
        return normalized

    def preprocess(self, image):
        """One uint8 RGB image (h, w, 3) of any size as a validation image would be: (C, H, W) float32.

        Resized until it just covers (H, W), the centre cut out, and turned to grey (ITU-R 601) if C is 1.
        Needs `load` before, or `mean`, `std` and `image_shape` set to those of a trained network.
        Raises UserError if `image` is no such array or the data set is neither grey nor RGB.
        """
        if self.image_shape[0] not in (1, 3):
            raise UserError(f'{self.source()} has images of {self.image_shape[0]} channels, '
                            'an image file has 1 or 3')
        check_image(image)
        height, width = self.image_shape[1:]
        scale = max(height / image.shape[0], width / image.shape[1])
        size = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        row, column = (size[1] - height) // 2, (size[0] - width) // 2
        image = image[row:row + height, column:column + width]
        if self.image_shape[0] == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        return self.normalize(self.to_stored(image)[None])[0]

    def to_stored(self, image):
        """An image (H, W, C) uint8 of 0 to 255 on the scale of the stored images, for `preprocess`."""
        return image


def check_number(what, asked, most=None):
    """Raise UserError unless `asked`, the argument `what`, is a whole number from 1 to `most` (None: any)."""
    if not isinstance(asked, numbers.Integral) or asked < 1 or (most is not None and asked > most):
        raise UserError(f'{what} = {asked!r} is not a whole number ' + (
            'of at least 1' if most is None else f'between 1 and {most}'))


def check_image(image):
    """Raise UserError unless `image`, given to `preprocess`, is a NumPy array (h, w, 3) of uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f'an image of {image.dtype} {image.shape} was given; (h, w, 3) uint8 is needed')


def _channels_first(statistic):
    """A scalar, (C,) or (H, W, C) as float32 that broadcasts with (n, C, H, W)."""
    statistic = np.asarray(statistic, np.float32)
    if statistic.ndim == 1:
        return statistic[:, None, None]
    return statistic.transpose(2, 0, 1) if statistic.ndim == 3 else statistic


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 images (n, H, W, C): two (C,) float64."""
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1024):  # bincount makes 8 bytes of every pixel
        for channel, count in enumerate(counts):
            count += np.bincount(images[start:start + 1024, ..., channel].ravel(), minlength=256)
    values = np.arange(256)
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean, np.maximum(np.sqrt(variance), 1e-6)
