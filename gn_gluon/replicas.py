"""The paper's "8 GPUs x b images" on the devices at hand: split, accumulate, average.

A replica is one of the paper's GPUs: it sees `batch_per_replica` images at a time, and BatchNorm's statistics stay
inside it. With fewer devices than replicas each device computes its share one after another and sums the gradients, so
that the update is that of as many GPUs.
"""
import contextlib
import os
import re

import mxnet as mx
import numpy as np
from mxnet import autograd

from gn_gluon.distributed import ALONE, WITHIN_PROCESS
from gn_gluon.errors import UserError

_RUNNING = ('running_mean', 'running_var')
# What CUDA, cuDNN and cuBLAS say, in the words of MXNet's storage manager or their own.
_OUT_OF_MEMORY = re.compile('.*(out of memory|cudaMalloc|_ALLOC_FAILED).*', re.IGNORECASE)


def parse_devices(devices, num_replicas):
    """The MXNet contexts that `train.devices` names.

    Arguments:
        devices: 'auto' (all GPUs, of which the workers of a machine take turns, or else the CPU; no more than there
            are replicas), or names such as 'cpu(0)', 'gpu(0)' or the range 'gpu(0-7)', one string or a tuple of them.
        num_replicas: replicas to be shared out.
    Returns a list of contexts. Raises UserError for a name that is none, a GPU that is not there, or more devices than
    replicas.
    """
    num_gpus = mx.context.num_gpus()
    if devices == 'auto':
        # Of the GPUs of a machine each worker there takes its share.
        here, index = int(os.environ.get('GN_GLUON_WORKERS_HERE', 1)), int(os.environ.get('GN_GLUON_WORKER_HERE', 0))
        if 0 < num_gpus < here:
            raise UserError(f'{here} workers are to share the {num_gpus} GPUs of this machine; start fewer')
        return [mx.gpu(i) for i in range(index, num_gpus, here)][:num_replicas] or [mx.cpu()]
    if not isinstance(devices, (str, tuple, list)):
        raise UserError(f"train.devices = {devices!r} is neither a name such as 'gpu(0-7)' nor a tuple of them")
    contexts = []
    for name in (devices,) if isinstance(devices, str) else devices:
        match = re.match(r'^(cpu|gpu)(?:\((\d+)(?:-(\d+))?\))?$', str(name).strip())
        if not match:
            raise UserError(f"train.devices = {devices!r}: {name!r} is not a device; write 'auto', 'cpu', 'gpu(0)' or "
                            "a range "
                            "such as 'gpu(0-7)'")
        kind, first = match.group(1), int(match.group(2) or 0)
        contexts += [mx.Context(kind, i) for i in range(first, int(match.group(3) or first) + 1)]
    missing = [str(c) for c in contexts if c.device_type == 'gpu' and c.device_id >= num_gpus]
    if missing:
        raise UserError(f"train.devices asks for {missing[0]}, but {gpus_seen()}; lower train.devices or set it to "
                        "'auto'")
    if len({context.device_type for context in contexts}) > 1:
        raise UserError(f'train.devices = {devices!r} mixes CPU and GPU; name devices of one kind')
    if not contexts or len(set(contexts)) != len(contexts):
        raise UserError('train.devices = {!r} names {}'.format(devices, 'a device twice' if contexts else 'no device'))
    if len(contexts) > num_replicas:
        raise UserError(f'train.devices names {len(contexts)} devices for the {num_replicas} replicas '
                        '(train.num_replicas, or the share of this worker); a device needs at least one')
    return contexts


def gpus_seen():
    """How many GPUs MXNet sees, or why none, in words."""
    if not mx.runtime.Features().is_enabled('CUDA'):
        return "MXNet sees no GPU: this build of it is for CPUs (pip install '.[cu112]' brings the other)"
    return f'MXNet sees {mx.context.num_gpus() or "no"} GPUs'


def check_kvstore(kvstore, devices):
    """Raise UserError if the kvstore `kvstore` cannot work between `devices`, or is not in this build of MXNet.

    Likewise if this process was started to train alone and the kvstore is for several, or the other way round.
    """
    launched = 'DMLC_ROLE' in os.environ
    if launched and kvstore not in WITHIN_PROCESS:
        raise UserError(f"this process is one of {os.environ.get('DMLC_NUM_WORKER')} workers, but train.kvstore = "
                        f"{kvstore!r} trains alone; add --gin_bindings \"train.kvstore = 'dist_sync'\"")
    if kvstore in WITHIN_PROCESS and not launched:
        raise UserError(f'train.kvstore = {kvstore!r} is for several processes; start them with: python '
                        'tools/launch.py --local 2 -- python -m gn_gluon.train ...')
    if kvstore != 'nccl':
        return
    if devices[0].device_type == 'cpu':
        raise UserError("train.kvstore = 'nccl' is for GPUs; on CPUs use 'device'")
    if not mx.runtime.Features().is_enabled('NCCL'):
        raise UserError("train.kvstore = 'nccl', but this build of MXNet has no NCCL; use 'device'")


@contextlib.contextmanager
def out_of_memory_explained(hint):
    """Turns what MXNet raises when a device has no memory left into a UserError that ends with `hint`."""
    try:
        yield
    except mx.MXNetError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if not found:
            raise
        raise UserError(f'out of memory ({found.group().strip()}): {hint}') from None


