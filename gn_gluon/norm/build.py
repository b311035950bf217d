"""Compiles the operators of `native/` for this machine, once, into a cache that all processes share.

They cannot come ready-made: pip builds a package without MXNet's headers at hand, and MXNet keeps no binary interface.
The cache is `GN_GLUON_CACHE` or the user's cache folder. In it one folder per combination of sources, MXNet wheel,
compiler and processor holds the libraries and what the self-tests found.
"""
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import mxnet as mx

from gn_gluon import compat

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'native')

COMMON_FLAGS = ('-std=c++17', '-fPIC', '-fopenmp', '-w')
_X86 = platform.machine() in ('x86_64', 'AMD64')
#: The instruction sets that the kernels are compiled for; which one runs is decided by the processor (dispatch.cc).
KERNEL_FLAGS = {
    'avx512': ('-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma', '-mf16c', '-mprefer-vector-width=512'),
    'avx2': ('-mavx2', '-mfma', '-mf16c'),
    'baseline': (),
} if _X86 else {'baseline': ()}
#: As libmxnet.so was compiled: its headers mean another memory layout with other values.
_MXNET_FLAGS = ('-D_GLIBCXX_USE_CXX11_ABI=0', '-DMXNET_USE_MKLDNN=1', '-DMSHADOW_STAND_ALONE=1',
                '-DMSHADOW_USE_CBLAS=0', '-DMSHADOW_USE_MKL=0', '-DMSHADOW_USE_CUDA=0', '-DMXNET_USE_CUDA=0',
                '-DMSHADOW_USE_F16C=0', '-DMXNET_USE_OPENMP=1', '-DDMLC_USE_CXX11=1')


class BuildError(Exception):
    """The operators cannot be compiled, or must not be used, on this machine: why, in one sentence."""


def cache_folder(environ=os.environ):
    """The folder that the compiled operators are kept in; it need not exist yet."""
    home = environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.abspath(environ.get('GN_GLUON_CACHE') or os.path.join(home, 'gn_gluon'))


@contextlib.contextmanager
def _cache():
    """The cache folder, made if need be. Raises BuildError when something in it cannot be written."""
    folder = cache_folder()
    try:
        os.makedirs(folder, exist_ok=True)
        yield folder
    except OSError as error:
        raise BuildError(f'{error.filename or folder} cannot be written ({error.strerror}); name a folder that can in '
                         'GN_GLUON_CACHE') from None


def wheel_sha256():
    """SHA-256 of the libmxnet.so in use, noted in the cache for as long as the file is the same: it has 150 MB."""
    path = mx.libinfo.find_lib_path()[0]
    status = os.stat(path)
    identity = [path, status.st_size, status.st_mtime_ns, status.st_ino]
    with _cache() as folder:
        note = os.path.join(folder, 'libmxnet.json')
        with contextlib.suppress(OSError, ValueError), open(note) as file:
            known = json.load(file)
            if known['identity'] == identity:
                return known['sha256']
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        _write_json(note, {'identity': identity, 'sha256': digest.hexdigest()})
    return digest.hexdigest()


def built():
    """The folder with the compiled libraries, compiling them first if need be; other processes wait meanwhile.

    Raises BuildError: no compiler, no place to write, or the compiler's first complaint.
    """
    with _cache() as folder:
        target = os.path.join(folder, _key())
        if not os.path.isdir(target):
            with _locked(target):
                if not os.path.isdir(target):
                    _compile(target)
    return target


