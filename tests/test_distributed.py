"""Several processes train as one: real ones, started by tools/launch.py on this machine.

The quick tests are of two ranks that make the same as one process; the slow ones end processes in every way.
"""
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import mxnet as mx
import numpy as np
import pytest

from gn_gluon.distributed import ALONE
from gn_gluon.log import read_rows

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: Every sum of two processes takes time for messages, not for numbers: a small network is enough.
SMALL = ['ConvNet.channels = (8, 16)', 'ConvNet.dropout = 0', 'train.num_epochs = 2', 'Digits.num_train = 320']
#: Long enough to be hit in the middle, and saved every 0.6 seconds.
LONG = ['train.num_epochs = 30', 'checkpoint.minutes = 0.01']


def train_command(workdir, bindings=(), gin_file='gin/digits_gn_bs2.gin', kvstore='dist_sync', program=None):
    command = [sys.executable] + ([str(program)] if program else ['-m', 'gn_gluon.train'])
    command += ['--gin_file', gin_file, '--workdir', str(workdir)]
    for binding in list(bindings) + [f"train.kvstore = '{kvstore}'"]:
        command += ['--gin_bindings', binding]
    return command


def launch_command(workers, command, *flags):
    return [sys.executable, 'tools/launch.py', '--local', str(workers), *flags, '--', *command]


def environment(**variables):
    """One thread for every process: their number makes the last bits, as the number of workers does."""
    return dict(os.environ, OMP_NUM_THREADS='1', **variables)


def run(command, code=0, **variables):
    """Returns stdout and stderr of a command that must leave with `code`, with these environment variables."""
    done = subprocess.run(command, cwd=CLONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
                          env=environment(**variables))
    assert done.returncode == code, done.stdout
    return done.stdout


def one_process(workdir, bindings=(), gin_file='gin/digits_gn_bs2.gin', program=None):
    run(train_command(workdir, bindings, gin_file, 'device', program))


def weights(workdir, checkpoint='last'):
    return {name: array.asnumpy()
            for name, array in mx.nd.load(os.path.join(str(workdir), checkpoint, 'net.params')).items()}


def distance(first, second, start):
    """||first - second|| / ||first - start|| over the trainable weights."""
    def norm(a, b):
        return np.sqrt(sum(np.square(a[name].astype(np.float64) - b[name]).sum() for name in a
                           if 'running' not in name))
    return norm(first, second) / norm(first, start)


def initial_weights(bindings, gin_file='gin/digits_gn_bs2.gin'):
    from gn_gluon import config
    from gn_gluon.experiment import Built, Experiment
    config.parse([os.path.join(CLONE, gin_file)], list(bindings))
    built = Built(config.make(Experiment), 'none')
    built.initialize([mx.cpu()])
    return {name: parameter.data().asnumpy() for name, parameter in built.parameters.items()}


def bits(workdir):
    """What a run must leave the same to the last bit: checksums, and the rows but for times."""
    def digest(name):
        with open(os.path.join(str(workdir), name), 'rb') as file:
            return hashlib.sha256(file.read()).hexdigest()
    rows = [{name: value for name, value in row.items()
             if name in ('epoch', 'split', 'loss', 'top1_error', 'num_samples', 'weights_sha256')}
            for row in read_rows(os.path.join(str(workdir), 'metrics.jsonl'))]
    return [digest(name) for name in ('last/net.params', 'last/trainer.states', 'best/net.params')], rows


# ------------------------------------------------------------------------- the same as one process

def check_against_one_process(tmp_path, workers, gin_file, bindings, program=None, kvstore='dist_sync'):
    one_process(tmp_path / 'one', bindings, gin_file, program)
    run(launch_command(workers, train_command(tmp_path / 'several', bindings, gin_file, kvstore, program)))
    one, several = weights(tmp_path / 'one'), weights(tmp_path / 'several')
    start = initial_weights(bindings, gin_file)
    assert distance(one, several, start) <= 1e-5
    assert any(not np.array_equal(one[name], start[name]) for name in one)
    for name in one:
        if 'running' in name:
            np.testing.assert_allclose(several[name], one[name], rtol=1e-5, atol=1e-6)
            assert not np.array_equal(one[name], start[name])
    logs = {name: [read_rows(tmp_path / run / name) for run in ('one', 'several')]
            for name in ('steps.jsonl', 'metrics.jsonl')}
    assert all(len(first) == len(second) > 1 for first, second in logs.values())
    for first, second in zip(*logs['steps.jsonl']):
        assert first['update'] == second['update'] and first['learning_rate'] == second['learning_rate']
        assert first['loss'] == pytest.approx(second['loss'], rel=1e-4)
    for first, second in zip(*logs['metrics.jsonl']):
        assert (first['num_samples'], first['split']) == (second['num_samples'], second['split'])
        assert first['loss'] == pytest.approx(second['loss'], rel=1e-4)


