"""Every flag of the training script, declared once; names, meanings and defaults are those of diffusers' scripts.

Where diffusers' scripts differ, ``train_text_to_image.py`` decides. Many defaults of None are filled in later from the
pipeline (:func:`lpl.families.resolve.resolve`). Functions take the groups that they read, not the whole configuration.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from lpl.config import data_sets, prompts, rules, sizes
from lpl.config.choices import (
    ADAPTER_NAMES,
    ADAPTERS,
    ALL_LINEAR,
    CLIP,
    EMA_DECAY,
    EMA_DECAY_WITH_LPL,
    GPUS,
    HUB_STRATEGIES,
    INIT_LORA_WEIGHTS,
    INTERPOLATION_MODES,
    LOKR,
    LORA,
    LR_SCHEDULERS,
    METRICS,
    OFT,
    OPTIMIZERS,
    PRECISIONS,
    QUANTIZED,
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
    STEPS_OR_SHARE,
    TWO_OR_MORE,
    OnResume,
    Range,
    at_most,
    flag,
)
from lpl.options import (
    AUTO,
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
        None,
        "pipeline to fine-tune: a local folder, a Hub id, or a single file, local or ORG/REPO/FILE.safetensors",
        public=rules.model_on_the_hub,
        path=True,
    )
    revision: str | None = flag(
        None, "branch, tag or commit of the pipeline on the Hub", public=rules.is_revision, used=rules.from_the_hub
    )
    variant: str | None = flag(None, "variant of the weight files, e.g. fp16", public=rules.is_word)
    non_ema_revision: str | None = flag(
        None,
        "Hub revision of the pipeline with non-EMA denoiser weights, to start training from",
        public=rules.is_revision,
        used=rules.from_the_hub,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "VAE to encode and decode with instead of the pipeline's: a local folder or a Hub id",
        public=rules.on_the_hub,
        path=True,
    )
    single_file_config: str | None = flag(
        None,
        "for a single file: folder or Hub id of a pipeline with its configuration, tokenizers and the components that "
        "it lacks; default: the one on the Hub that diffusers takes",
        public=rules.on_the_hub,
        path=True,
        used=rules.from_a_file,
    )
    denoiser_model_name_or_path: str | None = flag(
        None,
        "denoiser to train instead of the pipeline's: a folder with a config.json, a Hub id, or a single file",
        public=rules.model_on_the_hub,
        path=True,
    )
    merge_lora: tuple[str, ...] | None = flag(
        None,
        "LoRA to merge into the pipeline before the training, each FILE or FILE:STRENGTH; also folders and Hub ids",
        public=rules.all_on_the_hub,
        path=True,
    )
    cache_dir: str | None = own_flag(None, "folder for downloaded models and data sets", path=True)
    from_scratch: bool = flag(False, "start the denoiser from random weights instead of the pipeline's")
    train_text_encoder: bool = flag(
        False, "also train the CLIP text encoders, with the learning rate --text_encoder_lr", on_resume=REFUSED
    )
    max_sequence_length: int | None = flag(
        None,
        "maximum number of tokens per caption for T5 and Gemma text encoders; default: the family's",
        range=POSITIVE,
    )
    guidance_scale: float = flag(3.5, "guidance value passed to Flux's denoiser in training", range=NOT_NEGATIVE)
    prediction_type: str | None = flag(
        None,
        "training objective of the denoiser; default: the pipeline's own",
        choices=OBJECTIVE_NAMES,
        on_resume=REFUSED,
    )

    folder: str | None = None  # no flag: of the pipeline that these flags make, see lpl.families.derived

    @property
    def pipeline(self) -> str:
        """Folder or Hub id of the pipeline that is loaded; available after the checks."""
        return self.folder or self.source

    @property
    def source(self) -> str:
        """What the user has named as the pipeline; available after the checks."""
        assert self.pretrained_model_name_or_path is not None
        return self.pretrained_model_name_or_path

    @property
    def merged(self) -> list[tuple[str, float]]:
        """The LoRA of --merge_lora and their strengths."""
        return [rules.source_and_strength(word) for word in self.merge_lora or ()]

    @property
    def objective(self) -> str:
        """Name of the objective; available after ``resolve``."""
        assert self.prediction_type is not None
        return self.prediction_type


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


class Part(NamedTuple):
    """One of the data sets that are trained on."""

    name: str  # in messages
    data: Data  # the flags of this data set alone
    repeats: int = 1  # how often an image comes in an epoch
    loss_weight: float = 1.0  # of its samples, for the diffusion loss and LPL


@contextmanager
def naming(part: Part, parts: Sequence[Part]) -> Iterator[None]:
    """Within, a ValueError names the data set, if there are several."""
    try:
        yield
    except ValueError as error:
        raise (ValueError(f"data set {part.name!r}: {error}") if len(parts) > 1 else error) from error


@dataclass(frozen=True)
class Data:
    """data"""

    dataset_name: str | None = flag(
        None,
        "data set on the Hub, or a local folder that datasets.load_dataset can read",
        public=rules.on_the_hub,
        path=True,
    )
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name")
    train_data_dir: str | None = flag(
        None,
        "folder of images with a metadata.jsonl (file_name, text), a .txt per image, or a sub-folder per class",
        public=rules.within_the_data_set,
        path=True,
    )
    datasets: tuple[dict[str, Any], ...] | None = flag(
        None,
        "several data sets, each as JSON with its own data flags, repeats, loss_weight; easier as a list in --config",
        public=rules.are_public,
        word=data_sets.entry,
    )
    streaming: bool = flag(
        False,
        "read the data during training, from the Hub or from .parquet or .tar (WebDataset) files in --train_data_dir",
    )
    shuffle_buffer_size: int = flag(
        1000, "number of images in the shuffle buffer of --streaming", range=POSITIVE, used=rules.shuffles_a_stream
    )
    image_column: str = flag("image", "column of the images")
    mask_column: str | None = flag(
        None, "column of loss masks, images whose white parts are trained on; in a folder of NAME-masklabel.png: mask"
    )
    mask_data_dir: str | None = flag(
        None,
        "folder of loss masks, each with the name of its image in --train_data_dir",
        public=rules.within_the_data_set,
        path=True,
    )
    alpha_mask: bool = flag(False, "take the images' transparency for loss masks: opaque parts are trained on")
    unmasked_weight: float = flag(
        0.0, "share of the loss that remains where a loss mask is black", range=SHARE, used=rules.masks_the_loss
    )
    caption_column: str = flag(
        "text",
        "column of the captions, one or several per image, or several columns with shares, such as text:0.7,tags:0.3; "
        "for DiT, of the class labels, label by default",
    )
    caption_per_line: bool = flag(
        False, "text files beside the images have several captions, one a line; default: all lines are one caption"
    )
    instance_prompt: str | None = flag(None, "caption of the images that have none, e.g. a photo of sks dog")
    caption_prefix: str | None = flag(None, "text before each caption")
    caption_suffix: str | None = flag(None, "text after each caption")
    trigger_word: str | None = flag(
        None, "word that is put in front of each caption without it, and on the model card"
    )
    shuffle_tags: bool = flag(False, "shuffle the tags of each caption anew in every epoch", held_out=False)
    tag_dropout: float = flag(
        0.0, "probability with which each tag of a caption is left out", range=SHARE, held_out=0.0
    )
    tag_separator: str = flag(
        ",", "what separates tags in captions, for --shuffle_tags and --tag_dropout", used=rules.divides_tags
    )
    keep_tags: int = flag(
        0,
        "number of first tags that --shuffle_tags and --tag_dropout leave as they are",
        range=NOT_NEGATIVE,
        used=rules.changes_tags,
    )
    keep_tags_separator: str | None = flag(
        None, "mark in captions, such as |||: the tags before it, and behind a second one, are kept; it is removed"
    )
    max_train_samples: int | None = flag(
        None, "train on at most N images: a random subset, or with --streaming the first N", range=POSITIVE
    )
    max_bad_samples: str | None = flag(
        None,
        "stop after more unreadable samples than this: a number, or a share of the data below 1; default: no limit",
    )
    train_split: str = flag("train", "split of --dataset_name to train on")
    validation_split: str | None = flag(None, "split of --dataset_name for the validation loss")
    validation_every_nth: int | None = flag(
        None, "hold out every N-th image for the validation loss", range=TWO_OR_MORE
    )
    num_validation_samples: int = flag(
        64, "maximum number of images for the validation loss", range=POSITIVE, used=rules.holds_out
    )
    resolution: int | str | None = flag(
        None,
        "side of the square training images in pixels; several with commas, 512,768, train each image at each of them "
        "that it is large enough for; default: the family's",
        word=sizes.resolutions,
    )
    aspect_ratio_buckets: str | None = flag(
        None,
        "train each image at the size that is nearest to its aspect ratio: auto makes the sizes from --resolution, "
        'or give them, "HEIGHT,WIDTH;HEIGHT,WIDTH"',
        word=sizes.sizes,
    )
    data_cache_dir: str | None = own_flag(
        None,
        "folder of what is known of the data: sizes of images, cached latents and text embeddings; runs may share it; "
        "default: lpl in Hugging Face's cache",
        path=True,
    )
    bucket_step: int | None = flag(
        None,
        "sides of --aspect_ratio_buckets auto are multiples of this; default: an eighth of --resolution, at most "
        f"{sizes.LARGEST_STEP}",
        range=POSITIVE,
        used=rules.when("aspect_ratio_buckets", sizes.AUTO),
    )
    bucket_upscale: bool = flag(
        False,
        "enlarge images that are smaller than their bucket instead of training them at a smaller size",
        used=rules.has("aspect_ratio_buckets"),
    )
    center_crop: bool = flag(False, "crop images at the centre instead of at random", held_out=True)
    crops_per_image: int | None = flag(
        None,
        "number of different random crops of each image, which its epochs take in turn; default: a new one in every "
        "epoch",
        range=POSITIVE,
        used=rules.unless("center_crop"),
    )
    cache_latents: bool = silent_flag(
        False,
        "encode each image once, before the training, and keep its latents in --data_cache_dir; needs --center_crop "
        "or --crops_per_image",
    )
    cache_text_embeddings: bool = silent_flag(
        False, "encode each caption once, before the training, and keep the embeddings in --data_cache_dir"
    )
    random_flip: bool = flag(False, "flip images horizontally with probability 0.5", held_out=False)
    image_interpolation_mode: str = flag("lanczos", "interpolation for resizing images", choices=INTERPOLATION_MODES)
    proportion_empty_prompts: float | None = flag(
        None, "share of captions replaced by the empty caption; default: the family's", range=SHARE, held_out=0.0
    )
    text_encoder_dropout: tuple[float, ...] | None = flag(
        None,
        "probabilities, one per text encoder, with which that encoder alone gets the empty caption",
        held_out=None,
    )
    dataloader_num_workers: int | None = silent_flag(
        None,
        "number of data loading processes; 0 = load in the main process; default: one per free core, at most 8",
        range=NOT_NEGATIVE,
    )
    dataloader_timeout: float = flag(
        600.0,
        "seconds after which a file that is still being read counts as a bad sample; 0 = no limit",
        range=NOT_NEGATIVE,
    )

    @property
    def folder(self) -> str:
        """--train_data_dir, if no --dataset_name is given; available after the checks."""
        assert self.train_data_dir is not None
        return self.train_data_dir

    @property
    def trigger(self) -> str | None:
        """What prompts need to show what is trained: the trigger word, or else --instance_prompt."""
        return (self.trigger_word or self.instance_prompt or "").strip() or None

    @property
    def several_caption_columns(self) -> bool:
        """Whether --caption_column names several, for some data set at least."""
        return any(mark in part.data.caption_column for part in self.parts for mark in ",:")

    @property
    def parts(self) -> list[Part]:
        """The data sets of ``datasets``, or the one that the flags name; available after the checks."""
        if self.datasets is None:
            return [Part(self.dataset_name or self.train_data_dir or "", self)]
        parts = []
        for found in self.datasets:
            values = {name: value for name, value in found.items() if name not in data_sets.OWN}
            for name in {"train_data_dir", "mask_data_dir"} & values.keys():
                values[name] = os.path.expanduser(values[name])
            own = {name: found[name] for name in ("repeats", "loss_weight") if name in found}
            alone = replace(self, datasets=None, max_train_samples=None)
            parts.append(Part(data_sets.name_of(found), replace(alone, **values), **own))
        return parts

    @property
    def holds_out_splits(self) -> bool:
        """Whether splits of the data are held out for the validation loss."""
        return any(part.data.validation_split is not None for part in self.parts)

    @property
    def holds_out(self) -> bool:
        """Whether a part of the data is held out for the validation loss."""
        return rules.holds_out(vars(self))

    @property
    def masks(self) -> str | None:
        """Where loss masks come from, in words; None: there are none."""
        if not self.alpha_mask and self.mask_column is None:
            return None
        source = "the images' transparency" if self.alpha_mask else f"column {self.mask_column}"
        return f"loss masks from {source}" + (
            f", weight {self.unmasked_weight:g} outside" * (self.unmasked_weight > 0)
        )

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides that --resolution gives, ascending; available after ``resolve``."""
        assert self.resolution is not None
        return sizes.sides_of(self.resolution)

    @property
    def size(self) -> sizes.Size:
        """Height and width of square training images in pixels, the largest if there are several; after ``resolve``.

        Samples are drawn, and metrics computed, at this size.
        """
        return self.sides[-1], self.sides[-1]

    @property
    def buckets(self) -> tuple[tuple[sizes.Size, ...], ...]:
        """The sizes of training images: one group of sizes per resolution; available after ``resolve``."""
        if self.aspect_ratio_buckets is None:
            return tuple(((side, side),) for side in self.sides)
        if self.aspect_ratio_buckets != sizes.AUTO:
            return (sizes.parse_sizes(self.aspect_ratio_buckets),)
        assert self.bucket_step is not None
        return tuple(sizes.made_sizes(side, self.bucket_step) for side in self.sides)

    @property
    def one_size(self) -> bool:
        """Whether all images are trained at one size; available after ``resolve``."""
        return sum(map(len, self.buckets)) == 1 and self.aspect_ratio_buckets is None


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
        used=rules.less_than("lpl_crop", "resolution"),
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


