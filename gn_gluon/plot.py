"""python -m gn_gluon.plot RUN... --out curves.png: training curves from run folders."""
import argparse
import os

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no display
from matplotlib.ticker import MaxNLocator  # noqa: E402

from gn_gluon.errors import UserError, command  # noqa: E402
from gn_gluon.log import read_rows  # noqa: E402


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


def _save(figure, path):
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {path}: {error}') from None
    finally:
        plt.close(figure)


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
