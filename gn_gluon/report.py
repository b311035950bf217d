"""python -m gn_gluon.report runs --out report.html: the paper beside our runs, as one HTML page and as Markdown."""
import argparse
import collections
import functools
import html
import itertools
import math
import os
import re
import statistics

import jinja2

from gn_gluon import __version__, config, experiment, paper
from gn_gluon.checkpoint import write_text
from gn_gluon.data import ImageNet
from gn_gluon.errors import UserError, command
from gn_gluon.plot import as_svg, batch_size_curves, draw_bars, draw_batch_sizes, draw_curves, save
from gn_gluon.runs import SAME_RESULT, STATISTICS, Group, collect, group_by_data

#: Lines, or bars, in one figure; more groups make more figures.
MOST_LINES = 10

#: A table of the page: `rows` of text, the first of each row its head.
Table = collections.namedtuple('Table', 'title caption columns rows')
#: A figure of the page: `alternative` says its numbers in words; `drawing`: of matplotlib.
Figure = collections.namedtuple('Figure', 'name caption alternative drawing')

_STATISTICS = dict(zip(STATISTICS, ('running averages', 'each validation batch', 'training images', 'none')))


# ------------------------------------------------------------------------------------------- the paper beside our runs

@functools.lru_cache(maxsize=None)
def _recipe(name):
    """What a run of the paper's recipe `name` is, all of it: {what: text}, as `_experiment` has it of a run."""
    config.parse([name + '.gin'])
    official = {'num_classes': ImageNet.num_classes, 'image_shape': [3, 224, 224], 'class_names': None,
                'num_train': ImageNet.num_train, 'num_validation': ImageNet.num_validation}
    experiment.Built(config.make(experiment.Experiment), '', description=official)
    return dict(config.statements(config.operative_config()), **{
        'epochs finished': '100', 'classes': str(ImageNet.num_classes),
        'images': f'{ImageNet.num_train:,} and {ImageNet.num_validation:,} of 3 x 224 x 224'})


def _experiment(run):
    return dict(run.settings, **{
        'epochs finished': str(run.done), 'classes': str(run.classes),
        'images': '{:,} and {:,} of {}'.format(*run.images, ' x '.join(map(str, run.shape)))})


def differences(run, recipe):
    """What makes `run` another experiment than the paper's `recipe`: a list of phrases, empty where nothing does."""
    ours, papers = _experiment(run), _recipe(recipe)
    return [f"{what}: {ours.get(what, 'not bound')} (recipe: {papers.get(what, 'not bound')})"
            for what in sorted({*ours, *papers} - {*SAME_RESULT}) if ours.get(what) != papers.get(what)]


def match_paper(runs):
    """Which runs are the paper's: {recipe: runs}, and of those near one a list of (run, recipe, what differs)."""
    recipes = {cell.run for cell in paper.CELLS if cell.run}
    matching, others = collections.defaultdict(list), []
    for run in runs:
        candidates = recipes if run.dataset == 'ImageNet' else recipes.intersection(run.gin_files)
        if candidates:
            recipe = min(sorted(candidates), key=lambda name: len(differences(run, name)))
            differing = differences(run, recipe)
            if differing:
                others.append((run, recipe, differing))
            else:
                matching[recipe].append(run)
    return matching, others


def paper_tables(matching):
    """A Table for each of the paper's, with `matching` runs beside its figures."""
    for title, unit in paper.UNITS.items():
        cells = [cell for cell in paper.CELLS if cell.table == title]
        if any(cell.run for cell in cells):
            yield Table(
                title, f'{unit}. Ours: median of the last 5 epochs over {ImageNet.num_validation:,} images; n seeds, '
                'of several the mean ± the standard deviation.',
                ['', 'paper', 'ours, median of last 5', 'difference', 'epochs', 'seed', 'n', 'gin file'],
                [[f'{cell.row}, {cell.column}', _published(cell), *_ours(cell, matching), cell.run] for cell in cells])
        else:
            values = collections.defaultdict(list)
            for cell in cells:
                values[cell.row].append(_published(cell))
            columns = dict.fromkeys(f'paper: {cell.column}' for cell in cells)
            yield Table(title, f'{unit}. This project has no command for it.', ['', *columns, 'ours'],
                        [[row, *figures, 'not run'] for row, figures in values.items()])