@dataclass(frozen=True)
class Optimization:
    """optimization"""

    train_batch_size: int = flag(16, "images per process in a micro-batch", range=POSITIVE)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", range=POSITIVE)
    num_train_epochs: int = flag(
        100, "number of passes over the data; --max_train_steps overrides it", range=NOT_NEGATIVE, on_resume=LENGTH
    )
    max_train_steps: int | None = flag(
        None,
        "total number of optimizer steps; overrides --num_train_epochs",
        range=(NOT_NEGATIVE, at_most(10_000_000)),
        on_resume=LENGTH,
    )
    learning_rate: float = flag(0.0001, "learning rate after warm-up", range=(NOT_NEGATIVE, at_most(10_000)))
    text_encoder_lr: float | None = flag(
        None,
        "learning rate of the text encoders; default: the family's, or --learning_rate",
        range=(NOT_NEGATIVE, at_most(10_000)),
        used=rules.when("train_text_encoder"),
    )
    scale_lr: bool = flag(
        False, "multiply the learning rates by the number of processes, the accumulation steps and the batch size"
    )
    lr_scheduler: str = flag(
        "constant",
        f"learning rate schedule: {', '.join(LR_SCHEDULERS)}, or another one as package:Class, such as "
        "torch.optim.lr_scheduler:StepLR",
        word=rules.schedule,
        code=True,
    )
    lr_scheduler_args: tuple[str, ...] | None = flag(
        None,
        "arguments of a --lr_scheduler package:Class, each NAME=VALUE; in --config as a mapping",
        word=rules.argument,
        used=rules.by_path("lr_scheduler"),
    )
    lr_warmup_steps: int | float = flag(
        500,
        "warm-up steps of the learning rate schedule; a number below 1 is a share of the run; the constant schedule "
        "has none",
        range=(NOT_NEGATIVE, STEPS_OR_SHARE),
        used=rules.warms_up,
    )
    lr_num_cycles: int = flag(
        1,
        "number of cycles of the cosine_with_restarts schedule",
        range=POSITIVE,
        used=rules.when("lr_scheduler", "cosine_with_restarts"),
    )
    lr_power: float = flag(
        1.0, "power of the polynomial schedule", range=FINITE, used=rules.when("lr_scheduler", "polynomial")
    )
    optimizer: str = flag(
        OPTIMIZERS[0],
        f"{', '.join(OPTIMIZERS)}, or another one as package:Class, such as torch.optim:Adafactor",
        on_resume=REFUSED,
        code=True,
    )
    optimizer_args: tuple[str, ...] | None = flag(
        None,
        "arguments of an --optimizer package:Class besides the learning rate, each NAME=VALUE, such as eps=1e-8 "
        "betas=[0.9,0.99]; in --config as a mapping",
        word=rules.argument,
        used=rules.by_path("optimizer"),
    )
    use_8bit_adam: bool = flag(False, "use the 8-bit AdamW of bitsandbytes", on_resume=REFUSED)
    adam_beta1: float = flag(0.9, "beta1 of AdamW and Prodigy", range=BELOW_ONE)
    adam_beta2: float = flag(0.999, "beta2 of AdamW and Prodigy", range=BELOW_ONE)
    adam_weight_decay: float = flag(0.01, "weight decay of AdamW and Prodigy", range=NOT_NEGATIVE)
    adam_weight_decay_text_encoder: float | None = flag(
        None,
        "weight decay of the text encoders; default: the family's, or --adam_weight_decay",
        range=NOT_NEGATIVE,
        used=rules.when("train_text_encoder"),
    )
    adam_epsilon: float = flag(1e-08, "epsilon of AdamW and Prodigy", range=POSITIVE)
    prodigy_beta3: float | None = flag(
        None,
        "Prodigy: beta3 of the step size estimate; default: the square root of --adam_beta2",
        range=BELOW_ONE,
        used=rules.when("optimizer", "prodigy"),
    )
    prodigy_decouple: bool = flag(
        True, "Prodigy: decoupled weight decay, as in AdamW", used=rules.when("optimizer", "prodigy")
    )
    prodigy_use_bias_correction: bool = flag(
        True, "Prodigy: Adam's bias correction", used=rules.when("optimizer", "prodigy")
    )
    prodigy_safeguard_warmup: bool = flag(
        True, "Prodigy: exclude the warm-up from the step size estimate", used=rules.when("optimizer", "prodigy")
    )
    max_grad_norm: float = flag(1.0, "maximum gradient norm, for clipping; 0 = no clipping", range=NOT_NEGATIVE)
    max_skipped_steps: int = flag(
        100,
        "stop the run after more skipped steps than this; a step with a NaN or infinite loss or gradient is skipped",
        range=NOT_NEGATIVE,
    )
    use_ema: bool = flag(False, "keep an exponential moving average (EMA) of the weights and save it as the result")
    ema_decay: float | None = flag(
        None,
        f"decay of the EMA; default: {EMA_DECAY_WITH_LPL} with LPL, {EMA_DECAY} without",
        range=SHARE,
        used=rules.when("use_ema"),
    )
    foreach_ema: bool = flag(
        False, "update the EMA with fused (foreach) operations, which is faster", used=rules.when("use_ema")
    )
    offload_ema: bool = flag(False, "keep the EMA in CPU memory between updates", used=rules.when("use_ema"))
    offload_frozen: bool = flag(
        False, "keep frozen text encoders and the VAE in CPU memory, and on the GPU only what runs of them"
    )
    mixed_precision: str | None = flag(
        None, "mixed precision of the computation; default: accelerate's configuration", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "allow TF32 on Ampere and later GPUs")
    attention_backend: str | None = own_flag(
        None,
        "kernel of the denoiser's attention, as diffusers names them, such as flash, flash_hub or xformers; default: "
        "PyTorch's own",
    )
    channels_last: bool = flag(
        False, "keep two-dimensional convolutions of the denoiser and the VAE in channels-last memory format"
    )
    torch_compile: bool = flag(
        False, "compile the denoiser and LPL's decoder with torch.compile; the first steps take minutes"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute the denoiser's activations in the backward pass to save memory"
    )
    activation_offload: bool = flag(
        False, "keep the inputs of the denoiser's blocks in CPU memory; needs --gradient_checkpointing"
    )
    seed: int | None = silent_flag(
        None,
        "random seed; default: drawn at random and recorded in recipe.yaml",
        range=(NOT_NEGATIVE, at_most(2**32 - 1)),
    )

    @property
    def compile_for(self) -> int | None:
        """For how many samples at most LPL's decoder is compiled; None: it is not."""
        return self.train_batch_size if self.torch_compile else None

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """--optimizer_args by name."""
        return rules.arguments(self.optimizer_args)

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        """--lr_scheduler_args by name."""
        return rules.arguments(self.lr_scheduler_args)

    def warmup_steps(self, max_steps: int) -> int:
        """Warm-up steps of the schedule in a run of that length."""
        share = self.lr_warmup_steps
        return math.ceil(share * max_steps) if share < 1 else int(share)


