"""Tiny ImageNet: 64 x 64 RGB images of 200 ImageNet classes in the official tree of JPEG files."""
import concurrent.futures
import os

import cv2
import numpy as np

from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import ArrayDataset, check_number


class TinyImageNet(ArrayDataset):
    """Tiny ImageNet (Stanford CS231n): (3, 64, 64), 200 classes of 500 images to train, 50 to validate.

    Classes are numbered by sorted wnid. Images are ordered so that every class comes once before any comes
    again: `num_train` takes evenly from all classes. Grayscale files become RGB. Training images are padded
    by 8 pixels, cropped, and mirrored half of the time.

    Arguments:
        data_dir: folder with `wnids.txt`, `train` and `val`, or with `tiny-imagenet-200`, which holds them;
            default datasets/tiny_imagenet.
        num_train, num_validation: use the first so many images only; default all.
        train_per_class, validation_per_class: images of each class that are there and used. A folder with
            fewer is an error unless these say so.
    `load` decodes all files, with as many threads as there are processors, into 1.4 GB. It raises UserError
    for a file or class that is missing, too few images of a class, a file that cannot be decoded, and one of
    another size.
    """

    name = 'tiny_imagenet'
    download_name = 'TinyImageNet'
    num_classes = 200
    image_shape = (3, 64, 64)
    num_draws = 3
    official_train_per_class = 500
    official_validation_per_class = 50

    def __init__(self, data_dir=None, num_train=None, num_validation=None, train_per_class=500,
                 validation_per_class=50):
        for what, asked, official in (
                ('train_per_class', train_per_class, self.official_train_per_class),
                ('validation_per_class', validation_per_class, self.official_validation_per_class)):
            check_number(f'TinyImageNet.{what}', asked, official)
        self.train_per_class = train_per_class
        self.validation_per_class = validation_per_class
        self.num_train = self.num_classes * train_per_class
        self.num_validation = self.num_classes * validation_per_class
        super().__init__(data_dir, num_train, num_validation)

    def read(self):
        root = os.path.dirname(self.find('wnids.txt', inner='tiny-imagenet-200'))
        wnids = sorted(self._lines(os.path.join(root, 'wnids.txt')))
        if len(set(wnids)) != self.num_classes:
            raise self.damaged(os.path.join(root, 'wnids.txt'),
                               f'lists {len(set(wnids))} classes, not {self.num_classes}')
        self.class_names = self._names(os.path.join(root, 'words.txt'), wnids)
        train_files, train_labels = self._interleave(
            [self._train_files(root, wnid) for wnid in wnids], self.train_per_class, self.num_train)
        validation_files, validation_labels = self._interleave(
            self._validation_files(root, wnids), self.validation_per_class, self.num_validation)
        return (self._decode(train_files), train_labels, self._decode(validation_files), validation_labels)

    def _lines(self, path):
        try:
            with open(path, encoding='utf-8') as file:
                return file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise self.damaged(path, f'cannot be read ({error})') from None

    def _names(self, path, wnids):
        """What words.txt calls the classes: the first of several synonyms."""
        names = dict(line.split('\t', 1) for line in self._lines(path) if '\t' in line)
        return [names.get(wnid, wnid).split(',')[0] for wnid in wnids]

    def _train_files(self, root, wnid):
        """The JPEG files of one class, in the order of their numbers."""
        folder = os.path.join(root, 'train', wnid, 'images')
        try:
            files = [file for file in os.listdir(folder) if file.endswith('.JPEG')]
        except OSError as error:
            raise self.damaged(folder, f'cannot be read ({error.strerror})') from None
        self._check_class(folder, 'images', len(files), 'train_per_class', self.official_train_per_class)
        # n01443537_2.JPEG before n01443537_10.JPEG
        return [os.path.join(folder, file) for file in sorted(files, key=lambda file: (len(file), file))]

    def _validation_files(self, root, wnids):
        """For each class the JPEG files that val_annotations.txt gives it, in its order."""
        path = os.path.join(root, 'val', 'val_annotations.txt')
        files = {wnid: [] for wnid in wnids}
        for number, line in enumerate(self._lines(path), 1):
            file, _, rest = line.partition('\t')
            wnid = rest.partition('\t')[0]
            if wnid not in files or os.path.basename(file) != file:
                raise self.damaged(path, f'line {number}: {line!r} does not name an image and one of the '
                                         f'{self.num_classes} classes')
            files[wnid].append(os.path.join(root, 'val', 'images', file))
        for wnid in wnids:
            self._check_class(path, f'images of class {wnid}', len(files[wnid]), 'validation_per_class',
                              self.official_validation_per_class)
        return list(files.values())

    def _check_class(self, path, what, found, argument, official):
        asked = getattr(self, argument)
        if found > official:
            raise self.damaged(path, f'has {found} {what}, more than the official {official}')
        if not found:
            raise self.damaged(path, f'has no {what}')
        if found < asked:
            raise self.damaged(path, f'has {found} {what}, not {asked} (if it is a subset, say so: '
                                     f'TinyImageNet.{argument} = {found})')

    def _interleave(self, files_by_class, per_class, number):
        """The first image of every class, then the second...: `number` paths and their labels."""
        files = [of_class[k] for k in range(per_class) for of_class in files_by_class]
        return files[:number], np.tile(np.arange(self.num_classes), per_class)[:number]

    def _decode(self, files):
        images = np.empty((len(files), *self.image_shape[1:], 3), np.uint8)

        def decode(index):
            images[index] = self._decode_one(files[index])

        # OpenCV lets other threads run while it decodes.
        processors = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        with concurrent.futures.ThreadPoolExecutor(processors) as threads:
            for _ in threads.map(decode, range(len(files))):
                pass
        return images

    def _decode_one(self, path):
        """One file as (64, 64, 3) uint8 RGB."""
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise self.damaged(path, f'cannot be read ({error.strerror})') from None
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
        if image is None:
            raise self.damaged(path, 'cannot be decoded as a JPEG image')
        if image.shape[:2] != self.image_shape[1:]:
            raise self.damaged(path, 'is {} x {} pixels, not {} x {}'.format(
                *image.shape[:2], *self.image_shape[1:]))
        return image[..., ::-1]

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, pad=8)
