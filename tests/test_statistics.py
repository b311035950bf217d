"""BN's three kinds of statistics in evaluation, and the percentiles of a layer's responses over training."""
import contextlib
import json
import os
import statistics
import subprocess
import sys

import cv2
import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from gn_gluon import BatchNorm, BatchRenorm, GroupNorm, compat, config, eval, experiment, optim, plot
from gn_gluon.data import Synthetic, loader
from gn_gluon.errors import UserError, command
from gn_gluon.log import read_rows
from gn_gluon.loop import evaluate, predictions
from gn_gluon.metrics import headline
from gn_gluon.models import ConvNet
from gn_gluon.percentiles import Percentiles
from gn_gluon.statistics import batch_statistics, moments, population_moments, running_statistics

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BFLOAT16 = np.dtype([('bfloat16', np.uint16)])
DEVICES = [mx.cpu(0), mx.cpu(1)]

# ------------------------------------------------------------------------------------ the moments


@pytest.mark.parametrize('dtype', ['float32', 'float16', BFLOAT16], ids=['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('shape, mean', [((3, 4, 5, 7), 0), ((2, 8, 40, 40), 1000), ((6, 5), 3), ((1, 2, 9), 1)])
def test_moments_are_those_of_float64(shape, mean, dtype):
    x = mx.nd.array(np.random.default_rng(0).normal(mean, 2, shape)).astype(dtype)
    wide = x.astype('float32').asnumpy().astype('float64')
    axes = (0,) + tuple(range(2, len(shape)))
    got_mean, got_variance = moments(x)
    np.testing.assert_allclose(got_mean.asnumpy(), wide.mean(axes), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got_variance.asnumpy(), wide.var(axes), rtol=1e-5, atol=1e-6)


def small_network(norm):
    """Two 1x1 convolutions with norm and ReLU, dropout between them, on two devices, compiled as for training."""
    mx.random.seed(1)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 1, in_channels=3, use_bias=False), norm(in_channels=4, activation='relu'), nn.Dropout(0.5),
            nn.Conv2D(5, 1, in_channels=4, use_bias=False), norm(in_channels=5, activation='relu'), nn.Flatten(),
            nn.Dense(3, in_units=5 * 6 * 6))
    net.initialize(mx.init.Normal(1), ctx=DEVICES)
    rng = np.random.default_rng(1)
    for layer in (net[1], net[4]):
        layer.gamma.set_data(mx.nd.array(rng.uniform(0.5, 1.5, layer.gamma.shape)))
        layer.beta.set_data(mx.nd.array(rng.normal(size=layer.beta.shape)))
        layer.running_mean.set_data(mx.nd.array(rng.normal(size=layer.beta.shape)))
        layer.running_var.set_data(mx.nd.array(rng.uniform(0.2, 6, layer.beta.shape)))
    net.hybridize(static_alloc=True, static_shape=True)
    return net


def in_float64(net, images):
    """Logits of one batch as in a training step without dropout, and what enters each norm layer, in float64."""
    x, inputs = images.astype('float64'), []
    for convolution, norm in ((net[0], net[1]), (net[3], net[4])):
        gamma, beta, running_mean, running_var, weight = (
            parameter.data(DEVICES[0]).asnumpy().astype('float64') for parameter in (
                norm.gamma, norm.beta, norm.running_mean, norm.running_var, convolution.weight))
        x = np.einsum('oi,nihw->nohw', weight[:, :, 0, 0], x)
        inputs.append(x)
        mean, deviation = x.mean((0, 2, 3)), np.sqrt(x.var((0, 2, 3)) + 1e-5)
        r, d = 1, 0
        if isinstance(norm, BatchRenorm):
            running_deviation = np.sqrt(running_var + 1e-5)
            r = np.clip(deviation / running_deviation, 1 / 1.5, 1.5)
            d = np.clip((mean - running_mean) / running_deviation, -0.5, 0.5)
        scale, shift = gamma * r / deviation, gamma * d + beta - gamma * r * mean / deviation
        x = np.maximum(x * scale[:, None, None] + shift[:, None, None], 0)
    dense = [parameter.data(DEVICES[0]).asnumpy().astype('float64') for parameter in (net[6].weight, net[6].bias)]
    return x.reshape(len(x), -1) @ dense[0].T + dense[1], inputs


