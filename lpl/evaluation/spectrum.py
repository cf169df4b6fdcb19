"""Power spectra of images and the share of high frequencies in them, for Fig. 5 and 6 of the paper.

The *luminance* of an image is 0.299 R + 0.587 G + 0.114 B, in [0, 1]. Its *power* at a frequency is the squared
modulus of the discrete Fourier transform, divided by the number of pixels: white noise of variance v has power v at
every frequency. *Frequencies* are in cycles per pixel; 0.5 is *Nyquist*, the highest along a row or a column, and the
corners of the transform go up to 0.71. The paper's frequencies are cycles per image: these times the image's side.

The transform takes the image for periodic, and the jump from its right to its left edge for high frequencies, which
would hide how few of them a blurred image has. Therefore the mean is subtracted, and a Hann window fades the image out
towards its edges; the power is divided by the window's mean power. With the mean, the lowest frequency loses a fifth
of its power. The paper does not describe what it does here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from lpl.evaluation.processes import in_parts, threaded


LUMINANCE = np.array([0.299, 0.587, 0.114]) / 255  # of 8-bit R, G, B
ROUNDING = 1 / (12 * 255**2)  # power of the error of rounding to 8 bits
NYQUIST = 0.5  # cycles per pixel


@dataclass(frozen=True)
class Spectrum:
    """The power at each frequency of a set of images."""

    frequencies: np.ndarray  # cycles per pixel, above 0 and up to 0.5, (K,)
    log_power: np.ndarray  # log10 of the radially averaged power there, averaged over images, (K,)
    high_frequency_energy: float  # share of their energy above half of Nyquist


def spectrum_of(images: Sequence[Image.Image], title: str | None = None) -> Spectrum:
    """Spectrum and high-frequency energy in one pass over the images; each process reads a part.

    Power is clamped from below to that of rounding to 8 bits, so that a flat image does not pull the mean of the
    logarithms to minus infinity. The high-frequency energy is a ratio of sums over all images, without their means, so
    that flat images do not matter; it is 0 if all are flat.

    Args:
        images: of one size.
        title: of a progress bar; None: no bar.

    Raises:
        ValueError: without images, or if they differ in size or are smaller than 4 pixels.
    """
    rows = in_parts(len(images), lambda mine: threaded(lambda index: _measured(images[index]), mine, title))
    sizes = {size for size, _ in rows}
    if len(sizes) != 1:
        raise ValueError(
            f"images of {len(sizes)} sizes: a spectrum needs at least one image, and all of the same size"
        )
    (size,) = sizes
    if min(size) < 4:
        raise ValueError(f"images of {size} pixels: a spectrum needs at least 4 in each direction")
    table = np.stack([row for _, row in rows])  # (N, K + 2)
    high, total = table[:, :2].sum(0)
    side = min(size)
    return Spectrum(
        np.arange(1, side // 2 + 1) / side,
        np.log10(np.maximum(table[:, 2:], ROUNDING)).mean(0),
        float(high / total) if total > ROUNDING else 0.0,
    )


def log_power_spectrum(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, (K,), and log10 of the power there, (K,); see :func:`spectrum_of`."""
    found = spectrum_of(images)
    return found.frequencies, found.log_power


def high_frequency_energy(images: Sequence[Image.Image]) -> float:
    """The share of the images' energy above half of Nyquist (0.25 cycles per pixel); see :func:`spectrum_of`."""
    return spectrum_of(images).high_frequency_energy


def _measured(image: Image.Image) -> tuple[tuple[int, int], np.ndarray]:
    """An image's size, and (K + 2,): its energy above half of Nyquist, its total energy, the power of each ring."""
    power = power_spectrum(np.asarray(image.convert("RGB")) @ LUMINANCE)
    high = power[_radii(power.shape) > NYQUIST / 2].sum()
    return image.size, np.concatenate([[high, power.sum()], radial_average(power)])


def power_spectrum(luminance: np.ndarray) -> np.ndarray:
    """Power at each frequency, (H, W) -> (H, W), in the order of ``numpy.fft.fft2``; see the head of this module."""
    window = _window(luminance.shape)
    values = window * (luminance - np.average(luminance, weights=window))
    return np.abs(np.fft.fft2(values)) ** 2 / (window**2).sum()


def radial_average(power: np.ndarray) -> np.ndarray:
    """Mean power over rings one bin wide, from above 0 to Nyquist, (K,), with K half of the shorter side; the corners
    beyond are left out."""
    side = min(power.shape)
    ring = np.rint(_radii(power.shape) * side).astype(int).ravel()
    return (np.bincount(ring, power.ravel()) / np.bincount(ring))[1 : side // 2 + 1]


@lru_cache(maxsize=4)
def _window(shape: tuple[int, int]) -> np.ndarray:
    """A Hann window, (H, W), positive at every pixel."""
    rows, columns = (np.hanning(side + 2)[1:-1] for side in shape)
    return np.outer(rows, columns)


@lru_cache(maxsize=4)
def _radii(shape: tuple[int, int]) -> np.ndarray:
    """The frequency at each place of the transform, (H, W), cycles per pixel."""
    rows, columns = (np.fft.fftfreq(side) for side in shape)
    return np.hypot(rows[:, None], columns)
