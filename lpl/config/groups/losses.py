"""Flags: LPL and the diffusion loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lpl.config import rules
from lpl.config.flag import FINITE, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, flag
from lpl.options import (
    AUTO,
    BIAS_STRATEGIES,
    DEPTH_WEIGHTINGS,
    DISTANCES,
    DTYPES,
    MASK_DEFAULTS,
    NORMALIZATIONS,
    VARIANTS,
    WEIGHTING_SCHEMES,
    parse_weight,
)


@dataclass(frozen=True)
class Lpl:
    """latent perceptual loss"""

    lpl_weight: str = flag(
        "auto:0.2",
        "weight of LPL; auto:SHARE sets it so that LPL is this share of the total loss; 0 turns LPL off",
        same_loss=True,
    )
    lpl_measuring_steps: int = flag(
        50,
        "number of first steps with LPL that measure the share of LPL, from which auto:SHARE sets the weight",
        range=POSITIVE,
        training_only=True,
        same_loss=True,
    )
    lpl_blocks: tuple[str, ...] | None = flag(
        None, "decoder blocks to compare: mid up_0 up_1 ..., or rgb alone for decoded pixels; default: all blocks"
    )
    lpl_sigma_threshold: float = flag(
        3.0,
        "apply LPL where the noise-to-signal ratio is at most this, at --lpl_threshold_base_resolution",
        range=POSITIVE,
        same_loss=True,
    )
    lpl_threshold_base_resolution: int = flag(
        256,
        "resolution that --lpl_sigma_threshold is given for; the threshold scales with the image side; 0 = no scaling",
        range=NOT_NEGATIVE,
        same_loss=True,
    )
    lpl_normalization: str = flag(
        "shared",
        "feature normalisation: by the prediction's statistics (shared), by each side's own (separate), or none",
        choices=NORMALIZATIONS,
    )
    lpl_detach_statistics: bool = flag(False, "stop the gradient through the statistics of --lpl_normalization")
    lpl_depth_weighting: str | tuple[float, ...] = flag(
        "inverse",
        f"weights of the decoder blocks: {', '.join(DEPTH_WEIGHTINGS)}, or one number per block",
        words=rules.depth_weighting,
    )
    lpl_no_outlier_mask: bool = flag(False, "turn off the masks that exclude outliers of the decoder features")
    lpl_outlier_quantile: float = flag(
        MASK_DEFAULTS["quantile"],
        "outlier masks: share q; the q and 1 - q quantiles of each feature map bound the values that are kept",
        range=rules.mask_range("quantile"),
        used=rules.unless("lpl_no_outlier_mask"),
    )
    lpl_outlier_margin: float = flag(
        MASK_DEFAULTS["margin"],
        "outlier masks: keep values up to this many standard deviations beyond the quantiles",
        range=rules.mask_range("margin"),
        used=rules.unless("lpl_no_outlier_mask"),
    )
    lpl_outlier_dilation: int = flag(
        MASK_DEFAULTS["dilation"],
        "outlier masks: kernel size that removes isolated false positives, at 256 px; scales with the image side",
        range=rules.mask_range("dilation"),
        used=rules.unless("lpl_no_outlier_mask"),
    )
    lpl_outlier_erosion: int = flag(
        MASK_DEFAULTS["erosion"],
        "outlier masks: kernel size that grows the masked regions, at 256 px; scales with the image side",
        range=rules.mask_range("erosion"),
        used=rules.unless("lpl_no_outlier_mask"),
    )
    lpl_outlier_stride: int = flag(
        MASK_DEFAULTS["stride"],
        "outlier masks: compute the quantiles from every N-th position; larger is faster and less exact",
        range=rules.mask_range("stride"),
        used=rules.unless("lpl_no_outlier_mask"),
    )
    lpl_distance: str = flag("l2", "squared (l2) or absolute (l1) difference of features", choices=DISTANCES)
    lpl_variant: str = flag(
        "paper",
        "the loss of the paper, or exactly that of the released code, diffusers' LPL research project (reference)",
        choices=VARIANTS,
        held_out="paper",
    )
    lpl_start_step: int = flag(
        0, "first optimizer step with LPL", range=NOT_NEGATIVE, training_only=True, same_loss=True
    )
    lpl_ramp_steps: int = flag(
        0,
        "steps after --lpl_start_step over which the weight of LPL grows linearly to its full value",
        range=NOT_NEGATIVE,
        training_only=True,
        same_loss=True,
    )
    lpl_every: int = flag(
        1, "apply LPL at every N-th step only, with N times the weight", range=POSITIVE, training_only=True
    )
    lpl_max_samples: int | None = flag(
        None,
        "apply LPL to at most N of a micro-batch's samples below the threshold, rescaled to stand for all of them",
        range=POSITIVE,
        held_out=None,
        training_only=True,
        used=rules.less_than("lpl_max_samples", "train_batch_size"),
    )
    lpl_crop: int | None = flag(
        None,
        "apply LPL to a random square crop of each image with a side of N pixels; default: the whole image",
        range=POSITIVE,
        held_out=None,
        training_only=True,
        used=rules.crops_for_lpl,
    )
    lpl_project_conflicts: bool = flag(
        False,
        "remove from LPL's gradient at the model's output what opposes that of the diffusion loss, sample by sample",
        training_only=True,
    )
    lpl_chunk_size: int | None = flag(
        None,
        "number of samples that LPL decodes at a time; smaller saves memory; default: auto, as many as need 2 GiB",
        range=POSITIVE,
        same_loss=True,
        word=rules.count_or_auto,
        used=rules.less_than("lpl_chunk_size", "train_batch_size"),
    )
    lpl_gradient_checkpointing: bool = flag(
        False,
        "recompute the decoder's activations in the backward pass to save memory",
        training_only=True,
        same_loss=True,
    )
    lpl_vae_dtype: str = flag(
        AUTO,
        "precision of the decoder that LPL uses; auto: bfloat16 if --mixed_precision is bf16, else float32",
        choices=(AUTO, *DTYPES),
        same_loss=True,
        former_default="float32",
    )
    lpl_student: str | None = flag(
        None,
        "student of the VAE's decoder that takes LPL's place, made by python -m lpl.distill; a folder or an id on the "
        "Hub; validation keeps LPL itself",
        held_out=None,
        training_only=True,
        public=rules.on_the_hub,
        path=True,
    )
    lpl_correct_every: int = flag(
        0,
        "with --lpl_student, add N times the difference between LPL and the student on every N-th step with LPL, so "
        "that the expected gradient is LPL's; 0 = never",
        range=NOT_NEGATIVE,
        training_only=True,
        used=rules.has("lpl_student"),
    )
    lpl_vae_name_or_path: str | None = flag(
        None,
        "VAE with the same latent space whose decoder LPL uses; default: the pipeline's",
        public=rules.on_the_hub,
        path=True,
    )

    @property
    def enabled(self) -> bool:
        """Whether LPL is part of the training loss."""
        return parse_weight(self.lpl_weight) != (0.0, None)

    def decoder_dtype(self, mixed_precision: str = "no") -> str:
        """The precision of the decoder in a run of that mixed precision."""
        if self.lpl_vae_dtype != AUTO:
            return self.lpl_vae_dtype
        return "bfloat16" if mixed_precision == "bf16" else "float32"

    def loss_options(self) -> dict[str, Any]:
        """The options of :class:`lpl.LatentPerceptualLoss`; those of masks and memory only if not the default."""
        outliers = {name: getattr(self, f"lpl_outlier_{name}") for name in MASK_DEFAULTS}
        if self.lpl_no_outlier_mask:
            outliers.clear()
        outliers = {name: value for name, value in outliers.items() if value != MASK_DEFAULTS[name]}
        cost = {"outliers": outliers, "chunk_size": self.lpl_chunk_size}
        return {
            "normalization": self.lpl_normalization,
            "detach_statistics": self.lpl_detach_statistics,
            "depth_weighting": self.lpl_depth_weighting,
            "mask_outliers": not self.lpl_no_outlier_mask,
            "distance": self.lpl_distance,
            "variant": self.lpl_variant,
        } | {name: value for name, value in cost.items() if value}


@dataclass(frozen=True)
class Diffusion:
    """diffusion loss"""

    snr_gamma: float | None = flag(
        None,
        "gamma of min-SNR weighting, 5.0 in its paper; default: no weighting; not for flow matching",
        range=NOT_NEGATIVE,
        held_out=None,
    )
    noise_offset: float = flag(
        0.0, "scale of the noise offset, which is constant over each channel", range=FINITE, held_out=0.0
    )
    input_perturbation: float = flag(
        0.0,
        "scale of additional noise in the denoiser's input, which is not part of the target",
        range=FINITE,
        held_out=0.0,
    )
    dream_training: bool = flag(
        False, "DREAM: correct inputs and targets by the model's own prediction error", held_out=False
    )
    dream_detail_preservation: float = flag(
        1.0, "DREAM: exponent p; larger preserves more detail", range=NOT_NEGATIVE, used=rules.when("dream_training")
    )
    timestep_bias_strategy: str = flag(
        "none",
        "timesteps to sample more often: the earlier (less noisy) ones, the later ones, or a range",
        choices=BIAS_STRATEGIES,
    )
    timestep_bias_multiplier: float = flag(
        1.0,
        "how many times more often --timestep_bias_strategy samples its timesteps",
        range=POSITIVE,
        used=rules.when("timestep_bias_strategy", "earlier", "later", "range"),
    )
    timestep_bias_begin: int = flag(
        0,
        "--timestep_bias_strategy range: first timestep",
        range=NOT_NEGATIVE,
        used=rules.when("timestep_bias_strategy", "range"),
    )
    timestep_bias_end: int = flag(
        1000,
        "--timestep_bias_strategy range: last timestep, exclusive",
        range=POSITIVE,
        used=rules.when("timestep_bias_strategy", "range"),
    )
    timestep_bias_portion: float = flag(
        0.25,
        "--timestep_bias_strategy earlier or later: share of all timesteps to sample more often",
        range=POSITIVE_SHARE,
        used=rules.when("timestep_bias_strategy", "earlier", "later"),
    )
    weighting_scheme: str | None = flag(
        None,
        "flow matching: sampling density of the timesteps and weighting of the loss; default: logit_normal",
        choices=WEIGHTING_SCHEMES,
        held_out=None,
    )
    precondition_outputs: int = flag(
        0,
        "flow matching: 1 computes the loss on the estimated clean latent instead of the velocity",
        choices=(0, 1),
        held_out=0,
    )
    logit_mean: float = flag(
        0.0, "--weighting_scheme logit_normal: mean", range=FINITE, used=rules.when("weighting_scheme", "logit_normal")
    )
    logit_std: float = flag(
        1.0,
        "--weighting_scheme logit_normal: standard deviation",
        range=NOT_NEGATIVE,
        used=rules.when("weighting_scheme", "logit_normal"),
    )
    mode_scale: float = flag(
        1.29, "--weighting_scheme mode: scale", range=FINITE, used=rules.when("weighting_scheme", "mode")
    )
