"""What runs and sweeps left, for the report: finds and reads them, and puts together what differs in the seed alone."""
import collections
import itertools
import json
import math
import os
import statistics
import tokenize

from gn_gluon import config, experiment
from gn_gluon.errors import UserError
from gn_gluon.log import read_rows
from gn_gluon.metrics import headline
from gn_gluon.plot import NORMS

#: Settings that leave the result as it is, and the seed.
SAME_RESULT = experiment.RESUMABLE_WITH_OTHER + ('train.seed',)
#: What a network may be evaluated with, see eval.STATISTICS; None: its norm has no running averages.
STATISTICS = ('running', 'batch', 'precise', None)

_RUN_FILES = {'config.gin', 'metrics.jsonl', 'steps.jsonl', 'environment.json', 'dataset.json'}
#: What is read of each row of a sweep.json, see sweep.summarize.
_SWEEP_ROW = ('gin_file', 'norm', 'model', 'dataset', 'settings', 'num_replicas', 'batch_per_replica', 'num_samples',
              'last_epochs', 'top1_error', 'statistics')
_NOT_BELOW = ('last', 'best', 'tensorboard')
#: What a damaged file raises: that it cannot be read, is not what it should be, or lacks what is looked up in it.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_FIGURES = {'train': ('loss', 'top1_error', 'images_per_second', 'peak_memory_bytes', 'data_wait_share'),
            'validation': ('loss', 'top1_error', 'top5_error', 'num_samples')}


class Run:
    """A run as its folder tells it. Raises one of _DAMAGED where that is not what a run leaves.

    Attributes:
        folder; name: what it is called on a page; config: the text of config.gin; settings: its bindings, {key: text}.
        model, norm, dataset: names; replicas, batch, seed, planned: numbers, `planned` of epochs.
        description, environment: of dataset.json and environment.json; shape: (C, H, W) of an image; images: numbers
        of both splits; classes: their number; hardware: in words; resumed: how often.
        gin_files: names, without .gin, that the command gave; none where it named the folder alone.
        train, validation: rows of metrics.jsonl, one for each whole epoch; done: how many; finished: if that is all.
        headline: see metrics.headline; None before the first epoch.
        figures: of evaluation.json; empty without it.
    """

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.config = _text(folder, 'config.gin')
        self.settings = _settings(self.config)
        self.model, self.norm, self.dataset = (
            self.settings[f'train.{key}'].lstrip('@') for key in ('model', 'norm', 'dataset'))
        self.replicas, self.batch, self.seed, self.planned = (
            int(self.settings[f'train.{key}']) for key in ('num_replicas', 'batch_per_replica', 'seed', 'num_epochs'))
        self.description, self.environment = (_json(folder, name) for name in ('dataset.json', 'environment.json'))
        self.images = [int(self.description[key]) for key in ('num_train', 'num_validation')]
        self.classes = int(self.description['num_classes'])
        self.shape = [int(size) for size in self.description['image_shape']]
        words = [part for word in self.environment['command'] for part in word.split('=')]
        self.gin_files = [os.path.splitext(os.path.basename(after))[0] for word, after in zip(words, words[1:])
                          if word == '--gin_file']
        self.resumed = len(self.environment['resumed'])
        self.hardware = '{}; {} threads of {}; {}'.format(
            ', '.join(self.environment['devices']), self.environment['threads'],
            self.environment.get('processor', 'a processor that is not recorded'), self.environment['platform'])
        self.train, self.validation = _read_metrics(folder)
        self.done, self.finished = len(self.validation), len(self.validation) >= self.planned
        self.headline = headline(self.validation)
        evaluated = os.path.exists(os.path.join(folder, 'evaluation.json'))
        self.figures = _json(folder, 'evaluation.json')['figures'] if evaluated else []
        for figure in self.figures:
            if figure['statistics'] not in STATISTICS or not math.isfinite(figure['top1_error']):
                raise ValueError('evaluation.json is not what gn_gluon.eval --json prints')

    def over_epochs(self, combine, key):
        """`combine` of what the epochs' training says of `key`."""
        return combine([row[key] for row in self.train])


def _text(folder, name):
    try:
        with open(os.path.join(folder, name)) as file:
            return file.read()
    except FileNotFoundError:
        raise ValueError(f'{name} is missing') from None


def _settings(text):
    try:
        return config.statements(text)
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise ValueError(f'config.gin is damaged: {error.args[0]}') from None


def _json(folder, name):
    text = _text(folder, name)
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f'{name} is cut or is not JSON') from None


def _read_metrics(folder):
    """The rows of metrics.jsonl of whole epochs: those of training and those of validation."""
    path = os.path.join(folder, 'metrics.jsonl')
    rows = read_rows(path)
    # Only the last line may be cut, by a kill: what follows a broken line would be left out unseen.
    if os.path.exists(path) and len(rows) < _text(folder, 'metrics.jsonl').count('\n'):
        raise ValueError(f'line {len(rows) + 1} of metrics.jsonl is not JSON')
    for row in rows:
        for key in _FIGURES[row['split']]:
            if not math.isfinite(row[key]):
                raise ValueError(f"metrics.jsonl: {key} of epoch {row['epoch'] + 1} is {row[key]}")
    whole = range(sum(row['split'] == 'validation' for row in rows))
    rows = [row for row in rows if row['epoch'] in whole]  # a kill may also come between the two of an epoch
    if [(row['epoch'], row['split']) for row in rows] != list(itertools.product(whole, ('train', 'validation'))):
        raise ValueError('metrics.jsonl: its epochs do not follow one another')
    return rows[::2], rows[1::2]


