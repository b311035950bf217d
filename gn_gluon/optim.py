"""The learning-rate rule and its schedules, which tensors decay, and the update of the weights."""
import math

import mxnet as mx
from mxnet import gluon
from mxnet.contrib.amp.loss_scaler import LossScaler

from gn_gluon.distributed import ALONE
from gn_gluon.errors import UserError
from gn_gluon.norm import operator

__all__ = ['SGD', 'Adam', 'StepSchedule', 'CosineSchedule']


def learning_rate(learning_rate, base_learning_rate, reference_batch, batch_size):
    """The rate at the start: `learning_rate` as it is, or `base_learning_rate` * batch_size / `reference_batch`.

    The linear rule of Section 4.1 (0.1 * b / 32 with 8 GPUs is 0.1 * 8b / 256); `batch_size` is the number of images
    per update. Raises UserError unless exactly one of the two ways is given.
    """
    linear = base_learning_rate is not None and reference_batch is not None
    if (base_learning_rate is None) != (reference_batch is None):
        raise UserError(f'train.base_learning_rate = {base_learning_rate} and train.reference_batch = '
                        f'{reference_batch} belong together: give both or '
                        'neither')
    if linear == (learning_rate is not None):
        raise UserError('the learning rate is given {}: bind either train.learning_rate, or train.base_learning_rate '
                        'and train.reference_batch'.format('twice' if linear else 'nowhere'))
    for name, value in (('learning_rate', learning_rate), ('base_learning_rate', base_learning_rate),
                        ('reference_batch', reference_batch)):
        if value is not None and not value > 0:
            raise UserError(f'train.{name} = {value} must be above 0')
    return base_learning_rate * batch_size / reference_batch if linear else learning_rate


class Schedule:
    """What fraction of the full rate is used when; subclasses define `factor`.

    Arguments:
        warmup_epochs: over so many epochs the rate rises linearly, update by update, to its full value.
        warmup_factor: the fraction of the full rate from which it rises.
    """

    def __init__(self, warmup_epochs=0, warmup_factor=0.1):
        if warmup_epochs < 0 or not 0 < warmup_factor <= 1:
            raise UserError(f'{type(self).__name__}.warmup_epochs = {warmup_epochs} and warmup_factor = '
                            f'{warmup_factor}: at least 0 epochs, and a factor above 0 and at most 1, are expected')
        self.warmup_epochs = warmup_epochs
        self.warmup_factor = warmup_factor

    def __call__(self, epoch, num_epochs):
        """The fraction of the full rate when `epoch` epochs (a float) of `num_epochs` are done."""
        warmup = 1.0
        if epoch < self.warmup_epochs:
            warmup = self.warmup_factor + (1 - self.warmup_factor) * epoch / self.warmup_epochs
        return warmup * self.factor(epoch, num_epochs)


class StepSchedule(Schedule):
    """The rate is multiplied at given epochs: Section 4.1 divides it by 10 at epochs 30, 60 and 90.

    Arguments:
        epochs: ascending epochs, each the number of epochs that are done when the change happens.
        factor: what the rate is multiplied by, one number for all or a tuple with one for each epoch.
        warmup_epochs, warmup_factor: as of Schedule.
    """

    def __init__(self, epochs=(30, 60, 90), factor=0.1, warmup_epochs=0, warmup_factor=0.1):
        super().__init__(warmup_epochs, warmup_factor)
        factors = tuple(factor) if isinstance(factor, (tuple, list)) else (factor,) * len(epochs)
        if len(factors) != len(epochs) or list(epochs) != sorted(set(epochs)) or min(factors, default=1) <= 0:
            raise UserError(f'StepSchedule.epochs = {epochs} must ascend, with one positive factor (or one for each '
                            f'epoch), not {factor}')
        self.changes = list(zip(epochs, factors))

    def factor(self, epoch, num_epochs):
        """The product of the factors so far."""
        return math.prod(factor for start, factor in self.changes if epoch >= start)


