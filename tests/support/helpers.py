"""Small things several test modules share."""

from contextlib import contextmanager

import torch
from diffusers import AutoencoderDC
from tiny import seeded


def random_latents(vae, batch=2, height=4, width=4, seed=0, spikes=False):
    """Scaled latents in the VAE's dtype; `spikes`: one strong position per sample makes outliers in the features."""
    with seeded(seed):
        latents = torch.randn(batch, vae.config.latent_channels, height, width, dtype=torch.float64)
        if spikes:
            for sample in latents:
                y, x = torch.randint(height, ()), torch.randint(width, ())
                sample[:, y, x] += 60 * torch.randn(len(sample), dtype=torch.float64)
    return latents.to(vae.dtype)


def pair(vae, batch=2, height=4, width=4, seed=0, spikes=True):
    """(predicted_latents, latents): an estimate that is off by about a third, and the truth."""
    latents = random_latents(vae, batch, height, width, seed, spikes)
    error = random_latents(vae, batch, height, width, seed + 100)
    return latents + 0.3 * error, latents


def block(vae, name):
    """The decoder's module whose output is called `name`."""
    if name == "mid":
        return vae.decoder.mid_block
    index = int(name.removeprefix("up_"))
    return vae.decoder.up_blocks[-1 - index if isinstance(vae, AutoencoderDC) else index]


@contextmanager
def forced_features(vae, **functions):
    """Blocks named by keyword return `function(their real output)` while the context lasts."""
    handles = [
        block(vae, name).register_forward_hook(lambda module, args, output, function=function: function(output))
        for name, function in functions.items()
    ]
    try:
        yield vae
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def latents_as_features(vae, name, function=lambda latents: latents):
    """Block `name` returns `function(the decoder's input)`; use on a VAE without post-quant conv and with scale 1."""
    inputs = []
    handle = vae.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        with forced_features(vae, **{name: lambda output: function(inputs[-1])}):
            yield vae
    finally:
        handle.remove()


def hook_count(vae):
    """How many hooks hang on all modules of the VAE together."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in vae.modules() for kind in kinds)
