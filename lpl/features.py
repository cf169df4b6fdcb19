"""The decoder's features, taken by forward hooks on the VAE's real decode path (Eq. 1).

Hooking, rather than walking through the decoder's modules, keeps whatever ``vae.decode`` does before its decoder
(``post_quant_conv`` above all). Decoding stops after the last block asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpl.autoencoders import RGB, decoder_blocks, exact_precision, frozen, select_blocks, unscale


class _LastBlockReached(Exception):
    """Ends a decode whose remaining blocks nobody asked for."""


class DecoderFeatureExtractor:
    """``extractor(latents) -> {block name: features}`` (Eq. 1).

    The VAE is left as it was: no cast, no hook left behind, ``requires_grad`` unchanged; its parameters never receive
    a gradient.

    Args:
        vae: a diffusers autoencoder.
        blocks: names out of "mid", "up_0", "up_1", ...; None = all of them; ``("rgb",)`` = the decoded pixels.

    Raises:
        ValueError: for a block that the decoder has not, an autoencoder of another make, or one that slices or tiles.
    """

    def __init__(self, vae: nn.Module, blocks: Sequence[str] | None = None) -> None:
        self.vae = vae
        modules = decoder_blocks(vae)
        self.block_names = select_blocks(blocks, tuple(modules))
        self._modules = {name: modules[name] for name in self.block_names if name != RGB}
        self._refuse_tiles()

    def __call__(self, latents: Tensor) -> dict[str, Tensor]:
        """Scaled latents, (B, C, h, w) -> {name: (B, C_l, H_l, W_l)}, in the VAE's dtype, in decoding order.

        Gradients flow to ``latents``, unless under ``torch.no_grad()``.
        """
        self._refuse_tiles()
        features: dict[str, Tensor] = {}
        raw = unscale(self.vae, latents).to(self.vae.dtype)  # (B, C, h, w)
        with self._hooks(features), frozen(self.vae), exact_precision(latents.device):
            try:
                pixels = self.vae.decode(raw, return_dict=False)[0]
            except _LastBlockReached:
                return features
        return {RGB: pixels}

    @contextmanager
    def _hooks(self, features: dict[str, Tensor]) -> Iterator[None]:
        handles = [
            module.register_forward_hook(partial(self._keep, features, name)) for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, features: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        features[name] = output
        if name == self.block_names[-1]:
            raise _LastBlockReached

    def _refuse_tiles(self) -> None:
        for name in ("slicing", "tiling"):
            if getattr(self.vae, f"use_{name}", False):
                raise ValueError(
                    f"the VAE has {name} enabled, and its blocks would run once per part of the batch or image; "
                    f"call vae.disable_{name}() on the one given to the latent perceptual loss"
                )


@contextmanager
def checkpointed_blocks(vae: nn.Module) -> Iterator[None]:
    """Within, a pass with gradient keeps only what goes from block to block, and recomputes the rest in backward."""
    if vae.is_gradient_checkpointing or not torch.is_grad_enabled():
        yield
        return
    vae.enable_gradient_checkpointing()
    try:
        yield
    finally:
        vae.disable_gradient_checkpointing()
