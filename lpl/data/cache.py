"""What the caches know: the latents of an image's crop, and the embeddings of a caption.

A key is made of content: for latents the digest of the image file, its crop and interpolation, and the fingerprint of
the VAE's weights; for embeddings the caption, and the fingerprint of the text encoders, their tokenizers and their
precision. So what is trained on never changes: another learning rate finds everything again, and a changed image finds
nothing. What is random stays random: of an image the *posterior* is kept, its mean and standard deviation, and of a
row the embeddings of each caption that it can get; crops, flips, captions and dropout are drawn in training, from the
same generators as without caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpl.config.sizes import Size
from lpl.data.catalogue import Catalogue, digest_of
from lpl.data.store import Entry, Store, key_of


TRANSFORM = 1  # raised when the same flags make other pixels of an image


class Crop(NamedTuple):
    """Which part of an image is trained on.

    Args:
        size: height and width of the crop.
        place: top and left of the crop in the resized and mirrored image, as :func:`lpl.data.reading.place_of` says.
        flip: whether the image is mirrored.
    """

    size: Size
    place: tuple[int, int]
    flip: bool


class CachedPicture(NamedTuple):
    """An image whose crops are cached."""

    row: int
    height: int
    width: int


@dataclass
class CachedLatents:
    """The posterior of each crop, by row.

    Args:
        encoder: fingerprint of the VAE.
        interpolation: of resizing.
        columns: of images and of loss masks, if there is one.
        masks: what decides the loss masks, and their digests by row; None: there are none.
        bad: reasons of the rows that could not be encoded.
    """

    store: Store
    catalogue: Catalogue
    encoder: str
    interpolation: str
    columns: tuple[str, str | None]
    masks: tuple[list[Any], Sequence[str]] | None = None
    bad: dict[int, str] = field(default_factory=dict)

    def key(self, row: int, crop: Crop) -> str:
        digest = self.catalogue.digests[row]
        mask = [] if self.masks is None else [*self.masks[0], *self.masks[1][row : row + 1]]
        return key_of("latents", TRANSFORM, self.encoder, digest, mask, self.interpolation, *crop)

    def is_current(self, row: int, content: Mapping[str, Any]) -> bool:
        """Whether a row's image and mask, undecoded, are those of the keys."""
        image, mask = self.columns
        if digest_of(content[image]) != self.catalogue.digests[row]:
            return False
        return self.masks is None or mask is None or digest_of(content[mask]) == self.masks[1][row]

    def is_good(self, row: int) -> bool:
        """Whether an image can be encoded, as far as is known."""
        return row not in self.bad and bool(self.catalogue.sizes[row].all()) and bool(self.catalogue.digests[row])

    def picture(self, row: int) -> CachedPicture:
        """The size of an image.

        Raises:
            ValueError: if it could not be encoded.
        """
        if not self.is_good(row):
            raise ValueError(self.bad.get(row, "it cannot be opened as an image"))
        height, width = map(int, self.catalogue.sizes[row])
        return CachedPicture(row, height, width)

    def sample(self, row: int, crop: Crop) -> dict[str, Any]:
        """``posterior``: mean and, if there is one, std, (C, h, w) each; and ``mask`` (1, H, W) in [0, 1], if any."""
        entry = self.store[self.key(row, crop)]
        mask = entry.pop("mask", None)
        return {"posterior": entry} | ({} if mask is None else {"mask": mask.float() / 255})


@dataclass
class CachedEmbeddings:
    """The conditions of each caption.

    Args:
        encoders: fingerprint of the text encoders and their tokenizers.
        droppable: which text encoders --text_encoder_dropout may drop; empty without the flag.
    """

    store: Store
    encoders: str
    droppable: tuple[bool, ...] = ()

    def key(self, caption: str, dropped: tuple[bool, ...] = ()) -> str:
        return key_of("embeddings", self.encoders, caption, list(dropped) if any(dropped) else [])

    def variants(self) -> Iterator[tuple[bool, ...]]:
        """The ways in which text encoders can be dropped."""
        return product(*((False, True) if may else (False,) for may in self.droppable))

    def conditions(self, caption: str, dropped: Tensor | None = None) -> Entry:
        """The conditions of a caption, without the batch dimension."""
        return self.store[self.key(caption, () if dropped is None else tuple(dropped.tolist()))]


def fingerprint_of(*values: Any) -> str:
    """A fingerprint of tensors, by their bytes, shapes and types, and of what JSON can hold."""

    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(key_of(value).encode())
    return digest.hexdigest()
