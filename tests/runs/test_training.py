"""What a run can train and how: LoRA, text encoders, fresh weights, DREAM, held-out samples, recipes, dry runs."""

import json
import math
import re
import shlex
import shutil
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from tiny import tiny_vae
from trainer import arguments, launch, metrics, run, same, script, train, validation_metrics, weights
from transformers import CLIPConfig, CLIPImageProcessorPil

from lpl.autoencoders import encode
from lpl.config.groups import Diffusion, Lpl
from lpl.families.sd3 import StableDiffusion3
from lpl.objectives import Epsilon
from lpl.training import start, updates
from lpl.training.loading import fresh_denoiser
from lpl.training.updates import make_optimizer


LORA = {"rank": 2, "learning_rate": 1e-2}


def trained_from(folder):
    """The weights that a run left outside its checkpoints."""
    return {key: value for key, value in weights(folder).items() if not key[0].startswith("checkpoint-")}


def changed_parts(before, after):
    """The pipeline's components whose weights differ."""
    return {key[0].split("/")[0] for key, value in after.items() if not torch.equal(value, before[key])}


# LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_run(sdxl_pipeline, image_folder, tmp_path_factory):
    """LoRA on the denoiser and both text encoders, with EMA and a checkpoint in the middle."""
    flags = LORA | {"train_text_encoder": True, "use_ema": True, "max_train_steps": 4, "checkpointing_steps": 2}
    return flags, train(sdxl_pipeline, image_folder, tmp_path_factory.mktemp("lora"), **flags)


def test_a_resumed_lora_equals_an_uninterrupted_one(lora_run, sdxl_pipeline, image_folder, tmp_path):
    flags, whole = lora_run
    killed = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(killed / "checkpoint-4")
    train(sdxl_pipeline, image_folder, killed, **flags, resume_from_checkpoint="latest")
    assert metrics(killed) == metrics(whole)
    assert same(weights(killed), weights(whole))


def test_text_encoders_get_lora_too(lora_run):
    parts = {key.split(".")[0] for _, key in trained_from(lora_run[1])}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    learned = {
        key.split(".")[0] for (_, key), value in trained_from(lora_run[1]).items() if "lora_B" in key and value.any()
    }
    assert learned == parts


def test_the_lora_that_is_saved_is_the_average(lora_run):
    _, folder = lora_run
    average, last = (weights(folder / "checkpoint-4" / part) for part in ("ema", "."))
    name = ("pytorch_lora_weights.safetensors",)
    for (file, key), value in average.items():
        assert torch.equal(value, trained_from(folder)[file, key]) and (file,) == name
    assert any(not torch.equal(value, last[key]) for key, value in average.items())


@pytest.mark.parametrize("changes", [{"rank": 3}, {"lora_target_modules": ["to_q"]}])
def test_resuming_another_lora_is_refused(changes, lora_run, sdxl_pipeline, image_folder, tmp_path):
    flags, whole = lora_run
    folder = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"--resume_from_checkpoint checkpoint-4.*--rank and --lora_target_modules"):
        train(sdxl_pipeline, image_folder, folder, **flags | changes, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "family, flags",
    [
        ("sd", {"lora_alpha": 7}),
        ("sd", {"use_dora": True}),
        ("sd3", {"use_rslora": True, "lora_alpha": 3}),
        ("sd3", {"lora_target_modules": ["attn.to_q", "proj_out"]}),
        ("sd", {"train_text_encoder": True, "use_dora": True, "lora_alpha": 1}),
    ],
    ids=str,
)
def test_load_lora_weights_gives_what_was_trained(family, flags, request, image_folder, tmp_path):
    """Alpha, DoRA and rsLoRA travel in the file: the pipeline draws what the run drew at its end."""
    folder = request.getfixturevalue(f"{family}_pipeline")
    train(folder, image_folder, tmp_path, **LORA | flags, lora_dropout=0.1, validation_prompts=["a cat"])
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2}
    arguments |= {"max_sequence_length": 77} if family == "sd3" else {}

    def image():
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipeline("a cat", generator=generator, **arguments).images[0], float)

    before = image()
    pipeline.load_lora_weights(tmp_path)
    seen = np.asarray(script_image(tmp_path), float)
    assert np.abs(image() - seen).max() <= 1 < np.abs(before - seen).max()


def script_image(folder):
    return Image.open(sorted((folder / "samples").glob("step-*/00.png"))[-1])


