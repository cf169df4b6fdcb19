from collections.abc import Sequence

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter, ImageOps

from lpl.evaluation import Preprocessing, high_frequency_energy, listed_images, log_power_spectrum, spectrum_of
from lpl.evaluation.spectrum import ROUNDING, power_spectrum, radial_average


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(skimage.data.astronaut()[:128, 150:278])


def grey(values):
    """An RGB image of luminances in [0, 1], (H, W), rounded to 8 bits."""
    return Image.fromarray(np.rint(255 * values).astype(np.uint8)).convert("RGB")


def wave(cycles, side=64, amplitude=0.4, angle=0.0):
    """A sinusoid of so many cycles per image across, turned by `angle`."""
    y, x = np.mgrid[:side, :side] / side
    return amplitude * np.sin(2 * np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y))


def noise(count, side=64, deviation=0.1, seed=0):
    rng = np.random.default_rng(seed)
    return [grey((0.5 + deviation * rng.normal(size=(side, side))).clip(0, 1)) for _ in range(count)]


def test_white_noise_has_its_variance_at_every_frequency():
    frequencies, power = log_power_spectrum(noise(200))
    assert frequencies[0] == 1 / 64 and frequencies[-1] == 0.5 and len(frequencies) == len(power) == 32
    assert power[8:] == pytest.approx(np.full(24, np.log10(0.01)), abs=0.02)
    # of the few values in a small ring the mean logarithm lies below the logarithm of the mean
    assert (power[:8] < np.log10(0.01) + 0.02).all() and power[:8].min() > np.log10(0.01) - 0.25
    rings = [radial_average(power_spectrum(np.asarray(image.convert("L")) / 255)) for image in noise(200)]
    assert np.mean(rings, 0)[1:] == pytest.approx(np.full(31, 0.01), rel=0.15)  # the mean takes some of the first
    assert np.mean(rings, 0)[8:] == pytest.approx(np.full(24, 0.01), rel=0.06)


@pytest.mark.parametrize("cycles", [3, 11, 24])
@pytest.mark.parametrize("angle", [0.0, 0.6, np.pi / 2])
def test_a_sinusoid_has_its_peak_at_its_frequency(cycles, angle):
    frequencies, power = log_power_spectrum([grey(0.5 + wave(cycles, angle=angle))])
    assert frequencies[power.argmax()] == pytest.approx(cycles / 64, abs=0.5 / 64)
    far = abs(frequencies - cycles / 64) > 4 / 64
    assert power[far].max() < power.max() - 3


