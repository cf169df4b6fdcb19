"""Samples depend on their prompt, place, seed and settings only, and the VAE decodes them in its own precision."""

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from lpl.config.groups import Validation
from lpl.evaluation.generation import draw
from lpl.training.sampling import decoding_exactly, draws_of, sample


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


def test_text_encoders_compute_in_their_own_precision_under_autocast(sampling):
    """As in training; in float16, some would overflow."""
    seen, encoder = [], sampling.family.text_encoders[0]
    hook = encoder.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    accelerator = Accelerator(mixed_precision="bf16")
    sample(sampling.family, sampling.scheduler, sampling.draws("a cat"), accelerator)
    assert len(list(draw(sampling.family, ["a cat"], [0], (32, 32), steps=1, dtype=torch.bfloat16))) == 1
    assert set(seen) == {False}
    with accelerator.autocast():  # left as it was
        encoder(torch.zeros(1, 4, dtype=torch.long))
    hook.remove()
    assert seen[-1]


def test_a_prompt_is_drawn_with_what_it_says(sampling):
    own = {"seed": 1, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "a dog"}
    plain, *changed = sampling.images("a cat", *({"prompt": "a cat", name: value} for name, value in own.items()))
    assert [image.size for image in changed] == [(32, 32), (64, 32), (32, 32), (32, 32), (32, 32)]
    assert len(set(pixels([plain, *changed]))) == 6
    assert pixels(changed[:1]) == pixels(sampling.images("a dog", "a cat"))[1:]  # seed + 1


def test_every_prompt_at_every_size_but_those_with_their_own():
    entries = ("a cat", {"prompt": "a dog", "height": 64, "seed": 9}, "a cup")
    asked = Validation(validation_prompts=entries, validation_inference_steps=2)
    draws = draws_of(asked, ["a cat", "a dog", "a cup"], ["cats", "dogs", "cups"], [(32, 32), (32, 64)], 5)
    assert [(draw.name, draw.size, draw.seed, draw.number) for draw in draws] == [
        ("cats, 32 px", (32, 32), 5, 0),
        ("dogs, 64 x 32 px, seed 9", (64, 32), 9, 1),
        ("cups, 32 px", (32, 32), 7, 2),
        ("cats, 32 x 64 px", (32, 64), 5, 0),
        ("cups, 32 x 64 px", (32, 64), 7, 2),
    ]
