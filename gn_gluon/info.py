"""python -m gn_gluon.info: versions, devices, threads, the active norm operator, and what is missing."""
import argparse
import os
import platform

import mxnet as mx

import gn_gluon
from gn_gluon import compat
from gn_gluon.errors import UserError, command
from gn_gluon.norm import build
from gn_gluon.norm.operator import active_operator

PACKAGES = ('numpy', 'gluoncv', 'gin-config', 'opencv-python', 'h5py', 'scikit-learn', 'tensorboardX',
            'matplotlib', 'absl-py', 'tqdm')
FEATURES = (('oneDNN', 'MKLDNN'), ('CUDA', 'CUDA'), ('cuDNN', 'CUDNN'), ('NCCL', 'NCCL'))


def sections():
    """Everything that info prints: a list of (title, rows), a row being (name, value)."""
    flavours = compat.flavours()
    versions = {package: compat.version(package) for package in PACKAGES}
    num_gpus = mx.context.num_gpus()
    operator, reason = active_operator()
    features = mx.runtime.Features()
    missing = [(name, f'pip install {name}') for name, version in versions.items() if version is None]
    if not num_gpus:
        missing.append(('GPU', 'MXNet sees none and computes on the CPU'))
    return [
        ('Versions', [('Python', platform.python_version()),
                      ('gn_gluon', gn_gluon.__version__),
                      ('MXNet', f"{mx.__version__}, wheel {' and '.join(sorted(flavours)) or 'unknown'}")]
         + [(package, version or 'not installed') for package, version in versions.items()]),
        ('Devices', [('processor', compat.processor()),
                     ('physical cores', f'{compat.usable_cores()} that this process may use'),
                     ('GPUs', _gpus(num_gpus))]),
        ('Threads', [(name, os.environ.get(name, 'not set'))
                     for name in ('OMP_NUM_THREADS', 'MXNET_OMP_MAX_THREADS')]
         + [('set by', compat.threads_set_by)]),
        ('Norm operator', [('active', operator), ('why', reason)]),
        ('MXNet features', [(name, 'yes' if features.is_enabled(flag) else 'no') for name, flag in FEATURES]),
        ('Missing', missing or [('nothing', '')]),
    ]


def table(sections):
    """The sections as text: titles at the margin, the values of all rows in one column."""
    width = max(len(name) for _, rows in sections for name, _ in rows)
    lines = []
    for title, rows in sections:
        lines.append(title)
        lines += [f'  {name:<{width}}  {value}'.rstrip() for name, value in rows]
    return '\n'.join(lines)


def _gpus(num_gpus):
    if not num_gpus:
        return 'none'
    return ', '.join(f'gpu({index}) sm_{major}{minor}'
                     for index, (major, minor) in enumerate(compat.compute_capabilities()[:num_gpus]))


def build_ahead():
    """Compile and test the norm operators now, instead of at first use. Raises UserError when that is impossible."""
    try:
        folder = build.built()
        for tier in ('native', 'extension'):
            print(f'{tier}: ' + (build.self_test(folder, tier) or 'passed its self-test'))
    except build.BuildError as problem:
        raise UserError(str(problem)) from None
    print(f'compiled in {folder}\n')


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(prog='python -m gn_gluon.info', description=__doc__)
    parser.add_argument('--build', action='store_true',
                        help='first compile the norm operator, if it never was, and test it: what its first use does')
    if parser.parse_args().build:
        build_ahead()
    print(table(sections()))


if __name__ == '__main__':
    command(main)
