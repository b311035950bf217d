"""CIFAR-10: 32 x 32 RGB images in the Python pickles of its authors, read without running what they name."""
import pickle

import numpy as np

from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import ArrayDataset

#: What the official pickles call: the parts of a NumPy array. numpy._core is where NumPy 2 has moved it to.
HARMLESS = {
    ('numpy.core.multiarray', '_reconstruct'): np.core.multiarray._reconstruct,
    ('numpy._core.multiarray', '_reconstruct'): np.core.multiarray._reconstruct,
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Loads numbers, strings, containers and NumPy arrays; what else a pickle names is refused, not run."""

    def find_class(self, module, name):
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f'it names {module}.{name}, which no official file does')
        return HARMLESS[module, name]


class CIFAR10(ArrayDataset):
    """CIFAR-10 (Krizhevsky 2009): (3, 32, 32), 50,000 images to train, 10,000 to validate (the test set).

    Training images are padded by 4 pixels, cropped and mirrored half of the time (He et al. 2016, section
    4.2).

    Arguments:
        data_dir: folder with `data_batch_1` to `data_batch_5` and `test_batch`, or with
            `cifar-10-batches-py`, which holds them; default datasets/cifar10.
        num_train, num_validation: use the first so many images only; default all.
        per_pixel_mean: subtract the mean image of the training set and divide by 128, as the published
            110-layer recipe does, instead of mean and standard deviation of each channel.
    `load` raises UserError for a file that is missing, empty, cut, or not an official batch.
    """

    name = 'cifar10'
    download_name = 'CIFAR10'
    num_classes = 10
    image_shape = (3, 32, 32)
    num_train = 50000
    num_validation = 10000
    class_names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    num_draws = 3

    def __init__(self, data_dir=None, num_train=None, num_validation=None, per_pixel_mean=False):
        super().__init__(data_dir, num_train, num_validation)
        self.per_pixel_mean = per_pixel_mean

    def read(self):
        official = type(self)
        batches = [self.read_batch(f'data_batch_{number}', official.num_train // 5)
                   for number in range(1, 6)]
        train_images, train_labels = map(np.concatenate, zip(*batches))
        return (train_images, train_labels, *self.read_batch('test_batch', official.num_validation))

    def read_batch(self, file, number):
        """Images (number, 32, 32, 3) uint8 and labels (number,) of one official pickle, checked."""
        path = self.find(file, inner='cifar-10-batches-py')
        try:
            with open(path, 'rb') as opened:
                # latin1 keeps every byte of the Python 2 strings that hold the pixels, and makes the keys str
                batch = ArrayUnpickler(opened, encoding='latin1').load()
            batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
            pixels, labels = batch['data'], np.array(batch['labels'])
        except Exception as error:  # a damaged pickle raises nearly anything
            raise self.damaged(
                path, f'cannot be read as a batch of CIFAR-10 ({type(error).__name__}: {error})') from None
        if (not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (number, 3072)
                or labels.dtype.kind not in 'iu' or labels.shape != (number,)):
            raise self.damaged(path, f'does not hold {number} images of 3,072 bytes and their labels')
        images = pixels.reshape(number, *self.image_shape).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), labels

    def measure(self):
        if self.per_pixel_mean:
            return self.train_images.mean(axis=0, dtype=np.float64), 128
        return super().measure()

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, pad=4)
