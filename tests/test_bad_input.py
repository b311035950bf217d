"""Bad input gets one sentence and exit code 2 (NaN loss 3), and nothing that was there is lost."""
import os
import pickle
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

GOOD = """
train.norm = @GroupNorm
GroupNorm.num_groups = 4
train.model = @ConvNet
ConvNet.channels = (8,)
ConvNet.dropout = 0.1
train.dataset = @Digits
Digits.num_train = 64
Digits.num_validation = 50
train.optimizer = @SGD
train.schedule = @StepSchedule
StepSchedule.epochs = (1,)
train.num_replicas = 2
train.batch_per_replica = 8
train.num_epochs = 1
train.learning_rate = 0.05
"""


def run(module, *arguments, cwd=CLONE, **options):
    environment = dict(os.environ, PYTHONPATH=CLONE)
    return subprocess.run([sys.executable, '-m', module, *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, **options)


def assert_refused(result, *parts, code=2):
    assert result.returncode == code, result.stdout + result.stderr
    assert 'Traceback' not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and result.stderr.splitlines()[-1] == lines[0]
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def gin_file(tmp_path):
    path = tmp_path / 'run.gin'
    path.write_text(GOOD)
    return path


# (what is bound on top, what the sentence must contain); the first ones are the quick part
BINDINGS = [
    ("GroupNorm.num_groups = 3", ['3', '8']),
    ("SGD.momentun = 0.9", ['momentun', '--gin_bindings']),
    ("CosineSchedule.final_factor = 0.1", ['CosineSchedule.final_factor', 'does not use']),
    ("train.learning_rate = 1e30", ['loss', 'update']),
    ("GroupNorm.channels_per_group = 4", ['num_groups', 'channels_per_group']),
    ("trian.num_epochs = 3", ['trian']),
    ("train.num_epochs = %NOPE", ['NOPE']),
    ("NOPE = 3", ['NOPE', 'does not use']),
    ("train.norm = @GroupNrom", ['GroupNrom']),
    ("train.norm = 'GroupNorm'", ['train.norm', '@GroupNorm']),
    ("train.num_epochs =", ['--gin_bindings']),
    ("train.num_replicas = 0", ['train.num_replicas = 0']),
    ("train.batch_per_replica = -2", ['train.batch_per_replica = -2']),
    ("train.batch_per_replica = 2.5", ['train.batch_per_replica = 2.5']),
    ("train.batch_per_replica = 64", ['64 training images', '2 replicas x 64 images']),
    ("train.num_epochs = 0", ['train.num_epochs = 0']),
    ("GroupNorm.num_groups = 0", ['0']),
    ("GroupNorm.num_groups = -4", ['-4']),
    ("train.learning_rate = None", ['train.learning_rate', 'nowhere']),
    ("train.weight_decay = -1", ['train.weight_decay']),
    ("train.dtype = 'float17'", ['float17']),
    ("train.kvstore = 'nope'", ['nope']),
    ("train.devices = 'gpu(64)'", ['gpu(64)', 'GPU']),
    ("train.devices = 'cpu(0-5)'", ['6 devices', '2 replicas']),
    ("train.seed = -1", ['train.seed']),
    ("train.seed = 5000000000", ['train.seed']),
    ("train.devices = 0", ['train.devices']),
    ("train.kvstore = 'nccl'", ['nccl', 'GPUs']),
    ("train.weight_decay = '1e-4'", ['config does not fit']),
    ("StepSchedule.epochs = 30", ['config does not fit', 'StepSchedule']),
    ("GroupNorm.num_groups = '8'", ['config does not fit', 'GroupNorm']),
    ("ConvNet.channels = (8, 8, 8, 8)", ['config does not fit']),
    ("train.model = @GroupNorm", ['config does not fit']),
    ("train.optimizer = @StepSchedule", ['train.optimizer', '@SGD']),
    ("train.initial_weights = 3", ['train.initial_weights']),
    ("train.batch_per_replica = 5000", ['64 training images']),
    ("StepSchedule.epochs = (5, 3)", ['StepSchedule.epochs']),
    ("SGD.momentum = 1.0", ['SGD.momentum']),
    ("ConvNet.channels = ()", ['channels']),
    ("checkpoint.minutes = 0", ['checkpoint.minutes']),
    ("train.initial_weights = 'none.params'", ['none.params', 'not found']),
    ("Digits.num_train = 100000", ['Digits.num_train', '1437']),
    ("import os", ['import']),
]


@pytest.mark.parametrize('binding, parts', [
    pytest.param(*case, marks=[pytest.mark.slow] if i >= 4 else []) for i, case in enumerate(BINDINGS)])
def test_a_bad_binding_is_named(gin_file, tmp_path, binding, parts):
    result = run('gn_gluon.train', '--gin_file', gin_file, '--gin_bindings', binding, '--workdir', tmp_path / 'run')
    assert_refused(result, *parts, code=3 if '1e30' in binding else 2)



@pytest.mark.slow
@pytest.mark.parametrize('name, text, parts', [
    ('nope.gin', None, ['nope.gin', 'not found']),
    ('empty.gin', '\n', ['empty.gin', 'is empty']),
    ('cut.gin', 'train.norm = @Group', ['cut.gin:1', 'Group']),
    ('syntax.gin', 'train.num_epochs = 3 * 4', ['syntax.gin:1']),
    ('include.gin', "include 'nope.gin'", ['nope.gin', 'include.gin']),
    ('loop.gin', "include 'loop.gin'", ['loop.gin', 'includes itself']),
    ('few.gin', 'train.num_epochs = 1', ['train.norm', 'not bound']),
])
def test_a_bad_gin_file_is_named(tmp_path, name, text, parts):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert_refused(run('gn_gluon.train', '--gin_file', tmp_path / name, '--workdir', tmp_path / 'run'), *parts)


@pytest.mark.slow
@pytest.mark.parametrize('module, arguments, parts', [
    ('gn_gluon.train', [], ['--gin_file']),
    ('gn_gluon.eval', [], ['--workdir']),
    ('gn_gluon.eval', ['--gin_file', 'gin/digits_gn_bs2.gin'], ['no run in', 'python -m gn_gluon.train']),
    ('gn_gluon.eval', ['--workdir', 'nowhere'], ['no run in nowhere']),
    ('gn_gluon.plot', ['nowhere'], ['nowhere', 'no finished epoch']),
    ('gn_gluon.predict', ['cat.jpg', '--workdir', 'nowhere'], ['no run in nowhere']),
    ('gn_gluon.train', ['--gin_file', 'gin/cifar_gn.gin'], ['tools/download.py --dataset CIFAR10']),
])
def test_a_command_without_its_input_says_what_to_do(tmp_path, module, arguments, parts):
    assert_refused(run(module, *arguments, cwd=tmp_path), *parts)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A finished run; each test works on a copy."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'run.gin').write_text(GOOD)
    result = run('gn_gluon.train', '--gin_file', folder / 'run.gin', '--workdir', folder / 'run')
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def run_copy(trained, tmp_path):
    return shutil.copytree(str(trained / 'run'), str(tmp_path / 'run'))


def cut(path):
    with open(path, 'r+b') as file:
        file.truncate(os.path.getsize(path) // 2)


@pytest.mark.slow
@pytest.mark.parametrize('file', ['net.params', 'trainer.states', 'state.json'])
def test_a_cut_checkpoint_is_named_and_left_alone(trained, run_copy, file):
    path = os.path.join(run_copy, 'last', file)
    cut(path)
    size = os.path.getsize(path)
    assert_refused(run('gn_gluon.train', '--gin_file', trained / 'run.gin', '--workdir', run_copy), path)
    assert_refused(run('gn_gluon.eval', '--workdir', run_copy), path)
    assert os.path.getsize(path) == size
    assert run('gn_gluon.eval', '--workdir', run_copy, '--checkpoint', 'best').returncode == 0


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_named(trained, run_copy):
    weights = os.path.join(run_copy, 'last', 'net.params')
    for binding, part in (('ConvNet.channels = (16,)', 'shape'), ('ConvNet.channels = (8, 8)', 'missing')):
        result = run('gn_gluon.eval', '--workdir', run_copy, '--checkpoint', weights, '--gin_bindings', binding)
        assert_refused(result, 'of another model', part)


@pytest.mark.slow
def test_an_unused_binding_of_eval_is_refused(run_copy):
    assert_refused(run('gn_gluon.eval', '--workdir', run_copy, '--gin_bindings', 'LayerNorm.epsilon = 1'),
                   'LayerNorm.epsilon', 'does not use')


@pytest.mark.slow
def test_eval_refuses_a_gin_file_that_is_not_the_runs(run_copy):
    assert_refused(run('gn_gluon.eval', '--gin_file', 'gin/digits_bn_bs2.gin', '--workdir', run_copy),
                   '@GroupNorm', '@BatchNorm')
    assert_refused(run('gn_gluon.eval', '--gin_file', 'gin/typo.gin', '--workdir', run_copy), 'typo.gin', 'not found')


@pytest.mark.slow
def test_optimizer_states_are_not_taken_for_weights(run_copy):
    states = os.path.join(run_copy, 'last', 'trainer.states')
    assert_refused(run('gn_gluon.eval', '--workdir', run_copy, '--checkpoint', states), 'of another model')


def write_h5(folder, number=20, spoil=None):
    """A set of `number` random images in 2 classes; `spoil(file, ids)` may break it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    ids = [f'image{i}' for i in range(number)]
    with h5py.File(folder / 'data.hy', 'w') as file:
        for i, name in enumerate(ids):
            group = file.create_group(name)
            group['image'] = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            group['label'] = np.eye(2, dtype=np.uint8)[i % 2]
        if spoil is not None:
            spoil(file, ids)
    (folder / 'id.txt').write_text(''.join(name + '\n' for name in ids))
    return folder


def replace(file, name, value):
    del file[name]
    file[name] = value


H5_FAULTS = {
    'an id that is not in the file': (lambda file, ids: ids.append('nobody'), ['nobody']),
    'an image of another shape': (
        lambda file, ids: replace(file, 'image3/image', np.zeros((9, 10, 3), np.uint8)), ['image3']),
    'a label that is not one-hot': (lambda file, ids: replace(file, 'image4/label', np.ones(2, np.uint8)), ['image4']),
    'no id at all': (lambda file, ids: ids.clear(), ['id.txt']),
}


@pytest.mark.slow
@pytest.mark.parametrize('fault', H5_FAULTS)
def test_a_fault_in_ones_own_images_is_named(tmp_path, fault):
    spoil, parts = H5_FAULTS[fault]
    folder = write_h5(tmp_path / 'mine', spoil=spoil)
    assert_refused(run('gn_gluon.train', '--gin_file', 'gin/h5_gn.gin', '--data_dir', folder, '--workdir',
                       tmp_path / 'run'), *parts)


@pytest.mark.slow
def test_ones_own_images_train_and_other_ones_do_not_resume_the_run(tmp_path):
    command = ['gn_gluon.train', '--gin_file', 'gin/h5_gn.gin', '--workdir', tmp_path / 'run', '--gin_bindings',
               'train.num_epochs = 2', '--gin_bindings', 'train.batch_per_replica = 8', '--gin_bindings',
               'CosineSchedule.warmup_epochs = 0']
    mine, others = write_h5(tmp_path / 'mine'), write_h5(tmp_path / 'others', 40)
    result = run(*command, '--data_dir', mine)
    assert result.returncode == 0, result.stderr
    assert run('gn_gluon.eval', '--workdir', tmp_path / 'run').stdout.endswith('n = 4\n')
    assert_refused(run(*command, '--data_dir', others), 'num_train', 'other data')


def empty(path):
    path.write_bytes(b'')


def cut_file(path):
    cut(str(path))


def mislabel(path):
    with open(path, 'rb') as file:
        batch = pickle.load(file)
    batch[b'labels'][7] = 10
    with open(path, 'wb') as file:
        pickle.dump(batch, file)


@pytest.mark.slow
@pytest.mark.parametrize('damage, parts', [(empty, ['empty']), (cut_file, []), (mislabel, ['label 10']),
                                           (lambda path: path.unlink(), [])])
def test_a_damaged_data_file_is_named(tmp_path, damage, parts):
    rng = np.random.default_rng(0)
    for name in ['test_batch'] + [f'data_batch_{i}' for i in range(1, 6)]:
        with open(tmp_path / name, 'wb') as file:
            pickle.dump({b'data': rng.integers(0, 256, (10000, 3072), dtype=np.uint8),
                         b'labels': [i % 10 for i in range(10000)]}, file)
    damage(tmp_path / 'data_batch_2')
    result = run('gn_gluon.train', '--gin_file', 'gin/cifar_gn.gin', '--data_dir', tmp_path, '--workdir',
                 tmp_path / 'run')
    assert_refused(result, *(parts + ([] if 'label 10' in parts else ['data_batch_2'])))


@pytest.mark.slow
def test_a_file_that_is_no_image_is_named(trained, run_copy, tmp_path):
    (tmp_path / 'cat.jpg').write_text('no image')
    assert_refused(run('gn_gluon.predict', tmp_path / 'cat.jpg', '--workdir', run_copy), 'cat.jpg')


def full_disk(limit):
    """No file of the child may grow beyond `limit` bytes."""
    import resource
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(trained, run_copy, tmp_path):
    weights = os.path.join(run_copy, 'last', 'net.params')
    before = open(weights, 'rb').read()
    # The same run with more epochs, in a folder that says so: it resumes, and cannot write its next checkpoint.
    config = os.path.join(run_copy, 'config.gin')
    text = open(config).read().replace('train.num_epochs = 1', 'train.num_epochs = 2')
    with open(config, 'w') as file:
        file.write(text)
    result = run('gn_gluon.train', '--gin_file', trained / 'run.gin', '--gin_bindings', 'train.num_epochs = 2',
                 '--workdir', run_copy, preexec_fn=full_disk(len(before) // 2))
    assert_refused(result, 'cannot write')
    assert open(weights, 'rb').read() == before
    assert run('gn_gluon.eval', '--workdir', run_copy).returncode == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_between_checkpoints_is_one_sentence_too(gin_file, tmp_path):
    # steps.jsonl is the first file to outgrow the limit
    result = run('gn_gluon.train', '--gin_file', gin_file, '--workdir', tmp_path / 'run', '--gin_bindings',
                 'train.num_epochs = 300', '--gin_bindings', 'checkpoint.minutes = 60',
                 preexec_fn=full_disk(20000))
    assert result.returncode == 2  # tensorboardX's own clean-up tells of its failure, too, after our sentence
    assert [line for line in result.stderr.splitlines() if line.startswith('error: cannot write')]


@pytest.mark.slow
def test_a_run_folder_that_cannot_be_made_is_named(gin_file, tmp_path):
    (tmp_path / 'file').write_text('')
    result = run('gn_gluon.train', '--gin_file', gin_file, '--workdir', tmp_path / 'file' / 'run')
    assert_refused(result, str(tmp_path / 'file' / 'run'), '--workdir')


@pytest.mark.slow
def test_a_nan_loss_keeps_the_last_good_checkpoint(trained, run_copy):
    config = os.path.join(run_copy, 'config.gin')
    text = open(config).read().replace('train.num_epochs = 1', 'train.num_epochs = 2')
    text = text.replace('StepSchedule.factor = 0.1', 'StepSchedule.factor = 1e+30')
    with open(config, 'w') as file:
        file.write(text)
    before = open(os.path.join(run_copy, 'last', 'net.params'), 'rb').read()
    result = run('gn_gluon.train', '--gin_file', config, '--workdir', run_copy)
    assert_refused(result, 'loss', 'update', code=3)
    assert open(os.path.join(run_copy, 'last', 'net.params'), 'rb').read() == before


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(gin_file, tmp_path):
    import fcntl
    (tmp_path / 'run').mkdir()
    with open(tmp_path / 'run' / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run('gn_gluon.train', '--gin_file', gin_file, '--workdir', tmp_path / 'run')
    assert_refused(result, 'another process')
