"""Whole runs of the training script on tiny pipelines."""

import math
import os
import shutil
from unittest import mock

import bitsandbytes
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from PIL import Image
from tiny import WITHOUT_T5
from trainer import launch, metrics, parsed, same, train, weights

from lpl import LatentPerceptualLoss, get_objective
from lpl.data.dataset import LatentSpace, TrainingImages, collate
from lpl.data.order import KeyedBatches
from lpl.data.source import load_training_images


# (loss, diffusion loss, LPL) of each step. To pin them again after a change that was meant to change them, copy the
# numbers that `pytest tests/runs/test_script.py -k pinned` shows.
PINNED_SD = [
    [1.16366, 1.16366, 1.55681],
    [1.33912, 1.04345, 1.58226],
    [1.30315, 1.11914, 1.04686],
    [1.31525, 1.09816, 1.09289],
]
PINNED_SD3 = [[4.14170, 4.14170, 0.0], [4.13626, 4.13626, 0.67115], [6.61384, 4.07681, 0.82278]]

# Everything that could go wrong at a resume: batches of 3 in a data set of 8, so that checkpoint-2, after 12 images,
# stands in the middle of an epoch; micro-batches; random flips; a weight that is still measured; a moving schedule.
RUN = {
    "max_train_steps": 4,
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "random_flip": True,
    "proportion_empty_prompts": 0.3,
    "lpl_measuring_steps": 3,
    "use_ema": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "checkpointing_steps": 2,
}
LOSSES = ("loss", "diffusion_loss", "lpl", "lpl_weight", "inside", "lr")


@pytest.fixture(scope="module")
def uninterrupted(sd_pipeline, image_folder, tmp_path_factory):
    return train(sd_pipeline, image_folder, tmp_path_factory.mktemp("uninterrupted"), **RUN)


@pytest.fixture
def no_decoder(monkeypatch):
    def decode(*args, **kwargs):
        raise AssertionError("the decoder was called")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)


