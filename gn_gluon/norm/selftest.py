"""python -m gn_gluon.norm.selftest native|extension FOLDER: whether a compiled operator is right in this process.

Run by `build.self_test` once per machine, before the library may enter a user's process. The definition of GroupNorm
in NumPy is the measure; in between stand convolutions, so that arrays come in oneDNN's layouts.
"""
import itertools
import sys

import mxnet as mx
import numpy as np

from gn_gluon.norm import operator

BFLOAT16 = np.dtype([('bfloat16', np.uint16)])
GROUPS = 8


def definition(x, gamma, beta, residual, dy):
    """y, dx, dresidual, dgamma, dbeta of relu(GN(x) + residual), in float64."""
    shape, per_channel = x.shape, (1, -1, 1, 1)
    grouped = x.astype('float64').reshape(shape[0], GROUPS, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
    x_hat = (centred * inverse).reshape(shape)
    y = x_hat * gamma.reshape(per_channel) + beta.reshape(per_channel) + residual
    dy = dy * (y > 0)
    slope = (dy * gamma.reshape(per_channel)).reshape(grouped.shape)
    flat = x_hat.reshape(grouped.shape)
    dx = inverse * (slope - slope.mean(-1, keepdims=True) - flat * (slope * flat).mean(-1, keepdims=True))
    return np.maximum(y, 0), dx.reshape(shape), dy, (dy * x_hat).sum((0, 2, 3)), dy.sum((0, 2, 3))


def check(name, got, wanted, bound):
    """Exit with a sentence if `got` is further from `wanted` than `bound` times the largest value."""
    error = np.abs(got.asnumpy() - wanted).max() / np.abs(wanted).max()
    if not error <= bound:
        sys.exit(f'{name} is wrong by {error:.1e} of its largest value')


def main(tier, folder):
    """Load the operator and compare it, on the CPU and, if there are any, on a GPU."""
    operator.load(tier, folder)
    dtypes = ('float32', BFLOAT16) if tier == 'native' else ('float32',)
    requests = ('write', 'add') if tier == 'native' else ('write',)
    for device in [mx.cpu()] + [mx.gpu(0)] * bool(mx.context.num_gpus()):
        for dtype, through_convolutions, request in itertools.product(dtypes, (False, True), requests):
            compare(device, dtype, through_convolutions, request)
    print('right')


def compare(device, dtype, through_convolutions, request):
    """One case: exits with a sentence if it is wrong."""
    random = np.random.RandomState(0)
    identity = mx.nd.array(np.eye(32).reshape(32, 32, 1, 1), ctx=device)

    def convolve(x):  # changes the layout alone
        return mx.nd.Convolution(x, mx.nd.amp_cast(identity, dtype=x.dtype), kernel=(1, 1), num_filter=32, no_bias=True)

    # Numbers that bfloat16 holds, so that the reference has the same input.
    x, residual, dy = ((np.round(random.normal(size=(3, 32, 9, 7)) * 32) / 32).astype('float32') for _ in range(3))
    gamma, beta = random.uniform(.5, 1.5, 32).astype('float32'), random.normal(size=32).astype('float32')
    arrays = [mx.nd.array(array, ctx=device) for array in (x, gamma, beta, residual)]
    for array in arrays:
        array.attach_grad(request)
        array.grad[:] = 1
    with mx.autograd.record():
        inputs = [arrays[0], arrays[3]]
        if dtype != 'float32':  # identity, since a cast loses its gradient under grad_req 'add'
            inputs = [mx.nd.amp_cast(mx.nd.identity(array), dtype=dtype) for array in inputs]
        if through_convolutions:
            inputs = [convolve(array) for array in inputs]
        y = mx.nd.gn_gluon_group_norm(inputs[0], arrays[1], arrays[2], inputs[1], num_groups=GROUPS, relu=1,
                                      residual=1, epsilon=1e-5)
        y = y[0] if isinstance(y, list) else y
        out = convolve(y) if through_convolutions else y
        out = out if dtype == 'float32' else mx.nd.amp_cast(out, dtype='float32')
    out.backward(mx.nd.array(dy, ctx=device))
    wanted = definition(x, gamma, beta, residual, dy)
    bound = 1e-5 if dtype == 'float32' else 2e-2
    case = f'{device}, {dtype}, convolutions {through_convolutions}, grad_req {request}:'
    check(f'{case} the output', out, wanted[0], bound)
    for name, array, gradient in zip(('x', 'residual', 'gamma', 'beta'), (arrays[0], arrays[3], arrays[1], arrays[2]),
                                     wanted[1:]):
        check(f'{case} the gradient of {name}', array.grad, gradient + (request == 'add'), bound)


if __name__ == '__main__':
    main(*sys.argv[1:])
