"""The pictures of an evaluation: what is drawn is what was found."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from lpl.evaluation.figures import (
    FRAME,
    busiest_square,
    crop_side,
    metric_curves,
    paired_grid,
    spectrum_figure,
    zoomed_crops,
)
from lpl.evaluation.figures import _with_crop as with_crop


FREQUENCIES = np.linspace(0.1, 0.5, 5)


def photo(side, name="astronaut"):
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((side, side))


def lines(axes):
    """The curves of a panel by their label."""
    return {line.get_label(): line for line in axes.lines}


def contains(picture, part):
    """Whether a picture holds another one, pixel for pixel."""
    picture, part = np.asarray(picture), np.asarray(part)
    height, width = part.shape[:2]
    return any(
        np.array_equal(picture[top : top + height, left : left + width], part)
        for top in range(picture.shape[0] - height + 1)
        for left in np.flatnonzero((picture[top] == part[0, 0]).all(-1))
    )


# Spectra


def test_spectra_and_their_differences_to_the_real_images():
    spectra = {"with": (FREQUENCIES, -FREQUENCIES), "real": (FREQUENCIES, -2 * FREQUENCIES)}
    power, difference = spectrum_figure(spectra, "real").axes
    assert set(lines(power)) == {"with", "real"}
    assert np.allclose(lines(power)["with"].get_ydata(), -FREQUENCIES)
    assert np.allclose(difference.lines[0].get_ydata(), FREQUENCIES)  # more than the real images have
    assert difference.lines[0].get_color() == lines(power)["with"].get_color() != lines(power)["real"].get_color()


def test_many_spectra_have_a_line_each():
    spectra = {str(number): (FREQUENCIES, number + FREQUENCIES) for number in range(12)}
    power, difference = spectrum_figure(spectra, "0").axes
    assert len(lines(power)) == 12 and len(difference.lines) == 12  # without the reference, and the line at 0


def test_spectra_that_cannot_be_compared_are_refused():
    spectra = {"with": (FREQUENCIES, FREQUENCIES), "real": (FREQUENCIES / 2, FREQUENCIES)}
    with pytest.raises(ValueError, match="one size"):
        spectrum_figure(spectra, "real")
    with pytest.raises(ValueError, match="'photos' is none of the spectra: with, real"):
        spectrum_figure(spectra, "photos")


# Samples


def test_pairs_need_an_image_in_each_cell():
    image = photo(32)
    grid = paired_grid({"before": [image, image], "after": [image, image]}, ["a", "b"])
    assert grid.width > 2 * 128 and grid.height > 2 * 128
    with pytest.raises(ValueError, match="2 captions"):
        paired_grid({"before": [image, image], "after": [image]}, ["a", "b"])


@pytest.mark.parametrize("side", [7, 8])
def test_the_busiest_square_is_that_of_the_largest_gradients(side):
    image = Image.fromarray(np.random.default_rng(side).integers(0, 256, (29, 41), np.uint8))
    down, across = np.gradient(np.asarray(image, float))
    energy = down**2 + across**2
    sums = {
        (left, top): energy[top : top + side, left : left + side].sum()
        for left in range(41 - side + 1)
        for top in range(29 - side + 1)
    }
    assert busiest_square(image, side) == max(sums, key=sums.get)


def test_a_patch_of_noise_is_found_at_the_very_edge():
    pixels = np.full((64, 64, 3), 90, np.uint8)
    pixels[48:, :16] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    left, top = busiest_square(Image.fromarray(pixels), 16)
    assert left <= 1 and top >= 47


@pytest.mark.parametrize("side", [32, 100, 256, 512, 1100])
def test_crops_are_enlarged_by_a_whole_number_into_sharp_squares(side):
    image = photo(side)
    corner, small = busiest_square(image, crop_side(image)), crop_side(image)
    both = with_crop(image, corner)
    assert 128 <= both.height <= 512
    shown = round(side * max(1, -(-192 // side)) * min(1.0, 512 / side))
    enlarged = np.asarray(both)[: both.height, shown + 4 :]
    zoom = enlarged.shape[1] // small
    assert zoom >= 2 and enlarged.shape[1] == zoom * small
    source = np.asarray(image.crop((*corner, corner[0] + small, corner[1] + small)))
    assert np.array_equal(enlarged[: zoom * small], source.repeat(zoom, 0).repeat(zoom, 1))
    frame = tuple(int(FRAME[place : place + 2], 16) for place in (1, 3, 5))
    assert (np.asarray(both)[:, :shown] == frame).all(-1).any()


def test_all_rows_show_the_place_that_the_first_row_chooses():
    first, second = photo(64), photo(64, "chelsea")
    corner = busiest_square(first, crop_side(first))
    assert corner != busiest_square(second, crop_side(second))
    assert contains(zoomed_crops({"a": [first], "b": [second]}, [""]), with_crop(second, corner))


def test_a_row_apart_shows_its_own_place():
    """Real pictures are of other things: what is enlarged in the drawn ones says nothing about them."""
    first, second = photo(64), photo(64, "chelsea")
    corner, own = (busiest_square(image, crop_side(image)) for image in (first, second))
    picture = zoomed_crops({"a": [first], "b": [second], "real": [second]}, [""], apart="real")
    assert contains(picture, with_crop(first, corner)) and contains(picture, with_crop(second, own))
    assert contains(picture, with_crop(second, corner))
    assert not contains(zoomed_crops({"a": [first], "b": [second]}, [""]), with_crop(second, own))


def test_crops_of_unequal_images_are_refused():
    with pytest.raises(ValueError, match=r"b: image 0 has \(48, 48\) pixels, the one above it \(64, 64\)"):
        zoomed_crops({"a": [photo(64)], "b": [photo(48)]}, [""])
    with pytest.raises(ValueError, match="2 captions"):
        zoomed_crops({"a": [photo(64)]}, ["", ""])


# Metrics over the training

SERIES = [
    {"label": "run", "step": 20, "metrics": {"fid": {"value": 3.0, "spread": 1.0}, "energy": 0.2}},
    {"label": "run", "step": 10, "metrics": {"fid": {"value": 5.0, "spread": 0.5}, "energy": 0.1}},
    {"label": "base", "step": None, "metrics": {"fid": {"value": 7.0, "spread": None}}},
    {"label": "real", "step": None, "metrics": {"energy": 0.3}},
]


def test_a_line_over_the_steps_and_its_spread():
    fid, energy = metric_curves(SERIES, {"fid": "lower"}, "real").axes
    run = lines(fid)["run"]
    assert list(run.get_xdata()) == [10, 20] and list(run.get_ydata()) == [5.0, 3.0]
    vertices = fid.collections[0].get_paths()[0].vertices
    assert {(10.0, 4.5), (10.0, 5.5), (20.0, 2.0), (20.0, 4.0)} <= set(map(tuple, vertices))
    assert list(lines(fid)["base"].get_ydata()) == [7.0, 7.0] and lines(fid)["base"].get_linestyle() == "--"
    assert fid.get_title(loc="left") == "fid (lower is better)" and energy.get_title(loc="left") == "energy"
    assert set(lines(energy)) == {"run", "real"} and len(energy.collections) == 0


def test_the_spread_of_what_has_no_step_is_a_band_across():
    base = {"label": "base", "step": None, "metrics": {"fid": {"value": 7.0, "spread": 0.25}}}
    (axes,) = metric_curves([{"label": "run", "step": 10, "metrics": {"fid": 5.0}}, base]).axes
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == (6.75, 7.25) and len(axes.collections) == 0


def test_a_panel_has_its_0_unless_something_lies_below_it():
    fid, energy = metric_curves(SERIES, reference="real").axes
    assert fid.get_ylim()[0] == energy.get_ylim()[0] == 0 and fid.get_ylim()[1] > 7
    kid = [{"step": step, "metrics": {"kid": {"value": value, "spread": 0.3}}} for step, value in ((1, 0.2), (2, 0.5))]
    (axes,) = metric_curves(kid).axes
    assert axes.get_ylim()[0] <= -0.1  # 0.2 - 0.3 is in the picture
    below = [{"step": step, "metrics": {"kid": value}} for step, value in ((1, -0.2), (2, -0.5))]
    assert metric_curves(below).axes[0].get_ylim()[1] == 0


def test_all_lines_are_in_the_legend_with_their_colours():
    figure = metric_curves(SERIES, reference="real")
    (shown,) = figure.legends
    legend = {text.get_text(): line.get_color() for text, line in zip(shown.get_texts(), shown.get_lines())}
    drawn = {label: line.get_color() for axes in figure.axes for label, line in lines(axes).items()}
    assert legend == drawn and len(set(drawn.values())) == 3


def test_curves_need_a_step():
    with pytest.raises(ValueError, match="step"):
        metric_curves([SERIES[2]])