def batches_of(images, size):
    return [loader.Batch(images[i:i + size], np.zeros(size, np.int32), size) for i in range(0, len(images), size)]


def parameters_of(net):
    return {name: [array.asnumpy() for array in parameter.list_data()]
            for name, parameter in net._collect_params_with_prefix().items()}


@contextlib.contextmanager
def unchanged(net):
    """Fails when a parameter differs afterwards in a single bit, or the network is no longer compiled."""
    before = parameters_of(net)
    yield
    after = parameters_of(net)
    assert all(np.array_equal(a, b) for name in before for a, b in zip(before[name], after[name]))
    assert net._active and dict(net._flags)['static_alloc']


@pytest.mark.parametrize('devices', [DEVICES[:1], DEVICES], ids=['one device', 'two devices'])
@pytest.mark.parametrize('norm', [BatchNorm, BatchRenorm])
def test_batch_and_precise_statistics_are_those_of_float64_and_leave_no_trace(norm, devices):
    net = small_network(norm)
    images = np.random.default_rng(0).normal(0.3, 1, (20, 3, 6, 6)).astype('float32')
    batches = batches_of(images, 4)
    inference = [logits for _, logits in predictions(net, devices, batches)]
    wanted = [in_float64(net, batch.images) for batch in batches]
    with unchanged(net), batch_statistics(net):
        for (_, logits), (wanted_logits, _) in zip(predictions(net, devices, batches), wanted):
            np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-4)
    with unchanged(net):
        found, num_images = population_moments(net, devices, iter(batches))
    assert num_images == 20 and list(found) == [net[1], net[4]]
    for i, (mean, variance) in enumerate(found.values()):
        entered = np.concatenate([inputs[i] for _, inputs in wanted])
        np.testing.assert_allclose(mean, entered.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, entered.var((0, 2, 3)), rtol=1e-5)
    with unchanged(net), running_statistics(found):
        for layer, (mean, variance) in found.items():
            assert all(np.allclose(array.asnumpy(), mean) for array in layer.running_mean.list_data())
            assert all(np.allclose(array.asnumpy(), variance) for array in layer.running_var.list_data())
        recomputed = [logits for _, logits in predictions(net, devices, batches)]
    assert not np.allclose(recomputed, inference, atol=0.1)
    assert np.array_equal([logits for _, logits in predictions(net, devices, batches)], inference)


@pytest.mark.skipif('avx512bw' not in compat.processor_flags(),
                    reason='convolutions in bfloat16 need a processor with AVX-512')
def test_a_network_in_bfloat16_is_measured_as_in_float32():
    dataset = Synthetic(image_shape=(3, 16, 16), num_train=16, num_validation=8)
    dataset.load()
    found = []
    for dtype in ('float32', 'bfloat16'):
        mx.random.seed(0)
        net = ConvNet(norm=BatchNorm, channels=(16, 32), dropout=0)
        net.infer_shape(mx.nd.zeros((1, 3, 16, 16)))
        net.initialize(mx.init.Normal(0.1), force_reinit=True)
        net.cast(dtype)
        net.hybridize(static_alloc=True, static_shape=True)
        net(mx.nd.zeros((1, 3, 16, 16)))
        of_layers, _ = population_moments(net, [mx.cpu()], loader.train_batches(dataset, 4, 0, 0))
        percentiles = Percentiles(net, 'features.4', 8).measure(dataset, 0, mx.cpu(), 4)['percentiles']
        found.append([*np.concatenate([vector for pair in of_layers.values() for vector in pair]),
                      *percentiles.values()])
    np.testing.assert_allclose(found[1], found[0], rtol=0.03, atol=0.03)


