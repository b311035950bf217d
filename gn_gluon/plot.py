"""python -m gn_gluon.plot RUN... --out curves.png: training curves from run folders."""
import argparse
import collections
import io
import itertools
import os
import textwrap

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no display
import numpy as np  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from gn_gluon.errors import UserError, command  # noqa: E402
from gn_gluon.log import read_rows  # noqa: E402
from gn_gluon.paper import FIGURE_1  # noqa: E402

#: What the norms are called in tables and figures. Each has its colour and marker, by its place here.
NORMS = {'BatchNorm': 'BN', 'GroupNorm': 'GN', 'LayerNorm': 'LN', 'InstanceNorm': 'IN', 'BatchRenorm': 'BR',
         'NoNorm': 'no norm'}

# Of plot_batch_sizes; errors: {images per replica: what sweep.summarize has of that cell}.
_Curve = collections.namedtuple('_Curve', 'norm label errors')


def plot_curves(folders, path):
    """Draw loss and top-1 error over the epochs, training dashed and validation solid, one colour per run folder.

    Arguments:
        folders: run folders.
        path: of the PNG or SVG to write.
    Raises UserError when a folder holds no finished epoch.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for i, folder in enumerate(folders):
        rows = read_rows(os.path.join(folder, 'metrics.jsonl'))
        if not rows:
            raise UserError(f'{folder} holds no finished epoch (metrics.jsonl); train it first')
        name = os.path.basename(os.path.normpath(folder))
        for split, style in (('train', '--'), ('validation', '-')):
            chosen = [row for row in rows if row['split'] == split]
            if not chosen:
                continue
            epochs = [row['epoch'] + 1 for row in chosen]
            for axis, key in zip(axes, ('loss', 'top1_error')):
                label = f'{name}, {split}'
                if key == 'top1_error':
                    label += f': {chosen[-1][key]:.2f} %'
                axis.plot(epochs, [row[key] for row in chosen], style, color=f'C{i % 10}', label=label,
                          marker='.' if len(epochs) < 30 else None)
    axes[0].set_ylabel('cross entropy [nats per image]')
    axes[1].set_ylabel('top-1 error [%]')
    for axis in axes:
        axis.set_xlabel('epoch')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize='small')
    _save(figure, path)


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
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4.5 * len(panels), 4.2), squeeze=False, sharey=True,
                                constrained_layout=True)
    for axis, ((folder, layer), rows) in zip(axes[0], panels.items()):
        for which in reversed(rows[0]['percentiles']):
            axis.plot([row['epoch'] for row in rows], [row['percentiles'][which] for row in rows],
                      marker='.' if len(rows) < 30 else None, label=f'{which} %')
        axis.set_title(f"{os.path.basename(os.path.normpath(folder))}, {layer}\n{rows[-1]['num_images']} validation "
                       'images', fontsize='medium')
        axis.set_xlabel('epoch')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel('responses: percentiles')
    axes[0][-1].legend(fontsize='small')
    _save(figure, path)


def plot_batch_sizes(rows, path):
    """Draw error against images per replica beside the same of the paper, its Figure 1.

    Arguments:
        rows: of a sweep.json, as sweep.summarize describes them. A curve for each gin file and for each setting besides
            train.batch_per_replica: means with standard deviations, the seeds as dots; for BN a curve by each of the
            statistics other than the running averages, if there are any.
        path: of the PNG or SVG to write.
    """
    rows = [row for row in rows if row['top1_error']['n']]
    # For a README: two panels of half its width.
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(9, 4.2), constrained_layout=True)
    curves = _batch_size_curves(rows)
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
    ours.set_title('{dataset}, {model}, {num_samples:,} images\n'.format(**rows[0]) + seeds, fontsize='medium')
    ours.set_xlabel('images per replica' + (f' ({per_update.pop()} per update)' if len(per_update) == 1 else ''))
    paper.set_title('ImageNet, ResNet-50, 50,000 images\nthe paper, Figure 1', fontsize='medium')
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
    _save(figure, path)


def _batch_size_curves(rows):
    """The _Curves of plot_batch_sizes, in the order of the rows."""
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
            curve = curves.setdefault((row['gin_file'], label), _Curve(norm, label, {}))
            curve.errors[row['batch_per_replica']] = error
    labels = [label for _, label in curves]
    return [curve if labels.count(label) == 1 else curve._replace(label=f'{label} ({os.path.basename(gin_file)})')
            for (gin_file, label), curve in curves.items()]


def _color(norm):
    return f'C{list(NORMS.values()).index(norm)}'


def _marker(norm):
    return 'so^vDx'[list(NORMS.values()).index(norm)]


def _save(figure, path):
    try:
        # The same figure is the same file: no date, no random names.
        with matplotlib.rc_context({'svg.hashsalt': 'gn_gluon'}):
            figure.savefig(path, dpi=110, metadata={'Date': None} if str(path).endswith('.svg') else None)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {path}: {error}') from None
    finally:
        plt.close(figure)


#: Ink that follows the page's own colour: no line has it, and `_svg` puts currentColor in its place.
_INK = '#000001'
_PAGE = dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), _INK)
_PAGE.update({'axes.facecolor': 'none', 'figure.facecolor': 'none', 'legend.frameon': False, 'axes.titlesize': 'medium',
              'svg.fonttype': 'none', 'svg.hashsalt': 'gn_gluon', 'text.parse_math': False})
#: Each stands out by 3 : 1 from white and from near black.
_COLOURS = ('#1f77b4', '#d9540b', '#2a9d3a', '#9467bd', '#d62728', '#8f7a00', '#0f9aa0', '#c2459b', '#7f7f7f',
            '#a0622d')
_QUANTITIES = {'loss': 'cross entropy [nats per image]', 'top1_error': 'top-1 error [%]'}
_STYLES = {'GroupNorm': '-', 'BatchNorm': '--', 'LayerNorm': ':', 'InstanceNorm': '-.'}


def curves_svg(lines):
    """Loss and top-1 error over the epochs, training and validation side by side, as the text of an SVG for a page.

    Arguments:
        lines: list of (label, norm, runs), at most ten of a norm; `runs` are the rows of metrics.jsonl of runs of equal
            length, drawn as their mean and, where there are several, a band from the lowest to the highest. The norm
            sets the style of a line, its place among the lines of that norm the colour.
    """
    with matplotlib.rc_context(_PAGE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7.5 + 0.1 * len(lines)), sharex=True, sharey='row',
                                    constrained_layout=True)
        drawn = []
        for label, norm, runs in lines:
            colour = _COLOURS[drawn.count(norm) % len(_COLOURS)]
            drawn.append(norm)
            for axis, (split, key) in zip(axes.T.flat, itertools.product(('train', 'validation'), _QUANTITIES)):
                values = np.array([[row[key] for row in rows if row['split'] == split] for rows in runs])
                epochs = np.arange(values.shape[1]) + 1
                axis.plot(epochs, values.mean(axis=0), color=colour, marker='.' if len(epochs) < 3 else None,
                          linestyle=_STYLES.get(norm, (0, (5, 1, 1, 1, 1, 1))),
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
        return _svg(figure)


def bars_svg(labels, panels):
    """A row of bars for each label, as the text of an SVG for a page. panels: {title: values}, side by side."""
    labels = [textwrap.fill(label, 50) for label in labels]
    height = 0.15 * (1 + max(label.count('\n') + 1 for label in labels))
    with matplotlib.rc_context(_PAGE):
        figure, axes = plt.subplots(1, len(panels), figsize=(10, 1 + height * len(labels)), sharey=True, squeeze=False,
                                    constrained_layout=True)
        for axis, (title, values) in zip(axes[0], panels.items()):
            bars = axis.barh(range(len(labels)), values, color=_COLOURS[0])
            axis.bar_label(bars, [f'{value:,.0f}' for value in values], padding=3, fontsize='small')
            axis.set_title(title)
            axis.margins(x=0.15)
        axes[0][0].set_yticks(range(len(labels)), labels, fontsize='small')
        axes[0][0].invert_yaxis()
        return _svg(figure)


def _svg(figure):
    text = io.StringIO()
    figure.savefig(text, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    plt.close(figure)
    return text.getvalue()[text.getvalue().index('<svg'):].replace(_INK, 'currentColor')


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog='python -m gn_gluon.plot', description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder, e.g. runs/digits_gn_bs2')
    parser.add_argument('--percentiles', action='store_true',
                        help="draw the percentiles of a layer's responses instead (runs with percentiles.layer)")
    parser.add_argument('--out', help='PNG or SVG to write (default: curves.png, or percentiles.png)')
    arguments = parser.parse_args()
    if arguments.percentiles:
        path = arguments.out or 'percentiles.png'
        plot_percentiles(arguments.runs, path)
    else:
        path = arguments.out or 'curves.png'
        plot_curves(arguments.runs, path)
    print(path)


if __name__ == '__main__':
    command(main)
