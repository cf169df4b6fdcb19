"""What only HiDream-I1 has: experts, a fixed number of pixels, and scheduler-marked distilled models."""

import pytest
import torch
from commands import cases, edited, refusal, warned
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from tiny import seeded
from tiny_families import inputs, load
from trainer import arguments, parsed

from lpl.families.hidream import Experts


@pytest.mark.parametrize("training", [False, True])
def test_experts_answer_as_those_of_diffusers(training):
    """Diffusers' own, in the mode in which they give gradients."""
    with seeded(0):
        theirs = MOEFeedForwardSwiGLU(16, 24, num_routed_experts=4, num_activated_experts=2).train()
        x = torch.randn(2, 5, 16, requires_grad=True)
    expected = theirs(x)
    weights = list(theirs.parameters())
    gradients = torch.autograd.grad(expected.square().sum(), [x, *weights], allow_unused=True)
    theirs.__class__ = Experts
    answer = theirs.train(training)(x)
    torch.testing.assert_close(answer, expected)
    found = torch.autograd.grad(answer.square().sum(), [x, *weights], allow_unused=True)
    torch.testing.assert_close(found, gradients)
    assert all(gradient.any() for gradient in found)  # each expert is asked


def test_an_expert_that_no_token_asks():
    with seeded(0):
        layer = MOEFeedForwardSwiGLU(16, 24, num_routed_experts=4, num_activated_experts=1)
    layer.__class__ = Experts
    layer(torch.ones(1, 1, 16)).sum().backward()
    asked = [any(p.grad.any() for p in expert.parameters()) for expert in layer.experts]
    assert sum(asked) == 1 and all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("force", [False, True])
def test_routed_experts_are_trained(hidream_pipeline, tmp_path, force):
    """Also of a model that says it is for inference only, as diffusers' script saves it."""
    folder = edited(hidream_pipeline, tmp_path / "pipeline", "transformer", force_inference_output=force)
    family = load(folder)
    family.denoiser.requires_grad_(True).train()
    latents, timesteps, conditions = inputs(family)
    family.predict(family.denoiser, latents, timesteps, conditions).square().mean().backward()
    for name, parameter in family.denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_an_image_that_is_no_square(hidream_pipeline, training):
    """As the transformer itself answers in eval mode."""
    family = load(hidream_pipeline)
    family.denoiser.train(training)
    latents, timesteps, conditions = inputs(family)
    latents = torch.cat([latents, latents.flip(2)], 2)[:, :, :12]
    found = family.predict(family.denoiser, latents, timesteps, conditions)
    conditions["encoder_hidden_states_llama3"] = conditions["encoder_hidden_states_llama3"].transpose(0, 1)
    expected = family.denoiser.eval()(hidden_states=latents, timesteps=timesteps, **conditions, return_dict=False)[0]
    torch.testing.assert_close(found, -expected)


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (16, 64), (64, 64)])
def test_samples_have_the_size_that_is_asked_for(hidream_pipeline, height, width):
    """The pipeline itself draws as many pixels for every size."""
    family = load(hidream_pipeline)
    call = family.call_arguments("a cat", height, width)
    (image,) = family.pipeline(**call, num_inference_steps=1, guidance_scale=1.0).images
    assert image.size == (width, height)


MORE = cases(
    ({"resolution": 72}, ["--resolution 72: this pipeline takes 4,096 pixels at most, such as 64 x 64"]),
    ({"aspect_ratio_buckets": "32,64;48,96", "resolution": 32}, ["--aspect_ratio_buckets, 48 x 96"]),
    ({"validation_sizes": "40,112"}, ["--validation_sizes, 40 x 112: this pipeline takes 4,096 pixels"]),
)


@pytest.mark.parametrize("flags, words", MORE)
def test_more_pixels_than_it_was_made_for(flags, words, hidream_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(hidream_pipeline, image_folder, tmp_path / "out", **flags))
    assert all(word in message for word in words), message


def test_as_many_pixels_as_it_was_made_for(hidream_pipeline, image_folder, tmp_path):
    config, _ = parsed(hidream_pipeline, image_folder, tmp_path / "out", resolution=64, aspect_ratio_buckets="auto")
    assert {(32, 128), (64, 64)} <= set(config.data.buckets[0])


def test_a_distilled_model_is_known_by_its_scheduler(hidream_pipeline, image_folder, tmp_path):
    scheduler = ["diffusers", "FlowMatchLCMScheduler"]
    folder = edited(hidream_pipeline, tmp_path / "pipeline", None, scheduler=scheduler)
    (message,) = warned(folder, image_folder, tmp_path / "out")
    assert "by its scheduler (FlowMatchLCMScheduler), the model is distilled" in message
