import json
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import forced_features
from PIL import Image
from tiny import VAE_CONFIGS, seeded, tiny_vae

from lpl import DecoderFeatureExtractor, LatentPerceptualLoss, outlier_mask
from lpl.autoencoders import downscaling_factor
from lpl.data.order import keyed_generator
from lpl.inspection import command as inspect


FILES = {"features.png", "outliers.png", "balance.png", "interpolation.png", "inspect.json"}
SETTINGS = {"quantile": 0.02, "margin": 2.0, "dilation": 3, "erosion": 5}


def words(model, images, folder, *more):
    return [
        *("--pretrained_model_name_or_path", str(model), "--images", *map(str, images), "--output_dir", str(folder)),
        *("--device", "cpu", *more),
    ]


def arguments(*more):
    args = inspect.build_parser().parse_args(words("model", ["images"], "out", *more))
    inspect.check_arguments(args)
    return args


def inspected(vae, *more, images=None, resolution=32):
    """An inspector that has seen the images."""
    inspector = inspect.Inspector(vae, vae, arguments(*more))
    steps = []
    for image in images or [noise_image(resolution)]:
        inspector.inspect(image, lambda: steps.append(1))
    assert len(steps) == inspect.STEPS * len(inspector.found)
    return inspector


def noise_image(side=32, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)).resize((side, side))


@pytest.fixture(scope="module")
def command(sd_pipeline, image_folder, tmp_path_factory):
    """The folder that the command has filled, for two of eight images, and what it has printed."""
    folder = tmp_path_factory.mktemp("inspected") / "deep"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
        inspect.main(words(sd_pipeline, [image_folder], folder, "--num_images", "2", "--lpl_blocks", "up_1", "mid"))
    return folder, "\n".join(printed)


@pytest.fixture
def numbers(command):
    return json.loads((command[0] / "inspect.json").read_text())


# What is written


def test_pictures_and_numbers_are_written(command, numbers, image_folder):
    folder, printed = command
    assert {file.name for file in folder.iterdir()} == FILES
    for file in FILES - {"inspect.json"}:
        picture = np.asarray(Image.open(folder / file).convert("L"))
        assert 900 <= picture.shape[1] <= 1200 and picture.std() > 5, file
    files = sorted(path for path in image_folder.iterdir() if path.suffix != ".jsonl")
    assert numbers["images"] == [str(files[0]), str(files[4])]  # evenly spread
    assert numbers["resolution"] == 32 and list(numbers["outliers"]["blocks"]) == ["mid", "up_1"]
    for told in (numbers["balance"]["flags"], numbers["outliers"]["advice"]["why"], "mid", "16x32x32"):
        assert told in printed
    assert numbers["balance"]["flags"].startswith("--lpl_blocks mid up_1 --lpl_depth_weighting 1 ")


def test_the_same_again_and_the_random_state_is_left_alone(sd_pipeline):
    vae, state = tiny_vae("sd"), torch.get_rng_state()
    one, other = inspected(vae), inspected(vae)
    assert torch.equal(torch.get_rng_state(), state)
    assert inspect.summary(one) == inspect.summary(other)
    assert inspect.summary(inspected(vae, "--seed", "1"))["balance"] != inspect.summary(one)["balance"]


@pytest.mark.parametrize("kind", VAE_CONFIGS)
def test_every_autoencoder_can_be_looked_at(kind):
    vae = tiny_vae(kind)
    inspector = inspected(vae, resolution=8 * downscaling_factor(vae.config))
    numbers = inspect.summary(inspector)
    features = DecoderFeatureExtractor(vae)(inspector.latents[0])
    blocks = numbers["outliers"]["blocks"]
    assert {name: block["shape"] for name, block in blocks.items()} == {
        name: list(maps.shape[1:]) for name, maps in features.items()
    }
    assert np.isfinite([*numbers["balance"]["terms"].values()]).all()
    assert all(np.min(method["lpl"]) > 0 for method in numbers["interpolation"]["methods"].values())
    assert vae.decoder.training is False and not any(p.grad is not None for p in vae.parameters())


def test_a_vae_alone_will_do(tmp_path):
    tiny_vae("dc").save_pretrained(tmp_path / "vae")
    noise_image().save(tmp_path / "image.png")
    found = inspect.run(
        inspect.build_parser().parse_args(
            words(tmp_path / "vae", [tmp_path / "image.png"], tmp_path / "out", "--resolution", "32")
        )
    )
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert found["vae"]["class"] == "AutoencoderDC" and list(found["outliers"]["blocks"]) == ["up_0", "up_1", "up_2"]
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == found


