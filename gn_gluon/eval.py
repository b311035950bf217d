"""python -m gn_gluon.eval --gin_file gin/cifar_bn.gin: evaluate that experiment's run over the whole validation set."""
import argparse
import json

from absl.flags import argparse_flags

from gn_gluon.errors import command
from gn_gluon.train import add_checkpoint_flag, add_flags, named_workdir, positive_number

#: What --statistics may name, and how a figure by it is announced.
STATISTICS = {
    'running': 'running averages',
    'batch': 'statistics of each batch of {batch_size} validation images',
    'precise': 'statistics of {num_training_images} training images in batches of {batch_size}'}


def statistics_list(text):
    """argparse's type of --statistics: a tuple of names."""
    names = tuple(dict.fromkeys(text.split(',')))
    for name in names:
        if name not in STATISTICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(STATISTICS)}")
    return names


def main():
    """The command line."""
    parser = argparse_flags.ArgumentParser(
        prog='python -m gn_gluon.eval', description=__doc__,
        epilog="A run folder is evaluated by its own config.gin; --gin_file alone says which folder that is. The "
               "figures of 'batch' and 'precise' are those of BN alone: any other norm has one figure.")
    add_flags(parser)
    add_checkpoint_flag(parser)
    parser.add_argument('--statistics', type=statistics_list, default='running', metavar='LIST',
                        help='what BN normalises by, comma-separated, a figure for each: running (the running '
                             'averages), batch (the statistics of each batch of validation images), precise (those of '
                             'augmented training images, with the final weights) (default: %(default)s)')
    parser.add_argument('--statistics_batch', type=positive_number, metavar='N',
                        help='images per batch of batch and precise (default: train.batch_per_replica)')
    parser.add_argument('--precise_images', type=positive_number, default=8192, metavar='N',
                        help='training images of precise, or as many as there are (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    flags = parser.parse_args()
    workdir = named_workdir(flags, 'python -m gn_gluon.eval --workdir runs/digits_gn_bs2')
    from gn_gluon import experiment, plan
    made, bindings = experiment.recorded_experiment(
        workdir, flags.gin_file, flags.gin_bindings,
        needs_run=flags.checkpoint in ('last', 'best') and not flags.plan)
    data_dir = flags.data_dir or experiment.recorded_data_dir(workdir)
    if flags.plan:
        plan.print_plan(made, bindings, workdir, data_dir)
        return
    result = experiment.evaluate_run(made, bindings, workdir, data_dir, flags.checkpoint,
                                     flags.statistics, flags.statistics_batch, flags.precise_images)
    print(json.dumps(result) if flags.json else as_text(result))


def as_text(result):
    """What `experiment.evaluate_run` returned: the headline, and a line for each figure."""
    lines = []
    if result['headline']:
        lines.append('median of the last {epochs} of {last_epoch} epochs: top-1 error {top1_error:.2f} %, top-5 error '
                     '{top5_error:.2f} %, n = {num_samples}'.format(**result['headline']))
    which = result['checkpoint'] + ('' if result['epoch'] is None else f" ({result['epoch']:g} epochs)")
    for figure in result['figures']:
        by = ', ' + STATISTICS[figure['statistics']].format(**figure) if figure['statistics'] else ''
        lines.append(which + by + ': top-1 error {top1_error:.2f} %, top-5 error {top5_error:.2f} %, loss {loss:.4f}, '
                     'n = {num_samples}'.format(**figure))
    return '\n'.join(lines)


if __name__ == '__main__':
    command(main)
