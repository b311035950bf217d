"""MNIST and Fashion-MNIST: 28 x 28 grey images in the idx files of their authors."""
import gzip
import struct
import zlib

import numpy as np

from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import ArrayDataset

IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # third byte: uint8; fourth: number of dimensions


class MNIST(ArrayDataset):
    """Handwritten digits (LeCun et al. 1998): (1, 28, 28), 60,000 train, 10,000 validate (the test set).

    Training images are shifted by up to two pixels in each direction, never mirrored. Ink is bright on a dark
    ground: an image of dark ink on white paper has to be inverted before `preprocess`.

    Arguments:
        data_dir: folder of the four official `*-ubyte.gz` files; default datasets/mnist.
        num_train, num_validation: use the first so many images only; default all.
    `load` raises UserError for a file that is missing, empty, cut, damaged, or not what its name says.
    """

    name = 'mnist'
    download_name = 'MNIST'
    num_classes = 10
    image_shape = (1, 28, 28)
    num_train = 60000
    num_validation = 10000
    class_names = [str(digit) for digit in range(10)]
    num_draws = 3

    def read(self):
        official = type(self)
        return (self.read_images('train-images-idx3-ubyte.gz', official.num_train),
                self.read_labels('train-labels-idx1-ubyte.gz', official.num_train),
                self.read_images('t10k-images-idx3-ubyte.gz', official.num_validation),
                self.read_labels('t10k-labels-idx1-ubyte.gz', official.num_validation))

    def read_images(self, file, number):
        """The images of an idx3 file, checked: (number, 28, 28, 1) uint8."""
        return self._read_idx(file, IMAGES_MAGIC, (number, *self.image_shape[1:]))[..., None]

    def read_labels(self, file, number):
        """The labels of an idx1 file, checked: (number,) uint8."""
        return self._read_idx(file, LABELS_MAGIC, (number,))

    def _read_idx(self, file, magic, shape):
        path = self.find(file)
        header = struct.Struct(f'>{1 + len(shape)}I')
        size = header.size + int(np.prod(shape))
        try:
            with gzip.open(path) as opened:
                data = opened.read(size + 1)  # no more: a damaged file may unpack to any size
        except (OSError, EOFError, zlib.error) as error:
            raise self.damaged(path, f'is damaged ({error})') from None
        if len(data) < header.size or header.unpack_from(data)[0] != magic:
            raise self.damaged(path, 'does not begin as an idx file of {} does'.format(
                'images' if magic == IMAGES_MAGIC else 'labels'))
        found = header.unpack_from(data)[1:]
        if found != shape:
            raise self.damaged(path, 'holds {} values, not {}'.format(
                ' x '.join(map(str, found)), ' x '.join(map(str, shape))))
        if len(data) != size:
            raise self.damaged(path, 'is {} than the {} bytes its header says'.format(
                'shorter' if len(data) < size else 'longer', size))
        return np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, pad=2, flip=False)


class FashionMNIST(MNIST):
    """Articles of clothing (Xiao et al. 2017): (1, 28, 28), 60,000 and 10,000 images in MNIST's format.

    Training images are shifted by up to two pixels in each direction and mirrored half of the time. Articles
    are bright on a black ground.

    Arguments:
        data_dir: folder of the four official `*-ubyte.gz` files; default datasets/fashion.
        num_train, num_validation: use the first so many images only; default all.
    `load` raises UserError as MNIST does.
    """

    name = 'fashion'
    download_name = 'Fashion'
    class_names = ['T-shirt/top', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag',
                   'ankle boot']

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, pad=2)
