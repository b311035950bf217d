#!/usr/bin/env python
"""Runs a grid: python tools/sweep.py --gin_file gin/digits_gn_bs2.gin --gin_file gin/digits_bn_bs2.gin
                --grid "train.batch_per_replica=2,4,8,16,32" --seeds 3 --out runs/sweep

Every gin file, combination of --grid values and seed is one run of gn_gluon.train, in a folder of --out that its name
says; its output is in --out/logs. All are checked before the first starts. The same command again skips what is
complete, goes on with what was cut (Ctrl-C and SIGTERM let every run save first), and refuses a folder that holds
another experiment. A run that fails is shown with its last lines while the others go on; the exit code is then 2.

A grid of train.batch_per_replica keeps the images per update of the gin file, hence learning rate and number of
updates: train.num_replicas follows, unless it is in the grid or bound ('train.num_replicas = 8' is the paper's way).
At the end, also when nothing was left to run: a table (the median error of the last five epochs: mean, standard
deviation, n, every seed) in --out/sweep.md and sweep.json, and for train.batch_per_replica the paper's Figure 1 in
--out/batch_sizes.png and .svg. --statistics adds what BN's errors are by other statistics, see gn_gluon.eval.
"""
import argparse
import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # in a clone, not installed

from gn_gluon import sweep  # noqa: E402
from gn_gluon.errors import UserError, command  # noqa: E402
from gn_gluon.eval import statistics_list  # noqa: E402
from gn_gluon.train import positive_number  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gin_file', action='append', required=True, metavar='FILE', help='repeatable: a curve each')
    parser.add_argument('--grid', action='append', default=[], metavar='"NAME=V1,V2"',
                        help='values of a gin argument; repeatable: all combinations are run')
    parser.add_argument('--seeds', type=positive_number, default=1, metavar='N',
                        help='runs of each cell, with train.seed = 0 to N - 1 (default: 1)')
    parser.add_argument('--gin_bindings', action='append', default=[], metavar='BINDING',
                        help="a statement that all runs share, e.g. 'train.num_epochs = 3'; repeatable")
    parser.add_argument('--data_dir', help='the folder of the data set (default: datasets/ and its name)')
    parser.add_argument('--out', required=True, metavar='FOLDER', help='of run folders, table and figure')
    parser.add_argument('--jobs', type=positive_number, metavar='N',
                        help='runs at once, each with its share of the cores (default: one for each core, on GPUs 1)')
    parser.add_argument('--statistics', type=statistics_list, default=(), metavar='LIST',
                        help='evaluate every run by them, too: running,batch,precise')
    parser.add_argument('--plan', action='store_true', help='print the runs and their commands, and stop')
    flags = parser.parse_args()
    runs = sweep.make_runs(flags.gin_file, sweep.parse_grid(flags.grid), flags.seeds, flags.gin_bindings, flags.out,
                           flags.data_dir)
    if flags.plan:
        sweep.print_plan(runs, flags.statistics, flags.data_dir)
        return
    failed = sweep.run_all(runs, flags.jobs or sweep.default_jobs(runs[0]), flags.statistics, flags.data_dir)
    print('\n' + sweep.write_results(runs, flags.out, shlex.join(['python', *sys.argv]), flags.statistics))
    if failed:
        raise UserError(f'{len(failed)} of {len(runs)} runs failed, see above; the same command tries them again')


if __name__ == '__main__':
    command(main)