def sampled(pipeline, **arguments):
    """An image of a saved pipeline, (1, 3, H, W) in [0, 1], made as the script's validation makes its first one."""
    if not isinstance(pipeline, DiffusionPipeline):
        pipeline = DiffusionPipeline.from_pretrained(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    arguments |= {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **arguments).images


def first_batch(pipeline, images, output_dir, size, **flags):
    """The samples that a run with these flags begins with, and the pipeline's scheduler."""
    config, description = parsed(pipeline, images, output_dir, **flags)
    objective = get_objective(config.model.objective, description.scheduler)
    seed = config.optimization.seed
    dataset, _ = load_training_images(config.data, seed, config.model.cache_dir)
    space = LatentSpace(*description.space)
    data = TrainingImages(dataset, objective, space, config.data, config.diffusion, seed)
    order = KeyedBatches(len(data), size, seed, 0, 1, 0)
    return collate([data[key] for key in next(iter(order))]), description.scheduler


# Launched ------------------------------------------------------------------------------------------------------------


def test_two_launched_processes_train_as_one_with_twice_the_accumulation(
    uninterrupted, sd_pipeline, image_folder, tmp_path
):
    both = RUN | {"gradient_accumulation_steps": 1}
    launch(sd_pipeline, image_folder, tmp_path, "--multi_gpu", "--num_processes=2", "--main_process_port=0", **both)
    for ours, theirs in zip(metrics(tmp_path, *LOSSES), metrics(uninterrupted, *LOSSES), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = weights(tmp_path / "unet"), weights(uninterrupted / "unet")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert (tmp_path / "loss_curves.png").is_file() and (tmp_path / "README.md").is_file()

    shutil.rmtree(tmp_path / "checkpoint-4")  # and one process goes on where two stopped
    train(sd_pipeline, image_folder, tmp_path, **RUN, resume_from_checkpoint="latest")
    names = ("diffusion_loss", "lpl", "inside", "lr")
    for ours, theirs in zip(metrics(tmp_path, *names), metrics(uninterrupted, *names), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_sd3_resumed_by_torchrun_equals_one_process(sd3_pipeline, image_folder, tmp_path):
    flags = {"use_ema": True, "checkpointing_steps": 2, "validation_prompts": ["a cat"], "validation_steps": 2}
    for steps in (2, 4):
        launch(
            *(sd3_pipeline, image_folder, tmp_path / "two", "--standalone", "--nproc_per_node=2"),
            **(flags | {"max_train_steps": steps, "resume_from_checkpoint": "latest"}),
            module="torch.distributed.run",
        )
    one = flags | {"max_train_steps": 4, "gradient_accumulation_steps": 2}
    train(sd3_pipeline, image_folder, tmp_path / "one", **one)
    for ours, theirs in zip(metrics(tmp_path / "two", *LOSSES), metrics(tmp_path / "one", *LOSSES), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = weights(tmp_path / "two" / "transformer"), weights(tmp_path / "one" / "transformer")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def check_only_the_denoiser_changed(folder, original, denoiser):
    before = weights(original)
    after = {key: value for key, value in weights(folder).items() if not key[0].startswith("checkpoint-")}
    changed = {name for (name, key), value in after.items() if not torch.equal(value, before[name, key])}
    assert after.keys() == before.keys()
    assert changed and all(name.startswith(f"{denoiser}/") for name in changed)
    assert all(value.dtype == torch.float32 for value in after.values())


# Reproducible --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted, sd_pipeline, image_folder, tmp_path):
    """A run is killed in its fourth step, and the same command is given again; loader workers make no difference."""
    killed = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(killed / "checkpoint-4")
    shutil.rmtree(killed / "unet")
    log = (killed / "metrics.jsonl").read_text()
    (killed / "metrics.jsonl").write_text(log[: log.rindex("{") + 20])
    train(
        sd_pipeline, image_folder, killed, **RUN, resume_from_checkpoint="latest", seed=None, dataloader_num_workers=2
    )
    assert metrics(killed) == metrics(uninterrupted)
    for part in ("unet", "checkpoint-4/unet", "checkpoint-4/ema/unet"):
        assert same(weights(killed / part), weights(uninterrupted / part)), part


def test_resuming_a_finished_run_trains_nothing(uninterrupted, sd_pipeline, image_folder, tmp_path, monkeypatch):
    finished = shutil.copytree(uninterrupted, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", None)
        train(sd_pipeline, image_folder, finished, **RUN, resume_from_checkpoint="latest")
    assert metrics(finished) == metrics(uninterrupted)
    assert same(weights(finished), weights(uninterrupted))


def test_pinned_sd(uninterrupted):
    """Epsilon, with the flags of RUN."""
    trajectory = metrics(uninterrupted, "loss", "diffusion_loss", "lpl")
    assert trajectory == [pytest.approx(step, rel=1e-3) for step in PINNED_SD], trajectory


def test_pinned_sd3(sd3_pipeline, image_folder, tmp_path):
    """Flow matching."""
    train(sd3_pipeline, image_folder, tmp_path, train_batch_size=4, max_train_steps=3)
    trajectory = metrics(tmp_path, "loss", "diffusion_loss", "lpl")
    assert trajectory == [pytest.approx(step, rel=1e-3) for step in PINNED_SD3], trajectory


# The losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded(pipeline, batch):
    """z0 by hand, scaled, and the captions' conditions by the pipeline."""
    posterior = pipeline.vae.encode(batch["pixels"]).latent_dist
    config = pipeline.vae.config
    raw = posterior.mean + posterior.std * batch["posterior_noise"]
    return (raw - (config.shift_factor or 0)) * config.scaling_factor


@torch.no_grad()
def sd_step(folder, images, output_dir, batch_size, **flags):
    """(L_diffusion, z0, z0_hat, sigma) of the first step, by hand: epsilon with min-SNR and perturbed input."""
    batch, scheduler = first_batch(folder, images, output_dir, batch_size, **flags)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    latents, noise, timesteps = encoded(pipeline, batch), batch["noise"], batch["timestep"]
    signal = scheduler.alphas_cumprod[timesteps]  # abar, (B,)
    a, b = signal.sqrt().view(-1, 1, 1, 1), (1 - signal).sqrt().view(-1, 1, 1, 1)
    noisy = a * latents + b * (noise + flags["input_perturbation"] * batch["input_noise"])
    prompts, _ = pipeline.encode_prompt(batch["caption"], "cpu", 1, False)
    output = pipeline.unet(noisy, timesteps, prompts).sample
    losses = torch.stack([(a - b).square().mean() for a, b in zip(output, noise)])
    snr = signal / (1 - signal)
    weight = snr.clamp(max=flags["snr_gamma"]) / snr
    return (weight * losses).mean(), latents, (noisy - b * output) / a, snr**-0.5


@torch.no_grad()
def sd3_step(folder, images, output_dir, batch_size, **flags):
    """The same: flow matching."""
    batch, _ = first_batch(folder, images, output_dir, batch_size, **flags)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    latents, noise, timesteps = encoded(pipeline, batch), batch["noise"], batch["timestep"]
    t = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - t) * latents + t * noise
    captions = batch["caption"]
    prompts, _, pooled, _ = pipeline.encode_prompt(
        captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=77
    )
    output = pipeline.transformer(noisy, prompts, pooled, timesteps).sample
    clean = noisy - t * output
    error = clean - latents if flags.get("precondition_outputs") else output - (noise - latents)
    weight = t**-2 if flags.get("weighting_scheme") == "sigma_sqrt" else 1
    return (weight * error.square()).mean(), latents, clean, (t / (1 - t)).flatten()


STEPS = {
    "sd": ("sd_pipeline", sd_step, {"snr_gamma": 0.5, "input_perturbation": 0.1, "noise_offset": 0.1}),
    "sd3": ("sd3_pipeline", sd3_step, {}),
    "sd3-preconditioned": ("sd3_pipeline", sd3_step, {"weighting_scheme": "sigma_sqrt", "precondition_outputs": 1}),
}


@pytest.fixture(scope="module", params=STEPS)
def plain(request, image_folder, tmp_path_factory):
    """One step without LPL and without a decoder, for each family: (folder of the run, pipeline, by hand, flags)."""
    name, by_hand, flags = STEPS[request.param]
    flags = flags | {"max_train_steps": 1, "train_batch_size": 5}
    pipeline, output_dir = request.getfixturevalue(name), tmp_path_factory.mktemp("plain")
    with mock.patch.object(AutoencoderKL, "decode", None):
        train(pipeline, image_folder, output_dir, **flags, lpl_weight=0)
    return output_dir, pipeline, by_hand, flags


def test_the_baseline_is_the_plain_diffusion_loss_and_touches_no_decoder(plain, image_folder, tmp_path):
    output_dir, pipeline, by_hand, flags = plain
    loss, *_ = by_hand(pipeline, image_folder, tmp_path, 5, **flags, lpl_weight=0)
    (record,) = metrics(output_dir)
    assert record["loss"] == record["diffusion_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["lpl_weight"] == 0 and not {"lpl", "lpl_share"} & record.keys()


def test_the_loss_is_eq_3(plain, image_folder, tmp_path, monkeypatch):
    """L_total = L_diffusion + w/B * sum of LPL over the samples inside the threshold; it changes what is learned."""
    without, pipeline, by_hand, flags = plain
    threshold = {"lpl_sigma_threshold": 1.0, "lpl_threshold_base_resolution": 16}  # tau is 2 at 32 px
    flags = flags | threshold | {"lpl_weight": 0.7}
    made = kept_losses(monkeypatch)
    train(pipeline, image_folder, tmp_path, **flags)

    loss, latents, clean, sigma = by_hand(pipeline, image_folder, tmp_path, 5, **flags)
    inside = sigma <= 2.0
    assert 0 < inside.sum() < 5, sigma  # else the test tells nothing
    vae = AutoencoderKL.from_pretrained(pipeline / "vae")
    lpl = LatentPerceptualLoss(vae)(clean[inside], latents[inside]).sum().item() / 5
    (record,) = metrics(tmp_path)
    assert record["diffusion_loss"] == metrics(without)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["lpl"] == pytest.approx(lpl, rel=1e-4) and record["inside"] == pytest.approx(inside.sum().item() / 5)
    assert record["loss"] == pytest.approx(loss.item() + 0.7 * lpl, rel=1e-4)
    assert record["lpl_share"] == pytest.approx(0.7 * lpl / record["loss"], rel=1e-4)
    assert not same(weights(tmp_path), weights(without))

    used = made[0].vae  # the pipeline's own, as it was
    assert same(used.state_dict(), vae.state_dict())
    assert all(parameter.grad is None for parameter in used.parameters())
    assert not any(module._forward_hooks for module in used.modules())


def kept_losses(monkeypatch):
    """The LatentPerceptualLoss objects that the script will make."""
    made = []

    def make(*args, **options):
        made.append(LatentPerceptualLoss(*args, **options))
        return made[-1]

    monkeypatch.setattr("lpl.training.losses.LatentPerceptualLoss", make)
    return made


def test_the_weight_is_fixed_when_the_share_is_measured(uninterrupted):
    records = metrics(uninterrupted)
    means = [sum(record[name] for record in records[:3]) for name in ("diffusion_loss", "lpl")]
    weight = 0.25 * means[0] / means[1]
    assert records[0]["lpl_weight"] == 0 and records[0]["loss"] == records[0]["diffusion_loss"]
    assert records[3]["lpl_weight"] == pytest.approx(weight, rel=1e-4)
    assert records[3]["loss"] == pytest.approx(records[3]["diffusion_loss"] + weight * records[3]["lpl"], rel=1e-4)


def test_samples_above_the_threshold_are_not_decoded(sd_pipeline, image_folder, tmp_path, no_decoder):
    train(sd_pipeline, image_folder, tmp_path, lpl_sigma_threshold=1e-6)
    assert metrics(tmp_path, "lpl", "inside", "lpl_weight") == [[0, 0, 0]] * 2


# Objectives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, objective, scheduler, prediction_type",
    [
        ("sd_v_pipeline", None, "PNDMScheduler", "v_prediction"),
        ("sd_pipeline", "v_prediction", "DDIMScheduler", "v_prediction"),
        ("sd_pipeline", "sample", "DDIMScheduler", "sample"),
        ("sd_pipeline", "flow_matching", "DPMSolverMultistepScheduler", "flow_prediction"),
        ("sd3_pipeline", "epsilon", "DDIMScheduler", "epsilon"),
    ],
)
@pytest.mark.filterwarnings("ignore:--prediction_type")
def test_the_saved_scheduler_samples_what_was_trained(
    name, objective, scheduler, prediction_type, image_folder, tmp_path, request
):
    folder = request.getfixturevalue(name)
    train(folder, image_folder, tmp_path, prediction_type=objective, max_train_steps=1, validation_prompts=["a cat"])
    saved = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(saved.scheduler).__name__ == scheduler
    assert saved.scheduler.config.prediction_type == prediction_type
    assert metrics(tmp_path)[0]["inside"] > 0 and metrics(tmp_path)[0]["lpl"] > 0

    length = {"max_sequence_length": 77} if name == "sd3_pipeline" else {}
    image = (sampled(saved, **length)[0] * 255).permute(1, 2, 0).numpy()
    seen = np.asarray(Image.open(tmp_path / "samples" / "step-000001" / "00.png"), float)
    assert np.abs(image - seen).max() < 1  # what validation showed is what one gets


# The saved pipeline --------------------------------------------------------------------------------------------------


def test_the_saved_pipeline_samples_with_what_was_trained(uninterrupted, sd_pipeline):
    check_only_the_denoiser_changed(uninterrupted, sd_pipeline, "unet")
    image = sampled(uninterrupted)
    assert image.isfinite().all() and not torch.equal(image, sampled(sd_pipeline))


@pytest.fixture(scope="module")
def sd3_without_t5_run(sd3_without_t5, image_folder, tmp_path_factory):
    flags = {"mixed_precision": "bf16", "validation_prompts": ["a cat"]}
    return train(sd3_without_t5, image_folder, tmp_path_factory.mktemp("without_t5"), **flags)


def test_the_card_of_sd3_without_t5_says_how_to_load_it(sd3_without_t5_run):
    assert "text_encoder_3=None" in (sd3_without_t5_run / "README.md").read_text()


def test_sd3_without_t5(sd3_without_t5_run, sd3_without_t5):
    check_only_the_denoiser_changed(sd3_without_t5_run, sd3_without_t5, "transformer")
    assert sampled(DiffusionPipeline.from_pretrained(sd3_without_t5_run, **WITHOUT_T5)).isfinite().all()


# Options -------------------------------------------------------------------------------------------------------------


def test_every_option_at_once(sd_pipeline, image_folder, tmp_path, monkeypatch):
    used, loss = set(), mock.Mock(wraps=LatentPerceptualLoss)
    monkeypatch.setattr("lpl.training.losses.LatentPerceptualLoss", loss)

    def spied(cls, name):
        original = getattr(cls, name)

        def spy(self, *args, **kwargs):
            used.add((type(self).__name__, name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, spy)

    spied(bitsandbytes.optim.AdamW8bit, "__init__")
    spied(ModelMixin, "enable_gradient_checkpointing")
    train(
        sd_pipeline,
        image_folder,
        tmp_path,
        max_train_steps=5,
        snr_gamma=5.0,
        noise_offset=0.1,
        input_perturbation=0.1,
        proportion_empty_prompts=0.2,
        random_flip=True,
        center_crop=True,
        max_train_samples=6,
        image_interpolation_mode="bicubic",
        use_8bit_adam=True,
        gradient_checkpointing=True,
        lpl_gradient_checkpointing=True,
        use_ema=True,
        offload_ema=True,
        foreach_ema=True,
        ema_decay=0.9,
        scale_lr=True,
        gradient_accumulation_steps=2,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
        learning_rate=1e-3,
        mixed_precision="bf16",
        lpl_weight=0.4,
        lpl_start_step=1,
        lpl_ramp_steps=2,
        lpl_sigma_threshold=1000,
        lpl_vae_dtype="bfloat16",
        lpl_vae_name_or_path=sd_pipeline / "vae",
        lpl_blocks=["up_1", "mid"],
        lpl_depth_weighting=[1, 0.5],
        lpl_normalization="separate",
        lpl_detach_statistics=True,
        lpl_distance="l1",
        lpl_no_outlier_mask=True,
        validation_prompt="a cat",
        num_validation_images=2,
        validation_guidance_scale=2.0,
        checkpointing_steps=3,
        checkpoints_total_limit=1,
        logging_steps=1,
    )
    assert used == {
        ("AdamW8bit", "__init__"),
        ("UNet2DConditionModel", "enable_gradient_checkpointing"),
    }
    assert loss.call_args.kwargs == {
        "blocks": ("up_1", "mid"),
        "compile_for": None,
        "gradient_checkpointing": True,
        "normalization": "separate",
        "detach_statistics": True,
        "depth_weighting": (1, 0.5),
        "mask_outliers": False,
        "distance": "l1",
        "variant": "paper",
    }
    assert loss.call_args.args[0].dtype == torch.bfloat16
    records = metrics(tmp_path)
    assert [round(record["lpl_weight"], 5) for record in records] == [0, 0.2, 0.4, 0.4, 0.4]  # start and ramp
    assert ["lpl" in record and record["lpl"] > 0 for record in records] == [False, True, True, True, True]
    peak = 1e-3 * 2 * 2  # --scale_lr: batch size times micro-batches
    assert [record["lr"] for record in records] == pytest.approx(
        [0, *(peak * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
    )
    assert all(math.isfinite(record["loss"]) for record in records)
    check_only_the_denoiser_changed(tmp_path, sd_pipeline, "unet")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("norm", [0.01, 0.0])  # 0 = no clipping
def test_gradients_are_clipped_after_accumulation(norm, sd_pipeline, image_folder, tmp_path):
    """With a large epsilon Adam's first step is lr * gradient / epsilon: as long as the clipped gradient."""
    flags = {"adam_epsilon": 1.0, "adam_weight_decay": 0, "max_grad_norm": norm, "gradient_accumulation_steps": 2}
    train(sd_pipeline, image_folder, tmp_path, **flags, lpl_weight=0, max_train_steps=1, learning_rate=1.0)
    before, after = weights(sd_pipeline / "unet"), weights(tmp_path / "unet")
    update = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
    assert update == pytest.approx(norm, rel=0.02) if norm else update > 0.1


def test_epochs_are_turned_into_optimizer_steps(sd_pipeline, image_folder, tmp_path):
    """Two epochs of 8 images in steps of 3 * 1: 16 / 3 images, the last step goes into a third epoch."""
    flags = {"lpl_weight": 0, "max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 3}
    train(sd_pipeline, image_folder, tmp_path, **flags, lr_scheduler="linear", lr_warmup_steps=0)
    assert metrics(tmp_path, "step", "lr") == [[step + 1, pytest.approx(1e-3 * (1 - step / 6))] for step in range(6)]


def test_max_train_steps_goes_before_epochs(uninterrupted):
    assert [step for (step,) in metrics(uninterrupted, "step")] == [1, 2, 3, 4]  # and not 100 epochs


def test_logged_numbers_are_means_over_the_steps_between(uninterrupted, sd_pipeline, image_folder, tmp_path):
    train(sd_pipeline, image_folder, tmp_path, **RUN | {"logging_steps": 3, "checkpointing_steps": 3})
    every = metrics(uninterrupted, "diffusion_loss", "lpl", "inside")
    third, fourth = metrics(tmp_path, "diffusion_loss", "lpl", "inside")
    assert third == pytest.approx([sum(column) / 3 for column in zip(*every[:3])], rel=1e-5)
    assert fourth == pytest.approx(every[3], rel=1e-5)


def test_the_recipe_holds_every_flag_but_the_token(uninterrupted):
    recipe = yaml.safe_load((uninterrupted / "recipe.yaml").read_text())
    assert recipe["lr_scheduler"] == "cosine" and recipe["seed"] == 0 and recipe["lpl_weight"] == "auto:0.2"
    assert recipe["prediction_type"] == "epsilon" and recipe["ema_decay"] == 0.99975
    assert "hub_token" not in recipe


def test_half_precision_by_accelerates_configuration_is_refused_on_the_cpu(sd_pipeline, image_folder, tmp_path):
    with mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION="fp16"), pytest.raises(SystemExit, match="fp16"):
        train(sd_pipeline, image_folder, tmp_path, lpl_weight=0, max_train_steps=1)


def test_accelerates_own_gradient_accumulation_is_refused_where_it_differs(sd_pipeline, image_folder, tmp_path):
    own = mock.patch.dict(os.environ, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3")
    with own, pytest.raises(SystemExit, match="accumulates 3 micro-batches"):
        train(sd_pipeline, image_folder, tmp_path, lpl_weight=0, max_train_steps=1, gradient_accumulation_steps=2)


def test_a_data_set_without_a_readable_image_ends_in_a_sentence(sd_pipeline, image_folder, tmp_path):
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    with pytest.raises(SystemExit, match=f"{folder}: no image of the data set can be read"):
        train(sd_pipeline, folder, tmp_path / "out", lpl_weight=0)
