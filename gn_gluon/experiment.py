"""Joins data, model, optimizer and loop as a gin file says, and owns the run folder."""
import contextlib
import fcntl
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time

import mxnet as mx
import numpy as np
from mxnet import gluon

from gn_gluon import __version__, compat, config, optim
from gn_gluon.checkpoint import Checkpoints, check_finite, load_parameters, read_json, write_text
from gn_gluon.data import loader
from gn_gluon.data.dataset import Dataset
from gn_gluon.distributed import ALONE, WITHIN_PROCESS, code_digest, joined, progress, weights_digest
from gn_gluon.errors import Interrupted, NaNLossError, UserError
from gn_gluon.log import NoLog, RunLog, read_rows
from gn_gluon.loop import evaluate, train_epoch
from gn_gluon.metrics import Metrics, headline
from gn_gluon.norm.operator import active_operator
from gn_gluon.percentiles import Percentiles
from gn_gluon.plot import plot_curves, plot_percentiles
from gn_gluon.precision import NARROW, check_trainable
from gn_gluon.replicas import Replicas, check_kvstore, gpus_seen, out_of_memory_explained, parse_devices
from gn_gluon.statistics import batch_statistics, layers_with_running_statistics, population_moments, running_statistics

#: What may differ when a run is resumed: where it runs, not what it computes.
RESUMABLE_WITH_OTHER = ('train.devices', 'train.kvstore', 'train.images_at_once', 'train.validation_batch',
                        'train.reproducible', 'checkpoint.minutes', 'percentiles.layer', 'percentiles.num_images',
                        'percentiles.times_per_epoch', 'ImageNet.workers')


_KINDS = {'norm': gluon.HybridBlock, 'model': gluon.HybridBlock, 'dataset': Dataset, 'optimizer': optim.Optimizer,
          'schedule': optim.Schedule}


