"""Several processes train as one: MXNet's own engine for that (ps-lite) without its traps.

Every process, or rank, computes its share of the replicas; what is summed over devices is then summed over ranks. All
ranks hold the same weights and make the same updates. tools/launch.py starts the processes and watches them: ps-lite
itself waits for ever for a process that has died.
"""
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib

import mxnet as mx
import numpy as np
from mxnet.base import _LIB, check_call

from gn_gluon import errors
from gn_gluon.checkpoint import signals_as_interrupts
from gn_gluon.errors import Interrupted, UserError
from gn_gluon.metrics import Metrics

#: The kvstore that sums over the devices of one process, for each that sums over processes.
WITHIN_PROCESS = {'dist_sync': 'local', 'dist_device_sync': 'device'}


def serve():
    """Be one of ps-lite's servers, or its scheduler, if DMLC_ROLE says so, until the workers leave.

    Returns whether it said so. MXNet's own server unpickles, hence runs, whatever optimizer reaches its port. None is
    sent here, and this server refuses all of them.
    """
    if os.environ.get('DMLC_ROLE') not in ('server', 'scheduler'):
        return False

    def refuse(command, body, _):
        print(f'refused a command ({command}) that came over the network: no rank of gn_gluon sends any', flush=True)

    kvstore = mx.kv.create('dist')
    controller = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(refuse)
    check_call(_LIB.MXKVStoreRunServer(kvstore.handle, controller, None))
    return True


def progress(text):
    """Tell tools/launch.py, if it started this process, that there is progress, and what it is."""
    path = os.environ.get('GN_GLUON_PROGRESS')
    if path:
        with open(path, 'w') as file:
            file.write(text)


@contextlib.contextmanager
def joined(kvstore, reproducible=True):
    """A context with the Ranks of `train.kvstore`: waits for all of them to come.

    A process that leaves it by an exception ends at once (see errors.command), without MXNet's own end, which waits for
    the others.
    """
    several = kvstore in WITHIN_PROCESS
    ranks = Ranks(mx.kv.create(kvstore), reproducible) if several else Ranks()
    try:
        with signals_as_interrupts() as ranks.check_own_signals:
            yield ranks
    except BaseException:
        errors.end_at_once = several
        raise
    ranks.leave()


