#!/usr/bin/env python
"""Measures the CUDA kernels beside PyTorch's group_norm and a plain copy: python tools/bench_cuda.py --json cuda.json

Needs an NVIDIA GPU of sm_50 or newer, PyTorch with CUDA, NVRTC (pip's nvidia-cuda-nvrtc or CUDA's own) and a C++
compiler; not MXNet. The kernels are compiled and launched by the code that the operator in MXNet uses.

error: largest error over largest value, against float64, of what forward and backward give, ours and PyTorch's.
time: GPU time of one call, of --rounds medians of a captured graph of calls; the arrays of a graph together have more
than --ring MB, so that the cache holds no call's data. copy is a device-to-device copy that moves as many bytes: x and
y forward; dy, x and dx backward; with a sum (add+relu) the residual as well, and y and the residual's gradient.
Contestants take turns. Parameters, float32 for ours, are in x's type for PyTorch, whose GPU kernels take no mixture;
their values are the same. bandwidth is the copy's time over ours; the ratio is PyTorch's time over ours.
"""
import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

CLONE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = os.path.join(CLONE, 'gn_gluon', 'norm', 'native')

FORMS = ('plain', 'relu', 'add+relu')
TYPES = ('float32', 'bfloat16', 'float16')  # in the order of group_norm.h
#: (C, H, W) of the inputs of ResNet-50's norms, images of 224 x 224
RESNET50 = ((64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 56, 56), (128, 28, 28), (512, 28, 28), (256, 28, 28),
            (256, 14, 14), (1024, 14, 14), (512, 14, 14), (512, 7, 7), (2048, 7, 7))
#: (N, C, H, W) of some norms of Mask R-CNN, 2 images of 800 x 1344: backbone, FPN, box head, mask head
MASK_RCNN = ((2, 64, 400, 672), (2, 256, 200, 336), (2, 512, 100, 168), (2, 1024, 50, 84), (2, 2048, 25, 42),
             (2, 256, 100, 168), (2, 256, 50, 84), (2, 256, 25, 42), (1024, 256, 7, 7), (256, 256, 14, 14))


def nvrtc_libraries():
    """The NVRTC libraries that pip installed here, newest last."""
    found = []
    for distribution in importlib.metadata.distributions():
        if (distribution.metadata['Name'] or '').startswith('nvidia-cuda-nvrtc'):
            found += [str(file.locate()) for file in distribution.files or ()
                      if file.name.startswith('libnvrtc.so') and file.locate().exists()]
    return sorted(found, key=lambda path: [int(n) for n in path.rsplit('.so.', 1)[-1].split('.') if n.isdigit()])


def build(folder):
    """Compile the host's part (cuda_launch.cc) into `folder`; returns the library's path."""
    path = os.path.join(os.path.abspath(folder), 'libbench_cuda.so')
    sources = ['cuda_launch.cc', os.path.join(CLONE, 'tools', 'bench_cuda.cc')]
    subprocess.run([os.environ.get('CXX', 'g++'), '-std=c++17', '-O2', '-shared', '-fPIC', '-I', SOURCES, '-o', path,
                    *sources, '-ldl'], cwd=SOURCES, check=True)
    return path


