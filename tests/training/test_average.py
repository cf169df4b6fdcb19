"""The moving average is that of diffusers, and its weights are there only while they are asked for."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from trainer import same

from lpl.training.average import MovingAverage, averaged
from tests.training.test_updates import take


def test_averaged_weights_are_there_within_only(sampling):
    average = MovingAverage(sampling.trained.weights(), decay=0.9999)
    for parameter in average.shadow_params:
        parameter.zero_()
    before = {name: value.clone() for name, value in sampling.trained.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), averaged(average, sampling.trained):
        assert all((parameter == 0).all() for parameter in sampling.trained.parameters())
        raise KeyboardInterrupt
    assert same(before, sampling.trained.state_dict())


def test_without_an_average_the_weights_are_the_trained_ones(sampling):
    before = {name: value.clone() for name, value in sampling.trained.state_dict().items()}
    with averaged(None, sampling.trained):
        assert same(before, sampling.trained.state_dict())


def test_the_average_is_that_of_diffusers(updates):
    weights, made = updates()
    theirs = EMAModel(weights.weights(), decay=0.9)
    for _ in range(15):
        take(weights, made, [1.0])
        theirs.step(weights.weights())
    for ours, other in zip(made.average.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
