"""Augmentation of images in memory. Each takes its random numbers: a sample's fate is the loader's to say."""
import numpy as np


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
