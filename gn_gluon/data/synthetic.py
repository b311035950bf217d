"""Made-up images, for timing and for tests: nothing to download, and nothing to learn from the result."""
import numpy as np

from gn_gluon.data.dataset import ArrayDataset
from gn_gluon.errors import UserError


class Synthetic(ArrayDataset):
    """Noise around one faint pattern per class, so that a network has something to fit.

    Arguments:
        image_shape: (C, H, W).
        num_classes, num_train, num_validation: counts.
        seed: of the patterns and the noise.
    """

    def __init__(self, data_dir=None, image_shape=(3, 32, 32), num_classes=10, num_train=1000,
                 num_validation=200, seed=0):
        if len(image_shape) != 3 or min(image_shape) < 1 or num_classes < 1:
            raise UserError(f'Synthetic.image_shape = {image_shape} and num_classes = {num_classes}: '
                            '(C, H, W) and the number of classes must be positive')
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.seed = seed
        super().__init__(data_dir, num_train, num_validation)

    def read(self):
        channels, height, width = self.image_shape
        rng = np.random.default_rng(self.seed)
        patterns = rng.integers(0, 64, (self.num_classes, height, width, channels), dtype=np.uint8)

        def split(number):
            labels = np.arange(number) % self.num_classes
            noise = rng.integers(0, 192, (number, height, width, channels), dtype=np.uint8)
            return patterns[labels] + noise, labels

        return split(self.num_train) + split(self.num_validation)
