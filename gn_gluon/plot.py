"""python -m gn_gluon.plot RUN... --out curves.png: pictures of run folders; --report: those of the report's page."""
import argparse
import collections
import io
import itertools
import os
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gn_gluon.checkpoint import write_bytes
from gn_gluon.errors import UserError, command
from gn_gluon.log import read_rows
from gn_gluon.paper import FIGURE_1

#: What the norms are called in tables and figures. Each has its colour and marker, by its place here.
NORMS = {'BatchNorm': 'BN', 'GroupNorm': 'GN', 'LayerNorm': 'LN', 'InstanceNorm': 'IN', 'BatchRenorm': 'BR',
         'NoNorm': 'no norm'}

#: Ink that follows a page's own colour: no line has it, and `as_svg` puts currentColor in its place.
_INK = '#000001'
_STYLE = dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), _INK)
_STYLE.update({
    'axes.facecolor': 'none', 'figure.facecolor': 'none', 'legend.frameon': False, 'axes.titlesize': 'medium',
    # Each stands out by 3 : 1 from white and from near black.
    'axes.prop_cycle': matplotlib.cycler(color=['#1f77b4', '#d9540b', '#2a9d3a', '#9467bd', '#d62728', '#8f7a00',
                                                '#0f9aa0', '#c2459b', '#7f7f7f', '#a0622d']),
    # Text stays text, that of folder names too; the same figure is the same file.
    'svg.fonttype': 'none', 'text.parse_math': False, 'svg.hashsalt': 'gn_gluon'})
_QUANTITIES = {'loss': 'cross entropy [nats per image]', 'top1_error': 'top-1 error [%]'}
_LINES = {None: '-', 'GroupNorm': '-', 'BatchNorm': '--', 'LayerNorm': ':', 'InstanceNorm': '-.'}

#: A line of `draw_batch_sizes`; errors: {images per replica: what sweep.summarize has of that cell}.
Curve = collections.namedtuple('Curve', 'norm label errors')


# ------------------------------------------------------------------------------------------- curves

def plot_curves(folders, path):
    """Draw loss and top-1 error over the epochs, a line for each run folder.

    Arguments:
        folders: run folders.
        path: of the PNG or SVG to write.
    Raises UserError when a folder holds no finished epoch.
    """
    lines = []
    for folder in folders:
        rows = read_rows(os.path.join(folder, 'metrics.jsonl'))
        errors = [row['top1_error'] for row in rows if row['split'] == 'validation']
        if not errors:
            raise UserError(f'{folder} holds no finished epoch (metrics.jsonl); train it first')
        name = os.path.basename(os.path.normpath(folder))
        lines.append((f'{name}: validation error {errors[-1]:.2f} %', None, [rows]))
    save(draw_curves(lines), path)


@matplotlib.rc_context(_STYLE)
def draw_curves(lines):
    """A figure of loss and top-1 error over the epochs, training and validation side by side.

    Arguments:
        lines: list of (label, norm, runs), at most ten of a norm; `runs` are the rows of metrics.jsonl of runs of equal
            length, drawn as their mean and, where there are several, a band from the lowest to the highest. The norm,
            or None, sets the style of a line, its place among the lines of that norm the colour.
    """
    figure = Figure(figsize=(10, 7.5 + 0.1 * len(lines)), layout='constrained')
    axes = figure.subplots(2, 2, sharex=True, sharey='row')
    for i, (label, norm, runs) in enumerate(lines):
        colour = f'C{[other for _, other, _ in lines[:i]].count(norm)}'
        for axis, (split, key) in zip(axes.T.flat, itertools.product(('train', 'validation'), _QUANTITIES)):
            values = np.array([[row[key] for row in rows if row['split'] == split] for rows in runs])
            epochs = np.arange(values.shape[1]) + 1
            axis.plot(epochs, values.mean(axis=0), color=colour, marker='.' if len(epochs) < 3 else None,
                      linestyle=_LINES.get(norm, (0, (5, 1, 1, 1, 1, 1))),
                      label=textwrap.fill(label, 60) if axis is axes[0][0] else None)
            if len(runs) > 1:
                axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
    for axis, title in zip(axes[0], ('training', 'validation')):
        axis.set_title(title)
    for axis, label in zip(axes[:, 0], _QUANTITIES.values()):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylim(0, 1.05 * max(axis.dataLim.ymax for axis in row) or 1)
    for axis in axes[1]:
        axis.set_xlabel('epoch')
    figure.legend(loc='outside lower center', ncols=2, fontsize='small')
    return figure


