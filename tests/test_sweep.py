"""A sweep: equal updates in every cell, nothing run twice or on a bad grid, a table of exactly what the runs say."""
import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import cv2
import numpy as np
import pytest

from gn_gluon import config, sweep
from gn_gluon.errors import UserError
from gn_gluon.experiment import Experiment
from gn_gluon.plot import plot_batch_sizes

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOL = os.path.join(CLONE, 'tools', 'sweep.py')
BATCHES = 'train.batch_per_replica=2,4'

TINY = """
train.norm = @BatchNorm
train.model = @ConvNet
ConvNet.channels = (8,)
train.dataset = @Digits
Digits.num_train = 96
Digits.num_validation = 50
train.optimizer = @SGD
train.schedule = @StepSchedule
StepSchedule.epochs = (1,)
train.num_replicas = 4
train.batch_per_replica = 2
train.num_epochs = 2
train.base_learning_rate = 0.05
train.reference_batch = 8
"""


def start(gin_file, out, *flags, **options):
    command = [TOOL, '--gin_file', str(gin_file), '--out', str(out), *flags]
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


def run(gin_file, out, *flags, code=0):
    process = start(gin_file, out, *flags)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, output + errors
    assert 'Traceback' not in errors
    return output + errors


def run_here(monkeypatch, capsys, gin_file, out, *flags):
    """The same without the seconds that a process takes to start."""
    monkeypatch.setattr(sys, 'argv', [TOOL, '--gin_file', str(gin_file), '--out', str(out), *flags])
    runpy.run_path(TOOL, run_name='__main__')
    return capsys.readouterr().out


def validation_errors(folder):
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [row['top1_error'] for row in rows if row['split'] == 'validation']


@pytest.fixture(scope='module')
def gin_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('sweep') / 'tiny.gin'
    path.write_text(TINY)
    return path


@pytest.fixture(scope='module')
def swept(gin_file):
    """Two cells of two seeds: the folder and what was printed."""
    out = gin_file.parent / 'swept'
    return out, run(gin_file, out, '--grid', BATCHES, '--seeds', '2', '--jobs', '2')


# -------------------------------------------------------------------------------------------------- the grid

def test_images_per_update_and_learning_rate_are_equal_in_every_cell(tmp_path):
    files = ['gin/digits_gn_bs2.gin', 'gin/digits_bn_bs2.gin']
    runs = sweep.make_runs(files, sweep.parse_grid(['train.batch_per_replica=2,4,8,16,32']), 3, [], str(tmp_path))
    cells = set()
    for each in runs:
        config.parse([each.gin_file], each.bindings)
        made = config.make(Experiment)
        cells.add((made.norm.__name__, made.batch_per_replica, made.seed))
        assert made.num_replicas * made.batch_per_replica == 32
        assert made.initial_rate == 0.05
    assert len(runs) == len(cells) == len({each.folder for each in runs}) == 2 * 5 * 3


@pytest.mark.parametrize('bindings, grid', [
    (['train.num_replicas = 8'], [BATCHES]), ([], [BATCHES, 'train.num_replicas=8'])])
def test_replicas_that_are_given_stay_as_the_paper_has_them(gin_file, tmp_path, bindings, grid):
    runs = sweep.make_runs([str(gin_file)], sweep.parse_grid(grid), 1, bindings, str(tmp_path))
    assert [(each.experiment.num_replicas, each.experiment.batch_size) for each in runs] == [(8, 16), (8, 32)]
    assert [each.experiment.initial_rate for each in runs] == [0.1, 0.2]


def test_a_comma_in_brackets_or_quotes_does_not_divide_a_value():
    grid = sweep.parse_grid(["StepSchedule.epochs = (1, 2), (2,)", "train.devices='cpu(0,1)',\"auto\""])
    assert grid == {'StepSchedule.epochs': ['(1, 2)', '(2,)'], 'train.devices': ["'cpu(0,1)'", '"auto"']}


