"""Flux: the guidance of distilled models."""

import pytest
import torch
from tiny_families import Calls, inputs, load


@torch.no_grad()
def test_flux_is_told_the_guidance(flux_pipeline):
    family, other = load(flux_pipeline), load(flux_pipeline, guidance_scale=1.0)
    latents, timesteps, conditions = inputs(family)
    outputs = [each.predict(each.denoiser, latents, timesteps, conditions) for each in (family, other)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6
    other.denoiser.register_to_config(guidance_embeds=False)
    with Calls(other) as calls, pytest.raises(Exception):  # noqa: B017  the tiny model has the embedder all the same
        other.predict(other.denoiser, latents, timesteps, conditions)
    assert "guidance" not in calls[0]
