#!/usr/bin/env python
"""Measures training by several processes of this machine: python tools/bench_scaling.py --gin_file FILE --workers 1 2 4

Each number of workers is a `gn_gluon.train --benchmark` under tools/launch.py, on random images, beside one process
without a kvstore ("alone"). All take a turn each in each round. Printed are the medians (and quartiles) over the rounds
of the time of an update, its ratio to that of one process in the same round, and the bytes that the loopback interface
carries per update (see gn_gluon.benchmark). The replicas are the same for all: with more workers each has fewer.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, CLONE)  # in a clone, not installed

from gn_gluon import compat  # noqa: E402
from gn_gluon.errors import UserError, command  # noqa: E402
from gn_gluon.train import positive_number  # noqa: E402


def measure(workers, flags, reproducible=True):
    """(seconds, bytes) of an update by so many workers; 0 is one process that needs no network."""
    train = [sys.executable, '-m', 'gn_gluon.train', '--gin_file', flags.gin_file, '--benchmark', str(flags.updates),
             '--json', '--workdir', os.devnull, '--data_dir', os.devnull]
    bindings = list(flags.gin_bindings)
    if workers:
        bindings += ["train.kvstore = 'dist_sync'", f'train.reproducible = {reproducible}']
        launcher = [sys.executable, os.path.join(CLONE, 'tools', 'launch.py'), '--local', str(workers)]
        train = launcher + ['--servers', str(flags.servers), '--'] + train
    for binding in bindings:
        train += ['--gin_bindings', binding]
    done = subprocess.run(train, cwd=CLONE, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'the benchmark of {workers or 1} processes left with exit code {done.returncode}: '
                        + ' '.join(done.stderr.splitlines()[-3:]))
    result = json.loads(done.stdout.splitlines()[-1])
    compute = result['compute']
    return result['images_per_update'] / compute['images_per_second'], compute.get('network_bytes_per_update', 0)


def quartiles(values, form):
    first, median, third = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f'{median:{form}} ({first:{form}} to {third:{form}})'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gin_file', default='gin/resnet50_gn_bs2.gin', metavar='FILE', help='default: %(default)s')
    parser.add_argument('--gin_bindings', action='append', default=[], metavar='BINDING',
                        help="on top of it, e.g. 'ImageNet.image_size = 64'; repeatable")
    parser.add_argument('--workers', type=positive_number, nargs='+', default=[1, 2, 4], metavar='N',
                        help='default: 1 2 4')
    parser.add_argument('--servers', type=positive_number, default=1, metavar='M', help='default: %(default)s')
    parser.add_argument('--updates', type=positive_number, default=10, help='of a turn (default: %(default)s)')
    parser.add_argument('--rounds', type=positive_number, default=5, help='turns of each (default: %(default)s)')
    flags = parser.parse_args()
    layouts = {'alone': (0, True)}
    for workers in flags.workers:
        layouts[f"{workers} worker{'s' * (workers > 1)}"] = (workers, True)
        if workers > 2:
            layouts[f'{workers} workers, reproducible = False'] = (workers, False)
    turns = {name: [] for name in layouts}
    for _ in range(flags.rounds):
        for name, (workers, reproducible) in layouts.items():
            turns[name].append(measure(workers, flags, reproducible))
    print(f'{compat.processor()}, {compat.usable_cores()} cores; servers: {flags.servers}; {flags.rounds} turns of '
          f'{flags.updates} updates\n')
    line = '{:<34}{:>28}{:>26}{:>16}'
    print(line.format('', 'ms per update', 'ratio to alone', 'MB per update'))
    for name, turn in turns.items():
        seconds, sent = zip(*turn)
        ratios = [one / alone for one, (alone, _) in zip(seconds, turns['alone'])]
        print(line.format(name, quartiles([1000 * one for one in seconds], '.0f'), quartiles(ratios, '.2f'),
                          f'{statistics.median(sent) / 1e6:.1f}'))


if __name__ == '__main__':
    command(main)
