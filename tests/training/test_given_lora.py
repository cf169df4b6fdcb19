"""LoRA that a run is given: trained further, bit for bit, or active in training only."""

import re
import shutil

import pytest
import torch
import yaml
from commands import refusal
from loras import tiny_lora
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from trainer import arguments, parsed, same, train

from lpl.config.command_line import parse
from lpl.training.given_lora import with_adapters
from lpl.training.loading import load_family
from lpl.training.parts import TrainedParts


@pytest.fixture(scope="module")
def lora(sd_pipeline, tmp_path_factory):
    """Of the UNet alone, rank 2 and alpha 4."""
    return tiny_lora(sd_pipeline, tmp_path_factory.mktemp("lora") / "style")


def test_a_run_starts_from_a_lora_over_a_merged_one_with_an_adapter(sd_pipeline, image_folder, lora, tmp_path):
    adapter = tiny_lora(sd_pipeline, tmp_path / "adapter", seed=1, rank=1)
    flags = {"lora_init": lora / "style_comfyui.safetensors", "training_adapter": adapter, "merge_lora": f"{lora}:0.5"}
    out = train(sd_pipeline, image_folder, tmp_path / "out", max_train_steps=0, lpl_weight=0, **flags)
    file = "pytorch_lora_weights.safetensors"
    assert same(load_file(out / file), load_file(lora / file))  # bit for bit, and nothing of the others
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["rank"], recipe["lora_alpha"], recipe["lora"]) == (2, 4.0, True)
    assert recipe["pretrained_model_name_or_path"] == str(sd_pipeline) and recipe["merge_lora"] == [f"{lora}:0.5"]
    card = (out / "README.md").read_text()
    assert "with 1 merged LoRA, trained" in card
    assert "pipeline.fuse_lora(lora_scale=0.5)\npipeline.unload_lora_weights()\npipeline.load_lora_weights(" in card
    assert "| Merged before the training | the local folder `style` with strength 0.5 |" in card
    assert "| Started from the LoRA | the local folder `style_comfyui.safetensors` |" in card
    assert "| Active in training only | the local folder `adapter` |" in card and str(tmp_path) not in card


def test_a_training_adapter_is_active_in_training_only(sd_pipeline, image_folder, lora, tmp_path):
    config, description = parsed(
        sd_pipeline, image_folder, tmp_path / "out", rank=3, training_adapter=lora, lora_target_modules="to_q"
    )
    family = load_family(config.model, config.lora, description, torch.float32)
    plain = family.denoiser
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor([10])
    states = torch.randn(1, 4, 16)
    before = plain(latents, time, states).sample
    trained = TrainedParts(family, config.lora)
    assert not torch.allclose(plain(latents, time, states).sample, before)  # the new LoRA changes nothing
    trained.eval()
    assert torch.equal(plain(latents, time, states).sample, before)
    trained.train()
    assert not torch.allclose(plain(latents, time, states).sample, before)
    adapted = [module for module in plain.modules() if isinstance(module, LoraLayer) and "default" in module.lora_A]
    assert len(trained.weights()) == 2 * len(adapted) and all(w.requires_grad for w in trained.weights())
    assert {len(weight) for weight in trained.weights()} != {2}
    trained.save(tmp_path)
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == 2 * len(adapted)


def test_a_run_with_both_resumes_as_if_it_had_not_stopped(sd_pipeline, image_folder, lora, tmp_path):
    flags = {"lora_init": lora, "training_adapter": lora, "lpl_weight": 0, "checkpointing_steps": 1}
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", max_train_steps=2, **flags)
    half = train(sd_pipeline, image_folder, tmp_path / "half", max_train_steps=1, **flags)
    train(sd_pipeline, image_folder, half, max_train_steps=2, resume_from_checkpoint="latest", **flags)
    file = "pytorch_lora_weights.safetensors"
    assert same(load_file(whole / file), load_file(half / file))
    assert not same(load_file(whole / file), load_file(lora / file))


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"rank": 8}, "--rank 8: the LoRA of --lora_init .* has 2"),
        ({"use_dora": True}, "--use_dora True: the LoRA of --lora_init .* has False"),
        ({"lora_target_modules": "to_q"}, "--lora_target_modules: the layers are those of --lora_init"),
        ({"lora_rank_pattern": "to_q=4"}, "--lora_rank_pattern: the ranks are those of --lora_init"),
        ({"lora_alpha_pattern": "to_q=4"}, "--lora_alpha_pattern: the alphas are those of --lora_init"),
        ({"init_lora_weights": "gaussian"}, "--init_lora_weights: the weights are those of --lora_init"),
        ({"from_scratch": True}, "--from_scratch trains every weight anew"),
    ],
)
def test_flags_that_say_something_else_than_the_lora_are_refused(
    flags, words, sd_pipeline, image_folder, lora, tmp_path, capsys
):
    words_given = arguments(sd_pipeline, image_folder, tmp_path / "out", lora_init=lora, **flags)
    assert re.search(words, refusal(capsys, words_given))


def test_adapters_that_a_run_would_lose_are_refused(sd_pipeline, image_folder, tmp_path, capsys):
    both = tiny_lora(sd_pipeline, tmp_path / "both", text_encoders=True)
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", lora_init=both)
    assert "it has adapters of text_encoder, which this run would lose; add --train_text_encoder" in refusal(
        capsys, words
    )
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", rank=2, training_adapter=both)
    assert "it adapts unet and text_encoder; give one of the unet alone" in refusal(capsys, words)


@pytest.mark.parametrize("flag", ["lora_init", "merge_lora", "training_adapter"])
def test_a_run_does_not_write_where_it_starts_from(flag, sd_pipeline, image_folder, lora, tmp_path, capsys):
    words = arguments(sd_pipeline, image_folder, lora, lora=True, **{flag: lora / "style_comfyui.safetensors"})
    assert f"--output_dir {lora}: --{flag} {lora / 'style_comfyui.safetensors'} is in it" in refusal(capsys, words)


def test_only_a_run_that_resumes_may_start_from_a_checkpoints_folder(
    sd_pipeline, image_folder, lora, tmp_path, capsys
):
    ema = shutil.copytree(lora, tmp_path / "out/checkpoint-1/ema")
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", lora_init=ema)
    assert f"--output_dir {tmp_path / 'out'}: --lora_init {ema} is in it" in refusal(capsys, words)
    parse([*words, "--resume_from_checkpoint=latest"])


def test_rank_and_alpha_are_the_denoisers(sd_pipeline, image_folder, tmp_path):
    both = tiny_lora(sd_pipeline, tmp_path / "both", text_encoders=True) / "both_comfyui.safetensors"
    tensors = load_file(both)
    te = {name for name in tensors if name.startswith("lora_te") and name.endswith(".alpha")}
    save_file(tensors | {name: torch.tensor(1.0) for name in te}, both)
    config, description = parsed(sd_pipeline, image_folder, tmp_path / "out", lora_init=both, train_text_encoder=True)
    assert te and with_adapters(config, description).lora.lora_alpha == 4.0
