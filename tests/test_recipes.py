"""The ImageNet files against a table written by hand from the paper: every figure here is typed, none computed."""
import glob
import os

import mxnet as mx
import numpy as np
import pytest

from gn_gluon import config, experiment, optim, plan
from gn_gluon.models import count_parameters

# Per file: model, depth, norm, what states its groups, images per replica, the paper's top-1 error in %.
CELLS = {
    'resnet50_bn_bs32': ('ResNet', 50, 'BatchNorm', None, 32, '23.6'),
    'resnet50_bn_bs16': ('ResNet', 50, 'BatchNorm', None, 16, '23.7'),
    'resnet50_bn_bs8': ('ResNet', 50, 'BatchNorm', None, 8, '24.8'),
    'resnet50_bn_bs4': ('ResNet', 50, 'BatchNorm', None, 4, '27.3'),
    'resnet50_bn_bs2': ('ResNet', 50, 'BatchNorm', None, 2, '34.7'),
    'resnet50_gn_bs32': ('ResNet', 50, 'GroupNorm', 'num_groups = 32', 32, '24.1'),
    'resnet50_gn_bs16': ('ResNet', 50, 'GroupNorm', 'num_groups = 32', 16, '24.2'),
    'resnet50_gn_bs8': ('ResNet', 50, 'GroupNorm', 'num_groups = 32', 8, '24.0'),
    'resnet50_gn_bs4': ('ResNet', 50, 'GroupNorm', 'num_groups = 32', 4, '24.2'),
    'resnet50_gn_bs2': ('ResNet', 50, 'GroupNorm', 'num_groups = 32', 2, '24.1'),
    'resnet50_ln_bs32': ('ResNet', 50, 'LayerNorm', None, 32, '25.3'),
    'resnet50_in_bs32': ('ResNet', 50, 'InstanceNorm', None, 32, '28.4'),
    'resnet50_br_bs4': ('ResNet', 50, 'BatchRenorm', None, 4, '26.3'),
    'resnet50_gn_g64': ('ResNet', 50, 'GroupNorm', 'num_groups = 64', 32, '24.6'),
    'resnet50_gn_g16': ('ResNet', 50, 'GroupNorm', 'num_groups = 16', 32, '24.6'),
    'resnet50_gn_g8': ('ResNet', 50, 'GroupNorm', 'num_groups = 8', 32, '24.4'),
    'resnet50_gn_g4': ('ResNet', 50, 'GroupNorm', 'num_groups = 4', 32, '24.6'),
    'resnet50_gn_g2': ('ResNet', 50, 'GroupNorm', 'num_groups = 2', 32, '24.7'),
    'resnet50_gn_cpg64': ('ResNet', 50, 'GroupNorm', 'channels_per_group = 64', 32, '24.4'),
    'resnet50_gn_cpg32': ('ResNet', 50, 'GroupNorm', 'channels_per_group = 32', 32, '24.5'),
    'resnet50_gn_cpg16': ('ResNet', 50, 'GroupNorm', 'channels_per_group = 16', 32, '24.2'),
    'resnet50_gn_cpg8': ('ResNet', 50, 'GroupNorm', 'channels_per_group = 8', 32, '24.3'),
    'resnet50_gn_cpg4': ('ResNet', 50, 'GroupNorm', 'channels_per_group = 4', 32, '24.8'),
    'resnet50_gn_cpg2': ('ResNet', 50, 'GroupNorm', 'channels_per_group = 2', 32, '25.6'),
    'resnet101_bn_bs32': ('ResNet', 101, 'BatchNorm', None, 32, '22.0'),
    'resnet101_gn_bs32': ('ResNet', 101, 'GroupNorm', 'num_groups = 32', 32, '22.4'),
    'resnet101_bn_bs2': ('ResNet', 101, 'BatchNorm', None, 2, '31.9'),
    'resnet101_gn_bs2': ('ResNet', 101, 'GroupNorm', 'num_groups = 32', 2, '23.0'),
    'vgg16_none': ('VGG16', None, 'NoNorm', None, 32, '29.2'),
    'vgg16_bn': ('VGG16', None, 'BatchNorm', None, 32, '28.0'),
    'vgg16_gn': ('VGG16', None, 'GroupNorm', 'num_groups = 32', 32, '27.6'),
}
UNVERIFIED = ('resnet50_gn_cpg4', 'vgg16_none')
PUBLISHED_HOURS = {'resnet50_gn_bs32': '27 h', 'vgg16_none': '30 h', 'vgg16_bn': '30 h', 'vgg16_gn': '30 h'}

