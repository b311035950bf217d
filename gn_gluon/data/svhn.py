"""SVHN, cropped digits: 32 x 32 RGB images in the MATLAB files of its authors."""
import numpy as np
import scipy.io

from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import ArrayDataset


class SVHN(ArrayDataset):
    """Street View House Numbers, format 2 (Netzer et al. 2011): (3, 32, 32), the digit in the middle counts.

    73,257 images train and 26,032 validate (the test set). Training images are padded by 4 pixels and
    cropped, never mirrored.

    Arguments:
        data_dir: folder with `train_32x32.mat` and `test_32x32.mat`; default datasets/svhn.
        num_train, num_validation: use the first so many images only; default all.
        extra: train on the 531,131 easier images of `extra_32x32.mat` as well (1.9 GB in memory).
    `load` raises UserError for a file that is missing, empty, cut or damaged, and for a label outside 1 to 10
    (10 stands for the digit 0).
    """

    name = 'svhn'
    download_name = 'SVHN'
    num_classes = 10
    image_shape = (3, 32, 32)
    num_train = 73257
    num_validation = 26032
    class_names = [str(digit) for digit in range(10)]
    num_draws = 3
    num_extra = 531131

    def __init__(self, data_dir=None, num_train=None, num_validation=None, extra=False):
        self.extra = extra
        if extra:
            self.num_train = type(self).num_train + self.num_extra
            self.download_name = 'SVHN SVHNExtra'
        super().__init__(data_dir, num_train, num_validation)

    def read(self):
        official = type(self)
        images, labels = self.read_mat('train_32x32.mat', official.num_train)
        if self.extra:
            extra_images, extra_labels = self.read_mat('extra_32x32.mat', self.num_extra)
            images = np.concatenate([images, extra_images])
            labels = np.concatenate([labels, extra_labels])
        return (images, labels, *self.read_mat('test_32x32.mat', official.num_validation))

    def read_mat(self, file, number):
        """Images (number, 32, 32, 3) uint8 and labels (number,) 0 to 9 of one official file, checked."""
        path = self.find(file)
        try:
            contents = scipy.io.loadmat(path, variable_names=('X', 'y'))
            images, labels = contents['X'], contents['y']
        except Exception as error:  # a damaged file raises nearly anything
            raise self.damaged(path, 'cannot be read as a MATLAB 5 file with X and y '
                                     f'({type(error).__name__}: {error})') from None
        if (images.dtype != np.uint8 or images.shape != (32, 32, 3, number) or labels.dtype.kind not in 'iuf'
                or labels.shape != (number, 1)):
            raise self.damaged(path, f'holds X {images.dtype} {images.shape} and y {labels.shape}, '
                                     f'not {number} images of 32 x 32 x 3 and their labels')
        outside = np.flatnonzero((labels < 1) | (labels > 10) | (labels != np.floor(labels)))
        if len(outside):
            raise self.damaged(path, f'gives image {outside[0]} the label {labels[outside[0], 0]}, '
                                     'which is not one of 1 to 10')
        return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels[:, 0].astype(np.int32) % 10

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, pad=4, flip=False)
