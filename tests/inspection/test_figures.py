"""The pictures show the numbers that were measured."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny import tiny_vae

from lpl.inspection.advice import summary
from lpl.inspection.figures import (
    balance_figure,
    errors_figure,
    features_figure,
    interpolation_figure,
    outliers_figure,
    plain_numbers,
)
from lpl.inspection.measure import KINDS, METHODS, SCALES
from tests.inspection.test_measure import inspected, noise_image


@pytest.fixture(scope="module")
def inspector():
    return inspected(tiny_vae("sd"), images=[noise_image(seed=seed) for seed in (0, 1)])


@pytest.fixture(scope="module")
def numbers(inspector):
    return summary(inspector)


def test_features_are_of_the_image_that_loses_most(inspector):
    figure = features_figure(inspector, [noise_image(seed=seed) for seed in (0, 1)], ["first", "second"])
    lost = [sum(block["masked"].mean() for block in found["outliers"].values()) for found in inspector.found]
    assert len(figure.axes) == 7 * len(inspector.names)
    assert figure.axes[0].get_title() == ["first", "second"][int(np.argmax(lost))]
    assert [axes.get_ylabel() for axes in figure.axes[::7]] == list(inspector.names)


def test_outliers_of_every_block(inspector, numbers):
    figure = outliers_figure(inspector, numbers["outliers"])
    share, peak, margin, cost, *where = figure.axes
    names = list(numbers["outliers"]["blocks"])
    for axes in (share, peak, cost):
        assert [label.get_text() for label in axes.get_xticklabels()] == names
    masked = [100 * block["masked"] for block in numbers["outliers"]["blocks"].values()]
    (mean,) = [line for line in share.lines if line.get_label() == "mean"]
    assert mean.get_ydata().tolist() == masked
    assert [line.get_label() for line in margin.lines] == names
    assert {axes.get_title() for axes in where} >= set(names)


def test_balance_of_every_kind_of_depth_weights(numbers):
    figure = balance_figure(numbers["balance"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[0] for title in titles] == ["Uniform", "Inverse", "Exponential", "Balanced"]
    weights, terms = numbers["balance"]["depth_weights"]["inverse"], numbers["balance"]["terms"]
    for line, (name, values) in zip(figure.axes[1].lines, terms.items(), strict=True):
        assert line.get_ydata().tolist() == pytest.approx([weights[name] * value for value in values])


def test_interpolations_by_method_and_scale(inspector, numbers):
    figure = interpolation_figure(inspector, noise_image(), "first", numbers["interpolation"])
    pictures, curves = figure.axes[:-2], figure.axes[-2:]
    assert len(pictures) == 2 + len(METHODS) * len(SCALES)
    assert [axes.get_ylabel() for axes in pictures if axes.get_ylabel()] == list(METHODS)
    assert all(len(axes.lines) == 2 * len(METHODS) for axes in curves)


def test_errors_of_one_size_of_every_image(inspector):
    figure = errors_figure(inspector, ["first", "second"])
    assert [axes.get_title() for axes in figure.axes[: 1 + len(KINDS)]] == ["no error", *KINDS]
    below = [axes.get_xlabel() for axes in figure.axes]
    assert below[:: 1 + len(KINDS)] == ["first", "second"]
    for number, found in enumerate(inspector.found):
        start = number * (1 + len(KINDS)) + 1
        for words, point in zip(below[start : start + len(KINDS)], found["errors"].values(), strict=True):
            assert words == f"error in the latent {point['latent_mse']:.2g}\nLPL {point['lpl']:.2f}"


@pytest.mark.parametrize("values, labels", [((1, 30), {"1", "2", "5", "10", "20"}), ((1, 1e5), {"1", "10", "10000"})])
def test_logarithmic_axes_have_plain_numbers(values, labels):
    axes = Figure().add_subplot()
    axes.plot(values, values)
    axes.set_xscale("log")
    plain_numbers(axes)
    axes.figure.draw_without_rendering()
    shown = {label.get_text().replace("1e+05", "100000") for label in axes.get_xticklabels()}
    assert labels <= shown and "3" not in shown
