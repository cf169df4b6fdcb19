"""Flags: what it is trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lpl.config import data_sets, rules, sizes
from lpl.config.choices import INTERPOLATION_MODES, MASK_COLUMN
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, SHARE, TWO_OR_MORE, flag, own_flag, silent_flag


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
            for name in set(data_sets.FOLDERS) & values.keys():
                values[name] = os.path.expanduser(values[name])
            own = {name: found[name] for name in ("repeats", "loss_weight") if name in found}
            alone = replace(self, datasets=None, max_train_samples=None)
            parts.append(Part(data_sets.name_of(found), replace(alone, **values), **own))
        return parts

    @property
    def column_of_masks(self) -> str | None:
        """--mask_column, or the one that --mask_data_dir fills."""
        from_folder = any(part.data.mask_data_dir is not None for part in self.parts)
        return MASK_COLUMN if from_folder else self.mask_column

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