def _published(cell):
    return f'{cell.value:.1f}' + ('' if cell.verified else ' (unverified)')


def _ours(cell, matching):
    if cell.run not in matching:
        return ['not run', '–', '–', '–', '0']
    group = Group(matching[cell.run])
    return [_mean(group.errors), f'{statistics.mean(group.errors) - cell.value:+.2f}', str(group.first.done),
            group.seeds, str(len(group.errors))]


def _mean(errors):
    return f'{statistics.mean(errors):.2f}' + (f' ± {statistics.stdev(errors):.2f}' if len(errors) > 1 else '')


def near_table(others):
    """The Table of runs that are near a recipe of the paper, and what differs."""
    return Table('Our other runs of these recipes', 'Not the experiments of the paper, so in none of its tables: what '
                 'differs from the closest recipe. Error [%]: median of the last 5 epochs.',
                 ['run', 'gin file', 'error [%]', 'what differs'],
                 [[run.name, recipe, f"{run.headline['top1_error']:.2f}" if run.headline else '–', '; '.join(differing)]
                  for run, recipe, differing in others])


# ------------------------------------------------------------------------------------------- our runs

def runs_table(runs):
    """The Table of all runs, a row each."""
    return Table('All runs', 'Data: training + validation images. Error: median of the last 5 epochs, or of as many as '
                 'are done; loss: of the last epoch. '
                 'While training: images per second (median over the epochs), time spent waiting for data (mean), '
                 ' peak memory.',
                 ['run', 'data', 'model', 'norm', 'replicas x images', 'seed', 'epochs', 'error [%]', 'of images',
                  'training loss', 'validation loss', 'images/s', 'waiting [%]', 'memory [MiB]', 'state', 'hardware'],
                 [_run_row(run) for run in runs])


def _run_row(run):
    figures = ['–'] * 7
    if run.done:
        figures = [f"{run.headline['top1_error']:.2f}", f"{run.headline['num_samples']:,}",
                   f"{run.train[-1]['loss']:.4f}", f"{run.validation[-1]['loss']:.4f}",
                   f"{run.over_epochs(statistics.median, 'images_per_second'):,.0f}",
                   f"{100 * run.over_epochs(statistics.mean, 'data_wait_share'):.1f}",
                   f"{run.over_epochs(max, 'peak_memory_bytes') / 2**20:,.0f}"]
    state = 'finished' if run.finished else 'unfinished'
    if run.resumed:
        state += f', interrupted {run.resumed} times'
    data = '{}, {:,} + {:,}'.format(run.dataset, *run.images)
    return [run.name, data, run.model, run.norm, f'{run.replicas} x {run.batch}', str(run.seed),
            f'{run.done} of {run.planned}', *figures, state, run.hardware]


def seeds_table(title, groups):
    """The Table of the finished runs on one data set, those that differ only in the seed in one row."""
    return Table(title, 'Finished runs; a row for those that differ only in the seed. Top-1 validation error [%], '
                        'median of the last 5 epochs: over the n seeds; of a seed that ran several times the mean.',
                 ['experiment', 'seed', 'n', 'mean', 'standard deviation', 'lowest', 'highest'],
                 [[group.label, group.seeds, str(len(errors)), f'{statistics.mean(errors):.2f}',
                   f'{statistics.stdev(errors):.2f}' if len(errors) > 1 else '–', f'{min(errors):.2f}',
                   f'{max(errors):.2f}']
                  for group in groups if group.first.finished for errors in [group.errors]])


