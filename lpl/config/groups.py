"""Every flag of the training script, declared once; names, meanings and defaults are those of diffusers' scripts.

Where the scripts of diffusers differ, ``train_text_to_image.py`` decides. A default of None is often filled in later,
from the pipeline (:func:`lpl.families.resolve.resolve`). A function takes the groups that it reads, not all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from lpl.config import rules
from lpl.config.choices import (
    ALL_LINEAR,
    CLIP,
    EMA_DECAY,
    EMA_DECAY_WITH_LPL,
    HUB_STRATEGIES,
    INTERPOLATION_MODES,
    LR_SCHEDULERS,
    METRICS,
    OPTIMIZERS,
    RANK,
    SET_METRICS,
    TRACKERS,
)
from lpl.config.flag import (
    BELOW_ONE,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE,
    TWO_OR_MORE,
    OnResume,
    at_most,
    flag,
)
from lpl.options import (
    BIAS_STRATEGIES,
    DEPTH_WEIGHTINGS,
    DISTANCES,
    DTYPES,
    MASK_DEFAULTS,
    NORMALIZATIONS,
    OBJECTIVE_NAMES,
    VARIANTS,
    WEIGHTING_SCHEMES,
    parse_weight,
)


REFUSED, SILENT, LENGTH = OnResume.REFUSED, OnResume.SILENT, OnResume.LENGTH
silent_flag = partial(flag, on_resume=SILENT)
own_flag = partial(flag, on_resume=SILENT, own=True)


@dataclass(frozen=True)
class Model:
    """model"""

    pretrained_model_name_or_path: str | None = flag(
        None, "pipeline to fine-tune: a folder or an id on the Hub", public=rules.on_the_hub, path=True
    )
    revision: str | None = flag(
        None, "branch, tag or commit of the pipeline on the Hub", public=rules.is_revision, used=rules.from_the_hub
    )
    variant: str | None = flag(None, "variant of the weight files, e.g. fp16", public=rules.is_word)
    non_ema_revision: str | None = flag(
        None,
        "revision with the denoiser's weights that are no moving average, to start from",
        public=rules.is_revision,
        used=rules.from_the_hub,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None, "another VAE to encode and decode with", public=rules.on_the_hub, path=True
    )
    cache_dir: str | None = own_flag(None, "where downloaded models and data sets are kept", path=True)
    from_scratch: bool = flag(False, "start the denoiser from random weights, not from the pipeline's")
    train_text_encoder: bool = flag(False, "train the CLIP text encoders too, at --text_encoder_lr", on_resume=REFUSED)
    max_sequence_length: int | None = flag(
        None, "tokens of a caption that a T5 or Gemma is given; default: the family's", range=POSITIVE
    )
    guidance_scale: float = flag(3.5, "guidance that Flux's denoiser is told in training", range=NOT_NEGATIVE)
    prediction_type: str | None = flag(
        None,
        "what the denoiser is trained to predict; default: what the pipeline was trained on",
        choices=OBJECTIVE_NAMES,
        on_resume=REFUSED,
    )

    @property
    def pipeline(self) -> str:
        """Folder or Hub id of the pipeline, once the flags are checked."""
        assert self.pretrained_model_name_or_path is not None
        return self.pretrained_model_name_or_path

    @property
    def objective(self) -> str:
        """Name of the objective, once it is resolved."""
        assert self.prediction_type is not None
        return self.prediction_type


@dataclass(frozen=True)
class Lora:
    """LoRA"""

    lora: bool = flag(False, "train low-rank adapters (LoRA) instead of all weights", on_resume=REFUSED)
    rank: int | None = flag(None, f"their rank; given, it means --lora; default: {RANK}", range=POSITIVE)
    lora_alpha: float | None = flag(None, "their scale, divided by the rank; default: the rank", range=POSITIVE)
    lora_dropout: float = flag(0.0, "share of their inputs that is dropped", range=BELOW_ONE)
    lora_target_modules: tuple[str, ...] | None = flag(
        None, f"names of the denoiser's modules that get one, or {ALL_LINEAR}; default: the family's"
    )
    use_dora: bool = flag(False, "DoRA: adapt direction and magnitude of the weights apart", on_resume=REFUSED)
    use_rslora: bool = flag(False, "rank-stabilised LoRA: divide alpha by the rank's square root", on_resume=REFUSED)
    quantize_base: str | None = flag(
        None, "keep the frozen denoiser in so many bits; needs a GPU", choices=("8bit", "4bit")
    )


@dataclass(frozen=True)
class Data:
    """data"""

    dataset_name: str | None = flag(
        None, "data set on the Hub, or a folder that load_dataset understands", public=rules.on_the_hub, path=True
    )
    dataset_config_name: str | None = flag(None, "configuration of that data set")
    train_data_dir: str | None = flag(
        None,
        "folder of images with a metadata.jsonl (file_name, text), or with a folder per class",
        public=rules.within_the_data_set,
        path=True,
    )
    streaming: bool = flag(
        False, "read the data while training; --train_data_dir is a folder of .parquet or .tar (WebDataset) files then"
    )
    shuffle_buffer_size: int = flag(
        1000, "images that --streaming shuffles at a time", range=POSITIVE, used=rules.shuffles_a_stream
    )
    image_column: str = flag("image", "column with the images")
    caption_column: str = flag("text", "column with a caption or several; with DiT class labels, from label")
    max_train_samples: int | None = flag(
        None, "train on so many images at most, drawn by the seed, or the first ones", range=POSITIVE
    )
    max_bad_samples: str | None = flag(
        None, "unreadable samples to bear: a number, or a share below 1; default: any number"
    )
    validation_split: str | None = flag(
        None, "split of --dataset_name for the validation loss, which is not trained on"
    )
    validation_every_nth: int | None = flag(
        None, "keep every so many-th image for the validation loss instead", range=TWO_OR_MORE
    )
    num_validation_samples: int = flag(
        64, "images at most that the validation loss is taken on", range=POSITIVE, used=rules.holds_out
    )
    resolution: int | None = flag(
        None, "side of the square training images in pixels; default: the family's", range=POSITIVE
    )
    center_crop: bool = flag(False, "crop the centre instead of a random square", held_out=True)
    random_flip: bool = flag(False, "mirror half of the images", held_out=False)
    image_interpolation_mode: str = flag("lanczos", "how images are resized", choices=INTERPOLATION_MODES)
    proportion_empty_prompts: float | None = flag(
        None, "share of captions that are left empty; default: the family's", range=SHARE, held_out=0.0
    )
    dataloader_num_workers: int = silent_flag(
        0, "processes that load images; 0 = the main process", range=NOT_NEGATIVE
    )
    dataloader_timeout: float = flag(
        600.0,
        "seconds after which a file that is still being read counts as a bad sample; 0 = wait for ever",
        range=NOT_NEGATIVE,
    )

    @property
    def folder(self) -> str:
        """--train_data_dir where no --dataset_name is given, once the flags are checked."""
        assert self.train_data_dir is not None
        return self.train_data_dir

    @property
    def holds_out(self) -> bool:
        """Whether a part of the data is for the held-out losses only."""
        return self.validation_split is not None or self.validation_every_nth is not None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels, once the resolution is resolved."""
        assert self.resolution is not None
        return self.resolution, self.resolution


