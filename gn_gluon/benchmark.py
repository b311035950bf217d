"""--benchmark: how fast an experiment trains on this machine, and whether its data keep up."""
import contextlib
import itertools
import os
import time

import numpy as np
from tqdm import tqdm

from gn_gluon import compat, config
from gn_gluon.data import loader
from gn_gluon.distributed import joined, progress
from gn_gluon.experiment import Built, devices_of, peak_memory, what_all_ranks_share
from gn_gluon.loop import train_epoch
from gn_gluon.metrics import Metrics
from gn_gluon.norm.operator import active_operator
from gn_gluon.precision import check_trainable
from gn_gluon.replicas import check_kvstore, parse_devices

#: Updates before the first timed one: compiling, memory, cuDNN's choice of algorithms, the first batches of a queue.
WARMUP_UPDATES = 3
#: Images of the data alone, at least: many times what is read ahead.
DATA_IMAGES = 4096


def benchmark(experiment, bindings, workdir, data_dir=None, num_updates=10):
    """Time updates in the experiment's own layout: replicas, images, devices, norm, type.

    Arguments:
        experiment, bindings, workdir, data_dir: as of experiment.train; nothing is written.
        num_updates: timed updates, after WARMUP_UPDATES others.
    Returns a dict of settings, `peak_memory_bytes` (see experiment.peak_memory) and three measurements:
        compute: training on random images of the data set's shape, which are in memory; no data are needed.
        data: reading and augmenting the data set's own batches, nothing else; None where its folder is not there.
        training: both at once, as train does it; None likewise.
    A measurement is a dict: images_per_second, the median over the updates; quartiles, (first, third); and
    data_wait_share, the part of the time spent waiting for a batch (from 0 to 1); and of several ranks
    network_bytes_per_update, what the machine of the first sends meanwhile, see `bytes_sent`.
    Of several ranks only the first returns it, what they make together; each of the others None. Raises UserError as
    experiment.train does. The learning rate is 0, so that noise cannot blow up the weights.
    """
    built = Built(experiment, workdir, data_dir)
    config.refuse_unused(bindings)
    operator = active_operator()[0]
    devices = parse_devices(experiment.devices, experiment.num_replicas)
    check_kvstore(experiment.kvstore, devices)
    check_trainable(experiment.dtype, devices)
    # A set without a folder is part of an installed package.
    data = 'there' if built.data_dir is None or os.path.isdir(built.data_dir) else 'missing'
    progress('starting')
    with joined(experiment.kvstore, experiment.reproducible) as ranks:
        ranks.refuse_differences(what_all_ranks_share(built, data))
        result = _measurements(built, devices_of(experiment, ranks), ranks, num_updates, data == 'there')
        result['norm_operator'] = operator
        return result if ranks.leads else None