def test_half_precision_is_of_the_decoder_only():
    vae, half = tiny_vae("sd"), tiny_vae("sd", dtype=torch.bfloat16)
    inspector = inspect.Inspector(vae, half, arguments("--lpl_vae_dtype", "bfloat16"))
    inspector.inspect(noise_image())
    exact = inspected(vae)
    assert torch.equal(inspector.latents[0], exact.latents[0])
    one, other = (np.array(found.found[0]["terms"]) for found in (inspector, exact))
    assert not np.array_equal(one, other) and np.allclose(one, other, rtol=0.2)


# Outliers


def test_shares_are_those_of_the_masks():
    vae = tiny_vae("sd")
    images = [noise_image(seed=seed) for seed in (0, 1)]
    inspector = inspected(vae, "--lpl_outlier_margin", "0.5", images=images)
    numbers = inspect.summary(inspector)["outliers"]
    features = [DecoderFeatureExtractor(vae)(latents) for latents in inspector.latents]
    settings = SETTINGS | {"margin": 0.5}
    for name, block in numbers["blocks"].items():
        masks = torch.stack([~outlier_mask(maps[name], **settings)[0] for maps in features])  # (images, C, H, W)
        assert block["shape"] == list(masks.shape[1:])
        assert block["masked_by_channel"] == pytest.approx(masks.float().mean((0, 2, 3)).tolist())
        assert block["masked"] == pytest.approx(masks.float().mean().item())
        assert block["maps_with_outliers"] == pytest.approx(masks.any(-1).any(-1).float().mean().item())
        strided = torch.stack([~outlier_mask(maps[name], **settings, stride=4)[0] for maps in features])
        assert block["stride_differs"] == pytest.approx((strided != masks).float().mean().item())
        wider = torch.stack([~outlier_mask(maps[name], **settings | {"margin": 1.0})[0] for maps in features])
        assert block["masked_by_margin"]["1.0"] == pytest.approx(wider.float().mean().item(), abs=1e-7)
        assert block["masked_by_margin"]["0.5"] == pytest.approx(block["masked"], abs=1e-6)
    assert max(block["masked"] for block in numbers["blocks"].values()) > 0  # else nothing was compared
    assert max(block["stride_differs"] for block in numbers["blocks"].values()) > 0


def with_outliers_in(channel, strength):
    """A VAE whose last block answers hugely in one channel wherever a hidden feature of its is extreme."""
    vae = tiny_vae("sd")
    last = vae.decoder.up_blocks[-1].resnets[-1]
    with torch.no_grad():
        last.norm2.weight[0], last.norm2.bias[0] = 10.0, -24.0  # SiLU lets what is beyond 2.4 deviations through
        last.conv2.weight[:, 0] = last.conv2.weight[channel] = 0.0
        last.conv2.weight[channel, 0, 1, 1] = strength
    return vae


@pytest.mark.parametrize("channel", [2, 5])
def test_outliers_are_found_where_they_were_planted(channel):
    planted, plain = (
        inspect.summary(inspected(with_outliers_in(channel, strength)))["outliers"]["blocks"] for strength in (300, 0)
    )
    masked, peak = (np.array(planted["up_2"][f"{kind}_by_channel"]) for kind in ("masked", "peak"))
    assert masked.argmax() == peak.argmax() == channel and masked[channel] > 0.002
    assert peak[channel] > 5 * np.delete(peak, channel).max() and planted["up_2"]["peak"] == peak[channel]
    assert planted["up_2"]["peak_kept"] < peak[channel] / 5  # and the mask takes it
    assert abs(planted["up_2"]["masks_change"]) > abs(plain["up_2"]["masks_change"])
    untouched = np.delete(np.array(plain["up_2"]["masked_by_channel"]), channel)
    assert np.delete(masked, channel) == pytest.approx(untouched)
    for name in ("mid", "up_0", "up_1"):
        assert planted[name]["masked_by_channel"] == plain[name]["masked_by_channel"]


def test_peaks_by_hand():
    features = torch.tensor([-1.0, 1.0, -1.0, 1.0, 9.0, -3.0]).view(1, 1, 2, 3)
    keep = torch.tensor([True, True, True, True, False, True]).view(1, 1, 2, 3)
    # the kept ones: mean -0.6, variance 2.24
    peak, kept = inspect.peaks(features, keep)
    assert peak.item() == pytest.approx(9.6 / 2.24**0.5) and kept.item() == pytest.approx(2.4 / 2.24**0.5)
    assert inspect.peaks(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3) > 0)[0].tolist() == [0, 0]


