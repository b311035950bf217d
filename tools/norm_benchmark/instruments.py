"""Where a training step goes: by oneDNN's primitives (DNNL_VERBOSE=1), and by MXNet's operators (its profiler)."""
import collections
import ctypes
import json
import os
import re
import statistics
import tempfile

STEPS = 5


def parse_verbose(text):
    """Sums the lines that oneDNN 2 and 3 print: {kind: [seconds, number]}; the rest of the text is passed over.

    A convolution's kind has its direction, and a reorder that changes the type is a cast.
    """
    sums = collections.defaultdict(lambda: [0.0, 0])
    for line in text.splitlines():
        fields = line.split(',')
        if not re.match('(dnnl|onednn)_verbose$', fields[0]) or 'exec' not in fields[:4]:
            continue
        kind, _, direction = fields[fields.index('exec') + 2:][:3]
        types = re.findall(r'\b(?:src|dst)[_:](\w+?):', line)
        if kind == 'reorder' and len(set(types)) > 1:
            kind = 'reorder ' + ' to '.join(types)
        elif direction != 'undef':
            kind += ' ' + direction.replace('forward_training', 'forward')
        sums[kind][0] += float(fields[-1]) / 1e3
        sums[kind][1] += 1
    return dict(sums)


def _medians(seconds, parts):
    """`seconds` of each step, `parts` the sums of each step: the medians over the steps."""
    kinds = {kind for part in parts for kind in part}
    return {'step': statistics.median(seconds),
            'parts': {kind: {'seconds': statistics.median(part.get(kind, (0, 0))[0] for part in parts),
                             'count': round(statistics.median(part.get(kind, (0, 0))[1] for part in parts))}
                      for kind in kinds}}


def primitives(build, case):
    """What oneDNN says of each step. The lines go through a file: C's and Python's output are not in step."""
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        step = build(case)['']
        step()
        step()
        seconds, parts = [], []
        for _ in range(STEPS):
            libc.fflush(None)
            start = os.lseek(1, 0, os.SEEK_CUR)
            seconds.append(step())
            libc.fflush(None)
            parts.append(parse_verbose(os.pread(1, os.lseek(1, 0, os.SEEK_CUR) - start, start).decode()))
    return _medians(seconds, parts)


def operators(build, case):
    """What MXNet's profiler says of each step, operators one by one instead of in bulk."""
    import mxnet as mx
    step = build(case, forward_bulk_size=0, backward_bulk_size=0)['']
    step()
    step()
    mx.profiler.set_config(profile_imperative=True, profile_symbolic=True, aggregate_stats=True, filename=os.devnull)
    seconds, parts = [], []
    for _ in range(STEPS):
        mx.profiler.set_state('run')
        seconds.append(step())
        mx.profiler.set_state('stop')
        rows = json.loads(mx.profiler.dumps(reset=True, format='json'))['Time'].get('operator', {})
        parts.append({name: (row['Total'] / 1e3, row['Count']) for name, row in rows.items()})
    return _medians(seconds, parts)