@pytest.mark.parametrize('grid, bindings, words', [
    (['train.batch_per_replica'], [], ['train.batch_per_replica', 'form']),
    (['=2'], [], ['form']),
    (['train.batch_per_replica=2,2'], [], ['second time']),
    ([BATCHES, 'train.batch_per_replica=8'], [], ['second time']),
    (['train.batch_per_replica=2,3'], [], ['3 images per replica', '8 images per update', 'tiny.gin']),
    (['train.batch_per_replica=2,0'], [], ['batch_per_replica=0', 'above 0']),
    (['train.batch_per_replica=2,two'], [], ['two']),
    (['trian.batch_per_replica=2,4'], [], ['trian']),
    (['CosineSchedule.final_factor=0,0.1'], [], ['CosineSchedule.final_factor', 'does not use']),
    ([BATCHES], ['train.batch_per_replica = 4'], ['given twice']),
    ([BATCHES, 'train.seed=1,2'], [], ['train.seed', '--seeds']),
])
def test_a_bad_grid_is_refused_before_anything_runs(gin_file, tmp_path, grid, bindings, words):
    with pytest.raises(UserError) as error:
        sweep.make_runs([str(gin_file)], sweep.parse_grid(grid), 1, bindings, str(tmp_path / 'out'))
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_two_files_of_one_name_do_not_share_folders(gin_file, tmp_path):
    (tmp_path / 'tiny.gin').write_text(TINY + 'train.weight_decay = 0.0')
    with pytest.raises(UserError, match='share the folder'):
        sweep.make_runs([str(gin_file), str(tmp_path / 'tiny.gin')], {}, 1, [], str(tmp_path / 'out'))


def test_plan_prints_the_commands_and_writes_nothing(gin_file, tmp_path, monkeypatch, capsys):
    output = run_here(monkeypatch, capsys, gin_file, tmp_path / 'out', '--grid', BATCHES, '--plan')
    assert output.count('python -m gn_gluon.train') == 2 and '2 runs, 0 of them complete' in output
    assert 'train.num_replicas = 2' in output and not (tmp_path / 'out').exists()


# -------------------------------------------------------------------------------------------------- the table

def test_table_and_json_are_what_metrics_say(swept):
    out, printed = swept
    rows = json.loads((out / 'sweep.json').read_text())['rows']
    assert [row['batch_per_replica'] for row in rows] == [2, 4]
    table = [line for line in printed.splitlines() if line.startswith('| tiny.gin')]
    for row, line in zip(rows, table):
        errors = [np.median(validation_errors(out / name)[-5:]) for name in row['runs']]
        assert row['top1_error']['seeds'] == errors
        assert row['top1_error']['mean'] == pytest.approx(np.mean(errors))
        assert row['top1_error']['standard_deviation'] == pytest.approx(np.std(errors, ddof=1))
        assert (row['norm'], row['num_samples'], row['top1_error']['n']) == ('BatchNorm', 50, 2)
        figures = [f'{np.mean(errors):.2f}', f'{np.std(errors, ddof=1):.2f}', '2', *[f'{e:.2f}' for e in errors]]
        assert [cell.strip() for cell in line.split('|')[4:9]] == figures
        assert 'last 2 of 2' in line and ' 50 ' in line
    assert len(table) == 2 and '\n'.join(table) in (out / 'sweep.md').read_text()


def test_each_finished_run_is_a_line_with_its_error_and_its_log_is_kept(swept):
    out, printed = swept
    for number in range(1, 5):
        assert sum(line.startswith(f'{number} of 4 (') for line in printed.splitlines()) == 1
    for seed in (0, 1):
        name = f'tiny,batch_per_replica=4,seed={seed}'
        assert f'{name}: {np.median(validation_errors(out / name)):.2f} % error' in printed
        assert '2 replicas x 4 images' in (out / 'logs' / f'{name}.log').read_text()