def test_dropout_and_targets_reach_the_model(sd_pipeline, image_folder, tmp_path, monkeypatch):
    made = []

    def kept(*args, **options):
        made.append(original(*args, **options))
        return made[-1]

    original = start.TrainedParts
    monkeypatch.setattr(start, "TrainedParts", kept)
    train(sd_pipeline, image_folder, tmp_path, **LORA, lora_dropout=0.25, lora_target_modules=["to_q"])
    config = made[0].denoiser.peft_config["default"]
    assert config.lora_dropout == 0.25 and config.target_modules == {"to_q"}
    names = {name for name, parameter in made[0].named_parameters() if parameter.requires_grad}
    assert names and all(".to_q." in name and "lora_" in name for name in names)


# Text encoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, trained",
    [("sd", {"unet", "text_encoder"}), ("sd3", {"transformer", "text_encoder", "text_encoder_2"})],
)
def test_text_encoders_trained_whole_are_saved(family, trained, request, image_folder, tmp_path):
    pipeline = request.getfixturevalue(f"{family}_pipeline")
    train(pipeline, image_folder, tmp_path, train_text_encoder=True, text_encoder_lr=1e-3, mixed_precision="bf16")
    assert changed_parts(weights(pipeline), trained_from(tmp_path)) == trained
    assert DiffusionPipeline.from_pretrained(tmp_path)


def test_text_encoders_have_a_learning_rate_and_weight_decay_of_their_own(sd3_pipeline, image_folder, tmp_path):
    """With Adam's first step every weight moves by about its learning rate."""
    flags = {"train_text_encoder": True, "learning_rate": 1e-3, "adam_weight_decay": 0, "max_train_steps": 1}
    flags |= {"text_encoder_lr": 1e-5, "adam_weight_decay_text_encoder": 0}
    train(sd3_pipeline, image_folder, tmp_path, **flags)
    before, after = weights(sd3_pipeline), trained_from(tmp_path)
    moved = {"transformer": 0.0, "text_encoder": 0.0}
    for (file, key), value in after.items():
        if (part := file.split("/")[0]) in moved:
            moved[part] = max(moved[part], (value - before[file, key]).abs().max().item())
    assert moved == {"transformer": pytest.approx(1e-3, rel=0.05), "text_encoder": pytest.approx(1e-5, rel=0.05)}