def statistics_table(title, groups):
    """The Table of evaluation.json on one data set: errors by what BN normalises with."""
    rows = []
    for group in groups:
        errors = [group.per_seed(lambda run, name=name: next(
            (figure['top1_error'] for figure in run.figures if figure['statistics'] == name), None))
            for name in STATISTICS]
        if any(errors):
            rows.append([group.label, *(f'{_mean(found)} (n = {len(found)})' if found else '–' for found in errors)])
    return Table(title, 'Top-1 validation error [%] of the evaluated weights, by the statistics that BN normalises '
                        'with: mean ± standard deviation of n seeds. "None": the norm has no such statistics (GN, LN, '
                        'IN).',
                 ['experiment', *_STATISTICS.values()], rows)


# ------------------------------------------------------------------------------------------- figures

def page_figures(by_data, sweeps):
    """All Figures of the page, {section: list}, of what `group_by_data` and `collect` return."""
    by_data = [(number, *item) for number, item in enumerate(by_data, 1)]
    return {'Error against images per replica': [sweep_figure(i, *sweep) for i, sweep in enumerate(sweeps, 1)],
            'Loss and error': [figure for item in by_data for figure in curve_figures(*item)],
            'Throughput and memory': [figure for item in by_data for figure in speed_figures(*item)]}


def sweep_figure(number, name, rows):
    """The Figure of the rows of a sweep.json."""
    ours = {curve.label: {batch: _mean([each for each in error['seeds'] if each is not None])
                          for batch, error in curve.errors.items()} for curve in batch_size_curves(rows)}
    said = ['; '.join(f'{label}: ' + ', '.join(f'{error} with {batch}' for batch, error in sorted(errors.items()))
                      for label, errors in curves.items()) for curves in (ours, paper.FIGURE_1)]
    return Figure(
        f'batch-sizes-{number}', f'The sweep {name} beside Figure 1 of the paper: mean and standard deviation over the '
        'seeds (dots). The scales differ.',
        'Top-1 validation error [%] with so many images per replica. {}. The paper, per GPU: {}.'.format(*said),
        draw_batch_sizes(rows))


def curve_figures(number, title, groups):
    """Figures of loss and error on one data set."""
    for part, chosen, of in _parts(groups):
        said = [f"{group.label}: {_mean([run.validation[-1]['top1_error'] for run in group.runs])} %, loss "
                f"{statistics.mean(run.validation[-1]['loss'] for run in group.runs):.4f}" for group in chosen]
        yield Figure(
            f'curves-{number}-{part}', f'{title}{of}. Loss and top-1 error over the epochs; of runs that differ only '
            'in the seed their mean, and a band from the lowest to the highest. Of equal lines the last is seen.',
            f"Validation error and loss after the last epoch. {'; '.join(said)}.",
            draw_curves([(group.label, group.first.norm, [[*run.train, *run.validation] for run in group.runs])
                         for group in chosen]))


def speed_figures(number, title, groups):
    """Figures of throughput and memory on one data set."""
    for part, chosen, of in _parts(groups):
        speeds = [statistics.median(run.over_epochs(statistics.median, 'images_per_second') for run in group.runs)
                  for group in chosen]
        memory = [max(run.over_epochs(max, 'peak_memory_bytes') for run in group.runs) / 2**20 for group in chosen]
        said = [f'{group.label}: {speed:,.0f} images per second, {peak:,.0f} MiB'
                for group, speed, peak in zip(chosen, speeds, memory)]
        yield Figure(
            f'speed-{number}-{part}', f'{title}{of}. Images per second while training (median over epochs and runs) '
            'and peak memory. Compare on equal hardware only: see the table of all runs.', '; '.join(said) + '.',
            draw_bars([group.label for group in chosen], {'images per second': speeds, 'peak memory [MiB]': memory}))


def _parts(groups):
    """The groups with a finished epoch, MOST_LINES at a time: (number, groups, what the caption says of it)."""
    groups = [group for group in groups if group.first.done]
    count = math.ceil(len(groups) / MOST_LINES)
    for i in range(count):
        of = f', part {i + 1} of {count} (at most {MOST_LINES} lines each)' if count > 1 else ''
        yield i + 1, groups[i * MOST_LINES:(i + 1) * MOST_LINES], of


