"""The learning-rate rule, the schedules, who decays, and updates against the published formulas in float64."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from gn_gluon import optim
from gn_gluon.errors import UserError


def make_parameters(values):
    parameters = {}
    for name, value in values.items():
        parameter = gluon.Parameter(name, shape=value.shape)
        parameter.initialize(init=mx.init.Constant(mx.nd.array(value)))
        parameters[name] = parameter
    return parameters


def set_gradient(parameter, gradient):
    with autograd.record():
        loss = (parameter.data() * mx.nd.array(gradient)).sum()
    loss.backward()


@pytest.mark.parametrize('nesterov', [True, False])
def test_velocity_follows_the_rate_as_in_pytorch_over_a_warmup_and_two_drops(nesterov):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3))
    parameters = make_parameters({'a.weight': weight})
    updater = optim.Updater(parameters, optim.SGD(0.9, nesterov), weight_decay=1e-2)
    velocity = 0
    for step in range(20):
        rate = 0.2 * (step + 1) / 4 if step < 4 else 0.2 if step < 9 else 0.02 if step < 15 else 0.002
        gradient = rng.normal(size=(4, 3))
        set_gradient(parameters['a.weight'], 8 * gradient)
        updater.update(rate, 8)
        # torch.optim.SGD: the rate multiplies the velocity, it does not enter it.
        decayed = gradient + 1e-2 * weight
        velocity = 0.9 * velocity + decayed
        weight = weight - rate * (decayed + 0.9 * velocity if nesterov else velocity)
        np.testing.assert_allclose(parameters['a.weight'].data().asnumpy(), weight, atol=1e-6)


def test_adam_continues_its_bias_correction_after_a_resume():
    rng = np.random.default_rng(1)
    start, gradients = rng.normal(size=5), rng.normal(size=(6, 5))
    moment, square, weight = 0, 0, start
    parameters = make_parameters({'a.weight': start})
    updater = optim.Updater(parameters, optim.Adam())
    for step, gradient in enumerate(gradients):
        if step == 3:
            arrays, scalars = updater.state_dict()
            parameters = make_parameters({'a.weight': parameters['a.weight'].data().asnumpy()})
            updater = optim.Updater(parameters, optim.Adam())
            updater.load_state_dict(arrays, scalars)
        set_gradient(parameters['a.weight'], gradient)
        updater.update(0.01, 1)
        moment, square = 0.9 * moment + 0.1 * gradient, 0.999 * square + 0.001 * gradient ** 2
        rate = 0.01 * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        weight = weight - rate * moment / (np.sqrt(square) + 1e-8)
    np.testing.assert_allclose(parameters['a.weight'].data().asnumpy(), weight, atol=1e-6)


def test_clipping_bounds_the_norm_of_the_mean_gradient_over_all_tensors():
    parameters = make_parameters({'a.weight': np.zeros(2), 'b.weight': np.zeros(2)})
    updater = optim.Updater(parameters, optim.SGD(0.0, False), gradient_clip_norm=1.0)
    set_gradient(parameters['a.weight'], [30, 0])
    set_gradient(parameters['b.weight'], [0, 40])
    updater.update(1.0, 10)  # the mean gradient is (3, 0), (0, 4): norm 5
    np.testing.assert_allclose(parameters['a.weight'].data().asnumpy(), [-0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(parameters['b.weight'].data().asnumpy(), [0, -0.8], rtol=1e-5)


@pytest.mark.parametrize('decay_gamma_beta', [True, False])
def test_gamma_and_beta_decay_as_section_4_1_says_or_not_at_all(decay_gamma_beta):
    ones = np.ones(3)
    parameters = make_parameters({'conv.weight': ones, 'norm.gamma': ones, 'norm.beta': ones})
    updater = optim.Updater(parameters, optim.SGD(0.0, False), 0.1, decay_gamma_beta)
    for parameter in parameters.values():
        set_gradient(parameter, np.zeros(3))
    updater.update(1.0, 1)
    after = {name: parameter.data().asnumpy()[0] for name, parameter in parameters.items()}
    spared = 0.9 if decay_gamma_beta else 1.0
    assert after == pytest.approx({'conv.weight': 0.9, 'norm.gamma': spared, 'norm.beta': spared})


def test_linear_rule_gives_the_rates_of_section_4_1():
    rates = [optim.learning_rate(None, 0.1, 256, 8 * b) for b in (32, 16, 8, 4, 2)]
    assert rates == pytest.approx([0.1, 0.05, 0.025, 0.0125, 0.00625])


@pytest.mark.parametrize('given', [(0.1, 0.1, 256), (None, None, None), (None, 0.1, None), (0.0, None, None)])
def test_a_rate_given_twice_nowhere_half_or_zero_is_refused(given):
    with pytest.raises(UserError, match='train.learning_rate|train.base_learning_rate'):
        optim.learning_rate(*given, batch_size=32)


def test_step_schedule_divides_by_ten_at_30_60_90():
    schedule = optim.StepSchedule()
    factors = [schedule(epoch, 100) for epoch in (0, 29.999, 30, 59, 60, 89, 90, 99)]
    assert factors == pytest.approx([1, 1, .1, .1, .01, .01, .001, .001])


def test_published_cifar_schedule_can_be_written():
    schedule = optim.StepSchedule(epochs=(1, 82, 123, 300), factor=(10, 0.1, 0.1, 0.2))
    rates = [0.01 * schedule(epoch, 400) for epoch in (0, 0.99, 1, 81, 82, 122, 123, 299, 300, 399)]
    assert rates == pytest.approx([.01, .01, .1, .1, .01, .01, .001, .001, .0002, .0002])


def test_cosine_schedule_warms_up_and_ends_at_its_final_factor():
    schedule = optim.CosineSchedule(final_factor=0.01, warmup_epochs=5, warmup_factor=0.1)
    assert schedule(0, 100) == pytest.approx(0.1)
    assert schedule(50, 100) == pytest.approx(0.505)
    assert schedule(100, 100) == pytest.approx(0.01)
    rates = [schedule(epoch / 10, 100) for epoch in range(50)]
    assert rates == sorted(rates)


def test_a_scaled_loss_changes_no_update_and_an_overflow_is_left_out():
    def run(scale_loss):
        parameters = make_parameters({'w': np.ones(3)})
        parameter = parameters['w']
        updater = optim.Updater(parameters, optim.SGD(), weight_decay=1e-2, gradient_clip_norm=1.0,
                                scale_loss=scale_loss)
        weights = []
        for step in range(6):
            scale = updater.loss_scale
            gradient = scale * (step + 1.0) * 8  # a sum over 8 images
            if not scale_loss and step == 3:
                continue
            set_gradient(parameter, np.full(3, np.inf if step == 3 else gradient))
            updater.update(0.1, 8)
            weights.append(parameter.data().asnumpy())
        return updater, weights

    plain, wanted = run(scale_loss=False)
    scaled, got = run(scale_loss=True)
    assert plain.loss_scale == 1
    np.testing.assert_array_equal(got[3], got[2])  # the infinite one
    np.testing.assert_allclose(got[:3] + got[4:], wanted, rtol=1e-6)
    assert scaled.loss_scale == 2 ** 15 and scaled.num_updates == 6

    resumed = optim.Updater(make_parameters({'w': np.ones(3)}), optim.SGD(), scale_loss=True)
    resumed.load_state_dict(*scaled.state_dict())
    assert resumed.loss_scale == 2 ** 15


def test_an_update_after_inference_reaches_weights_that_lie_in_onednns_layout():
    def run(infer):
        mx.random.seed(0)
        net = gluon.nn.Conv2D(32, 3, in_channels=32)
        net.initialize()
        net.hybridize(static_alloc=True, static_shape=True)
        updater = optim.Updater(net._collect_params_with_prefix(), optim.SGD(), weight_decay=1e-2)
        images = mx.nd.array(np.random.RandomState(0).normal(size=(2, 32, 8, 8)))
        for _ in range(3):
            if infer:
                net(images).wait_to_read()
            with autograd.record():
                loss = (net(images) ** 2).mean()
            loss.backward()
            updater.update(0.5, 1)
        return net.weight.data().asnumpy()

    np.testing.assert_array_equal(run(infer=True), run(infer=False))
