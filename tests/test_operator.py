"""Which operator is chosen, what happens when it cannot be, and what the layers rely on in each."""
import glob
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from gn_gluon import GroupNorm
from gn_gluon.norm import build, operator

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='g++ is not installed')
needs_native = pytest.mark.skipif(operator.active_operator()[0] != 'native',
                                  reason=f'the active operator is {operator.active_operator()}')


def python(code, **environ):
    """Run `code` in another process; an environment variable of None is removed."""
    environ = {**{key: value for key, value in os.environ.items() if key != 'GN_GLUON_OPERATOR'}, **environ}
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=REPOSITORY, text=True, check=False,
                          env={key: value for key, value in environ.items() if value is not None},
                          capture_output=True)


CHOICE = ('import gn_gluon, json; from gn_gluon.norm import operator; '
          'print(json.dumps(operator.active_operator()))')


def choice(**environ):
    result = python(CHOICE, **environ)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def cache(tmp_path):
    """A copy of the cache, which holds what is compiled for this machine."""
    folder = str(tmp_path / 'cache')
    build.built()
    shutil.copytree(build.cache_folder(), folder)
    return folder


# --------------------------------------------------------------------------------------------- the choice

@needs_compiler
def test_the_fastest_operator_that_passed_its_self_test_is_chosen_and_can_be_forced():
    name, reason = choice()
    assert name == ('native' if build.wheel_sha256() in operator.KNOWN_WHEELS else 'extension'), reason
    assert re.search('(avx512|avx2|baseline) kernels', reason)
    for tier in ('extension', 'composed'):
        name, reason = choice(GN_GLUON_OPERATOR=tier)
        assert name == tier and 'as GN_GLUON_OPERATOR asks' in reason


@needs_compiler
def test_an_unknown_build_of_mxnet_gets_the_public_interface(cache):
    code = 'from gn_gluon.norm import operator; operator.KNOWN_WHEELS = {"0": "mxnet 1.9.1"}; ' + CHOICE
    result = python(code, GN_GLUON_CACHE=cache)
    name, reason = json.loads(result.stdout.splitlines()[-1])
    assert name == 'extension' and 'libmxnet.so is not that of mxnet 1.9.1' in reason


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['crash', 'wrong'])
@needs_native
def test_a_failing_self_test_leaves_the_process_alone_and_the_next_operator_in_use(cache, damage):
    for path in glob.glob(os.path.join(cache, '*', 'selftest_native.json')):
        os.remove(path)
    for library in glob.glob(os.path.join(cache, '*', 'libnative.so')):
        source = os.path.join(cache, 'damaged.c')
        with open(source, 'w') as file:  # install nothing: the extension's function does not know bfloat16
            file.write('const char* gn_gluon_install(void) { return %s; }' % (
                '*(char**)8' if damage == 'crash' else '0'))
        subprocess.run(['gcc', '-shared', '-fPIC', '-O0', source, '-o', library], check=True)
    name, reason = choice(GN_GLUON_CACHE=cache)
    assert name == 'extension' and 'not native, since its self-test failed with exit code' in reason
    assert ('Segmentation fault' in reason) == (damage == 'crash')
    notes = [json.load(open(path)) for path in glob.glob(os.path.join(cache, '*', 'selftest_native.json'))]
    assert any(note['problem'] for note in notes)  # not tried again


def test_without_a_compiler_the_composition_works_and_says_what_to_install(tmp_path):
    name, reason = choice(GN_GLUON_CACHE=str(tmp_path), PATH=str(tmp_path), CXX=None)
    assert name == 'composed' and 'apt install g++' in reason


