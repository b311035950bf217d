"""One contestant in a process of its own: builds its case, warms up, and takes a turn for every line that it reads.

Started by pool.py as `worker.py CASE`, CASE being JSON. Answers with lines of JSON on what was its standard output.
"""
import json
import math
import os
import re
import statistics
import sys

TOOLS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:1] = [TOOLS, os.path.dirname(TOOLS)]  # to import tools/norm_benchmark and, in a clone, gn_gluon

WARM_UP_STEPS = 2  # the first builds primitives, the second is the first to touch all memory
WARM_UP_SECONDS = 0.2
TURN_SECONDS = 0.1  # a turn of a small network is many steps: one alone would be a measure of cold caches
MEMORY_STEPS = 5


def builder(case):
    """The `build` of the contestant's framework, and no other framework is imported."""
    if case['contestant']['framework'] == 'torch':
        from norm_benchmark import torch_side as side
    else:
        import gn_gluon  # noqa: F401 - first: it makes MXNet importable
        from norm_benchmark import mxnet_side as side
    return side.build


def warm_up(step):
    """Returns how many steps make a turn."""
    seconds = [step() for _ in range(WARM_UP_STEPS)]
    while sum(seconds) < WARM_UP_SECONDS:
        seconds.append(step())
    return math.ceil(TURN_SECONDS / min(seconds))


def peak_memory():
    """Bytes. Not getrusage's: on Linux that begins with the peak of the process which started this one."""
    with open('/proc/self/status') as file:
        return int(re.search(r'^VmHWM:\s+(\d+) kB$', file.read(), re.MULTILINE).group(1)) * 1024


def run(case, answer):
    """Take part in what the case is about."""
    build = builder(case)
    if case['what'] == 'attribution':
        from norm_benchmark import instruments
        answer(getattr(instruments, case['instrument'])(build, case))
        return
    steps = build(case)
    if case['what'] == 'memory':
        for _ in range(MEMORY_STEPS):
            steps['']()
        answer({'values': {'': peak_memory()}})
        return
    lengths = {name: warm_up(step) for name, step in steps.items()}
    answer({'peak_memory': peak_memory(), 'steps_per_turn': lengths})
    for _ in sys.stdin:
        answer({'values': {name: statistics.median(step() for _ in range(lengths[name]))
                           for name, step in steps.items()}})


def main():
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(message):
        print(json.dumps(message), file=channel, flush=True)

    try:
        run(json.loads(sys.argv[1]), answer)
    except Exception as error:  # whatever the reason, the others go on without this contestant
        words = str(error).strip().splitlines() or [type(error).__name__]
        named = type(error).__name__ in ('UserError', 'ImportError', 'ModuleNotFoundError')
        answer({'problem': words[0] if named else f'{type(error).__name__}: {words[0]}'})


if __name__ == '__main__':
    main()
