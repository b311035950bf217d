#!/usr/bin/env python
"""Fetches data sets: python tools/download.py --dataset MNIST Fashion SVHN CIFAR10 TinyImageNet --out datasets

The same command again goes on where it was interrupted, and leaves alone what is there. Each data set lies in a
folder of its own below --out, where training looks for it: datasets/mnist, fashion, svhn, cifar10, tiny_imagenet.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # in a clone, not installed

from gn_gluon.data.download import SOURCES, download  # noqa: E402
from gn_gluon.errors import command  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', nargs='+', required=True, metavar='NAME',
                        help='any of {}, in any case'.format(', '.join(SOURCES)))
    parser.add_argument('--out', default='datasets', help='the folder of all data sets (default: datasets)')
    flags = parser.parse_args()
    download(flags.dataset, flags.out)


if __name__ == '__main__':
    command(main)
