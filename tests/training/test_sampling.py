"""Samples depend on their prompt, place, seed and settings only, and the VAE decodes them in its own precision."""

from dataclasses import replace

import numpy as np
import torch

from lpl.training.sampling import decoding_exactly


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


def test_an_image_depends_on_its_own_prompt_and_place_only(sampling):
    first, second = pixels(sampling.images("a cat", "a dog"))
    assert pixels(sampling.images("a cat")) == [first]
    assert pixels(sampling.images("a cup", "a dog"))[1] == second
    same_prompt = pixels(sampling.images("a cat", "a cat"))
    assert same_prompt[0] == first != same_prompt[1]  # several images of one prompt differ


def test_the_seed_and_the_settings_count(sampling):
    changes = {"seed": 1, "validation_inference_steps": 3, "validation_guidance_scale": 1.0}
    before = pixels(sampling.images("a cat"))
    for name, value in changes.items():
        assert pixels(replace(sampling, config=sampling.config.changed(**{name: value})).images("a cat")) != before


def test_the_vae_decodes_in_its_own_precision_under_autocast(sampling):
    seen, vae = [], sampling.family.vae
    hook = vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    latents = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with decoding_exactly(vae):
            vae.decode(latents)
        vae.decode(latents.float())  # left as it was: autocast rules again
    hook.remove()
    assert [(given.dtype, made.dtype) for given, made in seen] == [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ]
