"""Installation: the number of threads, one sentence for each way in which the import can fail, and info."""
import glob
import os
import re
import shutil
import subprocess
import sys

import pytest

from gn_gluon import compat

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
needs_gcc = pytest.mark.skipif(shutil.which('gcc') is None, reason='gcc makes the stand-ins for libraries')


def python(*arguments, executable=sys.executable, **environment):
    """Run Python in the clone; the number of threads is unset, as for a user."""
    unset = ('OMP_NUM_THREADS', 'MXNET_OMP_MAX_THREADS', 'GN_GLUON_OPERATOR', 'PYTHONPATH')
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run([executable] + list(arguments), cwd=CLONE, env=dict(inherited, **environment),
                          capture_output=True, text=True)


def bare_command(packages, **environment):
    """python -m gn_gluon.info where nothing is installed (-S: no site-packages) but the folder `packages`."""
    return python('-S', '-m', 'gn_gluon.info', PYTHONPATH=str(packages), **environment)


def add_module(packages, name, source=''):
    folder = packages / name
    folder.mkdir()
    (folder / '__init__.py').write_text(source)


def add_distribution(packages, name, files=()):
    folder = packages / '{}-1.0.dist-info'.format(name.replace('-', '_'))
    folder.mkdir()
    (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (folder / 'RECORD').write_text(''.join(f'{file},,\n' for file in files))


@pytest.fixture
def packages(tmp_path):
    """A folder of packages that satisfy every check; mxnet says 'reached' when it is imported."""
    folder = tmp_path / 'packages'
    folder.mkdir()
    add_module(folder, 'gin')
    add_module(folder, 'numpy', "__version__ = '1.26.4'")
    add_module(folder, 'setuptools')
    add_module(folder, 'mxnet', "raise SystemExit('reached')")
    return folder


def compile_library(path, source, *options):
    subprocess.run(['gcc', '-shared', '-fPIC', '-o', str(path), str(source)] + list(options), check=True)


def assert_one_sentence(result, *parts):
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# threads

def test_hyper_thread_siblings_count_as_one_core(tmp_path):
    for cpu, siblings in enumerate(['0,2', '1,3', '0,2', '1,3']):
        folder = tmp_path / f'cpu{cpu}' / 'topology'
        folder.mkdir(parents=True)
        (folder / 'thread_siblings_list').write_text(siblings + '\n')
    assert compat.physical_cores({0, 1, 2, 3}, str(tmp_path)) == 2
    assert compat.physical_cores({1, 3}, str(tmp_path)) == 1
    assert compat.physical_cores({0, 3}, str(tmp_path)) == 2
    assert compat.physical_cores({7, 8, 9}, str(tmp_path)) == 3  # no topology: each counts


@pytest.mark.parametrize('membership, files, expected', [
    ('0::/user/job', {'user/cpu.max': '150000 100000', 'user/job/cpu.max': 'max 100000'}, 1.5),
    ('0::/user/job', {'user/cpu.max': '400000 100000', 'user/job/cpu.max': '50000 100000'}, 0.5),
    ('0::/absent/in/the/container', {'cpu.max': '300000 100000'}, 3),
    ('0::/', {'cpu.max': 'max 100000'}, None),
    ('0::/', {}, None),
    ('4:cpu,cpuacct:/job\n3:memory:/\n0::/',
     {'cpu,cpuacct/job/cpu.cfs_quota_us': '200000', 'cpu,cpuacct/job/cpu.cfs_period_us': '100000'}, 2),
    ('4:cpu:/job', {'cpu/job/cpu.cfs_quota_us': '-1', 'cpu/job/cpu.cfs_period_us': '100000'}, None),
    ('4:cpuset:/', {'cpu/cpu.cfs_quota_us': '1', 'cpu/cpu.cfs_period_us': '1'}, None),
])
def test_cgroup_quota_is_the_least_of_the_hierarchy(tmp_path, membership, files, expected):
    (tmp_path / 'cgroup').write_text(membership + '\n')
    root = tmp_path / 'root'
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + '\n')
    assert compat.cgroup_cpus(str(tmp_path / 'cgroup'), str(root)) == expected


