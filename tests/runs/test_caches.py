"""Whole runs with caches: the same losses, samples and results as without, on several processes and after a kill."""

import os
import signal
import time

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny import tiny_vae
from trainer import launch, metrics, train, validation_metrics, weights

import train_text_to_image_lpl as script
from lpl.data.store import Store, _keys
from lpl.training import caching


BUCKETS = {"aspect_ratio_buckets": "auto", "bucket_step": 8, "random_flip": True, "center_crop": True}
RUN = BUCKETS | {
    "max_train_steps": 6,
    "train_batch_size": 2,
    "checkpointing_steps": 3,
    "proportion_empty_prompts": 0.3,
    "validation_every_nth": 4,
    "validation_steps": 6,
    "lpl_weight": 0.1,
    "adam_epsilon": 1e-3,  # at its default, AdamW makes whole steps of gradients that are rounding errors
    "seed": 3,
}
CACHES = {"cache_latents": True, "cache_text_embeddings": True}
FAMILIES = {
    "sd": {"lora": True, "rank": 2},
    "sdxl": {"text_encoder_dropout": [0.3, 0.3], "random_flip": False},
    "sd3": {"center_crop": None, "crops_per_image": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_without_caches(family, request, image_folder, tmp_path):
    """Over buckets, dropout, flips and a resume, to float32's rounding."""
    pipeline, flags = request.getfixturevalue(f"{family}_pipeline"), RUN | FAMILIES[family]
    plain = train(pipeline, image_folder, tmp_path / "plain", **flags)
    cached = flags | CACHES | {"data_cache_dir": tmp_path / "cache"}
    folder = train(pipeline, image_folder, tmp_path / "cached", **cached | {"max_train_steps": 3})
    train(pipeline, image_folder, folder, **cached, resume_from_checkpoint="latest")
    losses, same_losses = metrics(plain, "loss", "diffusion_loss"), metrics(folder, "loss", "diffusion_loss")
    assert len(losses) == 6 and np.allclose(losses, same_losses, rtol=2e-5), (losses, same_losses)
    held_out, same = ([row[:2] for row in validation_metrics(run)] for run in (plain, folder))
    assert np.allclose(held_out[-1], same[-1], rtol=1e-3) and held_out[0][0] == same[0][0]


def pixels(folder):
    files = sorted(folder.rglob("samples/step-*/*.png"))
    return np.stack([np.asarray(Image.open(file), dtype=float) for file in files])


def names(folder):
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file for file in files if "logs" not in file.parts}


@pytest.fixture
def families(monkeypatch):
    """The families of runs after their caches were filled."""
    found, fill = [], script.with_caches

    def filled(config, description, family, *args):
        found.append(family)
        return fill(config, description, family, *args)

    monkeypatch.setattr(script, "with_caches", filled)
    return found


@pytest.mark.parametrize("flags", [{}, {"lora": True, "rank": 2}, {"other_vae": True}], ids=["whole", "LoRA", "VAE"])
def test_samples_and_results_are_whole(flags, sd_pipeline, image_folder, tmp_path, families):
    flags = dict(flags)
    if flags.pop("other_vae", False):
        tiny_vae("sd", seed=5).save_pretrained(tmp_path / "vae")
        flags["pretrained_vae_model_name_or_path"] = tmp_path / "vae"
    flags |= {"center_crop": True, "validation_prompts": ["a cat", "a dog"], "validation_steps": 1, "lpl_weight": 0.1}
    plain = train(sd_pipeline, image_folder, tmp_path / "plain/run", **flags)
    caches = CACHES | {"data_cache_dir": tmp_path / "cache"}
    folder = train(sd_pipeline, image_folder, tmp_path / "cached/run", **flags, **caches)
    whole, freed = families
    assert whole.vae.encoder is not None and whole.text_encoders
    assert not list(freed.vae.encoder.parameters()) and freed.pipeline.text_encoder is None and not freed.text_encoders
    assert pixels(folder).shape == pixels(plain).shape and len(pixels(folder)) == 6
    assert np.abs(pixels(folder) - pixels(plain)).max() <= 2
    assert weights(folder).keys() == weights(plain).keys()
    assert names(folder) == names(plain)
    if "lora" not in flags:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        assert pipeline.vae.encoder is not None and pipeline.text_encoder is not None
        pipeline("a cat", num_inference_steps=1, height=32, width=32)


def test_a_dry_run_says_that_it_leaves_the_caches_alone(sd_pipeline, image_folder, tmp_path, capsys):
    flags = {"center_crop": True, "dry_run": True, "data_cache_dir": tmp_path / "cache"}
    train(sd_pipeline, image_folder, tmp_path / "run", **flags, **CACHES)
    said = capsys.readouterr().out
    assert "--cache_latents and --cache_text_embeddings: these steps were taken without them" in " ".join(said.split())
    assert not (tmp_path / "cache").exists()
    train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    assert "taken without them" not in " ".join(capsys.readouterr().out.split())


def test_a_run_that_is_killed_while_it_fills_goes_on(sd_pipeline, image_folder, tmp_path, monkeypatch):
    flags = {"center_crop": True, "data_cache_dir": tmp_path / "cache", "train_batch_size": 1, **CACHES}
    encode, store = caching.posterior, tmp_path / "cache/latents"

    def slowly(*args):
        time.sleep(0.3)
        return encode(*args)

    child = os.fork()
    if child == 0:
        caching.posterior, caching.SHARD = slowly, 2
        train(sd_pipeline, image_folder, tmp_path / "run", **flags)
        os._exit(0)
    end = time.monotonic() + 60
    while not (store.is_dir() and list(store.glob("[!.]*.safetensors"))) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there, encoded = len(Store(store)._place), []
    assert 0 < there < 8
    monkeypatch.setattr(caching, "posterior", lambda vae, pixels: encoded.append(len(pixels)) or encode(vae, pixels))
    train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    assert sum(encoded) == 8 - there


@pytest.mark.slow
def test_two_processes_share_the_work(sd_pipeline, image_folder, tmp_path):
    flags = RUN | {"max_train_steps": 2, "train_batch_size": 1, "random_flip": True}
    two = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "29619")
    plain = launch(sd_pipeline, image_folder, tmp_path / "plain", *two, **flags)
    cached = flags | CACHES | {"data_cache_dir": tmp_path / "cache"}
    folder = launch(sd_pipeline, image_folder, tmp_path / "cached", *two, **cached)
    assert np.allclose(metrics(plain, "loss"), metrics(folder, "loss"), rtol=2e-4)
    for name in ("latents", "embeddings"):
        place = tmp_path / "cache" / name
        shards = list(place.glob("*.safetensors"))
        assert len(shards) >= 2 and sum(len(_keys(shard)) for shard in shards) == len(Store(place)._place)