def test_the_figure_has_both_panels_as_png_and_svg(swept):
    out, _ = swept
    image = cv2.imread(str(out / 'batch_sizes.png'))
    assert image.shape[1] > 800
    # Colours of BN, ours and the paper's, left and right; GN is the paper's alone.
    left, right = np.split(image, [image.shape[1] // 2], axis=1)
    blue, orange = (np.array([0xb4, 0x77, 0x1f]), np.array([0x0b, 0x54, 0xd9]))
    assert (left[:-60] == blue).all(axis=2).any() and (right[:-60] == blue).all(axis=2).any()
    assert not (left[:-60] == orange).all(axis=2).any() and (right[:-60] == orange).all(axis=2).any()
    assert xml.etree.ElementTree.parse(out / 'batch_sizes.svg').getroot().tag.endswith('svg')


def test_the_figure_of_the_same_rows_is_the_same_file(swept, tmp_path):
    rows = json.loads((swept[0] / 'sweep.json').read_text())['rows']
    plot_batch_sizes(rows, str(tmp_path / 'again.svg'))
    assert (tmp_path / 'again.svg').read_text() == (swept[0] / 'batch_sizes.svg').read_text()


# -------------------------------------------------------------------------------------------------- running

def test_what_is_complete_is_not_run_again_and_reported_all_the_same(gin_file, swept, monkeypatch, capsys):
    out, printed = swept
    files = ['logs/tiny,batch_per_replica=2,seed=0.log', 'tiny,batch_per_replica=2,seed=0/last/state.json']
    before = [(out / file).stat().st_mtime_ns for file in files]
    (out / 'batch_sizes.png').unlink()
    again = run_here(monkeypatch, capsys, gin_file, out, '--grid', BATCHES, '--seeds', '2')
    assert '4 of 4 runs are complete already' in again
    assert [line for line in again.splitlines() if line.startswith('|')] == [
        line for line in printed.splitlines() if line.startswith('|')]
    assert [(out / file).stat().st_mtime_ns for file in files] == before and (out / 'batch_sizes.png').exists()


def test_a_folder_of_another_experiment_is_refused(gin_file, swept):
    with pytest.raises(UserError, match=r'SGD.momentum: 0.9 there, 0.5 now'):
        sweep.make_runs([str(gin_file)], sweep.parse_grid([BATCHES]), 1, ['SGD.momentum = 0.5'], str(swept[0]))


@pytest.mark.parametrize('signum, code', [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_ends_all_runs_cleanly_and_the_same_command_goes_on(gin_file, swept, tmp_path, signum, code):
    flags = ['--grid', 'train.batch_per_replica=2', '--seeds', '2', '--jobs']
    # A terminal's Ctrl-C reaches the whole group.
    process = start(gin_file, tmp_path, *flags, '1', start_new_session=True)
    folders = [tmp_path / f'tiny,batch_per_replica=2,seed={seed}' for seed in (0, 1)]
    while process.poll() is None and not (folders[0] / 'steps.jsonl').exists():
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code and 'the same command goes on' in output, output + errors
    for folder in folders:
        if folder.exists():
            with open(folder / '.lock', 'w') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody trains there any more
    run(gin_file, tmp_path, *flags, '2')
    for folder in folders:
        undisturbed = swept[0] / folder.name
        assert (folder / 'last' / 'net.params').read_bytes() == (undisturbed / 'last' / 'net.params').read_bytes()
        assert validation_errors(folder) == validation_errors(undisturbed)


def test_a_failing_run_is_named_with_its_last_lines_and_the_others_go_on(gin_file, tmp_path):
    output = run(gin_file, tmp_path, '--grid', 'train.base_learning_rate=1e30,0.05', '--jobs', '1',
                 '--gin_bindings', 'train.num_epochs = 1', code=2)
    name = 'tiny,base_learning_rate=1e30,seed=0'
    assert f'{name} failed with exit code 3' in output
    assert '    error: ' in output and 'error: 1 of 2 runs failed' in output.splitlines()[-1]
    table = [line for line in output.splitlines() if line.startswith('| tiny.gin')]
    assert 'not run' in table[0] and 'last 1 of 1' in table[1]


@pytest.mark.slow
def test_other_statistics_of_bn_are_evaluated_once_and_stand_in_table_and_figure(gin_file, swept):
    out, _ = swept
    flags = ['--grid', BATCHES, '--seeds', '2', '--jobs', '2', '--statistics', 'running,batch,precise']
    printed = run(gin_file, out, *flags)
    evaluation = out / 'tiny,batch_per_replica=4,seed=1' / 'evaluation.json'
    figures = {figure['statistics']: figure['top1_error'] for figure in json.loads(evaluation.read_text())['figures']}
    assert list(figures) == ['running', 'batch', 'precise']
    assert figures['running'] == validation_errors(evaluation.parent)[-1]
    row = json.loads((out / 'sweep.json').read_text())['rows'][1]
    assert {name: error['seeds'][1] for name, error in row['statistics'].items()} == figures
    assert f"{row['statistics']['precise']['mean']:.2f} ±" in printed
    made = evaluation.stat().st_mtime_ns
    assert '4 of 4 runs are complete already' in run(gin_file, out, *flags)
    assert evaluation.stat().st_mtime_ns == made