def test_threads_are_set_unless_the_user_did():
    environ = {}
    assert 'gn_gluon' in compat.set_threads(environ, 6) and environ == {'OMP_NUM_THREADS': '6'}
    for name in ('OMP_NUM_THREADS', 'MXNET_OMP_MAX_THREADS'):
        environ = {name: '1'}
        assert name in compat.set_threads(environ, 6) and environ == {name: '1'}
    for environ in ({'OMP_WAIT_POLICY': 'ACTIVE'}, {'GOMP_SPINCOUNT': '9'}, {}):
        before = dict(environ)
        compat.let_waiting_threads_sleep(environ)
        assert environ == (before or {'GOMP_SPINCOUNT': '2000'})
    environ = {'GN_GLUON_CPU_CONTEXTS': '4'}
    assert 'among 4' in compat.set_threads(environ, 6) and environ['OMP_NUM_THREADS'] == '1'
    environ = {}
    assert 'imported before' in compat.set_threads(environ, 6, loaded=True) and environ == {}


def test_info_in_a_process_bound_to_one_processor():
    code = ('import os, runpy; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); '
            'runpy.run_module("gn_gluon.info", run_name="__main__", alter_sys=True)')
    result = python('-c', code)
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r'^  (\S+(?: \S+)*)  +(.+)$', result.stdout, re.MULTILINE))
    assert rows['OMP_NUM_THREADS'] == '1'
    assert rows['set by'].startswith('gn_gluon')
    assert rows['Python'] == '.'.join(str(number) for number in sys.version_info[:3])
    assert rows['MXNet'].startswith('1.9.1')
    assert rows['active'] in ('native', 'extension', 'composed')
    assert {'numpy', 'gluoncv', 'GPUs', 'oneDNN', 'why'} <= set(rows)
    columns = {len(line) - len(value) for line in result.stdout.splitlines() for value in rows.values()
               if line.endswith('  ' + value)}
    assert len(columns) == 1, 'the values are not in one column'


def test_unknown_operator_is_refused():
    assert_one_sentence(python('-m', 'gn_gluon.info', GN_GLUON_OPERATOR='fast'), 'GN_GLUON_OPERATOR=fast',
                        'none of native, extension, composed')


# the import

def test_without_mxnet_a_command_says_what_to_install(tmp_path):
    assert_one_sentence(bare_command(tmp_path), "pip install '.[cpu]'", "'.[cu112]'")


