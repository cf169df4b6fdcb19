"""Keys of the caches: everything that changes an entry changes its key; fingerprints of models."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from lpl.data import cache
from lpl.data.cache import CachedEmbeddings, CachedLatents, Crop, fingerprint_of
from lpl.data.catalogue import NONE, Catalogue
from lpl.data.store import Store


CROP = Crop((32, 48), (1, 2), False)


@pytest.fixture
def latents(tmp_path):
    sizes = np.array([[60, 80], [60, 80], [0, 0]], dtype=np.int32)
    known = Catalogue(sizes, ["first", "second", ""])
    return CachedLatents(Store(tmp_path), known, "vae", "lanczos", ("image", None))


def test_each_thing_that_changes_latents_changes_their_key(latents, monkeypatch):
    masks = [([True, True], ()), ([True, False], ()), *(([False, True], [of] * 3) for of in ("a", NONE, ""))]
    crops = [CROP._replace(size=(48, 32)), CROP._replace(place=(2, 1)), CROP._replace(flip=True)]
    keys = [
        latents.key(0, CROP),
        latents.key(1, CROP),
        *(latents.key(0, crop) for crop in crops),
        replace(latents, encoder="other").key(0, CROP),
        replace(latents, interpolation="nearest").key(0, CROP),
        *(replace(latents, masks=mask).key(0, CROP) for mask in masks),
    ]
    monkeypatch.setattr(cache, "TRANSFORM", cache.TRANSFORM + 1)
    keys.append(latents.key(0, CROP))
    assert len(set(keys)) == len(keys)


def test_the_place_of_an_image_does_not(latents):
    other = replace(latents, catalogue=Catalogue(latents.catalogue.sizes, ["x", "first"]))
    assert other.key(1, CROP) == latents.key(0, CROP)


def test_what_cannot_be_encoded_is_no_picture(latents):
    assert latents.picture(0) == (0, 60, 80)
    for row, why in ((1, "it is broken"), (2, "cannot be opened")):
        latents.bad[1] = "it is broken"
        with pytest.raises(ValueError, match=why):
            latents.picture(row)


def test_each_thing_that_changes_embeddings_changes_their_key(tmp_path):
    embeddings = CachedEmbeddings(Store(tmp_path), "encoders", (True, False, True))
    variants = list(embeddings.variants())
    assert len(variants) == 4 and all(not dropped[1] for dropped in variants)
    keys = [embeddings.key(caption, dropped) for caption in ("", "a cat", "a  cat") for dropped in variants]
    keys.append(CachedEmbeddings(Store(tmp_path), "others").key("a cat"))
    assert len(set(keys)) == len(keys)
    assert embeddings.key("a cat", (False, False, False)) == embeddings.key("a cat")  # as without the flag


def test_fingerprints_tell_tensors_apart():
    ones = torch.ones(2, 3)
    different = [
        *((ones,), (ones.view(3, 2),), (ones.view(6),), (ones.to(torch.bfloat16),), (ones.to(torch.int32),)),
        *((ones, ones), (ones * (1 + 1e-7),), ("a", ones), (ones, "a"), (), (torch.tensor(1.0),)),
    ]
    assert all(fingerprint_of(*first) != fingerprint_of(*second) for first, second in combinations(different, 2))
    assert fingerprint_of(ones.mT.contiguous().mT) == fingerprint_of(ones)  # strides do not count
