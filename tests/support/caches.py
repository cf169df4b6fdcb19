"""Cached training images beside the same ones without caches, and whether both say the same."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from runs import run_of
from trainer import parsed, reset_accelerate

from lpl.autoencoders import posterior
from lpl.data.dataset import TrainingImages, fixed
from lpl.training.caching import with_caches
from lpl.training.loading import load_family
from lpl.training.start import open_images


BOTH = {"cache_latents": True, "cache_text_embeddings": True, "center_crop": True}
ALIKE = ("bad", "caption", "index")
EQUAL = (
    *("original_size", "crop_top_left", "target_size", "timestep", "posterior_noise", "noise"),
    *("lpl_choice", "dropped", "loss_weight"),
)


@dataclass
class Pair:
    """Images without and with caches, of training or held out, and a family that has lost nothing."""

    config: Any
    family: Any  # of the caches
    whole: Any
    plain: TrainingImages
    cached: TrainingImages
    held_out: tuple[TrainingImages, TrainingImages] | None = None

    def check(self, epochs=range(2), indices=None):
        """Compare samples with a direct computation."""
        self._check(self.plain, self.cached, epochs, indices)
        if self.held_out is not None:
            self._check(*map(fixed, self.held_out), range(1), None)

    def _check(self, plain, cached, epochs, indices):
        assert len(plain) == len(cached)
        for epoch in epochs:
            for index in range(len(plain)) if indices is None else indices:
                self.compare(plain[epoch, index], cached[epoch, index])

    def compare(self, expected, found):
        names = [row for row, _ in expected["bad"]], [row for row, _ in found["bad"]]
        assert names[0] == names[1], (expected["bad"], found["bad"])
        assert found["caption"] == expected["caption"]
        assert expected.keys() - {"pixels"} == found.keys() - {"posterior", "embeddings"} - (
            {"pixels"} if "posterior" not in found else set()
        )
        for name in EQUAL:
            if name in expected:
                assert torch.equal(found[name], expected[name]), name
        if "mask" in expected:
            torch.testing.assert_close(found["mask"], expected["mask"], rtol=0, atol=1e-6)
        if "posterior" in found:
            assert "pixels" not in found
            mean, std = posterior(self.whole.vae, expected["pixels"][None])
            both = {"mean": mean[0]} | ({} if std is None else {"std": std[0]})
            torch.testing.assert_close(found["posterior"], both, rtol=1e-4, atol=1e-5)
        if "embeddings" in found:
            tokenize, dropped = self.whole.tokenize, expected.get("dropped")
            tokens = tokenize([expected["caption"]], *([] if dropped is None else [dropped[None]]))
            conditions = self.whole.encode_prompts([expected["caption"]], torch.device("cpu"), tokens)
            expected_conditions = {name: torch.as_tensor(value[0]) for name, value in conditions.items()}
            torch.testing.assert_close(found["embeddings"], expected_conditions, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def cached_pair(pipeline, images, root, change=None, whole=None, **flags):
    """`change(family)` changes the models; `whole` is a family to compute with, or it is loaded."""
    reset_accelerate()
    config, description = parsed(pipeline, images, root / "run", data_cache_dir=root / "cache", **BOTH | flags)
    accelerator = Accelerator(cpu=True)
    run = run_of(config, accelerator=accelerator, **({"classes": ()} if description.num_classes else {}))
    plain, held_out = open_images(config, description, run)
    families = []
    for given in (None, whole):
        family = given or load_family(config.model, config.lora, description, torch.float32)
        if change is not None and given is None:
            change(family)
        families.append(family)
    found = with_caches(config, description, families[0], accelerator, plain, held_out)
    reset_accelerate()
    held = None if held_out is None else (held_out, found[1])
    return Pair(config, families[0], families[1], plain, found[0], held)
