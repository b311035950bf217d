"""The norm layers of the paper, as HybridBlocks of one contract.

Each takes (N, C, ...) of 2 to 5 dimensions and gives the same shape and type. `layer(x)` is activation(norm(x)),
`layer(x, residual)` is activation(norm(x) + residual), one call so that a fast operator can do it in one pass. gamma
and beta have shape (C,) and stay float32 when a network is cast to less. Usable as GluonCV's `norm_layer`.
"""
import warnings

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock

from gn_gluon.errors import UserError
from gn_gluon.norm import composed, operator
from gn_gluon.precision import dtype_name, narrow

ACTIVATIONS = ('relu', 'sigmoid', 'softrelu', 'softsign', 'tanh')


def _symbol_shape(x):
    """The shape of the symbol x as far as the graph before it fixes it: (0, C, 0, 0), or () if not even C.

    A graph is traced before it sees data, so the convolutions before x are asked, with images of two sizes: what a
    Flatten makes of the pixels must not be taken for channels.
    """
    attributes = x.attr_dict()
    inputs = [name for name in x.list_inputs() if '__shape__' not in attributes.get(name, {})]
    for dimensions in (4, 2, 3, 5):
        try:
            one, other = (x.infer_shape_partial(**dict.fromkeys(inputs, (0, 0) + (size,) * (dimensions - 2)))[1][0]
                          for size in (512, 640))
        except mx.MXNetError:  # a graph of other dimensions
            continue
        if len(one) > 1 and one[1] == other[1] != 0:
            return (0, one[1]) + (0,) * (len(one) - 2)
    return ()


class _Norm(HybridBlock):
    """gamma and beta, and what all norms share: checks, casts, residual, activation, deferred shapes."""

    def __init__(self, epsilon, center, scale, beta_initializer, gamma_initializer, in_channels, activation, prefix,
                 params):
        super().__init__(prefix=prefix, params=params)
        if in_channels < 0:
            raise UserError(f'in_channels={in_channels} in {self._description}: give the number of channels, or 0 to '
                            'take it from the first input')
        if activation is not None and activation not in ACTIVATIONS:
            raise UserError(f'activation={activation!r} in {self._description}: give None or one of '
                            + ', '.join(ACTIVATIONS))
        self._epsilon = epsilon
        self._activation = activation
        self._cast_to = None  # what `cast` last asked for
        self._array_dtype = None  # the type of the arrays of the call that is under way
        self._traced_for = None
        if scale is not None:
            self.gamma = self._vector('gamma', in_channels, gamma_initializer, scale)
        self.beta = self._vector('beta', in_channels, beta_initializer, center)

    def _vector(self, name, in_channels, initializer, trained=True):
        return self.params.get(name, shape=(in_channels,), init=initializer, allow_deferred_init=True,
                               grad_req='write' if trained else 'null', differentiable=trained)

    @property
    def _description(self):
        return f'{type(self).__name__} {self.name}'

    def __repr__(self):
        return (f'{type(self).__name__}({self._settings()}epsilon={self._epsilon}, in_channels={self.beta.shape[0]}, '
                f'activation={self._activation})')

    def _settings(self):
        return ''

    def _asks_shape(self):
        """Whether the checks below want the shape of a symbol, which takes time to find."""
        return not self.beta.shape[0]

    def _check_channels(self, channels):
        """Raises UserError if the layer cannot work on so many channels."""

    def _check_shape(self, shape):
        """Warns if an input of `shape` (0 where not known) leaves the layer nothing to do."""

    def cast(self, dtype):
        """Says that inputs come in `dtype`. Parameters become it too, unless it is narrower: they stay float32 then.

        A layer that was never cast takes inputs of every type, but float16 inside a hybridized parent only on a GPU.
        """
        self._cast_to = dtype_name(dtype)
        super().cast('float32' if narrow(dtype) else dtype)

    def forward(self, x, *residual):
        """activation(norm(x)), or activation(norm(x) + residual); x and residual (N, C, ...)."""
        symbolic = isinstance(x, mx.sym.Symbol)
        if symbolic:
            shape = _symbol_shape(x) if self._asks_shape() else ()
        else:
            shape = x.shape
        if len(shape) > 1:
            self._check_channels(shape[1])
            self._check_shape(shape)
            for parameter in self._reg_params.values():
                if not parameter.shape[0]:
                    parameter.shape = shape[1:2]
        if symbolic:
            return super().forward(x, *residual)
        self._array_dtype = dtype_name(x.dtype)
        signature = (self._array_dtype, len(residual))
        if signature != self._traced_for:
            self._clear_cached_op()
        self._traced_for = signature
        try:
            return super().forward(x, *residual)
        finally:
            self._array_dtype = None

    def before_activation(self, x, *residual):
        """norm(x), or norm(x) + residual: what `forward` gives before the activation, in a network not hybridized."""
        activation, self._activation = self._activation, None
        try:
            return self.forward(x, *residual)
        finally:
            self._activation = activation

    @property
    def _dtype(self):
        """The type of the input: None while a parent's graph is traced, which knows no types, if it was never cast."""
        return self._array_dtype or self._cast_to

    def _inferable(self, F, parameter, array, x):
        return array if parameter.shape[0] else composed.like_channels(F, array, x, self._dtype)


