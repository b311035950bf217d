"""A run that is stopped anywhere and started again ends bit for bit as one that was not."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Augmentation (Digits shifts its images), dropout, momentum, a change of the rate, BatchNorm's running statistics,
# replicas, and a checkpoint after every single update.
CONFIG = """
train.norm = @BatchNorm
train.model = @ConvNet
ConvNet.channels = (8, 16)
ConvNet.dropout = 0.5
train.dataset = @Digits
Digits.num_train = 96
Digits.num_validation = 50
train.optimizer = @SGD
train.schedule = @StepSchedule
StepSchedule.epochs = (1, 2)
train.num_replicas = 2
train.batch_per_replica = 8
train.num_epochs = 3
train.learning_rate = 0.05
checkpoint.minutes = 1e-6
"""

# Runs the command with a SIGKILL at the N-th call of one function.
KILLER = """
import importlib, os, runpy, signal, sys
module, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
import gn_gluon
place = importlib.import_module(module)
for part in name.split('.')[:-1]:
    place = getattr(place, part)
original = getattr(place, name.split('.')[-1])
calls = []
def counted(*args, **kwargs):
    calls.append(0)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(place, name.split('.')[-1], counted)
sys.argv[1:] = sys.argv[4:]
runpy.run_module('gn_gluon.train', run_name='__main__')
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('resume')
    (path / 'run.gin').write_text(CONFIG)
    return path


def command(folder, name, *extra):
    return ['--gin_file', str(folder / 'run.gin'), '--workdir', str(folder / name), *extra]


def train(folder, name, *extra, check=True):
    result = subprocess.run([sys.executable, '-m', 'gn_gluon.train', *command(folder, name, *extra)], cwd=CLONE,
                            capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def what_remains(folder, name):
    """Everything a run leaves that does not depend on the clock."""
    run = folder / name
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    timed = ('seconds', 'images_per_second', 'data_wait_share', 'peak_memory_bytes')
    return {
        'files': {str(path): (run / path).read_bytes()
                  for checkpoint in ('last', 'best') for path in (f'{checkpoint}/net.params',
                                                                  f'{checkpoint}/trainer.states')},
        'metrics': [{key: value for key, value in row.items() if key not in timed} for row in rows],
        'steps': (run / 'steps.jsonl').read_text()}


@pytest.fixture(scope='module')
def undisturbed(folder):
    train(folder, 'undisturbed')
    remains = what_remains(folder, 'undisturbed')
    assert len(remains['metrics']) == 6 and len(remains['steps'].splitlines()) == 18
    return remains


def kill_and_resume(folder, place, number):
    name = f'{place[1]}-{number}'
    killed = subprocess.run([sys.executable, '-c', KILLER, *place, str(number), *command(folder, name)], cwd=CLONE,
                            capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(folder, name)
    return what_remains(folder, name)


MID_EPOCH = ('gn_gluon.optim', 'Updater.update')
MID_WRITE = [('os', 'rename'), ('os', 'fsync'), ('mxnet.ndarray', 'save'), ('shutil', 'copytree')]


def test_kill_in_the_middle_of_an_epoch_changes_nothing(folder, undisturbed):
    assert kill_and_resume(folder, MID_EPOCH, 9) == undisturbed


def test_kill_between_the_two_renames_of_a_checkpoint_changes_nothing(folder, undisturbed):
    assert kill_and_resume(folder, MID_WRITE[0], 17) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize('place, number', [(place, number) for place, numbers in (
    (MID_WRITE[0], (1, 2, 3, 16, 18, 19, 30)), (MID_WRITE[1], (4, 5, 6, 7, 30)), (MID_WRITE[2], (1, 2, 13, 14)),
    (MID_WRITE[3], (1, 2)), (MID_EPOCH, (1, 6, 7, 18))) for number in numbers])
def test_kill_anywhere_changes_nothing(folder, undisturbed, place, number):
    assert kill_and_resume(folder, place, number) == undisturbed


OTHER_WAYS = {
    'adam': ['train.optimizer = @Adam', 'train.learning_rate = 0.001'],
    'cosine and clipping': ['train.schedule = @CosineSchedule', 'train.gradient_clip_norm = 0.5'],
    'two devices': ["train.devices = 'cpu(0-1)'"],
    'renorm': ['train.norm = @BatchRenorm'],
}


@pytest.mark.slow
@pytest.mark.parametrize('way', OTHER_WAYS)
def test_every_way_of_training_resumes(folder, way):
    config = CONFIG + '\n'.join(OTHER_WAYS[way])
    if 'CosineSchedule' in config:
        config = config.replace('StepSchedule.epochs = (1, 2)\n', '')
    path = folder / f'{way}.gin'
    path.write_text(config)
    arguments = ['--gin_file', str(path), '--workdir']
    for name in (f'{way} whole', f'{way} cut'):
        if name.endswith('cut'):
            killed = subprocess.run(
                [sys.executable, '-c', KILLER, *MID_EPOCH, '9', *arguments, str(folder / name)], cwd=CLONE,
                capture_output=True, text=True)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        subprocess.run([sys.executable, '-m', 'gn_gluon.train', *arguments, str(folder / name)], cwd=CLONE, check=True,
                       capture_output=True)
    assert what_remains(folder, f'{way} cut') == what_remains(folder, f'{way} whole')


@pytest.mark.slow
def test_kill_from_outside_at_odd_times_changes_nothing(folder, undisturbed):
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, '-m', 'gn_gluon.train', *command(folder, 'outside')], cwd=CLONE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        steps = folder / 'outside' / 'steps.jsonl'
        while process.poll() is None and (not steps.exists() or not steps.read_text()):
            time.sleep(0.02)
        time.sleep(0.03 * attempt)
        process.kill()
        process.wait()
    train(folder, 'outside')
    assert what_remains(folder, 'outside') == undisturbed


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_so_and_the_run_goes_on(folder, undisturbed, signum, code):
    name = f'signal-{code}'
    process = subprocess.Popen(
        [sys.executable, '-m', 'gn_gluon.train', *command(folder, name)], cwd=CLONE, stdout=subprocess.PIPE, text=True)
    steps = folder / name / 'steps.jsonl'
    while process.poll() is None and (not steps.exists() or len(steps.read_text().splitlines()) < 3):
        time.sleep(0.01)
    process.send_signal(signum)
    output = process.communicate()[0]
    assert process.returncode == code, output
    assert 'saved' in output
    train(folder, name)
    assert what_remains(folder, name) == undisturbed


def test_a_finished_run_is_not_trained_again(folder, undisturbed):
    train(folder, 'undisturbed')
    assert what_remains(folder, 'undisturbed') == undisturbed


def test_the_run_folder_alone_is_enough_to_go_on(folder, undisturbed):
    result = subprocess.run([sys.executable, '-m', 'gn_gluon.train', '--workdir', str(folder / 'undisturbed')],
                            cwd=CLONE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert what_remains(folder, 'undisturbed') == undisturbed


def test_another_config_is_refused_with_the_differing_lines(folder, undisturbed):
    result = train(folder, 'undisturbed', '--gin_bindings', 'SGD.momentum = 0.5', check=False)
    assert result.returncode == 2
    assert 'SGD.momentum: 0.9 there, 0.5 now' in result.stderr
    assert what_remains(folder, 'undisturbed') == undisturbed


def test_a_run_is_resumed_on_other_devices(folder, undisturbed):
    result = train(folder, 'undisturbed', '--gin_bindings', "train.devices = 'cpu(0-1)'")
    assert 'on 2 devices' in result.stdout
