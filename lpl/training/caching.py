"""Fills the caches of latents and text embeddings before the training, and frees what made them.

All processes share the work; each writes whole shards of its own (:mod:`lpl.data.store`), so that a killed run goes on
where it stood. Nothing random is fixed by a cache, see :mod:`lpl.data.cache`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lpl.autoencoders import drop_encoder, exact_precision, posterior
from lpl.config import Config
from lpl.config.sizes import Size
from lpl.data.cache import CachedEmbeddings, CachedLatents, Crop, fingerprint_of
from lpl.data.captions import caption_rows, columns_of
from lpl.data.catalogue import Catalogue, cache_root
from lpl.data.dataset import TrainingImages, fixed
from lpl.data.loader import watched_loader
from lpl.data.masks import cropped_with, picture_in
from lpl.data.reading import place_of
from lpl.data.source import data_folders
from lpl.data.store import Entry, Store
from lpl.data.timeouts import at_most
from lpl.families import Family
from lpl.families.description import Description
from lpl.tools.words import first_line
from lpl.training import memory
from lpl.training.loading import load_text_encoder, precisions, weight_dtype


SHARD = 256  # entries of a shard at most
SHARD_BYTES = 2**26  # after which it is written too
SAVED_EVERY = 60.0  # seconds after which a shard is written with fewer entries
CAPTIONS_AT_ONCE = 32


def with_caches(
    config: Config,
    description: Description,
    family: Family,
    accelerator: Accelerator,
    images: TrainingImages,
    held_out_images: TrainingImages | None,
) -> tuple[TrainingImages, TrainingImages | None]:
    """The images with the caches that the flags ask for, which are filled. What made them leaves the memory.

    Raises:
        ValueError: if no image can be encoded, or the disk is full.
    """
    data = config.data
    found = [part for part in (images, held_out_images) if part is not None]
    if data.cache_latents:
        batch_size = config.optimization.train_batch_size
        drawn = [images, *(fixed(part) for part in found[1:])]
        latents = [_latents(part, family, accelerator, batch_size) for part in drawn]
        found = [replace(part, latents=cached) for part, cached in zip(found, latents)]
        drop_encoder(family.vae)
    if data.cache_text_embeddings:
        embeddings = _embeddings(found, config, family, accelerator)
        found = [replace(part, embeddings=embeddings) for part in found]
        _release_text_encoders(config, description, family, accelerator)
    return found[0], found[1] if held_out_images is not None else None


# Latents -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A crop that is not in the cache."""

    key: str
    row: int
    size: Size
    shares: tuple[float, float]
    flip: bool


@dataclass(frozen=True)
class Pixels(Dataset):
    """The pixels of crops, and their loss masks; or the reason why there are none.

    An image that is not the one in the catalogue any more would be kept under the wrong key; it is left out.
    """

    images: TrainingImages
    latents: CachedLatents
    work: Sequence[Work]

    def __getitem__(self, place: int) -> tuple[Work, dict[str, Tensor] | str]:
        work, images = self.work[place], self.images
        try:
            with images.readings.noted(work.row), at_most(images.data.dataloader_timeout):
                folders = data_folders(images.data, images.cache_dir)
                row = images.dataset[work.row]
                picture = picture_in(row, images.data, folders, work.size)
                picture.image.load()
                if not self.latents.is_current(work.row, row):
                    return work, "it has changed since this run began"
                mode = images.data.image_interpolation_mode
                pixels, _, masked = cropped_with(picture, work.size, work.shares, work.flip, mode)
                return work, {"pixels": pixels} | masked
        except Exception as error:  # as for TrainingImages.readable
            return work, first_line(error)


def _latents(images: TrainingImages, family: Family, accelerator: Accelerator, batch_size: int) -> CachedLatents:
    data, root = images.data, cache_root(images.data)
    with accelerator.main_process_first():
        folders = data_folders(data, images.cache_dir)
        known = Catalogue.of(images.dataset, data.image_column, folders, root, digests=True)
        masks = None
        if data.masks is not None:
            digests: Sequence[str] = ()
            if data.mask_column is not None:
                digests = Catalogue.of(images.dataset, data.mask_column, folders, root, digests=True).digests
            masks = [data.alpha_mask, data.unmasked_weight == 0], digests
    state = {name: t for name, t in family.vae.state_dict().items() if not name.startswith("decoder.")}
    encoder = fingerprint_of(_configuration(family.vae), *_named(state))
    columns = data.image_column, data.mask_column
    latents = CachedLatents(Store(root / "latents"), known, encoder, data.image_interpolation_mode, columns, masks)
    while missing := _agreed(accelerator, lambda: _missing(images, latents)):
        cast(nn.Module, family.vae).to(accelerator.device)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        bad = _encode(Pixels(images, latents, mine), family.vae, latents.store, accelerator, batch_size, len(missing))
        for found in gather_object([bad]):
            latents.bad.update(found)
        latents.store.refresh()
    _check_shared(accelerator, latents.store, lambda: [work.key for work in _missing(images, latents)])
    return latents


