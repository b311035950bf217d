"""Augmentation of images. Each takes its random numbers: a sample's fate is the loader's to say."""
import math

import numpy as np
from scipy.special import ndtri

#: ITU-R 601: the grey of an RGB pixel.
GREY = np.array([0.299, 0.587, 0.114])
#: Principal components of ImageNet's RGB values on the scale 0 to 1 (Krizhevsky et al. 2012), as the ResNets have them.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009],  # the red part of each of the three
                         [-0.5808, -0.0045, -0.8140],
                         [-0.5836, -0.6948, 0.4203]])


def pad_crop_flip(images, draws, pad, flip=True):
    """Pad with zeros, crop a window of the original size, flip half of the images: standard for CIFAR.

    Arguments:
        images: (n, H, W, C) uint8.
        draws: (n, 3) in [0, 1): row, column, and a flip below one half.
        pad: pixels added on each side.
        flip: mirror left to right half of the time.
    Returns (n, H, W, C) uint8.
    """
    number, height, width, channels = images.shape
    padded = np.zeros((number, height + 2 * pad, width + 2 * pad, channels), images.dtype)
    padded[:, pad:pad + height, pad:pad + width] = images
    rows, columns = (draws[:, :2] * (2 * pad + 1)).astype(int).T
    cropped = np.empty_like(images)
    for i, (row, column) in enumerate(zip(rows, columns)):
        window = padded[i, row:row + height, column:column + width]
        cropped[i] = window[:, ::-1] if flip and draws[i, 2] < 0.5 else window
    return cropped


def crop_shapes(draws, area=(0.08, 1), aspect=(3 / 4, 4 / 3)):
    """Shapes to try for the crop of each image, one after another until one fits into it: see `place_crop`.

    The "GoogLeNet crop" (Szegedy et al. 2015): a part of the image's area and an aspect ratio, both uniform, and the
    sides exchanged half of the time.

    Arguments:
        draws: (n, attempts, 2) in [0, 1).
        area: least and largest part of the image's area.
        aspect: least and largest ratio of the one side to the other.
    Returns (n, attempts, 2) float64, height and width in units of the square root of the image's area.
    """
    draws = draws.astype(np.float64)
    areas = area[0] + (area[1] - area[0]) * draws[..., 0]
    exchanged, where = np.divmod(2 * draws[..., 1], 1)
    ratios = aspect[0] + (aspect[1] - aspect[0]) * where
    ratios = np.where(exchanged, ratios, 1 / ratios)
    return np.stack([np.sqrt(areas * ratios), np.sqrt(areas / ratios)], axis=-1)


def place_crop(height, width, shapes, draws):
    """Where to crop an image: (row, column, height, width) in whole pixels.

    Arguments:
        height, width: of the image.
        shapes: (attempts, 2) of `crop_shapes`; if none fits, the largest square in the centre is taken.
        draws: (2,) in [0, 1), place the crop vertically and horizontally.
    """
    side = math.sqrt(height * width)
    for relative_height, relative_width in shapes:
        rows, columns = round(side * relative_height) or 1, round(side * relative_width) or 1
        if rows <= height and columns <= width:
            return int(draws[0] * (height - rows + 1)), int(draws[1] * (width - columns + 1)), rows, columns
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def colour_jitter(draws, strength=0.4):
    """Change brightness, contrast and saturation by up to `strength`, in whatever order.

    Each is alpha * image + (1 - alpha) * other with a uniform alpha in 1 - strength to 1 + strength; the other is
    black, the mean over the image of its grey, the grey of each pixel. As nothing is clipped, and grey means the same
    to all, they commute: the paper's random order makes no difference, and all together are one linear function.

    Arguments:
        draws: (n, 3) in [0, 1): brightness, contrast, saturation.
    Returns three (n,) float64: the factors of the pixel, of its grey and of the image's mean grey, which add up to it.
    """
    brightness, contrast, saturation = 1 + strength * (2 * draws.astype(np.float64).T - 1)
    return (brightness * contrast * saturation, brightness * contrast * (1 - saturation), brightness * (1 - contrast))


def pca_lighting(draws, strength=0.1):
    """What is added to all pixels of each image, on the scale 0 to 255: (n, 3) float64, RGB.

    Along each principal component a normal random number times `strength` times its eigenvalue.

    Arguments:
        draws: (n, 3) in [0, 1).
    """
    normal = ndtri(draws.astype(np.float64) + 2.0 ** -25)  # amid the steps of the loader's float32: never infinite
    # Not by matrix multiplication, whose last bits depend on the number of images.
    return 255 * ((strength * normal * EIGENVALUES)[:, None] * EIGENVECTORS).sum(-1)