# Per images per replica: images per update, updates per epoch, the rate from epochs 1, 31, 61 and 91 on.
UPDATES = {
    32: (256, 5004, (0.1, 0.01, 0.001, 0.0001)),
    16: (128, 10009, (0.05, 0.005, 0.0005, 0.00005)),
    8: (64, 20018, (0.025, 0.0025, 0.00025, 0.000025)),
    4: (32, 40036, (0.0125, 0.00125, 0.000125, 0.0000125)),
    2: (16, 80072, (0.00625, 0.000625, 0.0000625, 0.00000625)),
}

# Norm layers by their number of channels.
LAYERS = {
    ('ResNet', 50): {64: 7, 128: 8, 256: 16, 512: 11, 1024: 7, 2048: 4},
    ('ResNet', 101): {64: 7, 128: 8, 256: 50, 512: 11, 1024: 24, 2048: 4},
    ('VGG16', None): {64: 2, 128: 2, 256: 3, 512: 6},
}

# G in layers of 64, 128, 256, 512, 1024 and 2048 channels; None where there are no groups.
GROUPS = {
    ('GroupNorm', 'num_groups = 64'): (64, 64, 64, 64, 64, 64),
    ('GroupNorm', 'num_groups = 32'): (32, 32, 32, 32, 32, 32),
    ('GroupNorm', 'num_groups = 16'): (16, 16, 16, 16, 16, 16),
    ('GroupNorm', 'num_groups = 8'): (8, 8, 8, 8, 8, 8),
    ('GroupNorm', 'num_groups = 4'): (4, 4, 4, 4, 4, 4),
    ('GroupNorm', 'num_groups = 2'): (2, 2, 2, 2, 2, 2),
    ('GroupNorm', 'channels_per_group = 64'): (1, 2, 4, 8, 16, 32),
    ('GroupNorm', 'channels_per_group = 32'): (2, 4, 8, 16, 32, 64),
    ('GroupNorm', 'channels_per_group = 16'): (4, 8, 16, 32, 64, 128),
    ('GroupNorm', 'channels_per_group = 8'): (8, 16, 32, 64, 128, 256),
    ('GroupNorm', 'channels_per_group = 4'): (16, 32, 64, 128, 256, 512),
    ('GroupNorm', 'channels_per_group = 2'): (32, 64, 128, 256, 512, 1024),
    ('LayerNorm', None): (1, 1, 1, 1, 1, 1),
    ('InstanceNorm', None): (64, 128, 256, 512, 1024, 2048),
    ('BatchNorm', None): (None, None, None, None, None, None),
    ('BatchRenorm', None): (None, None, None, None, None, None),
    ('NoNorm', None): (None, None, None, None, None, None),
}

# Parameters; tensors that decay (the last bias is the classifier's); gammas that start at 0. NoNorm has no gamma.
NETWORKS = {
    ('ResNet', 50): (25557032, {'weight': 54, 'gamma': 53, 'beta': 53, 'bias': 1}, 16),
    ('ResNet', 101): (44549160, {'weight': 105, 'gamma': 104, 'beta': 104, 'bias': 1}, 33),
    ('VGG16', None): (138361768, {'weight': 16, 'gamma': 13, 'beta': 13, 'bias': 3}, 0),
    'vgg16_none': (138357544, {'weight': 16, 'beta': 13, 'bias': 3}, 0),
}


def build(name):
    """The experiment of a file, its bindings, and its parts; no data are there."""
    bindings = config.parse([os.path.join('gin', f'{name}.gin')])
    made = config.make(experiment.Experiment)
    return made, bindings, experiment.Built(made, os.path.join('runs', name))


def test_there_is_a_file_for_every_cell_and_no_other():
    files = [path for model in ('resnet50', 'resnet101', 'vgg16')
             for path in glob.glob(os.path.join(config.RECIPES_IN_CLONE, f'{model}_*.gin'))]
    assert sorted(os.path.basename(path)[:-4] for path in files) == sorted(CELLS)


