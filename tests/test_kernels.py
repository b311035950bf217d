"""The C++ kernels of the native operator by themselves: tests/kernels_test.cc, for every instruction set."""
import os
import shutil
import subprocess

import pytest

from gn_gluon.norm import build

SANITIZED = ('-O1', '-g', '-fsanitize=address,undefined', '-fno-sanitize-recover=all')

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which('g++'), reason='g++ is not installed')]


def compile_test(folder, *flags):
    """The test program with all instruction sets; `flags` for kernels and test alike."""
    here = os.path.dirname(os.path.abspath(__file__))
    objects = []
    for name, own in build.KERNEL_FLAGS.items():
        objects.append(str(folder / f'{name}.o'))
        subprocess.run(['g++', *build.COMMON_FLAGS, *flags, *own, f'-DGN_GLUON_ISA={name}', '-c', 'kernels.cc', '-o',
                        objects[-1]], cwd=build.SOURCES, check=True)
    program = str(folder / 'kernels_test')
    subprocess.run(['g++', *build.COMMON_FLAGS, *flags, '-I', build.SOURCES, os.path.join(here, 'kernels_test.cc'),
                    os.path.join(build.SOURCES, 'dispatch.cc'), *objects, '-o', program], check=True)
    return program


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    return compile_test(tmp_path_factory.mktemp('kernels'), '-O3')


def run(program, isa, *arguments):
    result = subprocess.run([program, *arguments], env=dict(os.environ, GN_GLUON_ISA=isa), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, check=False)
    if not arguments and result.stdout.split('\n')[0] != isa:
        pytest.skip(f'this processor has no {isa}')
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('isa', ['avx512', 'avx2', 'baseline'])
def test_every_layout_type_and_fused_form_equals_the_definition_in_double(program, isa):
    run(program, isa)


def test_indices_beyond_32_bits(program):
    if os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') < 10 * 2**30:
        pytest.skip('needs 10 GiB of memory')
    run(program, '', 'large')


def test_sanitizers_find_nothing(tmp_path):
    program = compile_test(tmp_path, *SANITIZED)
    for isa in ('avx512', 'avx2', 'baseline'):
        run(program, isa)
