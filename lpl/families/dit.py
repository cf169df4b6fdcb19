"""DiT: a class-conditional transformer with a learned variance; one size only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiTPipeline
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from lpl.families.base import Conditions, Configs, Family, modulations
from lpl.families.fit import Relation, latents
from lpl.families.tokens import Tokens, on_device


CLASSES = 1000  # the pipeline's label for no class in classifier-free guidance, for every model
SHOWN_NAMES = 5


def labels_of(captions: Sequence[Any]) -> Tokens:
    """Class labels as a tensor, (B,)."""
    return {"class_labels": torch.as_tensor(captions, dtype=torch.long)}


class DiT(Family):
    name = "dit"
    pipeline_class = DiTPipeline
    text_encoder_names = ()
    num_classes = CLASSES
    empty_share = 0.1  # as DiT was trained
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    # The model itself calls the embeddings of its first block, behind the last one.
    sharded_layers = ("BasicTransformerBlock", "CombinedTimestepLabelEmbeddings")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Each block would drop labels independently, with the global generator: a sample would have a class in some
        # blocks only. The data set drops labels instead. The embedding keeps the row of the null class.
        for module in self.denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    @property
    def tokenize(self) -> Callable[[Sequence[Any]], Tokens]:
        return labels_of

    def encode_prompts(self, captions: Sequence[Any], device: torch.device, tokens: Tokens | None) -> Conditions:
        return on_device(tokens or labels_of(captions), device)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Raises ValueError for latents that are not square, for which the output would have another shape."""
        channels, height, width = noisy_latents.shape[1:]
        if height != width:
            raise ValueError(f"DiT takes square latents, but these are {height} x {width}")
        output = denoiser(noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]
        return output[:, :channels]  # the learned variance follows

    def call_arguments(self, prompt: str | int, height: int, width: int) -> dict[str, Any]:
        """The pipeline takes no size: it draws the one that the model was made for."""
        return {"class_labels": [int(prompt)]}

    @classmethod
    def class_names(cls, index: Mapping[str, Any]) -> dict[int, str]:
        """The names of the classes in a pipeline's index, by label; commas separate several names of one class."""
        return {int(label): names for label, names in (index.get("id2label") or {}).items()}

    @classmethod
    def class_label(cls, prompt: str | int, names: Mapping[int, str]) -> int:
        """The label of a class given by its name, one of its names, or its number.

        Args:
            names: known names by label.

        Raises:
            ValueError: if it is none of them.
        """
        labels = {name.strip().lower(): label for label, all_ in names.items() for name in (all_, *all_.split(","))}
        text = str(prompt).strip().lower()
        if text in labels:
            return labels[text]
        if text.isdecimal() and int(text) < CLASSES:
            return int(text)
        some = ", ".join(name.split(",")[0] for name in list(names.values())[:SHOWN_NAMES])
        accepted = f"a class's name, such as {some}, or its number" if some else "a class's number"
        raise ValueError(
            f"--validation_prompts {prompt}: this model draws classes; give {accepted}, 0 to {CLASSES - 1}"
        )

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        return latents(configs["transformer"], configs["vae"], variance=True)

    @classmethod
    def empty_caption(cls, configs: Configs) -> int:
        """The null class, which follows the last one.

        Raises:
            ValueError: if the model does not have 1000 classes: its pipeline could not guide it.
        """
        if (classes := configs[cls.denoiser_name]["num_embeds_ada_norm"]) != CLASSES:
            raise ValueError(
                f"--pretrained_model_name_or_path: this DiT has {classes} classes, but its pipeline samples only "
                f"models with {CLASSES}; choose one of these; your data may have fewer classes"
            )
        return CLASSES

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        """The pipeline draws only the size that the model was made for."""
        side = cls.native_resolution(configs)
        return side, side

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        outputs = [denoiser.get_submodule(name) for name in ("proj_out_1", "proj_out_2")]
        return [*modulations(denoiser, AdaLayerNormZero), *outputs]