@dataclass(frozen=True)
class Validation:
    """validation and logging"""

    dry_run: bool = flag(
        False,
        "report what a run would do and what time and memory it needs, then exit; writes nothing, "
        "except into the cache a pipeline that is made of a single file, another denoiser or merged LoRA",
        own=True,
        in_recipe=False,
    )
    for_gpu: str | None = flag(
        None,
        f"with --dry_run: estimate for a GPU with that memory, such as 24GB, or of that name ({', '.join(GPUS)}), or "
        "for several, such as 8x24GB, with FSDP2 if accelerate's configuration asks for it; needs neither GPU, "
        "weights nor data",
        own=True,
        in_recipe=False,
    )
    validation_prompt: str | None = silent_flag(
        None, "prompt to sample --num_validation_images images from; for DiT, a class"
    )
    validation_prompts: tuple[prompts.Entry, ...] | None = silent_flag(
        None,
        "prompts to sample one image each from; for DiT, classes; as JSON, or in --config as mappings, each with its "
        f"own {', '.join(prompts.KEYS)}",
        word=prompts.prompt,
    )
    validation_prompts_file: str | None = flag(
        None,
        "file of such prompts: .txt with one a line, which may end in sd-scripts' options --n --w --h --d --l --s; "
        ".jsonl, .json or .yaml",
        own=True,
        path=True,
        in_recipe=False,
    )
    num_validation_images: int = silent_flag(
        4,
        "number of images to sample from --validation_prompt; 0 = none",
        range=(NOT_NEGATIVE, at_most(10_000)),
        used=rules.when("validation_prompt"),
    )
    validation_epochs: int = silent_flag(
        5,
        "run validation (samples and validation loss) every N epochs; 0 = only before and after the training",
        range=NOT_NEGATIVE,
        used=rules.validates,
    )
    validation_steps: int | None = silent_flag(
        None,
        "run validation every N optimizer steps; overrides --validation_epochs",
        range=POSITIVE,
        used=rules.validates,
    )
    validation_sizes: str | None = silent_flag(
        None,
        'sizes to draw each validation prompt at, "HEIGHT,WIDTH;HEIGHT,WIDTH"; default: the square of --resolution',
        word=sizes.some_sizes,
        used=rules.when("validation_prompts"),
    )
    validation_lora_scales: tuple[float, ...] | None = silent_flag(
        None,
        "strengths of the LoRA to draw each validation prompt at when the training ends, such as 0 0.5 1",
        used=rules.draws_a_lora,
    )
    validation_inference_steps: int = silent_flag(25, "number of sampling steps for validation images", range=POSITIVE)
    validation_guidance_scale: float | None = silent_flag(
        None, "guidance scale for validation images; default: the pipeline's", range=FINITE
    )
    report_to: str = own_flag("tensorboard", f"experiment tracker: {', '.join(TRACKERS)}, all or none")
    tracker_project_name: str = own_flag("text2image-fine-tune", "project name in the tracker")
    logging_dir: str = own_flag("logs", "folder for the trackers' files, inside --output_dir", path=True)
    logging_steps: int = silent_flag(10, "write a log entry every N optimizer steps", range=POSITIVE)
    debug_loss: bool = silent_flag(False, "log the diffusion loss of each image")
    verbose: bool = own_flag(
        False, "show the libraries' own notices at the start, and all of their progress bars", in_recipe=False
    )


