"""Sizes in words, and those that --aspect_ratio_buckets auto makes."""

from argparse import ArgumentTypeError

import pytest

from lpl.config.sizes import default_step, made_sizes, parse_sizes, resolutions, sides_of, sizes


def test_one_resolution_stays_a_number_and_several_are_sorted():
    assert resolutions("512") == 512 and resolutions("768,512,512") == "512,768"
    assert sides_of("512,768") == (512, 768)


@pytest.mark.parametrize("word", ["", "0", "-4", "512,", "big", "5.5"])
def test_other_resolutions_are_refused(word):
    with pytest.raises(ArgumentTypeError, match="accepted are a side in pixels"):
        resolutions(word)


def test_sizes_are_those_of_diffusers_syntax():
    assert sizes("auto") == "auto" and sizes(" 512,512; 640,384;512,512;") == "512,512;640,384"
    assert parse_sizes("640,384") == ((640, 384),)


@pytest.mark.parametrize("word", ["", "512", "512x512", "512,512,3", "0,512", "a,b"])
def test_other_sizes_are_refused(word):
    with pytest.raises(ArgumentTypeError, match="HEIGHT,WIDTH"):
        sizes(word)


@pytest.mark.parametrize(("side", "step"), [(512, 64), (1024, 64), (64, 16), (512, 32), (48, 48), (100, 24)])
def test_made_sizes_have_no_more_pixels_than_the_square_and_come_in_pairs(side, step):
    found = made_sizes(side, step)
    assert found and len(set(found)) == len(found)
    for height, width in found:
        assert height % step == width % step == 0 and height * width <= side * side
        assert 2 * min(height, width) >= side - step and max(height, width) <= 2 * side
        assert (width, height) in found


def test_the_default_step_is_an_eighth_in_whole_multiples():
    assert [default_step(*pair) for pair in ((512, 8), (1024, 16), (256, 8), (512, 32), (64, 4), (32, 32))] == [
        *(64, 64, 32, 64, 8, 32)
    ]