class Experiment:
    """What a gin file binds as `train.*`. By hand: Experiment(norm=GroupNorm, model=CifarResNet, ...).

    Arguments:
        norm, model, dataset, optimizer, schedule: classes (in gin `@GroupNorm`, without parentheses).
        num_replicas, batch_per_replica: the paper's "8 GPUs x b images"; their product makes one update.
        num_epochs: passes over the training set.
        base_learning_rate, reference_batch: the linear rule of Section 4.1, see optim.learning_rate.
        learning_rate: the rate itself, instead of these two.
        weight_decay: 1e-4 in Section 4.1.
        decay_gamma_beta: whether it applies to gamma and beta too, as in Section 4.1.
        gradient_clip_norm: largest norm of the mean gradient, or None.
        seed: of the initial weights, the order, the augmentation and dropout.
        kvstore: 'device', 'local' or 'nccl', between the devices of one machine; 'dist_device_sync' (or 'dist_sync' on
            CPUs) between the processes that tools/launch.py starts, see distributed.Ranks.
        reproducible: see distributed.Ranks.
        dtype: of the activations: 'float32'; 'bfloat16' on CPUs that have it; 'float16' on GPUs, with a loss scale that
            follows the gradients. Parameters, statistics and the classifier are float32 in all of them.
        devices: see replicas.parse_devices.
        initial_weights: path of a .params file to start from; its classifier may have another number of classes.
        images_at_once: where samples do not see one another, the most images that go through a device together,
            whatever the replicas (see replicas.Replicas); lower it when memory runs out. None: 32, or a replica.
        validation_batch: images at a time in evaluation; it has no effect on the result.
    """

    def __init__(self, norm=None, model=None, dataset=None, optimizer=None, schedule=None, num_replicas=1,
                 batch_per_replica=32, num_epochs=100, base_learning_rate=None, reference_batch=None,
                 learning_rate=None, weight_decay=1e-4, decay_gamma_beta=True, gradient_clip_norm=None, seed=0,
                 kvstore='device', dtype='float32', devices='auto', initial_weights=None, images_at_once=None,
                 validation_batch=200, reproducible=True):
        for name, value in (('norm', norm), ('model', model), ('dataset', dataset), ('optimizer', optimizer),
                            ('schedule', schedule)):
            if not (isinstance(value, type) and issubclass(value, _KINDS[name])):
                raise UserError('train.{0} is {1}; bind it to a class by reference, such as train.{0} = @{2}'.format(
                    name, 'not bound' if value is None else repr(value),
                    {'norm': 'GroupNorm', 'model': 'CifarResNet', 'dataset': 'CIFAR10', 'optimizer': 'SGD',
                     'schedule': 'StepSchedule'}[name]))
        for name, value in (('num_replicas', num_replicas), ('batch_per_replica', batch_per_replica),
                            ('num_epochs', num_epochs), ('validation_batch', validation_batch),
                            ('images_at_once', 1 if images_at_once is None else images_at_once)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f'train.{name} = {value!r} must be a whole number above 0')
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise UserError(f'train.seed = {seed!r} must be a whole number from 0 to 2**31 - 1')
        if not (initial_weights is None or isinstance(initial_weights, str)):
            raise UserError(f'train.initial_weights = {initial_weights!r} must be the path of a .params file')
        if not weight_decay >= 0:
            raise UserError(f'train.weight_decay = {weight_decay!r} must be 0 or more')
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise UserError(f'train.gradient_clip_norm = {gradient_clip_norm!r} must be above 0, or None')
        if dtype not in ('float32',) + NARROW:
            raise UserError(f"train.dtype = {dtype!r} is none of 'float32', 'float16' (GPUs) and 'bfloat16' (CPUs)")
        kvstores = ('device', 'local', 'nccl') + tuple(WITHIN_PROCESS)
        if kvstore not in kvstores:
            raise UserError(f"train.kvstore = {kvstore!r} is none of {', '.join(map(repr, kvstores))}")
        self.norm, self.model, self.dataset, self.optimizer, self.schedule = norm, model, dataset, optimizer, schedule
        self.num_replicas, self.batch_per_replica, self.num_epochs = num_replicas, batch_per_replica, num_epochs
        self.batch_size = num_replicas * batch_per_replica
        self.initial_rate = optim.learning_rate(learning_rate, base_learning_rate, reference_batch, self.batch_size)
        self.weight_decay, self.decay_gamma_beta = weight_decay, decay_gamma_beta
        self.gradient_clip_norm = gradient_clip_norm
        self.seed, self.kvstore, self.dtype, self.devices = seed, kvstore, dtype, devices
        self.initial_weights = initial_weights
        self.images_at_once = images_at_once or max(32, batch_per_replica)
        self.validation_batch = validation_batch
        self.reproducible = reproducible


config.register(Experiment, 'train')