def test_gaussian_maps_are_as_large_and_as_smooth_but_have_no_outliers():
    with seeded(0):
        features = torch.nn.functional.avg_pool2d(torch.randn(1, 4, 68, 68), 5, stride=1)
    features[..., 20:24, 30:34] += 30 * features.std()
    surrogate = inspect.gaussian_like(features, keyed_generator(0))
    assert torch.allclose(torch.fft.rfft2(surrogate).abs(), torch.fft.rfft2(features).abs(), rtol=1e-3, atol=1e-2)
    assert torch.allclose(surrogate.var((2, 3)), features.var((2, 3)), rtol=1e-3)
    settings = SETTINGS
    assert inspect.share_masked(features, settings) > 0.003 > 10 * inspect.share_masked(surrogate, settings)


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
    advice = inspect.outlier_advice(blocks, SETTINGS)
    assert advice["flags"] == flags and why in advice["why"]


def test_what_is_advised_can_be_given_to_the_training_script():
    from lpl.config.command_line import build_parser

    flags = ["--lpl_no_outlier_mask", "--lpl_blocks mid", "--lpl_blocks mid up_1 --lpl_depth_weighting 1 0.5"]
    for flag in [*flags, "--lpl_outlier_margin 4"]:
        build_parser().parse_args(flag.split())


def test_features_that_overflow_are_refused():
    vae = tiny_vae("sd")
    with forced_features(vae, up_1=lambda output: output / 0), pytest.raises(ValueError, match="up_1 are not finite"):
        inspected(vae)


# Balance


def test_terms_are_those_of_the_loss():
    vae = tiny_vae("sd")
    inspector = inspected(vae, "--lpl_normalization", "none", "--lpl_distance", "l1")
    latents = inspector.latents[0]
    generator = keyed_generator(0, 0)
    for maps in DecoderFeatureExtractor(vae)(latents).values():
        torch.randn(maps.shape, generator=generator)  # what the outliers' study has drawn
    for index, error in enumerate(inspect.ERRORS):
        predicted = latents + error * latents.std() * torch.randn(latents.shape, generator=generator)
        for kind, masks in (("terms", True), ("unmasked", False)):
            loss_fn = LatentPerceptualLoss(
                vae, normalization="none", distance="l1", depth_weighting="uniform", mask_outliers=masks
            )
            total = loss_fn(predicted, latents)
            assert sum(inspector.found[0][kind][index]) == pytest.approx(total.item(), rel=1e-5)


def test_balancing_weights_balance():
    vae = tiny_vae("sd")
    inspector = inspected(vae)
    numbers = inspect.summary(inspector)["balance"]
    words = numbers["flags"].split()
    assert words[0] == "--lpl_depth_weighting"
    loss_fn = LatentPerceptualLoss(vae, depth_weighting=[float(word) for word in words[1:]])
    generator = keyed_generator(3)
    latents, terms = inspector.latents[0], []
    for error in inspect.ERRORS:
        terms.append(inspect.terms_of(loss_fn, inspect.perturbed(latents, error, generator), latents))
    means = np.exp(np.log(terms).mean(0))
    assert means / means[0] == pytest.approx(1, rel=0.15)  # other noise than was measured
    weights = np.array([*numbers["depth_weights"]["balanced"].values()])
    measured = np.exp(np.log([*numbers["terms"].values()]).mean(1))
    assert weights * measured == pytest.approx(measured[0], rel=0.006)  # three digits
    inverse = np.array([*numbers["depth_weights"]["inverse"].values()])
    assert inverse.tolist() == [1, 0.5, 0.25, 0.25]
    assert np.ptp(np.log(inverse * measured)) > 0.3  # they were not alike before


# Interpolation


@pytest.mark.parametrize("label", inspect.METHODS)
def test_a_scale_of_one_changes_nothing(label):
    vae = tiny_vae("sd")
    inspector = inspect.Inspector(vae, vae, arguments())
    pixels = torch.rand(1, 3, 32, 32, generator=keyed_generator(1)) * 2 - 1
    latents = inspector.encode(pixels)
    changed = inspector.interpolate(pixels, latents, 1.0, *inspect.METHODS[label])
    assert torch.equal(changed, latents) and LatentPerceptualLoss(vae)(changed, latents).item() == 0


def test_errors_of_interpolated_latents_are_those_of_the_definitions():
    vae = tiny_vae("sd3")
    image = noise_image()
    inspector = inspected(vae, images=[image])
    numbers = inspect.summary(inspector)["interpolation"]
    latents = inspector.latents[0]
    with torch.no_grad():
        for label, mode in (("nearest, in the latent", "nearest"), ("bicubic, in the latent", "bicubic")):
            small = torch.nn.functional.interpolate(latents, (4, 4), mode=mode)
            changed = torch.nn.functional.interpolate(small, (8, 8), mode=mode)
            images = [
                vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
                for z in (latents, changed)
            ]
            found = {kind: values[numbers["scales"].index(2.0)] for kind, values in numbers["methods"][label].items()}
            assert found["latent_mse"] == pytest.approx((changed - latents).square().mean().item(), rel=1e-4)
            assert found["pixel_mse"] == pytest.approx((images[1] - images[0]).square().mean().item(), rel=1e-3)
            assert found["lpl"] == pytest.approx(LatentPerceptualLoss(vae)(changed, latents).item(), rel=1e-4)
    assert set(numbers["ordered_as_latent"]) == {"pixel_mse", "lpl"}