class Operator:
    """forward and backward of the built library, on addresses (int, None for null) in the GPU's memory.

    allocate(bytes) gives the address of workspace. Raises RuntimeError with the text of what went wrong.
    """

    def __init__(self, path, allocate):
        self._library = ctypes.CDLL(path)
        self._allocate = allocate
        address, flag = ctypes.c_void_p, ctypes.c_bool
        head = [ctypes.POINTER(ctypes.c_int64), ctypes.c_float, ctypes.c_int, flag]
        tail = [address, address, ctypes.POINTER(ctypes.c_int64)]
        self._library.forward.argtypes = head + [address] * 7 + tail
        self._library.backward.argtypes = head + [flag] + [address] * 11 + tail
        self._library.forward.restype = self._library.backward.restype = ctypes.c_char_p

    def block_memory(self, size):
        """Give a block `size` bytes of shared memory; 0 leaves it to the library."""
        self._library.block_memory(size)

    def forward(self, shape, dtype, relu, x, residual, gamma, beta, y, mean, rstd, epsilon=1e-5, stream=None):
        """shape: (N, C, pixels, G); mean, rstd: (2, N, G)."""
        self._call(self._library.forward, shape, epsilon, dtype,
                   (relu, x, residual, gamma, beta, y, mean, rstd), stream)

    def backward(self, shape, dtype, relu, residual, dy, x, y, gamma, beta, mean, rstd, dx, dresidual, dgamma, dbeta,
                 epsilon=1e-5, stream=None):
        """residual: whether there was one; y is needed with a residual and relu. Any of the results may be None."""
        self._call(self._library.backward, shape, epsilon, dtype,
                   (relu, residual, dy, x, y, gamma, beta, mean, rstd, dx, dresidual, dgamma, dbeta), stream)

    def _call(self, function, shape, epsilon, dtype, arguments, stream):
        head = ((ctypes.c_int64 * 4)(*shape), epsilon, TYPES.index(dtype))
        needed = ctypes.c_int64()
        problem = function(*head, *arguments, None, stream, ctypes.byref(needed))
        if not problem:
            workspace = self._allocate(needed.value) if needed.value else None
            problem = function(*head, *arguments, workspace, stream, None)
        if problem:
            raise RuntimeError(problem.decode())


# ------------------------------------------------------------------------------------------- with PyTorch

def on_gpu(folder):
    """(torch, Operator) for the current GPU; the library is built into `folder`."""
    import torch
    torch.zeros(1, device='cuda')  # makes the context
    for path in nvrtc_libraries()[-1:]:
        ctypes.CDLL(path)  # cuda_launch.cc finds it by its name, now that it is loaded
    kept = {}

    def allocate(size):  # kept, since captured graphs use it again and again
        key = size, torch.cuda.current_stream().cuda_stream
        if key not in kept:
            kept[key] = torch.empty(size, dtype=torch.uint8, device='cuda')
        return kept[key].data_ptr()

    return torch, Operator(build(folder), allocate)


