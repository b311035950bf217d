"""ImageNet, or any folder that tools/pack_imagenet.py has packed: JPEG images, decoded when their turn comes.

Why not MXNet's ImageRecordIter: it rounds and clips the image after every step of the jitter, where the recipe does
not; it has no state, so that an epoch resumed must decode what was seen; a cut file aborts the process; and it makes
fewer images per second and core (measured by tools/bench_data.py).

Why threads and not processes: nearly all of an image's time is OpenCV's, which lets other threads run meanwhile. So
they make as many images, share one memory, and none is left behind when the run is killed.
"""
import concurrent.futures
import os
import threading
import weakref

import cv2
import numpy as np

from gn_gluon import compat
from gn_gluon.data import augment, records
from gn_gluon.data.dataset import Dataset, check_image, check_number
from gn_gluon.errors import UserError

#: Of RGB, on the scale 0 to 255.
MEAN = 255 * np.array([0.485, 0.456, 0.406])
STD = 255 * np.array([0.229, 0.224, 0.225])

_ATTEMPTS = 10
#: Where the random numbers of a crop's shape, its place, flip, jitter and lighting end.
_DRAWS = np.cumsum([2 * _ATTEMPTS, 2, 1, 3, 3])


class ImageNet(Dataset):
    """ILSVRC2012 (Russakovsky et al. 2015), packed, seen as Section 4.1 of the paper says.

    Training images: a crop of 8 % to 100 % of the area and of aspect 3/4 to 4/3, resized (bilinear) to `image_size`;
    mirrored half of the time; brightness, contrast and saturation jittered by up to 0.4 (in random order, which makes
    no difference: see augment.colour_jitter); PCA lighting of 0.1. Validation images: the shorter side resized to
    `resize` (bilinear), the centre cut out. Both normalized by mean and standard deviation of ImageNet's channels. An
    orientation in EXIF is ignored.

    Arguments:
        data_dir: folder that tools/pack_imagenet.py has made, of any number of classes; default datasets/imagenet.
        image_size: side of the square images that the network sees.
        resize: shorter side of a validation image before it is cut; None: 256 for 224, in proportion.
        num_train, num_validation: use the first so many images only (they are packed in random order); default all.
        workers: threads that decode; None: one for each core. The images are the same with any number.
        mean: what is subtracted from red, green and blue on the scale 0 to 255, where a network was trained with other
            numbers than the channels' means 123.675, 116.28 and 103.53.
    The counts are the official ones where the folder has no manifest; otherwise they are known after `load`. It raises
    UserError for a folder that is not packed and for files that are not of the sizes packed. A record that is damaged,
    or cannot be decoded, is a UserError when its turn comes.
    """

    name = 'imagenet'
    num_classes = 1000
    num_train = 1281167
    num_validation = 50000
    num_draws = int(_DRAWS[-1])

    def __init__(self, data_dir=None, image_size=224, resize=None, num_train=None, num_validation=None, workers=None,
                 mean=None):
        self.data_dir = data_dir or os.path.join('datasets', self.name)
        if os.path.exists(os.path.join(self.data_dir, records.MANIFEST)):
            self.num_classes = self.num_train = self.num_validation = None
        resize = round(image_size * 256 / 224) if resize is None else resize
        for what, asked, most in (
                ('num_train', num_train, self.num_train), ('num_validation', num_validation, self.num_validation),
                ('image_size', image_size, None), ('resize', resize, None), ('workers', workers, None)):
            if asked is not None:
                check_number(f'ImageNet.{what}', asked, most)
        if resize < image_size:
            raise UserError(f'ImageNet.resize = {resize} is less than the ImageNet.image_size = {image_size} that is '
                            'cut out of it')
        self.num_train = num_train or self.num_train
        self.num_validation = num_validation or self.num_validation
        self.image_shape = (3, image_size, image_size)
        self.resize = resize
        self.workers = workers or compat.usable_cores()
        self._mean = MEAN if mean is None else _checked_mean(mean)
        self._plain = normalizing_matrices(np.ones(1), np.zeros(1), np.zeros((1, 3)), self._mean)[0]
        self._memory = Memory()
        self._scratch = Scratch(image_size)

    def load(self):
        manifest = records.read_manifest(self.data_dir)
        classes = records.read_classes(self.data_dir, manifest)
        self.num_classes = len(classes)
        # The first of several synonyms, or the folder's name where the line holds nothing else.
        self.class_names = [line.split('\t')[-1].split(',')[0] for line in classes]
        self._train, self._validation = (
            records.RecordFile(os.path.join(self.data_dir, f'{split}.rec'),
                               records.read_index(self.data_dir, split, manifest)) for split in records.SPLITS)
        self.rec_sha256 = [manifest['splits'][split]['rec_sha256'] for split in records.SPLITS]
        self.num_train = self._count('num_train', 'training', len(self._train))
        self.num_validation = self._count('num_validation', 'validation', len(self._validation))
        self.train_labels = Labels(self._train, self.num_classes)
        self.validation_labels = Labels(self._validation, self.num_classes)
        cv2.setNumThreads(1)  # every core has an image of its own to work on
        self._threads = concurrent.futures.ThreadPoolExecutor(self.workers, 'decode')

    def _count(self, argument, what, found):
        asked = getattr(self, argument)
        if asked is not None and asked > found:
            raise UserError(f'{self.data_dir} holds {found} {what} images, fewer than ImageNet.{argument} = {asked}')
        return found if asked is None else asked

    def describe(self):
        return dict(super().describe(), rec_sha256=self.rec_sha256)

    def train_batch(self, indices, draws):
        shapes, places, flips, jitter, lighting = np.split(draws, _DRAWS[:-1], axis=1)
        shapes = augment.crop_shapes(shapes.reshape(len(draws), _ATTEMPTS, 2)).tolist()
        places, flips = places.tolist(), (flips[:, 0] < 0.5).tolist()
        pixel, grey, mean_grey = augment.colour_jitter(jitter)
        matrices = normalizing_matrices(pixel, grey, augment.pca_lighting(lighting), self._mean)
        slopes = mean_grey[:, None] / STD

        def make(row, out):
            image, scratch = self._decode(self._train, indices[row]), self._scratch
            top, left, height, width = augment.place_crop(*image.shape[:2], shapes[row], places[row])
            image = cv2.resize(image[top:top + height, left:left + width], self.image_shape[1:], dst=scratch.resized,
                               interpolation=cv2.INTER_LINEAR)
            blue, green, red, _ = cv2.mean(image)
            matrix = matrices[row]
            matrix[:, 3] += slopes[row] * (
                augment.GREY[0] * red + augment.GREY[1] * green + augment.GREY[2] * blue)
            if flips[row]:
                image = cv2.flip(image, 1, dst=scratch.flipped)
            self._normalize(image, matrix, out)

        return self._make_batch(make, len(indices))

    def validation_batch(self, indices):
        return self._make_batch(
            lambda row, out: self._centre(self._decode(self._validation, indices[row]), out), len(indices))

    def preprocess(self, image):
        check_image(image)
        out = np.empty(self.image_shape, np.float32)
        self._centre(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), out)
        return out

    def _make_batch(self, make, number):
        """Images (number, C, H, W) float32 of which `make(row, out)`, called in the threads, fills one."""
        images = self._memory.take((number, *self.image_shape))
        rows = iter(range(number))  # of all threads: each takes the next row when it is done with one

        def work():
            for row in rows:
                make(row, images[row])

        working = [self._threads.submit(work) for _ in range(min(self.workers, number))]
        concurrent.futures.wait(working)
        for future in working:
            future.result()
        return images

    def _decode(self, file, index):
        """Record `index` of a RecordFile as (h, w, 3) uint8, BGR."""
        _, jpeg, _ = file.read(index)
        try:
            image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:  # nothing to decode, or an image beyond all limits
            image = None
        if image is None:
            raise file.damaged(index, 'OpenCV cannot decode its image')
        return image

    def _centre(self, image, out):
        """Write the centre of an image (h, w, 3) uint8, BGR, of which the shorter side is resized, to `out`."""
        height, width = image.shape[:2]
        scale = self.resize / min(height, width)
        height, width = max(self.resize, round(height * scale)), max(self.resize, round(width * scale))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        size = self.image_shape[1]
        top, left = (height - size) // 2, (width - size) // 2
        self._normalize(image[top:top + size, left:left + size], self._plain, out)

    def _normalize(self, image, matrix, out):
        """Write `matrix` (3, 4) of each pixel of `image` (H, W, 3) uint8, BGR, to `out` (3, H, W) float32, RGB."""
        scratch = self._scratch
        np.copyto(scratch.pixels, image)
        cv2.transform(scratch.pixels, matrix, dst=scratch.normalized)
        cv2.split(scratch.normalized, list(out))