class Ranks:
    """The processes that train together.

    Arguments:
        kvstore: MXNet's distributed kvstore. None: there is one process, and all methods return what they were given.
        reproducible: whether the same run makes the same bits with more than two ranks, too. MXNet's server adds in the
            order of arrival. Of two numbers that makes no difference; so it adds in pairs, for half as many times the
            bytes as there are ranks, and each rank adds the pairs.
    Attributes: rank (from 0), size.
    """

    def __init__(self, kvstore=None, reproducible=True):
        self._kvstore = kvstore
        self.size = kvstore.num_workers if kvstore else 1
        # ps-lite's own ranks follow from ports, which change from one start to the next.
        self.rank = int(os.environ.get('GN_GLUON_WORKER', kvstore.rank)) if kvstore else 0
        self.check_own_signals = lambda: None
        self._num_pairs = (self.size + 1) // 2 if reproducible else 1
        self._keys, self._pairs = {}, {}
        self._stop = None

    def leave(self):
        """Wait for the others to have come to their end, too; the servers and the scheduler then end."""
        self._kvstore = None

    @property
    def leads(self):
        """Whether this is the process that writes the run folder and speaks."""
        return self.rank == 0

    def share(self, number):
        """The part of range(number) that is this rank's, contiguous and as equal as can be: (first, after the last)."""
        return number * self.rank // self.size, number * (self.rank + 1) // self.size

    def check_signals(self):
        """Raise Interrupted if a signal has come; with several ranks, once all know it by a `gather`."""
        if self.size == 1:
            self.check_own_signals()
        elif self._stop:
            raise Interrupted(self._stop)

    def gather(self, values):
        """What every rank gives: (n,) float64 each becomes (size, n), the same on all, and exact.

        A signal that one of them has received goes with it, so that all stop at the same place.
        """
        values = np.asarray(values, np.float64)
        if self.size == 1:
            return values[None]
        # As bytes, since MXNet's server adds float64 in float32. A number and zeros: any order gives the same.
        content = np.frombuffer(np.append(values, self._received()).tobytes(), np.uint8)
        slots = np.zeros((self.size, len(content)), np.float32)
        slots[self.rank] = content
        slots = mx.nd.array(slots)
        self._add_up([f'{len(content)} bytes'], [slots])
        received = slots.asnumpy().astype(np.uint8).view(np.float64)
        self._stop = self._stop or int(received[:, -1].max())
        return received[:, :-1]

    def _received(self):
        try:
            self.check_own_signals()
        except Interrupted as stop:
            return stop.signum
        return 0

    def gather_objects(self, content):
        """What every rank gives, anything that JSON can hold, as a list in the order of the ranks."""
        if self.size == 1:
            return [content]
        text = json.dumps(content).encode()
        longest = int(self.gather([len(text)]).max())
        padded = np.frombuffer(text.ljust(-(-longest // 8) * 8), np.float64)  # JSON does not mind blanks at its end
        return [json.loads(row.tobytes()) for row in self.gather(padded)]

    def total(self, metrics):
        """The Metrics of all ranks together."""
        if self.size == 1:
            return metrics
        rows = self.gather([metrics.num_samples, metrics.top1_wrong, metrics.top5_wrong, metrics.loss_sum])
        return Metrics(*(int(count) for count in rows[:, :3].sum(axis=0)), float(rows[:, 3].sum()))

    def sum(self, arrays):
        """Replace arrays by their sums over the ranks, in place. Returns before they are there, as MXNet does.

        Arguments:
            arrays: dict from name to float32 NDArray, of the same names and shapes on all ranks.
        """
        if self.size == 1 or not arrays:
            return
        if self._num_pairs == 1:
            self._add_up(arrays, arrays.values())
            return
        for name, array in arrays.items():
            if name not in self._pairs:
                self._pairs[name] = mx.nd.empty((self._num_pairs, *array.shape), ctx=array.context)
            nothing = -mx.nd.zeros((1,) * array.ndim, ctx=array.context)  # -0.0 leaves every number as it is
            for i in range(self._num_pairs):
                mx.nd.broadcast_to(nothing, array.shape, out=self._pairs[name][i])
            array.copyto(self._pairs[name][self.rank // 2])
        self._add_up(arrays, [self._pairs[name] for name in arrays])
        for name, array in arrays.items():
            pairs = [self._pairs[name][i] for i in range(self._num_pairs)]
            mx.nd.elemwise_add(pairs[0], pairs[1], out=array)
            for pair in pairs[2:]:
                array += pair

    def broadcast(self, arrays):
        """Replace arrays, see `sum`, by those of rank 0."""
        if self.size > 1:
            if not self.leads:
                for array in arrays.values():
                    array[:] = 0
                    array *= -1  # -0.0, the number that leaves every other, -0.0 too, as it is
            self.sum(arrays)
            mx.nd.waitall()  # the next sum of the same name would not wait
            self._pairs.clear()  # those of the optimizer's states are not needed again

    def _add_up(self, names, arrays):
        new = {name: array for name, array in zip(names, arrays) if name not in self._keys}
        if new:
            keys = list(range(len(self._keys), len(self._keys) + len(new)))
            self._keys.update(zip(new, keys))
            # Without it the server takes the first gradient that comes for the value, and says nothing.
            self._kvstore.init(keys, [mx.nd.zeros_like(array) for array in new.values()])
        for i, (name, array) in enumerate(zip(names, arrays)):
            self._kvstore.pushpull(self._keys[name], array, out=array, priority=-i)

    def refuse_differences(self, settings, what='was started with other settings'):
        """Raise UserError on every rank unless `settings`, a dict that JSON can hold, is the same on all of them."""
        first, *others = self.gather_objects(settings)
        for i, other in enumerate(others, 1):
            differing = [f'{key}: {other.get(key)} there, {first.get(key)} on worker 0'
                         for key in sorted(set(first) | set(other)) if first.get(key) != other.get(key)]
            if differing:
                raise UserError(f"worker {i} {what} than worker 0 ({'; '.join(differing)}); all must be the same")


#: One process.
ALONE = Ranks()


def code_digest():
    """SHA-256 of the package's source files, in hexadecimal."""
    folder = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.suffix in ('.py', '.cc', '.cu', '.h'):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def weights_digest(parameters):
    """SHA-256 of the weights and running statistics (dict from name to Parameter), in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(parameters[name].list_data()[0].asnumpy().tobytes())
    return digest.hexdigest()