# ------------------------------------------------------------------------------------------- percentiles

@matplotlib.rc_context(_STYLE)
def plot_percentiles(folders, path):
    """Draw how the percentiles of a layer's responses evolve, as Figure 6 of the paper: one panel per run and layer.

    Arguments:
        folders: run folders, trained with percentiles.layer.
        path: of the PNG or SVG to write.
    Raises UserError when a folder holds no percentiles.
    """
    panels = {}
    for folder in folders:
        rows = read_rows(os.path.join(folder, 'percentiles.jsonl'))
        if not rows:
            raise UserError(f"{folder} holds no percentiles (percentiles.jsonl); train it with --gin_bindings "
                            "'percentiles.layer = \"NAME\"'")
        for row in rows:
            panels.setdefault((folder, row['layer']), []).append(row)
    # One scale for all: that norms keep responses in bounds is what the figure is for.
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.2), layout='constrained')
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, ((folder, layer), rows) in zip(axes[0], panels.items()):
        for which in reversed(rows[0]['percentiles']):
            axis.plot([row['epoch'] for row in rows], [row['percentiles'][which] for row in rows],
                      marker='.' if len(rows) < 30 else None, label=f'{which} %')
        axis.set_title(f"{os.path.basename(os.path.normpath(folder))}, {layer}\n"
                       f"{rows[-1]['num_images']} validation images")
        axis.set_xlabel('epoch')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel('responses: percentiles')
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc='outside right upper', fontsize='small')
    save(figure, path)


# ------------------------------------------------------------------------------------------- batch sizes

def plot_batch_sizes(rows, path):
    """Write `draw_batch_sizes` of the rows of a sweep.json to `path`, PNG or SVG."""
    save(draw_batch_sizes(rows), path)


@matplotlib.rc_context(_STYLE)
def draw_batch_sizes(rows):
    """A figure of error against images per replica beside the same of the paper, its Figure 1.

    Arguments:
        rows: of a sweep.json, as sweep.summarize describes them. A curve for each gin file and for each setting besides
            train.batch_per_replica: means with standard deviations, the seeds as dots; for BN a curve by each of the
            statistics other than the running averages, if there are any.
    """
    rows = [row for row in rows if row['top1_error']['n']]
    # For a README: two panels of half its width.
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    ours, paper = figure.subplots(1, 2)
    curves = batch_size_curves(rows)
    for i, curve in enumerate(curves):
        # Beside one another, or the error bars of one hide those of the next; the seeds beside their bar likewise.
        shift = 2 ** (0.12 * ((len(curves) - 1) / 2 - i))
        style = ['-', '--', ':', '-.'][[other.norm for other in curves[:i]].count(curve.norm) % 4]
        points = sorted(curve.errors.items())
        x = [batch * shift for batch, _ in points]
        ours.errorbar(x, [error['mean'] for _, error in points],
                      [error['standard_deviation'] or 0 for _, error in points], color=_color(curve.norm),
                      linestyle=style, marker=_marker(curve.norm), markersize=5, capsize=3, label=curve.label)
        for place, (_, error) in zip(x, points):
            each = [seed for seed in error['seeds'] if seed is not None]
            ours.plot([place / 1.04] * len(each), each, '.', markersize=5, color=_color(curve.norm), alpha=0.6)
    for norm, errors in FIGURE_1.items():
        paper.plot(list(errors), list(errors.values()), marker=_marker(norm), color=_color(norm), label=norm)
    per_update = {row['num_replicas'] * row['batch_per_replica'] for row in rows}
    counts = [row['top1_error']['n'] for row in rows]
    seeds = '1 seed'
    if max(counts) > 1:
        number = ' to '.join(map(str, sorted({min(counts), max(counts)})))
        seeds = f'mean and standard deviation of {number} seeds'
    ours.set_title('{dataset}, {model}, {num_samples:,} images\n'.format(**rows[0]) + seeds)
    ours.set_xlabel('images per replica' + (f' ({per_update.pop()} per update)' if len(per_update) == 1 else ''))
    paper.set_title('ImageNet, ResNet-50, 50,000 images\nthe paper, Figure 1')
    paper.set_xlabel('images per GPU (8 GPUs)')
    for axis, batches, epochs in ((ours, {row['batch_per_replica'] for row in rows}, rows[0]['last_epochs']),
                                  (paper, set(FIGURE_1['BN']), 5)):
        axis.set_ylabel(f'top-1 validation error [%],\nmedian of the last {epochs} epochs')
        axis.set_xscale('log', base=2)
        axis.set_xticks(sorted(batches), list(map(str, sorted(batches))))
        axis.minorticks_off()
        axis.set_xlim(max(batches) * 1.3, min(batches) / 1.3)
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in (paper, ours) for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc='outside lower center', ncol=4)
    return figure