def _missing(images: TrainingImages, latents: CachedLatents) -> list[Work]:
    """The crops that samples may ask for and that are not there, those of one size together."""
    usable, missing = _with_captions(images), cast(dict[str, Work], {})
    for index in range(len(images)):
        row, size = _usable_row(images, latents, usable, index), images.size_of(index)
        picture = latents.picture(row)
        for epoch in range(1 if images.data.center_crop else images.data.crops_per_image or 1):
            shares = images.kept_shares(epoch, index)
            place = place_of(picture.height, picture.width, size, shares)
            for flip in (False, True) if images.data.random_flip else (False,):
                key = latents.key(row, Crop(size, place, flip))
                if key not in latents.store:
                    missing[key] = Work(key, row, size, shares, flip)
    return sorted(missing.values(), key=lambda work: (work.size, work.row))


def _with_captions(images: TrainingImages) -> list[bool]:
    """Whether each row has a caption that can be used."""
    found = []
    for row in caption_rows(images.dataset, columns_of(images.data, images.dataset.column_names)):
        try:
            images.caption(row)
            found.append(True)
        except ValueError:
            found.append(False)
    return found


def _usable_row(images: TrainingImages, latents: CachedLatents, usable: Sequence[bool], index: int) -> int:
    """The row that a sample is made of, as far as is known."""
    for row, _ in images.candidates(images.row_of(index)):
        if usable[row] and latents.is_good(row):
            return row
    why = next(iter(latents.bad.values()), "none can be opened as an image")
    raise ValueError(f"--cache_latents: no image of the data set can be encoded: {why}")


def _encode(
    pixels: Pixels, vae: Any, store: Store, accelerator: Accelerator, batch_size: int, total: int
) -> dict[int, str]:
    """Encode crops and store their posteriors; returns the rows that could not be, with reasons."""
    batches = [
        batch
        for _, places in groupby(range(len(pixels.work)), key=lambda place: pixels.work[place].size)
        for batch in _chunks(places, batch_size)
    ]
    loader = watched_loader(
        pixels.images,
        lambda images: replace(pixels, images=images),
        batch_sampler=batches,
        collate_fn=list,
        generator=torch.Generator(),  # the global one draws the first weights of LoRA behind this
    )
    bad: dict[int, str] = {}
    with _Shards(store) as shards, _progress(accelerator, "caching latents", total, " images") as progress:
        for read in loader:
            bad.update({work.row: found for work, found in read if isinstance(found, str)})
            good = [(work, found) for work, found in read if not isinstance(found, str)]
            if good:
                stacked = torch.stack([found["pixels"] for _, found in good]).to(accelerator.device)
                mean, std = posterior(vae, stacked)
                parts = {"mean": mean.cpu()} | ({} if std is None else {"std": std.cpu()})
                for place, (work, found) in enumerate(good):
                    entry = {name: part[place].clone() for name, part in parts.items()}
                    if not all(bool(part.isfinite().all()) for part in entry.values()):
                        bad[work.row] = "the VAE's latents of it are not finite"
                        continue
                    if "mask" in found:
                        entry["mask"] = (found["mask"] * 255).round().to(torch.uint8)
                    shards.add(work.key, entry)
            progress.update(len(read) * accelerator.num_processes)
    return bad


# Embeddings ----------------------------------------------------------------------------------------------------------


def _embeddings(
    images: Sequence[TrainingImages], config: Config, family: Family, accelerator: Accelerator
) -> CachedEmbeddings:
    shares = config.data.text_encoder_dropout or ()
    names = [name for name in family.text_encoder_names if getattr(family.pipeline, name) is not None]
    encoders = [getattr(family.pipeline, name) for name in names]
    fingerprint = fingerprint_of(
        [
            family.name,
            family.tokens,
            *_settings(family),
            *map(_configuration, encoders),
            _tokenizer_files(family, names),
        ],
        *(value for encoder in encoders for value in _named(encoder.state_dict())),
    )
    store = Store(cache_root(config.data) / "embeddings")
    cached = CachedEmbeddings(store, fingerprint, tuple(share > 0 for share in shares))
    wanted = {
        cached.key(caption, dropped): (caption, dropped)
        for caption in dict.fromkeys(
            (str(images[0].empty_caption), *(text for part in images for text in _captions(part)))
        )
        for dropped in cached.variants()
    }
    missing = _agreed(accelerator, lambda: [(key, *wanted[key]) for key in wanted if key not in store])
    if missing:
        for encoder in encoders:
            encoder.to(accelerator.device)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with (
            _Shards(store) as shards,
            _progress(accelerator, "caching text embeddings", len(missing), " captions") as progress,
        ):
            for part in _chunks(iter(mine), CAPTIONS_AT_ONCE):
                for key, entry in _encoded(part, family, accelerator.device):
                    shards.add(key, entry)
                progress.update(len(part) * accelerator.num_processes)
        accelerator.wait_for_everyone()
        store.refresh()
    _check_shared(accelerator, store, lambda: [key for key in wanted if key not in store])
    return cached