@dataclass(frozen=True)
class Lpl:
    """latent perceptual loss"""

    lpl_weight: str = flag(
        "auto:0.2",
        "auto:SHARE finds the weight that gives LPL that share of the loss; a number is the weight; 0 is off",
        same_loss=True,
    )
    lpl_measuring_steps: int = flag(
        50,
        "first steps with LPL, over which its share is measured",
        range=POSITIVE,
        training_only=True,
        same_loss=True,
    )
    lpl_blocks: tuple[str, ...] | None = flag(
        None, "decoder blocks to compare: mid up_0 up_1 ..., or rgb alone; default: all"
    )
    lpl_sigma_threshold: float = flag(
        3.0, "noise-to-signal ratio up to which LPL applies", range=POSITIVE, same_loss=True
    )
    lpl_threshold_base_resolution: int = flag(
        256,
        "resolution that the threshold is stated for; it grows with the side; 0 = use it as it is",
        range=NOT_NEGATIVE,
        same_loss=True,
    )
    lpl_normalization: str = flag("shared", "whose statistics standardise features", choices=NORMALIZATIONS)
    lpl_detach_statistics: bool = flag(False, "no gradient through those statistics")
    lpl_depth_weighting: str | tuple[float, ...] = flag(
        "inverse", f"one of {', '.join(DEPTH_WEIGHTINGS)}, or one number per block", words=rules.depth_weighting
    )
    lpl_no_outlier_mask: bool = flag(False, "do not mask outliers of the decoder's features")
    lpl_outlier_quantile: float = flag(
        MASK_DEFAULTS["quantile"],
        "masks: share of a map's positions at either end that its bounds are read off",
        range=rules.mask_range("quantile"),
        used=rules.with_masks,
    )
    lpl_outlier_margin: float = flag(
        MASK_DEFAULTS["margin"],
        "masks: standard deviations beyond those bounds that are still kept",
        range=rules.mask_range("margin"),
        used=rules.with_masks,
    )
    lpl_outlier_dilation: int = flag(
        MASK_DEFAULTS["dilation"],
        "masks: kernel at 256 px that drops lone false positives; it grows with the side, as does the next",
        range=rules.mask_range("dilation"),
        used=rules.with_masks,
    )
    lpl_outlier_erosion: int = flag(
        MASK_DEFAULTS["erosion"],
        "masks: kernel at 256 px that then grows the outliers found",
        range=rules.mask_range("erosion"),
        used=rules.with_masks,
    )
    lpl_outlier_stride: int = flag(
        MASK_DEFAULTS["stride"],
        "masks: read the bounds off every so many-th position; more is faster and a little less exact",
        range=rules.mask_range("stride"),
        used=rules.with_masks,
    )
    lpl_distance: str = flag("l2", "squared or absolute difference of features", choices=DISTANCES)
    lpl_variant: str = flag(
        "paper", "reference: the numbers of the authors' released code", choices=VARIANTS, held_out="paper"
    )
    lpl_start_step: int = flag(
        0, "first optimizer step with LPL", range=NOT_NEGATIVE, training_only=True, same_loss=True
    )
    lpl_ramp_steps: int = flag(
        0,
        "steps over which its weight then grows to its full value",
        range=NOT_NEGATIVE,
        training_only=True,
        same_loss=True,
    )
    lpl_every: int = flag(
        1, "LPL on every so many-th step only, with so many times the weight", range=POSITIVE, training_only=True
    )
    lpl_max_samples: int | None = flag(
        None,
        "LPL on so many samples of a micro-batch at most, drawn from those inside the threshold, for all of them",
        range=POSITIVE,
        held_out=None,
        training_only=True,
        used=rules.takes_some_samples,
    )
    lpl_crop: int | None = flag(
        None,
        "LPL on a random part of the images with sides of so many pixels",
        range=POSITIVE,
        held_out=None,
        training_only=True,
        used=rules.takes_a_part,
    )
    lpl_chunk_size: int | None = flag(
        None,
        "samples that LPL decodes at a time, to save memory; default: all",
        range=POSITIVE,
        same_loss=True,
        used=rules.decodes_in_chunks,
    )
    lpl_gradient_checkpointing: bool = flag(
        False, "recompute decoder blocks in backward to save memory", training_only=True, same_loss=True
    )
    lpl_vae_dtype: str = flag(
        "float32", "precision of the decoder that LPL looks through", choices=DTYPES, same_loss=True
    )
    lpl_vae_name_or_path: str | None = flag(
        None,
        "another VAE with the same latent space to look through; default: the pipeline's",
        public=rules.on_the_hub,
        path=True,
    )

    @property
    def enabled(self) -> bool:
        """Whether LPL is trained on."""
        return parse_weight(self.lpl_weight) != (0.0, None)

    def loss_options(self) -> dict[str, Any]:
        """The options of :class:`lpl.LatentPerceptualLoss`; of masks and memory only what is not the default."""
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
        "gamma of min-SNR weighting; 5.0 is its paper's; not for flow matching",
        range=NOT_NEGATIVE,
        held_out=None,
    )
    noise_offset: float = flag(0.0, "scale of a noise that is equal over a whole channel", range=FINITE, held_out=0.0)
    input_perturbation: float = flag(
        0.0, "scale of noise added to the denoiser's input only", range=FINITE, held_out=0.0
    )
    dream_training: bool = flag(False, "DREAM: correct the training pair by the model's own error", held_out=False)
    dream_detail_preservation: float = flag(
        1.0, "DREAM's p: larger keeps more detail", range=NOT_NEGATIVE, used=rules.dreams
    )
    timestep_bias_strategy: str = flag(
        "none",
        "timesteps to draw more often: the earlier (less noisy) ones, the later ones, or a range",
        choices=BIAS_STRATEGIES,
    )
    timestep_bias_multiplier: float = flag(
        1.0, "how much more often those are drawn", range=POSITIVE, used=rules.biased("earlier", "later", "range")
    )
    timestep_bias_begin: int = flag(0, "first timestep of the range", range=NOT_NEGATIVE, used=rules.biased("range"))
    timestep_bias_end: int = flag(
        1000, "timestep before which the range ends", range=POSITIVE, used=rules.biased("range")
    )
    timestep_bias_portion: float = flag(
        0.25,
        "share of the timesteps that is earlier, or later",
        range=POSITIVE_SHARE,
        used=rules.biased("earlier", "later"),
    )
    weighting_scheme: str | None = flag(
        None,
        "flow matching: density of timesteps and weight of the loss; default: logit_normal",
        choices=WEIGHTING_SCHEMES,
        held_out=None,
    )
    precondition_outputs: int = flag(
        0,
        "flow matching: 1 takes the error of the estimated clean latent instead of the velocity's",
        choices=(0, 1),
        held_out=0,
    )
    logit_mean: float = flag(0.0, "mean of the logit_normal density", range=FINITE, used=rules.density("logit_normal"))
    logit_std: float = flag(
        1.0, "standard deviation of the logit_normal density", range=NOT_NEGATIVE, used=rules.density("logit_normal")
    )
    mode_scale: float = flag(1.29, "scale of the mode density", range=FINITE, used=rules.density("mode"))


