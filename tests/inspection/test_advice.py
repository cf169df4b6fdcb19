"""What the measurements suggest: which masks, and which depth weights."""

import numpy as np
import pytest
from tiny import tiny_vae

from lpl import LatentPerceptualLoss
from lpl.data.order import keyed_generator
from lpl.inspection.advice import interpolation_summary, outlier_advice, relative, report, summary
from lpl.inspection.measure import ERRORS, METHODS, perturbed, terms_of
from tests.inspection.test_measure import SETTINGS, inspected


def block(masked=0.001, change=-0.3, at_four=0.0005, at_eight=0.0001):
    return {
        "masked": masked,
        "masks_change": change,
        "masked_by_margin": {"1.0": 2 * masked, "2.0": masked, "4.0": at_four, "8.0": at_eight},
    }


@pytest.mark.parametrize(
    "blocks, flags, why",
    [
        ({"mid": block(), "up_0": block(0.002)}, "", "0.2% at most (up_0)"),
        ({"mid": block(0, change=0), "up_0": block(change=0.009)}, "--lpl_no_outlier_mask", "0.9% (up_0)"),
        ({"mid": block(), "up_0": block(0.05)}, "--lpl_outlier_margin 4", "more than 4% of up_0"),
        ({"mid": block(), "up_0": block(0.1, at_four=0.05)}, "--lpl_outlier_margin 8", "of up_0 is masked"),
        ({"mid": block(), "up_0": block(0.1, 1, 0.1, 0.1)}, "--lpl_blocks mid", "even at a margin of 8"),
        ({"up_0": block(0.1, 1, 0.1, 0.1)}, "", "even at a margin of 8"),
    ],
)
def test_advice_follows_its_rules(blocks, flags, why):
    advice = outlier_advice(blocks, SETTINGS)
    assert advice["flags"] == flags and why in advice["why"]


def test_what_is_advised_can_be_given_to_the_training_script():
    from lpl.config.command_line import build_parser

    flags = ["--lpl_no_outlier_mask", "--lpl_blocks mid", "--lpl_blocks mid up_1 --lpl_depth_weighting 1 0.5"]
    for flag in [*flags, "--lpl_outlier_margin 4"]:
        build_parser().parse_args(flag.split())


def test_balancing_weights_balance():
    vae = tiny_vae("sd")
    inspector = inspected(vae)
    numbers = summary(inspector)["balance"]
    words = numbers["flags"].split()
    assert words[0] == "--lpl_depth_weighting"
    loss_fn = LatentPerceptualLoss(vae, depth_weighting=[float(word) for word in words[1:]])
    generator = keyed_generator(3)
    latents, terms = inspector.latents[0], []
    for error in ERRORS:
        terms.append(terms_of(loss_fn, perturbed(latents, error, generator), latents))
    means = np.exp(np.log(terms).mean(0))
    assert means / means[0] == pytest.approx(1, rel=0.15)  # other noise than was measured
    weights = np.array([*numbers["depth_weights"]["balanced"].values()])
    measured = np.exp(np.log([*numbers["terms"].values()]).mean(1))
    assert weights * measured == pytest.approx(measured[0], rel=0.006)  # three digits
    inverse = np.array([*numbers["depth_weights"]["inverse"].values()])
    assert inverse.tolist() == [1, 0.5, 0.25, 0.25]
    assert np.ptp(np.log(inverse * measured)) > 0.3  # they were not alike before


def test_a_term_without_outliers_has_not_changed():
    assert relative(np.array([3.0, 0.0]), np.array([2.0, 0.0])).tolist() == [0.5, 0.0]


def test_the_order_of_interpolated_latents():
    """Of all points of one image; the errors in pixels grow with that in the latent, LPL falls."""
    found, count = {}, 0
    for label in METHODS:
        found[label] = [{"latent_mse": n, "pixel_mse": n**2, "lpl": 9 - n} for n in range(count, count + 2)]
        count += 2
    numbers = interpolation_summary([found])
    assert numbers["ordered_as_latent"] == {"pixel_mse": 1.0, "lpl": 0.0}
    assert [values["latent_mse"] for values in numbers["methods"].values()] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_report_has_a_row_for_each_block():
    numbers = summary(inspected(tiny_vae("sd")))
    lines = report(numbers).splitlines()
    assert [line.split()[0] for line in lines[4:8]] == ["mid", "up_0", "up_1", "up_2"]
    assert len({len(line) for line in lines[3:8]}) == 1
    assert numbers["balance"]["flags"] in lines[9]