def test_two_workers_of_group_norm_make_the_weights_of_one_process(tmp_path):
    check_against_one_process(tmp_path, 2, 'gin/digits_gn_bs2.gin', SMALL, kvstore='dist_device_sync')


def test_two_workers_of_batch_norm_have_the_statistics_of_each_replica_of_one_process(tmp_path):
    check_against_one_process(tmp_path, 2, 'gin/digits_bn_bs2.gin', SMALL + ['train.num_epochs = 1'])


@pytest.mark.slow
@pytest.mark.parametrize('bindings', [
    ['train.gradient_clip_norm = 0.1'],
    ['train.optimizer = @Adam', 'train.base_learning_rate = 0.001'],
    ['train.images_at_once = 3', 'train.devices = ("cpu(0)", "cpu(1)")'],  # accumulated over replicas and devices
    ['train.schedule = @CosineSchedule', 'CosineSchedule.warmup_epochs = 1'],
])
def test_every_part_of_an_update_works_the_same_with_two_workers(tmp_path, bindings):
    check_against_one_process(tmp_path, 2, 'gin/digits_gn_bs2.gin', SMALL + bindings)


@pytest.mark.slow
def test_a_loss_scale_that_overflows_leaves_out_the_same_updates_on_all_ranks(tmp_path):
    # float16 itself is for GPUs; its scale is not.
    patch = """
from gn_gluon import optim
original = optim.Updater.__init__
def initialize(self, *arguments, **keywords):
    original(self, *arguments, **keywords)
    self._scaler = optim.LossScaler()
    self._scaler._loss_scale = 2.0 ** 126
optim.Updater.__init__ = initialize
"""
    check_against_one_process(tmp_path, 2, 'gin/digits_gn_bs2.gin', SMALL, program(tmp_path, patch))
    scales = []
    for name in ('one', 'several'):
        with open(tmp_path / name / 'last' / 'state.json') as file:
            scales.append(json.load(file)['optimizer']['loss_scaler']['_loss_scale'])
    assert scales == [2.0 ** 15] * 2  # once halved from its first value


@pytest.mark.slow
@pytest.mark.parametrize('gin_file, bindings', [
    ('gin/digits_gn_bs2.gin', ['train.reproducible = False']),
    ('gin/digits_bn_bs2.gin', ['train.devices = ("cpu(0)", "cpu(1)")', 'train.validation_batch = 100'])])
def test_replicas_that_three_workers_cannot_share_equally_make_the_same_update(tmp_path, gin_file, bindings):
    check_against_one_process(tmp_path, 3, gin_file, SMALL + ['train.num_epochs = 1'] + bindings)


@pytest.mark.slow
def test_a_run_of_three_workers_repeats_bit_for_bit(tmp_path):
    for name in ('first', 'second'):
        run(launch_command(3, train_command(tmp_path / name, SMALL), '--servers', '2'))
    assert bits(tmp_path / 'first') == bits(tmp_path / 'second')


# ------------------------------------------------------------------------------------ data and ranks

PATCHED = """
import json, os, sys
sys.path.insert(0, {clone!r})
from gn_gluon import train
from gn_gluon.errors import command
RANK = os.environ.get('GN_GLUON_WORKER')
{patch}
command(train.main)
"""


def program(tmp_path, patch):
    """A program that is gn_gluon.train but for `patch`, Python statements that each process runs at its start."""
    path = tmp_path / 'patched.py'
    path.write_text(PATCHED.format(clone=CLONE, patch=patch))
    return path


