"""python -m gn_gluon.train --gin_file gin/digits_gn_bs2.gin: train, or resume, what a gin file declares."""
import argparse
import json
import os

from absl.flags import argparse_flags

from gn_gluon.errors import UserError, command


def add_run_flags(parser):
    """The flags that say which run: of train, eval and export."""
    parser.add_argument('--gin_file', action='append', default=[], metavar='FILE',
                        help='what to train, e.g. gin/digits_gn_bs2.gin; repeatable, later ones win')
    parser.add_argument('--gin_bindings', action='append', default=[], metavar='BINDING',
                        help="a statement on top, e.g. 'train.num_epochs = 3'; repeatable")
    parser.add_argument('--workdir', help="the run folder (default: runs/ and the last gin file's name)")


def add_flags(parser):
    """The flags that train and eval share."""
    add_run_flags(parser)
    parser.add_argument('--data_dir', help='the folder of the data set (default: datasets/ and its name)')
    parser.add_argument('--plan', action='store_true',
                        help='print what would be done, touching no data and no device, and stop')


def add_checkpoint_flag(parser):
    """The flag that says which of a run's weights: of eval and export."""
    parser.add_argument('--checkpoint', default='last',
                        help='last, best, or the path of a checkpoint folder or a .params file (default: %(default)s)')


def named_workdir(flags, start):
    """The run folder that the parsed flags name. Raises UserError when they name none; `start` is a command to try."""
    if not flags.gin_file and not flags.workdir:
        raise UserError(f'neither --gin_file nor --workdir given; for a start: {start}')
    return flags.workdir or default_workdir(flags.gin_file)


def default_workdir(gin_files):
    """runs/NAME for gin/NAME.gin."""
    return os.path.join('runs', os.path.splitext(os.path.basename(gin_files[-1]))[0])


def positive_number(text):
    """argparse's type of a whole number above 0."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
    return int(text)


def main():
    """The command line."""
    parser = argparse_flags.ArgumentParser(prog='python -m gn_gluon.train', description=__doc__)
    add_flags(parser)
    parser.add_argument('--benchmark', nargs='?', type=positive_number, const=10, metavar='UPDATES',
                        help='time so many updates (default: %(const)s) on random images and, where the data are, on '
                             'them, and stop; the run folder is not touched')
    parser.add_argument('--json', action='store_true', help='with --benchmark: print one JSON object')
    flags = parser.parse_args()
    if flags.json and not flags.benchmark:
        raise UserError('--json is of --benchmark only; what a training run measures is in metrics.jsonl of its folder')
    recorded = os.path.join(flags.workdir or '', 'config.gin')
    if not flags.gin_file and not (flags.workdir and os.path.exists(recorded)):
        raise UserError('neither --gin_file nor the --workdir of a run to go on with is given; for a start: python -m '
                        'gn_gluon.train --gin_file gin/digits_gn_bs2.gin')
    # Here, since experiment imports all the rest.
    from gn_gluon import benchmark, compat, config, distributed, experiment, plan, replicas
    if distributed.serve():
        return
    workdir = flags.workdir or default_workdir(flags.gin_file)
    bindings = config.parse(flags.gin_file or [recorded], flags.gin_bindings)
    made = config.make(experiment.Experiment)
    data_dir = flags.data_dir or experiment.recorded_data_dir(workdir)
    if flags.plan:
        plan.print_plan(made, bindings, workdir, data_dir)
        return
    devices = replicas.parse_devices(made.devices, made.num_replicas)
    if devices[0].device_type == 'cpu':
        compat.divide_threads(len(devices), 'gn_gluon.train')
    if flags.benchmark:
        result = benchmark.benchmark(made, bindings, workdir, data_dir, flags.benchmark)
        if result:
            print(json.dumps(result) if flags.json else benchmark.table(result))
    else:
        experiment.train(made, bindings, workdir, data_dir)


if __name__ == '__main__':
    command(main)