class CosineSchedule(Schedule):
    """The rate falls along half a cosine to `final_factor` of itself (Loshchilov & Hutter 2017), update by update.

    Arguments:
        final_factor: the fraction left at the end of training.
        warmup_epochs, warmup_factor: as of Schedule.
    """

    def __init__(self, final_factor=0.0, warmup_epochs=0, warmup_factor=0.1):
        super().__init__(warmup_epochs, warmup_factor)
        if not 0 <= final_factor <= 1:
            raise UserError(f'CosineSchedule.final_factor = {final_factor} is not between 0 and 1')
        self.final_factor = final_factor

    def factor(self, epoch, num_epochs):
        """Half a cosine from 1 to `final_factor`."""
        cosine = (1 + math.cos(math.pi * epoch / num_epochs)) / 2
        return self.final_factor + (1 - self.final_factor) * cosine


class Optimizer:
    """What makes an MXNet optimizer."""

    #: MXNet's SGD and NAG keep the rate inside the velocity: when the rate changes, it has to follow (see Updater).
    velocity_holds_rate = False

    def create(self, **kwargs):
        """The MXNet optimizer; `kwargs` are those of mx.optimizer.Optimizer."""
        raise TypeError(f'{type(self).__name__} must define create()')


class SGD(Optimizer):
    """Stochastic gradient descent with (Nesterov) momentum: v = momentum * v + g; w -= rate * (g + momentum * v).

    Arguments:
        momentum: 0.9 in Section 4.1.
        nesterov: look ahead as written above; False: w -= rate * v.
    """

    velocity_holds_rate = True

    def __init__(self, momentum=0.9, nesterov=True):
        if not 0 <= momentum < 1:
            raise UserError(f'SGD.momentum = {momentum} is not in [0, 1)')
        self.momentum = momentum
        self.nesterov = nesterov

    def create(self, **kwargs):
        optimizer = _NAG if self.nesterov and self.momentum else mx.optimizer.SGD
        return optimizer(momentum=self.momentum, **kwargs)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015), weight decay added to the gradient. Arguments: as in the paper."""

    def __init__(self, beta1=0.9, beta2=0.999, epsilon=1e-8):
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon > 0):
            raise UserError(f'Adam.beta1 = {beta1}, beta2 = {beta2}, epsilon = {epsilon}: the betas must be in [0, '
                            '1), epsilon above '
                            '0')
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def create(self, **kwargs):
        return mx.optimizer.Adam(beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon, **kwargs)


class _NAG(mx.optimizer.NAG):
    """NAG that decays the velocity by the old weight; in place, MXNet's operator takes the new one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if operator.updates_fast():
            self.aggregate_num = 64  # arrays that come at once

    def update_multi_precision(self, index, weight, grad, state):
        if not isinstance(index, (list, tuple)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        self._update_count(index)
        rates, decays = self._get_lrs(index), self._get_wds(index)
        if operator.updates_fast() and weight[0].context.device_type == 'cpu':
            operator.nesterov_update(weight, grad, state, rates, decays, self.momentum, self.rescale_grad)
            return
        for one, gradient, velocity, rate, decay in zip(weight, grad, state, rates, decays):
            mx.nd.nag_mom_update(one, gradient, velocity, lr=rate, wd=decay, momentum=self.momentum,
                                 rescale_grad=self.rescale_grad).copyto(one)


def split_by_decay(parameters, decay_gamma_beta):
    """Names of the trainable parameters that decay, and of those that do not.

    Section 4.1 decays everything, gamma and beta included; Section 4.2 (fine-tuning) leaves out gamma and beta.

    Arguments:
        parameters: dict from name to Parameter.
        decay_gamma_beta: whether gamma and beta of the norms decay.
    """
    trainable = [name for name, parameter in parameters.items() if parameter.grad_req != 'null']
    spared = [] if decay_gamma_beta else [name for name in trainable if name.endswith(('.gamma', '.beta'))]
    return [name for name in trainable if name not in spared], spared


class Updater:
    """Sums the gradients over devices and updates the weights.

    Arguments:
        parameters: dict from name to initialized Parameter; the names are those of the saved states.
        optimizer: SGD or Adam.
        weight_decay: for the tensors that decay (`split_by_decay`).
        gradient_clip_norm: largest Euclidean norm of the mean gradient over all tensors; None: no clipping.
        kvstore: the MXNet kvstore between the devices of this process.
        scale_loss: whether the loss is to be multiplied by `loss_scale` before its gradients are computed, so that
            float16 does not lose the small ones. The scale grows while they are finite; an update of infinite ones is
            left out, and halves it (MXNet's LossScaler).
        ranks: distributed.Ranks, over which the gradients are summed, too.
    """

    def __init__(self, parameters, optimizer, weight_decay=0.0, decay_gamma_beta=True, gradient_clip_norm=None,
                 kvstore='device', scale_loss=False, ranks=ALONE):
        self.optimizer = optimizer.create(learning_rate=1.0, wd=weight_decay)
        self.velocity_holds_rate = optimizer.velocity_holds_rate
        self.gradient_clip_norm = gradient_clip_norm
        self.num_updates = 0
        decaying, spared = split_by_decay(parameters, decay_gamma_beta)
        for name in spared:
            parameters[name].wd_mult = 0.0
        self.names = sorted(decaying + spared)
        self.trainer = gluon.Trainer([parameters[name] for name in self.names], self.optimizer, kvstore=kvstore,
                                     update_on_kvstore=False)
        self.ranks = ranks
        self._rate = None
        self._scaler = LossScaler() if scale_loss else None

    @property
    def loss_scale(self):
        """What the gradients of the next update are to be multiplied by."""
        return self._scaler.loss_scale if self._scaler else 1.0

    def update(self, learning_rate, batch_size):
        """One update by the mean gradient.

        The gradients hold sums over `batch_size` images, all devices together, times `loss_scale`.
        """
        self.trainer.allreduce_grads()
        if self.ranks.size > 1:
            self._sum_over_ranks()
        batch_size = batch_size * self.loss_scale
        if self._scaler and self._scaler.has_overflow(self.trainer._params):
            self.num_updates += 1
            return
        if self.gradient_clip_norm is not None:
            self._clip(batch_size)
        self._change_rate(learning_rate)
        self.trainer.update(batch_size)
        self.num_updates += 1

    def _sum_over_ranks(self):
        # Every device holds the sum over the devices of this process.
        gradients = [parameter.list_grad() for parameter in self.trainer._params]
        self.ranks.sum({name: of_devices[0] for name, of_devices in zip(self.names, gradients)})
        for first, *others in gradients:
            for other in others:
                first.copyto(other)

    def _clip(self, batch_size):
        for gradients in zip(*(parameter.list_grad() for parameter in self.trainer._params)):
            gluon.utils.clip_global_norm(list(gradients), self.gradient_clip_norm * batch_size, check_isfinite=False)

    def _change_rate(self, learning_rate):
        if self._rate not in (None, learning_rate) and self.velocity_holds_rate:
            for state in self._state_arrays():
                state *= learning_rate / self._rate
        self._rate = learning_rate
        self.trainer.set_learning_rate(learning_rate)

    def _state_arrays(self):
        for updater in self.trainer._updaters:
            for state in updater.states.values():
                if state is not None:
                    yield from state if isinstance(state, (tuple, list)) else (state,)

    def state_dict(self):
        """What a resume needs: arrays by 'i:name' (i = 0, or 0 and 1 for Adam's moments), and numbers."""
        arrays = {}
        for index, state in self.trainer._updaters[0].states.items():
            for i, array in enumerate(state if isinstance(state, (tuple, list)) else (state,)):
                if array is not None:
                    arrays[f'{i}:{self.names[index]}'] = array
        scalars = {'learning_rate': self._rate, 'num_updates': self.num_updates}
        if self._scaler:
            scalars['loss_scaler'] = vars(self._scaler)
        return arrays, scalars

    def load_state_dict(self, arrays, scalars):
        """Take up what `state_dict` returned."""
        self._rate = scalars['learning_rate']
        if self._scaler:
            vars(self._scaler).update(scalars['loss_scaler'])
        self.num_updates = self.optimizer.begin_num_update = self.optimizer.num_update = scalars['num_updates']
        for updater, context in zip(self.trainer._updaters, self.trainer._contexts):
            for index, name in enumerate(self.names):
                keys = sorted(key for key in arrays if key.split(':', 1)[1] == name)
                state = tuple(arrays[key].copyto(context) for key in keys)
                if state:
                    updater.states[index] = state if len(state) > 1 else state[0]
                    updater.states_synced[index] = True
