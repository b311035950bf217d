"""The handwritten digits inside scikit-learn: 1,797 real images of 8 x 8 pixels, no download."""
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from gn_gluon.data.augment import pad_crop_flip
from gn_gluon.data.dataset import ArrayDataset


class Digits(ArrayDataset):
    """UCI handwritten digits (Alpaydin & Kaynak 1998) as scikit-learn packs them: (1, 8, 8), 17 grey levels.

    360 images, stratified by class with a fixed seed, are held out for validation; 1,437 train, shifted by up
    to one pixel in each direction. Ink is bright on a dark ground: an image of dark ink on white paper has to
    be inverted before `preprocess`.
    """

    num_classes = 10
    image_shape = (1, 8, 8)
    num_train = 1437
    num_validation = 360
    class_names = [str(digit) for digit in range(10)]
    num_draws = 3

    def read(self):
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype('uint8')
        train_images, validation_images, train_labels, validation_labels = train_test_split(
            images, labels, test_size=360, stratify=labels, random_state=0)
        return train_images, train_labels, validation_images, validation_labels

    def augment(self, images, draws):
        return pad_crop_flip(images, draws, pad=1, flip=False)

    def to_stored(self, image):
        return ((image.astype('uint16') * 16 + 127) // 255).astype('uint8')
