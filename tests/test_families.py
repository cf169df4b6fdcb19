"""The contract of every model family, on its tiny pipeline; a family without one fails here."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from lpl.families import FAMILIES, Family, find_family


TINY = {  # family -> fixtures of tests/conftest.py
    "stable-diffusion": ["sd_pipeline", "sd_v_pipeline"],
    "stable-diffusion-3": ["sd3_pipeline", "sd3_without_t5"],
}
CAPTIONS = ["a cat", "", "the dog, and a very long caption " * 8]
CPU = torch.device("cpu")


@pytest.fixture(params=[name for names in TINY.values() for name in names])
def folder(request):
    return request.getfixturevalue(request.param)


def load(folder, text_encoder_dtype=torch.float32, max_sequence_length=77):
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    return find_family(index["_class_name"]).load(folder, text_encoder_dtype, max_sequence_length, **absent)


def inputs(family, batch=3, side=8):
    """Latents, timesteps and conditions of a batch; no two samples are alike."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, family.vae.config.latent_channels, side, side, generator=generator)
    return latents, torch.tensor([1.0, 500.0, 900.0])[:batch], family.encode_prompts(CAPTIONS[:batch], CPU)


def test_every_family_has_a_tiny_pipeline_here():
    assert {family.name for family in FAMILIES} == set(TINY)
    assert len({family.pipeline_class for family in FAMILIES}) == len(FAMILIES)


@torch.no_grad()
def test_predict_answers_per_sample_in_the_latents_shape(folder):
    family = load(folder)
    latents, timesteps, conditions = inputs(family)
    output = family.predict(family.denoiser, latents, timesteps, conditions)
    assert output.shape == latents.shape and output.isfinite().all()
    for row in range(3):  # each sample alone gives the same: timesteps and conditions are its own
        alone = {name: value[row : row + 1] for name, value in conditions.items()}
        single = family.predict(family.denoiser, latents[row : row + 1], timesteps[row : row + 1], alone)
        assert torch.allclose(single, output[row : row + 1], atol=1e-5)


@torch.no_grad()
def test_timesteps_and_captions_matter(folder):
    family = load(folder)
    latents, timesteps, conditions = inputs(family)
    output = family.predict(family.denoiser, latents, timesteps, conditions)
    later = family.predict(family.denoiser, latents, timesteps + 50, conditions)
    other = family.predict(family.denoiser, latents, timesteps, family.encode_prompts(["a dog"] * 3, CPU))
    for changed in (later, other):
        assert (changed - output).abs().flatten(1).max(1).values.min() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("length", [77, 20])
def test_conditions_are_those_of_the_pipeline(folder, length):
    """What the pipeline itself gives its denoiser when it samples these captions without guidance."""
    family = load(folder, max_sequence_length=length)
    seen = {}
    family.denoiser.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
    family.pipeline.set_progress_bar_config(disable=True)
    family.pipeline(CAPTIONS, **arguments, **family.sampling_arguments())
    conditions = family.encode_prompts(CAPTIONS, CPU)
    assert conditions and all(torch.equal(value, seen[name]) for name, value in conditions.items())
    assert {name for name, value in seen.items() if isinstance(value, torch.Tensor)} <= {
        *conditions,
        "hidden_states",
        "timestep",
    }


def test_only_the_denoiser_can_be_trained_and_is_in_float32(folder):
    family = load(folder, text_encoder_dtype=torch.bfloat16)
    assert family.vae.dtype == family.denoiser.dtype == torch.float32
    assert family.text_encoders and all(encoder.dtype == torch.bfloat16 for encoder in family.text_encoders)
    for frozen in (family.vae, *family.text_encoders):
        assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in family.denoiser.parameters())


@torch.no_grad()
def test_gradients_stay_out_of_captions(folder):
    assert not any(value.requires_grad for value in load(folder).encode_prompts(CAPTIONS, CPU).values())


def test_class_attributes_name_components_of_the_pipeline(folder):
    family = load(folder)
    expected = set(family.pipeline.components)
    assert {family.denoiser_name, *family.text_encoder_names, *family.optional_components, "vae"} <= expected
    assert issubclass(type(family), Family) and issubclass(family.pipeline_class, DiffusionPipeline)


@torch.no_grad()
def test_the_largest_resolution_works_and_nothing_beyond(folder):
    family = load(folder)
    configs = {name: dict(getattr(family.pipeline, name).config) for name in ("vae", family.denoiser_name)}
    multiple, largest = family.resolution_multiple(configs), family.max_resolution(configs)
    pixels_per_latent = 32 // AutoencoderKL.encode(family.vae, torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape[-1]
    assert multiple % pixels_per_latent == 0
    side = (largest or multiple * 3) // pixels_per_latent
    latents, timesteps, conditions = inputs(family, batch=1, side=side)
    assert family.predict(family.denoiser, latents, timesteps, conditions).shape == latents.shape
    if largest is not None:
        latents, timesteps, conditions = inputs(family, batch=1, side=side + multiple // pixels_per_latent)
        with pytest.raises(ValueError):
            family.predict(family.denoiser, latents, timesteps, conditions)


@pytest.mark.parametrize("name", ["KandinskyPipeline", "StableDiffusion", "", None])
def test_unknown_pipelines_are_refused(name):
    with pytest.raises(ValueError) as error:
        find_family(name)
    assert str(name) in str(error.value) and "--pretrained_model_name_or_path" in str(error.value)
    assert all(family.pipeline_class.__name__ in str(error.value) for family in FAMILIES)