def _read_sweep(folder):
    """Those rows of the sweep.json in a folder that have a finished run and a place in the paper's Figure 1."""
    rows = [{key: row[key] for key in _SWEEP_ROW} for row in _json(folder, 'sweep.json')['rows']]
    return [row for row in rows if row['top1_error']['n'] and 'train.batch_per_replica' in row['settings']]


def collect(roots):
    """The runs and sweeps in and below the folders `roots`.

    Returns a list of Runs; a list of (name, rows of sweep.json) of the sweeps over train.batch_per_replica that have a
    finished run; and a list of (folder, why it could not be read). Raises UserError when there is no run at all.
    """
    found, sweeps, unreadable = {}, {}, []
    for root in roots:
        if not os.path.isdir(root):
            unreadable.append((root, 'there is no such folder'))
        for folder, below, files in os.walk(root):
            below[:] = sorted(name for name in below if name not in _NOT_BELOW)
            if 'sweep.json' in files:
                sweeps[os.path.realpath(folder)] = folder
            if _RUN_FILES.intersection(files):
                found.setdefault(os.path.realpath(folder), folder)
            elif not below and (folder == root or not set(files) - {'.lock'}):
                unreadable.append((folder, 'there is no run in it'))
    parent = os.path.commonpath([os.path.dirname(folder) for folder in found]) if found else None
    runs = _read_all(found, lambda real, folder: Run(folder, os.path.relpath(real, parent)), unreadable)
    sweeps = _read_all(sweeps, lambda real, folder: (os.path.basename(real), _read_sweep(folder)), unreadable)
    if not runs:
        raise UserError('no run could be read: {}; train one with: python -m gn_gluon.train --gin_file '
                        'gin/digits_gn_bs2.gin'.format('; '.join(f'{folder}: {why}' for folder, why in unreadable)))
    return runs, [(name, rows) for name, rows in sweeps if rows], unreadable


def _read_all(folders, read, unreadable):
    """What `read` makes of each of {real path: folder}; the damaged ones are added to `unreadable`."""
    found = []
    for real, folder in sorted(folders.items()):
        try:
            found.append(read(real, folder))
        except _DAMAGED as error:
            what = f'{error} is missing' if isinstance(error, KeyError) else config.one_line(error)
            unreadable.append((folder, what))
    return found


class Group:
    """Finished runs that differ only in the seed, or one run that is not finished.

    Attributes: runs, by seed; first: of them; settings: what they share; label: tells the group from others.
    """

    def __init__(self, runs):
        self.runs = sorted(runs, key=lambda run: (run.seed, run.name))
        self.first = first = self.runs[0]
        self.settings = _without_seed(first)
        self.plain_label = self.label = (
            f'{first.model}, {NORMS.get(first.norm, first.norm)}, {first.replicas} x {first.batch}')

    @property
    def seeds(self):
        return ', '.join(dict.fromkeys(str(run.seed) for run in self.runs))

    @property
    def errors(self):
        """The headline errors, percent, one for each seed."""
        return self.per_seed(lambda run: run.headline and run.headline['top1_error'])

    def per_seed(self, value):
        """What `value` gives for the runs of each seed, None left out: their mean, for a seed that ran twice is one."""
        found = collections.defaultdict(list)
        for run in self.runs:
            if value(run) is not None:
                found[run.seed].append(value(run))
        return [statistics.mean(values) for values in found.values()]


def _without_seed(run):
    return {key: value for key, value in run.settings.items() if key not in SAME_RESULT}


def group_by_data(runs):
    """Which runs can be compared: a list of (title, Groups), one for each data set."""
    by_data = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs:
        data = json.dumps([run.dataset, run.description], sort_keys=True)
        by_data[data][str(sorted(_without_seed(run).items())), run.finished or run.name].append(run)
    titled = []
    for alike in by_data.values():
        groups = [Group(same) for same in alike.values()]
        _tell_apart(groups)
        groups.sort(key=lambda group: (group.first.model, group.first.norm, group.first.batch, group.label))
        title = data_title(groups[0].first)
        if title in [other for other, _ in titled]:
            title += f' (other images: those of {groups[0].first.name})'
        titled.append((title, groups))
    return sorted(titled, key=lambda item: item[0])


def _tell_apart(groups):
    """Add to equal labels what differs in the settings, and the names of runs that are not finished."""
    for group in groups:
        alike = [other.settings for other in groups if other.plain_label == group.plain_label]
        differing = sorted(key for key in set().union(*alike) if len({other.get(key) for other in alike}) > 1)
        group.label += ''.join(f", {key} = {group.settings.get(key, 'not bound')}" for key in differing)
        if not group.first.finished:
            group.label += f', {group.first.done} of {group.first.planned} epochs ({group.first.name})'


def data_title(run):
    """'CIFAR10: 50,000 training and 10,000 validation images of 3 x 32 x 32'."""
    return '{}: {:,} training and {:,} validation images of {}'.format(
        run.dataset, *run.images, ' x '.join(map(str, run.shape)))