@pytest.mark.parametrize('environ, sentence', [
    ({'GN_GLUON_OPERATOR': 'fast'}, 'GN_GLUON_OPERATOR=fast in the environment is none of native, extension, composed'),
    ({'GN_GLUON_OPERATOR': 'native', 'PATH': '/nowhere', 'CXX': None, 'GN_GLUON_CACHE': '{tmp}'},
     'no C++ compiler was found'),
    ({'GN_GLUON_OPERATOR': 'extension', 'GN_GLUON_CACHE': '/proc/nowhere'}, 'cannot be written'),
    ({'GN_GLUON_OPERATOR': 'extension', 'CXX': '{tmp}/broken', 'GN_GLUON_CACHE': '{tmp}'},
     'broken could not compile the operator: error: no'),
])
def test_an_operator_that_is_asked_for_and_cannot_be_had_is_one_sentence(tmp_path, environ, sentence):
    broken = tmp_path / 'broken'
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo error: no; exit 1; }\n')
    broken.chmod(0o755)
    environ = {key: value and value.format(tmp=tmp_path) for key, value in environ.items()}
    result = python('import sys; sys.argv = ["info"]; from gn_gluon import info; from gn_gluon.errors import command; '
                    'command(info.main)', **environ)
    assert result.returncode == 2
    assert sentence in result.stderr.splitlines()[-1]
    assert not glob.glob(str(tmp_path / 'building-*'))  # nothing half-made stays


@needs_compiler
def test_the_operator_can_be_built_ahead(cache):
    result = python('import sys; sys.argv = ["info", "--build"]; from gn_gluon import info; info.main()',
                    GN_GLUON_CACHE=cache)
    assert result.returncode == 0, result.stderr
    assert 'extension: passed its self-test' in result.stdout and f'compiled in {cache}' in result.stdout


@pytest.mark.slow
@needs_compiler
def test_many_processes_that_start_at_once_compile_once(tmp_path):
    environ = {key: value for key, value in os.environ.items() if key != 'GN_GLUON_OPERATOR'}
    started = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CHOICE], cwd=REPOSITORY, text=True,
                                env=dict(environ, GN_GLUON_CACHE=str(tmp_path)), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for _ in range(4)]
    results = [process.communicate(timeout=300) for process in started]
    choices = [json.loads(output.splitlines()[-1]) for output, _ in results]
    assert all(choice == choices[0] for choice in choices) and choices[0][0] != 'composed'
    assert sum('compiling' in errors for _, errors in results) == 1


# --------------------------------------------------------------------------------------------- the operator in use

def convolution_norm_convolution(dtype='float32'):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(32, 3, in_channels=32), GroupNorm(8, in_channels=32, activation='relu'),
            nn.Conv2D(32, 3, in_channels=32))
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    return net


@needs_native
def test_no_reorder_of_activations_stands_around_the_native_operator():
    code = ('import sys; sys.path.insert(0, "tests"); import gn_gluon, mxnet as mx, test_operator; '
            'net = test_operator.convolution_norm_convolution(); x = mx.nd.ones((2, 32, 20, 20))\n'
            'for _ in range(3):\n'
            '    with mx.autograd.record(): y = net(x)\n'
            '    y.backward(); mx.nd.waitall(); print("step", flush=True)')
    native, extension = (python(code, DNNL_VERBOSE='1', GN_GLUON_OPERATOR=tier).stdout.split('step')[2]
                         for tier in ('native', 'extension'))
    # x, y and their gradients have 20 and 16 pixels a side; between the convolutions it is 18.
    assert not re.findall(r'exec,cpu,reorder.*2x32x18x18', native)
    assert re.findall(r'exec,cpu,reorder.*2x32x18x18', extension)


@pytest.mark.parametrize('request_', ['write', 'add', 'null'])
@pytest.mark.parametrize('which', ['x', 'gamma', 'beta', 'residual'])
def test_every_gradient_honours_its_request(which, request_):
    def gradients(requests):
        layer = GroupNorm(4, in_channels=16, activation='relu')
        layer.initialize()
        for name in ('gamma', 'beta'):
            getattr(layer, name).grad_req = requests.get(name, 'write')
        random = np.random.RandomState(0)
        arrays = {name: mx.nd.array(random.normal(size=(3, 16, 5, 7))) for name in ('x', 'residual')}
        for name, array in arrays.items():
            array.attach_grad(requests.get(name, 'write'))
        for _ in range(2):
            with mx.autograd.record():
                (layer(arrays['x'], arrays['residual']) ** 2).backward()
        arrays.update(gamma=layer.gamma.data(), beta=layer.beta.data())
        return {name: None if requests.get(name) == 'null' and array.grad is None else array.grad.asnumpy()
                for name, array in arrays.items()}

    plain, got = gradients({}), gradients({which: request_})
    for name in plain:
        times = {'write': 1, 'add': 2, 'null': 0}[request_] if name == which else 1
        np.testing.assert_allclose(0 if got[name] is None else got[name], plain[name] * times, rtol=1e-6, atol=1e-6)


