"""The CUDA kernels: on an emulated GPU, through the real compiler, and on a GPU where there is one.

Imports neither MXNet nor gn_gluon, so that a machine with a GPU and PyTorch alone can run it:
python -m pytest --noconftest tests/test_cuda.py
"""
import ctypes
import importlib.util
import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(CLONE, 'tools'))

import bench_cuda  # noqa: E402

TYPES = bench_cuda.TYPES
STORED = {'float32': 'Float32', 'bfloat16': 'BFloat16', 'float16': 'Float16'}
#: What storing a result in the type may add: relative, and among float16's denormal numbers.
ROUNDING = {'float32': (0, 0), 'bfloat16': (2 ** -8, 0), 'float16': (2 ** -11, 2 ** -25)}
FUSED = list(itertools.product((False, True), repeat=2))  # relu, residual
GUARD = 64  # bytes before and after each array, which nothing may touch


# ------------------------------------------------------------------------------------------- arrays and memory

def stored(values, dtype):
    """float64 `values` rounded to `dtype`, as bits in a numpy array; bfloat16, which numpy lacks, as uint16."""
    if dtype != 'bfloat16':
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits, dtype):
    """float64 of what `stored` gave."""
    if dtype == 'bfloat16':
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


class Memory:
    """Arrays in the memory of the emulated GPU, each between guards; shift: bytes off the alignment to 16."""

    def __init__(self):
        self._blocks = []

    def allocate(self, size):
        return self.put(np.full(size, 0xff, np.uint8))

    def put(self, array, shift=0):
        """The address of a copy of `array`."""
        block = np.full(array.nbytes + 2 * GUARD + 32, 0xff, np.uint8)
        start = GUARD + -(block.ctypes.data + GUARD) % 16 + shift
        block[start:start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._blocks.append((block, start, array.nbytes))
        return block.ctypes.data + start

    def get(self, address, like):
        """The array at an address that `put` gave, in the shape and type of `like`."""
        for block, start, size in self._blocks:
            if block.ctypes.data + start == address:
                return block[start:start + size].view(like.dtype).reshape(like.shape).copy()
        raise KeyError(address)

    def untouched(self):
        """Whether all guards are as they were."""
        return all((block[:start] == 0xff).all() and (block[start + size:] == 0xff).all()
                   for block, start, size in self._blocks)


class TorchMemory(Memory):
    """The same in a GPU's memory."""

    def __init__(self, torch):
        super().__init__()
        self._torch = torch

    def put(self, array, shift=0):
        block = self._torch.full((array.nbytes + 2 * GUARD + 32,), 0xff, dtype=self._torch.uint8, device='cuda')
        start = GUARD + -(block.data_ptr() + GUARD) % 16 + shift
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        block[start:start + array.nbytes] = self._torch.from_numpy(data.copy()).cuda()
        self._blocks.append((block, start, array.nbytes))
        return block.data_ptr() + start

    def get(self, address, like):
        for block, start, size in self._blocks:
            if block.data_ptr() + start == address:
                return block[start:start + size].cpu().numpy().view(like.dtype).reshape(like.shape).copy()
        raise KeyError(address)


# ------------------------------------------------------------------------------------------- what is right

def expected_forward(x, gamma, beta, residual, groups, relu):
    """y and, (N, G), mean and rstd, in float64; x is (N, C, pixels)."""
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((grouped - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    y = ((grouped - mean) * rstd).reshape(x.shape) * gamma[:, None] + beta[:, None]
    y = y if residual is None else y + residual
    return np.maximum(y, 0) if relu else y, mean[..., 0], rstd[..., 0]


def expected_backward(dy, x, gamma, groups, mean, rstd):
    """dx, dgamma, dbeta in float64; dy is masked already."""
    shape = (x.shape[0], groups, -1)
    x_hat = ((x.reshape(shape) - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    d = (dy * gamma[:, None]).reshape(shape)
    hat = x_hat.reshape(shape)
    dx = rstd[..., None] * (d - d.mean(-1, keepdims=True) - hat * (d * hat).mean(-1, keepdims=True))
    return dx.reshape(x.shape), (dy * x_hat).sum((0, 2)), dy.sum((0, 2))


def error(value, true, dtype='float32'):
    """The largest error, without what rounding to `dtype` makes, over the largest value."""
    relative, absolute = ROUNDING[dtype]
    beyond = np.maximum(np.abs(value - true) - relative * np.abs(true) - absolute, 0)
    return beyond.max() / max(np.abs(true).max(), 1e-30)


class Case:
    """Inputs of a layer, (N, C, pixels) in G groups, and one run of the operator on them."""

    def __init__(self, shape, groups, dtype, relu=False, residual=False, shift=0, mean=0., deviation=1., seed=0):
        self.shape, self.groups, self.dtype, self.relu, self.shift = shape, groups, dtype, relu, shift
        random = np.random.RandomState(seed)
        self.x = stored(mean + deviation * random.randn(*shape), dtype)
        self.dy = stored(random.randn(*shape), dtype)
        self.residual = stored(random.randn(*shape), dtype) if residual else None
        self.gamma, self.beta = (random.uniform(0.5, 1.5, shape[1]).astype(np.float32) for _ in range(2))

    def run(self, operator, memory):
        """{name: result}; asserts that nothing but the results was written."""
        addresses = {name: memory.put(getattr(self, name), self.shift) for name in ('x', 'dy')}
        addresses.update((name, memory.put(getattr(self, name))) for name in ('gamma', 'beta'))
        residual = None if self.residual is None else memory.put(self.residual, self.shift)
        statistics = np.full((2, self.shape[0], self.groups), np.nan, np.float32)
        results = {'y': self.x, 'mean': statistics, 'rstd': statistics, 'dx': self.x, 'dgamma': self.gamma,
                   'dbeta': self.beta}
        if residual:
            results['dresidual'] = self.x
        for name, like in results.items():
            addresses[name] = memory.put(np.full(like.nbytes, 0xff, np.uint8), self.shift if like is self.x else 0)
        sizes = (*self.shape, self.groups)
        names = ('x', 'gamma', 'beta', 'y', 'mean', 'rstd')
        x, gamma, beta, y, mean, rstd = (addresses[name] for name in names)
        operator.forward(sizes, self.dtype, self.relu, x, residual, gamma, beta, y, mean, rstd)
        operator.backward(sizes, self.dtype, self.relu, bool(residual), addresses['dy'], x,
                          y if residual and self.relu else None, gamma, beta, mean, rstd, addresses['dx'],
                          addresses.get('dresidual'), addresses['dgamma'], addresses['dbeta'])
        results = {name: memory.get(addresses[name], like) for name, like in results.items()}
        assert memory.untouched(), 'something was written outside of an array'
        return results

    def errors(self, results):
        """{name: error against float64}."""
        x, dy = (widened(getattr(self, name), self.dtype) for name in ('x', 'dy'))
        gamma, beta = self.gamma.astype(np.float64), self.beta.astype(np.float64)
        residual = None if self.residual is None else widened(self.residual, self.dtype)
        y, mean, rstd = expected_forward(x, gamma, beta, residual, self.groups, self.relu)
        got_y = widened(results['y'], self.dtype)
        if self.relu:
            dy = np.where(got_y > 0, dy, 0)  # near 0 the sign is that of rounding
        dx, dgamma, dbeta = expected_backward(dy, x, gamma, self.groups, mean, rstd)
        if residual is not None:
            assert (widened(results['dresidual'], self.dtype) == dy).all()
        got_mean, got_rstd = (results[name].astype(np.float64).sum(0) for name in ('mean', 'rstd'))
        return {'y': error(got_y, y, self.dtype), 'dx': error(widened(results['dx'], self.dtype), dx, self.dtype),
                'dgamma': error(results['dgamma'], dgamma), 'dbeta': error(results['dbeta'], dbeta),
                'mean': np.abs((got_mean - mean) * rstd).max(), 'rstd': error(got_rstd, rstd)}


BOUNDS = {'y': 4e-7, 'dx': 6e-7, 'dgamma': 6e-7, 'dbeta': 4e-7, 'mean': 3e-7, 'rstd': 3e-7}


def assert_right(case, operator, memory, bounds=BOUNDS):
    errors = case.errors(case.run(operator, memory))
    beyond = {name: value for name, value in errors.items() if not value <= bounds[name]}
    assert not beyond, (beyond, vars(case)['shape'], case.groups, case.dtype)
    return errors


ONE_CHUNK = [  # shape, groups, bytes off the alignment, the variant of float32
    ((3, 8, 35), 4, 0, 'single'),     # groups that do not begin at 16 bytes
    ((2, 12, 10), 3, 0, 'crossing'),  # 16 bytes that belong to two channels
    ((2, 6, 56), 3, 0, 'whole'),
    ((2, 6, 56), 3, 4, 'single'),
    ((5, 24, 1), 3, 0, 'single'),     # a value for a channel
    ((33, 70, 3), 7, 0, 'single'),    # more samples and channels than a warp sums at once
    ((2, 4, 700), 2, 0, 'whole'),     # a group for a block
    ((1, 64, 49), 1, 0, 'crossing'),
]
SEVERAL_CHUNKS = [  # shape, groups, multiprocessors, stages
    ((2, 6, 49 * 8), 2, 16, [0]),     # chunks begin and end within channels
    ((2, 2, 1500), 1, 20, [0]),       # a channel of several chunks
    ((1, 40, 49), 1, 20, [0]),        # many channels a chunk
    ((2, 5, 331), 1, 20, [0]),        # and value by value
    ((2, 6, 49 * 8), 2, 1, [1, 2]),   # not all chunks of a group can run at once: two launches
]


def assert_rounds_to_even(operator, memory, dtype):
    """With gamma 0, y is beta rounded: ties go to even neighbours, and denormal numbers and infinity are reached."""
    unit = 2 * ROUNDING[dtype][0]
    values = np.array([1 + unit / 2, 1 + unit * 3 / 2, -1 - unit / 2, 1 + unit * 0.501, 3.7, 2 ** -24 * 2.5, 65520,
                       65519, 1e-9, 3e38, 2 ** -15 * (1 + 2 ** -9)])
    for pixels in (8, 5):
        case = Case((1, values.size, pixels), 1, dtype)
        case.gamma[:], case.beta[:] = 0, values
        with np.errstate(over='ignore'):
            expected = stored(case.beta.astype(np.float64), dtype)
        got = case.run(operator, memory)['y']
        assert (got.view(np.uint16) == expected.view(np.uint16)[None, :, None]).all(), (got[0, :, 0], expected)


# ------------------------------------------------------------------------------------------- a real GPU

@pytest.fixture(scope='module')
def real_gpu(tmp_path_factory):
    """(torch, Operator)."""
    if EmulatedGpu.loaded:
        pytest.skip('the emulated GPU stands in for the driver in this process: pytest -k real_gpu')
    if importlib.util.find_spec('torch') is None:
        pytest.skip('PyTorch is not installed, which allocates on the GPU')
    import torch
    if not torch.cuda.is_available():
        pytest.skip('PyTorch sees no GPU here')
    return bench_cuda.on_gpu(str(tmp_path_factory.mktemp('cuda')))


@pytest.mark.parametrize('dtype', TYPES)
def test_real_gpu_is_right_in_every_form(real_gpu, dtype):
    torch, operator = real_gpu
    cases = [(shape, groups, shift, 0) for shape, groups, shift, _ in ONE_CHUNK]
    cases += [(shape, groups, 0, 2600) for shape, groups, _, _ in SEVERAL_CHUNKS]
    cases += [((2, 64, 56 * 56), 32, 0, 0), ((2, 256, 200 * 168), 32, 0, 0), ((600, 256, 49), 32, 0, 0),
              ((3, 96, 31 * 31), 1, 0, 0), ((1, 32, 700 * 700), 1, 0, 0), ((1, 8, 1000 * 1500), 1, 0, 0)]
    for shape, groups, shift, block_memory in cases:
        for relu, residual in FUSED:
            operator.block_memory(block_memory)
            assert_right(Case(shape, groups, dtype, relu, residual, shift), operator, TorchMemory(torch),
                         {name: 2 * bound for name, bound in BOUNDS.items()})
    operator.block_memory(0)


@pytest.mark.parametrize('mean, deviation', [(1e5, 0.1), (1e3, 1)])
def test_real_gpu_keeps_the_digits_of_ill_conditioned_input(real_gpu, mean, deviation):
    torch, operator = real_gpu
    assert_right(Case((2, 64, 3000), 8, 'float32', mean=mean, deviation=deviation), operator, TorchMemory(torch),
                 dict(BOUNDS, mean=1e-6))


def test_real_gpu_repeats_itself_while_streams_wait_side_by_side(real_gpu):
    torch, operator = real_gpu
    streams = [torch.cuda.Stream() for _ in range(4)]
    layers = [bench_cuda.Layer(torch, operator, (2, 256, 200, 168), 32, 'float32', 'add+relu') for _ in streams]
    for _ in range(50):
        for layer, stream in zip(layers, streams):
            with torch.cuda.stream(stream):
                layer.forward()
                layer.backward()
    torch.cuda.synchronize()
    for layer in layers[1:]:
        for name in ('y', 'dx', 'dgamma', 'dbeta'):
            assert torch.equal(getattr(layer, name), getattr(layers[0], name)), name


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_real_gpu_rounds_to_even(real_gpu, dtype):
    torch, operator = real_gpu
    assert_rounds_to_even(operator, TorchMemory(torch), dtype)


# ------------------------------------------------------------------------------------------- an emulated GPU

def compile_stand_in(path, *flags):
    """Start compiling cuda_on_cpu.cc."""
    return subprocess.Popen(['g++', '-std=c++17', '-O1', '-w', '-ffp-contract=off', '-shared', '-fPIC', '-I',
                             bench_cuda.SOURCES, *flags, os.path.join(CLONE, 'tests', 'cuda_on_cpu.cc'), '-o', path,
                             '-ldl'])


class EmulatedGpu:
    """The libraries of cuda_on_cpu.cc, and the operator that finds them where it looks for CUDA."""

    loaded = False

    def __init__(self, folder):
        EmulatedGpu.loaded = True
        jobs = [compile_stand_in(f'{folder}/libcuda_on_cpu.so')]
        jobs += [compile_stand_in(f'{folder}/{name}.so', f'-DSTORED={name}') for name in STORED.values()]
        for job in jobs:
            assert job.wait() == 0
        self.library = ctypes.CDLL(f'{folder}/libcuda_on_cpu.so', mode=ctypes.RTLD_GLOBAL)
        self.library.gpu_launches.restype = ctypes.c_char_p
        self.memory = Memory()
        self.operator = bench_cuda.Operator(bench_cuda.build(folder), lambda size: self.memory.allocate(size))

    def start(self, multiprocessors=4, memory=64 << 10, block_memory=0, seed=0):
        """An empty GPU of so many multiprocessors with so much shared memory each."""
        self.library.gpu_is(multiprocessors, memory, 86, seed)
        self.operator.block_memory(block_memory)
        self.launches()
        self.memory = Memory()
        return self.operator, self.memory

    def launches(self):
        """What was launched since the last question: a dictionary each."""
        lines = self.library.gpu_launches().decode().splitlines()
        return [dict([('name', line.split()[0])], **{k: int(v) for k, v in re.findall(r'(\w+)=(\d+)', line)})
                for line in lines]


@pytest.fixture(scope='module')
def gpu(tmp_path_factory):
    if shutil.which('g++') is None:
        pytest.skip('g++ compiles the emulated GPU')
    return EmulatedGpu(str(tmp_path_factory.mktemp('cuda')))


@pytest.mark.parametrize('relu, residual', FUSED)
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('shape, groups, shift, variant', ONE_CHUNK)
def test_every_form_is_right(gpu, shape, groups, shift, variant, dtype, relu, residual):
    operator, memory = gpu.start()
    assert_right(Case(shape, groups, dtype, relu, residual, shift), operator, memory)
    launches = gpu.launches()
    assert [one['name'].split('_')[0] for one in launches] == ['forward', 'backward', 'reduce']
    assert all(one['chunks'] == 1 for one in launches)
    assert dtype != 'float32' or launches[0]['name'] == f'forward_{variant}'


@pytest.mark.parametrize('relu, residual', FUSED)
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('shape, groups, multiprocessors, stages', SEVERAL_CHUNKS)
def test_groups_of_several_chunks_are_right(gpu, shape, groups, dtype, relu, residual, multiprocessors, stages):
    operator, memory = gpu.start(multiprocessors, 16 << 10, block_memory=2000 if dtype != 'float32' else 2600)
    assert_right(Case(shape, groups, dtype, relu, residual), operator, memory)
    launches = [one for one in gpu.launches() if one['name'] != 'reduce_parameters']
    assert all(one['chunks'] > 1 for one in launches), launches
    assert [one['stage'] for one in launches] == 2 * stages


def test_few_groups_are_shared_by_all_multiprocessors(gpu):
    operator, memory = gpu.start(multiprocessors=16)
    assert_right(Case((1, 4, 100 * 100), 1, 'float32'), operator, memory)
    assert all(one['blocks'] > 8 for one in gpu.launches()[:2])


@pytest.mark.parametrize('block_memory', [0, 2600])
def test_results_do_not_depend_on_the_order_of_threads(gpu, block_memory):
    case = Case((2, 6, 420), 2, 'float32', relu=True, residual=True)
    runs = []
    for seed in range(8):
        operator, memory = gpu.start(20, block_memory=block_memory, seed=seed)
        runs.append(case.run(operator, memory))
    for name, result in runs[0].items():
        assert all((result.view(np.uint8) == run[name].view(np.uint8)).all() for run in runs), name


def test_blocks_that_wait_for_each_other_start_together(gpu):
    operator, memory = gpu.start(8, 10 << 10, block_memory=2600)  # 16 blocks run at once
    assert_right(Case((16, 4, 400), 2, 'float32'), operator, memory)
    assert [(one['chunks'], one['stage']) for one in gpu.launches()[:1]] == [(2, 0)]


@pytest.mark.parametrize('block_memory', [0, 2600])
@pytest.mark.parametrize('mean, deviation', [(1e5, 0.1), (1e3, 1), (-1e-3, 1e-4), (1e10, 1e8)])
def test_ill_conditioned_input_keeps_its_digits(gpu, mean, deviation, block_memory):
    operator, memory = gpu.start(40, block_memory=block_memory)
    assert_right(Case((2, 4, 1500), 2, 'float32', mean=mean, deviation=deviation), operator, memory,
                 dict(BOUNDS, mean=1e-6))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_outliers_where_the_centre_is_estimated_cost_few_digits(gpu, dtype):
    case = Case((2, 4, 800), 2, dtype)
    case.x[..., ::8] = stored(np.full(1, 50.), dtype)[0]
    operator, memory = gpu.start()
    assert_right(case, operator, memory, dict(BOUNDS, rstd=3e-6, dgamma=3e-6))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_results_are_rounded_to_even(gpu, dtype):
    assert_rounds_to_even(*gpu.start(), dtype)


@pytest.mark.parametrize('shape', [(3, 6, 1), (2, 6, 640)])
def test_constant_groups_become_beta(gpu, shape):
    case = Case(shape, 6 if shape[2] == 1 else 2, 'float32')
    case.x[:] = 3.3
    operator, memory = gpu.start()
    results = case.run(operator, memory)
    assert np.abs(results['y'] - case.beta[:, None]).max() < 1e-6
    if shape[2] == 1:
        assert np.abs(results['dx']).max() < 1e-3 and np.abs(results['dgamma']).max() < 1e-5  # rstd is 316


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_and_infinity_spoil_their_own_group_and_no_other(gpu, bad):
    case = Case((2, 4, 600), 2, 'float32', relu=True)
    case.x[1, 2, 77] = bad
    operator, memory = gpu.start(20, block_memory=2600)
    results = case.run(operator, memory)
    spoilt = np.zeros((2, 4), bool)
    spoilt[1, 2:] = True
    for name in ('y', 'dx'):
        assert (np.isnan(results[name]).all(-1) == spoilt).all(), name
        assert (np.isfinite(results[name]).all(-1) == ~spoilt).all(), name


def test_denormal_numbers_are_not_flushed(gpu):
    case = Case((1, 4, 64), 2, 'float32', deviation=1e-40)
    case.beta[:] = 0
    operator, memory = gpu.start()
    results = case.run(operator, memory)
    x = case.x.astype(np.float64).reshape(2, -1)
    expected = ((x - x.mean(-1, keepdims=True)) / np.sqrt(1e-5)).reshape(case.shape) * case.gamma[:, None]
    assert np.abs(results['y'] - expected).max() < 316 * 3e-45 and np.abs(expected).max() > 1e-38


@pytest.mark.parametrize('missing', ['dx', 'dresidual', 'dgamma', 'dbeta'])
def test_a_gradient_that_nobody_wants_is_left_out(gpu, missing):
    case = Case((2, 6, 56), 3, 'float32', relu=True, residual=True)
    operator, memory = gpu.start()
    whole, backward = case.run(operator, memory), operator.backward
    names = ('dx', 'dresidual', 'dgamma', 'dbeta')
    try:
        operator.backward = lambda *a: backward(*a[:11], *(None if name == missing else one
                                                            for name, one in zip(names, a[11:])))
        some = case.run(operator, gpu.start()[1])
    finally:
        operator.backward = backward
    assert np.isnan(some.pop(missing)).all()
    for name, value in some.items():
        assert (value == whole[name]).all(), name


def test_arrays_beyond_2_to_the_31_values(gpu):
    shape, groups = (2 ** 15 + 1, 64, 1024), 2
    assert np.prod(shape, dtype=np.int64) > 2 ** 31
    size = 2 * int(np.prod(shape, dtype=np.int64))
    operator, memory = gpu.start(memory=1 << 20)
    try:  # addresses only: what is not touched takes no memory
        spaces = [mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) for _ in range(4)]
    except OSError as problem:
        pytest.skip(f'no 17 GB of addresses here: {problem}')
    x, dy, y, dx = (np.frombuffer(space, np.float16)[-64 * 1024:].reshape(1, 64, 1024) for space in spaces)
    small = Case((1, *shape[1:]), groups, 'float16', relu=True)
    x[:], dy[:] = small.x, small.dy
    statistics = np.zeros((2, 2, shape[0], groups), np.float32)
    first_mean, first_rstd = (one.ctypes.data for one in statistics)
    gamma, beta = small.gamma.ctypes.data, small.beta.ctypes.data
    starts = [np.frombuffer(space, np.float16).ctypes.data for space in spaces]
    gpu.library.gpu_starts_at((shape[0] - 1) * groups)
    operator.forward((*shape, groups), 'float16', True, starts[0], None, gamma, beta, starts[2], first_mean, first_rstd)
    operator.backward((*shape, groups), 'float16', True, False, starts[1], starts[0], None, gamma, beta, first_mean,
                      first_rstd, starts[3], None, None, None)
    assert all(one['chunks'] == 1 and one['blocks'] == shape[0] * groups for one in gpu.launches())
    exact_y, mean, rstd = expected_forward(small.x.astype(float), small.gamma, small.beta, None, groups, True)
    exact_dx = expected_backward(np.where(y > 0, dy, 0).astype(float), small.x.astype(float), small.gamma, groups, mean,
                                 rstd)[0]
    assert error(y, exact_y, 'float16') < 1e-6 and error(dx, exact_dx, 'float16') < 1e-6


def test_what_the_kernels_cannot_do_is_said_in_one_sentence(gpu):
    operator, memory = gpu.start()
    gpu.library.gpu_is(4, 64 << 10, 37, 0)
    with pytest.raises(RuntimeError, match='^the GPU is an sm_37, but GroupNorm on a GPU needs sm_50 or newer'):
        Case((2, 6, 56), 3, 'float32').run(operator, memory)
    gpu.start()
    with pytest.raises(RuntimeError, match='at most 2.31 - 1 samples'):
        operator.forward((1, 2, 2 ** 31, 1), 'float32', False, 0, 0, 0, 0, 0, 0, 0)


def test_the_benchmark_measures_errors_and_prints_a_row(gpu):
    torch = pytest.importorskip('torch', reason='PyTorch is what the benchmark compares with')
    operator, _ = gpu.start()
    for dtype, form in itertools.product(TYPES, bench_cuda.FORMS):
        layer = bench_cuda.Layer(torch, operator, (2, 8, 6, 6), 4, dtype, form, device='cpu')
        errors = layer.errors()
        ours = {name: pair[0] for name, pair in errors.items()}
        assert max(ours.values()) < (5e-7 if dtype == 'float32' else 1e-2), errors
    times = {name: bench_cuda.quartiles([2., 1., 4.]) for name in ('copy', 'ours', 'torch')}
    row = {'network': 'resnet50', 'shape': (2, 8, 6, 6), 'dtype': dtype, 'form': form, 'errors': errors,
           'forward': times, 'backward': times}
    lines = list(bench_cuda.lines_of(row))
    assert len(lines) == 2 and ' 100%' in lines[0] and '1.00' in lines[1] and 'dgamma' in lines[1]


# ------------------------------------------------------------------------------------------- NVRTC

COMPILE = '''
import ctypes, sys
sys.path.insert(0, {tools!r})
import bench_cuda
driver = ctypes.CDLL({driver!r}, mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL({nvrtc!r})
driver.gpu_launches.restype = ctypes.c_char_p
operator = bench_cuda.Operator({library!r}, lambda size: 1 << 20)
for capability in {capabilities}:
    for dtype in {types}:
        driver.gpu_is(4, 64 << 10, capability, 0)
        operator.forward((2, 8, 64, 4), dtype, True, *[1 << 20] * 7)
        print(capability, dtype, driver.gpu_launches().decode().split())
'''


def compile_with(nvrtc, capabilities, types, folder):
    """The lines that COMPILE prints: 'capability type [cubin or ptx, launch...]'."""
    job = compile_stand_in(f'{folder}/libcuda.so', '-DREAL_NVRTC')
    library = bench_cuda.build(str(folder))
    assert job.wait() == 0
    code = COMPILE.format(tools=os.path.join(CLONE, 'tools'), driver=f'{folder}/libcuda.so', nvrtc=nvrtc,
                          library=library, capabilities=capabilities, types=types)
    done = subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


@pytest.fixture(params=bench_cuda.nvrtc_libraries() or [None], ids=lambda path: path and os.path.basename(path))
def nvrtc(request):
    if request.param is None:
        pytest.skip('no NVRTC: pip install nvidia-cuda-nvrtc-cu11==11.8.89')
    if shutil.which('g++') is None:
        pytest.skip('g++ compiles the stand-in for the driver')
    return request.param


def test_nvrtc_compiles_the_kernels(nvrtc, tmp_path):
    line, = compile_with(nvrtc, [86], ['float16'], tmp_path)
    assert line.startswith("86 float16 ['cubin', 'forward_whole', ")


@pytest.mark.slow
def test_nvrtc_compiles_every_type_for_every_gpu(nvrtc, tmp_path):
    known = [52, 61, 70, 75, 80, 86, 89, 90]
    lines = compile_with(nvrtc, known + [130], list(TYPES), tmp_path)
    kinds = [(line.split()[0], line.split()[1], 'cubin' in line, 'ptx' in line) for line in lines]
    assert kinds == [(str(capability), dtype, capability in known, capability not in known)
                     for capability in known + [130] for dtype in TYPES]