class Replicas:
    """Computes the gradients of one update, replica by replica.

    Arguments:
        net: hybridizable network, initialized on `devices`.
        loss: Gluon loss that returns one value per image.
        devices: list of contexts.
        num_replicas, batch_per_replica: the layout; replica i takes the i-th part of the batch.
        ranks: distributed.Ranks. Of the replicas each rank computes its share.
        images_at_once: where no layer has running statistics, samples do not see one another: the images of a device
            then go through the network in the largest equal parts of up to so many, be these several replicas or a
            part of one. The same sums, and the memory of so many images.
    Attributes: batch_size, the images of an update; rows, the slice of them that is this rank's.
    """

    def __init__(self, net, loss, devices, num_replicas, batch_per_replica, images_at_once=32, ranks=ALONE):
        self.net = net
        self.loss = loss
        self.devices = devices
        self.batch_per_replica = batch_per_replica
        self.num_replicas = num_replicas
        self.ranks = ranks
        self.batch_size = num_replicas * batch_per_replica
        first, after = ranks.share(num_replicas)
        self.rows = slice(first * batch_per_replica, after * batch_per_replica)
        parameters = net._collect_params_with_prefix()
        self.trainable = [p for p in parameters.values() if p.grad_req != 'null']
        self.running = [p for name, p in parameters.items() if name.endswith(_RUNNING)]
        #: For each device the rows (of this rank) of each pass, in order; all passes of a device are of one size.
        self.passes = []
        for share in np.array_split(np.arange(after - first), len(devices)):
            first, last = share[0] * batch_per_replica, (share[-1] + 1) * batch_per_replica
            size = batch_per_replica if self.running else _largest_divisor(last - first, images_at_once)
            self.passes.append([slice(start, start + size) for start in range(first, last, size)])
        #: The most images that go through the network at once.
        self.images_at_once = max(rows.stop - rows.start for passes in self.passes for rows in passes)
        self.accumulate = max(map(len, self.passes)) > 1
        for parameter in self.trainable:
            parameter.grad_req = 'add' if self.accumulate else 'write'

    def describe(self):
        """One line for the log: '8 replicas x 2 images on 1 device (cpu(0))'."""
        num_devices = len(self.devices)
        return (f"{self.num_replicas} replica{'s' * (self.num_replicas != 1)} x {self.batch_per_replica} "
                f"image{'s' * (self.batch_per_replica != 1)} on "
                + (f'{self.ranks.size} workers, here on ' if self.ranks.size > 1 else '')
                + f"{num_devices} device{'s' * (num_devices != 1)} ({', '.join(map(str, self.devices))})"
                + ('' if self.images_at_once == self.batch_per_replica else
                   f', {self.images_at_once} images at a time: this norm keeps samples apart'))

    def memory_hint(self):
        """What to do when a device has not the memory for a pass, in words."""
        if self.running:
            return (f'this norm sees the {self.batch_per_replica} images of a replica together; use devices with more '
                    'memory, or, for another experiment, lower train.batch_per_replica and raise train.num_replicas')
        if self.images_at_once > 1:
            return f'lower train.images_at_once below {self.images_at_once}; the replicas and the result stay the same'
        return 'use devices with more memory'

    def compute_gradients(self, images, labels, loss_scale=1.0):
        """Leave the sum over all images of the gradients of loss * loss_scale in the parameters, a part on each device.

        Arguments:
            images: (n, C, H, W) float32 NumPy array: `rows` of the update's batch.
            labels: the same number of int32.
        Returns the logits as a list of NDArrays in the order of the images. Running statistics become the mean over
        all replicas of what each replica alone would have made of them.
        """
        if self.accumulate:
            for parameter in self.trainable:
                parameter.zero_grad()
        statistics = [_RunningStatistics(self.running, device) for device in self.devices]
        logits = {}
        for turn in range(max(map(len, self.passes))):
            # Each computation is only started here, so all devices work at once.
            working = [i for i, passes in enumerate(self.passes) if turn < len(passes)]
            for i in working:
                rows = self.passes[i][turn]
                logits[rows.start] = self._forward_backward(images[rows], labels[rows], self.devices[i], loss_scale)
            if self.running:
                # MXNet's CPU BatchNorm writes them in the backward pass, and in a static graph its engine does not
                # know: without waiting, what is read here may be the statistics before the pass.
                mx.nd.waitall()
                for i in working:
                    statistics[i].take_over()
        if self.running:
            self._average(statistics)
        return [logits[start] for start in sorted(logits)]

    def _forward_backward(self, images, labels, device, loss_scale):
        images = mx.nd.array(images, ctx=device)
        labels = mx.nd.array(labels, ctx=device)
        with autograd.record():
            logits = self.net(images)
            loss = self.loss(logits, labels)
        loss.backward(None if loss_scale == 1 else mx.nd.full(loss.shape, loss_scale, ctx=device))
        return logits

    def _average(self, statistics):
        """Every device takes the mean over all replicas of all devices and ranks."""
        totals = {}
        for i in range(len(self.running)):
            total = statistics[0].sums[i]
            for other in statistics[1:]:
                total = total + other.sums[i].as_in_context(total.context)
            totals[f'running {i}'] = total
        self.ranks.sum(totals)
        for parameter, total in zip(self.running, totals.values()):
            parameter.set_data(total / self.num_replicas)


def _largest_divisor(number, limit):
    """The largest divisor of `number` that is at most `limit`."""
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)


class _RunningStatistics:
    """Lets every replica of a device start from the same running statistics, and sums what each makes of them."""

    def __init__(self, parameters, device):
        self.arrays = [parameter.data(device) for parameter in parameters]
        self.start = [array.copy() for array in self.arrays]
        self.sums = [mx.nd.zeros_like(array) for array in self.arrays]

    def take_over(self):
        for array, start, total in zip(self.arrays, self.start, self.sums):
            total += array
            start.copyto(array)