def normalizing_matrices(pixel, grey, added, mean):
    """What makes the network's input of BGR pixels: (n, 3, 4) float64, a row for each of red, green and blue.

    Arguments:
        pixel, grey: (n,), what a pixel and its grey are multiplied by.
        added: (n, 3), what is then added, RGB.
        mean: (3,), what is then subtracted, RGB.
    """
    matrices = np.empty((len(pixel), 3, 4))
    for i in range(3):
        matrices[:, i, :3] = grey[:, None] * augment.GREY[::-1]
        matrices[:, i, 2 - i] += pixel
    matrices[:, :, 3] = added - mean
    matrices /= STD[:, None]
    return matrices


def _checked_mean(mean):
    try:
        checked = np.array(mean, np.float64)
    except (TypeError, ValueError):
        checked = np.empty(0)
    if checked.shape != (3,) or not np.all((checked >= 0) & (checked <= 255)):
        raise UserError(f'ImageNet.mean = {mean!r} must be three numbers from 0 to 255: of red, green and blue')
    return checked


class Labels:
    """The labels of a RecordFile, read when they are asked for: those of 1.3 million images lie 140 GB apart."""

    def __init__(self, file, num_classes):
        self.file = file
        self.num_classes = num_classes

    def __getitem__(self, indices):
        """The labels of the images `indices` (n,): (n,) int32."""
        labels = np.array([self.file.label(i) for i in indices], np.int32)
        outside = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(outside):
            raise self.file.damaged(indices[outside[0]], f'label {labels[outside[0]]} is outside the '
                                                         f'{self.num_classes} classes')
        return labels


class Scratch(threading.local):
    """Room for one image, in each thread its own: to get fresh memory can take longer than to fill it."""

    def __init__(self, size):
        self.resized = np.empty((size, size, 3), np.uint8)
        self.flipped = np.empty_like(self.resized)
        self.pixels = np.empty(self.resized.shape, np.float32)
        self.normalized = np.empty_like(self.pixels)


class Memory:
    """Arrays whose memory is used again as soon as nothing refers to it any more, for the reason of `Scratch`."""

    def __init__(self):
        self._free = []

    def take(self, shape):
        """An array (shape) of float32, its contents undefined."""
        number = int(np.prod(shape))
        try:
            memory = self._free.pop()
        except IndexError:
            memory = ()
        if len(memory) < number:
            memory = np.empty(number, np.float32)
        # Every view of `array` keeps it alive, since it, and not `memory`, holds the buffer.
        array = np.frombuffer(memoryview(memory), np.float32, number)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)
