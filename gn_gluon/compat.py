"""Makes MXNet 1.9.1 import on Python 3.8 to 3.12 and numpy 1.24 to 1.26; one clear sentence where it cannot.

Imported before anything else of the package. In order: OMP_NUM_THREADS is set, what is installed is checked,
what newer numpy and Python took away is put back, CUDA 11 libraries from pip are loaded, MXNet is imported.
"""
import builtins
import collections
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import warnings

FIRST_PYTHON_WITHOUT_MXNET = (3, 13)  # MXNet 1.9.1 needs numpy 1, whose last wheels are for Python 3.12
COMPUTE_CAPABILITIES = ((5, 0), (9, 0))  # mxnet-cu112 has code for sm_50 to sm_86; sm_89 runs that of sm_86
REMOVED_NUMPY_ALIASES = ('bool', 'int', 'float', 'object', 'str', 'complex')
CPU_INSTEAD = 'pip uninstall -y mxnet-cu112 && pip install mxnet==1.9.1'

CudaLibrary = collections.namedtuple('CudaLibrary', 'file package')
_CPU_CONTEXTS = 'GN_GLUON_CPU_CONTEXTS'  # from divide_threads to the process that follows it
WORKERS_HERE = 'GN_GLUON_WORKERS_HERE'  # from tools/launch.py: how many workers share this machine
# In the order of their dependence upon one another; setup.py pins the versions.
CUDA_LIBRARIES = (
    CudaLibrary('libcudart.so.11.0', 'nvidia-cuda-runtime-cu11'),
    CudaLibrary('libnvrtc.so.11.2', 'nvidia-cuda-nvrtc-cu11'),
    CudaLibrary('libcublasLt.so.11', 'nvidia-cublas-cu11'),
    CudaLibrary('libcublas.so.11', 'nvidia-cublas-cu11'),
    CudaLibrary('libcufft.so.10', 'nvidia-cufft-cu11'),
    CudaLibrary('libcurand.so.10', 'nvidia-curand-cu11'),
    CudaLibrary('libcusolver.so.11', 'nvidia-cusolver-cu11'),
    CudaLibrary('libnccl.so.2', 'nvidia-nccl-cu11'),
    CudaLibrary('libnvToolsExt.so.1', 'nvidia-nvtx-cu11'),
    CudaLibrary('libcudnn.so.8', 'nvidia-cudnn-cu11'),
)
# What libmxnet.so expects of the system: {file: Debian's package}. Slim container images lack them.
SYSTEM_LIBRARIES = {'libgomp.so.1': 'libgomp1', 'libquadmath.so.0': 'libquadmath0'}


# ---------------------------------------------------------------------------------------------- threads

def physical_cores(cpus, sysfs='/sys/devices/system/cpu'):
    """How many physical cores the logical processors `cpus` make up: hyper-thread siblings count once."""
    cores = set()
    for cpu in cpus:
        siblings = _read(os.path.join(sysfs, f'cpu{cpu}', 'topology', 'thread_siblings_list'))
        cores.add(siblings or f'cpu{cpu}')
    return len(cores)


