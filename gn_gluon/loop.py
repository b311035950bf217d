"""One epoch of training, one pass of evaluation."""
import itertools
import math

import mxnet as mx
import numpy as np

from gn_gluon.errors import NaNLossError
from gn_gluon.metrics import Metrics
from gn_gluon.replicas import out_of_memory_explained


def train_epoch(replicas, updater, batches, metrics, learning_rate, seed, on_step):
    """Make one update per batch, until the epoch ends or `on_step` raises.

    Arguments:
        replicas: replicas.Replicas.
        updater: optim.Updater.
        batches: iterable of loader.Batch.
        metrics: metrics.Metrics that counts the images as they are trained on, those of all ranks.
        learning_rate: function of the number of updates made so far.
        seed: of the network's own random numbers (dropout).
        on_step: called after each update as on_step(loss, learning_rate).
    Raises NaNLossError naming the update when a loss is not finite, UserError when a device is out of memory.
    """
    ranks = replicas.ranks
    with out_of_memory_explained(replicas.memory_hint()):
        for batch in batches:
            # MXNet's random state cannot be saved, so it follows from the number of the update.
            numbers = np.random.SeedSequence([seed, updater.num_updates, ranks.rank]).generate_state(1)
            mx.random.seed(int(numbers[0]) >> 1)
            rate = learning_rate(updater.num_updates)
            logits = replicas.compute_gradients(batch.images, batch.labels, updater.loss_scale)
            updater.update(rate, replicas.batch_size)
            counted = Metrics()
            # This waits for the forward passes only: with one rank the last backward pass and the update run on.
            counted.add(np.concatenate([part.asnumpy() for part in logits]), batch.labels)
            counted = ranks.total(counted)
            metrics.merge(counted)
            if not math.isfinite(counted.loss):
                raise NaNLossError(f'the training loss is {counted.loss} at update {updater.num_updates} (learning '
                                   f'rate {rate:g}); lower the learning rate or clip the gradients '
                                   '(train.gradient_clip_norm)')
            on_step(counted.loss, rate)
        mx.nd.waitall()


def predictions(net, devices, batches):
    """Yields (batch, logits as a NumPy array) for each batch, in inference mode.

    Every batch goes to one device as a whole, and as many are under way at once as there are devices.

    Arguments:
        net: initialized network.
        devices: list of contexts.
        batches: iterable of loader.Batch.
    """
    batches = iter(batches)
    while True:
        group = list(itertools.islice(batches, len(devices)))
        if not group:
            return
        # Each computation is only started here, so all devices work at once.
        logits = [net(mx.nd.array(batch.images, ctx=device)) for batch, device in zip(group, devices)]
        for batch, of_batch in zip(group, logits):
            yield batch, of_batch.asnumpy()


def evaluate(net, devices, batches, on_batch=None,
             memory_hint='lower train.validation_batch; the result stays the same'):
    """Metrics over every sample of `batches` exactly once, in inference mode (BN: running statistics, no dropout).

    Arguments:
        net, devices, batches: as of `predictions`; rows from `num_samples` on are padding and are not counted.
        on_batch: called after each batch with the number of its samples.
        memory_hint: what to do when a device is out of memory.
    Raises UserError with that hint.
    """
    metrics = Metrics()
    with out_of_memory_explained(memory_hint):
        for batch, logits in predictions(net, devices, batches):
            metrics.add(logits[:batch.num_samples], batch.labels[:batch.num_samples])
            if on_batch is not None:
                on_batch(batch.num_samples)
    return metrics
