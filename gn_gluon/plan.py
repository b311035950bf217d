"""--plan: what a gin file would do, printed without touching data or devices."""
import collections

import mxnet as mx

from gn_gluon import config, optim
from gn_gluon.experiment import Built
from gn_gluon.models import count_multiply_adds, count_parameters
from gn_gluon.norm import BatchNorm, GroupNorm, NoNorm


def print_plan(experiment, bindings, workdir, data_dir=None):
    """Print images, updates, learning rates, who decays, norm layers, parameters, layout of replicas, vain bindings.

    Arguments: as of experiment.train. A set of your own (h5) is read, since its counts stand nowhere else.
    """
    built = Built(experiment, workdir, data_dir)
    config.refuse_unused(bindings)
    dataset, steps = built.dataset, built.steps_per_epoch
    multiply_adds = count_multiply_adds(built.net, dataset.image_shape)
    decaying, spared = optim.split_by_decay(built.parameters, experiment.decay_gamma_beta)
    rows = [
        ('run folder', workdir),
        ('data', '{}: {} training and {} validation images {} in {} classes, from {}'.format(
            type(dataset).__name__, dataset.num_train, dataset.num_validation, dataset.image_shape,
            dataset.num_classes, built.data_dir or 'an installed package')),
        ('network', f'{type(built.net).__name__} with {experiment.norm.__name__}: '
                    f'{count_parameters(built.net, dataset.image_shape):,} parameters, '
                    f'{multiply_adds:,} multiply-adds per image'),
        ('replicas', f'{experiment.num_replicas} x {experiment.batch_per_replica} images = {experiment.batch_size} '
                     f'images per update, on train.devices = {experiment.devices!r}'),
        ('per update', f'{multiply_adds * experiment.batch_size:.4g} multiply-adds forward, about three times as many '
                       'with the gradients'),
        ('updates', f'{steps} per epoch x {experiment.num_epochs} epochs = {steps * experiment.num_epochs}; '
                    f'{dataset.num_train - steps * experiment.batch_size} images of each permutation are dropped'),
        ('optimizer', f'{type(built.optimizer).__name__} {vars(built.optimizer)}'),
    ]
    for first, last, start, end in learning_rate_ranges(built.learning_rate, steps, experiment.num_epochs):
        change = f'{start:.6g}' if start == end else f'{start:.6g} to {end:.6g}, changing with every update'
        rows.append(('learning rate', f'epochs {first + 1} to {last + 1}: {change}'))
    rows += [('weight decay', f'{experiment.weight_decay:g} on {len(decaying)} tensors: {_kinds(decaying)}')]
    if spared:
        rows += [('', f'0 on {len(spared)} tensors: {_kinds(spared)}')]
    zeros = zero_gammas(built.parameters)
    rows += [('zero gammas', f'{len(zeros)} tensors start at 0' + (
        f': {_kinds([name.rsplit(".", 1)[0] for name in zeros])}' if zeros else ''))]
    layers = norm_layers(built.net)
    rows += [('norm layers', f'{sum(layers.values())} x {experiment.norm.__name__}')]
    rows += [('', '{:>6}  {:>8}  {:>6}  {:>18}'.format(*row)) for row in
             [('layers', 'channels', 'groups', 'channels per group')] + _group_rows(layers)]
    rows += [('bound in vain', f'{binding.origin} `{binding.line}` (included, not used)')
             for binding in config.unused(bindings)]
    for name, text in rows:
        print(f'{name:14} {text}')


def norm_layers(net):
    """How many norm layers of each (channels, groups) there are, as a Counter; groups are None where there are none."""
    layers = collections.Counter()

    def count(block):
        if isinstance(block, (GroupNorm, BatchNorm, NoNorm)):
            layers[block.beta.shape[0], getattr(block, 'num_groups', None)] += 1

    net.apply(count)
    return layers


def _group_rows(layers):
    """The counts of `norm_layers` as rows: layers, channels, groups, channels per group."""
    return [(count, channels, groups or '-', channels // groups if groups else '-')
            for (channels, groups), count in sorted(layers.items())]


def zero_gammas(parameters):
    """Names of the gammas that start at 0, of a dict from name to Parameter."""
    return [name for name, parameter in parameters.items() if name.endswith('.gamma')
            and isinstance(mx.init.create(parameter.init), mx.init.Zero)]


def learning_rate_ranges(learning_rate, steps_per_epoch, num_epochs):
    """Epochs of one behaviour as (first, last, rate at the start, rate at the end), in order.

    A range either keeps its rate, or changes it with every update (warm-up, cosine) in one direction.
    """
    ranges = []
    for epoch in range(num_epochs):
        start = learning_rate(epoch * steps_per_epoch)
        end = learning_rate((epoch + 1) * steps_per_epoch - 1)
        same_way = ranges and _direction(*ranges[-1][2:]) == _direction(start, end)
        if same_way and (start != end or start == ranges[-1][3]):
            ranges[-1] = (ranges[-1][0], epoch, ranges[-1][2], end)
        else:
            ranges.append((epoch, epoch, start, end))
    return ranges


def _direction(start, end):
    return (end > start) - (end < start)


def _kinds(names):
    """How many of the tensors are weights, biases, gammas, betas: '53 weight, 53 gamma'."""
    kinds = [name.rsplit('.', 1)[-1] for name in names]
    return ', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))
