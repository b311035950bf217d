"""The flags of bench_norm.py."""
import argparse
import fnmatch
import os
import re

from gn_gluon import compat
from gn_gluon.errors import UserError
from norm_benchmark.contestants import CONTESTANTS, NETWORKS, WHAT

ATTRIBUTED = ('mxnet-bn', 'native', 'native-bfloat16')


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f'{message}; see python tools/bench_norm.py --help')


def parse_flags(description, arguments=None):
    """The flags, checked. Raises UserError. `description`: of the command, for --help."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--what', default='layer,step,inference,memory', help='any of them (default: all)')
    parser.add_argument('--network', default='resnet50,cifar_resnet20', help='either or both (default: both)')
    parser.add_argument('--batch', help='batch sizes, as 8,2 (default: 8 and 2, CIFAR 128 and 2; inference 1 and 8, '
                                        'CIFAR 1 and 128; layer and memory the larger one)')
    parser.add_argument('--rounds', default='7', help='turns of each contestant (default: %(default)s)')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='contestants, such as mxnet-bn native torch-gn*')
    parser.add_argument('--threads', help="OpenMP's (default: as gn_gluon sets them: the physical cores)")
    parser.add_argument('--env', action='append', default=[], metavar='[mxnet:|torch:]NAME=VALUE',
                        help='a variable for all processes or those of one framework, such as '
                             'torch:OMP_WAIT_POLICY=PASSIVE; repeatable. gn_gluon sets GOMP_SPINCOUNT=2000 for MXNet')
    parser.add_argument('--attribute', action='store_true',
                        help="instead: where a training step goes, by oneDNN's primitives and MXNet's operators; of "
                             + ', '.join(ATTRIBUTED) + ' or of --only')
    parser.add_argument('--json', metavar='FILE', help='write everything that was measured')
    parser.add_argument('--png', metavar='FILE', help='draw a bar chart')
    flags = parser.parse_args(arguments)
    if flags.attribute and flags.png:
        raise UserError('--png draws no --attribute; leave one of them out')
    flags.what = _names('--what', flags.what, WHAT)
    flags.network = _names('--network', flags.network, NETWORKS)
    flags.batch = flags.batch and [_number('--batch', batch) for batch in flags.batch.split(',')]
    flags.rounds = _number('--rounds', flags.rounds)
    flags.threads = _number('--threads', flags.threads) if flags.threads else compat.num_threads()
    flags.contestants = _contestants([name for names in flags.only for name in names.split(',')] if flags.only
                                     else ATTRIBUTED if flags.attribute else ['*'])
    flags.env = [_variable(text) for text in flags.env]
    for path in filter(None, (flags.json, flags.png)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):  # found now, and not after the measurement
            raise UserError(f'the folder of {path} is not there; make it, or name another file')
    return flags


def _names(flag, text, known):
    names = text.split(',')
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {text}: {name!r} is none of {', '.join(known)}")
    return names


def _number(flag, text):
    if not re.fullmatch('[1-9][0-9]{0,5}', text):
        raise UserError(f'{flag} {text}: give whole numbers above 0')
    return int(text)


def _contestants(patterns):
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(contestant.name, pattern) for contestant in CONTESTANTS):
            raise UserError(f"--only {pattern}: none of {', '.join(contestant.name for contestant in CONTESTANTS)}")
    return [contestant for contestant in CONTESTANTS
            if any(fnmatch.fnmatchcase(contestant.name, pattern) for pattern in patterns)]


def _variable(text):
    match = re.fullmatch(r'(?:(mxnet|torch):)?(\w+)=(.*)', text)
    if not match:
        raise UserError(f'--env {text}: give NAME=VALUE, mxnet:NAME=VALUE or torch:NAME=VALUE')
    return match.groups()