def batch_size_curves(rows):
    """The Curves of those rows of a sweep.json that have a finished run, in their order."""
    curves = {}
    for row in rows:
        norm = NORMS[row['norm']]
        others = [f"{name.split('.')[-1]} {value}" for name, value in row['settings'].items()
                  if name not in ('train.batch_per_replica', 'train.num_replicas', 'train.norm')]
        lines = {'': row['top1_error']}
        if row['norm'] in ('BatchNorm', 'BatchRenorm'):
            lines.update((f'{name} statistics, last epoch', error) for name, error in row['statistics'].items()
                         if name != 'running' and error['n'])
        for line, error in lines.items():
            label = ', '.join(filter(None, [norm, *others, line]))
            curve = curves.setdefault((row['gin_file'], label), Curve(norm, label, {}))
            curve.errors[row['batch_per_replica']] = error
    labels = [label for _, label in curves]
    return [curve if labels.count(label) == 1 else curve._replace(label=f'{label} ({os.path.basename(gin_file)})')
            for (gin_file, label), curve in curves.items()]


def _color(norm):
    return f'C{list(NORMS.values()).index(norm)}'


def _marker(norm):
    return 'so^vDx'[list(NORMS.values()).index(norm)]


# ------------------------------------------------------------------------------------------- bars

@matplotlib.rc_context(_STYLE)
def draw_bars(labels, panels):
    """A figure of a row of bars for each label. panels: {title: values}, side by side."""
    labels = [textwrap.fill(label, 50) for label in labels]
    height = 0.15 * (1 + max(label.count('\n') + 1 for label in labels))
    figure = Figure(figsize=(10, 1 + height * len(labels)), layout='constrained')
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (title, values) in zip(axes[0], panels.items()):
        bars = axis.barh(range(len(labels)), values, color='C0')
        axis.bar_label(bars, [f'{value:,.0f}' for value in values], padding=3, fontsize='small')
        axis.set_title(title)
        axis.margins(x=0.15)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize='small')
    axes[0][0].invert_yaxis()
    return figure


# ------------------------------------------------------------------------------------------- files

def save(figure, path):
    """Write a figure with dark ink on white. Raises UserError when `path` is neither a PNG nor an SVG."""
    kind = os.path.splitext(path)[1]
    if kind not in ('.png', '.svg'):
        raise UserError(f'{path} ends neither in .png nor in .svg; choose another name')
    write_bytes(path, _render(figure, format=kind[1:], facecolor='white'))


def as_svg(figure):
    """A figure as the text of an SVG for a page: in the page's own ink, on its own background."""
    text = _render(figure, format='svg').decode()
    return text[text.index('<svg'):].replace(_INK, 'currentColor')


@matplotlib.rc_context(_STYLE)
def _render(figure, **options):
    content = io.BytesIO()
    figure.savefig(content, dpi=110, metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')), **options)
    figure.set_layout_engine('none')  # or the next picture of it is laid out a little differently
    return content.getvalue()


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog='python -m gn_gluon.plot', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder, e.g. runs/digits_gn_bs2')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument('--percentiles', action='store_true',
                      help="draw the percentiles of a layer's responses instead (runs with percentiles.layer)")
    kind.add_argument('--report', action='store_true',
                      help="draw the figures of gn_gluon.report's page instead, each as PNG and as SVG; RUN may then "
                           'also be a folder with run folders below it')
    parser.add_argument('--out', help='PNG or SVG to write (default: curves.png, or percentiles.png); with --report '
                                      'the folder to write into (default: figures)')
    flags = parser.parse_args()
    if flags.report:
        from gn_gluon import report  # it imports this module
        path = flags.out or 'figures'
        for folder, why in report.make_figures(flags.runs, path):
            print(f'could not be read: {folder}: {why}')
    elif flags.percentiles:
        path = flags.out or 'percentiles.png'
        plot_percentiles(flags.runs, path)
    else:
        path = flags.out or 'curves.png'
        plot_curves(flags.runs, path)
    print(path)


if __name__ == '__main__':
    command(main)
