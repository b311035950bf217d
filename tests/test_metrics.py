"""Errors are counted exactly, ties, padding and numbers that are none included; weights that are none are found."""
import mxnet as mx
import numpy as np
import pytest

from gn_gluon import optim
from gn_gluon.checkpoint import check_finite
from gn_gluon.data.loader import Batch
from gn_gluon.errors import NaNLossError
from gn_gluon.loop import evaluate
from gn_gluon.metrics import Metrics


def test_counts_equal_a_sort_on_logits_with_many_ties():
    rng = np.random.default_rng(0)
    logits, labels = rng.integers(0, 4, (500, 20)).astype(np.float32), rng.integers(0, 20, 500)
    metrics = Metrics()
    for part in (slice(0, 7), slice(7, 500)):
        metrics.add(logits[part], labels[part])
    order = np.argsort(-logits, axis=1, kind='stable')
    assert metrics.num_samples == 500
    assert metrics.top1_wrong == (order[:, 0] != labels).sum()
    assert metrics.top5_wrong == 500 - (order[:, :5] == labels[:, None]).sum()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metrics.loss == pytest.approx(-np.log(probabilities[np.arange(500), labels]).mean())


def test_logits_that_are_all_equal_are_right_by_chance_only():
    metrics = Metrics()
    metrics.add(np.zeros((10, 10)), np.arange(10))
    assert (metrics.top1_error, metrics.top5_error) == (90.0, 50.0)


def test_a_logit_that_is_not_a_number_is_wrong():
    metrics = Metrics()
    metrics.add(np.full((2, 3), np.nan), np.array([0, 1]))
    assert np.isnan(metrics.loss) and metrics.top1_error == 100.0


def test_padding_is_not_counted():
    images = np.zeros((4, 3), np.float32)
    images[:, 0] = 1  # the network below answers 0; the padded rows carry a label it gets wrong
    batches = [Batch(images, np.array([0, 0, 0, 0]), 4), Batch(images, np.array([0, 1, 2, 2]), 2)]
    metrics = evaluate(lambda x: x, _cpu(), batches)
    assert (metrics.num_samples, metrics.top1_wrong) == (6, 1)


def _cpu():
    import mxnet as mx
    return [mx.cpu()]


@pytest.mark.parametrize('position', [0, 199, 200, 321])
def test_a_weight_that_is_not_finite_is_found_among_more_than_200(position):
    parameters = {}
    for index in range(322):
        parameters[str(index)] = parameter = mx.gluon.Parameter(str(index), shape=(2,))
        parameter.initialize()
    updater = optim.Updater({'0': parameters['0']}, optim.SGD())
    check_finite(parameters, updater, 'folder')
    parameters[str(position)].set_data(mx.nd.array([0, np.nan]))
    with pytest.raises(NaNLossError, match='not finite'):
        check_finite(parameters, updater, 'folder')
