"""Runs the contestants of a case: long-lived processes that take turns, as many at once as fit into memory."""
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'worker.py')
# OpenMP's threads spin for a while after their work (some 20 ms in PyTorch, where nothing tells them not to), which
# would fall into the next contestant's turn.
REST_SECONDS = 0.05
SPARE_MEMORY = 2 ** 30
MEMORY_RUNS = 3


class Absent(Exception):  # noqa: N818 - nobody's error
    """A contestant that cannot take part, and why."""


class Worker:
    """The process of one contestant, `environment(contestant, case)` its variables. Raises Absent when it fails."""

    def __init__(self, contestant, case, environment):
        self.errors = tempfile.TemporaryFile('w+', errors='replace')
        self.process = subprocess.Popen(
            [sys.executable, WORKER, json.dumps(dict(case, contestant=contestant._asdict()))],
            env=environment(contestant, case), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True)

    def receive(self):
        """The worker's next message, a dict."""
        line = self.process.stdout.readline()
        message = json.loads(line) if line.endswith('\n') else {'problem': self._last_words()}
        if 'problem' in message:
            raise Absent(message['problem'])
        return message

    def turn(self):
        """Let it take its steps; returns {name: seconds}."""
        with contextlib.suppress(BrokenPipeError):  # then `receive` knows more
            print(file=self.process.stdin, flush=True)
        return self.receive()['values']

    def end(self):
        """The worker ends when its input does."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _last_words(self):
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ['it said nothing']
        if code < 0:
            return f'ended by {signal.Signals(-code).name}'
        return f'ended with exit code {code}: {lines[-1]}'


def environment_for(environ, threads, extra, contestant, case):
    """The variables of a contestant's process.

    Arguments:
        environ: those of this process before gn_gluon, which sets some for MXNet alone, was imported.
        threads: of OpenMP.
        extra: of --env: (framework or None for both, name, value).
    """
    environment = dict(environ, OMP_NUM_THREADS=str(threads))
    environment.pop('MXNET_OMP_MAX_THREADS', None)  # it would be preferred
    if contestant.framework == 'mxnet':
        # Beside MXNet's own norms stands the operator that gn_gluon chooses: its update of the weights is theirs too.
        environment.pop('GN_GLUON_OPERATOR', None)
        if contestant.operator:
            environment['GN_GLUON_OPERATOR'] = contestant.operator
    if case.get('instrument') == 'primitives':
        environment.update(DNNL_VERBOSE='1', ONEDNN_VERBOSE='1')  # the names of oneDNN 2 and 3
    environment.update((name, value) for framework, name, value in extra if framework in (None, contestant.framework))
    return environment


def available_memory():
    """Bytes that processes can still take without swapping."""
    with open('/proc/meminfo') as file:
        return int(re.search(r'^MemAvailable:\s+(\d+) kB$', file.read(), re.MULTILINE).group(1)) * 1024


def measure(case, contestants, rounds, environment, say):
    """Interleaved measurements of a case.

    The processes take their turns one after the other, in another order each round. Those that do not fit into memory
    beside the others wait; they form the next group, in which the reference, the first contestant that takes part, is
    measured again, so that each contestant has a reference measured in the same rounds.

    Arguments:
        contestants: in the order of their start. rounds: turns of each.
        environment: of a contestant and a case, see Worker. say: function that takes a line about the progress.
    Returns ({name: {'group', 'values', 'reference', 'reference_values'}}, {name: why it is absent}); the values are
    {layer, or '' for a network: [seconds per step, one for each round]}.
    """
    results, absent = {}, {}
    waiting = list(contestants)
    reference, group, largest = None, 0, 0
    workers = {}
    try:
        while waiting:
            while waiting and (len(workers) < (2 if reference else 1)
                               or available_memory() > 2 * largest + SPARE_MEMORY):  # twice: the next may need more
                contestant = waiting.pop(0)
                worker = Worker(contestant, case, environment)
                workers[contestant.name] = worker  # before it answers, so that it is ended whatever happens
                try:
                    started = worker.receive()
                    say(f"{contestant.name} is warm: {started['peak_memory'] / 2 ** 20:.0f} MiB, steps in a turn: "
                        + ' '.join(map(str, started['steps_per_turn'].values())))
                    largest = max(largest, started['peak_memory'])
                    reference = reference or contestant.name
                except Absent as reason:
                    say(f'{contestant.name} is not available')
                    absent[contestant.name] = str(reason)
                    workers.pop(contestant.name).end()
            if not workers:
                break
            values = _rounds(workers, rounds, absent, say)
            if reference in absent:
                break
            for name in values:
                if name != reference or not group:
                    results[name] = {'group': group, 'values': values[name], 'reference': reference,
                                     'reference_values': values[reference]}
            for name in [name for name in workers if name != reference]:
                workers.pop(name).end()
            group += 1
    finally:
        for worker in workers.values():
            worker.end()
    for contestant in contestants:
        if contestant.name not in results:
            absent.setdefault(contestant.name, f'not measured, since {reference}, the reference, failed')
    return results, absent


def _rounds(workers, rounds, absent, say):
    """{name: {layer: [seconds of each round]}}; a worker that fails is ended and becomes absent."""
    values = {name: {} for name in workers}
    order = random.Random(0)
    for number in range(rounds):
        say(f'round {number + 1} of {rounds}, {len(workers)} processes')
        for name in order.sample(sorted(workers), len(workers)):
            time.sleep(REST_SECONDS)
            try:
                for layer, seconds in workers[name].turn().items():
                    values[name].setdefault(layer, []).append(seconds)
            except Absent as reason:
                absent[name] = f'failed in round {number + 1}: {reason}'
                workers.pop(name).end()
                del values[name]
    return values


def ask_once(case, contestant, environment):
    """The one answer of a process that then ends."""
    worker = Worker(contestant, case, environment)
    try:
        return worker.receive()
    finally:
        worker.end()


def measure_memory(case, contestants, environment, say):
    """Peak memory of fresh processes, one at a time. Returns as `measure`, the values in bytes."""
    results, absent = {}, {}
    for contestant in contestants:
        try:
            values = [ask_once(case, contestant, environment)['values'][''] for _ in range(MEMORY_RUNS)]
        except Absent as reason:
            say(f'{contestant.name} is not available')
            absent[contestant.name] = str(reason)
            continue
        say(f"{contestant.name}: {' '.join(f'{value / 2 ** 20:.0f}' for value in values)} MiB")
        reference = next(iter(results), contestant.name)
        results[contestant.name] = {'group': 0, 'values': {'': values}, 'reference': reference}
        results[contestant.name]['reference_values'] = results[reference]['values']
    return results, absent