class Layer:
    """One norm's arrays, and the calls on them. `form` is one of FORMS."""

    def __init__(self, torch, operator, shape, groups, dtype, form, seed=0, device='cuda'):
        self.torch, self.operator, self.groups, self.device = torch, operator, groups, device
        self.relu, self.sums = form != 'plain', form == 'add+relu'
        self.dtype, self.torch_dtype = dtype, getattr(torch, dtype)
        self.sizes = (shape[0], shape[1], math.prod(shape[2:]), groups)
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size):
            return torch.randn(size, device=device, generator=generator)

        self.x, self.dy = (random(*shape).to(self.torch_dtype) for _ in range(2))
        self.residual = random(*shape).to(self.torch_dtype) if self.sums else None
        self.typed = [(mean + random(shape[1]) / 4).to(self.torch_dtype) for mean in (1, 0)]
        self.gamma, self.beta = (parameter.float() for parameter in self.typed)
        self.y, self.dx, self.dresidual = (torch.empty_like(self.x) for _ in range(3))
        self.mean, self.rstd = (torch.empty(2, shape[0], groups, device=device) for _ in range(2))
        self.dgamma, self.dbeta = (torch.empty(shape[1], device=device) for _ in range(2))
        self.saved = torch.ops.aten.native_group_norm(self.x, *self.typed, *self.sizes, 1e-5)[1:]

    def _stream(self):
        return self.torch.cuda.current_stream().cuda_stream if self.device == 'cuda' else None

    def forward(self):
        """Ours."""
        residual = self.residual.data_ptr() if self.sums else None
        self.operator.forward(self.sizes, self.dtype, self.relu, self.x.data_ptr(), residual, self.gamma.data_ptr(),
                              self.beta.data_ptr(), self.y.data_ptr(), self.mean.data_ptr(), self.rstd.data_ptr(),
                              stream=self._stream())

    def backward(self):
        """Ours, after forward."""
        self.operator.backward(
            self.sizes, self.dtype, self.relu, self.sums, self.dy.data_ptr(), self.x.data_ptr(), self.y.data_ptr(),
            self.gamma.data_ptr(), self.beta.data_ptr(), self.mean.data_ptr(), self.rstd.data_ptr(), self.dx.data_ptr(),
            self.dresidual.data_ptr() if self.sums else None, self.dgamma.data_ptr(), self.dbeta.data_ptr(),
            stream=self._stream())

    def torch_forward(self):
        """PyTorch's; returns y."""
        y = self.torch.nn.functional.group_norm(self.x, self.groups, *self.typed)
        y = y.add_(self.residual) if self.sums else y
        return self.torch.relu_(y) if self.relu else y

    def torch_backward(self):
        """What PyTorch's autograd calls; returns dx, dgamma, dbeta."""
        dy = self.torch.ops.aten.threshold_backward(self.dy, self.y, 0) if self.relu else self.dy
        return self.torch.ops.aten.native_group_norm_backward(dy, self.x, *self.saved, self.typed[0], *self.sizes,
                                                              [True] * 3)

    def copier(self, share):
        """A copy that moves as many bytes as `share` arrays have; half of them are read."""
        count = self.x.numel() * share // 2
        source, target = (self.torch.empty(count, dtype=self.torch_dtype, device=self.device) for _ in range(2))
        return lambda: target.copy_(source)

    def errors(self):
        """{quantity: (ours, PyTorch's)}: largest error over largest value, against float64."""
        torch = self.torch
        x, gamma, beta = (t.double().requires_grad_() for t in (self.x, self.gamma, self.beta))
        norm = torch.nn.functional.group_norm(x, self.groups, gamma, beta)
        exact_y = norm + self.residual.double() if self.sums else norm
        exact_y = exact_y.relu() if self.relu else exact_y
        self.forward()
        self.backward()
        dy = torch.where(self.y > 0, self.dy, 0) if self.relu else self.dy  # near 0 the sign is that of rounding
        exact = [exact_y.detach(), *torch.autograd.grad(norm, (x, gamma, beta), dy.double())]
        ours = [self.y, self.dx, self.dgamma, self.dbeta]
        theirs = [self.torch_forward(), *self.torch_backward()]

        def error(value, true):
            return float((value.double() - true).abs().max() / true.abs().max())

        return {name: (error(one, true), error(other, true))
                for name, one, other, true in zip(('y', 'dx', 'dgamma', 'dbeta'), ours, theirs, exact)}


