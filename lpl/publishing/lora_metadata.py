"""What the header of a LoRA file says of it to other programs and to sites.

Two sets of names are in use, and programs read either: ``modelspec.*`` of ModelSpec 1.0.1, and ``ss_*`` of kohya's
sd-scripts, with ``sshs_model_hash``. All values are strings. They are public: no path, token or user name is in them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lpl.config.choices import LORA
from lpl.data.dataset import TrainingImages
from lpl.data.report import are_tags, frequent
from lpl.diagnosis.plan import Plan
from lpl.families.architecture import DIFFUSERS, SPECIFICATION, Architecture, prediction
from lpl.publishing.card import encodable
from lpl.tools import layout
from lpl.tools.headers import add_metadata, content_hash
from lpl.tools.privacy import hide_paths, shown, without_secrets
from lpl.tools.words import counted


MOST_ROWS, MOST_TAGS = 100_000, 1000  # captions that are read, and tags of a data set that are named
DYNAMIC = "Dynamic"  # sd-scripts' word for what differs from layer to layer
METHOD = "latent-perceptual-loss"
COMMENT = "Trained with the latent perceptual loss (LPL, arXiv 2411.04873)."


@dataclass
class LoraMetadata:
    """Adds the metadata of a run to its LoRA files.

    Args:
        parts: configurations of the VAE and of the denoiser.
        licence: :func:`lpl.publishing.licence.base_licence`.
    """

    plan: Plan
    parts: Mapping[str, Mapping[str, Any]]
    licence: Mapping[str, Any]

    def add(self, path: Path) -> None:
        """Add the metadata to a file."""
        digest = content_hash(path)
        hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
        implementation = self.architecture.implementation if path.name.endswith(layout.OTHERS_SUFFIX) else DIFFUSERS
        values = self.specification | {"modelspec.implementation": implementation} | self.kohya | hashes
        add_metadata(path, {name: encodable(value) for name, value in values.items() if value})

    @cached_property
    def architecture(self) -> Architecture:
        model = self.plan.config.model
        return self.plan.trained.family.architecture(self.parts, model.prediction_type)

    @property
    def title(self) -> str:
        """The repository's name, or the output folder's."""
        run = self.plan.run
        return (run.repository or run.folder.resolve().name).rpartition("/")[2]

    @property
    def with_lpl(self) -> bool:
        lpl = self.plan.config.lpl
        return lpl.enabled and self.plan.run.step > lpl.lpl_start_step

    @property
    def base(self) -> str:
        """The base's id on the Hub, or the name of its folder, and what it was changed by."""
        model = self.plan.config.model
        words = _name_of(str(model.pretrained_model_name_or_path))
        if source := model.denoiser_model_name_or_path:
            words += f" with the {self.plan.trained.family.denoiser_name} of {_name_of(source)}"
        if count := len(model.merged):
            words += f" {'and' if source else 'with'} {count} merged LoRA"
        return words

    @property
    def specification(self) -> dict[str, str]:
        """The names of ModelSpec."""
        config, run = self.plan.config, self.plan.run
        height, width = config.data.size
        name, licence = self.architecture.name, self.licence.get("license_name") or self.licence.get("license") or ""
        values = {
            "sai_model_spec": SPECIFICATION,
            "architecture": f"{name}/lora",
            "title": self.title,
            "resolution": f"{width}x{height}",
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "description": self.description,
            "author": (run.repository or "").rpartition("/")[0],
            "license": licence if isinstance(licence, str) else ", ".join(licence),
            "tags": ", ".join(["lora", self.plan.trained.family.name, *([METHOD] if self.with_lpl else [])]),
            "usage_hint": self.usage,
            "trigger_phrase": self.trigger,
            "prediction_type": prediction(config.model.objective),
        }
        return {f"modelspec.{name}": value for name, value in values.items()}

    @property
    def kohya(self) -> dict[str, str]:
        """The names of sd-scripts."""
        config, run, images = self.plan.config, self.plan.run, self.plan.images
        lora, optimization = config.lora, config.optimization
        arguments = {"use_dora": True} if lora.use_dora else {}
        arguments |= {} if lora.adapter == LORA else {"algo": lora.adapter}
        alpha = (lora.lora_alpha or 0.0) * ((lora.rank or 0) ** 0.5 if lora.use_rslora else 1)
        height, width = config.data.size
        tags = self.tag_frequency
        values = {
            "output_name": self.title,
            "base_model_version": self.architecture.version,
            "sd_model_name": self.base,
            "v2": self.architecture.second,
            "network_module": self.architecture.network if lora.adapter == LORA else "lycoris.kohya",
            "network_dim": DYNAMIC if lora.ranks else lora.rank or "",
            "network_alpha": DYNAMIC if lora.ranks or lora.alphas else f"{alpha:g}" if lora.rank else "",
            "network_args": json.dumps(arguments),
            "resolution": (width, height),
            "num_train_images": images.rows or "",
            "steps": run.step,
            "total_batch_size": self.plan.global_batch,
            "learning_rate": optimization.learning_rate,
            "lr_scheduler": optimization.lr_scheduler,
            "optimizer": optimization.optimizer,
            "mixed_precision": run.mixed_precision,
            "seed": run.seed,
            "tag_frequency": json.dumps(tags) if tags else "",
            "training_comment": " ".join(filter(None, [COMMENT if self.with_lpl else "", self.usage])),
        }
        return {f"ss_{name}": str(value) for name, value in values.items()}

    @property
    def description(self) -> str:
        """What the LoRA is, and how it is used."""
        config, count = self.plan.config, self.plan.images.rows
        images = counted(count, "image") if count else "images"
        what = f"{config.lora.words} for {self.base}, trained on {images} for {self.plan.run.step:,} steps."
        return " ".join(filter(None, [what, COMMENT if self.with_lpl else "", self.usage]))

    @property
    def trigger(self) -> str:
        return _public(self.plan.config.data.trigger or "")

    @property
    def usage(self) -> str:
        return f"Trigger word: {self.trigger}" if self.trigger else ""

    @cached_property
    def tag_frequency(self) -> dict[str, dict[str, int]]:
        return tag_frequency(self.plan.images)


def tag_frequency(images: TrainingImages) -> dict[str, dict[str, int]]:
    """How many captions of each data set have a tag; words, where captions are sentences. Empty for a stream, or where
    there are more than :data:`MOST_ROWS` captions to read."""
    if images.rows is None or images.rows > MOST_ROWS:
        return {}
    captions: dict[str, Counter[str]] = defaultdict(Counter)
    only = images.data.parts[0].name
    for row, found in enumerate(images.captions_at()):
        name = images.mixture.name_of(row) if images.mixture else only
        captions[name].update(_words(found, images.class_names))
    separator = images.data.tag_separator
    return {
        shown(name).rpartition("/")[2]: {
            _public(tag): count
            for tag, count in frequent(counts, separator if are_tags(counts, separator) else None, MOST_TAGS)
        }
        for name, counts in captions.items()
    }


def _name_of(source: str) -> str:
    """A model's id or address on the Hub, or the name of its folder."""
    return shown(source).removeprefix("path/to/")


def _words(captions: Sequence[str | int], classes: Mapping[int, str]) -> list[str]:
    """Captions, or the names of class labels."""
    return [classes.get(found, f"class {found}") if isinstance(found, int) else found for found in captions]


def _public(text: str) -> str:
    """Captions may hold anything."""
    return encodable(without_secrets(hide_paths(text)))