def cgroup_cpus(memberships='/proc/self/cgroup', root='/sys/fs/cgroup'):
    """The processors that this process's control groups allow, the least over the hierarchy (float), or None.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`). Inside a container the path in `memberships` may
    be absent below `root`: its own group is then mounted at the root, which is looked at as well.
    """
    quotas = []
    for line in (_read(memberships) or '').splitlines():
        number, controllers, path = line.split(':', 2)
        if number == '0':
            mounts = [root, os.path.join(root, 'unified')]
        elif 'cpu' in controllers.split(','):
            mounts = [os.path.join(root, controllers), os.path.join(root, 'cpu')]
        else:
            continue
        for mount in mounts:
            quotas += [_quota(os.path.join(mount, folder)) for folder in _with_ancestors(path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _with_ancestors(path):
    parts = [part for part in path.split('/') if part]
    return ['/'.join(parts[:n]) for n in range(len(parts), -1, -1)]


def _quota(folder):
    limit = _read(os.path.join(folder, 'cpu.max'))
    if limit is None:
        files = ('cpu.cfs_quota_us', 'cpu.cfs_period_us')
        limit = ' '.join(_read(os.path.join(folder, file)) or '' for file in files)
    numbers = re.fullmatch(r'(\d+) (\d+)', limit)  # 'max 100000' and '-1 100000' are no limit
    return int(numbers.group(1)) / int(numbers.group(2)) if numbers else None


def _read(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def usable_cores():
    """Physical cores that this process may use (affinity and cgroup quota, rounded down), at least 1."""
    if hasattr(os, 'sched_getaffinity'):
        cpus = os.sched_getaffinity(0)
    else:  # macOS
        cpus = range(os.cpu_count() or 1)
    quota = cgroup_cpus()
    cores = physical_cores(cpus)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _cpuinfo(field):
    found = re.search(rf'^{field}\s*: (.+)$', _read('/proc/cpuinfo') or '', re.MULTILINE)
    return found.group(1) if found else ''


def processor():
    """The name of the processor."""
    return _cpuinfo('model name') or platform.processor() or platform.machine()


def processor_flags():
    """The processor's features as Linux names them ('avx2', 'amx_tile'), sorted; () where it does not say."""
    return tuple(sorted(_cpuinfo('flags').split()))


def set_threads(environ, cores, loaded=False):
    """Set OMP_NUM_THREADS in `environ` to `cores` unless the user chose; returns who chose, in words.

    Without it MXNet takes half of the processors it sees. `loaded`: MXNet is there already and has decided.
    """
    for name in ('OMP_NUM_THREADS', 'MXNET_OMP_MAX_THREADS'):
        if environ.get(name):
            return f'the environment ({name})'
    if loaded:
        return 'MXNet itself, since it was imported before gn_gluon'
    contexts, workers = int(environ.get(_CPU_CONTEXTS, 1)), int(environ.get(WORKERS_HERE, 1))
    environ['OMP_NUM_THREADS'] = str(max(1, cores // (contexts * workers)))
    return 'gn_gluon: the physical cores that this process may use' + (
        f', divided among {workers} workers' if workers > 1 else '') + (
        f', divided among {contexts} CPU contexts' if contexts > 1 else '')


def divide_threads(contexts, module):
    """Start the command `python -m module` anew if it is to compute on several CPU contexts at once.

    Each context has a pool of threads of its own, and MXNet reads OMP_NUM_THREADS once, when it is loaded: before the
    gin file that says how many contexts there are. Does nothing where the user chose the number of threads.
    """
    if contexts > 1 and threads_set_by.startswith('gn_gluon') and os.environ.get(_CPU_CONTEXTS) != str(contexts):
        os.environ[_CPU_CONTEXTS] = str(contexts)
        del os.environ['OMP_NUM_THREADS']
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, '-m', module] + sys.argv[1:])


def let_waiting_threads_sleep(environ):
    """Set GOMP_SPINCOUNT=2000 in `environ` unless the user chose: threads that wait spin for microseconds, then sleep.

    By default OpenMP's threads spin for a millisecond and more. Alone on the machine that is the fastest for small
    networks, but as soon as another process has one of the cores each of their many short waits may last a time slice:
    an epoch of digits_bn_bs2 took 1.5 s in one run and 34 to 250 s in others, on two cores. Not to spin at all costs
    small networks half of their speed. docs/operator.md has the figures.
    """
    if not (environ.get('OMP_WAIT_POLICY') or environ.get('GOMP_SPINCOUNT')):
        environ['GOMP_SPINCOUNT'] = '2000'


def allow_amx(environ, flags):
    """Ask Linux and oneDNN for AMX, where the processor has it: bfloat16 is many times as fast with it.

    oneDNN 2.4 leaves it off unless DNNL_MAX_CPU_ISA names it (the user's choice is kept), and does not ask Linux for
    the tile registers, without which the first convolution dies of SIGILL. Both must come before MXNet is loaded.
    """
    if {'amx_tile', 'amx_bf16'} <= set(flags):
        arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # <asm/prctl.h>, Linux 5.16 and later
        if ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0:
            environ.setdefault('DNNL_MAX_CPU_ISA', 'AVX512_CORE_AMX')


def num_threads(environ=os.environ):
    """The number of OpenMP threads that MXNet was told to use, or None if it decided by itself."""
    number = environ.get('MXNET_OMP_MAX_THREADS') or environ.get('OMP_NUM_THREADS')
    return int(number) if number else None


# ---------------------------------------------------------------------------- what is installed, and fits

def version(package):
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_problem(version):
    """None, or the sentence for a Python `version` (a tuple) that is too new for MXNet."""
    if tuple(version[:2]) < FIRST_PYTHON_WITHOUT_MXNET:
        return None
    return (f'this is Python {version[0]}.{version[1]}, but MXNet 1.9.1 needs Python 3.8 to 3.12; '
            'get one with: uv venv --python 3.12')


def numpy_problem(version):
    """None, or the sentence for a numpy `version` (a string) that is too new for MXNet."""
    if int(version.split('.')[0]) < 2:
        return None
    return f"numpy {version} is installed, but MXNet 1.9.1 needs numpy 1: pip install 'numpy<2'"


def gpu_problem(capabilities):
    """None, or the sentence for a GPU of `capabilities` ((major, minor) each) without code in mxnet-cu112."""
    for index, capability in enumerate(capabilities):
        if not COMPUTE_CAPABILITIES[0] <= capability < COMPUTE_CAPABILITIES[1]:
            return (f'GPU {index} is an sm_{capability[0]}{capability[1]}, but mxnet-cu112 1.9.1 has code '
                    "for sm_50 to sm_86 only; hide it with CUDA_VISIBLE_DEVICES='' and run on the CPU, or "
                    f'change to the MXNet for CPUs: {CPU_INSTEAD}')
    return None


def library_problem(message, installed):
    """The sentence for a libmxnet.so that does not load; `message`: the loader's, `installed`: flavours()."""
    missing = message.split(':')[0]
    flavour = ' and '.join(sorted(installed)) or 'MXNet'
    for library in CUDA_LIBRARIES:
        if library.file == missing:
            return (f'{missing} is missing, which {flavour} needs; it comes with {library.package}, install '
                    "it and the other CUDA libraries, in the clone, with: pip install '.[cu112]'")
    if missing == 'libcuda.so.1':
        return (f'libcuda.so.1 of the NVIDIA driver is missing, which {flavour} needs even on the CPU; '
                f'install the driver or, without a GPU, change to the MXNet for CPUs: {CPU_INSTEAD}')
    if missing in SYSTEM_LIBRARIES:
        return (f'{missing} of the system is missing, which {flavour} needs; on Debian and Ubuntu install it with: '
                f'apt install {SYSTEM_LIBRARIES[missing]}')
    return f'the library of {flavour} does not load, install it again: {message.splitlines()[0]}'


def flavours():
    """The installed MXNet wheels, {name: version}: 'mxnet' (CPU), 'mxnet-cu112'. Two overwrite each other."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata['Name'] or '').lower().replace('_', '-')
        if name == 'mxnet' or name.startswith('mxnet-cu'):
            found[name] = distribution.version
    return found


def compute_capabilities():
    """(major, minor) of each GPU that CUDA_VISIBLE_DEVICES leaves, asked of the driver; () without one."""
    found = []
    try:
        driver = ctypes.CDLL('libcuda.so.1')
        count = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return ()
        for index in range(count.value):
            device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            driver.cuDeviceGet(ctypes.byref(device), index)
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # ..._COMPUTE_CAPABILITY_MAJOR
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ..._COMPUTE_CAPABILITY_MINOR
            found.append((major.value, minor.value))
    except (OSError, AttributeError):  # no driver, or a stand-in without these functions
        return ()
    return tuple(found)


def preload_cuda():
    """Load the CUDA 11 libraries that pip installed, which libmxnet.so would not find; a system's it does."""
    for library in CUDA_LIBRARIES:
        try:
            files = importlib.metadata.files(library.package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == library.file:
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)


# ------------------------------------------------------------------------------------------- the import

def _is_installed(package):
    """Whether `import package` finds a real one: a folder without __init__.py answers too, and is empty."""
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _check_packages():
    if not _is_installed('mxnet'):
        raise ImportError("MXNet is not installed; install it, in the clone, with: pip install '.[cpu]' (or "
                          "'.[cu112]' for NVIDIA GPUs of sm_50 to sm_86)")
    if not _is_installed('gin'):  # the clone's folder gin/ would be imported in its place, and hold nothing
        raise ImportError('gin-config is not installed; install it with: pip install gin-config')
    import numpy as np
    problem = numpy_problem(np.__version__)
    if problem:
        raise ImportError(problem)


def _restore():
    """Put back what MXNet takes for granted, and numpy 1.24 and Python 3.12 removed."""
    import numpy as np
    for name in REMOVED_NUMPY_ALIASES:
        if name not in np.__dict__:  # hasattr would set off numpy's own warnings
            setattr(np, name, getattr(builtins, name))
    if not _is_installed('distutils'):
        if not _is_installed('setuptools'):
            raise ImportError('setuptools is not installed, which supplies the distutils that MXNet imports; '
                              'install it with: pip install setuptools')
        import setuptools  # noqa: F401 - it brings distutils along


def _import_mxnet(installed):
    # In a process that is to be a server or the scheduler MXNet's import would become that, and never return:
    # distributed.serve does it instead.
    role = os.environ.get('DMLC_ROLE')
    if role in ('server', 'scheduler'):
        del os.environ['DMLC_ROLE']
    try:
        if any(name != 'mxnet' for name in installed):
            problem = gpu_problem(compute_capabilities())
            if problem:
                raise ImportError(problem)
            preload_cuda()
        import mxnet  # noqa: F401
    except (OSError, RuntimeError) as error:  # not loadable; not found
        raise ImportError(library_problem(str(error), installed)) from None
    finally:
        if role:
            os.environ['DMLC_ROLE'] = role


def _prepare():
    """Import MXNet; returns who chose the number of threads. An ImportError is one sentence: what to do."""
    problem = python_problem(sys.version_info)
    if problem:
        raise ImportError(problem)
    for name in ('OMP_NUM_THREADS', 'MXNET_OMP_MAX_THREADS'):
        if os.environ.get(name) and not re.fullmatch('[1-9][0-9]*', os.environ[name]):
            raise ImportError(f'{name}={os.environ[name]} in the environment, but MXNet takes one number above 0; '
                              'correct or unset it')
    threads_set_by = set_threads(os.environ, usable_cores(), loaded='mxnet' in sys.modules)
    let_waiting_threads_sleep(os.environ)
    allow_amx(os.environ, processor_flags())
    _check_packages()
    installed = flavours()
    if len(installed) > 1:
        names = sorted(installed)
        warnings.warn(f"{' and '.join(names)} are both installed and overwrite each other's files; keep one: "
                      f"pip uninstall -y {' '.join(names)} && pip install '.[cpu]' (or '.[cu112]')",
                      RuntimeWarning, stacklevel=3)
    _restore()
    _import_mxnet(installed)
    return threads_set_by


try:
    #: Who chose the number of OpenMP threads, in words.
    threads_set_by = _prepare()
except ImportError as problem:
    # While `python -m gn_gluon.x` looks for x, argv[0] is '-m': a command owes one line, not a traceback.
    if sys.argv[:1] == ['-m']:
        print(f'error: {problem}', file=sys.stderr)
        sys.exit(2)
    raise
