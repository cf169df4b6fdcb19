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


@pytest.mark.parametrize("foreach", [False, True])
def test_an_average_in_cpu_memory_has_the_same_numbers(sampling, foreach):
    parameters = sampling.trained.weights()
    averages = [MovingAverage(parameters, 0.9, foreach, offload) for offload in (False, True)]
    generator = torch.Generator().manual_seed(0)
    for step in range(15):
        with torch.no_grad():
            for parameter in parameters:
                parameter += torch.randn(parameter.shape, generator=generator)
        for average in averages:
            average.update(parameters, torch.tensor(float(step == 7)))
            average.wait()
    assert any(not torch.equal(*pair) for pair in zip(averages[0].shadow_params, parameters, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*(average.shadow_params for average in averages), strict=True))


def test_the_average_is_that_of_diffusers(updates):
    weights, made = updates()
    theirs = EMAModel(weights.weights(), decay=0.9)
    for _ in range(15):
        take(weights, made, [1.0])
        theirs.step(weights.weights())
    for ours, other in zip(made.average.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
