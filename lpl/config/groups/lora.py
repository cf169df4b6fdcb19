"""Flags: LoRA and other adapters."""

from __future__ import annotations

from dataclasses import dataclass

from lpl.config import rules
from lpl.config.choices import ADAPTER_NAMES, ADAPTERS, ALL_LINEAR, INIT_LORA_WEIGHTS, LOKR, LORA, OFT, QUANTIZED, RANK
from lpl.config.flag import BELOW_ONE, POSITIVE, REFUSED, SILENT, TWO_OR_MORE, Range, flag


@dataclass(frozen=True)
class Lora:
    """LoRA"""

    lora: bool = flag(False, "train low-rank adapters (LoRA) instead of all weights", on_resume=REFUSED)
    rank: int | None = flag(
        None, f"rank of the LoRA adapters; giving it turns LoRA on; default: {RANK}", range=POSITIVE
    )
    lora_init: str | None = flag(
        None,
        "LoRA to start from instead of a new one, which also says rank and alpha: a file, a folder or a Hub id",
        public=rules.model_on_the_hub,
        path=True,
    )
    training_adapter: str | None = flag(
        None,
        "LoRA of the denoiser that is frozen and active in training only, for distilled models: a file, a folder or a "
        "Hub id",
        public=rules.model_on_the_hub,
        path=True,
    )
    lora_alpha: float | None = flag(
        None, "LoRA alpha; adapters are scaled by alpha / rank; default: the rank", range=POSITIVE
    )
    lora_dropout: float = flag(0.0, "dropout probability of the LoRA adapters", range=BELOW_ONE)
    lora_target_modules: tuple[str, ...] | None = flag(
        None, f"names of the denoiser modules that get LoRA adapters, or {ALL_LINEAR}; default: the family's"
    )
    use_dora: bool = flag(False, "DoRA: train magnitude and direction of each weight separately", on_resume=REFUSED)
    use_rslora: bool = flag(False, "rank-stabilised LoRA: scale adapters by alpha / sqrt(rank)", on_resume=REFUSED)
    lora_rank_pattern: tuple[str, ...] | None = flag(
        None, "ranks of some of the denoiser's modules, as peft's rank_pattern: NAME=RANK ...", word=rules.rank_pattern
    )
    lora_alpha_pattern: tuple[str, ...] | None = flag(
        None,
        "alphas of some of the denoiser's modules, as peft's alpha_pattern: NAME=ALPHA ...",
        word=rules.alpha_pattern,
    )
    init_lora_weights: str = flag(
        "gaussian",
        f"LoRA's first weights, as in peft, whose default is default: {', '.join(INIT_LORA_WEIGHTS)}",
        on_resume=SILENT,
    )
    adapter: str = flag(
        LORA,
        "kind of adapter on the denoiser; another one than lora turns --lora on; OFT has --oft_block_size in place of "
        "--rank and --lora_alpha",
        choices=ADAPTERS,
        on_resume=REFUSED,
    )
    decompose_both: bool = flag(
        False, "LoKr: decompose the first factor too", used=rules.when("adapter", LOKR), on_resume=REFUSED
    )
    decompose_factor: int = flag(
        -1,
        "LoKr: size of the first factor, where it divides the layer's; -1: near the square root",
        range=Range(lambda value: value == -1 or value > 0, "-1 or more than 0"),
        used=rules.when("adapter", LOKR),
        on_resume=REFUSED,
    )
    oft_block_size: int = flag(
        32,
        "OFT: size of the blocks that rotate a layer's inputs; should divide their number",
        range=TWO_OR_MORE,
        used=rules.when("adapter", OFT),
        on_resume=REFUSED,
    )
    quantize_base: str | None = flag(
        None,
        "quantize the frozen denoiser when training LoRA: on a GPU to 8 or 4 bits by bitsandbytes, or by quanto; by "
        "torchao; or to 8-bit floats (fp8), which needs no package, but --gradient_checkpointing",
        choices=tuple(QUANTIZED),
    )

    group_offload: bool = flag(
        False,
        "keep the frozen denoiser in CPU memory, each block of which is on the GPU while it runs; needs "
        "--gradient_checkpointing",
    )

    @property
    def ranks(self) -> dict[str, int]:
        """--lora_rank_pattern, by name."""
        return {name: int(value) for name, value in map(rules.halves, self.lora_rank_pattern or ())}

    @property
    def alphas(self) -> dict[str, float]:
        """--lora_alpha_pattern, by name."""
        return {name: float(value) for name, value in map(rules.halves, self.lora_alpha_pattern or ())}

    @property
    def words(self) -> str:
        """The adapter in words."""
        if self.adapter == OFT:
            return f"OFT with blocks of {self.oft_block_size}"
        return f"{ADAPTER_NAMES[self.adapter]} of rank {self.rank}"