class Built:
    """An experiment's parts, made but not yet fed: what `train`, `evaluate` and `plan` have in common.

    The data are read only when the network cannot be made without them (your own h5 set), or by `load`.

    Arguments:
        experiment: Experiment.
        workdir: the run folder.
        data_dir: folder of the data set; None: datasets/NAME.
        description: what Dataset.describe once returned; the data are then never read.
    """

    def __init__(self, experiment, workdir, data_dir=None, description=None):
        self.experiment = experiment
        self.workdir = workdir
        name = experiment.dataset.name
        self.data_dir = data_dir or (os.path.join('datasets', name) if name else None)
        with config.errors_named():
            self.dataset = experiment.dataset(data_dir=self.data_dir)
        self._loaded = description is not None or self.dataset.num_classes is None
        if description is not None:
            self.dataset.restore(description)
        elif self._loaded:
            self.dataset.load()
        with config.errors_named():
            self.net = experiment.model(norm=experiment.norm, num_classes=self.dataset.num_classes)
            self.net.infer_shape(mx.nd.zeros((1,) + self.dataset.image_shape))
            self.optimizer = experiment.optimizer()
            self.schedule = experiment.schedule()
            self.checkpoints = config.configured(Checkpoints)(workdir)
            self.percentiles = config.configured(Percentiles)(self.net)
        #: By structural name ('layers.0.weight'): the same in every process, unlike Gluon's counted prefixes.
        self.parameters = self.net._collect_params_with_prefix()

    def load(self):
        """Read the data set, once."""
        if not self._loaded:
            self.dataset.load()
            self._loaded = True

    @property
    def steps_per_epoch(self):
        """Updates per epoch. Raises UserError when the images do not fill one."""
        steps = self.dataset.num_train // self.experiment.batch_size
        if steps < 1:
            raise UserError(f'{self.dataset.num_train} training images do not fill one update of '
                            f'{self.experiment.num_replicas} replicas x {self.experiment.batch_per_replica} images')
        return steps

    def learning_rate(self, num_updates):
        """The rate of the update that follows `num_updates` updates."""
        return self.experiment.initial_rate * self.schedule(
            num_updates / self.steps_per_epoch, self.experiment.num_epochs)

    def initialize(self, devices):
        """Give the network its initial weights on `devices`, reproducibly, and compile it on first use."""
        mx.random.seed(self.experiment.seed)
        np.random.seed(self.experiment.seed)
        self.net.initialize(ctx=devices)
        # Norms that know the type of their inputs need no casts, a twelfth of a small network's step.
        self.net.cast(self.experiment.dtype)
        self.net.hybridize(static_alloc=True, static_shape=True)
        for parameter in self.parameters.values():
            parameter._finish_deferred_init()

    def validation_batches(self, devices, ranks=ALONE):
        """The validation set for `loop.evaluate`, `train.validation_batch` images at a time on all devices.

        Of several ranks all together see every image once.
        """
        return loader.validation_batches(self.dataset, max(1, self.experiment.validation_batch // len(devices)),
                                         *ranks.share(self.dataset.num_validation))

    def make_replicas(self, devices, ranks=ALONE):
        """The replicas.Replicas of the initialized network."""
        experiment = self.experiment
        return Replicas(self.net, gluon.loss.SoftmaxCrossEntropyLoss(), devices, experiment.num_replicas,
                        experiment.batch_per_replica, experiment.images_at_once, ranks)

    def make_updater(self, ranks=ALONE):
        """The optim.Updater of the initialized network."""
        return optim.Updater(
            self.parameters, self.optimizer, self.experiment.weight_decay, self.experiment.decay_gamma_beta,
            self.experiment.gradient_clip_norm, WITHIN_PROCESS.get(self.experiment.kvstore, self.experiment.kvstore),
            self.experiment.dtype == 'float16', ranks)


def train(experiment, bindings, workdir, data_dir=None):
    """Train, or resume, in the run folder `workdir`.

    Arguments:
        experiment: Experiment.
        bindings: the config.Bindings that made it; one the run does not use is refused.
        workdir: the run folder itself.
        data_dir: folder of the data set; None: datasets/NAME.
    Raises UserError for bad input, NaNLossError, Interrupted after a signal; the last checkpoint is kept in each case.
    """
    built = Built(experiment, workdir, data_dir)
    config.refuse_unused(bindings)
    active_operator()
    devices = parse_devices(experiment.devices, experiment.num_replicas)
    check_kvstore(experiment.kvstore, devices)
    check_trainable(experiment.dtype, devices)
    progress('reading data')
    built.load()
    _refuse_no_validation(built)
    with joined(experiment.kvstore, experiment.reproducible) as ranks:
        devices = devices_of(experiment, ranks)
        if ranks.size > 1:
            data = json.dumps(built.dataset.describe(), sort_keys=True)
            ranks.refuse_differences(what_all_ranks_share(built, data))
        if ranks.leads:
            with _run_folder(workdir):
                _train(built, devices, ranks)
                _summarize(workdir)
        else:
            with open(os.devnull, 'w') as silence, contextlib.redirect_stdout(silence):
                _train(built, devices, ranks)


def devices_of(experiment, ranks):
    """The contexts of this rank, see replicas.parse_devices. Raises UserError where there is no replica for it."""
    first, after = ranks.share(experiment.num_replicas)
    if ranks.size > experiment.num_replicas:
        raise UserError(f'{ranks.size} workers for train.num_replicas = {experiment.num_replicas} replicas; a worker '
                        'needs at least one')
    return parse_devices(experiment.devices, after - first)


def what_all_ranks_share(built, data):
    """What must be the same on every rank: the config but for where it runs, versions, and `data`, a text."""
    settings = {key: value for key, value in config.statements(config.operative_config()).items()
                if key not in RESUMABLE_WITH_OTHER or key in ('train.kvstore', 'train.reproducible')}
    return dict(settings, **{'the code of gn_gluon (SHA-256)': code_digest(), 'MXNet': mx.__version__,
                             'numpy': np.__version__, 'norm operator': active_operator()[0], 'data': data})


def _train(built, devices, ranks):
    """What every rank does; only rank 0 has the run folder."""
    experiment, workdir, resumed = built.experiment, built.workdir, False
    if ranks.leads:
        built.checkpoints.recover()
        resumed = built.checkpoints.exists()
        if resumed:
            refuse_other_config(workdir)
            _refuse_other_data(workdir, built.dataset)
        else:
            write_text(os.path.join(workdir, 'config.gin'), config.operative_config())
        _write_environment(built, devices, ranks, resumed)
        write_text(os.path.join(workdir, 'dataset.json'), json.dumps(built.dataset.describe()))
    built.initialize(devices)
    if ranks.leads and experiment.initial_weights and not resumed:
        kept = load_parameters(experiment.initial_weights, built.parameters, replace_classifier=True)
        print('initial weights from {}{}'.format(
            experiment.initial_weights, '; freshly initialized: ' + ', '.join(kept) if kept else ''))
    run = _Run(built, devices, ranks, resumed)
    try:
        run.all_epochs()
    except Interrupted as stop:
        run.save()
        print('\nstopped by {}: saved {} at epoch {}, update {} of {}; the same command goes on from there'.format(
            {130: 'Ctrl-C', 143: 'SIGTERM'}[stop.exit_code], os.path.join(workdir, 'last'),
            run.epoch + 1, run.step, built.steps_per_epoch), flush=True)
        ranks.gather([])  # for whoever sees a process leave may end the others: not before it is saved
        raise
    finally:
        run.log.close()


class _Run:
    """One training run in progress: its position, and what happens after each update and each epoch."""

    def __init__(self, built, devices, ranks, resumed):
        self.built, self.devices, self.ranks = built, devices, ranks
        experiment = built.experiment
        self.replicas = built.make_replicas(devices, ranks)
        self.updater = built.make_updater(ranks)
        position = built.checkpoints.load('last', built.parameters, self.updater) if resumed else {}
        position = self.start_alike(position)
        self.epoch, self.step = position.get('epoch', 0), position.get('step', 0)
        self.best_top1_error = position.get('best_top1_error')
        self.metrics = Metrics(**position.get('metrics', {}))
        self.seconds, self.wait_seconds = position.get('seconds', 0.0), position.get('wait_seconds', 0.0)
        num_updates = self.epoch * built.steps_per_epoch + self.step
        self.log = RunLog(built.workdir, experiment.num_epochs, built.steps_per_epoch, self.epoch,
                          num_updates) if ranks.leads else NoLog()
        print(f'{type(built.dataset).__name__}: {built.dataset.num_train} training and {built.dataset.num_validation} '
              f'validation images, {built.steps_per_epoch} updates per epoch')
        if experiment.devices == 'auto' and devices[0].device_type == 'cpu':
            print(f'{gpus_seen()}; training on {devices[0]}')
        print(self.replicas.describe())
        print(f'{compat.num_threads()} threads, set by {compat.threads_set_by}')
        print(f'norms {active_operator()[1]}')
        if resumed:
            print(f'resuming {built.workdir} after epoch {self.epoch}, update {self.step} of {built.steps_per_epoch}')
        self.log.table_head()

    def start_alike(self, position):
        """All ranks take up the weights, the optimizer's state and the position of rank 0, which is returned."""
        built = self.built
        weights = {name: parameter.list_data()[0] for name, parameter in built.parameters.items()}
        self.ranks.broadcast(weights)
        states, scalars = self.updater.state_dict()
        shapes = {name: state.shape for name, state in states.items()}
        position, scalars, shapes = self.ranks.gather_objects([position, scalars, shapes])[0]
        states = {name: states.get(name, mx.nd.zeros(shape)) for name, shape in shapes.items()}
        self.ranks.broadcast(states)
        if not self.ranks.leads:
            for name, parameter in built.parameters.items():
                parameter.set_data(weights[name])
            self.updater.load_state_dict(states, scalars)
        return position

    def all_epochs(self):
        while self.epoch < self.built.experiment.num_epochs:
            self.one_epoch()

    def one_epoch(self):
        built, experiment = self.built, self.built.experiment
        batches = loader.train_batches(built.dataset, experiment.batch_size, experiment.seed, self.epoch, self.step,
                                       self.replicas.rows)
        if self.epoch == 0 and self.step == 0 and self.ranks.leads:
            self.log.images(loader.first_images(built.dataset, 16, experiment.seed))
            self.measure_percentiles()
        self.log.start_epoch(self.epoch, self.step)
        seconds_before, wait_before, start = self.seconds, self.wait_seconds, time.perf_counter()

        def on_step(loss, rate):
            self.step += 1
            self.log.step(self.updater.num_updates, self.step, loss, rate)
            self.seconds = seconds_before + time.perf_counter() - start
            self.wait_seconds = wait_before + batches.wait_seconds
            self.measure_percentiles()
            if built.checkpoints.due():
                self.save()
            progress(f'epoch {self.epoch + 1}, update {self.step} of {built.steps_per_epoch}')
            self.ranks.check_signals()

        def on_validation_batch(_):
            progress(f'epoch {self.epoch + 1}, update {self.step}, validation')
            self.ranks.check_own_signals()

        train_epoch(self.replicas, self.updater, batches, self.metrics, built.learning_rate, experiment.seed, on_step)
        check_finite(built.parameters, self.updater, built.workdir)
        weights_sha256 = weights_digest(built.parameters)
        self.ranks.refuse_differences({f'SHA-256 after update {self.updater.num_updates}': weights_sha256},
                                      'has other weights')
        self.ranks.check_signals()
        start = time.perf_counter()
        try:
            validation = evaluate(
                built.net, self.devices, built.validation_batches(self.devices, self.ranks), on_validation_batch)
        except Interrupted:
            validation = Metrics()  # the others learn of it now
        validation = self.ranks.total(validation)
        self.ranks.check_signals()
        if not math.isfinite(validation.loss):
            raise NaNLossError(f'the validation loss is {validation.loss} after update {self.updater.num_updates}; '
                               'lower '
                               'the learning rate or clip the gradients (train.gradient_clip_norm)')
        self.log.end_epoch(
            self.epoch, self.updater.num_updates, self.metrics, validation,
            built.learning_rate(self.updater.num_updates - 1), self.seconds, time.perf_counter() - start,
            self.wait_seconds, peak_memory(self.devices), weights_sha256)
        best = self.best_top1_error is None or validation.top1_error < self.best_top1_error
        if best:
            self.best_top1_error = validation.top1_error
        self.epoch, self.step, self.metrics, self.seconds, self.wait_seconds = self.epoch + 1, 0, Metrics(), 0.0, 0.0
        self.save(best)

    def measure_percentiles(self):
        built, experiment = self.built, self.built.experiment
        if self.ranks.leads and built.percentiles.due(self.step, built.steps_per_epoch):
            self.log.percentiles(self.updater.num_updates, built.percentiles.measure(
                built.dataset, experiment.seed, self.devices[0], experiment.images_at_once))

    def save(self, best=False):
        if self.ranks.leads:
            self.built.checkpoints.save(self.built.parameters, self.updater, {
                'epoch': self.epoch, 'step': self.step, 'best_top1_error': self.best_top1_error,
                'metrics': self.metrics.state_dict(), 'seconds': self.seconds,
                'wait_seconds': self.wait_seconds}, best)


def evaluate_run(experiment, bindings, workdir, data_dir=None, checkpoint='last', statistics=('running',),
                 statistics_batch=None, precise_images=8192):
    """Evaluate a checkpoint over the whole validation set, in inference mode.

    Arguments:
        experiment, bindings, workdir, data_dir: as of `train`.
        checkpoint: 'last', 'best' or the path of a .params file or of a checkpoint folder.
        statistics: what BatchNorm and BatchRenorm normalise by, a figure for each: 'running' (running averages),
            'batch' (the moments of each batch of validation images), 'precise' (those of augmented training images,
            see statistics.population_moments). A network without such layers has one figure whatever is asked.
        statistics_batch: images per batch of 'batch' and 'precise'; None: train.batch_per_replica. A last batch that is
            not full: see loader.full_validation_batches; of the training images only full batches are used.
        precise_images: training images of 'precise', or as many as there are. 1,000 to 10,000 are enough (Wu & Johnson
            2021, Sec. 3.1).
    Returns a dict: checkpoint, epoch (None for a .params file); headline, as of metrics.headline, or None where the run
    folder has none or the checkpoint is not the run's; figures, a list of dicts: statistics (None for a network without
    such layers), top1_error and top5_error in percent, loss in nats per image, num_samples, images_per_second, and
    where it applies batch_size and num_training_images; and once more the entries of the first of the figures.
    """
    built = Built(experiment, workdir, data_dir)
    config.refuse_unused(bindings)
    devices = parse_devices(experiment.devices, experiment.num_replicas)
    built.load()
    _refuse_no_validation(built)
    built.initialize(devices)
    rows = read_rows(os.path.join(workdir, 'metrics.jsonl')) if checkpoint in ('last', 'best') else []
    checkpoint, epoch = load_weights(built, checkpoint)
    if not layers_with_running_statistics(built.net):
        statistics = (None,)
    figures = [_figure(built, devices, name, statistics_batch or experiment.batch_per_replica, precise_images)
               for name in statistics]
    return dict(figures[0], checkpoint=checkpoint, epoch=epoch, headline=headline(rows), figures=figures)


def _figure(built, devices, statistics, batch_size, precise_images):
    """One of the `figures` of `evaluate_run`."""
    net, dataset, seed = built.net, built.dataset, built.experiment.seed
    details, in_statistics, batches, options = {}, contextlib.nullcontext(), built.validation_batches(devices), {}
    memory_hint = 'lower --statistics_batch'
    if statistics == 'batch':
        details = {'batch_size': min(batch_size, dataset.num_validation)}
        in_statistics, options = batch_statistics(net), {'memory_hint': memory_hint}
        batches = loader.full_validation_batches(dataset, batch_size, seed)
    elif statistics == 'precise':
        num_batches = min(precise_images, dataset.num_train) // batch_size
        if num_batches < 1:
            raise UserError(f'{min(precise_images, dataset.num_train)} training images do not fill one batch of '
                            f'{batch_size}; lower --statistics_batch, or raise --precise_images')
        with out_of_memory_explained(memory_hint):
            recomputed, num_images = population_moments(net, devices, itertools.islice(
                loader.train_batches(dataset, batch_size, seed, epoch=0), num_batches))
        details = {'batch_size': batch_size, 'num_training_images': num_images}
        in_statistics = running_statistics(recomputed)
    with in_statistics:
        start = time.perf_counter()
        metrics = evaluate(net, devices, batches, **options)
        seconds = time.perf_counter() - start
    return dict(details, statistics=statistics, top1_error=metrics.top1_error, top5_error=metrics.top5_error,
                loss=metrics.loss, num_samples=metrics.num_samples, images_per_second=metrics.num_samples / seconds)


def recorded_experiment(workdir, gin_files=(), gin_bindings=(), needs_run=True):
    """The Experiment of the run in `workdir` as it recorded it, or of the gin files where there is no run.

    Arguments:
        gin_files: what the run is expected to be; [] where `workdir` alone says it.
        gin_bindings: statements on top.
        needs_run: whether a folder without a run is an error.
    Returns it and the config.Bindings of `gin_bindings`. Raises UserError, too, when the gin files are of another norm,
    model or data set than the run.
    """
    recorded = os.path.join(workdir, 'config.gin')
    if os.path.exists(recorded):
        if gin_files:
            config.parse(gin_files)
            asked = config.make(Experiment)
            config.parse([recorded])
            _refuse_other_experiment(asked, config.make(Experiment), workdir)
        gin_files = [recorded]
    elif needs_run:
        raise UserError('no run in {}; train it with: python -m gn_gluon.train {}'.format(
            workdir, ' '.join('--gin_file ' + path for path in gin_files) or '--gin_file FILE'))
    bindings = config.parse(gin_files, gin_bindings)
    # The recorded config also holds what only training uses; of the command line everything must be used.
    return config.make(Experiment), [binding for binding in bindings if binding.origin.startswith('--')]


def trained(experiment, workdir, checkpoint):
    """The Built of an experiment with the weights of `checkpoint`, see `load_weights`, on the CPU.

    Of the data only what the run folder records is known, or what is the same for every copy of the data set.
    """
    recorded = os.path.join(workdir, 'dataset.json')
    description = read_json(recorded, 'train the run again, or give another') if os.path.exists(recorded) else None
    built = Built(experiment, workdir, recorded_data_dir(workdir), description)
    built.initialize([mx.cpu()])
    load_weights(built, checkpoint)
    return built


def _refuse_other_experiment(asked, recorded, workdir):
    for what in ('norm', 'model', 'dataset'):
        there, here = getattr(recorded, what).__name__, getattr(asked, what).__name__
        if there != here:
            raise UserError(f'the run in {workdir} has train.{what} = @{there}, not @{here} as the gin file says; give '
                            'its own gin file, or --workdir alone')


def load_weights(built, checkpoint):
    """Load 'last', 'best', a checkpoint folder or a .params file; returns its path and its number of epochs."""
    if checkpoint in ('last', 'best') and not built.checkpoints.exists(checkpoint):
        raise UserError(f'no checkpoint {checkpoint} in {built.workdir}; train it first, or name a file with '
                        '--checkpoint')
    if checkpoint in ('last', 'best') or os.path.isdir(checkpoint):
        folder = os.path.join(built.workdir, checkpoint) if checkpoint in ('last', 'best') else checkpoint
        folder, name = os.path.split(os.path.normpath(folder))
        state = Checkpoints(folder).load(name, built.parameters)
        return os.path.join(folder, name), state['epoch'] + state['step'] / built.steps_per_epoch
    load_parameters(checkpoint, built.parameters)
    return checkpoint, None


def peak_memory(devices):
    """Bytes: the most that this process has had resident, or on GPUs what is in use on the fullest."""
    gpus = [device.device_id for device in devices if device.device_type == 'gpu']
    if gpus:
        return max(total - free for free, total in map(mx.context.gpu_memory_info, gpus))
    with open('/proc/self/status') as file:  # and not getrusage, which begins at what the parent process had
        return int(re.search(r'VmHWM:\s*(\d+) kB', file.read()).group(1)) * 1024


@contextlib.contextmanager
def _run_folder(workdir):
    """Make the run folder, and keep a second process out of it."""
    try:
        os.makedirs(workdir, exist_ok=True)
        lock = open(os.path.join(workdir, '.lock'), 'w')
    except OSError as error:
        raise UserError(
            f'cannot make the run folder {workdir}: {error.strerror}; choose another with --workdir') from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f'another process is training in {workdir}; wait for it, or choose another --workdir') from None
        yield


