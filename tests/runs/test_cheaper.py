"""LPL on some of the steps, samples and positions: the same in expectation; and what a run shows of it."""

import json
import math
import shutil
from argparse import Namespace
from itertools import combinations, pairwise

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from helpers import latents_as_features, random_latents
from tiny import tiny_vae
from trainer import launch, metrics, same, script, train, validation_metrics, weights

from lpl import LatentPerceptualLoss
from lpl.config import held_out
from lpl.config.flag import flags_of
from lpl.config.groups import Diffusion, Lpl
from lpl.gate import random_window
from lpl.loss import Measured
from lpl.objectives import Epsilon
from lpl.training.log import Log
from lpl.training.losses import perceptual_loss


# All of it at once, as in the middle of a fine-tuning: with LPL are the steps 2, 4 and 6, and the weight of the first
# two is what the third has; checkpoint-3 stands in the middle of the measuring and of the ramp.
CHEAP = {
    "max_train_steps": 6,
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 3,
    "lpl_weight": "auto:0.25",
    "lpl_measuring_steps": 2,
    "lpl_start_step": 1,
    "lpl_ramp_steps": 4,
    "lpl_every": 2,
    "lpl_max_samples": 2,
    "lpl_crop": 16,
    "lpl_chunk_size": 1,
}
BLOCKS = ("mid", "up_0", "up_1", "up_2")


@pytest.fixture(scope="module")
def cheap(sd_pipeline, image_folder, tmp_path_factory):
    """(Folder of a run, [(micro-batch's step, its BatchLosses)], windows that LPL was taken in)."""
    terms, windows = [], []
    observe, call = Log.observe, LatentPerceptualLoss.__call__

    def observed(log, step, batch, losses, *args):
        terms.append((step, losses))
        observe(log, step, batch, losses, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "observe", observed)
        patch.setattr(
            LatentPerceptualLoss, "__call__", lambda loss, *args: windows.append(args[2]) or call(loss, *args)
        )
        folder = train(sd_pipeline, image_folder, tmp_path_factory.mktemp("cheap"), **CHEAP)
    return folder, terms, windows


# Expectation ---------------------------------------------------------------------------------------------------------


class Answer(torch.nn.Module):
    """A model that answers its input."""

    def conditions(self, batch, device):
        return None

    def forward(self, noisy_latents, timesteps, conditions):
        return noisy_latents.clone().requires_grad_()


class ByRow:
    """A loss whose value is the row's own number, taken from the latents' corner."""

    block_names = ("mid",)

    def __call__(self, predicted_latents, latents, window=None, mask=None):
        values = latents[:, 0, 0, 0] + 0 * predicted_latents.sum()
        self.last = Measured({"mid": values.detach()}, {"mid": torch.ones_like(values)})
        return values