@needs_native
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('blocked', ['x', 'residual', 'dy', 'x, dy', 'x, residual', 'residual, dy'])
def test_arrays_in_differing_layouts(blocked, dtype):
    from gn_gluon.precision import to
    random = np.random.RandomState(0)
    values = {name: mx.nd.array(np.round(random.normal(size=(2, 32, 9, 8)) * 32) / 32)
              for name in ('x', 'residual', 'dy')}
    eye = to(mx.nd, mx.nd.array(np.eye(32).reshape(32, 32, 1, 1)), dtype)
    layer = GroupNorm(8, in_channels=32, activation='relu')
    layer.initialize()

    def run(blocked):
        def bring(array, name):  # through a convolution that changes nothing but the layout
            array = to(mx.nd, array, dtype)
            if name not in blocked:
                return array
            return mx.nd.Convolution(array, eye, kernel=(1, 1), num_filter=32, no_bias=True)

        for name in ('x', 'residual'):
            values[name].attach_grad()
        with mx.autograd.record():
            y = layer(bring(values['x'], 'x'), bring(values['residual'], 'residual'))
            y = to(mx.nd, bring(y, 'dy'), 'float32') if 'dy' in blocked else to(mx.nd, y, 'float32')
        y.backward(values['dy'])
        return [array.asnumpy() for array in (y, values['x'].grad, values['residual'].grad, layer.gamma.grad())]

    bound = 1e-6 if dtype == 'float32' else 1e-2
    for got, wanted in zip(run(blocked.split(', ')), run([])):
        assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('environ', [
    {'GN_GLUON_OPERATOR': 'extension'}, {'GN_GLUON_OPERATOR': 'composed'}, {'GN_GLUON_ISA': 'avx2'},
    {'GN_GLUON_ISA': 'baseline'}, {'OMP_NUM_THREADS': '1'}, {'OMP_NUM_THREADS': '5'},
], ids=lambda environ: '='.join(*environ.items()))
def test_the_layers_pass_their_tests_with(environ):
    result = subprocess.run([sys.executable, '-m', 'pytest', '-q', 'tests/test_norm.py'],
                            cwd=REPOSITORY, env=dict(os.environ, **environ), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


def test_two_contexts_at_once_give_what_each_gives_alone():
    net = convolution_norm_convolution()
    devices = [mx.cpu(0), mx.cpu(1)]
    net.collect_params().reset_ctx(devices)
    x = mx.nd.random.normal(shape=(2, 32, 24, 24))

    def step(devices):
        arrays = [x.as_in_context(device) for device in devices]
        with mx.autograd.record():
            outputs = [net(array) for array in arrays]
        mx.autograd.backward(outputs)
        return [net[1].gamma.grad(device).asnumpy() for device in devices]

    alone = step(devices[:1])[0]
    for _ in range(5):
        for together in step(devices):
            np.testing.assert_array_equal(together, alone)


def _use_a_norm(_):
    layer = GroupNorm(4, in_channels=16)
    layer.initialize()
    return float(layer(mx.nd.arange(32).reshape((2, 16))).sum().asscalar())


def test_a_forked_process_may_use_the_layer():
    before = _use_a_norm(0)
    with multiprocessing.get_context('fork').Pool(1) as pool:
        assert pool.apply_async(_use_a_norm, (0,)).get(timeout=60) == before