def test_three_ranks_see_every_image_of_an_epoch_once_in_an_order_of_that_epoch(tmp_path):
    patch = f"""
from gn_gluon.data import Digits
original = Digits.train_batch
def note(self, indices, draws):
    with open(os.path.join({str(tmp_path)!r}, 'seen ' + RANK), 'a') as file:
        file.write(json.dumps([int(i) for i in indices]) + '\\n')
    return original(self, indices, draws)
Digits.train_batch = note
"""
    bindings = SMALL + ['train.num_replicas = 8', 'train.batch_per_replica = 4']
    run(launch_command(3, train_command(tmp_path / 'run', bindings, program=program(tmp_path, patch))))
    seen = []
    for rank in range(3):
        with open(tmp_path / f'seen {rank}') as file:
            batches = [json.loads(line) for line in file]
        batches = [batch for batch in batches if len(batch) in (8, 12)]  # not the pictures for TensorBoard
        assert len(batches) == 20  # equal steps, though 8 replicas are not 3 equal shares
        seen.append(batches)
    epochs = [[image for rank in seen for batch in rank[start:start + 10] for image in batch] for start in (0, 10)]
    for images in epochs:
        assert sorted(images) == list(range(320))
    assert epochs[0] != epochs[1]


def test_one_process_alone_gathers_itself():
    assert ALONE.gather([1, 2]).tolist() == [[1, 2]] and ALONE.gather_objects('x') == ['x']
    assert ALONE.share(8) == (0, 8) and ALONE.leads
    ALONE.refuse_differences({'seed': 1})


@pytest.mark.slow
def test_the_benchmark_of_several_workers_measures_what_they_send():
    table = run([sys.executable, 'tools/bench_scaling.py', '--gin_file', 'gin/digits_gn_bs2.gin', '--workers', '2',
                 '--updates', '3', '--rounds', '1'])
    megabytes = {line[:9].strip(): float(line.split()[-1]) for line in table.splitlines()
                 if line.startswith(('alone', '2 workers'))}
    gradients = 4 * sum(array.size for array in initial_weights([]).values()) / 1e6
    # Each of the two sends them once and receives them once.
    assert megabytes['2 workers'] == pytest.approx(4 * gradients, rel=0.3) and megabytes['alone'] == 0


# -------------------------------------------------------------------------------- what is refused

def test_a_worker_with_other_settings_is_refused_at_the_start(tmp_path):
    patch = "sys.argv += ['--gin_bindings', 'train.seed = 5'] if RANK == '1' else []"
    output = run(launch_command(2, train_command(tmp_path / 'run', SMALL, program=program(tmp_path, patch)),
                                '--restarts', '2'), code=2)
    assert 'worker 1 was started with other settings than worker 0 (train.seed: 5 there, 0 on worker 0)' in output
    assert not (tmp_path / 'run').exists() and 'start 2' not in output


@pytest.mark.slow
def test_a_worker_with_other_code_or_other_data_is_refused_at_the_start(tmp_path):
    shutil.copytree(os.path.join(CLONE, 'gn_gluon'), tmp_path / 'other' / 'gn_gluon')
    shutil.copytree(os.path.join(CLONE, 'gin'), tmp_path / 'other' / 'gin')
    with open(tmp_path / 'other' / 'gn_gluon' / 'loop.py', 'a') as file:
        file.write('# one more line\n')
    path = program(tmp_path, '')
    path.write_text(path.read_text().replace(repr(CLONE), f"[{CLONE!r}, {str(tmp_path / 'other')!r}]"
                                                          "[os.environ.get('GN_GLUON_WORKER') == '1']"))
    output = run(launch_command(2, train_command(tmp_path / 'run', SMALL, program=path)), code=2)
    assert 'worker 1 was started with other settings than worker 0 (the code of gn_gluon' in output
    patch = "sys.argv += ['--gin_bindings', 'Digits.num_train = 321'] if RANK == '1' else []"
    output = run(launch_command(2, train_command(tmp_path / 'run', SMALL, program=program(tmp_path, patch))), code=2)
    assert 'num_train' in output