def _batch():
    """Six samples, four of them inside."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    batch = {"pixels": torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1}
    return batch | {
        "noise": noise[0],
        "posterior_noise": noise[1],
        "timestep": torch.tensor([10, 990, 20, 300, 980, 5]),
    }


@pytest.fixture(scope="module")
def terms_of(sd_pipeline):
    """`terms_of(loss, choice, **flags)`: of a batch of six, four of them inside."""
    vae = AutoencoderKL.from_pretrained(sd_pipeline / "vae")
    objective = Epsilon(DiffusionPipeline.from_pretrained(sd_pipeline).scheduler)
    batch = _batch()

    def terms(loss, choice, **flags):
        lpl = Lpl(lpl_threshold_base_resolution=0, **flags)
        losses = script.Losses(Namespace(vae=vae), objective, loss, lpl, Diffusion())
        return losses(Answer(), batch | {"lpl_choice": torch.tensor(choice).view(6, 2)}, with_lpl=True)

    return terms


@pytest.fixture(scope="module")
def held_out_lpl(sd_pipeline):
    """`held_out_lpl(**flags)`: LPL of the held-out losses, on a batch of six."""
    vae = AutoencoderKL.from_pretrained(sd_pipeline / "vae")
    objective = Epsilon(DiffusionPipeline.from_pretrained(sd_pipeline).scheduler)
    batch = _batch() | {"lpl_choice": torch.rand(6, 2, generator=torch.Generator().manual_seed(1))}

    def lpl(**flags):
        group = held_out(Lpl(lpl_threshold_base_resolution=0, **flags))
        losses = script.Losses(Namespace(vae=vae), objective, perceptual_loss(vae, group, None), group, Diffusion())
        with torch.no_grad():
            return losses(Answer(), batch, with_lpl=True).lpl.item()

    return lpl


INSIDE = (0, 2, 3, 5)

# Another value of each flag whose declaration promises that the held-out losses do not read it
TRAINING_ONLY = {
    "lpl_measuring_steps": 3,
    "lpl_start_step": 7,
    "lpl_ramp_steps": 9,
    "lpl_every": 4,
    "lpl_max_samples": 2,
    "lpl_crop": 16,
    "lpl_project_conflicts": True,
    "lpl_gradient_checkpointing": True,
    "lpl_student": "user/student",
    "lpl_correct_every": 4,
}


def test_each_flag_of_training_only_is_tried():
    assert TRAINING_ONLY.keys() == {name for name, declared in flags_of(Lpl).items() if declared.training_only}


@pytest.mark.parametrize("name, value", TRAINING_ONLY.items())
def test_a_flag_of_training_only_leaves_the_held_out_losses_alone(name, value, held_out_lpl):
    assert held_out_lpl(**{name: value}) == held_out_lpl()


def test_other_flags_do_change_the_held_out_losses(held_out_lpl):
    assert held_out_lpl(lpl_distance="l1") != held_out_lpl()


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_over_all_subsets_is_lpl_of_all(variant, size, terms_of):
    """Value, and gradient at the model's output."""

    def found(chosen, **flags):
        choice = [[0.1 if row in chosen else 0.9, 0.0] for row in range(6)]
        terms = terms_of(ByRow(), choice, lpl_variant=variant, **flags)
        assert terms.inside == 4 and terms.rows == (len(chosen) if flags else 4)
        return terms.lpl

    subsets = list(combinations(INSIDE, size))
    values = torch.stack([found(chosen, lpl_max_samples=size) for chosen in subsets])
    whole = found(INSIDE)
    assert values.mean().item() == pytest.approx(whole.item(), rel=1e-5)
    assert values.std() > 0.01 * whole.abs()  # they do differ


def test_the_gradients_mean_over_all_subsets_is_that_of_all(terms_of):
    def gradient(chosen, **flags):
        terms = terms_of(loss, [[0.1 if row in chosen else 0.9, 0.0] for row in range(6)], **flags)
        return torch.autograd.grad(terms.lpl, terms.model_output)[0]

    loss = LatentPerceptualLoss(tiny_vae("sd"), blocks=("mid",))
    mean = torch.stack([gradient(chosen, lpl_max_samples=2) for chosen in combinations(INSIDE, 2)]).mean(0)
    whole = gradient(INSIDE)
    assert torch.allclose(mean, whole, atol=1e-6 * whole.abs().max().item(), rtol=1e-4) and whole.any()