def test_an_error_in_the_middle_leaves_no_trace_either():
    net = small_network(BatchNorm)
    net(mx.nd.zeros((4, 3, 6, 6)))
    with unchanged(net), pytest.raises(KeyError), batch_statistics(net):
        net(mx.nd.ones((4, 3, 6, 6)))
        raise KeyError


def test_one_batch_of_all_images_has_the_statistics_of_the_population():
    net = small_network(BatchNorm)
    images = np.random.default_rng(2).normal(size=(12, 3, 6, 6)).astype('float32')
    whole = batches_of(images, 12)
    found, _ = population_moments(net, DEVICES, whole)
    with batch_statistics(net):
        by_batch = evaluate(net, DEVICES, whole)
    with running_statistics(found):
        by_population = evaluate(net, DEVICES, batches_of(images, 5)[:2] + batches_of(images[10:], 2))
    assert by_population.top1_wrong == by_batch.top1_wrong and by_population.num_samples == 12
    assert by_population.loss == pytest.approx(by_batch.loss, rel=1e-5)


@pytest.mark.parametrize('number, batch_size, batches', [(7, 3, 3), (7, 7, 1), (7, 10, 1), (8, 4, 2), (9, 1, 9)])
def test_every_validation_image_counts_once_in_full_batches_of_different_images(number, batch_size, batches):
    dataset = Synthetic(image_shape=(1, 2, 2), num_train=4, num_validation=number, num_classes=number)
    dataset.load()  # image i has label i
    made = list(loader.full_validation_batches(dataset, batch_size, seed=3))
    assert len(made) == batches
    counted = []
    for batch in made:
        assert len(batch.images) == len(set(batch.labels)) == min(batch_size, number)
        np.testing.assert_array_equal(batch.images, dataset.validation_batch(batch.labels))
        counted += list(batch.labels[:batch.num_samples])
    assert sorted(counted) == list(range(number)) and (number < 8 or counted != sorted(counted))


# ------------------------------------------------------------------------------------ runs

CONFIG = """
train.norm = @{norm}
train.model = @ConvNet
ConvNet.channels = (8, 16)
ConvNet.dropout = 0.5
train.dataset = @Digits
Digits.num_train = 97
Digits.num_validation = 50
train.optimizer = @SGD
train.schedule = @StepSchedule
StepSchedule.epochs = (1, 2)
train.num_replicas = 2
train.batch_per_replica = 8
train.num_epochs = 3
train.learning_rate = 0.05
train.devices = 'cpu(0-1)'
"""
PERCENTILES = "percentiles.layer = 'features.3'\npercentiles.times_per_epoch = 3\npercentiles.num_images = 30\n"


def parsed(text, folder):
    path = folder.with_suffix('.gin')
    path.write_text(text)
    bindings = config.parse([str(path)])
    return config.make(experiment.Experiment), bindings


def train(folder, text):
    experiment.train(*parsed(text, folder), str(folder))


