"""--benchmark: what is timed, with the experiment's data and without, and how times become figures."""
import json
import os
import subprocess
import sys

import pytest

from gn_gluon import benchmark, config, experiment
from gn_gluon.errors import UserError

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(gin_file, *bindings, num_updates=2, **kwargs):
    made = config.parse([gin_file], bindings)
    return benchmark.benchmark(config.make(experiment.Experiment), made, 'runs/x', num_updates=num_updates, **kwargs)


def test_the_warm_up_counts_neither_as_work_nor_as_waiting():
    assert benchmark.WARMUP_UPDATES == 3
    result = benchmark.measurement(done=[50, 60, 100, 102, 106, 110], waits=[40, 5, 5, 0.5, 0.5, 1], batch_size=16)
    assert result == {'images_per_second': 4.0, 'quartiles': (4.0, 6.0), 'data_wait_share': 0.2}


def test_an_experiment_is_timed_with_its_own_layout_alone_with_its_data_and_these_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run('gin/digits_bn_bs2.gin')
    assert result['layout'].startswith('16 replicas x 2 images on 1 device') and result['images_per_update'] == 32
    for name in ('compute', 'data', 'training'):
        first, third = result[name]['quartiles']
        assert 0 < first <= result[name]['images_per_second'] <= third
        assert 0 <= result[name]['data_wait_share'] <= 1
    assert result['compute']['data_wait_share'] < result['data']['data_wait_share']
    assert result['peak_memory_bytes'] > 2**27
    assert benchmark.table(result).count('images') >= 3
    assert not os.listdir(tmp_path)


def test_more_updates_than_an_epoch_has_are_timed(tmp_path):
    result = run('gin/digits_gn_bs2.gin', 'train.num_replicas = 300', num_updates=4)
    assert result['updates_per_epoch'] == 2 and result['training']['images_per_second'] > 0


def test_the_command_needs_no_data_and_says_where_they_are_missing(tmp_path):
    command = [sys.executable, '-m', 'gn_gluon.train', '--gin_file', 'gin/cifar_gn.gin', '--benchmark', '1', '--json',
               '--gin_bindings', 'train.batch_per_replica = 2']
    environment = dict(os.environ, PYTHONPATH=CLONE)
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    assert result['image_shape'] == [3, 32, 32] and result['images_per_update'] == 2 and result['norm'] == 'GroupNorm'
    assert result['compute']['images_per_second'] > 0 and result['data'] is None and result['training'] is None
    assert 'datasets/cifar10 is not there' in benchmark.table(result)
    assert not os.listdir(tmp_path)


def test_what_training_would_refuse_is_refused(tmp_path):
    with pytest.raises(UserError, match='is not in .*download.py --dataset CIFAR10'):
        run('gin/cifar_gn.gin', 'train.batch_per_replica = 2', num_updates=1, data_dir=str(tmp_path))
    with pytest.raises(UserError, match='Adam.beta1 = 0.8.* does not use it'):
        run('gin/digits_gn_bs2.gin', 'Adam.beta1 = 0.8')