@dataclass(frozen=True)
class Evaluation:
    """evaluation"""

    eval_steps: int | None = own_flag(
        None, "compare generated with real images every N optimizer steps; default: never", range=POSITIVE
    )
    eval_data_dir: str | None = own_flag(
        None,
        "folder of real images with captions to compare with; use images outside the training set",
        path=True,
        used=rules.when("eval_steps"),
    )
    eval_metrics: tuple[str, ...] = own_flag(
        SET_METRICS, f"metrics to compute: {', '.join(METRICS)}", used=rules.when("eval_steps")
    )
    eval_features: tuple[str, ...] = own_flag(
        ("facebook/dinov2-base",),
        "feature networks for the metrics, named as for python -m lpl.evaluate",
        path=True,
        code=True,
        used=rules.compares_sets,
    )
    eval_clip: str = own_flag(CLIP, "CLIP model for clip_score", path=True, used=rules.scores_captions)
    eval_num_images: int | None = own_flag(
        None,
        "number of images to generate for the evaluation; default: the number of real images",
        range=POSITIVE,
        used=rules.when("eval_steps"),
    )
    eval_batch_size: int = own_flag(
        8, "batch size for generating evaluation images", range=POSITIVE, used=rules.when("eval_steps")
    )


@dataclass(frozen=True)
class Output:
    """output and recipes"""

    config: str | None = flag(
        None,
        "recipe: a YAML file that maps flags to values, such as a run's recipe.yaml, or a Hub repository with one "
        "(user/repo or user/repo@revision); the command line overrides it",
        path=True,
        in_recipe=False,
    )
    without: tuple[str, ...] | None = flag(None, "flags to drop from the recipe of --config", in_recipe=False)
    output_dir: str = own_flag("sd-model-finetuned", "folder for checkpoints, samples, logs and the result", path=True)
    save_single_file: str | None = own_flag(
        None,
        "also write the trained pipeline as one file for ComfyUI, Forge and other programs, with its weights in that "
        "precision",
        choices=PRECISIONS,
        used=rules.unless("lora"),
    )
    checkpointing_steps: int = silent_flag(500, "save a checkpoint every N optimizer steps", range=POSITIVE)
    checkpoints_total_limit: int | None = silent_flag(
        None, "keep only the last N checkpoints, at least one; default: keep all", range=NOT_NEGATIVE
    )
    resume_from_checkpoint: str | None = flag(
        None,
        'a checkpoint folder, "latest", or "hub" for the last checkpoint that --hub_strategy checkpoint pushed',
        own=True,
        path=True,
        in_recipe=False,
    )
    push_to_hub: bool = own_flag(False, "publish the result with samples, curves, recipe and model card")
    hub_model_id: str | None = own_flag(
        None, "Hub repository to publish to; default: the name of --output_dir", used=rules.asks_the_hub
    )
    hub_token: str | None = own_flag(
        None, "token for the Hub; prefer hf auth login or HF_TOKEN", in_recipe=False, used=rules.uses_a_token
    )
    hub_private_repo: bool = own_flag(False, "create the Hub repository as private", used=rules.when("push_to_hub"))
    hub_revision: str | None = own_flag(
        None, "branch to publish to, created if missing; default: main", used=rules.asks_the_hub
    )
    hub_strategy: str = own_flag(
        "end",
        "when to publish: at the end (end), or with each checkpoint: weights and samples (every_save), also the last "
        "training state (checkpoint), or all training states (all_checkpoints)",
        choices=HUB_STRATEGIES,
        used=rules.when("push_to_hub"),
    )
