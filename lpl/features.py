"""The decoder's features, taken by forward hooks on the VAE's real decode path (Eq. 1).

Hooking, rather than walking through the decoder's modules, keeps whatever ``vae.decode`` does before its decoder
(``post_quant_conv`` above all). Decoding stops after the last block asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl.autoencoders import RGB, decoder_blocks, exact_precision, select_blocks, unscale
from lpl.objectives import at_least_float32


class _LastBlockReached(Exception):
    """Ends a decode whose remaining blocks nobody asked for."""


class DecoderFeatureExtractor:
    """``extractor(latents) -> {block name: features}`` (Eq. 1).

    The VAE is left as it was: no cast, no hook left behind, ``requires_grad`` unchanged; its parameters never receive
    a gradient.

    Args:
        vae: a diffusers autoencoder.
        blocks: names out of "mid" (AutoencoderDC has none), "up_0", "up_1", ...; None = all of them; ``("rgb",)`` =
            the decoded pixels.
        gradient_checkpointing: recompute each block in the backward pass, to save memory.

    Raises:
        ValueError: for a block that the decoder has not, an autoencoder of another make, or one that slices or tiles.
    """

    def __init__(
        self, vae: nn.Module, blocks: Sequence[str] | None = None, gradient_checkpointing: bool = False
    ) -> None:
        self.vae = vae
        self.gradient_checkpointing = gradient_checkpointing
        modules = decoder_blocks(vae)
        self.block_names = select_blocks(blocks, tuple(modules))
        self._modules = {name: modules[name] for name in self.block_names if name != RGB}
        self._refuse_tiles()

    def __call__(self, latents: Tensor) -> dict[str, Tensor]:
        """Scaled latents, (B, C, h, w) -> {name: (B, C_l, H_l, W_l)}, in the VAE's dtype, in decoding order.

        Gradients flow to ``latents``, unless under ``torch.no_grad()``.

        Raises:
            ValueError: where the latents are not this VAE's, or it has come to slice or tile.
        """
        self._refuse_tiles()
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be (B, {channels}, h, w) for this VAE, but are {tuple(latents.shape)}")
        features: dict[str, Tensor] = {}
        raw = unscale(self.vae, at_least_float32(latents)).to(self.vae.dtype)  # (B, C, h, w)
        with (
            self._hooks(features),
            DecoderPass(self.vae, self.gradient_checkpointing),
            exact_precision(latents.device),
        ):
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


class DecoderPass:
    """While one runs, the VAE's parameters need no gradient, and its blocks are checkpointed as the loss wants it.

    Whatever the caller's settings are, they stand again afterwards. Entered anew for each block that the backward pass
    recomputes, so that it is recomputed as it was computed.
    """

    def __init__(self, vae: nn.Module, gradient_checkpointing: bool) -> None:
        self.vae, self.gradient_checkpointing = vae, gradient_checkpointing
        self._left: list[ExitStack] = []  # what to undo, one entry per pass that runs

    def __enter__(self) -> None:
        self._left.append(stack := ExitStack())
        for parameter in self.vae.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        for module in self.vae.decoder.modules():
            if hasattr(module, "gradient_checkpointing"):  # diffusers' own way, which AutoencoderDC has not
                _set(stack, module, "gradient_checkpointing", False)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            for block in decoder_blocks(self.vae).values():
                _set(stack, block, "forward", partial(self._checkpoint, block.forward))

    def __exit__(self, *_: object) -> None:
        self._left.pop().close()

    def _checkpoint(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        recomputation = DecoderPass(self.vae, gradient_checkpointing=False)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation))


def _set(stack: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Give a module an attribute of its own until the stack is closed."""
    own = module.__dict__
    stack.callback(own.__setitem__, name, own[name]) if name in own else stack.callback(own.pop, name)
    own[name] = value
