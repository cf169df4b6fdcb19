"""A thousand random edits of images, captions, flags and weights: nothing stale is ever read from the caches."""

import copy
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from caches import Pair
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from trainer import parsed, reset_accelerate, settings

from lpl.data import catalogue, index
from lpl.training import caching
from lpl.training.loading import load_family
from tests.data.test_dataset import over


FILES = 4
SHAPES = ((20, 16), (16, 16), (18, 33))
FLAGS = {
    "resolution": (16, 24),
    "random_flip": (False, True),
    "center_crop": (False, True),
    "crops_per_image": (1, 2, 3),
    "image_interpolation_mode": ("lanczos", "bilinear", "nearest"),
    "seed": (0, 1),
    "proportion_empty_prompts": (0.0, 0.5),
    "caption_prefix": (None, "a photo of"),
    "alpha_mask": (False, True),
}


class World:
    """Images in files, captions, flags and models, which change at random; now and then back to what they were."""

    def __init__(self, folder: Path, family, chance: random.Random) -> None:
        self.folder, self.family, self.chance = folder, family, chance
        self.flags = {name: values[0] for name, values in FLAGS.items()}
        self.captions = ["a cat"] * FILES
        self.dataset = self._dataset()
        self.weights = {"vae": [], "text": []}
        self.contents: list[bytes] = []
        for number in range(FILES):
            self._write(number, self._content())
        self._keep()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.bmp"  # whose length does not show what is in it

    def _content(self) -> bytes:
        seed, shape = self.chance.randrange(50), self.chance.choice(SHAPES)
        pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
        place = self.folder / "new.bmp"
        Image.fromarray(pixels).save(place)
        content = place.read_bytes()
        place.unlink()
        return content

    def _write(self, number: int, content: bytes) -> None:
        file = self._file(number)
        before = file.stat() if file.exists() and self.chance.random() < 0.5 else None
        if self.chance.random() < 0.5 and file.exists():
            file.unlink()
        file.write_bytes(content)
        if before is not None:  # hides the change
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _models(self):
        return {"vae": self.family.vae.encoder, "text": self.family.text_encoders[0]}

    def _keep(self) -> None:
        for name, model in self._models().items():
            self.weights[name].append(copy.deepcopy(model.state_dict()))

    @torch.no_grad()
    def edit(self) -> None:
        kind = self.chance.choice(("image", "image", "swap", "break", "caption", "flag", "flag", "vae", "text"))
        if kind == "image":
            self._write(self.chance.randrange(FILES), self._content())
        elif kind == "swap":
            first, second = (self._file(number) for number in self.chance.sample(range(FILES), 2))
            first.rename(self.folder / "third")
            second.rename(first)
            (self.folder / "third").rename(second)
        elif kind == "break":
            self._write(0, b"no image")
        elif kind == "caption":
            texts = self.chance.choice(["a cat", "a dog", ["a cat", "a hen"], ["a hen"], "", "a  cat", "acat"])
            self.captions[self.chance.randrange(FILES)] = texts
            self.dataset = self._dataset()
        elif kind == "flag":
            name = self.chance.choice(list(FLAGS))
            self.flags[name] = self.chance.choice(FLAGS[name])
        else:
            model, known = self._models()[kind], self.weights[kind]
            if len(known) > 3 or self.chance.random() < 0.5:
                model.load_state_dict(self.chance.choice(known))
            else:
                weight = self.chance.choice([weight for weight in model.parameters() if weight.ndim > 1])
                weight.view(-1)[self.chance.randrange(weight.numel())] += self.chance.choice((0.3, -0.3))
                known.append(copy.deepcopy(model.state_dict()))

    def _dataset(self) -> Dataset:
        texts = [[text] if isinstance(text, str) else text for text in self.captions]
        paths = [str(self._file(number)) for number in range(FILES)]
        return Dataset.from_dict({"image": paths, "text": texts}).cast_column("image", ImageFeature(decode=False))

    def images(self, root: Path):
        config = settings(**self.flags, train_data_dir=str(self.folder), data_cache_dir=str(root))
        return config, over(self.dataset, config)


@pytest.mark.parametrize("edits", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_edit_leaves_anything_stale(edits, sd_pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_progress", lambda *args: caching.tqdm(disable=True))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    config, description = parsed(sd_pipeline, image_folder, tmp_path / "run")
    family = load_family(config.model, config.lora, description, torch.float32)
    accelerator, chance = Accelerator(cpu=True), random.Random(0)
    (tmp_path / "images").mkdir()
    world, encoded = World(tmp_path / "images", family, chance), 0
    encode = caching.posterior

    def counted(vae, pixels):
        nonlocal encoded
        encoded += len(pixels)
        return encode(vae, pixels)

    monkeypatch.setattr(caching, "posterior", counted)
    for _ in range(edits):
        world.edit()
        monkeypatch.setattr(
            index, "RACY", chance.choice((2 * 10**9, -(10**12)))
        )  # whether the index may know the file
        config, plain = world.images(tmp_path / "cache")
        if not any(map(bool, plain.dataset["text"])):
            continue
        latents = caching._latents(plain, family, accelerator, 4)
        embeddings = caching._embeddings([plain], config, family, accelerator)
        cached = replace(plain, latents=latents, embeddings=embeddings)
        pair = Pair(config, family, family, plain, cached)
        pair.check([chance.randrange(5)], [chance.randrange(FILES)])
    assert 0 < encoded < 4 * edits  # most of it was there
    reset_accelerate()


@pytest.mark.parametrize("hidden", ["encoder", "digest", "flip", "place", "interpolation"])
def test_what_is_left_out_of_a_key_is_found(hidden, sd_pipeline, image_folder, tmp_path, monkeypatch):
    """The test above sees every fault of this kind."""
    key_of = caching.CachedLatents.key

    def blind(self, row, crop):
        known = {"encoder": self.encoder, "digest": self.catalogue.digests, "interpolation": self.interpolation}
        if hidden in ("encoder", "interpolation"):
            monkeypatch.setattr(self, hidden, "")
        elif hidden == "digest":
            monkeypatch.setattr(self, "catalogue", catalogue.Catalogue(self.catalogue.sizes, ["same"] * 99))
        else:
            crop = crop._replace(**{hidden: None})
        found = key_of(self, row, crop)
        self.encoder, self.interpolation = known["encoder"], known["interpolation"]
        self.catalogue = catalogue.Catalogue(self.catalogue.sizes, known["digest"])
        return found

    monkeypatch.setattr(caching.CachedLatents, "key", blind)
    with pytest.raises(AssertionError):
        test_no_edit_leaves_anything_stale(100, sd_pipeline, image_folder, tmp_path, monkeypatch)