@contextlib.contextmanager
def _locked(target):
    """Hold the lock of a folder of the cache: one process at a time, freed by the kernel if it dies."""
    with open(target + '.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def self_test(target, tier):
    """Run the self-test of `tier` in another process, unless it has passed or failed on this machine before.

    Returns None, or what it found wrong: a wrong result or a crash must not happen in the user's process.
    """
    note = os.path.join(target, f'selftest_{tier}.json')
    with _cache(), _locked(target):
        with contextlib.suppress(OSError, ValueError), open(note) as file:
            return json.load(file)['problem']
        package = os.path.dirname(os.path.dirname(SOURCES))
        path = os.pathsep.join(filter(None, [os.path.dirname(package), os.environ.get('PYTHONPATH')]))
        result = subprocess.run([sys.executable, '-m', 'gn_gluon.norm.selftest', tier, target], text=True,
                                env=dict(os.environ, PYTHONPATH=path), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        problem = None
        if result.returncode:
            last = (result.stdout.strip().splitlines() or ['no output'])[-1]
            problem = f'its self-test failed with exit code {result.returncode}: {last}'
        _write_json(note, {'problem': problem, 'output': result.stdout})
        return problem


def _write_json(path, content):
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(handle, 'w') as file:
        json.dump(content, file)
    os.replace(temporary, path)


def _key():
    """The name of the combination of everything that the libraries and their self-tests depend on."""
    digest = hashlib.sha256()
    python = [os.path.join(os.path.dirname(__file__), name) for name in ('build.py', 'selftest.py')]
    for path in sorted(glob.glob(os.path.join(SOURCES, '*.*'))) + python:
        with open(path, 'rb') as file:
            digest.update(os.path.basename(path).encode() + b'\0' + file.read())
    version = subprocess.run([compiler(), '--version'], stdout=subprocess.PIPE, check=False).stdout
    for part in (wheel_sha256(), version.decode(errors='replace'), compat.processor(), *compat.processor_flags(),
                 str(compat.compute_capabilities())):
        digest.update(part.encode() + b'\0')
    return digest.hexdigest()[:16]


def compiler():
    """The C++ compiler: that of the environment (CXX), or g++, or c++. Raises BuildError when there is none."""
    for name in filter(None, (os.environ.get('CXX'), 'g++', 'c++')):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError('no C++ compiler was found; install one (on Debian and Ubuntu: apt install g++)')


def _compile(target):
    """Compile everything into a new folder, which becomes `target` when it is complete."""
    print('gn_gluon: compiling the GroupNorm operator for this machine, once; about half a minute', file=sys.stderr,
          flush=True)
    library = mx.libinfo.find_lib_path()[0]
    lib_api = os.path.join(os.path.dirname(library), 'src', 'lib_api.cc')
    include = mx.libinfo.find_include_path()
    headers = ('-I', include, '-I', os.path.join(include, 'mkldnn'))
    folder = tempfile.mkdtemp(prefix='building-', dir=os.path.dirname(target))
    try:
        hidden = '-fvisibility=hidden'
        objects = {'dispatch': ('-O2', hidden, 'dispatch.cc'), 'extension': ('-O2', 'extension.cc') + headers,
                   'lib_api': ('-O2', lib_api) + headers,
                   # The assembler embeds the kernels' source, and looks for it where it is told.
                   'cuda_launch': ('-O2', hidden, '-Wa,-I.', 'cuda_launch.cc')}
        for name, flags in KERNEL_FLAGS.items():
            objects[name] = ('-O3', hidden, f'-DGN_GLUON_ISA={name}') + flags + ('kernels.cc',)
        if _X86:
            objects['onednn'] = ('-O2', hidden, 'onednn.cc') + _MXNET_FLAGS + headers
            objects['nesterov'] = ('-O3', hidden, '-D_GLIBCXX_USE_CXX11_ABI=0', 'nesterov.cc')
        kernels = list(KERNEL_FLAGS) + ['dispatch']
        libraries = {'extension': (['extension', 'lib_api', 'cuda_launch'], ['-ldl'])}
        if _X86:  # the loader knows libmxnet.so by that name when it is in the process, wherever its file is
            libraries['native'] = (['onednn', 'nesterov'], ['-L', os.path.dirname(library), '-l:libmxnet.so'])
        with concurrent.futures.ThreadPoolExecutor(compat.usable_cores()) as pool:
            # The longest first, so that they do not end last.
            names = sorted(objects, key=lambda name: name not in KERNEL_FLAGS)
            compiled = [pool.submit(_run, *COMMON_FLAGS, '-c', *objects[name], '-o', os.path.join(folder, name + '.o'))
                        for name in names]
            for job in compiled:
                job.result()
            for name, (own, needs) in libraries.items():
                parts = (os.path.join(folder, f'{part}.o') for part in own + kernels)
                _run(*COMMON_FLAGS, '-shared', '-Wl,-Bsymbolic', *parts, '-o', os.path.join(folder, f'lib{name}.so'),
                     *needs)
        for path in glob.glob(os.path.join(folder, '*.o')):
            os.remove(path)
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(*arguments):
    command = [compiler(), *arguments]
    result = subprocess.run(command, cwd=SOURCES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            check=False)
    if result.returncode:
        lines = result.stdout.strip().splitlines() or [f'exit code {result.returncode}']
        complaint = next((line for line in lines if 'error' in line), lines[0])
        raise BuildError(f'{os.path.basename(command[0])} could not compile the operator: {complaint}')