def test_without_mxnet_the_library_raises_the_same_sentence(tmp_path):
    result = python('-S', '-c', 'import gn_gluon', PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: MXNet is not installed; install it")


def test_an_empty_mxnet_folder_is_no_mxnet(packages):
    (packages / 'mxnet' / '__init__.py').unlink()
    assert_one_sentence(bare_command(packages), 'MXNet is not installed')


def test_gin_config_missing_is_said_although_the_folder_gin_answers(packages):
    shutil.rmtree(str(packages / 'gin'))
    assert_one_sentence(bare_command(packages), 'pip install gin-config')


def test_numpy_2_is_refused(packages):
    (packages / 'numpy' / '__init__.py').write_text("__version__ = '2.3.1'")
    assert_one_sentence(bare_command(packages), 'numpy 2.3.1', "pip install 'numpy<2'")


@pytest.mark.skipif(sys.version_info < (3, 12), reason='older Pythons bring distutils')
def test_setuptools_missing_is_said(packages):
    shutil.rmtree(str(packages / 'setuptools'))
    assert_one_sentence(bare_command(packages), 'pip install setuptools')


def test_numpy_aliases_are_put_back_but_not_replaced(packages):
    (packages / 'numpy' / '__init__.py').write_text("__version__ = '1.26.4'\nfloat = 'own'")
    (packages / 'mxnet' / '__init__.py').write_text(
        "import numpy as np\nraise SystemExit('{} {}'.format(np.float, np.bool))")
    assert bare_command(packages).stderr == "own <class 'bool'>\n"


@pytest.mark.parametrize('library, remedy', [
    ('libcudnn.so.8', 'nvidia-cudnn-cu11'),
    ('libcuda.so.1', 'pip install mxnet==1.9.1'),
    ('libgomp.so.1', 'apt install libgomp1'),
])
def test_a_missing_library_is_named_with_the_package_that_brings_it(packages, library, remedy):
    (packages / 'mxnet' / '__init__.py').write_text(
        f"raise OSError('{library}: cannot open shared object file: No such file or directory')")
    add_distribution(packages, 'mxnet-cu112')
    assert_one_sentence(bare_command(packages), f'error: {library}', 'mxnet-cu112', remedy)


def test_two_flavours_are_warned_of(packages):
    add_distribution(packages, 'mxnet')
    add_distribution(packages, 'mxnet-cu112')
    result = bare_command(packages)
    assert result.stderr.count('mxnet and mxnet-cu112 are both installed') == 1
    assert 'pip uninstall -y mxnet mxnet-cu112' in result.stderr
    assert result.stderr.splitlines()[-1] == 'reached'


@needs_gcc
@pytest.mark.parametrize('major, minor, has_code',
                         [(9, 0, False), (12, 0, False), (3, 7, False), (8, 9, True)])
def test_a_gpu_without_code_in_the_wheel_is_refused(packages, tmp_path, major, minor, has_code):
    compile_library(tmp_path / 'libcuda.so.1', os.path.join(CLONE, 'tests', 'libcuda_stub.c'),
                    f'-DMAJOR={major}', f'-DMINOR={minor}')
    add_distribution(packages, 'mxnet-cu112')
    result = bare_command(packages, LD_LIBRARY_PATH=str(tmp_path))
    if has_code:
        assert result.stderr == 'reached\n'
    else:
        assert_one_sentence(result, f'GPU 0 is an sm_{major}{minor}', 'sm_50 to sm_86', 'VISIBLE_DEVICES')


@needs_gcc
def test_cuda_libraries_from_pip_are_loaded_before_mxnet(packages, tmp_path):
    (tmp_path / 'empty.c').write_text('')
    folder = packages / 'nvidia' / 'cuda_runtime' / 'lib'
    folder.mkdir(parents=True)
    name = 'libcudart.so.11.0'
    compile_library(folder / name, tmp_path / 'empty.c', f'-Wl,-soname,{name}')
    (packages / 'mxnet' / '__init__.py').write_text(
        f"import ctypes\nctypes.CDLL('{name}')\nraise SystemExit('loaded')")
    add_distribution(packages, 'mxnet-cu112')
    assert_one_sentence(bare_command(packages), name)
    add_distribution(packages, 'nvidia-cuda-runtime-cu11', [f'nvidia/cuda_runtime/lib/{name}'])
    assert bare_command(packages).stderr == 'loaded\n'


def find_python_313():
    """A Python 3.13 that starts, from PATH or pyenv, or None."""
    pyenv = os.environ.get('PYENV_ROOT', os.path.expanduser('~/.pyenv'))
    on_path = [path for path in [shutil.which('python3.13')] if path]
    for path in on_path + glob.glob(os.path.join(pyenv, 'versions', '3.13*', 'bin', 'python')):
        if python('--version', executable=path).stdout.startswith('Python 3.13'):  # not pyenv's empty shim
            return path
    return None


@pytest.mark.parametrize('arguments', [('setup.py', '--version'), ('-m', 'gn_gluon.info')])
def test_python_313_is_told_what_to_get(arguments):
    path = find_python_313()
    if path is None:
        pytest.skip('no Python 3.13 here')
    result = python(*arguments, executable=path)
    assert result.returncode != 0
    assert result.stderr.count('\n') == 1, result.stderr
    assert 'his is Python 3.13' in result.stderr and 'uv venv --python 3.12' in result.stderr


def test_python_problem():
    assert compat.python_problem((3, 8)) is None
    assert compat.python_problem((3, 12, 9)) is None
    assert 'uv venv --python 3.12' in compat.python_problem((3, 14, 0))


# setup.py and the constraints

def test_a_build_holds_every_recipe_and_leaves_the_clone_alone(tmp_path):
    before = set(os.listdir(CLONE))
    result = python('setup.py', '--quiet', 'build', '--build-base', str(tmp_path))
    assert result.returncode == 0, result.stderr
    recipes = {os.path.basename(path) for path in glob.glob(os.path.join(CLONE, 'gin', '*'))}
    assert {name for name in recipes if not name.endswith('.gin')} == set(), 'gin/ holds only recipes'
    assert {path.name for path in tmp_path.glob('lib*/gn_gluon/recipes/*')} == recipes
    assert set(os.listdir(CLONE)) == before


def test_setup_pins_every_preloaded_cuda_library():
    with open(os.path.join(CLONE, 'setup.py')) as file:
        pinned = set(re.findall(r"'([\w-]+)==[\d.]+'", file.read()))
    assert {library.package for library in compat.CUDA_LIBRARIES} <= pinned


@pytest.mark.parametrize('minor', range(8, 13))
def test_constraints_are_exact_versions(minor):
    with open(os.path.join(CLONE, 'tools', 'constraints', f'python3.{minor}.txt')) as file:
        lines = [line.strip() for line in file if not line.startswith('#')]
    versions = dict(line.split('==') for line in lines)
    assert versions['mxnet'] == '1.9.1' and versions['numpy'].startswith('1.') and 'gluoncv' in versions
