#!/usr/bin/env python
"""Packs ImageNet, or any folders of one class each: python tools/pack_imagenet.py --src ILSVRC2012 --out data/imagenet

--src holds the official archives (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz), or
what they unpack to (train/n*/*.JPEG; val/ in class folders, or flat with the devkit), or any train/CLASS/* and
val/CLASS/*. The same command again goes on where it was interrupted. Exit code 0 also when damaged images had to be
left out: the last line says how many, and manifest.json names them. See docs/imagenet.md.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # in a clone, not installed

from gn_gluon.checkpoint import signals_as_interrupts  # noqa: E402
from gn_gluon.errors import UserError, command  # noqa: E402
from gn_gluon.pack import pack, verify  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--src', metavar='FOLDER', help='where the images are; not needed to --verify only')
    parser.add_argument('--out', metavar='FOLDER', required=True, help='where the packed data set shall be, or is')
    parser.add_argument('--resize', type=int, metavar='PIXELS',
                        help='reduce larger images to this shorter side, as 256 (default: keep the original bytes)')
    parser.add_argument('--quality', type=int, metavar='1-100',
                        help='of the JPEG images that --resize makes (default: 95)')
    parser.add_argument('--seed', type=int, default=0, help='of the order of the images (default: 0)')
    parser.add_argument('--workers', type=int, metavar='N', help='processes (default: one for each core)')
    parser.add_argument('--verify', action='store_true',
                        help='read everything again, then or without --src, and compare it with the manifest')
    flags = parser.parse_args()
    if flags.src is None and not flags.verify:
        raise UserError('give --src, the folder of the images, or --verify, to check what --out holds')
    with signals_as_interrupts() as check_signals:
        if flags.src is not None:
            pack(flags.src, flags.out, flags.resize, flags.quality, flags.seed, flags.workers, check_signals)
        if flags.verify:
            verify(flags.out, flags.workers, check_signals)


if __name__ == '__main__':
    command(main)
