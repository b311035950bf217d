"""The commands of the README, end to end on real images: the embedded digits."""
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios

import cv2
import pytest
from sklearn.datasets import load_digits

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(module, *arguments, cwd=CLONE):
    environment = dict(os.environ, PYTHONPATH=CLONE)
    result = subprocess.run([sys.executable, '-m', module, *map(str, arguments)], cwd=cwd, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """Three epochs of GN at 2 images per replica, made from another folder than the clone."""
    folder = tmp_path_factory.mktemp('commands')
    output = run('gn_gluon.train', '--gin_file', 'gin/digits_gn_bs2.gin', '--gin_bindings', 'train.num_epochs = 3',
                 cwd=folder)
    assert '16 replicas x 2 images on 1 device' in output
    assert 'sees no GPU' in output and 'training on cpu(0)' in output or '(gpu(0))' in output
    assert output.count('\n') < 20 and 'runs/digits_gn_bs2/curves.png' in output
    return folder / 'runs' / 'digits_gn_bs2'


def test_a_run_leaves_what_the_design_promises(run_folder):
    for name in ('config.gin', 'environment.json', 'curves.png', 'last/net.params', 'last/trainer.states',
                 'last/state.json', 'best/net.params', 'steps.jsonl'):
        assert (run_folder / name).stat().st_size > 0, name
    assert cv2.imread(str(run_folder / 'curves.png')).shape[1] > 500
    rows = [json.loads(line) for line in (run_folder / 'metrics.jsonl').read_text().splitlines()]
    assert [(row['epoch'], row['split']) for row in rows] == [
        (epoch, split) for epoch in range(3) for split in ('train', 'validation')]
    for row in rows:
        assert {'loss', 'top1_error', 'top5_error', 'num_samples', 'images_per_second', 'learning_rate'} <= set(row)
        assert row['num_samples'] == (1408 if row['split'] == 'train' else 360)
    assert rows[-1]['top1_error'] < rows[1]['top1_error'] and rows[-1]['top1_error'] < 20
    assert len((run_folder / 'steps.jsonl').read_text().splitlines()) == 3 * 44


def test_tensorboard_files_hold_loss_error_rate_and_images(run_folder):
    from tensorboardX.proto import event_pb2
    tags = set()
    for path in (run_folder / 'tensorboard').iterdir():
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], 'little')
            event = event_pb2.Event.FromString(data[12:12 + size])
            tags |= {value.tag for value in event.summary.value}
            data = data[16 + size:]
    assert {'step/loss', 'train/loss', 'validation/top1_error', 'train/learning_rate'} <= tags
    assert any(tag.startswith('train_images') for tag in tags)


def test_eval_counts_the_whole_validation_set_and_agrees_with_training(run_folder):
    rows = [json.loads(line) for line in (run_folder / 'metrics.jsonl').read_text().splitlines()]
    for batch in (359, 361):
        result = json.loads(run('gn_gluon.eval', '--gin_file', 'gin/digits_gn_bs2.gin', '--json', '--gin_bindings',
                                f'train.validation_batch = {batch}', cwd=run_folder.parent.parent))
        assert result['num_samples'] == 360
        assert result['top1_error'] == rows[-1]['top1_error']
        assert result['loss'] == pytest.approx(rows[-1]['loss'], rel=1e-5)
    text = run('gn_gluon.eval', '--workdir', run_folder, '--checkpoint', 'best')
    assert 'top-1 error' in text and 'n = 360' in text


def test_predict_names_the_classes_of_image_files(run_folder, tmp_path):
    images, labels = load_digits(return_X_y=True)
    paths = []
    for i in range(20):
        paths.append(str(tmp_path / f'{i}.png'))
        cv2.imwrite(paths[-1], (images[i].reshape(8, 8) * 255 / 16).astype('uint8'))
    lines = run('gn_gluon.predict', *paths, '--workdir', run_folder).splitlines()
    first = [line.split(': ')[1].split(' ')[0] for line in lines]
    assert len(lines) == 20 and all(line.count('%') == 5 for line in lines)
    assert sum(name == str(label) for name, label in zip(first, labels)) >= 15


def test_a_terminal_gets_a_progress_bar_with_the_time_left(tmp_path):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))  # rows, columns
    process = subprocess.Popen(
        [sys.executable, '-m', 'gn_gluon.train', '--gin_file', 'gin/digits_gn_bs32.gin', '--workdir',
         str(tmp_path / 'run'), '--gin_bindings', 'train.num_epochs = 1'], cwd=CLONE, stdout=subprocess.PIPE,
        stderr=slave, text=True)
    os.close(slave)
    shown = b''
    try:
        while True:
            shown += os.read(master, 65536)
    except OSError:  # Linux says so when the other side is closed
        os.close(master)
    table = process.communicate()[0]
    assert process.returncode == 0
    assert b'epoch 1/1:' in shown and b'/44 [' in shown and b'update/s' in shown and b'loss=' in shown
    assert '1/1' in table


def test_curves_of_several_runs_go_into_one_picture(run_folder, tmp_path):
    run('gn_gluon.plot', run_folder, run_folder, '--out', tmp_path / 'both.svg')
    assert (tmp_path / 'both.svg').read_text().count('digits_gn_bs2') >= 1


@pytest.mark.slow
def test_weights_of_another_number_of_classes_start_a_run(run_folder, tmp_path):
    (tmp_path / 'five.gin').write_text(
        "include 'digits.gin'\ntrain.norm = @GroupNorm\nGroupNorm.num_groups = 8\ntrain.dataset = @Synthetic\n"
        "Synthetic.image_shape = (1, 8, 8)\nSynthetic.num_classes = 5\nSynthetic.num_train = 64\n"
        f"train.num_epochs = 1\ntrain.initial_weights = '{run_folder}/last/net.params'\n")
    output = run('gn_gluon.train', '--gin_file', tmp_path / 'five.gin', '--workdir', tmp_path / 'run')
    assert 'freshly initialized: output.weight, output.bias' in output


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['gn', 'bn'])
def test_the_first_command_reaches_its_error(norm, tmp_path):
    run('gn_gluon.train', '--gin_file', f'gin/digits_{norm}_bs2.gin', '--workdir', tmp_path / 'run')
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['num_samples'] == 360
    assert rows[-1]['top1_error'] <= (2.8 if norm == 'gn' else 10)
