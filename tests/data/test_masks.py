"""Loss masks: files, columns and transparency; the geometry of their images; the diffusion loss; whole runs."""

import io
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from commands import refusal, warned
from datasets import Dataset
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import tiny_image_folder
from trainer import arguments, metrics, script, settings, train, validation_metrics

from lpl.config.groups import Diffusion, Lpl
from lpl.data.dataset import collate
from lpl.data.fingerprint import data_facts
from lpl.data.folder import Contents
from lpl.data.source import load_training_images
from lpl.data.streaming import load_streamed_images, training_images
from lpl.masking import LossMask
from lpl.objectives import Epsilon, FlowMatching, training_scheduler
from tests.data.test_dataset import SPACE, images_of, over, static


def grey(picture):
    return picture.convert("L").convert("RGB")


def with_alpha(picture, alpha):
    picture = picture.convert("RGBA")
    picture.putalpha(alpha)
    return picture


def half(width, height):
    """White on the left, black on the right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def masked(picture, mask, **changes):
    rows = [{"image": picture, "text": "a picture", "mask": mask}]
    return over(rows, settings(mask_column="mask", **changes))


# One sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 48), (48, 80), (300, 20)])
@pytest.mark.parametrize("interpolation", ["lanczos", "nearest", "bicubic"])
def test_a_mask_follows_flip_crop_and_interpolation(size, interpolation):
    """A mask equal to the image's brightness stays equal."""
    picture = grey(static(*size))
    images = masked(picture, picture, random_flip=True, image_interpolation_mode=interpolation)
    plain = images_of(picture, random_flip=True, image_interpolation_mode=interpolation)
    for epoch in range(8):
        sample = images[epoch, 0]
        assert sample["mask"].shape == (1, 32, 32) and sample["mask"].dtype == torch.float32
        assert torch.allclose(sample["mask"] * 2 - 1, sample["pixels"][:1], atol=1e-6)
        assert torch.equal(sample["pixels"], plain[epoch, 0]["pixels"])  # masks change no bit of the images


def test_white_is_one_and_black_is_zero():
    found = masked(static(), half(64, 48), center_crop=True, image_interpolation_mode="nearest")[0, 0]["mask"]
    assert sorted(set(found.flatten().tolist())) == [0.0, 1.0]
    assert (found[..., :16] == 1).all() and (found[..., 16:] == 0).all()


def test_samples_have_masks_only_if_they_are_asked_for():
    picture = with_alpha(static(), half(64, 48))
    assert "mask" not in images_of(picture)[0, 0]
    assert "mask" in images_of(picture, alpha_mask=True)[0, 0]
    batch = collate([images_of(static(), alpha_mask=True)[0, 0], images_of(picture, alpha_mask=True)[0, 0]])
    assert batch["mask"].shape == (2, 1, 32, 32) and (batch["mask"][0] == 1).all()  # an opaque image is white


def test_the_colours_below_the_transparency_are_kept():
    """As in other trainers; without the flag the image is put on white."""
    picture, alpha = static(), half(64, 48)
    images = images_of(with_alpha(picture, alpha), alpha_mask=True, center_crop=True)
    assert torch.equal(images[0, 0]["pixels"], images_of(picture, center_crop=True)[0, 0]["pixels"])
    expected = masked(picture, alpha, center_crop=True)[0, 0]["mask"]
    assert torch.equal(images[0, 0]["mask"], expected)


@pytest.mark.parametrize("mode", ["LA", "PA", "P"])
def test_transparency_of_other_modes(mode):
    picture, alpha = grey(static()), half(64, 48)
    if mode == "P":
        palette = Image.new("P", (64, 48))
        palette.putpalette([0, 0, 0, 255, 255, 255])
        palette.paste(1, (0, 0, 32, 48))
        file = io.BytesIO()
        palette.save(file, "PNG", transparency=0)
        picture = Image.open(file)
    else:
        picture = with_alpha(picture, alpha).convert(mode)
    found = images_of(picture, alpha_mask=True, center_crop=True)[0, 0]["mask"]
    assert torch.equal(found, masked(static(), alpha, center_crop=True)[0, 0]["mask"])


def test_masks_and_transparency_are_turned_with_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    file = io.BytesIO()
    with_alpha(static(), half(64, 48)).save(file, "PNG", exif=exif)
    found = images_of(Image.open(file), alpha_mask=True, center_crop=True)[0, 0]["mask"]
    assert (found[:, :14] > 0.97).all() and (found[:, 18:] < 0.03).all()


def test_a_mask_of_another_size_is_resized():
    found = masked(static(), half(128, 96), center_crop=True)[0, 0]["mask"]
    assert (found[..., :12] > 0.97).all() and (found[..., 20:] < 0.03).all()


