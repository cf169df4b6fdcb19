"""Stable Diffusion XL: sizes and crop."""

import torch
from tiny_families import CPU, batch_of, inputs, load


@torch.no_grad()
def test_sdxl_is_told_sizes_and_crop(sdxl_pipeline):
    family = load(sdxl_pipeline)
    latents, timesteps, conditions = inputs(family)
    output = family.predict(family.denoiser, latents, timesteps, conditions)
    assert conditions["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    for sizes in ({"original_size": (32, 48)}, {"crop_top_left": (0, 5)}, {"target_size": (24, 32)}):
        changed = family.conditions(batch_of(family, **sizes), CPU)
        changed = family.predict(family.denoiser, latents, timesteps, changed)
        assert (changed - output).abs().flatten(1).max(1).values.min() > 1e-6
    told = family.conditions(batch_of(family, original_size=(1, 2), crop_top_left=(3, 4), target_size=(5, 6)), CPU)
    assert told["time_ids"].tolist() == [[1, 2, 3, 4, 5, 6]] * 3  # the pipeline's order, height or top first
