#!/usr/bin/env python
"""Measures how fast ImageNet's training images are made: python tools/bench_data.py --data datasets/imagenet

gn_gluon.data.ImageNet beside MXNet's C++ ImageRecordIter on the same records: crop, flip, jitter, lighting and
normalization, up to a batch in memory, from which training copies it to its devices. Each is a process of its own,
bound to the same --cores and told to use as many threads (of two cores ImageRecordIter takes one all the same). They
take a turn each in each round, in changing order, and are idle meanwhile. A turn is as many epochs as hold --images;
the first of each is not counted. Medians (and quartiles) over the rounds:

    images/s/core       images of a turn, by its time and the number of cores
    images/CPU second   the same by the processor time it took, which other load on the machine changes less
    peak memory         of the process, Python and MXNet included
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, CLONE)  # in a clone, not installed


# ----------------------------------------------------------------------------------------- in the processes

def gn_gluon_epochs(folder, batch_size, workers):
    """Epochs of gn_gluon.data.ImageNet, endlessly: iterators of the number of images in each batch made."""
    from gn_gluon.data import ImageNet, loader
    dataset = ImageNet(folder, workers=workers)
    dataset.load()
    epoch = 0
    while True:
        yield (batch.num_samples for batch in loader.train_batches(dataset, batch_size, seed=0, epoch=epoch))
        epoch += 1


def record_iter_epochs(folder, batch_size, workers):
    """Epochs of mx.io.ImageRecordIter, with the same augmentation as far as it has it."""
    import mxnet as mx

    from gn_gluon.data.imagenet import MEAN, STD
    colours = {f'{kind}_{channel}': float(value) for kind, values in (('mean', MEAN), ('std', STD))
               for channel, value in zip('rgb', values)}
    batches = mx.io.ImageRecordIter(
        path_imgrec=os.path.join(folder, 'train.rec'), path_imgidx=os.path.join(folder, 'train.idx'),
        data_shape=(3, 224, 224), batch_size=batch_size, shuffle=True, random_resized_crop=True, min_random_area=0.08,
        max_random_area=1.0, min_aspect_ratio=3 / 4, max_aspect_ratio=4 / 3, rand_mirror=True, brightness=0.4,
        contrast=0.4, saturation=0.4, pca_noise=0.1, preprocess_threads=workers, verbose=False, **colours)

    def number_of_images(batch):
        batch.data[0].wait_to_read()
        return batch_size - batch.pad

    while True:
        yield map(number_of_images, batches)
        batches.reset()


CONTESTANTS = {'gn_gluon': gn_gluon_epochs, 'ImageRecordIter': record_iter_epochs}


def serve(name, folder, batch_size, workers, num_images):
    """Answer every line of stdin by a turn: JSON of its images, seconds, processor seconds, and peak memory."""
    import gn_gluon  # noqa: F401 - first: it makes MXNet importable

    # isort: split
    import resource
    epochs = CONTESTANTS[name](folder, batch_size, workers)
    for _ in sys.stdin:
        start, busy, images = time.perf_counter(), time.process_time(), 0
        while images < num_images:
            images += sum(next(epochs))
        print(json.dumps({'images': images, 'seconds': time.perf_counter() - start,
                          'cpu_seconds': time.process_time() - busy,
                          'peak_memory_bytes': 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True)


# -------------------------------------------------------------------------------------------- in the parent

class Contestant:
    """A process that takes its turns when asked."""

    def __init__(self, name, folder, cores, flags):
        # Before the process begins, for OpenMP counts the processors at once.
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), '--data', folder, '--serve', name, '--cores',
                 str(len(cores)), '--batch', str(flags.batch), '--images', str(flags.images)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        finally:
            os.sched_setaffinity(0, own)

    def turn(self):
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            from gn_gluon.errors import UserError
            raise UserError(f'a measuring process ended with status {self.process.wait()}; see above for why')
        return json.loads(answer)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def measure(folder, cores, flags):
    """Rows of one folder, a dict for each contestant."""
    contestants = {name: Contestant(name, folder, cores, flags) for name in CONTESTANTS}
    turns = {name: [] for name in CONTESTANTS}
    try:
        for number in range(flags.rounds + 1):
            for name in sorted(contestants, reverse=number % 2):
                turn = contestants[name].turn()
                if number:  # the first begins with files that are not yet in memory
                    turns[name].append(turn)
                print(f'  {folder}, round {number} of {flags.rounds}, {name}: {turn["images"]} images in '
                      f'{turn["seconds"]:.2f} s', file=sys.stderr, flush=True)
    finally:
        for contestant in contestants.values():
            contestant.end()
    return [{'data': folder, 'contestant': name, 'turns': turns[name],
             'images_per_second_and_core': quartiles(t['images'] / t['seconds'] / len(cores) for t in turns[name]),
             'images_per_cpu_second': quartiles(t['images'] / t['cpu_seconds'] for t in turns[name]),
             'peak_memory_bytes': turns[name][-1]['peak_memory_bytes']} for name in contestants]


def quartiles(values):
    """[first quartile, median, third quartile]."""
    values = list(values)
    return statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3


def show(rows):
    """The table of one folder, and the ratio of the medians."""
    line = '{:<18}{:>28}{:>28}{:>16}'
    table = [rows[0]['data'], line.format('', 'images/s/core', 'images/CPU second', 'peak memory')]
    for row in rows:
        table.append(line.format(row['contestant'], *(
            '{1:.0f} ({0:.0f} to {2:.0f})'.format(*row[what])
            for what in ('images_per_second_and_core', 'images_per_cpu_second')),
            f'{row["peak_memory_bytes"] / 2 ** 20:.0f} MiB'))
    ours, theirs = rows
    table.append(line.format('ratio', *(f'{ours[what][1] / theirs[what][1]:.2f}' for what in (
        'images_per_second_and_core', 'images_per_cpu_second')), ''))
    return '\n'.join(table)


def main():
    import gn_gluon
    from gn_gluon import compat
    from gn_gluon.data.records import read_manifest
    from gn_gluon.errors import UserError
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', nargs='+', required=True, metavar='FOLDER',
                        help='folders that tools/pack_imagenet.py has packed')
    parser.add_argument('--cores', type=int, default=1, help='cores that each is bound to (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=100, help='images in a batch (default: %(default)s)')
    parser.add_argument('--images', type=int, default=2000, help='images of a turn, at least (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=7, help='counted turns of each (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write everything that was measured')
    parser.add_argument('--serve', choices=CONTESTANTS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.serve, flags.data[0], flags.batch, flags.cores, flags.images)
        return
    for folder in flags.data:
        read_manifest(folder)  # a cut file would abort ImageRecordIter's process
    usable = sorted(os.sched_getaffinity(0))
    for name, most in (('cores', len(usable)), ('batch', 10000), ('images', 10 ** 8), ('rounds', 1000)):
        if not 1 <= getattr(flags, name) <= most:
            raise UserError(f'--{name} {getattr(flags, name)} is not between 1 and {most}')
    with open('/proc/cpuinfo') as file:
        processor = re.search(r'model name\s*: (.+)', file.read())
    about = {'processor': processor.group(1) if processor else platform.machine(), 'cores': flags.cores,
             'usable_cores': len(usable), 'load_average': os.getloadavg()[0], 'platform': platform.platform(),
             'python': platform.python_version(), 'gn_gluon': gn_gluon.__version__,
             **{package: compat.version(package) for package in ('mxnet', 'opencv-python', 'numpy')},
             'date': time.strftime('%Y-%m-%d %H:%M'), 'command': sys.argv}
    print('\n'.join(f'{name:<18}{value}' for name, value in about.items()))
    rows = []
    for folder in flags.data:
        rows.append(measure(folder, usable[:flags.cores], flags))
        print('\n' + show(rows[-1]), flush=True)
    if flags.json:
        with open(flags.json, 'w') as file:
            json.dump({'format': 1, 'machine': about, 'rows': sum(rows, [])}, file, indent=1)


if __name__ == '__main__':
    from gn_gluon.errors import command
    command(main)