@torch.no_grad()
def _encoded(
    captions: Sequence[tuple[str, str, tuple[bool, ...]]], family: Family, device: torch.device
) -> Iterator[tuple[str, Entry]]:
    """Keys, and the conditions of captions, without the batch dimension."""
    keys, texts, dropped = zip(*captions)
    tokens = cast(Any, family.tokenize)(list(texts), *([torch.tensor(dropped)] if dropped[0] else []))
    with exact_precision(device):
        conditions = family.encode_prompts(list(texts), device, tokens)
    conditions = {name: torch.as_tensor(value).cpu() for name, value in conditions.items()}
    for place, key in enumerate(keys):
        entry = {name: value[place].clone() for name, value in conditions.items()}
        for name, value in entry.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(
                    f"--cache_text_embeddings: {name} of the caption {texts[place]!r} is not finite; try "
                    "--mixed_precision bf16 or no"
                )
        yield key, entry


def _captions(images: TrainingImages) -> Iterator[str]:
    """Every caption that a sample can get; rows without a usable one give none."""
    for row in caption_rows(images.dataset, columns_of(images.data, images.dataset.column_names)):
        try:
            yield from images.captions.captions(row) or ()
        except ValueError:
            continue


def _settings(family: Family) -> list[Any]:
    """What the pipeline does with captions besides: its settings, and the text that it makes of one."""
    pipeline = family.pipeline
    settings = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
    return [{name: value for name, value in settings.items() if not name.startswith("_")}, family.texts(["a caption"])]


def _tokenizer_files(family: Family, names: Sequence[str]) -> list[tuple[str, str]]:
    """The files of the tokenizers, and their digests."""
    found = []
    for name in names:
        folder = family.folder / name.replace("text_encoder", "tokenizer")
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        found += [(f"{folder.name}/{file.name}", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return found


def _release_text_encoders(config: Config, description: Description, family: Family, accelerator: Accelerator) -> None:
    """Free the text encoders; samples load them again."""
    dtypes = precisions(config.model, config.lora, type(family), weight_dtype(accelerator.mixed_precision))
    device = accelerator.device
    offloads = config.optimization.offload_frozen and memory.has_own_memory(device)

    def loader(name: str) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            encoder = load_text_encoder(str(family.folder), name, description, dtypes[name], config.model.variant)
            encoder.requires_grad_(False).eval()
            return memory.offload(encoder, device) if offloads else encoder.to(device)

        return load

    there = [name for name in family.text_encoder_names if getattr(family.pipeline, name) is not None]
    family.release({name: loader(name) for name in there})
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Both ----------------------------------------------------------------------------------------------------------------


class _Shards:
    """Collects entries, and writes them in shards."""

    def __init__(self, store: Store) -> None:
        self.store, self.entries, self.bytes, self.since = store, cast(dict[str, Entry], {}), 0, time.monotonic()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.write()

    def add(self, key: str, entry: Entry) -> None:
        self.entries[key] = entry
        self.bytes += sum(part.nbytes for part in entry.values())
        if len(self.entries) >= SHARD or self.bytes >= SHARD_BYTES or time.monotonic() - self.since > SAVED_EVERY:
            self.write()

    def write(self) -> None:
        if self.entries:
            self.store.write(self.entries)
        self.entries, self.bytes, self.since = {}, 0, time.monotonic()


def _progress(accelerator: Accelerator, words: str, total: int, unit: str) -> Any:
    return tqdm(desc=words, total=total, unit=unit, disable=not accelerator.is_main_process)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def _agreed(accelerator: Accelerator, find: Callable[[], list[Any]]) -> list[Any]:
    """What the main process finds: another run may fill the cache meanwhile."""
    found = [find() if accelerator.is_main_process else None]
    return cast(list[Any], broadcast_object_list(found)[0])


def _check_shared(accelerator: Accelerator, store: Store, missing: Callable[[], list[str]]) -> None:
    """Refuse a cache whose files not every process sees."""
    if accelerator.num_processes == 1:
        return
    store.refresh()
    if any(gather_object([len(missing())])):
        raise ValueError(
            f"--data_cache_dir: some processes do not see what others wrote to {store.folder}; give a folder that all "
            "machines share"
        )


def _configuration(model: Any) -> Any:
    """A model's configuration, as JSON can hold it, without what changes nothing."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    left = ("_name_or_path", "_diffusers_version", "transformers_version", "_use_default_values")
    return json.loads(json.dumps({n: v for n, v in sorted(config.items()) if n not in left}, default=str))


def _named(state: Mapping[str, Tensor]) -> Iterator[Any]:
    for name, tensor in sorted(state.items()):
        yield name
        yield tensor