class GroupNorm(_Norm):
    """Group Normalization (Wu & He 2018, Sec. 3): y = gamma * (x - mean) / sqrt(variance + epsilon) + beta.

    Mean and biased variance are those of a sample and of C/G consecutive channels; samples do not see one another, and
    training and inference are the same.

    num_groups : G. channels_per_group : C/G. Give one of them; neither means 32 groups.
    epsilon : added to the variance, 1e-5 as in the authors' code.
    center, scale : whether beta and gamma are trained. beta_initializer, gamma_initializer : their first values.
    in_channels : C, or 0 to take it from the first input.
    activation : None, 'relu', 'sigmoid', 'softrelu', 'softsign' or 'tanh', after the norm and the residual.
    Input and output (N, C, ...); parameters gamma and beta (C,).

    Raises UserError if both group arguments are given or one is not positive, and, as soon as C is known, if it does
    not divide C. Warns once where a group is a single value, whose output is beta (inside a hybridized network, which
    is traced without the size of its images, only after dense layers).
    """

    def __init__(self, num_groups=None, channels_per_group=None, epsilon=1e-5, center=True, scale=True,
                 beta_initializer='zeros', gamma_initializer='ones', in_channels=0, activation=None, prefix=None,
                 params=None):
        super().__init__(epsilon, center, scale, beta_initializer, gamma_initializer, in_channels, activation, prefix,
                         params)
        if num_groups is not None and channels_per_group is not None:
            raise UserError(f'both num_groups={num_groups} and channels_per_group={channels_per_group} in '
                            f'{self._description}: give one of them')
        if channels_per_group is not None:
            self._argument, self._count = 'channels_per_group', channels_per_group
        else:
            self._argument, self._count = 'num_groups', 32 if num_groups is None else num_groups  # 32: Sec. 3.3
        if self._count < 1:
            raise UserError(f'{self._argument}={self._count} in {self._description}: give a positive number')
        self._warned = False
        self._check_channels(in_channels)

    def _settings(self):
        return f'{self._argument}={self._count}, '

    @property
    def num_groups(self):
        """G, whichever argument gave it; None until C is known."""
        channels = self.beta.shape[0]
        return channels // self._group_channels(channels) if channels else None

    def _group_channels(self, channels):
        return self._count if self._argument == 'channels_per_group' else channels // self._count

    def _asks_shape(self):
        return super()._asks_shape() or self._group_channels(self.beta.shape[0]) == 1

    def _check_channels(self, channels):
        if channels % self._count:
            raise UserError(f'{self._argument}={self._count} does not divide the {channels} channels of '
                            f'{self._description}: give a number that divides {channels}')

    def _check_shape(self, shape):
        if self._group_channels(shape[1]) * np.prod(shape[2:]) == 1 and not self._warned:
            self._warned = True
            warnings.warn(f'{self._description}: every group of an input of shape {shape} is a single value, so the '
                          'output is beta', stacklevel=4)

    def hybrid_forward(self, F, x, residual=None, gamma=None, beta=None):
        if operator.takes(self._dtype):
            relu = self._activation == 'relu'
            y = operator.group_norm(F, x, gamma, beta, residual, (self._argument, self._count), self._epsilon, relu)
            return y if relu else composed.finish(F, y, None, self._activation)
        gamma = self._inferable(F, self.gamma, gamma, x)
        beta = self._inferable(F, self.beta, beta, x)
        groups = (self._count, -1) if self._argument == 'num_groups' else (-1, self._count)
        return composed.group_norm(F, x, gamma, beta, residual, groups, self._epsilon, self._activation, self._dtype)


class LayerNorm(GroupNorm):
    """Layer Normalization (Ba et al. 2016) as the paper has it (Sec. 3.1): GroupNorm of one group.

    Statistics over (C, H, W) of a sample, gamma and beta (C,). (gluon.nn.LayerNorm normalises one axis.) Arguments,
    shapes and errors as GroupNorm's.
    """

    def __init__(self, epsilon=1e-5, center=True, scale=True, beta_initializer='zeros', gamma_initializer='ones',
                 in_channels=0, activation=None, prefix=None, params=None):
        super().__init__(1, None, epsilon, center, scale, beta_initializer, gamma_initializer, in_channels, activation,
                         prefix, params)


class InstanceNorm(GroupNorm):
    """Instance Normalization (Ulyanov et al. 2016) as the paper has it (Sec. 3.1): GroupNorm of C groups.

    Statistics over (H, W) of a sample and channel, gamma and beta (C,). Arguments, shapes and errors as GroupNorm's.
    """

    def __init__(self, epsilon=1e-5, center=True, scale=True, beta_initializer='zeros', gamma_initializer='ones',
                 in_channels=0, activation=None, prefix=None, params=None):
        super().__init__(None, 1, epsilon, center, scale, beta_initializer, gamma_initializer, in_channels, activation,
                         prefix, params)