def test_text_encoders_have_a_weight_decay_of_their_own(sd3_pipeline, image_folder, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(updates, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[-1])
    flags = {"train_text_encoder": True, "adam_weight_decay": 0.3, "adam_weight_decay_text_encoder": 0.7}
    train(sd3_pipeline, image_folder, tmp_path, **flags, max_train_steps=1)
    assert [group["weight_decay"] for group in made[0].param_groups] == [0.3, 0.7]


@pytest.mark.slow
def test_two_processes_with_text_encoders_that_are_partly_unused(sdxl_pipeline, image_folder, tmp_path):
    flags = {"train_text_encoder": True, "text_encoder_lr": 1e-3, "max_train_steps": 2}
    launch(sdxl_pipeline, image_folder, tmp_path / "two", "--multi_gpu", "--num_processes=2", **flags)
    train(sdxl_pipeline, image_folder, tmp_path / "one", **flags, gradient_accumulation_steps=2)
    for ours, theirs in zip(metrics(tmp_path / "two", "loss"), metrics(tmp_path / "one", "loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_an_ema_goes_on_with_the_decay_given(sd_pipeline, image_folder, tmp_path):
    flags = {"use_ema": True, "lpl_weight": 0, "checkpointing_steps": 1}
    train(sd_pipeline, image_folder, tmp_path, **flags, max_train_steps=1, ema_decay=1.0)
    train(
        *(sd_pipeline, image_folder, tmp_path),
        **flags,
        max_train_steps=2,
        ema_decay=0.0,
        resume_from_checkpoint="latest",
    )
    average, trained = (weights(tmp_path / "checkpoint-2" / folder) for folder in ("ema/unet", "unet"))
    assert all(torch.allclose(average[name], trained[name], atol=1e-6) for name in trained)


def test_a_safety_checker_is_no_part_of_the_training_and_stays_in_the_result(sd_pipeline, image_folder, tmp_path):
    """It would blacken samples, on whatever device it was forgotten."""
    pipeline = DiffusionPipeline.from_pretrained(sd_pipeline)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=processor)
    pipeline.save_pretrained(tmp_path / "pipeline")
    with mock.patch.object(StableDiffusionSafetyChecker, "forward", None):
        train(tmp_path / "pipeline", image_folder, tmp_path / "out", validation_prompts=["a cat"], max_train_steps=1)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker, StableDiffusionSafetyChecker)


# What a run starts from ----------------------------------------------------------------------------------------------


def test_from_scratch_loads_no_denoiser(dit_pipeline, class_folder, tmp_path):
    """The denoiser's weights are not even there; what is saved has no variance that nobody has trained."""
    pipeline = shutil.copytree(dit_pipeline, tmp_path / "pipeline")
    for file in (pipeline / "transformer").glob("*.safetensors"):
        file.unlink()
    out = tmp_path / "out"
    train(pipeline, class_folder, out, from_scratch=True, learning_rate=1e-2, max_train_steps=3)
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["out_channels"] == config["in_channels"] == 4
    losses = [loss for (loss,) in metrics(out, "diffusion_loss")]
    assert losses[0] == pytest.approx(1.0, abs=0.15)  # it begins by answering zero, and eps has variance 1
    again = DiffusionPipeline.from_pretrained(out)
    assert again([0], num_inference_steps=2, output_type="pt").images.isfinite().all()
    assert again.labels["cats"] == 0


def test_from_scratch_depends_on_the_seed_only(sd3_pipeline, image_folder, tmp_path):
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        folder = train(sd3_pipeline, image_folder, tmp_path / str(number), from_scratch=True, seed=seed)
        runs.append(weights(folder / "transformer"))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_a_fresh_denoiser_answers_zero(sd3_pipeline):
    index = json.loads((sd3_pipeline / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    denoiser = fresh_denoiser(Namespace(family=StableDiffusion3, denoiser=index))
    own = DiffusionPipeline.from_pretrained(sd3_pipeline).transformer
    assert denoiser.config.num_layers == own.config.num_layers
    inputs = {"encoder_hidden_states": torch.randn(1, 4, 32), "pooled_projections": torch.randn(1, 40)}
    assert not denoiser(torch.randn(1, 16, 8, 8), timestep=torch.tensor([5.0]), **inputs).sample.any()
    blocks = [module for module in denoiser.modules() if type(module).__name__.startswith("AdaLayerNorm")]
    assert blocks and not any(block.linear.weight.any() for block in blocks)  # the gates are shut


def test_another_vae_is_used_and_saved(sd_pipeline, image_folder, tmp_path):
    tiny_vae("sd", seed=5).save_pretrained(tmp_path / "vae")
    out = train(sd_pipeline, image_folder, tmp_path / "out", pretrained_vae_model_name_or_path=tmp_path / "vae")
    plain = train(sd_pipeline, image_folder, tmp_path / "plain")
    assert same(weights(out / "vae"), weights(tmp_path / "vae"))
    assert metrics(out, "loss") != metrics(plain, "loss")


@pytest.mark.parametrize("kind", ["asymmetric", "tiny"])
@pytest.mark.parametrize("flag", ["pretrained_vae_model_name_or_path", "lpl_vae_name_or_path"])
def test_vaes_of_other_classes(kind, flag, sd_pipeline, image_folder, tmp_path):
    """In the pipeline (the paper's main results have an asymmetric one), or as a cheap proxy to look through."""
    tiny_vae(kind, seed=5).save_pretrained(tmp_path / "vae")
    flags = {
        flag: tmp_path / "vae",
        "max_train_steps": 1,
        "validation_prompts": ["a cat"],
        "lpl_sigma_threshold": 1000,
    }
    out = train(sd_pipeline, image_folder, tmp_path / "out", **flags)
    (record,) = metrics(out)
    assert record["lpl"] > 0 and math.isfinite(record["lpl"]) and record["lpl/mid"] > 0
    ours = type(DiffusionPipeline.from_pretrained(out).vae).__name__
    assert (ours == "AutoencoderKL") is (flag == "lpl_vae_name_or_path")


def test_the_average_goes_on_from_the_pipelines_revision(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """--non_ema_revision is trained, --revision is averaged (as in diffusers' script)."""
    original, seen = UNet2DConditionModel.from_pretrained.__func__, []

    def by_revision(cls, path, **kwargs):
        model = original(cls, path, **kwargs)
        seen.append(kwargs.get("revision"))
        if kwargs.get("revision") == "raw":
            with torch.no_grad():
                model.conv_in.weight.zero_()
        return model

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(by_revision))
    flags = {"use_ema": True, "ema_decay": 1.0, "non_ema_revision": "raw", "learning_rate": 1e-9, "revision": "main"}
    train(sd_pipeline, image_folder, tmp_path, **flags, max_train_steps=1, checkpointing_steps=1)
    weight = ("diffusion_pytorch_model.safetensors", "conv_in.weight")
    assert "raw" in seen and "main" in seen
    assert weights(tmp_path / "checkpoint-1" / "unet")[weight].abs().max() < 1e-6
    assert not torch.equal(weights(tmp_path / "checkpoint-1" / "ema" / "unet")[weight], torch.zeros(8, 4, 3, 3))


# Losses --------------------------------------------------------------------------------------------------------------


class Answer(torch.nn.Module):
    """A model that answers its input times a factor, and tells with how many gradients it was called."""

    def __init__(self):
        super().__init__()
        self.factor, self.calls = torch.nn.Parameter(torch.tensor(0.5)), []

    def conditions(self, batch, device):
        return None

    def forward(self, noisy_latents, timesteps, conditions):
        self.calls.append((noisy_latents, torch.is_grad_enabled()))
        return self.factor * noisy_latents


def test_dream_is_the_diffusion_loss_at_a_noise_moved_by_the_models_own_error(sd_pipeline, monkeypatch):
    scheduler = DiffusionPipeline.from_pretrained(sd_pipeline).scheduler
    objective, vae = Epsilon(scheduler), AutoencoderKL.from_pretrained(sd_pipeline / "vae")
    diffusion = Diffusion(dream_training=True, dream_detail_preservation=2.0)
    losses = script.Losses(Namespace(vae=vae), objective, None, Lpl(), diffusion)
    torch.manual_seed(0)
    batch = {
        "pixels": torch.rand(3, 3, 32, 32) * 2 - 1,
        "noise": torch.randn(3, 4, 8, 8),
        "posterior_noise": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([10, 400, 900]),
    }
    model = Answer()
    errors = losses(model, batch, with_lpl=False).errors

    latents, noise = encode(vae, batch["pixels"], batch["posterior_noise"]), batch["noise"]
    a, b = ((x**0.5).view(3, 1, 1, 1) for x in _signal_and_noise(scheduler, batch["timestep"]))
    noisy = a * latents + b * noise
    moved = noise + b**2 * (noise - 0.5 * noisy)
    expected = (0.5 * (a * latents + b * moved) - moved).square().flatten(1).mean(1)
    assert torch.allclose(errors, expected, rtol=1e-4)
    assert [grad for _, grad in model.calls] == [False, True]


def _signal_and_noise(scheduler, timesteps):
    signal = scheduler.alphas_cumprod[timesteps]
    return signal, 1 - signal


def test_dream_trains_from_the_command_line(sd_pipeline, image_folder, tmp_path):
    flags = {"lpl_weight": 0, "max_train_steps": 1}
    dream = train(sd_pipeline, image_folder, tmp_path / "dream", dream_training=True, **flags)
    plain = train(sd_pipeline, image_folder, tmp_path / "plain", **flags)
    assert metrics(dream, "loss") != metrics(plain, "loss")


def test_the_reference_variant_averages_over_the_samples_inside(sd_pipeline, image_folder, tmp_path):
    """As the authors' code does; the paper's expectation is over the whole batch."""
    flags = {"train_batch_size": 6, "max_train_steps": 1, "lpl_weight": 1, "lpl_sigma_threshold": 1.0}
    train(sd_pipeline, image_folder, tmp_path / "six", **flags, lpl_variant="reference")
    (record,) = metrics(tmp_path / "six")
    assert 0 < record["inside"] < 1
    made = []
    original = script.LatentPerceptualLoss.__call__
    script.LatentPerceptualLoss.__call__ = lambda *args: made.append(original(*args)) or made[-1]
    try:
        train(sd_pipeline, image_folder, tmp_path / "again", **flags, lpl_variant="reference")
    finally:
        script.LatentPerceptualLoss.__call__ = original
    assert record["lpl"] == pytest.approx(made[0].mean().item(), rel=1e-5)
    assert len(made[0]) == round(6 * record["inside"])


def test_debug_loss_tells_each_images_loss(sd_pipeline, image_folder, tmp_path):
    train(sd_pipeline, image_folder, tmp_path, debug_loss=True, lpl_weight=0)
    lines = [json.loads(line) for line in (tmp_path / "sample_losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2] and {line["image"] for line in lines} <= set(range(8))
    for step, (loss,) in enumerate(metrics(tmp_path, "loss"), start=1):
        assert loss == pytest.approx(np.mean([line["loss"] for line in lines if line["step"] == step]), rel=1e-5)


# Held out ------------------------------------------------------------------------------------------------------------


def test_the_validation_loss_compares_runs(sd_pipeline, image_folder, tmp_path):
    """Before training it is the same whatever the run's seed, batch size, augmentation and LPL; then it moves."""
    flags = {"validation_every_nth": 3, "validation_steps": 1}
    one = train(sd_pipeline, image_folder, tmp_path / "one", **flags, random_flip=True)
    other = {"seed": 5, "train_batch_size": 3, "center_crop": True, "lpl_weight": 0, "validation_every_nth": 3}
    other |= {"lpl_threshold_base_resolution": 0}
    two = train(sd_pipeline, image_folder, tmp_path / "two", **other)
    first, second = validation_metrics(one), validation_metrics(two)
    assert [step for step, *_ in first] == [0, 1, 2] and [step for step, *_ in second] == [0, 2]
    assert first[0] == pytest.approx(second[0], rel=1e-5) and all(value > 0 for value in first[0][1:])
    assert first[0][1:] != first[1][1:] != first[2][1:]


@pytest.mark.parametrize(
    "family, flags",
    [
        ("sd", {"dream_training": True, "input_perturbation": 0.1, "noise_offset": 0.1}),
        ("sd", {"snr_gamma": 5.0, "lpl_variant": "reference", "lpl_weight": 1}),
        ("sd3", {"weighting_scheme": "sigma_sqrt", "precondition_outputs": 1}),
    ],
    ids=str,
)
def test_the_validation_loss_is_plain(family, flags, request, image_folder, tmp_path):
    """It does not know how the run weighs or perturbs; nor the batch it is taken in."""
    pipeline, common = request.getfixturevalue(f"{family}_pipeline"), {"validation_every_nth": 2, "max_train_steps": 1}
    plain = train(pipeline, image_folder, tmp_path / "plain", **common)
    other = train(pipeline, image_folder, tmp_path / "other", **common, **flags, train_batch_size=3)
    loss, lpl = validation_metrics(plain)[0][1:]
    assert validation_metrics(other)[0][1] == pytest.approx(loss, rel=1e-5)
    if "lpl_variant" not in flags:
        assert validation_metrics(other)[0][2] == pytest.approx(lpl, rel=1e-5)


def test_the_reference_variants_validation_does_not_depend_on_the_batch(sd_pipeline, image_folder, tmp_path):
    flags = {"validation_every_nth": 2, "max_train_steps": 1, "lpl_variant": "reference", "lpl_weight": 1}
    runs = [
        train(sd_pipeline, image_folder, tmp_path / str(size), **flags, train_batch_size=size) for size in (1, 2, 3)
    ]
    assert all(validation_metrics(run)[0] == pytest.approx(validation_metrics(runs[0])[0]) for run in runs)


def test_the_log_pauses_only_where_there_is_something_to_do(sd_pipeline, image_folder, tmp_path, monkeypatch):
    paused = []
    original = script.Log.paused
    monkeypatch.setattr(script.Log, "paused", lambda log: paused.append(0) or original(log))
    train(sd_pipeline, image_folder, tmp_path, max_train_steps=5, checkpointing_steps=2, lpl_weight=0)
    assert len(paused) == 3  # after 2, after 4, and at the end


def test_the_validation_loss_is_the_averages_and_leaves_the_training_alone(sd_pipeline, image_folder, tmp_path):
    flags = {"use_ema": True, "ema_decay": 1.0, "max_train_steps": 2, "rank": 2, "lora_dropout": 0.5}
    plain = train(sd_pipeline, image_folder, tmp_path / "plain", **flags, validation_every_nth=3)
    often = train(sd_pipeline, image_folder, tmp_path / "often", **flags, validation_every_nth=3, validation_steps=1)
    assert metrics(plain) == metrics(often)
    first, last = validation_metrics(often)[0], validation_metrics(often)[-1]
    assert last[1:] == pytest.approx(first[1:], rel=1e-3)  # an average that does not move


@pytest.mark.slow
def test_two_processes_share_the_held_out_samples(sd_pipeline, image_folder, tmp_path):
    flags = {"validation_every_nth": 3, "max_train_steps": 1, "lpl_weight": 0}
    launch(sd_pipeline, image_folder, tmp_path / "two", "--multi_gpu", "--num_processes=2", **flags)
    one = train(sd_pipeline, image_folder, tmp_path / "one", **flags, gradient_accumulation_steps=2)
    assert validation_metrics(tmp_path / "two")[0][:2] == pytest.approx(validation_metrics(one)[0][:2], rel=1e-4)


# Recipes -------------------------------------------------------------------------------------------------------------

RECIPES = {
    "sd_pipeline": {"snr_gamma": 5.0, "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "sdxl_pipeline": {"rank": 2, "train_text_encoder": True, "validation_prompts": ["a cat", "a: dog #1"]},
    "sd3_pipeline": {
        "weighting_scheme": "mode",
        "lpl_depth_weighting": [1, 0.5, 0.25, 0],
        "lpl_detach_statistics": True,
    },
    "dit_pipeline": {"lpl_weight": 0, "from_scratch": True, "validation_prompts": ["cats"]},
    "flux_pipeline": {"lora": True, "guidance_scale": 1.0},
}


@pytest.mark.parametrize("name", RECIPES)
def test_running_a_runs_recipe_again_repeats_the_run(name, request, image_folder, class_folder, tmp_path, recwarn):
    images = class_folder if name == "dit_pipeline" else image_folder
    first = train(request.getfixturevalue(name), images, tmp_path / "first", **RECIPES[name], seed=None)
    recwarn.clear()
    run(["--config", str(first / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert metrics(tmp_path / "again") == metrics(first)
    assert same(weights(tmp_path / "again"), weights(first))
    assert not [str(warning.message) for warning in recwarn if "--" in str(warning.message)]
    one, two = (yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (first, tmp_path / "again"))
    assert one.pop("output_dir") != two.pop("output_dir") and one == two


def test_the_command_line_goes_before_the_recipe(sd_pipeline, image_folder, tmp_path):
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", max_train_steps=3, lpl_weight=0)
    (tmp_path / "mine.yaml").write_text(
        "max_train_steps: 1\nlearning_rate: 1.0e-5\nlpl_threshold_base_resolution: 256\n"
    )
    run(["--config", str(tmp_path / "mine.yaml"), *words])
    assert len(metrics(tmp_path / "out")) == 3


# Dry run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"rank": 2, "use_ema": True}, {"lpl_weight": 0}], ids=str)
def test_a_dry_run_tells_what_will_happen_and_leaves_nothing(flags, sd_pipeline, image_folder, tmp_path, capsys):
    train(sd_pipeline, image_folder, tmp_path / "out", dry_run=True, max_train_steps=400, **flags)
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().out
    assert re.search(r"400", told) and "epsilon" in told and str(tmp_path / "out") in told
    assert math.isfinite(float(re.search(r"(\d+\.?\d*) ?(?:ms|s)\b", told).group(1)))


# The card ------------------------------------------------------------------------------------------------------------


def test_the_cards_command_needs_no_recipe_of_ours(sd_pipeline, image_folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("lora: true\nlora_alpha: 3\nlpl_depth_weighting: [1, 0.5, 0.25, 0]\n")
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", seed=None)
    run(["--config", str(tmp_path / "mine.yaml"), *words])
    card = (tmp_path / "out" / "README.md").read_text()
    command = re.findall(r"accelerate launch (.*?)\n```", card, flags=re.DOTALL)[-1]
    words = shlex.split(command.replace("\\\n", " "))[1:]
    assert "--config" not in words and "--seed" in words and words[words.index("--rank") + 1] == "4"
    for name, place in {"sd": sd_pipeline, "images": image_folder}.items():
        words = [word if not word.startswith(f"path/to/{name}") else str(place) for word in words]
    run([*words, "--output_dir", str(tmp_path / "again"), "--cache_dir", str(image_folder.with_name("cache"))])
    assert metrics(tmp_path / "again") == metrics(tmp_path / "out")


def test_the_card_lists_the_datas_classes(dit_pipeline, class_folder, tmp_path):
    train(dit_pipeline, class_folder, tmp_path, rank=2, validation_prompts=["rockets"])
    card = (tmp_path / "README.md").read_text()
    assert "| Classes | 0 cats, 1 cups, 2 rockets |" in card and "class_labels=[2]" in card


def test_an_unknown_class_is_refused_with_the_datas_first(dit_pipeline, class_folder, tmp_path):
    with pytest.raises(SystemExit, match="--validation_prompts lions.*such as cats, cups, rockets"):
        train(dit_pipeline, class_folder, tmp_path, validation_prompts=["lions"])