@dataclass(frozen=True)
class Optimization:
    """optimization"""

    train_batch_size: int = flag(16, "images per process and micro-batch", range=POSITIVE)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", range=POSITIVE)
    num_train_epochs: int = flag(
        100, "passes over the data, unless --max_train_steps is given", range=NOT_NEGATIVE, on_resume=LENGTH
    )
    max_train_steps: int | None = flag(
        None, "optimizer steps in all", range=(NOT_NEGATIVE, at_most(10_000_000)), on_resume=LENGTH
    )
    learning_rate: float = flag(0.0001, "learning rate after warm-up", range=NOT_NEGATIVE)
    text_encoder_lr: float | None = flag(
        None,
        "that of the text encoders; default: the family's, or the same",
        range=NOT_NEGATIVE,
        used=rules.trains_text_encoders,
    )
    scale_lr: bool = flag(False, "multiply both by processes, micro-batches and batch size")
    lr_scheduler: str = flag("constant", "learning-rate schedule", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = flag(
        500, "optimizer steps of warm-up, for schedules that have one", range=NOT_NEGATIVE, used=rules.warms_up
    )
    lr_num_cycles: int = flag(
        1, "restarts of cosine_with_restarts", range=POSITIVE, used=rules.scheduled("cosine_with_restarts")
    )
    lr_power: float = flag(1.0, "power of the polynomial schedule", range=FINITE, used=rules.scheduled("polynomial"))
    optimizer: str = flag(OPTIMIZERS[0], " or ".join(OPTIMIZERS), on_resume=REFUSED)
    use_8bit_adam: bool = flag(False, "8-bit AdamW of bitsandbytes", on_resume=REFUSED)
    adam_beta1: float = flag(0.9, "decay of the first moment, also Prodigy's", range=BELOW_ONE)
    adam_beta2: float = flag(0.999, "decay of the second moment, also Prodigy's", range=BELOW_ONE)
    adam_weight_decay: float = flag(0.01, "weight decay, also Prodigy's", range=NOT_NEGATIVE)
    adam_weight_decay_text_encoder: float | None = flag(
        None,
        "that of the text encoders; default: as for their rate",
        range=NOT_NEGATIVE,
        used=rules.trains_text_encoders,
    )
    adam_epsilon: float = flag(1e-08, "what keeps the division by the second moment finite", range=POSITIVE)
    prodigy_beta3: float | None = flag(
        None,
        "decay of Prodigy's step size; default: the root of --adam_beta2",
        range=BELOW_ONE,
        used=rules.with_prodigy,
    )
    prodigy_decouple: bool = flag(True, "Prodigy: weight decay as in AdamW", used=rules.with_prodigy)
    prodigy_use_bias_correction: bool = flag(True, "Prodigy: Adam's bias correction", used=rules.with_prodigy)
    prodigy_safeguard_warmup: bool = flag(
        True, "Prodigy: keep the warm-up out of its estimate of the step size", used=rules.with_prodigy
    )
    max_grad_norm: float = flag(1.0, "norm that gradients are clipped to; 0 = no clipping", range=NOT_NEGATIVE)
    max_skipped_steps: int = flag(
        100, "steps to bear that change nothing, since a loss or a gradient is NaN or infinite", range=NOT_NEGATIVE
    )
    use_ema: bool = flag(False, "keep and save an exponential moving average of the weights")
    ema_decay: float | None = flag(
        None,
        f"its decay; default: {EMA_DECAY_WITH_LPL} with LPL, {EMA_DECAY} without",
        range=SHARE,
        used=rules.with_ema,
    )
    foreach_ema: bool = flag(False, "faster EMA by fused updates", used=rules.with_ema)
    offload_ema: bool = flag(False, "keep the EMA in the CPU's memory between updates", used=rules.with_ema)
    mixed_precision: str | None = flag(
        None, "of computation; default: as accelerate is configured", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere GPUs and later")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward to save memory")
    seed: int | None = silent_flag(
        None, "seed of everything random; default: drawn and written down", range=(NOT_NEGATIVE, at_most(2**32 - 1))
    )


@dataclass(frozen=True)
class Validation:
    """validation and logging"""

    dry_run: bool = flag(False, "show what would be done, its memory and time, and stop", own=True, in_recipe=False)
    validation_prompt: str | None = silent_flag(
        None, "prompt to sample --num_validation_images images of; with DiT a class"
    )
    validation_prompts: tuple[str, ...] | None = silent_flag(None, "prompts to sample an image of each")
    num_validation_images: int = silent_flag(
        4, "images of the --validation_prompt; 0 = none", range=(NOT_NEGATIVE, at_most(10_000)), used=rules.one_prompt
    )
    validation_epochs: int = silent_flag(
        5,
        "sample and take the validation loss every so many epochs; 0 = before and after the training only",
        range=NOT_NEGATIVE,
        used=rules.validated,
    )
    validation_steps: int | None = silent_flag(
        None, "do so every so many optimizer steps instead", range=POSITIVE, used=rules.validated
    )
    validation_inference_steps: int = silent_flag(25, "sampling steps of validation images", range=POSITIVE)
    validation_guidance_scale: float | None = silent_flag(
        None, "their guidance scale; default: the pipeline's", range=FINITE
    )
    report_to: str = own_flag("tensorboard", f"{', '.join(TRACKERS)}, all or none")
    tracker_project_name: str = own_flag("text2image-fine-tune", "project name in the tracker")
    logging_dir: str = own_flag("logs", "the trackers' folder within --output_dir", path=True)
    logging_steps: int = silent_flag(10, "optimizer steps between two log entries", range=POSITIVE)
    debug_loss: bool = silent_flag(False, "log every image's own diffusion loss")
    verbose: bool = own_flag(
        False, "show what the libraries say of themselves at the start, and all their progress bars", in_recipe=False
    )


@dataclass(frozen=True)
class Evaluation:
    """evaluation"""

    eval_steps: int | None = own_flag(
        None, "compare drawn with real images every so many optimizer steps; default: never", range=POSITIVE
    )
    eval_data_dir: str | None = own_flag(
        None,
        "folder of the real images, best of ones that are not trained on, with their captions",
        path=True,
        used=rules.evaluated,
    )
    eval_metrics: tuple[str, ...] = own_flag(SET_METRICS, f"out of {', '.join(METRICS)}", used=rules.evaluated)
    eval_features: tuple[str, ...] = own_flag(
        ("facebook/dinov2-base",),
        "networks to compare them through, as for python -m lpl.evaluate",
        used=rules.compares_sets,
    )
    eval_clip: str = own_flag(CLIP, "network of clip_score", used=rules.scores_captions)
    eval_num_images: int | None = own_flag(
        None, "images to draw; default: as many as there are real ones", range=POSITIVE, used=rules.evaluated
    )
    eval_batch_size: int = own_flag(8, "images that are drawn at a time", range=POSITIVE, used=rules.evaluated)


@dataclass(frozen=True)
class Output:
    """output and recipes"""

    config: str | None = flag(
        None,
        "recipe: a YAML file of flags and values, such as a run's recipe.yaml, or a repository on the Hub "
        "that has one (user/repo or user/repo@revision); flags given here win",
        in_recipe=False,
    )
    without: tuple[str, ...] | None = flag(
        None, "flags of the recipe to leave out, e.g. one that it turns on", in_recipe=False
    )
    output_dir: str = own_flag("sd-model-finetuned", "where checkpoints, samples and the pipeline go", path=True)
    checkpointing_steps: int = silent_flag(500, "optimizer steps between two checkpoints", range=POSITIVE)
    checkpoints_total_limit: int | None = silent_flag(
        None, "keep so many checkpoints; the last one in any case", range=NOT_NEGATIVE
    )
    resume_from_checkpoint: str | None = flag(
        None,
        'a checkpoint\'s folder, "latest", or "hub": the last one that --hub_strategy checkpoint has pushed',
        own=True,
        path=True,
        in_recipe=False,
    )
    push_to_hub: bool = own_flag(False, "publish the result with samples, curves, recipe and model card")
    hub_model_id: str | None = own_flag(
        None, "repository to publish to; default: the name of --output_dir", used=rules.asks_the_hub
    )
    hub_token: str | None = own_flag(
        None, "token for it; a login or the environment is safer", in_recipe=False, used=rules.uses_a_token
    )
    hub_private_repo: bool = own_flag(False, "make the repository a private one where it is new", used=rules.pushed)
    hub_revision: str | None = own_flag(
        None, "branch to publish to, made where there is none; default: main", used=rules.asks_the_hub
    )
    hub_strategy: str = own_flag(
        "end",
        "when to publish: at the end; weights and samples with each checkpoint (every_save), and the state to"
        " resume from, the last one (checkpoint) or all (all_checkpoints)",
        choices=HUB_STRATEGIES,
        used=rules.pushed,
    )