class BatchNorm(_Norm):
    """Batch Normalization (Ioffe & Szegedy 2015) as the paper has it: over (N, H, W) of the replica's own images.

    momentum : share of the old running statistics that a training step keeps, 0.9 as in the paper's code.
    Other arguments as GroupNorm's. Parameters gamma, beta and, not trained, running_mean and running_var, all (C,).

    Training normalises by the batch, inference by the running statistics, whose variance is MXNet's: biased (1/m). On
    the CPU MXNet updates them in the backward pass.
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, center=True, scale=True, beta_initializer='zeros',
                 gamma_initializer='ones', in_channels=0, activation=None, prefix=None, params=None):
        super().__init__(epsilon, center, scale, beta_initializer, gamma_initializer, in_channels, activation, prefix,
                         params)
        if not 0 <= momentum <= 1:
            raise UserError(f'momentum={momentum} in {self._description}: give a number from 0 to 1')
        self._momentum = momentum
        self.running_mean = self._vector('running_mean', in_channels, 'zeros', trained=False)
        self.running_var = self._vector('running_var', in_channels, 'ones', trained=False)

    def _settings(self):
        return f'momentum={self._momentum}, '

    def training_statistics(self, mean, variance, running_mean, running_var):
        """The (mean, variance) that a training step normalises by, given its batch's moments and the running ones."""
        return mean, variance

    def hybrid_forward(self, F, x, residual=None, gamma=None, beta=None, running_mean=None, running_var=None):
        y = F.BatchNorm(x, gamma, beta, running_mean, running_var, eps=self._epsilon, momentum=self._momentum,
                        fix_gamma=False)
        return composed.finish(F, y, residual, self._activation)


class BatchRenorm(BatchNorm):
    """Batch Renormalization (Ioffe 2017): in training x_hat * r + d, with x_hat as BatchNorm's.

    r = sigma_batch / sigma and d = (mean_batch - mean) / sigma, sigma and mean the running statistics, clipped to
    [1/r_max, r_max] and [-d_max, d_max] and without gradient. Inference is BatchNorm's.

    r_max, d_max : 1.5 and 0.5, as Wu & He, Sec. 4.1 ("Comparison with Batch Renorm"). Other arguments, parameters and
    the update of the running statistics as BatchNorm's.
    """

    def __init__(self, r_max=1.5, d_max=0.5, momentum=0.9, epsilon=1e-5, center=True, scale=True,
                 beta_initializer='zeros', gamma_initializer='ones', in_channels=0, activation=None, prefix=None,
                 params=None):
        super().__init__(momentum, epsilon, center, scale, beta_initializer, gamma_initializer, in_channels, activation,
                         prefix, params)
        if r_max < 1 or d_max < 0:
            raise UserError(f'r_max={r_max}, d_max={d_max} in {self._description}: give r_max of at least 1 and d_max '
                            'of at least 0')
        self._r_max = r_max
        self._d_max = d_max

    def _settings(self):
        return f'r_max={self._r_max}, d_max={self._d_max}, ' + super()._settings()

    def training_statistics(self, mean, variance, running_mean, running_var):
        """As BatchNorm's, with r and d: x_hat * r + d = (x - (mean - d * s)) / s, where s = deviation / r."""
        old_deviation = (running_var + self._epsilon).sqrt()
        d = ((mean - running_mean) / old_deviation).clip(-self._d_max, self._d_max)
        s = (variance + self._epsilon).sqrt()
        s = s / (s / old_deviation).clip(1 / self._r_max, self._r_max)
        return mean - d * s, s.square() - self._epsilon

    def hybrid_forward(self, F, x, residual=None, gamma=None, beta=None, running_mean=None, running_var=None):
        gamma = self._inferable(F, self.gamma, gamma, x)
        beta = self._inferable(F, self.beta, beta, x)
        return composed.batch_renorm(F, x, gamma, beta, running_mean, running_var, residual, self._r_max, self._d_max,
                                     self._momentum, self._epsilon, self._activation, self._dtype)


class NoNorm(_Norm):
    """No normalisation, for the networks without norm (VGG-16 of Sec. 4.1): activation(x + beta [+ residual]).

    beta (C,) is the bias of the convolution before it, which networks here leave to the norm; there is no gamma.
    `gamma_initializer='zeros'` hence does not silence a residual branch; `epsilon`, `scale` and `gamma_initializer` are
    there so that NoNorm can stand wherever another norm does. Other arguments and shapes as GroupNorm's.
    """

    def __init__(self, epsilon=1e-5, center=True, scale=True, beta_initializer='zeros', gamma_initializer='ones',
                 in_channels=0, activation=None, prefix=None, params=None):
        super().__init__(epsilon, center, None, beta_initializer, gamma_initializer, in_channels, activation, prefix,
                         params)

    def hybrid_forward(self, F, x, residual=None, beta=None):
        beta = self._inferable(F, self.beta, beta, x)
        return composed.bias(F, x, beta, residual, self._activation, self._dtype)