@pytest.mark.parametrize('name', CELLS)
def test_a_cell_is_the_experiment_of_the_paper(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, depth, norm, groups, batch_per_replica, _ = CELLS[name]
    made, bindings, built = build(name)
    assert not config.unused(bindings)

    images_per_update, updates_per_epoch, rates = UPDATES[batch_per_replica]
    assert (made.num_replicas, made.batch_per_replica, made.batch_size) == (8, batch_per_replica, images_per_update)
    assert (built.steps_per_epoch, made.num_epochs) == (updates_per_epoch, 100)
    assert (built.dataset.num_train, built.dataset.num_validation, built.dataset.num_classes) == (1281167, 50000, 1000)
    assert (built.dataset.image_shape, built.dataset.resize) == ((3, 224, 224), 256)

    by_epoch = 30 * [rates[0]] + 30 * [rates[1]] + 30 * [rates[2]] + 10 * [rates[3]]
    assert [built.learning_rate(epoch * updates_per_epoch) for epoch in range(100)] == pytest.approx(by_epoch)
    assert [built.learning_rate((epoch + 1) * updates_per_epoch - 1) for epoch in range(100)] == pytest.approx(by_epoch)
    assert (type(built.optimizer).__name__, vars(built.optimizer)) == ('SGD', {'momentum': 0.9, 'nesterov': True})

    parameters, decaying, zeros = NETWORKS.get(name) or NETWORKS[model, depth]
    assert type(built.net).__name__ == model
    assert count_parameters(built.net, (3, 224, 224)) == parameters
    assert made.weight_decay == 1e-4
    decays, spared = optim.split_by_decay(built.parameters, made.decay_gamma_beta)
    assert not spared and {kind: sum(tensor.endswith(f'.{kind}') for tensor in decays) for kind in decaying} == decaying
    assert len(decays) == sum(decaying.values())
    assert all(built.parameters[tensor].wd_mult == 1 for tensor in decays)

    zero = plan.zero_gammas(built.parameters)
    assert len(zero) == zeros and all(tensor.endswith('.norm3.gamma') for tensor in zero)

    expected = {(channels, groups): layers for (channels, layers), groups in
                zip(LAYERS[model, depth].items(), GROUPS[norm, groups])}
    assert plan.norm_layers(built.net) == expected
    check_groups(built.net, expected)


def check_groups(net, expected):
    """One layer of each width computes what the keys (channels, groups) of `expected` say."""
    layers = {}
    net.apply(lambda block: layers.setdefault(block.beta.shape[0], block) if hasattr(block, 'num_groups') else None)
    for channels, groups in expected:
        layer = layers.get(channels)
        assert (layer is None) == (groups is None)
        if layer is None:
            continue
        layer.initialize()
        layer.gamma.set_data(mx.nd.ones(channels))
        x = np.random.default_rng(0).normal(3, 1, (1, channels, 2, 2)).astype(np.float32)
        x *= np.linspace(1, 9, channels, dtype=np.float32)[:, None, None]  # so that no two channels are alike
        grouped = x.reshape(groups, -1).astype(np.float64)
        wanted = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-5)
        y = layer.before_activation(mx.nd.array(x)).asnumpy()
        np.testing.assert_allclose(y, wanted.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize('name', CELLS)
def test_a_cell_says_itself_what_it_is_and_what_the_paper_got(name):
    _, _, norm, groups, batch_per_replica, error = CELLS[name]
    bindings = config.parse([os.path.join('gin', f'{name}.gin')])
    own = {binding.line for binding in bindings if not binding.included}
    shared = {binding.key for binding in bindings if binding.included}
    assert {f'train.norm = @{norm}', 'train.num_replicas = 8', f'train.batch_per_replica = {batch_per_replica}'} <= own
    assert [line for line in own if line.startswith('GroupNorm')] == ([f'GroupNorm.{groups}'] if groups else [])
    assert not shared & {binding.key for binding in bindings if not binding.included}
    if norm == 'BatchRenorm':
        assert {'BatchRenorm.r_max = 1.5', 'BatchRenorm.d_max = 0.5'} <= own
    with open(os.path.join(config.RECIPES_IN_CLONE, f'{name}.gin')) as file:
        header = file.read().split('include')[0]
    assert f'{error} % top-1 error' in header
    assert ('(unverified)' in header) == (name in UNVERIFIED)
    assert f'python -m gn_gluon.train --gin_file gin/{name}.gin' in header
    assert PUBLISHED_HOURS.get(name, 'none published') in header


def test_the_plan_prints_what_the_table_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made, bindings, _ = build('resnet50_gn_cpg16')
    plan.print_plan(made, bindings, 'runs/x')
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ('replicas 8 x 32 images = 256 images per update, on train.devices = \'auto\'',
                 'updates 5004 per epoch x 100 epochs = 500400; 143 images of each permutation are dropped',
                 'learning rate epochs 1 to 30: 0.1', 'learning rate epochs 91 to 100: 0.0001',
                 'weight decay 0.0001 on 161 tensors: 54 weight, 53 gamma, 53 beta, 1 bias',
                 'zero gammas 16 tensors start at 0: 16 norm3', 'norm layers 53 x GroupNorm',
                 'layers channels groups channels per group', '7 64 4 16', '4 2048 128 16'):
        assert line in lines, line
    assert not os.path.exists('runs')