@pytest.mark.slow
def test_weights_that_differ_between_ranks_stop_the_run(tmp_path):
    patch = """
from gn_gluon import optim
original = optim.Updater.update
def update(self, *arguments):
    original(self, *arguments)
    if RANK == '1' and self.num_updates == 5:
        self.trainer._params[0].data()[:] *= 1.0001
optim.Updater.update = update
"""
    output = run(launch_command(2, train_command(tmp_path / 'run', SMALL, program=program(tmp_path, patch))), code=2)
    assert 'worker 1 has other weights than worker 0 (SHA-256 after update 10:' in output


def test_a_kvstore_for_several_processes_and_one_process_alone_exclude_each_other(tmp_path):
    output = run(train_command(tmp_path / 'run', SMALL), code=2)
    assert "train.kvstore = 'dist_sync' is for several processes; start them with: python tools/launch.py" in output
    output = run(train_command(tmp_path / 'run', SMALL, kvstore='device'), code=2, DMLC_ROLE='worker',
                 DMLC_NUM_WORKER='2')
    assert "this process is one of 2 workers, but train.kvstore = 'device' trains alone" in output


@pytest.mark.slow
def test_more_workers_than_replicas_are_refused(tmp_path):
    bindings = SMALL + ['train.num_replicas = 1', 'train.batch_per_replica = 32']
    output = run(launch_command(2, train_command(tmp_path / 'run', bindings)), code=2)
    assert '2 workers for train.num_replicas = 1 replicas' in output


@pytest.mark.slow
def test_a_server_unpickles_nothing_and_a_training_sends_nothing_to_unpickle(tmp_path):
    output = run(launch_command(2, train_command(tmp_path / 'run', SMALL)))
    assert 'refused a command' not in output
    patch = f"""
import pickle
from gn_gluon import distributed
class Evil:
    def __reduce__(self):
        return os.mkdir, ({str(tmp_path / 'owned')!r},)
original = distributed.Ranks.leave
def leave(self):
    self._kvstore._send_command_to_servers(0, pickle.dumps(Evil(), 0).decode())
    original(self)
distributed.Ranks.leave = leave
"""
    output = run(launch_command(2, train_command(tmp_path / 'evil', SMALL, program=program(tmp_path, patch))))
    assert 'refused a command (0)' in output and not (tmp_path / 'owned').exists()


# ---------------------------------------------------------------------------------------- processes