def test_pixels_are_resized_before_they_are_encoded():
    vae = tiny_vae("sd")
    inspector = inspect.Inspector(vae, vae, arguments())
    pixels = torch.rand(1, 3, 32, 32, generator=keyed_generator(1)) * 2 - 1
    changed = inspector.interpolate(pixels, inspector.encode(pixels), 2.0, "bilinear", "pixels")
    assert torch.equal(changed, inspector.encode(inspect.resized(pixels, 2.0, "bilinear")))


def test_depth_weights_belong_to_their_blocks_whatever_the_order():
    """Modules named by path stand behind the named blocks, but may run before them."""
    blocks = ["up_2", "decoder.up_blocks.1.resnets.0"]
    vae = tiny_vae("sd")
    inspector = inspected(vae, "--lpl_blocks", *blocks)
    weights = inspect.summary(inspector)["balance"]["depth_weights"]
    latents = inspector.latents[0]
    predicted = inspect.perturbed(latents, 0.1, keyed_generator(0))
    plain = inspect.terms_of(LatentPerceptualLoss(vae, blocks, depth_weighting="uniform"), predicted, latents)
    for kind in ("inverse", "exponential"):
        loss_fn = LatentPerceptualLoss(vae, blocks, depth_weighting=kind)
        weighted = inspect.terms_of(loss_fn, predicted, latents)
        expected = {name: term / whole for name, term, whole in zip(loss_fn.block_names, weighted, plain)}
        assert weights[kind] == pytest.approx(expected, rel=1e-5)


# Refusals


@pytest.fixture
def refuse(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    """Run the command with something changed; what it says on the way out. No weights may be loaded."""
    monkeypatch.setattr(inspect.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))

    def run(*more, model=sd_pipeline, images=(image_folder,)):
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inspect.main(words(model, images, tmp_path / "out", *more))
        assert ended.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "more, said",
    [
        (["--num_images", "0"], "--num_images 0: it must be 1 or more"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--lpl_outlier_quantile", "0.5"], "--lpl_outlier_quantile 0.5: it must be more than 0 and less than 0.5"),
        (["--lpl_outlier_margin", "-2"], "--lpl_outlier_margin -2.0: it must be 0 or more"),
        (
            ["--lpl_blocks", "up_7"],
            "there is no up_7, did you mean up_2? this decoder's blocks are mid, up_0, up_1, up_2",
        ),
        (["--lpl_blocks", "rgb"], "pixels are no features"),
        (["--resolution", "30"], "--resolution 30: this VAE takes multiples of 4, such as 28 or 32"),
        (["--resolution", "4"], "--resolution 4: this VAE takes multiples of 4, such as 8 or 12"),
        (["--lpl_vae_dtype", "float16"], "--lpl_vae_dtype float16 needs a GPU"),
        (["--device", "meta"], "--device meta: PyTorch cannot compute on it here"),
        (["--device", "gpu"], "--device gpu"),
        (["--lpl_block", "mid"], "did you mean --lpl_blocks?"),
    ],
)
def test_flags_that_cannot_be_are_refused(refuse, more, said):
    assert said in refuse(*more)


def test_images_that_are_not_there_are_refused(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for path, said in (("nowhere", "no such file"), ("empty", "has no images"), ("broken.png", "cannot be read")):
        assert f"--images {tmp_path / path}: " in (told := refuse(images=[tmp_path / path])) and said in told


def test_models_that_are_none_are_refused(refuse, tmp_path):
    assert "neither a pipeline nor a VAE is found there" in refuse(model=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    assert "of the class AutoencoderOobleck; supported are AutoencoderKL," in refuse(model=tmp_path)


def test_a_vae_that_overflows_in_half_precision_is_refused():
    config = {**tiny_vae("sd").config, "_class_name": "AutoencoderKL", "force_upcast": True}
    with pytest.raises(ValueError, match="force_upcast"):
        inspect.check_vae(Namespace(lpl_vae_dtype="float16", lpl_blocks=None, resolution=None), config)


@pytest.mark.parametrize("sample_size, resolution", [(64, 64), (1024, 512), ([480, 720], 512), (2, 8)])
def test_the_default_resolution_is_the_vaes_but_not_dear(sample_size, resolution):
    args = Namespace(lpl_vae_dtype="float32", lpl_blocks=None, resolution=None)
    inspect.check_vae(args, {**tiny_vae("sd").config, "_class_name": "AutoencoderKL", "sample_size": sample_size})
    assert args.resolution == resolution