def test_power_by_the_plain_sums(photograph):
    """The transform as a sum over pixels, the rings as a loop."""
    values = np.asarray(photograph.convert("L").resize((9, 7)), dtype=float) / 255
    height, width = values.shape
    y, x = np.mgrid[:height, :width]
    window = np.sin(np.pi * (y + 1) / (height + 1)) ** 2 * np.sin(np.pi * (x + 1) / (width + 1)) ** 2
    faded = window * (values - (window * values).sum() / window.sum())
    rings = {}
    for v in range(-(height // 2), (height + 1) // 2):
        for u in range(-(width // 2), (width + 1) // 2):
            amplitude = (faded * np.exp(-2j * np.pi * (v * y / height + u * x / width))).sum()
            ring = round(np.hypot(v / height, u / width) * 7)
            rings.setdefault(ring, []).append(abs(amplitude) ** 2 / (window**2).sum())
    assert radial_average(power_spectrum(values)) == pytest.approx([np.mean(rings[ring]) for ring in (1, 2, 3)])


def test_luminance_weighs_the_colours():
    x = np.sin(2 * np.pi * np.arange(32) * 8 / 32) * 100 + 128
    power = []
    for channel in range(3):
        pixels = np.full((32, 32, 3), 128.0)
        pixels[:, :, channel] = x
        power.append(10 ** log_power_spectrum([Image.fromarray(np.rint(pixels).astype(np.uint8))])[1].max())
    assert np.sqrt(np.array(power) / power[1]) == pytest.approx([0.299 / 0.587, 1, 0.114 / 0.587], rel=1e-3)


def test_blurring_takes_high_frequencies_away(photograph):
    spectra = [
        log_power_spectrum([image])[1]
        for image in (photograph, *(photograph.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2)))
    ]
    high = slice(40, None)
    assert (spectra[1][high] < spectra[0][high] - 1).all() and (spectra[2][high] < spectra[1][high]).all()
    assert spectra[2][:3] == pytest.approx(spectra[0][:3], abs=0.1)
    energies = [
        high_frequency_energy([image]) for image in (photograph, photograph.filter(ImageFilter.GaussianBlur(1)))
    ]
    assert 0 < energies[1] < energies[0] / 10


def test_a_smooth_image_has_no_high_frequencies():
    """A ramp jumps from one edge to the other, which the transform alone would take for 1 / f^2."""
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    _, power = log_power_spectrum([grey(ramp)])
    assert power[16:].max() < power[0] - 4


def test_invariances(photograph):
    frequencies, power = log_power_spectrum([photograph])
    for other in (photograph.rotate(90), photograph.transpose(Image.Transpose.FLIP_TOP_BOTTOM)):
        assert log_power_spectrum([other])[1] == pytest.approx(power)
    pixels = np.asarray(photograph) // 4
    dim, bright = (Image.fromarray((pixels + level).astype(np.uint8)) for level in (0, 100))
    assert log_power_spectrum([bright])[1] == pytest.approx(log_power_spectrum([dim])[1])
    double = Image.fromarray((2 * pixels).astype(np.uint8))
    assert log_power_spectrum([double])[1] == pytest.approx(log_power_spectrum([dim])[1] + 2 * np.log10(2))
    assert high_frequency_energy([double]) == pytest.approx(high_frequency_energy([dim]))


def test_spectra_are_averaged_as_logarithms(photograph):
    other = ImageOps.posterize(photograph, 2)
    spectra = [log_power_spectrum([image])[1] for image in (photograph, other)]
    assert log_power_spectrum([photograph, other])[1] == pytest.approx(np.mean(spectra, 0))
    images = listed_images([photograph, other], "set", Preprocessing(128))
    assert log_power_spectrum(images)[1] == pytest.approx(np.mean(spectra, 0))


def test_images_are_read_once_for_all(photograph):
    """Reading and preprocessing take longer than the transform."""

    class Counted(Sequence):
        images, read = [photograph, photograph.rotate(90), ImageOps.posterize(photograph, 2)], []

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            self.read.append(index)
            return self.images[index]

    found = spectrum_of(Counted())
    assert sorted(Counted.read) == [0, 1, 2]
    frequencies, power = log_power_spectrum(Counted.images)
    assert np.array_equal(found.frequencies, frequencies) and np.array_equal(found.log_power, power)
    assert found.high_frequency_energy == high_frequency_energy(Counted.images) > 0


@pytest.mark.parametrize("low, high", [(0.3, 0.1), (0.1, 0.3), (0.2, 0.2)])
def test_high_frequency_energy_of_two_sinusoids(low, high):
    image = grey(0.5 + wave(5, amplitude=low) + wave(25, amplitude=high))
    assert high_frequency_energy([image]) == pytest.approx(high**2 / (low**2 + high**2), abs=2e-3)
    flat = grey(np.full((64, 64), 0.3))
    assert high_frequency_energy([image, flat]) == pytest.approx(high_frequency_energy([image]))


def test_flat_images_are_finite():
    flat = grey(np.full((64, 64), 0.3))
    assert log_power_spectrum([flat])[1] == pytest.approx(np.full(32, np.log10(ROUNDING)))
    assert high_frequency_energy([flat]) == 0


@pytest.mark.parametrize(
    "sizes, message", [([], "at least one image"), ([16, 17], "2 sizes: .* the same size"), ([2], "needs at least 4")]
)
def test_what_has_no_spectrum_is_refused(sizes, message):
    images = [grey(np.full((size, size), 0.5)) for size in sizes]
    for function in (log_power_spectrum, high_frequency_energy, spectrum_of):
        with pytest.raises(ValueError, match=message):
            function(images)
