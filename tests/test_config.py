"""Gin files: found, included, checked; every recipe of the repository says what its name says."""
import glob
import os

import pytest

from gn_gluon import config, experiment, plan
from gn_gluon.errors import UserError

RECIPES = sorted(os.path.basename(path) for path in glob.glob(os.path.join(config.RECIPES_IN_CLONE, '*_*.gin'))
                 if os.path.basename(path) != 'tiny_imagenet.gin'
                 and not os.path.basename(path).startswith(('resnet', 'vgg')))  # those are test_recipes.py's

NORMS = {'bn': 'BatchNorm', 'gn': 'GroupNorm', 'ln': 'LayerNorm', 'in': 'InstanceNorm'}


def load(*gin_files, bindings=()):
    made = config.parse(gin_files, bindings)
    return config.configured(experiment.Experiment)(), made


def test_an_include_is_found_beside_the_including_file_first_then_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'top.gin').write_text("include 'both.gin'\ninclude 'here.gin'\n")
    (tmp_path / 'files' / 'both.gin').write_text('SGD.momentum = 0.25\n')
    (tmp_path / 'both.gin').write_text('SGD.momentum = 0.75\n')
    (tmp_path / 'here.gin').write_text('SGD.nesterov = False\n')
    monkeypatch.chdir(tmp_path)
    bindings = config.parse([os.path.join('files', 'top.gin')])
    assert [(binding.key, binding.included) for binding in bindings] == [('SGD.momentum', True), ('SGD.nesterov', True)]
    from gn_gluon.optim import SGD
    assert config.configured(SGD)().momentum == 0.25


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load('gin/digits_gn_bs2.gin')[0].num_replicas == 16
    assert load('digits_gn_bs2.gin')[0].num_replicas == 16


def test_the_command_line_wins_over_the_file_and_the_file_over_its_include():
    made, _ = load('gin/digits_gn_bs2.gin', bindings=['train.num_replicas = 3'])
    assert (made.num_replicas, made.batch_per_replica, made.num_epochs) == (3, 2, 15)


def test_the_operative_config_makes_the_same_experiment_again(tmp_path):
    made, _ = load('gin/digits_bn_bs4.gin', bindings=['SGD.nesterov = False'])
    experiment.Built(made, str(tmp_path))
    text = config.operative_config()
    (tmp_path / 'config.gin').write_text(text)
    again, _ = load(str(tmp_path / 'config.gin'))
    experiment.Built(again, str(tmp_path))
    assert config.operative_config() == text
    assert config.statements(text)['SGD.nesterov'] == 'False'


def test_what_an_include_binds_in_vain_is_told_and_what_the_file_itself_binds_is_refused(tmp_path, capsys):
    (tmp_path / 'recipe.gin').write_text("include 'digits.gin'\nAdam.beta1 = 0.8\n")
    (tmp_path / 'top.gin').write_text("include 'recipe.gin'\ntrain.norm = @NoNorm\n")
    made, bindings = load(str(tmp_path / 'top.gin'))
    plan.print_plan(made, bindings, 'runs/top')
    assert 'recipe.gin:2 `Adam.beta1 = 0.8`' in capsys.readouterr().out
    (tmp_path / 'top.gin').write_text("include 'recipe.gin'\ntrain.norm = @NoNorm\nGroupNorm.num_groups = 4\n")
    made, bindings = load(str(tmp_path / 'top.gin'))
    with pytest.raises(UserError, match=r'top.gin:3: `GroupNorm.num_groups = 4`'):
        plan.print_plan(made, bindings, 'runs/top')



@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_builds_and_is_what_its_name_and_header_say(name, tmp_path, capsys):
    made, bindings = load(os.path.join('gin', name))
    with open(os.path.join(config.RECIPES_IN_CLONE, name)) as file:
        text = file.read()
    assert f'--gin_file gin/{name}' in text
    norm = NORMS[name.replace('.', '_').split('_')[-2 if 'bs' not in name else -3]]
    assert made.norm.__name__ == norm
    own = [binding.key for binding in bindings if not binding.included]
    assert {'train.norm', 'train.num_replicas', 'train.batch_per_replica'} <= set(own)
    assert ('GroupNorm.num_groups' in own) == (norm == 'GroupNorm')
    if name.startswith('digits'):
        assert made.batch_size == 32 and made.initial_rate == 0.05
        assert f'bs{made.batch_per_replica}.gin' in name
    if name != 'h5_gn.gin':  # that one needs the user's own images
        plan.print_plan(made, bindings, str(tmp_path))
        assert 'bound in vain' not in capsys.readouterr().out


def test_the_plan_gives_the_figures_of_the_published_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data here: a plan needs none
    made, bindings = load('gin/cifar110_gn.gin')
    plan.print_plan(made, bindings, 'runs/x')
    output = capsys.readouterr().out
    for part in ('50000 training and 10000 validation images', '390 per epoch x 400 epochs = 156000',
                 'epochs 1 to 1: 0.01', 'epochs 2 to 82: 0.1', 'epochs 83 to 123: 0.01', 'epochs 124 to 300: 0.001',
                 'epochs 301 to 400: 0.0002', '0 on 218 tensors: 109 gamma, 109 beta'):
        assert part in output, part
    assert not os.path.exists('runs')


def test_plan_tells_where_the_rate_changes_with_every_update():
    from gn_gluon.optim import CosineSchedule
    schedule = CosineSchedule(warmup_epochs=2)
    ranges = plan.learning_rate_ranges(lambda update: schedule(update / 10, 20), 10, 20)
    assert [(first, last) for first, last, _, _ in ranges] == [(0, 1), (2, 19)]
    assert ranges[0][2] < ranges[0][3] and ranges[1][2] > ranges[1][3]
