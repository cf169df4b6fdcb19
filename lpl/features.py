"""The decoder's features phi_l, taken by forward hooks on the VAE's own decode path (Eq. 1).

Hooks, unlike a loop over the decoder's modules, keep everything that ``vae.decode`` does before its decoder, such as
``post_quant_conv``. Decoding stops after the last requested block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner import HunyuanImageRefinerRMS_norm
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import QwenImage21RMS_norm
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lpl.autoencoders import (
    RGB,
    decode,
    decoder_blocks,
    decoder_levels,
    decoder_parts,
    exact_precision,
    feature_map,
    latent_channels,
    unscale,
)
from lpl.objectives import at_least_float32


# What the backward pass recomputes instead of keeping it: the output of such a norm, and of the activation behind it.
NORMS = (nn.GroupNorm, WanRMS_norm, QwenImageRMS_norm, QwenImage21RMS_norm, HunyuanImageRefinerRMS_norm)
ACTIVATIONS = (nn.SiLU, nn.Mish, nn.GELU, nn.ReLU)


BACKEND, RECOMPILE_LIMIT = "inductor", 256  # of torch.compile; parts of one class share its limit


class _LastBlockReached(Exception):
    """Ends a decode whose remaining blocks are not requested."""


class DecoderFeatureExtractor:
    """``extractor(latents) -> {block name: features}`` (Eq. 1).

    The VAE is left unchanged: no cast, no hook left behind, the same ``requires_grad``; its parameters never receive
    a gradient.

    Args:
        vae: a diffusers autoencoder.
        blocks: "mid" (AutoencoderDC has none), "up_0", "up_1", ..., and paths of modules that return a map, e.g.
            "decoder.up_blocks.1.resnets.0"; None = all named blocks; ``("rgb",)`` = the decoded pixels.
        gradient_checkpointing: recompute the blocks, one resnet at a time, in the backward pass, to save memory.
        compile_for: compile the decoder's parts for at most that many latents at once; None: do not. The number of
            latents is padded to a power of two, or to this number, so that each part is compiled a few times only.

    Raises:
        ValueError: for a block that the decoder lacks, an unsupported autoencoder, one that slices or tiles, or a
            block inside of a compiled part.
    """

    def __init__(
        self,
        vae: ModelMixin,
        blocks: Sequence[str] | None = None,
        gradient_checkpointing: bool = False,
        compile_for: int | None = None,
    ) -> None:
        self.vae = vae
        self.gradient_checkpointing, self.compile_for = gradient_checkpointing, compile_for
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}
        self._modules = decoder_blocks(vae, blocks)
        self.block_names = tuple(self._modules) or (RGB,)
        self._first = [parts[-1] for parts in decoder_levels(vae).values()][:1]  # empty for an unsupported decoder
        # (H_1, W_1) of the first block, selected or not; of the first map for an unsupported decoder
        self.first_shape: torch.Size | None = None
        self._refuse_tiles()
        if gradient_checkpointing:
            decoder_parts(vae)  # raises for an unsupported decoder
        if compile_for is not None:
            self._compile()

    def __call__(self, latents: Tensor) -> dict[str, Tensor]:
        """Scaled latents, (B, C, h, w) -> {name: (B, C_l, H_l, W_l)}, in the VAE's dtype, in decoding order (Eq. 1).

        Gradients flow to ``latents``, unless under ``torch.no_grad()``.

        Raises:
            ValueError: if the latents do not fit this VAE, slicing or tiling is enabled, or a later module overwrites
                the output of a named one in place.
        """
        features, versions = {}, {}

        def take(name: str, maps: Tensor) -> None:
            features[name], versions[name] = maps, maps._version

        self.visit(latents, take)
        if changed := [name for name, maps in features.items() if maps._version != versions[name]]:
            raise ValueError(
                f"--lpl_blocks: the decoder overwrites what {', '.join(changed)} returns; name the module that does"
            )
        return features

    def visit(self, latents: Tensor, see: Callable[[str, Tensor], None]) -> None:
        """As ``__call__``, but calls ``see(name, features)`` for each block as soon as its features exist."""
        self._refuse_tiles()
        self.check_latents(latents)
        self.first_shape = None
        raw = unscale(self.vae, at_least_float32(latents)).to(self.vae.dtype)  # (B, C, h, w)
        if (more := self.padded_size(len(raw)) - len(raw)) > 0:
            see, raw = partial(_see_first, see, len(raw)), torch.cat([raw, raw.new_zeros(more, *raw.shape[1:])])
        if raw.device.type == "cpu":  # avoids conversions in every convolution
            raw = raw.contiguous(memory_format=torch.channels_last)
        with (
            # A module that the caller has compiled ignores hooks that are added later
            nullcontext() if self._compiled else torch.compiler.set_stance("force_eager"),
            self._hooks(see) as waiting,
            DecoderPass(self.vae, self.gradient_checkpointing, self._compiled),
            exact_precision(latents.device),
        ):
            try:
                pixels = decode(self.vae, raw)
            except _LastBlockReached:
                return
            if waiting:
                raise ValueError(f"--lpl_blocks: {', '.join(sorted(waiting))} did not run when the VAE decoded")
            self._measure(pixels)
            see(RGB, pixels)

    def _compile(self) -> None:
        parts = decoder_parts(self.vae)
        inner = {module for part in parts for module in part.modules() if module is not part}
        if inside := [name for name, module in self._modules.items() if module in inner]:
            raise ValueError(
                f"--lpl_blocks {inside[0]}: --torch_compile compiles the part of the decoder that it lies in; leave "
                "one of them out, or name the whole part"
            )
        options: dict[str, Any] = {"dynamic": False, "backend": BACKEND, "recompile_limit": RECOMPILE_LIMIT}
        self._compiled = {part: torch.compile(part.forward, **options) for part in parts}

    def padded_size(self, count: int) -> int:
        """How many latents are decoded for that many: more if it is compiled."""
        if not self.compile_for or count >= self.compile_for:
            return count
        return min(2 ** (count - 1).bit_length(), self.compile_for)

    def check_latents(self, latents: Tensor) -> None:
        """Refuse latents that do not fit this VAE.

        Raises:
            ValueError: with the accepted shape.
        """
        channels = latent_channels(self.vae.config)
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be (B, {channels}, h, w) for this VAE, but are {tuple(latents.shape)}")

    def _measure(self, maps: Tensor) -> None:
        self.first_shape = self.first_shape or maps.shape[-2:]

    @contextmanager
    def _hooks(self, see: Callable[[str, Tensor], None]) -> Iterator[set[str]]:
        waiting = set(self._modules)

        def measure(module: nn.Module, inputs: Any, output: Any) -> None:
            self._measure(feature_map(output))

        def show(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if name in waiting:
                maps = feature_map(output)
                self._measure(maps)
                see(name, maps)
                waiting.remove(name)
                if not waiting:
                    raise _LastBlockReached

        handles = [module.register_forward_hook(measure) for module in self._first]
        handles += [module.register_forward_hook(partial(show, name)) for name, module in self._modules.items()]
        try:
            yield waiting
        finally:
            for handle in handles:
                handle.remove()

    def _refuse_tiles(self) -> None:
        for name in ("slicing", "tiling"):
            if getattr(self.vae, f"use_{name}", False):
                raise ValueError(
                    f"the VAE has {name} enabled, and its blocks would run once per part of the batch or image; "
                    f"call vae.disable_{name}() on the one given to the latent perceptual loss"
                )


class DecoderPass:
    """Context of a decode: the VAE's parameters require no gradient, and the backward pass keeps little memory.

    Frozen convolutions do not save their inputs. A norm and the activation behind it save the norm's input only, and
    the backward pass computes both again; no convolution runs twice. Norms and activations of other classes (NORMS,
    ACTIVATIONS), or that are no modules, run as they are. With ``gradient_checkpointing`` the blocks are recomputed
    one resnet at a time. No number changes.

    Compiled parts run instead of a part's modules; the compiler itself keeps little then.

    The caller's settings are restored on exit. The context is entered again for each part that the backward pass
    recomputes, so that the recomputation is identical. A VAE can be used by one thread at a time.
    """

    def __init__(
        self,
        vae: ModelMixin,
        gradient_checkpointing: bool,
        compiled: Mapping[nn.Module, Callable[..., Tensor]] | None = None,
    ) -> None:
        self.vae, self.gradient_checkpointing, self._compiled = vae, gradient_checkpointing, compiled or {}
        self._parameters = list(vae.parameters())
        inside = {module for part in self._compiled for module in part.modules()}
        self._modules = [module for module in getattr(vae, "decoder", vae).modules() if module not in inside]
        self._left: list[ExitStack] = []  # one stack to undo per active pass
        self._normalised: _Normalised | None = None  # by the norm that ran last

    def __enter__(self) -> None:
        self._left.append(stack := ExitStack())
        for parameter in self._parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        for module in self._modules:
            if hasattr(module, "gradient_checkpointing"):  # diffusers' own checkpointing, which AutoencoderDC lacks
                _set(stack, module, "gradient_checkpointing", False)
            if torch.is_grad_enabled() and "forward" not in vars(module):
                if type(module) is nn.Conv2d and _is_plain(module):
                    _set(stack, module, "forward", partial(_frozen_convolution, module))
                elif type(module) in NORMS:
                    _set(stack, module, "forward", partial(self._normalise, module))
                elif type(module) in ACTIVATIONS and not getattr(module, "inplace", False):
                    _set(stack, module, "forward", partial(self._activate, module))
        for part, forward in self._compiled.items():
            _set(stack, part, "forward", forward)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            for part in decoder_parts(self.vae):
                _set(stack, part, "forward", partial(self._checkpoint, part.forward))

    def __exit__(self, *_: object) -> None:
        self._left.pop().close()
        self._normalised = None

    def _normalise(self, norm: nn.Module, features: Tensor) -> Tensor:
        maps = type(norm).forward(norm, features)
        self._normalised = _Normalised(ref(maps), features, norm)
        return maps

    def _activate(self, activation: nn.Module, maps: Tensor) -> Tensor:
        of, self._normalised = self._normalised, None
        if of is None or of.maps() is not maps or not of.features.requires_grad:
            return type(activation).forward(activation, maps)
        return _NormAndActivation.apply(of.features, maps.detach(), of.norm, activation)

    def _checkpoint(self, forward: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        recomputation = copy(self)
        recomputation.gradient_checkpointing, recomputation._left, recomputation._normalised = False, [], None
        return checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation), **options
        )


def _see_first(see: Callable[[str, Tensor], None], count: int, name: str, maps: Tensor) -> None:
    see(name, maps[:count])


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether it has zero padding given in numbers."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _frozen_convolution(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    return _FrozenConvolution.apply(features, convolution)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with constant weights: its backward pass, a transposed convolution, does not need the input."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, convolution: nn.Conv2d) -> Tensor:
        ctx.shape, ctx.convolution = features.shape, convolution
        return nn.Conv2d.forward(convolution, features)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None]:
        of = ctx.convolution
        reached = (  # size of the transposed convolution's output; a stride may have skipped the rest
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for size, stride, padding, dilation, kernel in zip(
                gradient.shape[-2:], of.stride, of.padding, of.dilation, of.kernel_size
            )
        )
        rest = tuple(size - reach for size, reach in zip(ctx.shape[-2:], reached))
        transposed = F.conv_transpose2d(gradient, of.weight, None, of.stride, of.padding, rest, of.groups, of.dilation)
        return transposed, None


class _Normalised(NamedTuple):
    """What a norm has made of its input."""

    maps: Callable[[], Tensor | None]  # a weak reference: the norm's output is not kept
    features: Tensor
    norm: nn.Module


class _NormAndActivation(torch.autograd.Function):
    """``activation(norm(features))``, of which the backward pass keeps ``features`` only; ``maps`` is the norm's."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, maps: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
        ctx.save_for_backward(features)
        ctx.norm, ctx.activation = norm, activation
        return type(activation).forward(activation, maps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        features = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), exact_precision(features.device):
            maps = type(ctx.norm).forward(ctx.norm, features)
            maps = type(ctx.activation).forward(ctx.activation, maps)
        return *torch.autograd.grad(maps, features, gradient), None, None, None


def _set(stack: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an instance attribute of a module until the stack is closed."""
    own = module.__dict__
    stack.callback(own.__setitem__, name, own[name]) if name in own else stack.callback(own.pop, name)
    own[name] = value
