#!/usr/bin/env python
"""Makes ours of ResNets published elsewhere: python tools/convert_weights.py R-50-GN.pkl --out weights.params

Takes ResNet-50 and ResNet-101 as .pth of PyTorch (read without it) or .safetensors, .pkl of Detectron, .npz of
Tensorpack and .params of GluonCV. What their images need in gin is written to weights.gin. See docs/weights.md.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # in a clone, not installed

from gn_gluon.convert import FORMATS, convert  # noqa: E402
from gn_gluon.errors import command  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', metavar='FILE', help='the weights as they were published')
    parser.add_argument('--out', metavar='FILE', required=True, help='where to write ours, as weights.params')
    parser.add_argument('--format', choices=FORMATS, help='(default: recognized by the names of the parameters; timm '
                                                          'is taken for torchvision, whose names it has)')
    flags = parser.parse_args()
    made = convert(flags.file, flags.out, flags.format)
    print(f'{flags.file}: ResNet-{made.depth} with {made.norm.__name__}, {made.num_classes} classes, by '
          f'{made.format_name}, as {flags.out}')
    gin_files = [made.recipe]
    if made.gin_file:
        print(f'{made.gin_file}: ' + '; '.join(made.bindings))
        gin_files.append(made.gin_file)
    print('next: python -m gn_gluon.eval {} --checkpoint {} --data_dir datasets/imagenet'.format(
        ' '.join('--gin_file ' + path for path in gin_files), flags.out))


if __name__ == '__main__':
    command(main)