def _refuse_no_validation(built):
    if not built.dataset.num_validation:
        raise UserError(f'{built.data_dir} holds no validation images; pack a set that has some')


def refuse_other_config(workdir):
    """Raise UserError where the run in `workdir` was made with another config than the one that is now operative."""
    path = os.path.join(workdir, 'config.gin')
    try:
        with open(path) as file:
            before = config.statements(file.read())
    except OSError:
        raise UserError(f'{workdir} has a checkpoint but no config.gin; choose another --workdir') from None
    now = config.statements(config.operative_config())
    differing = ['{}: {} there, {} now'.format(key, before.get(key, 'not bound'), now.get(key, 'not bound'))
                 for key in sorted(set(before) | set(now))
                 if before.get(key) != now.get(key) and key not in RESUMABLE_WITH_OTHER]
    if differing:
        raise UserError('{} was made by another config ({}); choose another --workdir, or delete it'.format(
            workdir, '; '.join(differing)))


def _refuse_other_data(workdir, dataset):
    path = os.path.join(workdir, 'dataset.json')
    before = read_json(path, 'choose another --workdir')
    now = json.loads(json.dumps(dataset.describe()))
    differing = [f'{key}: {_short(before.get(key))} there, {_short(now[key])} now' for key in now
                 if before.get(key) != now[key]]
    if differing:
        raise UserError(f"{workdir} was trained on other data ({'; '.join(differing)}); give the same --data_dir, or "
                        'choose another --workdir')


