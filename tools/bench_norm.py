#!/usr/bin/env python
"""Measures the norms side by side: python tools/bench_norm.py --what step --network resnet50 --json step.json

layer: forward and backward of every norm of the network alone, its input as a convolution leaves it. step: a whole
training step (forward, loss, backward, update by Nesterov momentum). inference: a forward pass. memory: the peak
(VmHWM) of a fresh process after 5 steps, 3 processes each. Random images and labels, batch sizes as --batch says.

Contestants: MXNet's BatchNorm with Activation('relu') (mxnet-bn), the same with nn.BatchNormReLU where no sum comes
between (mxnet-bn-relu), MXNet's GroupNorm (mxnet-gn); gn_gluon's GroupNorm in each of its operators (native, extension,
composed) and in bfloat16; if PyTorch is installed, its GN and BN (torch-...), in bfloat16 by autocast, in both memory
formats. All MXNet contestants are the networks of gn_gluon and are updated by its own optimizer. Each is a process of
its own with all threads; the processes live on and take a turn each (a step, or as many as fill 0.1 s, of which the
median counts) in each round, in changing order. As many run at once as fit into memory; the others follow in groups in
which the first contestant, the reference, is measured again. Ratios are those of medians over the rounds of a group,
and between two groups the quotient of the ratios to the reference; "/ torch-gn" is PyTorch's GN in float32, in its
better memory format. Nothing else should be running: the last line says what share of the processors others took.
"""
import os

ENVIRONMENT = dict(os.environ)  # before gn_gluon sets in it what is meant for MXNet alone

import functools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # in a clone, not installed

from norm_benchmark import machine, pool, report  # noqa: E402
from norm_benchmark.contestants import BATCHES, make_case  # noqa: E402
from norm_benchmark.flags import parse_flags  # noqa: E402

from gn_gluon.checkpoint import write_text  # noqa: E402
from gn_gluon.errors import UserError, command  # noqa: E402


def say(line):
    """Progress goes to stderr: stdout is the tables."""
    print(f'  {line}', file=sys.stderr, flush=True)


def benchmark(flags, environment, save):
    """Measure, print and save case by case; returns the rows."""
    rows, absent = [], []
    for what in flags.what:
        for network in flags.network:
            for batch in flags.batch or BATCHES[what, network]:
                case = make_case(what, network, batch, flags.threads)
                say(f'{what}, {network}, batch {batch}')
                if what == 'memory':
                    results, missing = pool.measure_memory(case, flags.contestants, environment, say)
                else:
                    results, missing = pool.measure(case, flags.contestants, flags.rounds, environment, say)
                found = report.make_rows(case, results)
                report.add_ratios(found)
                print(report.show_case(found, missing), flush=True)
                rows += found
                absent += [{'what': what, 'network': network, 'batch': batch, 'contestant': name, 'reason': reason}
                           for name, reason in missing.items()]
                save({'rows': rows, 'not_available': absent, 'comparisons': report.compare(rows)})
    comparisons = report.compare(rows)
    if comparisons:
        print('\n' + report.show_comparisons(comparisons))
    return rows


def attribute(flags, environment, save):
    """Measure, print and save where the training steps of the contestants go."""
    found = []
    for network in flags.network:
        for batch in flags.batch or BATCHES['step', network]:
            for contestant in flags.contestants:
                found.append({'network': network, 'batch': batch, 'contestant': contestant.name})
                for instrument in ('primitives', 'operators')[:1 if contestant.framework == 'torch' else 2]:
                    case = dict(make_case('attribution', network, batch, flags.threads), instrument=instrument)
                    name = f'{contestant.name}, {network}, batch {batch}: {instrument}'
                    say(name)
                    try:
                        result = pool.ask_once(case, contestant, environment)
                    except pool.Absent as reason:
                        found[-1]['not_available'] = str(reason)
                        print(f'\nnot available: {contestant.name}: {reason}')
                        break
                    found[-1][instrument] = result
                    print('\n' + report.show_attribution(name, result), flush=True)
                save({'attribution': found})


def main():
    flags = parse_flags(__doc__)
    about = machine.describe(flags, ENVIRONMENT)
    print('\n'.join(f'{name:<18}{value}' for name, value in about.items()))
    share_of_others = machine.watch_others()

    def save(found):
        about['share_of_others'] = share_of_others()
        if flags.json:
            write_text(flags.json, json.dumps({'format': 1, 'machine': about, **found}, indent=1))

    environment = functools.partial(pool.environment_for, ENVIRONMENT, flags.threads, flags.env)
    rows = (attribute if flags.attribute else benchmark)(flags, environment, save)
    print(f"\nOther processes took {about['share_of_others']:.1%} of the processors' time meanwhile.")
    if flags.png:
        if not rows:
            raise UserError('nothing was measured, so there is nothing to draw; why not is said above')
        report.draw(rows, machine.title(about), flags.png)


if __name__ == '__main__':
    command(main)