def test_a_row_without_a_mask_is_white():
    assert (masked(static(), None)[0, 0]["mask"] == 1).all()


@pytest.mark.parametrize("kind", ["1", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_every_mode(kind):
    mask = Image.fromarray(np.asarray(half(64, 48)).astype(np.uint16) * 257) if kind == "I;16" else half(64, 48)
    mask = mask if kind == "I;16" else mask.convert(kind)
    file = io.BytesIO()
    mask.save(file, "PNG")
    found = masked(static(), Image.open(file), center_crop=True)[0, 0]["mask"]
    assert torch.equal(found, masked(static(), half(64, 48), center_crop=True)[0, 0]["mask"])


def test_black_and_broken_masks_cost_their_sample():
    good = {"image": static(seed=1), "text": "good", "mask": half(64, 48)}
    broken = {"bytes": b"no image", "path": None}
    rows = [{"image": static(), "text": "bad", "mask": mask} for mask in (Image.new("L", (64, 48)), broken)]
    images = over([*rows, good], settings(mask_column="mask"))
    sample = images[0, 0]
    assert sample["caption"] == "good" and [place for place, _ in sample["bad"]] == [0, 1]
    assert "its mask is black everywhere" in sample["bad"][0][1] and "its mask" in sample["bad"][1][1]
    light = over([*rows, good], settings(mask_column="mask", unmasked_weight=0.1))
    assert light[0, 0]["caption"] == "bad" and not light[0, 0]["mask"].any()


# Data sets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three images with captions; two have masks, one in each spelling; one file is named like a mask of nothing."""
    for number, name in enumerate(("a", "b", "c")):
        static(seed=number).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    half(64, 48).save(tmp_path / "a-masklabel.png")
    half(64, 48).save(tmp_path / "b.mask.png")
    return tmp_path


def load(folder, **changes):
    return load_training_images(settings(train_data_dir=str(folder), **changes).data, 0, None)[0]


def test_the_masks_of_a_folder_are_no_images(folder):
    static(seed=9).save(folder / "d-masklabel.png")  # of no image: an image
    (folder / "d-masklabel.txt").write_text("picture d")
    contents = Contents.of(folder)
    assert len(contents.images) == 4 and len(contents.masks) == 2
    dataset = load(folder, mask_column="mask")
    images = over(dataset, settings(train_data_dir=str(folder), mask_column="mask", center_crop=True))
    means = {images[0, place]["caption"]: images[0, place]["mask"].mean().item() for place in range(4)}
    expected = {"picture a": 0.5, "picture b": 0.5, "picture c": 1.0, "picture d": 1.0}
    assert means == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("inside", [True, False])
def test_masks_in_a_folder_of_their_own(inside, folder, tmp_path_factory):
    """As in kohya's, ai-toolkit's and diffusion-pipe's data: the name of the image, with any suffix."""
    masks = folder / "masks" if inside else tmp_path_factory.mktemp("masks")
    masks.mkdir(exist_ok=True)
    (folder / "sub").mkdir()
    for name in ("b.png", "c.jpg"):
        half(64, 48).save(masks / name)
    static(seed=9).save(folder / "sub" / "c.png")  # the one in masks/sub goes before that in masks
    (folder / "sub" / "c.txt").write_text("picture c in sub")
    (masks / "sub").mkdir()
    Image.new("L", (64, 48), 255).save(masks / "sub" / "c.png")
    flags = {"mask_data_dir": str(masks), "mask_column": "mask"}
    images = over(load(folder, **flags), settings(train_data_dir=str(folder), center_crop=True, **flags))
    means = {images[0, place]["caption"]: images[0, place]["mask"].mean().item() for place in range(len(images))}
    expected = {"picture a": 0.5, "picture b": 0.5, "picture c": 0.5, "picture c in sub": 1.0}
    assert means == pytest.approx(expected, abs=0.02)


def test_a_folder_of_masks_with_other_names(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    half(64, 48).save(other / "x.png")
    with pytest.raises(ValueError, match="no mask there has the name of an image, such as a.png"):
        load(folder, mask_data_dir=str(other), mask_column="mask")


def test_a_folder_of_masks_that_has_the_images_too(folder):
    with pytest.raises(ValueError, match="--mask_data_dir .*: the images lie in it"):
        load(folder, mask_data_dir=str(folder), mask_column="mask")


@pytest.mark.parametrize("mirrored", [True, False])
def test_masks_of_kohyas_folders(mirrored, tmp_path):
    """In a folder of the same name, or all in one folder; one of the data sets has none."""
    for name in ("2_cat", "1_dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        static().save(tmp_path / "data" / name / f"{name}.png")
    masks = tmp_path / "masks" / ("2_cat" if mirrored else "")
    masks.mkdir(parents=True)
    half(64, 48).save(masks / "2_cat.png")
    flags = {"mask_data_dir": str(tmp_path / "masks"), "mask_column": "mask"}
    images = over(load(tmp_path / "data", **flags), settings(train_data_dir=str(tmp_path / "data"), **flags))
    whole = {images[0, row]["caption"]: bool((images[0, row]["mask"] == 1).all()) for row in range(len(images))}
    assert whole == {"cat": False, "dog": True}
    (masks / "2_cat.png").rename(masks / "other.png")
    with pytest.raises(ValueError, match="no mask there has the name of an image"):
        load(tmp_path / "data", **flags)


def test_masks_that_are_not_used_are_said(folder, caplog):
    assert load(folder).column_names == ["image", "text"]
    assert "no effect without --mask_column mask" in caplog.text


def test_masks_beside_images_that_a_metadata_file_describes(folder):
    rows = [{"file_name": f"{name}.png", "text": name} for name in "abc"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(folder, mask_column="mask")["mask"]
    assert [mask and mask["path"].rpartition("/")[2] for mask in found] == ["a-masklabel.png", "b.mask.png", None]


def test_masks_that_a_metadata_file_names(folder):
    (folder / "masks").mkdir()
    half(64, 48).save(folder / "masks" / "a.png")
    rows = [{"file_name": "a.png", "text": "a", "mask_file_name": "masks/a.png"}, {"file_name": "b.png", "text": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load(folder, mask_column="mask")["mask"]
    assert found[0]["path"].endswith("masks/a.png") and found[1] is None


def test_other_masks_are_other_data(folder):
    def fingerprint():
        data = settings(train_data_dir=str(folder), mask_column="mask").data
        return data_facts(load(folder, mask_column="mask"), data, None)["fingerprint"]

    before = fingerprint()
    assert fingerprint() == before
    half(64, 48).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "a-masklabel.png")
    assert fingerprint() != before


@pytest.mark.parametrize("column, words", [("maks", "cat-masklabel.png"), ("text", "holds no images")])
def test_a_column_that_is_no_mask_is_refused(column, words, folder):
    with pytest.raises(ValueError, match=rf"\(--mask_column\).*{words}"):
        load(folder, mask_column=column)


@pytest.mark.parametrize("most", [None, 2])
def test_streamed_masks(most, tmp_path):
    """Of parquet files, with the image's file in bytes."""

    def file(picture):
        content = io.BytesIO()
        picture.save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    rows = [{"image": file(static(seed=k)), "text": str(k), "mask": file(half(64, 48))} for k in range(3)]
    Dataset.from_list([*rows, rows[0] | {"mask": None}]).to_parquet(tmp_path / "0.parquet")
    config = settings(
        train_data_dir=str(tmp_path), streaming=True, mask_column="mask", center_crop=True, max_train_samples=most
    )
    dataset, _ = load_streamed_images(config.data, 0, str(tmp_path / "cache"))
    objective = Epsilon(training_scheduler("epsilon", FlowMatchEulerDiscreteScheduler()))
    images = training_images(dataset, objective, SPACE, config.data, Diffusion(), 0)
    images.check()
    if most is not None:
        assert images[0, 1]["mask"].mean().item() == pytest.approx(0.5, abs=0.02)
        return
    keys = next(iter(images.batches(4, 0, 1, 0)))
    means = sorted(images[key]["mask"].mean().item() for key in keys)
    assert means == pytest.approx([0.5, 0.5, 0.5, 1.0], abs=0.02)


# The diffusion loss --------------------------------------------------------------------------------------------------


class Output(torch.nn.Module):
    """A model whose output is a parameter."""

    def __init__(self, shape):
        super().__init__()
        self.output = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    def conditions(self, batch, device):
        return None

    def forward(self, noisy_latents, timesteps, conditions):
        return self.output


@pytest.fixture(scope="module")
def vae(sd_pipeline):
    return AutoencoderKL.from_pretrained(sd_pipeline / "vae").requires_grad_(False)


def losses_of(vae, mask, share=0.0, objective="epsilon", **diffusion):
    """The errors of a batch of 2, and the gradient of their mean at the model's output."""
    factor, (height, width) = 4, (6, 8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 2, 4, height, width, generator=generator)
    batch = {
        "pixels": torch.rand(2, 3, height * factor, width * factor, generator=generator) * 2 - 1,
        "noise": noise[0],
        "posterior_noise": noise[1],
        "timestep": torch.tensor([10, 20]),
        "lpl_choice": torch.zeros(2, 2),
    }
    if mask is not None:
        batch["mask"] = mask
    scheduler = training_scheduler(objective, FlowMatchEulerDiscreteScheduler())
    kind = {"epsilon": Epsilon, "flow_matching": FlowMatching}[objective](scheduler)
    settings = Lpl(lpl_weight="0"), Diffusion(**diffusion), None, share
    losses = script.Losses(Namespace(vae=vae), kind, None, *settings)
    model = Output((2, 4, height, width))
    found = losses(model, batch, with_lpl=False)
    found.diffusion_loss.backward()
    return found.errors.detach(), model.output.grad


PRECONDITIONED = {"objective": "flow_matching", "precondition_outputs": 1}


@pytest.mark.parametrize("options", [{}, PRECONDITIONED])
def test_the_diffusion_loss_under_a_mask(options, vae):
    plain, gradient = losses_of(vae, None, **options)
    white = torch.ones(2, 1, 24, 32)
    for share in (0.0, 0.1):
        errors, same = losses_of(vae, white, share, **options)
        assert torch.equal(errors, plain) and torch.equal(same, gradient)
    mask = white.clone()
    mask[..., 18:] = 0  # up to the middle of a latent position
    mask[1] = 0
    errors, masked_gradient = losses_of(vae, mask, **options)
    weights = torch.ones(8)
    weights[4], weights[5:] = 0.5, 0
    expected = gradient[0] * weights * 8 / 4.5
    assert torch.allclose(masked_gradient[0], expected) and not masked_gradient[0, ..., 5:].any()
    assert errors[1] == 0 and not masked_gradient[1].any()
    share = 0.25
    mixed, _ = losses_of(vae, mask, share, **options)
    assert torch.allclose(mixed, share * plain + (1 - share) * errors)


def test_the_diffusion_loss_is_the_mean_over_the_mask(vae):
    """It does not depend on the mask's area: the whole is the mean of both halves."""
    left = torch.zeros(2, 1, 24, 32)
    left[..., :16] = 1
    (one, _), (other, _), (whole, _) = (losses_of(vae, mask) for mask in (left, 1 - left, None))
    assert torch.allclose((one + other) / 2, whole) and (one > 0).all() and (other > 0).all()


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transparent(tmp_path_factory):
    """RGBA files, opaque in their left halves."""
    folder = tiny_image_folder(tmp_path_factory.mktemp("transparent") / "images", count=4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        file = folder / row["file_name"]
        picture = Image.open(file).convert("RGB")
        file.unlink()
        row["file_name"] = file.with_suffix(".png").name
        with_alpha(picture, half(*picture.size)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_run_with_alpha_masks(sd_pipeline, transparent, tmp_path, monkeypatch):
    """Both losses get them, those of the held-out images too."""
    seen = []
    pooled = LossMask.pooled
    monkeypatch.setattr(LossMask, "pooled", lambda mask, size: seen.append(mask) or pooled(mask, size))
    folder = train(
        sd_pipeline,
        transparent,
        tmp_path / "run",
        alpha_mask=True,
        unmasked_weight=0.1,
        validation_every_nth=2,
        random_flip=True,
        lpl_weight="0.5",
    )
    assert seen and all(mask.unmasked_weight == 0.1 for mask in seen)
    assert all(0.2 < mask.pixels.mean() < 0.8 for mask in seen)
    assert all(0 < kept < 0.9 for (kept,) in metrics(folder, "kept/mid")) and validation_metrics(folder)
    assert "loss masks from the images' transparency, weight 0.1 outside" in (folder / "README.md").read_text()


def test_two_sources_of_masks_are_refused(sd_pipeline, image_folder, tmp_path, capsys):
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", alpha_mask=True, mask_column="mask")
    assert "--alpha_mask" in (said := refusal(capsys, words)) and "--mask_column mask" in said


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"alpha_mask": True}, "and --alpha_mask both say"),
        ({"mask_column": "other"}, "and --mask_column other both say"),
        ({"dataset_name": "user/pictures"}, "has masks for a folder of images"),
        ({"mask_data_dir": "nowhere"}, "--mask_data_dir nowhere: there is no such folder"),
    ],
)
def test_what_a_folder_of_masks_does_not_go_with(flags, words, sd_pipeline, image_folder, tmp_path, capsys):
    flags = {"mask_data_dir": str(tmp_path), **flags}
    assert words in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path / "out", **flags))


@pytest.mark.parametrize("flags, words", [({}, "--unmasked_weight has no"), ({"alpha_mask": True}, "masks have no")])
def test_weights_without_effect_are_said(flags, words, sd_pipeline, image_folder, tmp_path):
    said = warned(sd_pipeline, image_folder, tmp_path / "out", unmasked_weight=1, **flags)
    assert any(words in line for line in said)
