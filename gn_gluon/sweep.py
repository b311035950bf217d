"""A grid of runs: all of it is checked before the first starts, each is a process of its own, a table sums them up."""
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import namedtuple

from tqdm import tqdm

from gn_gluon import compat, config, experiment
from gn_gluon.checkpoint import read_json, signals_as_interrupts, write_text
from gn_gluon.errors import Interrupted, UserError
from gn_gluon.log import read_rows
from gn_gluon.metrics import headline
from gn_gluon.plot import NORMS, plot_batch_sizes
from gn_gluon.replicas import parse_devices

BATCH, REPLICAS, SEED = 'train.batch_per_replica', 'train.num_replicas', 'train.seed'

#: One run of a grid. `settings`: what the grid gives it, {name: gin text}; `bindings`: these and all others, as train
#: takes them; `folder`: its run folder; `experiment`: the Experiment that they make.
Run = namedtuple('Run', 'gin_file settings seed bindings folder experiment')

# A comma between brackets or quotes is part of a value.
_VALUE = r"""(?:'[^']*'|"[^"]*"|\([^)]*\)|\[[^]]*\]|[^,])+"""
_LAST_LINES = 5


# -------------------------------------------------------------------------------------------------- the grid

def parse_grid(texts):
    """What --grid says: {'train.batch_per_replica': ['2', '4']} for ['train.batch_per_replica=2,4'].

    Raises UserError where a name or values are missing, or one is given twice.
    """
    grid = {}
    for text in texts:
        name, _, values = (part.strip() for part in text.partition('='))
        values = [value.strip() for value in re.findall(_VALUE, values)]
        if not name or not values:
            raise UserError(f'--grid {text!r} is not of the form "train.batch_per_replica=2,4,8"')
        if name in grid or len(set(values)) < len(values):
            raise UserError(f'--grid {text!r} gives {name} or one of its values for the second time; name each once')
        grid[name] = values
    return grid


def make_runs(gin_files, grid, num_seeds, bindings, out, data_dir=None):
    """The runs of a grid, each checked as far as that is possible without its data.

    A grid of train.batch_per_replica keeps the images per update of the gin file: learning rate and number of updates
    are then equal in every cell, and only BN's statistics differ. Where train.num_replicas is in the grid or in
    `bindings` it is left as it is; the paper's "8 GPUs x b images" is 'train.num_replicas = 8'.

    Arguments:
        gin_files: paths; one curve each.
        grid: as parse_grid returns it.
        num_seeds: train.seed is 0 to num_seeds - 1.
        bindings: statements that all runs share.
        out: the folder of all run folders.
        data_dir: of the data set; None: datasets/NAME.
    Returns a list of Runs. Raises UserError for the first that cannot be made, or whose folder holds another run.
    """
    runs = []
    for gin_file in gin_files:
        bound = [binding.key for binding in config.parse([gin_file], bindings) if binding.origin.startswith('--')]
        for name in [*grid, SEED]:
            if name in bound or (name == SEED and SEED in grid):
                raise UserError(f'{name} is given twice; it may be in one of --grid, --gin_bindings and, if it is '
                                f'{SEED}, --seeds')
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values))
            try:
                common = bindings + _replicas(gin_file, settings, bindings, keep=REPLICAS in [*grid, *bound])
                runs += [_make_run(gin_file, settings, seed, common, out, data_dir) for seed in range(num_seeds)]
            except UserError as error:
                # gin appends lines of its own.
                raise UserError(f'{_name(gin_file, settings)}: {str(error).splitlines()[0]}') from None
    folders = [run.folder for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f'two runs would share the folder {folder}; rename one of the gin files')
    return runs