def graph_of(torch, calls, stream):
    """(graph, what it writes to): the calls as a graph of the GPU, which replays without the host in between."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # what is compiled or allocated at first use must not be captured
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    return graph, results


def measure(torch, contestants, rounds):
    """{name: microseconds of a call, per round} of {name: calls}; the contestants take turns."""
    stream = torch.cuda.Stream()
    graphs = {name: graph_of(torch, calls, stream) for name, calls in contestants.items()}
    times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (graph, _) in graphs.items():
            samples = []
            for _ in range(5):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples.append(start.elapsed_time(end) * 1e3 / len(contestants[name]))
            if turn:  # the first warms up
                times[name].append(statistics.median(samples))
    return times


def quartiles(values):
    """(lower quartile, median, upper quartile)."""
    return tuple(statistics.quantiles(values, n=4, method='inclusive')) if len(values) > 1 else (values[0],) * 3


def rows(torch, operator, flags):
    """A dictionary for each shape, type and form."""
    shapes = []
    if 'resnet50' in flags.network:
        shapes += [('resnet50', (flags.batch, *shape)) for shape in RESNET50]
    if 'mask_rcnn' in flags.network:
        shapes += [('mask_rcnn', shape) for shape in MASK_RCNN]
    for network, shape in shapes:
        for dtype in flags.type:
            for form in flags.form:
                row = {'network': network, 'shape': shape, 'dtype': dtype, 'form': form}
                layer = Layer(torch, operator, shape, flags.groups, dtype, form)
                row['errors'] = layer.errors()
                size = layer.x.numel() * layer.x.element_size()
                count = max(2, min(64, math.ceil(flags.ring * 1e6 / (size * 2))))
                layers = [layer] + [Layer(torch, operator, shape, flags.groups, dtype, form, seed)
                                    for seed in range(1, count)]
                for one in layers:
                    one.forward()  # torch_backward reads y
                arrays = {'forward': 3, 'backward': 5} if layer.sums else {'forward': 2, 'backward': 3}
                for direction, share in arrays.items():
                    times = measure(torch, {
                        'copy': [one.copier(share) for one in layers],
                        'ours': [getattr(one, direction) for one in layers],
                        'torch': [getattr(one, 'torch_' + direction) for one in layers]}, flags.rounds)
                    row[direction] = {name: quartiles(values) for name, values in times.items()}
                del layer, layers
                torch.cuda.empty_cache()
                yield row


HEADER = ('network    N x C x H x W         type     form     pass       copy us   ours us (quartiles)       torch us '
          'bandwidth  ratio  largest error of ours and of torch')


def lines_of(row):
    """The table's lines for a row."""
    head = '{:10} {:21} {:8} {:8}'.format(row['network'], 'x'.join(map(str, row['shape'])), row['dtype'],
                                          row['form'])
    for direction, quantities in (('forward', ['y']), ('backward', ['dx', 'dgamma', 'dbeta'])):
        copy, ours, torch = (row[direction][name] for name in ('copy', 'ours', 'torch'))
        times = f'{copy[1]:9.1f} {ours[1]:9.1f} {f"({ours[0]:.1f} to {ours[2]:.1f})":20} {torch[1]:9.1f}'
        errors = ', '.join('{} {:.1e} {:.1e}'.format(name, *row['errors'][name]) for name in quantities)
        yield f'{head} {direction:8} {times} {copy[1] / ours[1]:9.0%} {torch[1] / ours[1]:6.2f}  {errors}'


def parse_flags(arguments=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', nargs='+', choices=('resnet50', 'mask_rcnn'), default=['resnet50', 'mask_rcnn'])
    parser.add_argument('--type', nargs='+', choices=TYPES, default=list(TYPES))
    parser.add_argument('--form', nargs='+', choices=FORMS, default=list(FORMS))
    parser.add_argument('--batch', type=int, default=32, help='images of ResNet-50 (default: %(default)s)')
    parser.add_argument('--groups', type=int, default=32, help='(default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=7, help='(default: %(default)s)')
    parser.add_argument('--ring', type=int, default=256, help='MB, above the size of the cache (default: %(default)s)')
    parser.add_argument('--block_memory', type=int, default=0,
                        help='bytes of shared memory of a block (default: half of what a multiprocessor has)')
    parser.add_argument('--json', metavar='FILE', help='write the rows there too')
    return parser.parse_args(arguments)


def main():
    flags = parse_flags()
    try:
        import torch
    except ImportError:
        sys.exit('error: PyTorch is not installed, which this compares with: pip install torch')
    if not torch.cuda.is_available():
        sys.exit('error: PyTorch sees no GPU here')
    with tempfile.TemporaryDirectory() as folder:
        torch, operator = on_gpu(folder)
        operator.block_memory(flags.block_memory)
        about = {'gpu': torch.cuda.get_device_name(), 'torch': torch.__version__, 'rounds': flags.rounds,
                 'block_memory': flags.block_memory, 'groups': flags.groups, 'ring': flags.ring, 'rows': []}
        print('{gpu}, PyTorch {torch}; {groups} groups, n = {rounds} rounds'.format(**about))
        print(HEADER)
        for row in rows(torch, operator, flags):
            about['rows'].append(row)
            print('\n'.join(lines_of(row)), flush=True)
    if flags.json:
        with open(flags.json, 'w') as file:
            json.dump(about, file, indent=1)


if __name__ == '__main__':
    main()