def _short(value):
    text = str(value)
    return text if len(text) <= 60 else text[:57] + '...'


def _write_environment(built, devices, ranks, resumed):
    """What made the run: versions, hardware, commit, command."""
    path = os.path.join(built.workdir, 'environment.json')
    now = time.strftime('%Y-%m-%dT%H:%M:%S%z')
    environment = {
        'command': sys.argv, 'started': now, 'resumed': [],
        'gn_gluon': __version__, 'commit': _git_commit(), 'mxnet': mx.__version__,
        'gluoncv': compat.version('gluoncv'),
        'numpy': np.__version__, 'python': platform.python_version(), 'platform': platform.platform(),
        'host': platform.node(), 'processor': compat.processor(), 'devices': [str(device) for device in devices],
        'workers': ranks.size,
        'threads': compat.num_threads(), 'norm_operator': active_operator()[0],
        'data_dir': built.data_dir and os.path.abspath(built.data_dir)}
    if resumed and os.path.exists(path):
        before = read_json(path, 'delete it to go on without it')
        environment.update(started=before['started'], resumed=before['resumed'] + [now])
    write_text(path, json.dumps(environment, indent=1))


def recorded_data_dir(workdir):
    """The data folder that a run was trained from, if it is recorded and still there."""
    path = os.path.join(workdir, 'environment.json')
    if not os.path.exists(path):
        return None
    folder = read_json(path, 'delete it and give --data_dir').get('data_dir')
    return folder if folder and os.path.isdir(folder) else None


def _git_commit():
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.check_output(['git', '-C', here, 'describe', '--always', '--dirty', '--abbrev=40'],
                                       stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _summarize(workdir):
    """Draw curves.png, print the figures and what to type next."""
    curves = os.path.join(workdir, 'curves.png')
    plot_curves([workdir], curves)
    percentiles = os.path.join(workdir, 'percentiles.png')
    if read_rows(os.path.join(workdir, 'percentiles.jsonl')):
        plot_percentiles([workdir], percentiles)
        curves += ', ' + percentiles
    rows = read_rows(os.path.join(workdir, 'metrics.jsonl'))
    errors = [row['top1_error'] for row in rows if row['split'] == 'validation']
    median = headline(rows)
    print('\nvalidation top-1 error of {} images: {:.2f} % after the last epoch; median of the last {}: {:.2f} %; best '
          '{:.2f} % (epoch {})'.format(median['num_samples'], errors[-1], median['epochs'], median['top1_error'],
                                       min(errors), errors.index(min(errors)) + 1))
    print(f'run folder   {workdir}\ncurves       {curves}')
    print(f'next         python -m gn_gluon.eval --workdir {workdir}')
    print(f'             tensorboard --logdir {workdir}')
