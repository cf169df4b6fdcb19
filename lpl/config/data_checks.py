"""Checks of the flags of the data, from the words alone: data sets, sizes, captions, caches, streaming, masks.

Each raises a ValueError with what was given, what is accepted, and the flag to change; see :mod:`lpl.config.checks`.
"""

from __future__ import annotations

import math
import os
import reprlib

from lpl.config import rules
from lpl.config.choices import MASK_COLUMN
from lpl.config.config import Config
from lpl.config.data_sets import MOST_REPEATS, OF_ONE, OWN, PLACES, Entry, name_of, place_of
from lpl.config.flag import flags_of, kind_of
from lpl.config.groups import Data, naming
from lpl.config.place_checks import check_place, why_no_data
from lpl.config.prompts import text_of
from lpl.config.sizes import AUTO
from lpl.tools.words import close_match, has_word, warn, why_no_folder


def check_data_sets(data: Data) -> None:
    """Refuse a list of data sets that cannot be meant, and flags that do not go with one."""
    if data.datasets is None:
        return
    for number, found in enumerate(data.datasets, 1):
        _check_entry(f"datasets, entry {number}", found)
    names = [name_of(found) for found in data.datasets if "name" in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"datasets: {twice[0]} is the name of two entries; give each its own")
    for name in PLACES:
        if getattr(data, name) != getattr(Data(), name):
            raise ValueError(
                f"--{name} is for one data set, and datasets lists several; write it into the list, or leave one of "
                "them out (of a recipe, by --without)"
            )
    if data.streaming:
        raise ValueError("--streaming reads one data set, and datasets lists several; leave out one of them")
    if data.validation_every_nth is not None and data.holds_out_splits:
        raise ValueError(
            "--validation_every_nth and validation_split of datasets exclude one another; leave one of them out"
        )


