"""Order, batches and prefetching: what turns a data set into the steps of an epoch.

Order and augmentation of a sample are functions of (seed, epoch, sample) alone: the same on any number of
devices, threads or machines, and after a resume from the middle of an epoch.
"""
import collections
import concurrent.futures
import time

import numpy as np

#: images (batch_size, C, H, W) float32; labels (batch_size,) int32; of these the first `num_samples` count,
#: the rest is padding that keeps the shape of the last validation batch.
Batch = collections.namedtuple('Batch', ['images', 'labels', 'num_samples'])

_ORDER, _DRAWS = 0, 1

#: So many images are made in advance, or two batches if these are more: small batches are used up faster.
IMAGES_AHEAD = 512


def _generator(seed, epoch, stream):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, stream])))


def epoch_order(num_samples, seed, epoch):
    """The permutation of the training samples in one epoch: (num_samples,) int64."""
    return _generator(seed, epoch, _ORDER).permutation(num_samples)


def epoch_draws(num_samples, num_draws, seed, epoch):
    """Uniform numbers in [0, 1) for augmentation, row i for sample i: (num_samples, num_draws) float32."""
    return _generator(seed, epoch, _DRAWS).random((num_samples, num_draws), dtype=np.float32)


def train_batches(dataset, batch_size, seed, epoch, start_step=0, rows=slice(None)):
    """Batches of one training epoch from `start_step` on; the remainder of the permutation is dropped.

    Arguments:
        batch_size: images of one step, those of all processes together.
        rows: slice of them, which this process makes. So all processes have the same number of steps, and in each
            together the images that one process alone would have.
    """
    rows = range(*rows.indices(batch_size))
    order = epoch_order(dataset.num_train, seed, epoch)
    draws = epoch_draws(dataset.num_train, dataset.num_draws, seed, epoch)

    def make_batch(step):
        start = step * batch_size
        indices = order[start + rows.start:start + rows.stop]
        return Batch(dataset.train_batch(indices, draws[indices]), dataset.train_labels[indices], len(rows))

    return Prefetcher(make_batch, range(start_step, dataset.num_train // batch_size), _ahead(len(rows)))


def first_images(dataset, number, seed):
    """The first images of the first epoch, augmented: (number or fewer, C, H, W) float32."""
    indices = epoch_order(dataset.num_train, seed, 0)[:number]
    return dataset.train_batch(indices, epoch_draws(dataset.num_train, dataset.num_draws, seed, 0)[indices])


def validation_batches(dataset, batch_size, first=0, after=None):
    """Batches that hold every validation image exactly once; the last is padded with its last image.

    `first` and `after`: the first image, and the one after the last, for a process that makes a part of them.
    """
    after = dataset.num_validation if after is None else after

    def make_batch(start):
        indices = np.minimum(np.arange(start, start + batch_size), after - 1)
        return Batch(dataset.validation_batch(indices), dataset.validation_labels[indices],
                     min(batch_size, after - start))

    return Prefetcher(make_batch, range(first, after, batch_size), _ahead(batch_size))


def full_validation_batches(dataset, batch_size, seed):
    """Batches for statistics of the batch: every validation image counts exactly once, and every batch is full.

    In a random order that `seed` fixes, for files are often sorted by class. The last batch is filled up with the first
    images of that order, which are not counted again; all images of a batch are different ones.
    """
    order = epoch_order(dataset.num_validation, seed, 0)
    batch_size = min(batch_size, len(order))

    def make_batch(start):
        indices = order[np.arange(start, start + batch_size) % len(order)]
        return Batch(dataset.validation_batch(indices), dataset.validation_labels[indices],
                     min(batch_size, len(order) - start))

    return Prefetcher(make_batch, range(0, len(order), batch_size), _ahead(batch_size))


def _ahead(batch_size):
    return max(2, IMAGES_AHEAD // batch_size)


class Prefetcher:
    """Iterates `make_batch(step)` over `steps`, in order, `ahead` batches in advance.

    Two are in the making at a time: while the last images of the one are decoded, threads that are done with theirs
    begin with the other. `wait_seconds` adds up the time for which the consumer had to wait.
    """

    def __init__(self, make_batch, steps, ahead=2):
        self.wait_seconds = 0.0
        self._make_batch = make_batch
        self._steps = steps
        self._ahead = ahead

    def __len__(self):
        return len(self._steps)

    def __iter__(self):
        steps = iter(self._steps)
        pending = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(max_workers=2) as threads:
            try:
                for step in steps:
                    pending.append(threads.submit(self._make_batch, step))
                    if len(pending) > self._ahead:
                        yield self._take(pending)
                while pending:
                    yield self._take(pending)
            finally:
                for future in pending:
                    future.cancel()

    def _take(self, pending):
        start = time.perf_counter()
        batch = pending.popleft().result()
        self.wait_seconds += time.perf_counter() - start
        return batch
