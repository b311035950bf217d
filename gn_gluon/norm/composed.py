"""Norms composed of stock MXNet 1.9.1 operators. `F` is `mx.nd` or `mx.sym`: each function works eager and hybridized.

All of it happens on the view (N, C, L), L the number of pixels. Sums over pixels, and the way back from one number to
all pixels, are products with a row of ones (1, L): MXNet's own reductions, and the gradients of its broadcasts, take 4
to 20 times as long as BLAS. `dot` and not FullyConnected: the last bit of oneDNN's sums depends on the number of rows,
hence on the size of the batch.
"""


def _row_of_ones(F, x):
    """Ones (1, L) for x (N, C, L), without gradient."""
    return F.ones_like(F.reshape(F.slice(x, begin=(0, 0, 0), end=(1, 1, None)), (1, -1)))


def _to_pixels(F, per_channel, ones):
    """(N, G, C/G) or (N, C, 1) repeated for every pixel: (N, C, L)."""
    return F.dot(F.reshape(per_channel, (0, -1, 1)), ones)


def like_channels(F, parameter, x, dtype):
    """`parameter`, its unknown shape tied to the C of x (N, C, ...): MXNet infers no shape back through a reshape."""
    pixel = F.slice(F.reshape(x, (0, 0, -1)), begin=(0, None, 0), end=(1, None, 1))
    return parameter + F.zeros_like(widen(F, F.reshape(pixel, (-1,)), dtype))


def plain(F, x):
    """x in MXNet's own memory layout, converted once: oneDNN's slice of its blocked one divides by zero and aborts."""
    return F.reshape(x, (-2,))


def widen(F, x, dtype):
    """x in float32 where it is narrower. `dtype` is that of x, None where a graph is traced that cannot know it."""
    return F.cast(x, dtype='float32') if dtype in (None, 'float16', 'bfloat16') else x


def finish(F, y, residual, activation):
    """activation(y + residual), either of them None for none."""
    if residual is not None:
        y = y + residual
    # Activation('relu') and not F.relu, which leaves oneDNN
    return y if activation is None else F.Activation(y, act_type=activation)


def close(F, y, x, residual, activation, dtype):
    """As `finish`, with y in float32, and the result in the type of x."""
    y = finish(F, y, None if residual is None else widen(F, residual, dtype), activation)
    if dtype == 'float16':
        return F.cast(y, dtype='float16')
    if dtype in (None, 'bfloat16'):  # amp_multicast takes the type from x itself; on the CPU it refuses float16
        like = F.BlockGrad(F.slice(x, begin=(0, 0), end=(1, 1)))
        return F.amp_multicast(y, like, num_outputs=2, cast_narrow=True)[0]
    return y


def _per_channel(F, vector, pixels):
    """(C,) for every sample of pixels (N, C, L): (N, C, 1)."""
    rows = F.zeros_like(F.slice_axis(pixels, axis=2, begin=0, end=1))
    return F.broadcast_add(rows, F.reshape(vector, (1, -1, 1)))


def bias(F, x, beta, residual, activation, dtype):
    """activation(x + beta + residual): x, residual (or None) and the result (N, C, ...), beta (C,) float32."""
    x = plain(F, x)
    wide = F.reshape(widen(F, x, dtype), (0, 0, -1))
    y = F.reshape_like(wide + _to_pixels(F, _per_channel(F, beta, wide), _row_of_ones(F, wide)), x)
    return close(F, y, x, residual, activation, dtype)


def batch_renorm(F, x, gamma, beta, running_mean, running_var, residual, r_max, d_max, momentum, epsilon, activation,
                 dtype):
    """activation(gamma * (x_hat * r + d) + beta + residual) as Ioffe (2017), algorithm 1; shapes as `group_norm`.

    running_mean and running_var (C,) are auxiliary states: the BatchNorm inside updates them, as only an operator can
    in a hybridized graph. In inference its mean and deviation are the running ones, which makes r = 1 and d = 0.
    """
    x = plain(F, x)
    # One consumer each: with several, a static graph adds too much to a gradient of grad_req 'add'.
    gamma, beta = F.identity(gamma), F.identity(beta)
    # Copied before BatchNorm, which on a GPU updates them in its forward pass.
    old_mean, old_var = F.BlockGrad(running_mean), F.BlockGrad(running_var)
    wide = widen(F, x, dtype)
    x_hat, mean, inverse_deviation = F.BatchNorm(
        wide, F.ones_like(gamma), F.zeros_like(beta), running_mean, running_var, eps=epsilon, momentum=momentum,
        fix_gamma=False, output_mean_var=True)
    old_inverse_deviation = F.rsqrt(old_var + epsilon)
    r = F.clip(old_inverse_deviation / inverse_deviation, 1 / r_max, r_max)
    d = F.clip(-(old_mean - mean) * old_inverse_deviation, -d_max, d_max)
    scale, shift = gamma * F.BlockGrad(r), beta + gamma * F.BlockGrad(d)
    x_hat = F.reshape(x_hat, (0, 0, -1))
    ones = _row_of_ones(F, x_hat)
    y = x_hat * _to_pixels(F, _per_channel(F, scale, x_hat), ones) + _to_pixels(F, _per_channel(F, shift, x_hat), ones)
    return close(F, F.reshape_like(y, x), x, residual, activation, dtype)


def group_norm(F, x, gamma, beta, residual, groups, epsilon, activation, dtype):
    """activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta + residual), as Wu & He, Sec. 3.1 and 3.2.

    x, residual (or None) and the result: (N, C, ...), gamma and beta: (C,) float32. `groups` is what a view (N, G, C/G)
    of a (N, C, 1) tensor has in the place of (G, C/G): (G, -1) or (-1, C/G). Mean and (biased) variance are those of a
    sample and group, in float32. `dtype` is that of x, or None (see `widen`).
    """
    x = plain(F, x)
    wide = F.reshape(widen(F, x, dtype), (0, 0, -1))
    ones = _row_of_ones(F, wide)
    weights = F.softmax(ones, axis=-1)  # 1/L each
    view = (0,) + groups

    def group_mean(pixels):
        channel_means = F.reshape(F.dot(pixels, weights, transpose_b=True), view)
        return channel_means if groups == (-1, 1) else F.mean(channel_means, axis=2, keepdims=True)

    # Centred twice: the float32 mean of values around 1e3 is off by 3e-5. What is subtracted first may be any number
    # near the mean, so it needs no gradient; the rest of the mean is small and goes into the shift below.
    rough_mean = F.BlockGrad(group_mean(wide))
    channels = F.reshape(F.slice_axis(wide, axis=2, begin=0, end=1), view)
    centred = wide - _to_pixels(F, F.broadcast_like(rough_mean, channels), ones)
    mean = group_mean(centred)
    variance = group_mean(F.square(centred)) - F.square(mean)
    scale = F.broadcast_mul(F.rsqrt(variance + epsilon), F.reshape(gamma, (1,) + groups))
    shift = F.broadcast_sub(F.reshape(beta, (1,) + groups), F.broadcast_mul(mean, scale))
    y = centred * _to_pixels(F, scale, ones) + _to_pixels(F, shift, ones)
    return close(F, F.reshape_like(y, x), x, residual, activation, dtype)
