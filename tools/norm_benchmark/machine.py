"""The machine that the figures belong to, and what else it does meanwhile."""
import os
import platform
import resource
import sys
import time

import gn_gluon
from gn_gluon import compat

FLAGS = ('avx2', 'fma', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_tile', 'amx_bf16')


def describe(flags, environ):
    """Hardware, versions and settings, as a dict. `environ`: see pool.environment_for."""
    return {
        'processor': compat.processor(),
        'instruction_sets': ' '.join(flag for flag in FLAGS if flag in compat.processor_flags()),
        'physical_cores': compat.usable_cores(), 'threads': flags.threads,
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30, 1),
        'load_average': round(os.getloadavg()[0], 2),
        'mxnet_wait_policy': _wait_policy('mxnet', flags, environ) or 'GOMP_SPINCOUNT=2000, as gn_gluon sets it',
        'torch_wait_policy': _wait_policy('torch', flags, environ) or 'not set',
        'platform': platform.platform(), 'python': platform.python_version(), 'gn_gluon': gn_gluon.__version__,
        'mxnet': compat.version('mxnet'), 'numpy': compat.version('numpy'),
        'torch': compat.version('torch') or 'not installed', 'date': time.strftime('%Y-%m-%d %H:%M'),
        'command': ' '.join(sys.argv)}


def _wait_policy(framework, flags, environ):
    asked = [value for chosen, name, value in flags.env if chosen in (None, framework) and name == 'OMP_WAIT_POLICY']
    return asked[-1] if asked else environ.get('OMP_WAIT_POLICY')


def title(about):
    """One line of `describe`."""
    return (f"{about['processor']} ({about['instruction_sets']}), {about['threads']} threads; MXNet {about['mxnet']}, "
            f"PyTorch {about['torch']}, Python {about['python']}; {about['date']}")


def watch_others():
    """Returns a function: the share of all processors' time that other processes took since this call.

    Right while no process that this one started is running.
    """
    start, before = time.time(), _others_seconds()
    return lambda: max(0.0, (_others_seconds() - before) / (time.time() - start) / os.cpu_count())


def _others_seconds():
    with open('/proc/stat') as file:
        ticks = [int(number) for number in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]  # the latter waiting for a disk
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return (sum(ticks) - idle) / os.sysconf('SC_CLK_TCK') - sum(usage.ru_utime + usage.ru_stime for usage in usages)