@pytest.fixture(scope='module')
def bn_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('statistics') / 'bn'
    train(folder, CONFIG.format(norm='BatchNorm') + PERCENTILES)
    return folder


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_eval_gives_three_figures_of_bn_and_the_median_and_leaves_the_run_as_it_was(bn_run):
    before = contents(bn_run)
    result = subprocess.run(
        [sys.executable, '-m', 'gn_gluon.eval', '--workdir', str(bn_run), '--json', '--statistics',
         'batch,running,precise', '--statistics_batch', '7', '--precise_images', '60'],
        cwd=CLONE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(bn_run) == before
    result = json.loads(result.stdout)
    batch, running, precise = result['figures']
    rows = [row for row in read_rows(bn_run / 'metrics.jsonl') if row['split'] == 'validation']
    assert result['headline'] == {
        'top1_error': statistics.median(row['top1_error'] for row in rows),
        'top5_error': statistics.median(row['top5_error'] for row in rows), 'epochs': 3, 'last_epoch': 3,
        'num_samples': 50}
    assert [result[key] for key in ('statistics', 'loss')] == ['batch', batch['loss']]
    assert [figure['num_samples'] for figure in result['figures']] == [50] * 3
    assert running['loss'] == pytest.approx(rows[-1]['loss'], rel=1e-5)
    assert batch['batch_size'] == precise['batch_size'] == 7 and 'batch_size' not in running
    assert precise['num_training_images'] == 56  # 8 full batches of 7
    assert len({figure['loss'] for figure in result['figures']}) == 3

    # The same by hand: the batches one by one, the moments of all 56 images.
    made, bindings = parsed((bn_run / 'config.gin').read_text(), bn_run.parent / 'again')
    built = experiment.Built(made, str(bn_run))
    built.load()
    built.initialize(DEVICES)
    experiment.load_weights(built, 'last')
    with batch_statistics(built.net):
        by_hand = evaluate(built.net, DEVICES, loader.full_validation_batches(built.dataset, 7, made.seed))
    assert batch['loss'] == pytest.approx(by_hand.loss, rel=1e-5)
    found, _ = population_moments(built.net, DEVICES,
                                  list(loader.train_batches(built.dataset, 7, made.seed, 0))[:8])
    with running_statistics(found):
        assert precise['loss'] == pytest.approx(
            evaluate(built.net, DEVICES, loader.validation_batches(built.dataset, 50)).loss, rel=1e-5)


def test_the_headline_is_the_median_of_the_last_five_epochs():
    rows = [{'split': split, 'epoch': epoch, 'top1_error': error, 'top5_error': error / 2, 'num_samples': 50}
            for epoch, error in enumerate([1, 90, 30, 50, 20, 40, 10]) for split in ('train', 'validation')]
    assert headline(rows) == {'top1_error': 30, 'top5_error': 15, 'epochs': 5, 'last_epoch': 7, 'num_samples': 50}
    assert headline(rows[:1]) is None


def test_a_norm_that_keeps_samples_apart_has_one_figure_whatever_is_asked(tmp_path):
    text = CONFIG.format(norm='GroupNorm').replace('num_epochs = 3', 'num_epochs = 1') + 'GroupNorm.num_groups = 4\n'
    train(tmp_path / 'gn', text)
    made, _ = parsed((tmp_path / 'gn' / 'config.gin').read_text(), tmp_path / 'again')
    one = experiment.evaluate_run(made, [], str(tmp_path / 'gn'))
    asked = experiment.evaluate_run(made, [], str(tmp_path / 'gn'), statistics=('running', 'batch', 'precise'))
    assert len(asked['figures']) == 1 and asked['statistics'] is None
    assert asked['loss'] == one['loss'] and asked['top1_error'] == one['top1_error']
    assert asked['headline']['epochs'] == 1


@pytest.mark.parametrize('arguments, part', [
    (['--statistics', 'running,moving'], "'moving' is none of running, batch, precise"),
    (['--statistics_batch', '0'], "'0' is not a whole number above 0"),
    (['--statistics', 'precise', '--precise_images', '3'], '3 training images do not fill one batch of 8')])
def test_statistics_that_cannot_be_are_named(bn_run, monkeypatch, capsys, arguments, part):
    monkeypatch.setattr(sys, 'argv', ['eval', '--workdir', str(bn_run), *arguments])
    with pytest.raises(SystemExit) as stop:
        command(eval.main)
    assert stop.value.code == 2 and part in capsys.readouterr().err


def test_eval_prints_the_median_first_and_says_what_each_figure_is_of(bn_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['eval', '--workdir', str(bn_run), '--statistics', 'running,batch,precise'])
    eval.main()
    median, running, batch, precise = capsys.readouterr().out.splitlines()
    assert median.startswith('median of the last 3 of 3 epochs: top-1 error ')
    assert 'last (3 epochs), running averages: top-1 error ' in running
    assert ', statistics of each batch of 8 validation images: ' in batch
    assert ', statistics of 96 training images in batches of 8: ' in precise
    assert all('top-5 error' in line and line.endswith('n = 50') for line in (median, running, batch, precise))


# ------------------------------------------------------------------------------------ percentiles

def test_percentiles_are_those_of_the_responses_before_the_activation():
    dataset = Synthetic(image_shape=(3, 8, 8), num_train=4, num_validation=11)
    dataset.load()
    net = ConvNet(norm=lambda **arguments: GroupNorm(num_groups=2, **arguments), channels=(4, 8))
    net.infer_shape(mx.nd.zeros((1, 3, 8, 8)))
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    before = net(mx.nd.ones((2, 3, 8, 8))).asnumpy()
    images = mx.nd.array(dataset.validation_batch(loader.epoch_order(11, 5, 0)[:7]))
    convolved = net.features[0](images).asnumpy().astype('float64')
    grouped = convolved.reshape(7, 2, -1)
    normed = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    for layer, responses in (('features.0', convolved), ('features.1', normed), ('output', net(images).asnumpy())):
        found = Percentiles(net, layer, num_images=7).measure(dataset, 5, mx.cpu(), images_at_once=3)
        assert found['layer'] == layer and found['num_images'] == 7
        np.testing.assert_allclose([found['percentiles'][which] for which in ('1', '20', '80', '99')],
                                   np.percentile(responses, [1, 20, 80, 99]), rtol=1e-4, atol=1e-5)
    assert net._active and (net(mx.nd.ones((2, 3, 8, 8))).asnumpy() == before).all()


def test_an_unknown_layer_is_an_error_that_lists_those_that_there_are():
    net = ConvNet(norm=BatchNorm, channels=(4, 8))
    with pytest.raises(UserError, match="conv5_3.* features.0, features.3; BatchNorm features.1, features.4; "
                                        "Dense output"):
        Percentiles(net, 'conv5_3')


def test_percentiles_go_into_the_run_folder_and_the_picture_and_change_no_weight(bn_run, tmp_path, monkeypatch):
    rows = read_rows(bn_run / 'percentiles.jsonl')
    assert [row['update'] for row in rows] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [row['epoch'] for row in rows][::3] == [0, 1, 2, 3]
    assert all(row['num_images'] == 30 and row['percentiles']['20'] < row['percentiles']['80'] for row in rows)
    assert cv2.imread(str(bn_run / 'percentiles.png')).shape[1] > 400
    monkeypatch.setattr(sys, 'argv', ['plot', str(bn_run), str(bn_run), '--percentiles', '--out',
                                      str(tmp_path / 'both.svg')])
    plot.main()
    assert 'features.3' in (tmp_path / 'both.svg').read_text()
    train(tmp_path / 'without', CONFIG.format(norm='BatchNorm'))
    assert not (tmp_path / 'without' / 'percentiles.jsonl').exists()
    assert (tmp_path / 'without/last/net.params').read_bytes() == (bn_run / 'last/net.params').read_bytes()


@pytest.mark.parametrize('update', [6, 12], ids=['before the first checkpoint', 'long after a checkpoint'])
def test_a_run_that_is_cut_off_and_resumed_has_every_percentile_once(bn_run, tmp_path, monkeypatch, update):
    made = optim.Updater.update

    def cut_off(self, learning_rate, batch_size):
        if self.num_updates + 1 == update:
            raise KeyboardInterrupt
        made(self, learning_rate, batch_size)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(optim.Updater, 'update', cut_off)
        train(tmp_path / 'run', CONFIG.format(norm='BatchNorm') + PERCENTILES)
    assert read_rows(tmp_path / 'run' / 'percentiles.jsonl')[-1]['update'] == update - 2
    train(tmp_path / 'run', CONFIG.format(norm='BatchNorm') + PERCENTILES)
    assert (tmp_path / 'run/percentiles.jsonl').read_text() == (bn_run / 'percentiles.jsonl').read_text()
