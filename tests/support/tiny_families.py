"""The tiny pipelines by family, loaded; batches and calls of any family.

A new family needs its line in TINY.
"""

import inspect
import json

import torch

from lpl.families import FAMILIES, find_family


TINY = {  # family -> fixtures of tests/conftest.py
    "stable-diffusion": ["sd_pipeline", "sd_v_pipeline"],
    "stable-diffusion-xl": ["sdxl_pipeline"],
    "stable-diffusion-3": ["sd3_pipeline", "sd3_without_t5"],
    "pixart-alpha": ["pixart_alpha_pipeline"],
    "pixart-sigma": ["pixart_sigma_pipeline"],
    "dit": ["dit_pipeline"],
    "flux": ["flux_pipeline"],
    "sana": ["sana_pipeline"],
}
FAMILY_OF = {family.name: family for family in FAMILIES}
CAPTIONS = ["a cat", "", "the dog, and a very long caption " * 8]
LABELS = [3, 1000, 999]  # the null class in the middle
SIZE = 32  # pixels
CPU = torch.device("cpu")


def data_fixture(family):
    """The fixture with images that a family can be trained on."""
    return "class_folder" if family.class_conditional else "image_folder"


def load(folder, dtype=torch.float32, max_sequence_length=77, guidance_scale=3.5):
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    kind = find_family(index["_class_name"])
    dtypes = {"default": torch.float32, **dict.fromkeys(kind.text_encoder_names, dtype)}
    arguments = {"max_sequence_length": max_sequence_length, "guidance_scale": guidance_scale}
    family = kind.load(folder, dtypes, **arguments, **absent)
    family.pipeline.set_progress_bar_config(disable=True)
    return family


def configs_of(family):
    return {name: dict(getattr(family.pipeline, name).config) for name in ("vae", family.denoiser_name)}


def captions_of(family, count=3):
    return (LABELS if family.class_conditional else CAPTIONS)[:count]


def batch_of(family, captions=None, **sizes):
    """A batch of whole images of SIZE px, as the data gives it."""
    captions = captions_of(family) if captions is None else captions
    whole = {"original_size": (SIZE, SIZE), "crop_top_left": (0, 0), "target_size": (SIZE, SIZE)}
    return {"caption": captions} | {
        name: torch.tensor([size] * len(captions)) for name, size in (whole | sizes).items()
    }


def inputs(family, batch=3, side=8):
    """Latents, timesteps and conditions of a batch; no two samples are alike."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, family.vae.config.latent_channels, side, side, generator=generator)
    conditions = family.conditions(batch_of(family, captions_of(family, batch)), CPU)
    return latents, torch.tensor([1.0, 500.0, 900.0])[:batch], conditions


class Calls:
    """What the denoiser is called with while the context lasts, by argument; nested dictionaries are flattened."""

    def __init__(self, family):
        self.family, self.calls = family, []

    def __enter__(self):
        self.handle = self.family.denoiser.register_forward_pre_hook(self.note, with_kwargs=True)
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()

    def note(self, module, args, kwargs):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        call = dict(zip(names, args)) | kwargs
        call |= call.pop("added_cond_kwargs", None) or {}
        call = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
        self.calls.append({{"sample": "hidden_states"}.get(name, name): value for name, value in call.items()})


def sample(family, prompts, **arguments):
    """What the pipeline draws, for the call that the family gives; of several prompts at once."""
    calls = [family.call_arguments(prompt, SIZE, SIZE) for prompt in prompts]
    merged = {key: [x for call in calls for x in call[key]] for key in ("class_labels",) if key in calls[0]}
    merged |= {key: [call[key] for call in calls] for key in ("prompt",) if key in calls[0]}
    return family.pipeline(**{**calls[0], **merged, "num_inference_steps": 2, **arguments}).images


def unpacked(family, hidden_states):
    """The latents, (B, C, h, w), in the way that the denoiser is given them."""
    if family.name != "flux":
        return hidden_states
    return family.pipeline._unpack_latents(hidden_states, SIZE, SIZE, family.pipeline.vae_scale_factor)


def guidance_off(family):
    """Flux's `guidance_scale` is told to the denoiser, and guides nothing."""
    return {} if family.name == "flux" else {"guidance_scale": 1.0}