def _check_entry(where: str, found: Entry) -> None:
    declared = flags_of(Data)
    kinds = {name: kind_of(Data, name) for name in OF_ONE if name in declared} | OWN
    for name, value in found.items():
        if name not in kinds:
            hint = close_match(name, kinds) or f"; it takes {', '.join(kinds)}"
            beside = ", which goes beside the list" if name in declared else ""
            raise ValueError(f"{where}: there is no {reprlib.repr(name)}{beside}{'' if beside else hint}")
        kind = kinds[name]
        fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
        if not fits:
            words = {str: "a word, in quotes if it is a number", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{where}: {name} takes {words}, not {reprlib.repr(value)}")
        if name in declared:
            declared[name].check(f"datasets, {name}", value)
        if name in declared and declared[name].path:
            check_place(name, os.path.expanduser(str(value)))
    if not place_of(found):
        raise ValueError(f"{where}: it names no data set; give it a train_data_dir or a dataset_name")
    if not 1 <= found.get("repeats", 1) <= MOST_REPEATS:
        raise ValueError(f"{where}: repeats {found['repeats']}: it must be from 1 to {MOST_REPEATS:,}")
    if not 0 <= found.get("loss_weight", 1) < math.inf:
        raise ValueError(f"{where}: loss_weight {found['loss_weight']}: it must be 0 or more")


def check_parts(data: Data) -> None:
    for part in data.parts:
        with naming(part, data.parts):
            _check_source(part.data)


def _check_source(data: Data) -> None:
    if not data.dataset_name and not data.train_data_dir:
        raise ValueError("--dataset_name or --train_data_dir is needed, but neither is given")
    if data.dataset_config_name and not data.dataset_name:
        raise ValueError("--dataset_config_name has no effect without --dataset_name; leave it out")
    if not data.dataset_name and (why := why_no_data(data.folder)):
        raise ValueError(f"--train_data_dir {data.train_data_dir}: {why}")
    if data.mask_data_dir is not None and (data.dataset_name or data.streaming):
        raise ValueError(
            "--mask_data_dir has masks for a folder of images, --train_data_dir without --streaming; for other data, "
            "--mask_column names a column of masks"
        )
    if data.mask_data_dir is not None and (why := why_no_folder(data.mask_data_dir)):
        raise ValueError(f"--mask_data_dir {data.mask_data_dir}: {why}")
    if data.validation_split is not None and not data.dataset_name:
        raise ValueError(
            "--validation_split names a split of --dataset_name; with --train_data_dir use --validation_every_nth"
        )
    if data.train_split != "train" and not data.dataset_name:
        raise ValueError(
            f"--train_split {data.train_split} names a split of --dataset_name; --train_data_dir has none; give the "
            "sub-folder itself"
        )
    if data.validation_split == data.train_split:
        raise ValueError(f"--validation_split {data.validation_split}: that is what is trained on; name another split")


def check_sizes(config: Config) -> None:
    data = config.data
    several = "," in str(data.resolution)
    if data.streaming and (several or data.aspect_ratio_buckets):
        flag = "--aspect_ratio_buckets" if data.aspect_ratio_buckets else f"--resolution {data.resolution}"
        raise ValueError(
            f"{flag} needs the sizes of all images before the training, which --streaming does not know; leave one "
            "of them out"
        )
    if several and data.aspect_ratio_buckets not in (None, AUTO):
        raise ValueError(
            f"--resolution {data.resolution}: with several sides, sizes are made from each of them by "
            f"--aspect_ratio_buckets {AUTO}; or give one side, and all sizes in --aspect_ratio_buckets"
        )


def check_caches(config: Config) -> None:
    data = config.data
    flags = ("cache_latents", data.cache_latents), ("cache_text_embeddings", data.cache_text_embeddings)
    for name in (name for name, on in flags if on):
        if data.streaming:
            raise ValueError(f"--{name} needs a data set of known length, and --streaming has none; leave one out")
    if data.cache_latents and not data.center_crop and data.crops_per_image is None:
        raise ValueError(
            "--cache_latents cannot keep a new random crop in every epoch; give --center_crop, or --crops_per_image N "
            "for N random crops of each image, each encoded once"
        )
    if not data.cache_text_embeddings:
        return
    if config.model.train_text_encoder:
        raise ValueError(
            "--cache_text_embeddings: --train_text_encoder changes the embeddings in every step; leave one of them out"
        )
    if data.shuffle_tags or data.tag_dropout:
        name = "shuffle_tags" if data.shuffle_tags else "tag_dropout"
        raise ValueError(
            f"--cache_text_embeddings: with --{name} a caption has too many forms to encode each; leave one of them "
            "out, or write some forms of each caption as a list"
        )


def check_captions(config: Config) -> None:
    data = config.data
    for name, text in (
        ("trigger_word", data.trigger_word),
        ("tag_separator", data.tag_separator),
        ("keep_tags_separator", data.keep_tags_separator),
    ):
        if text == "" or (name == "trigger_word" and text is not None and not text.strip()):
            raise ValueError(f"--{name}: it is empty; give one, or leave the flag out")
    if wrong := [share for share in data.text_encoder_dropout or () if not 0 <= share <= 1]:
        raise ValueError(f"--text_encoder_dropout {wrong[0]}: it must be between 0 and 1")
    word, prompts = data.trigger_word, [text_of(entry) for entry in config.validation.validation_prompts or ()]
    if word and (without := [prompt for prompt in prompts if not has_word(prompt, word)]):
        warn(
            f"--validation_prompts: {reprlib.repr(without[0])} is without --trigger_word {word}, so its samples may "
            "not show what is learned"
        )


def check_streaming(config: Config) -> None:
    """Refuse what needs the number of images, which --streaming knows only with --max_train_samples."""
    data = config.data
    if not data.streaming or data.max_train_samples is not None:
        return
    if config.optimization.max_train_steps is None:
        raise ValueError("--streaming: how many images an epoch has is not known; give --max_train_steps")
    every_epochs = config.validation.validation_steps is None and config.validation.validation_epochs > 0
    if rules.validates(config.values()) and every_epochs:
        raise ValueError(
            "--streaming: how many steps an epoch of --validation_epochs has is not known; give --validation_steps"
        )
    if 0 < (parse_limit(data.max_bad_samples) or 0) < 1:
        raise ValueError(
            f"--max_bad_samples {data.max_bad_samples}: how many images --streaming has is not known, so a share has "
            "no meaning; give a number"
        )


def check_masks(config: Config) -> None:
    data = config.data
    if data.alpha_mask and data.mask_column is not None:
        raise ValueError(
            f"--alpha_mask takes the images' transparency for masks, and --mask_column {data.mask_column} other "
            "images; leave one of them out"
        )
    folder = next((part.data.mask_data_dir for part in data.parts if part.data.mask_data_dir is not None), None)
    if folder is not None and (data.alpha_mask or data.mask_column not in (None, MASK_COLUMN)):
        other = "--alpha_mask" if data.alpha_mask else f"--mask_column {data.mask_column}"
        raise ValueError(f"--mask_data_dir {folder} and {other} both say where the masks are; leave one of them out")
    if data.unmasked_weight == 1 and rules.masks_the_loss(config.values()):
        warn("--unmasked_weight 1 counts all pixels alike, so the masks have no effect; give less")


def parse_limit(text: str | None) -> float | None:
    """``"20"`` -> 20 samples, ``"0.01"`` -> 0.01, a share of the data set; None means no limit.

    Raises:
        ValueError: for anything else.

    >>> parse_limit("20"), parse_limit("0.01"), parse_limit("0")
    (20.0, 0.01, 0.0)
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 1 or (value >= 1 and value.is_integer())):
        raise ValueError(f"--max_bad_samples {text}: accepted are a number of samples, such as 20, or a share below 1")
    return value