class Job:
    """A launched training that a test watches and hurts. Leaves no process behind, and says if there was one."""

    def __init__(self, tmp_path, workers=2, flags=(), bindings=(), path=None, hosts=None):
        self.workdir = tmp_path / 'run'
        self.log = tmp_path / 'run.log'
        where = ['--hosts', str(hosts)] if hosts else ['--local', str(workers)]
        command = train_command(self.workdir, SMALL + LONG + list(bindings), program=path)
        with open(self.log, 'w') as log:
            self.launcher = subprocess.Popen(
                [sys.executable, 'tools/launch.py', *where, *flags, '--', *command], cwd=CLONE, stdout=log,
                stderr=subprocess.STDOUT, env=environment(), start_new_session=True)

    def processes(self):
        """{name: pid} of the roles that run: 'scheduler', 'server', 'worker 0', 'worker 1'."""
        found = {}
        for pid in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError):
                with open(f'/proc/{pid}/cmdline', 'rb') as file:
                    words = file.read().decode(errors='replace').split('\0')
                with open(f'/proc/{pid}/environ', 'rb') as file:
                    variables = dict(entry.partition('=')[::2]
                                     for entry in file.read().decode(errors='replace').split('\0'))
                if str(self.workdir) in words and 'DMLC_ROLE' in variables:
                    name = variables['DMLC_ROLE']
                    found[name + ' ' + variables['GN_GLUON_WORKER'] if name == 'worker' else name] = int(pid)
        return found

    def wait_for_update(self, number, seconds=90):
        self.wait(lambda: len(read_rows(self.workdir / 'steps.jsonl')) >= number, seconds)

    def wait(self, condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.output()
            assert self.launcher.poll() is None, self.output()
            time.sleep(0.02)

    def end(self, seconds=150):
        """Returns the exit code of the launcher once it and all others have ended."""
        code = self.launcher.wait(timeout=seconds)
        end = time.monotonic() + 15
        while self.processes():
            assert time.monotonic() < end, f'left behind: {self.processes()}'
            time.sleep(0.1)
        return code

    def output(self):
        return self.log.read_text()

    def clean(self):
        for pid in [self.launcher.pid, *self.processes().values()]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(**kwargs):
        jobs.append(Job(tmp_path, **kwargs))
        return jobs[-1]

    yield start
    for one in jobs:
        one.clean()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The bits of a run of two workers that nothing happened to."""
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    run(launch_command(2, train_command(workdir, SMALL + LONG)))
    assert len(read_rows(workdir / 'steps.jsonl')) == 300
    return bits(workdir)


@pytest.mark.slow
@pytest.mark.parametrize('victim', ['worker 0', 'worker 1', 'server', 'scheduler'])
def test_a_killed_process_is_named_and_the_restarted_run_ends_with_the_same_bits(job, undisturbed, victim):
    training = job(flags=['--restarts', '1'])
    training.wait_for_update(25)
    os.kill(training.processes()[victim], signal.SIGKILL)
    assert training.end() == 0, training.output()
    assert victim in training.output() and 'SIGKILL' in training.output()
    assert bits(training.workdir) == undisturbed


@pytest.mark.slow
def test_an_exception_in_one_rank_ends_all_and_shows_its_traceback(job, undisturbed, tmp_path):
    patch = f"""
from gn_gluon import optim
original = optim.Updater.update
def update(self, *arguments):
    mark = {str(tmp_path / 'raised')!r}
    if RANK == '1' and self.num_updates == 33 and not os.path.exists(mark):
        open(mark, 'w').close()
        raise RuntimeError('a fault for the test')
    original(self, *arguments)
optim.Updater.update = update
"""
    training = job(flags=['--restarts', '1'], path=program(tmp_path, patch))
    assert training.end() == 0, training.output()
    assert 'a fault for the test' in training.output() and 'worker 1' in training.output()
    assert bits(training.workdir) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize('victim', ['worker 1', 'server'])
def test_a_process_that_hangs_is_found_and_the_restarted_run_ends_with_the_same_bits(job, undisturbed, victim):
    training = job(flags=['--restarts', '1', '--timeout', '15'])
    training.wait_for_update(25)
    os.kill(training.processes()[victim], signal.SIGSTOP)
    assert training.end() == 0, training.output()
    assert bits(training.workdir) == undisturbed


@pytest.mark.slow
def test_a_rank_that_waits_for_ever_is_found_by_the_steps_that_are_missing(job, tmp_path):
    patch = """
import time
from gn_gluon import optim
original = optim.Updater.update
def update(self, *arguments):
    original(self, *arguments)
    if RANK == '1' and self.num_updates == 33:
        time.sleep(1000)
optim.Updater.update = update
"""
    training = job(flags=['--timeout', '8'], path=program(tmp_path, patch))
    assert training.end() == 4, training.output()
    assert 'worker 1' in training.output() and 'epoch 4, update 2 of 10' in training.output()


@pytest.mark.slow
def test_nobody_outlives_a_killed_launcher_and_the_next_goes_on(job, undisturbed):
    training = job()
    training.wait_for_update(25)
    training.launcher.kill()
    assert training.end() == -signal.SIGKILL
    again = job()
    assert again.end() == 0, again.output()
    assert bits(again.workdir) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_at_the_same_update_everywhere(job, undisturbed, signum, code):
    training = job(bindings=['checkpoint.minutes = 60'])
    training.wait_for_update(25)
    training.launcher.send_signal(signum)
    assert training.end() == code, training.output()
    with open(training.workdir / 'last' / 'state.json') as file:
        position = json.load(file)
    assert 10 * position['epoch'] + position['step'] == len(read_rows(training.workdir / 'steps.jsonl')) >= 25
    again = job()
    assert again.end() == 0, again.output()
    assert 'resuming' in again.output() and bits(again.workdir) == undisturbed


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers_or_in_one_process(job, undisturbed, tmp_path):
    training = job(workers=3)
    training.wait_for_update(25)
    training.launcher.send_signal(signal.SIGTERM)
    assert training.end() == 143
    shutil.copytree(training.workdir, tmp_path / 'alone')
    assert job(workers=2).end() == 0
    one_process(tmp_path / 'alone', SMALL + LONG)
    one_process(tmp_path / 'whole', SMALL + LONG)
    start = initial_weights(SMALL)
    for name in ('run', 'alone'):
        assert distance(weights(tmp_path / name), weights(tmp_path / 'whole'), start) <= 1e-5


@pytest.mark.slow
def test_ps_lite_listens_on_the_loopback_interface_alone(job):
    training = job(workers=2)
    training.wait_for_update(5)
    sockets = set()
    for pid in training.processes().values():
        for descriptor in os.listdir(f'/proc/{pid}/fd'):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(f'/proc/{pid}/fd/{descriptor}'))
    listening = set()
    for table in ('/proc/net/tcp', '/proc/net/tcp6'):
        with open(table) as file:
            for fields in map(str.split, file.readlines()[1:]):
                if fields[3] == '0A' and f'socket:[{fields[9]}]' in sockets:
                    listening.add(fields[1].split(':')[0])
    assert listening == {'0100007F'}  # 127.0.0.1


@pytest.fixture
def two_hosts(tmp_path):
    """Two network namespaces with a cable between them, and what runs a command in one, as ssh would.

    Yields the file of hosts, the words for --ssh, and cable('up') or cable('down').
    """
    addresses = {'10.177.0.1': 'gn_gluon_a', '10.177.0.2': 'gn_gluon_b'}

    def ip(*words, check=True):
        return subprocess.run(['ip', *words], check=check, stderr=subprocess.PIPE)

    if shutil.which('ip') is None or ip('netns', 'add', 'gn_gluon_a', check=False).returncode:
        pytest.skip('network namespaces cannot be made here (they need root and iproute2)')
    try:
        ip('netns', 'add', 'gn_gluon_b')
        ip('link', 'add', 'gn_a', 'netns', 'gn_gluon_a', 'type', 'veth', 'peer', 'name', 'gn_b', 'netns', 'gn_gluon_b')
        for address, name in addresses.items():
            ip('-n', name, 'link', 'set', 'lo', 'up')
            ip('-n', name, 'address', 'add', f'{address}/24', 'dev', f'gn_{name[-1]}')
            ip('-n', name, 'link', 'set', f'gn_{name[-1]}', 'up')
        shell = tmp_path / 'ssh'
        shell.write_text('#!/bin/sh\ncase $1 in 10.177.0.1) name=gn_gluon_a;; *) name=gn_gluon_b;; esac\nshift\n'
                         'exec ip netns exec $name sh -c "$*"\n')
        shell.chmod(0o755)
        hosts = tmp_path / 'hosts'
        hosts.write_text('\n'.join(addresses))
        yield hosts, str(shell), lambda state: ip('-n', 'gn_gluon_b', 'link', 'set', 'gn_b', state)
    finally:
        for name in addresses.values():
            ip('netns', 'del', name, check=False)


@pytest.mark.slow
def test_a_cut_cable_between_two_hosts_is_found_and_the_restarted_run_ends_with_the_same_bits(
        job, undisturbed, two_hosts):
    hosts, ssh, cable = two_hosts
    training = job(hosts=hosts, flags=['--ssh', ssh, '--timeout', '12', '--restarts', '1'])
    training.wait_for_update(25)
    cable('down')
    training.wait(lambda: 'no worker made a step for 12 s' in training.output(), 60)
    cable('up')
    assert training.end() == 0, training.output()
    assert 'start 2 of 1 + 1' in training.output() and bits(training.workdir) == undisturbed


@pytest.mark.slow
def test_twenty_random_kills_have_twenty_identical_endings(job, undisturbed):
    rng, kills = random.Random(0), 0
    while kills < 20:
        training = job(flags=['--restarts', '1'])
        end = time.monotonic() + rng.uniform(0.5, 7)  # a start takes about three seconds, the training as many
        while time.monotonic() < end and training.launcher.poll() is None:
            time.sleep(0.05)
        for _, victim in rng.sample(sorted(training.processes().items()), min(1, len(training.processes()))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGABRT]))
        assert training.end() == 0, training.output()
        assert bits(training.workdir) == undisturbed, (kills, training.output())
        kills += 'start 2 of 1 + 1' in training.output()  # else it came too late
        shutil.rmtree(training.workdir)