def _replicas(gin_file, settings, bindings, keep):
    """The settings as statements, with the train.num_replicas that keeps the images per update unless `keep`."""
    if BATCH not in settings or keep:
        return _statements(settings)
    others = {name: value for name, value in settings.items() if name != BATCH}
    images = _make_experiment(gin_file, bindings + _statements(others))[0].batch_size
    batch = _make_experiment(gin_file, bindings + _statements(settings))[0].batch_per_replica
    if images % batch:
        raise UserError(f'{batch} images per replica do not divide the {images} images per update of {gin_file}; '
                        f'choose divisors of {images}, or give {REPLICAS} too')
    return _statements(dict(settings, **{REPLICAS: images // batch}))


def _statements(settings):
    return [f'{name} = {value}' for name, value in settings.items()]


def _make_experiment(gin_file, bindings):
    parsed = config.parse([gin_file], bindings)
    return config.make(experiment.Experiment), parsed


def _make_run(gin_file, settings, seed, bindings, out, data_dir):
    bindings = bindings + [f'{SEED} = {seed}']
    folder = os.path.join(out, f'{_name(gin_file, settings)},seed={seed}')
    made, parsed = _make_experiment(gin_file, bindings)
    built = experiment.Built(made, folder, data_dir)
    config.refuse_unused(parsed)
    if built.checkpoints.exists():
        experiment.refuse_other_config(folder)
    return Run(gin_file, settings, seed, bindings, folder, made)


def _name(gin_file, settings):
    """'digits_bn_bs2,batch_per_replica=4': a cell, as the beginning of its run folders' names."""
    stem = os.path.splitext(os.path.basename(gin_file))[0]
    parts = [stem] + [f'{short_name(name)}={value}' for name, value in settings.items()]
    return re.sub(r'[^\w.,=@+-]+', '_', ','.join(parts))


def short_name(name):
    """'batch_per_replica' for 'train.batch_per_replica'; other names stay whole."""
    return re.sub(r'^train\.', '', name)


# -------------------------------------------------------------------------------------------------- running

def is_trained(run):
    """Whether all epochs of a Run are done."""
    state = os.path.join(run.folder, 'last', 'state.json')
    return os.path.exists(state) and read_json(
        state, f'delete {run.folder} to start again')['epoch'] >= run.experiment.num_epochs


def is_evaluated(run, names):
    """Whether the figures by the statistics `names` lie beside a Run, or the one figure of norms that have only one."""
    figures = evaluated_errors(run)
    return not names or None in figures or set(names) <= set(figures)


def evaluated_errors(run):
    """Top-1 errors in evaluation.json of a Run, {statistics, or None for norms with one figure: percent}; may be {}."""
    path = _evaluation(run)
    if not os.path.exists(path):
        return {}
    figures = read_json(path, 'delete it, it is then made again')['figures']
    return {figure['statistics']: figure['top1_error'] for figure in figures}


def train_command(run, data_dir=None):
    """The command that trains a Run, as a list."""
    flags = ['--gin_file', run.gin_file, '--workdir', run.folder]
    for binding in run.bindings:
        flags += ['--gin_bindings', binding]
    return ['python', '-m', 'gn_gluon.train', *flags] + (['--data_dir', data_dir] if data_dir else [])


def eval_command(run, names, data_dir=None):
    """The command that evaluates a Run by the statistics `names`, as a list."""
    return ['python', '-m', 'gn_gluon.eval', '--workdir', run.folder, '--json', '--statistics', ','.join(names)] + (
        ['--data_dir', data_dir] if data_dir else [])


def print_plan(runs, names=(), data_dir=None):
    """Print every Run, what there is of it, and the commands that are left."""
    for run in runs:
        made, trained = run.experiment, is_trained(run)
        state = 'complete' if trained else 'to resume' if os.path.exists(os.path.join(run.folder, 'last')) else 'new'
        print(f'{run.folder}: {state}; {NORMS[made.norm.__name__]}, {made.num_replicas} replicas x '
              f'{made.batch_per_replica} images per update, learning rate {made.initial_rate:g}, {made.num_epochs} '
              'epochs')
        if not trained:
            print('  ' + shlex.join(train_command(run, data_dir)))
        if not is_evaluated(run, names):
            print('  ' + shlex.join(eval_command(run, names, data_dir)))
    print(f'{len(runs)} runs, {sum(map(is_trained, runs))} of them complete')


def default_jobs(run):
    """How many Runs at once: 1 on GPUs; on CPUs one for each core, which small networks use best by one thread each."""
    if parse_devices(run.experiment.devices, run.experiment.num_replicas)[0].device_type == 'gpu':
        return 1
    threads = 1 if compat.threads_set_by.startswith('gn_gluon') else compat.num_threads()
    return max(1, compat.usable_cores() // threads)


def run_all(runs, jobs, names=(), data_dir=None):
    """Train what is not trained yet, `jobs` runs at once, and evaluate it by the statistics `names`, if any.

    A run's output is in logs/ beside its folder. A run that fails is printed with its last lines, and the others go
    on. After a signal all runs save and end, and Interrupted is raised. Returns the Runs that failed. Raises
    UserError before the first where one asks for devices that are not there.
    """
    todo = [run for run in runs if not (is_trained(run) and is_evaluated(run, names))]
    for run in todo:
        parse_devices(run.experiment.devices, run.experiment.num_replicas)
    done = len(runs) - len(todo)
    if done:
        print(f'{done} of {len(runs)} runs are complete already')
    environment = _environment(jobs)
    progress, failed, running = _Progress(len(runs), done, jobs), [], []
    waiting = iter(todo)
    try:
        with signals_as_interrupts() as check_signals:
            try:
                while True:
                    running += [_Job(run, names, data_dir, environment)
                                for run in itertools.islice(waiting, jobs - len(running))]
                    if not running:
                        break
                    time.sleep(0.1)
                    check_signals()
                    for job in [job for job in running if job.ended()]:
                        running.remove(job)
                        progress.finished(job)
                        failed += [job.run] if job.code else []
            finally:
                for job in running:
                    job.process.terminate()
                for job in running:
                    job.process.wait()
    except Interrupted:
        print(f'\nstopped; {sum(map(is_trained, runs))} of {len(runs)} runs are complete, and the same command goes on '
              'with the rest', flush=True)
        raise
    finally:
        progress.close()
    return failed


def _environment(jobs):
    """Of the runs: the package that is running here, and each run's share of the cores unless the user chose."""
    environment = dict(os.environ)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [package, os.environ.get('PYTHONPATH')]))
    if compat.threads_set_by.startswith('gn_gluon'):
        environment['OMP_NUM_THREADS'] = str(max(1, compat.usable_cores() // jobs))
    return environment


class _Job:
    """A Run in progress: training and evaluation, what of them is left, one process after the other."""

    def __init__(self, run, names, data_dir, environment):
        self.run, self.code, self._environment = run, 0, environment
        self._started = time.monotonic()
        self._processes = self._start(names, data_dir)
        self.process = next(self._processes)

    def _start(self, names, data_dir):
        """Starts the next process, once the one before has succeeded."""
        path = _log(self.run)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            log = open(path, 'a')
        except OSError as error:
            raise UserError(f'cannot write {path}: {error.strerror}; choose another --out') from None
        with log:
            if not is_trained(self.run):
                yield self._popen(train_command(self.run, data_dir), log, log)
            if not is_evaluated(self.run, names):
                path = _evaluation(self.run)
                with open(path + '.new', 'w') as output:
                    yield self._popen(eval_command(self.run, names, data_dir), output, log)
                os.replace(path + '.new', path)

    def _popen(self, command, output, errors):
        # In a session of its own: Ctrl-C in a terminal would reach it twice, and the second ends it without saving.
        return subprocess.Popen([sys.executable, *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                                env=self._environment, start_new_session=True)

    def ended(self):
        """Whether all is done or a process failed; `code` is then its exit code."""
        if self.process.poll() is None:
            return False
        self.code = self.process.returncode
        self.seconds = time.monotonic() - self._started
        following = None if self.code else next(self._processes, None)
        self.process = following or self.process
        return following is None


def _log(run):
    folder, name = os.path.split(run.folder)
    return os.path.join(folder, 'logs', name + '.log')


def _evaluation(run):
    return os.path.join(run.folder, 'evaluation.json')


class _Progress:
    """A line for each finished run, with the time left; below them a bar where there is a terminal."""

    def __init__(self, total, done, jobs):
        self._jobs, self._seconds = jobs, []
        self._bar = tqdm(total=total, initial=done, unit='run', disable=not sys.stderr.isatty())
        self._total, self._done = total, done

    def finished(self, job):
        self._done += 1
        self._seconds.append(job.seconds)
        name = os.path.basename(job.run.folder)
        if job.code:
            text = f'{name} failed with exit code {job.code} after {job.seconds:.0f} s; the end of {_log(job.run)}:'
            text = '\n    '.join([text, *_tail(_log(job.run))])
        else:
            text = f'{name}: {_headline(job.run)["top1_error"]:.2f} % error, {job.seconds:.0f} s'
        left = statistics.mean(self._seconds) * (self._total - self._done) / self._jobs
        left = f'about {math.ceil(left / 60)} min left' if left else 'all done'
        tqdm.write(f'{self._done} of {self._total} ({left}): {text}')
        sys.stdout.flush()
        self._bar.update()

    def close(self):
        self._bar.close()


def _tail(path):
    with open(path, errors='replace') as file:
        return [line.rstrip() for line in file if line.strip()][-_LAST_LINES:]


# -------------------------------------------------------------------------------------------------- the table

def write_results(runs, out, command, names=()):
    """Write sweep.json and sweep.md in `out`, for a grid of train.batch_per_replica batch_sizes.png and .svg as well.

    Arguments:
        runs: all Runs of the grid, finished or not.
        out: folder.
        command: that made them, text.
        names: of the statistics in the table.
    Returns the table, Markdown.
    """
    rows = summarize(runs, names)
    table, picture = as_markdown(rows, names), ''
    if BATCH in runs[0].settings and any(row['top1_error']['n'] for row in rows):
        for kind in ('png', 'svg'):
            plot_batch_sizes(rows, os.path.join(out, f'batch_sizes.{kind}'))
        picture = '\n![Error against images per replica](batch_sizes.png)\n'
    write_text(os.path.join(out, 'sweep.json'), json.dumps({'command': command, 'rows': rows}, indent=1) + '\n')
    write_text(os.path.join(out, 'sweep.md'), f'{table}{picture}\n`{command}`\n')
    return table


def summarize(runs, names=()):
    """A dict for each cell of the grid, in order; JSON can hold it.

    Entries: gin_file, norm, model, dataset, settings ({name: gin text}), num_replicas, batch_per_replica,
    learning_rate, num_epochs; num_samples (validation images) and last_epochs (that the median is of), None where
    nothing is finished; runs (folder names); top1_error in percent, a dict: seeds (the median of the last five epochs,
    see metrics.headline, a figure for each seed, None where the run is not finished), mean, standard_deviation (over
    n - 1; None below two) and n; statistics: the same of each of `names`, of the last checkpoint.
    """
    rows = []
    for (gin_file, _), cell in itertools.groupby(runs, lambda run: (run.gin_file, run.settings)):
        cell = list(cell)
        made, settings = cell[0].experiment, cell[0].settings
        trained = [run if is_trained(run) else None for run in cell]
        medians = [run and _headline(run) for run in trained]
        known = next(filter(None, medians), {})
        rows.append({
            'gin_file': gin_file, 'norm': made.norm.__name__, 'model': made.model.__name__,
            'dataset': made.dataset.__name__, 'settings': settings, 'num_replicas': made.num_replicas,
            'batch_per_replica': made.batch_per_replica, 'learning_rate': made.initial_rate,
            'num_epochs': made.num_epochs, 'num_samples': known.get('num_samples'), 'last_epochs': known.get('epochs'),
            'runs': [os.path.basename(run.folder) for run in cell],
            'top1_error': _over_seeds([median and median['top1_error'] for median in medians]),
            'statistics': {name: _over_seeds([run and _evaluated(run, name) for run in trained]) for name in names}})
    return rows


def _headline(run):
    return headline(read_rows(os.path.join(run.folder, 'metrics.jsonl')))


def _evaluated(run, name):
    errors = evaluated_errors(run)
    return errors.get(name, errors.get(None))


def _over_seeds(values):
    known = [value for value in values if value is not None]
    return {'seeds': values, 'mean': statistics.mean(known) if known else None,
            'standard_deviation': statistics.stdev(known) if len(known) > 1 else None, 'n': len(known)}


def as_markdown(rows, names=()):
    """The rows of `summarize` as a Markdown table that is legible on a console too."""
    seeds = range(len(rows[0]['top1_error']['seeds']))
    table = [['gin file', 'norm', *map(short_name, rows[0]['settings']), 'error %', 'sd', 'n',
              *[f'seed {seed}' for seed in seeds], 'median of epochs', 'images', *[f'{name} %' for name in names]]]
    for row in rows:
        error = row['top1_error']
        table.append([
            os.path.basename(row['gin_file']), NORMS[row['norm']], *row['settings'].values(), _percent(error['mean']),
            _percent(error['standard_deviation']), str(error['n']), *map(_percent, error['seeds']),
            f"last {row['last_epochs']} of {row['num_epochs']}" if error['n'] else 'not run',
            f"{row['num_samples']:,}" if error['n'] else '-', *[_with_deviation(row['statistics'][n]) for n in names]])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ['-' * width for width in widths])
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in table]
    note = ('Top-1 validation error in percent, the median of the last epochs of each run; mean and standard deviation '
            '(n - 1) over the n seeds.')
    if names:
        note += (f" {', '.join(names)}: the error of the last checkpoint by these statistics of BN, mean and standard "
                 'deviation; other norms have one figure.')
    return '\n'.join([note, '', *lines, ''])


def _percent(value):
    return '-' if value is None else f'{value:.2f}'


def _with_deviation(error):
    deviation = error['standard_deviation']
    return _percent(error['mean']) + (f' ± {deviation:.2f}' if deviation is not None else '')