def described(figure):
    """The SVG of a Figure with its text alternative, and ids that no other figure on the page has."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{figure.name}-', as_svg(figure.drawing))
    words = html.escape(figure.alternative)
    opening, rest = svg.split('>', 1)
    return (f'{opening} role="img" aria-label="{words}"><title>{html.escape(figure.caption)}</title>'
            f'<desc>{words}</desc>{rest}')


def save_figures(figures, folder):
    """Write each Figure into a folder as NAME.png and as NAME.svg, which holds the text alternative."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make {folder}: {error.strerror}; choose another --out') from None
    for figure in figures:
        path = os.path.join(folder, figure.name)
        write_text(path + '.svg', described(figure).replace('<svg ', '<svg style="background: white" ', 1))
        save(figure.drawing, path + '.png')


# ------------------------------------------------------------------------------------------- the page

def make_figures(roots, folder):
    """Write the figures of the page into a folder, see save_figures. roots: as of make_report.

    Returns a list of (folder, why it could not be read). Raises UserError when there is no run.
    """
    runs, sweeps, unreadable = collect(roots)
    save_figures(itertools.chain(*page_figures(group_by_data(runs), sweeps).values()), folder)
    return unreadable


def make_report(roots, path, title):
    """Write the page to `path`, Markdown beside it, and the figures of that into a folder beside both.

    Arguments:
        roots: run folders, or folders with run folders below them.
        path: ends in .html.
        title: heading of the page.
    Returns the number of runs, and a list of (folder, why it could not be read). Raises UserError when there is no run.
    """
    if not path.endswith('.html'):
        raise UserError(f'--out {path} does not end in .html; the Markdown is written beside the page')
    runs, sweeps, unreadable = collect(roots)
    by_data = group_by_data(runs)
    figures = page_figures(by_data, sweeps)
    matching, others = match_paper(runs)
    sections = [
        ('The paper beside our runs', [*paper_tables(matching), near_table(others)]),
        ('Our runs', [runs_table(runs), *(seeds_table(*item) for item in by_data)]),
        ('What BN normalises with', [statistics_table(*item) for item in by_data]),
        *figures.items()]
    sections = [(name, [part for part in parts if isinstance(part, Figure) or part.rows]) for name, parts in sections]
    stem = path[:-len('.html')]
    save_figures(itertools.chain(*figures.values()), stem + '_figures')
    _write(stem, {'title': title, 'version': __version__, 'runs': runs, 'unreadable': unreadable,
                  'sections': [(name, parts) for name, parts in sections if parts]})
    return len(runs), unreadable


def _write(stem, content):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('gn_gluon'), autoescape=jinja2.select_autoescape(['html']), trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(md=in_markdown, described=described)
    environment.tests.update(number=re.compile(r'(not run|–|[-+]?\d[\d.,]*( ± [\d.]+)?( \(.*\))?)$').match,
                             figure=lambda part: isinstance(part, Figure))
    for kind in ('html', 'md'):
        text = environment.get_template('report.' + kind).render(content, folder=os.path.basename(stem) + '_figures')
        write_text(f'{stem}.{kind}', text)


def in_markdown(text):
    """Text in one line of which Markdown makes nothing else."""
    return re.sub(r'([\\`*~\[\]<>|&])', r'\\\1', ' '.join(text.split()))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog='python -m gn_gluon.report', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUNS', help='run folders, or folders with run folders below them')
    parser.add_argument('--out', default='report.html', help='the page to write; Markdown and its figures go beside it '
                                                             '(default: %(default)s)')
    parser.add_argument('--title', default='gn_gluon: the paper beside our runs', help='heading of the page')
    flags = parser.parse_args()
    number, unreadable = make_report(flags.runs, flags.out, flags.title)
    for folder, why in unreadable:
        print(f'could not be read: {folder}: {why}')
    print(f'{flags.out}: {number} runs')


if __name__ == '__main__':
    command(main)