def _measurements(built, devices, ranks, num_updates, with_data):
    experiment = built.experiment
    built.initialize(devices)
    replicas, updater = built.make_replicas(devices, ranks), built.make_updater(ranks)
    rows = replicas.rows

    def measure(batches, train, title):
        number = WARMUP_UPDATES + (num_updates if train else max(num_updates, DATA_IMAGES // experiment.batch_size))
        with contextlib.closing(batches), tqdm(total=number, desc=title, unit='update', leave=False,
                                               disable=None) as bar:
            timed = _Timed(itertools.islice(batches, number), bar, ranks)
            if train:
                train_epoch(replicas, updater, timed, Metrics(), lambda _: 0.0, experiment.seed, timed.done)
            else:
                for _ in timed:
                    timed.done()
        measured = measurement(timed.done_at, timed.waits, experiment.batch_size)
        if train and ranks.size > 1:
            sent = timed.bytes_sent[WARMUP_UPDATES - 1:]
            measured['network_bytes_per_update'] = (sent[-1] - sent[0]) // (len(sent) - 1)
        return measured

    result = {
        'model': type(built.net).__name__, 'norm': experiment.norm.__name__,
        'dtype': experiment.dtype, 'image_shape': list(built.dataset.image_shape), 'layout': replicas.describe(),
        'images_per_update': experiment.batch_size, 'num_updates': num_updates, 'warmup_updates': WARMUP_UPDATES,
        'threads': compat.num_threads(), 'data_dir': built.data_dir,
        'compute': measure(_made_up_batches(built, rows), True, 'compute'), 'data': None, 'training': None}
    if with_data:
        built.load()
        result['updates_per_epoch'] = built.steps_per_epoch  # raises where the images do not fill one
        result['data'] = measure(_own_batches(built, rows), False, 'data')
        result['training'] = measure(_own_batches(built, rows), True, 'training')
    result['peak_memory_bytes'] = peak_memory(devices)
    return result


def table(result):
    """The result of `benchmark` as text."""
    source = result['data_dir'] or 'an installed package'
    shape = ' x '.join(map(str, result['image_shape']))
    lines = ['{model} with {norm} ({norm_operator}), images of {shape}, {dtype}'.format(shape=shape, **result),
             '{layout}, {threads} threads'.format(**result),
             '{num_updates} updates of {images_per_update} images, after {warmup_updates} to warm up'.format(**result),
             '', '{:10}{:>10}  {:>17}  {:>16}'.format('', 'images/s', 'quartiles', 'waiting for data')]
    for name, what in (('compute', 'random images, in memory'), ('data', f'reading {source} alone'),
                       ('training', 'both, as in training')):
        measured = result[name]
        if measured is None:
            lines.append(f'{name:10}not measured: {source} is not there')
            continue
        wait = '-' if name == 'data' else '{:.1f} %'.format(100 * measured['data_wait_share'])
        lines.append('{:10}{:10.2f}  {:8.2f} {:8.2f}  {:>16}  {}'.format(
            name, measured['images_per_second'], *measured['quartiles'], wait, what))
    if 'network_bytes_per_update' in result['compute']:
        lines.append('\nthis machine sends {:.1f} MB per update'.format(
            result['compute']['network_bytes_per_update'] / 1e6))
    lines += ['', 'peak memory {:.2f} GiB'.format(result['peak_memory_bytes'] / 2**30)]
    return '\n'.join(lines)


def _made_up_batches(built, rows):
    """The same batch of noise again and again."""
    experiment, rng = built.experiment, np.random.default_rng(built.experiment.seed)
    images = rng.standard_normal((experiment.batch_size,) + built.dataset.image_shape, dtype=np.float32)
    labels = rng.integers(0, built.dataset.num_classes, experiment.batch_size).astype(np.int32)
    images, labels = images[rows], labels[rows]
    while True:
        yield loader.Batch(images, labels, len(labels))


def _own_batches(built, rows):
    """The training batches of one epoch after another."""
    experiment = built.experiment
    for epoch in itertools.count():
        yield from loader.train_batches(built.dataset, experiment.batch_size, experiment.seed, epoch, rows=rows)


class _Timed:
    """Iterates over `batches`; keeps how long each was waited for, and when each was done with."""

    def __init__(self, batches, bar, ranks):
        self._batches = batches
        self._bar = bar
        self._ranks = ranks
        self.waits = []
        self.done_at = []
        self.bytes_sent = []

    def __iter__(self):
        while True:
            start = time.perf_counter()
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            self.waits.append(time.perf_counter() - start)
            yield batch

    def done(self, *_):
        """The batch that was last handed out is done with."""
        self.done_at.append(time.perf_counter())
        self.bytes_sent.append(bytes_sent())
        self._bar.update()
        progress(f'update {len(self.done_at)} of the benchmark')
        self._ranks.check_signals()


def bytes_sent():
    """The bytes that this machine has sent over all its network interfaces, loopback included."""
    with open('/proc/net/dev') as file:
        return sum(int(line.partition(':')[2].split()[8]) for line in file.readlines()[2:])


def measurement(done, waits, batch_size):
    """A measurement of `benchmark` from the end of the warm-up on.

    Arguments:
        done: for each batch the time in seconds at which it was done with.
        waits: for each batch the seconds for which it was waited for before.
        batch_size: images of a batch.
    """
    seconds = np.diff(done[WARMUP_UPDATES - 1:])
    first, median, third = np.percentile(batch_size / seconds, (25, 50, 75))
    return {'images_per_second': median, 'quartiles': (first, third),
            'data_wait_share': sum(waits[WARMUP_UPDATES:]) / seconds.sum()}