def tiles(loss, predicted, latents, part):
    side, count = latents.shape[-1], (latents.shape[-1] // part) ** 2
    windows = [random_window(side, side, part, torch.tensor((number + 0.5) / count)) for number in range(count)]
    return torch.stack([loss(predicted, latents, window) for window in windows])


@pytest.mark.parametrize("part", [2, 4, 8])
def test_the_mean_over_all_tiles_is_lpl_of_the_whole_where_features_are_local(part):
    vae = tiny_vae("sd", torch.float64, use_post_quant_conv=False, scaling_factor=1.0)
    latents, predicted = (random_latents(vae, 2, 8, 8, seed) for seed in range(2))
    options = {"blocks": ("mid",), "mask_outliers": False, "normalization": "none"}
    with latents_as_features(vae, "mid"):
        loss = LatentPerceptualLoss(vae, **options)
        whole, parts = loss(predicted, latents), tiles(loss, predicted, latents, part)
    assert torch.allclose(parts.mean(0), whole) and (part == 8 or parts.std(0).min() > 0.01)


def test_a_tile_is_standardised_by_its_own_variance_which_is_the_bias_of_crops():
    """The variance over the whole is that within the tiles and between them; a tile knows the first part only."""
    vae = tiny_vae("sd", torch.float64, use_post_quant_conv=False, scaling_factor=1.0)
    latents, error = (random_latents(vae, 2, 8, 8, seed) for seed in range(2))
    with latents_as_features(vae, "mid"):
        loss = LatentPerceptualLoss(vae, blocks=("mid",), mask_outliers=False)
        even = tiles(loss, latents + 0.1 * error, latents, 4).mean(0) / loss(latents + 0.1 * error, latents)
        latents = latents + 2 * torch.linspace(-3, 3, 8, dtype=torch.float64)  # from dark to bright
        uneven = tiles(loss, latents + 0.1 * error, latents, 4).mean(0) / loss(latents + 0.1 * error, latents)
    assert (even - 1).abs().max() < 0.3 and uneven.min() > 2


# Runs ----------------------------------------------------------------------------------------------------------------


def test_steps_with_lpl_have_n_times_the_weight(sd_pipeline, image_folder, tmp_path):
    """Over n steps that makes what LPL on every step would have made; from the start step on."""
    flags = {"lpl_weight": 0.7, "lpl_every": 2, "lpl_start_step": 1, "lpl_sigma_threshold": 1000}
    train(sd_pipeline, image_folder, tmp_path, **flags, max_train_steps=4)
    first, second, third, fourth = metrics(tmp_path)
    for record in (first, third):
        assert record["loss"] == record["diffusion_loss"] and not {"lpl", "lpl_share", "lpl/mid"} & set(record)
    for record in (second, fourth):
        lpl = 0.7 * record["lpl"]
        assert record["loss"] == pytest.approx(record["diffusion_loss"] + 2 * lpl, rel=1e-5) and lpl > 0
        assert record["lpl_share"] == pytest.approx(lpl / (record["diffusion_loss"] + lpl), rel=1e-5)
    assert [record["lpl_weight"] for record in metrics(tmp_path)] == pytest.approx([0, 0.7, 0.7, 0.7])


def test_a_run_that_ends_before_its_second_step_with_lpl_says_so(sd_pipeline, image_folder, tmp_path, caplog):
    """The first one measures the weight, which no step has used then."""
    train(sd_pipeline, image_folder, tmp_path, lpl_every=4, max_train_steps=2, lpl_sigma_threshold=1000)
    assert metrics(tmp_path)[1]["lpl_weight"] > 0 and "no step was trained with LPL" in caplog.text


def test_samples_and_windows_that_a_run_looks_at(cheap):
    _, terms, windows = cheap
    with_lpl = [found for step, found in terms if step in (2, 4, 6)]
    assert len(terms) == 12 and all(found.rows == min(found.inside, 2) for found in with_lpl)
    assert not any(found.rows or found.with_lpl for step, found in terms if step not in (2, 4, 6))
    assert any(found.rows < found.inside for found in with_lpl)
    assert len(windows) == sum(found.rows > 0 for found in with_lpl)
    assert set(windows) <= {(top, left, 4, 4) for top in (0, 4) for left in (0, 4)} and len(set(windows)) > 1


def test_the_share_is_that_of_the_expected_loss(cheap):
    """w is measured on the two first steps with LPL and fixed; the ramp goes its way over all steps."""
    records = metrics(cheap[0])
    sums = [records[1][name] + records[3][name] for name in ("diffusion_loss", "lpl")]
    weight = 0.25 / 0.75 * sums[0] / sums[1]
    first = 0.25 / 0.75 * records[1]["diffusion_loss"] / records[1]["lpl"]  # after one step
    expected = [0, 0, first * 0.5, first * 0.75, weight, weight]
    assert [record["lpl_weight"] for record in records] == pytest.approx(expected, rel=1e-4)
    last = records[-1]
    assert last["loss"] == pytest.approx(last["diffusion_loss"] + 2 * weight * last["lpl"], rel=1e-4)


def test_a_run_resumed_within_measuring_and_ramp_equals_an_uninterrupted_one(
    cheap, sd_pipeline, image_folder, tmp_path
):
    killed = shutil.copytree(cheap[0], tmp_path / "run")
    shutil.rmtree(killed / "checkpoint-6")
    train(sd_pipeline, image_folder, killed, **CHEAP, resume_from_checkpoint="latest")
    assert metrics(killed) == metrics(cheap[0])
    assert same(weights(killed / "unet"), weights(cheap[0] / "unet"))


@pytest.mark.slow
def test_two_processes_with_different_numbers_inside_are_one_with_twice_the_accumulation(
    cheap, sd_pipeline, image_folder, tmp_path
):
    """Loss and weight, and all that is seen of LPL."""
    folder, terms, _ = cheap
    pairs = [(first.inside, second.inside) for (_, first), (_, second) in list(pairwise(terms))[::2]]
    assert any(first != second for first, second in pairs), pairs
    both = CHEAP | {"gradient_accumulation_steps": 1}
    launch(sd_pipeline, image_folder, tmp_path, "--multi_gpu", "--num_processes=2", "--main_process_port=0", **both)
    for ours, theirs in zip(metrics(tmp_path), metrics(folder), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_the_held_out_losses_are_those_of_a_run_that_looks_at_everything(sd_pipeline, image_folder, tmp_path):
    flags = {"validation_every_nth": 2, "max_train_steps": 1, "train_batch_size": 3}
    cheaper = {"lpl_every": 2, "lpl_max_samples": 1, "lpl_crop": 16}
    runs = [train(sd_pipeline, image_folder, tmp_path / str(len(more)), **flags, **more) for more in ({}, cheaper)]
    first, second = (validation_metrics(run)[0] for run in runs)
    assert first == pytest.approx(second, rel=1e-5) and first[2] > 0


def test_options_of_masks_and_memory_reach_the_loss(sd_pipeline, image_folder, tmp_path, monkeypatch):
    made = []

    def make(vae, **options):
        made.append(options)
        return LatentPerceptualLoss(vae, **options)

    monkeypatch.setattr("lpl.training.losses.LatentPerceptualLoss", make)
    outliers = {"quantile": 0.1, "margin": 0.5, "dilation": 9, "erosion": 7, "stride": 2}
    flags = {f"lpl_outlier_{name}": value for name, value in outliers.items()}
    one = train(sd_pipeline, image_folder, tmp_path / "one", **flags, max_train_steps=1, lpl_chunk_size=1)
    assert made[0]["outliers"] == outliers and made[0]["chunk_size"] == 1
    two = train(sd_pipeline, image_folder, tmp_path / "two", max_train_steps=1, lpl_outlier_margin=3)
    assert made[1]["outliers"] == {"margin": 3} and "chunk_size" not in made[1]
    assert metrics(one, "lpl") != metrics(two, "lpl")


@pytest.mark.parametrize("precision, dtype", [("bf16", "bfloat16"), ("no", "float32")])
def test_the_decoders_precision_is_recorded(precision, dtype, sd_pipeline, image_folder, tmp_path, monkeypatch):
    used = []
    call = LatentPerceptualLoss.__call__
    monkeypatch.setattr(
        LatentPerceptualLoss, "__call__", lambda self, *args: used.append(self.vae.dtype) or call(self, *args)
    )
    flags = {"max_train_steps": 1, "lpl_sigma_threshold": 1e6, "validation_every_nth": 2}
    run = train(sd_pipeline, image_folder, tmp_path, mixed_precision=precision, **flags)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["lpl_vae_dtype"] == dtype
    assert set(used) == {getattr(torch, dtype)} and len(used) > 1, "the step and the validation losses"


# What is seen ----------------------------------------------------------------------------------------------------


def test_the_parts_of_blocks_add_up_to_lpl(cheap):
    for record in metrics(cheap[0])[1::2]:
        parts = [record[f"lpl/{name}"] for name in BLOCKS]
        assert sum(parts) == pytest.approx(record["lpl"], rel=1e-4) and min(parts) > 0
        assert all(0 < record[f"kept/{name}"] <= 1 for name in BLOCKS)


def test_without_lpl_nothing_of_it_is_seen(sd_pipeline, image_folder, tmp_path):
    train(sd_pipeline, image_folder, tmp_path, lpl_weight=0, validation_every_nth=2, max_train_steps=1)
    (record,) = metrics(tmp_path)
    assert not [name for name in record if "/" in name or name in ("lpl", "lpl_share", "lpl_gradient_share")]


@pytest.mark.filterwarnings("ignore:--prediction_type")
def test_the_gradients_share_by_hand(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """Where z0_hat = D, LPL's gradient at the output is that of the loss; the other's norm is 2 sqrt(L / numel)."""
    pairs, call = [], LatentPerceptualLoss.__call__
    monkeypatch.setattr(
        LatentPerceptualLoss, "__call__", lambda loss, *args: pairs.append(args[:2]) or call(loss, *args)
    )
    flags = {"prediction_type": "sample", "lpl_weight": 0.3, "max_train_steps": 1, "train_batch_size": 4}
    train(sd_pipeline, image_folder, tmp_path, **flags)
    (record,) = metrics(tmp_path)
    predicted, latents = pairs[0][0].detach().requires_grad_(), pairs[0][1]
    loss = LatentPerceptualLoss(AutoencoderKL.from_pretrained(sd_pipeline / "vae"))
    (gradient,) = torch.autograd.grad(0.3 * call(loss, predicted, latents).sum() / 4, predicted)
    of_lpl, of_diffusion = gradient.norm().item(), 2 * math.sqrt(record["diffusion_loss"] / (4 * 4 * 8 * 8))
    assert record["lpl_gradient_share"] == pytest.approx(of_lpl / (of_lpl + of_diffusion), rel=1e-3)


@pytest.mark.filterwarnings("ignore:--prediction_type")
def test_projection_changes_the_update_and_no_loss_of_the_same_weights(sd_pipeline, image_folder, tmp_path):
    """Random weights conflict here."""
    flags = {"prediction_type": "flow_matching", "train_batch_size": 4, "lpl_weight": 0.3, "lpl_sigma_threshold": 1000}
    options = {"projected": {"lpl_project_conflicts": True}, "plain": {}}
    runs = [train(sd_pipeline, image_folder, tmp_path / name, **flags | options[name]) for name in options]
    (ours, our_next), (others, other_next) = map(metrics, runs)
    assert ours.pop("lpl_gradient_share") < others.pop("lpl_gradient_share")
    assert ours == others and ours["lpl_gradient_cosine"] < 0
    assert our_next["loss"] != other_next["loss"] and not same(*(weights(run / "unet") for run in runs))


def test_looking_changes_nothing(cheap, sd_pipeline, image_folder, tmp_path):
    """With an entry after every step or after none but the last, the weights are the same."""
    train(sd_pipeline, image_folder, tmp_path, **CHEAP | {"logging_steps": 100, "checkpointing_steps": 100})
    assert same(weights(tmp_path / "unet"), weights(cheap[0] / "unet"))
    assert [record["step"] for record in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [6]
