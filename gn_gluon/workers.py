"""Processes that work through numbered tasks and hand the results back in order, with bounded memory."""
import contextlib
import mmap
import multiprocessing
import multiprocessing.connection
import signal
import traceback

import cv2

from gn_gluon.errors import UserError

_AHEAD = 2  # tasks that a worker has at hand, so that it never waits for its next one


class Workers:
    """A context in which `run` is done by forked processes. They end with it, also when this process is killed.

    Arguments:
        number: of processes.
        work: `work(task, slot)`, called in a process. `task` and what it returns are pickled; `slot` is memory that
            both sides see, a writable view of `slot_bytes`, for results too large for that.
        inherited: open files of this process that the others close at once, as a lock that must end with it.
    """

    def __init__(self, number, work, slot_bytes=mmap.PAGESIZE, inherited=()):
        self._window = (_AHEAD + 1) * number
        memory = memoryview(mmap.mmap(-1, self._window * slot_bytes))
        self._slots = [memory[i * slot_bytes:(i + 1) * slot_bytes] for i in range(self._window)]
        self._work = work
        self._connections, self._processes = [], []
        # Not spawned: each would import MXNet, for seconds and hundreds of megabytes.
        context = multiprocessing.get_context('fork')
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(theirs, [ours, *self._connections, *inherited]),
                                      daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()

    def run(self, tasks):
        """Yields (result, slot) for each of `tasks`, in their order. The slot is reused once the next is asked for."""
        tasks = iter(tasks)
        finished, busy = {}, dict.fromkeys(self._connections, 0)
        submitted = consumed = 0
        while True:
            for connection in sorted(busy, key=busy.get):
                while busy[connection] < _AHEAD and submitted - consumed < self._window:
                    task = next(tasks, None)
                    if task is None:
                        break
                    self._send(connection, (submitted, task))
                    busy[connection] += 1
                    submitted += 1
            if consumed == submitted:
                return
            for connection in multiprocessing.connection.wait(self._connections, 0 if consumed in finished else None):
                number, result = self._receive(connection)
                busy[connection] -= 1
                finished[number] = result
            if consumed in finished:
                result = finished.pop(consumed)
                if isinstance(result, UserError):
                    raise result
                if isinstance(result, str):
                    raise RuntimeError(f'in a worker process:\n{result}')
                yield result[0], self._slots[consumed % self._window]
                consumed += 1

    def _serve(self, connection, inherited):
        for opened in inherited:  # else the end of the one process would not be seen in the other
            opened.close()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # sent to the whole group, but the first process's to act on
        cv2.setNumThreads(1)
        try:
            while True:
                number, task = connection.recv()
                try:
                    result = (self._work(task, self._slots[number % self._window]),)
                except UserError as error:
                    result = error
                except Exception:
                    result = traceback.format_exc()
                connection.send((number, result))
        except (EOFError, OSError):  # the first process has gone, or wants no more
            pass

    def _send(self, connection, message):
        with _watching():
            connection.send(message)

    def _receive(self, connection):
        with _watching():
            return connection.recv()


@contextlib.contextmanager
def _watching():
    try:
        yield
    except (EOFError, OSError):
        raise UserError('a worker process was ended from outside (for want of memory?); give fewer --workers, and the '
                        'same command goes on') from None
