"""DiT: a transformer that is conditioned on a class label, with a learned variance; one size only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from lpl.families.base import Conditions, Configs, Family


NULL_CLASS = 1000  # "no class", the label that the pipeline uses for classifier-free guidance whatever the model is
SHOWN_NAMES = 5


class DiT(Family):
    name = "dit"
    pipeline_class = DiTPipeline
    denoiser_name = "transformer"
    text_encoder_names = ()
    num_classes = 1000
    class_conditional = True
    empty_share = 0.1  # as DiT was trained
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, pipeline: DiffusionPipeline, settings: Any) -> None:
        super().__init__(pipeline, settings)
        # Each block would drop labels by itself, so that one sample has a class in some blocks and none in others,
        # and from the global random numbers; the data drops them by its own. The null class's row stays.
        for module in self.denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def encode_prompts(self, captions: Sequence[int] | Tensor, device: torch.device) -> Conditions:  # type: ignore[override]
        return {"class_labels": torch.as_tensor(captions, dtype=torch.long, device=device)}  # (B,)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Raises ValueError for latents that are not square: the model would answer in another shape."""
        channels, height, width = noisy_latents.shape[1:]
        if height != width:
            raise ValueError(f"DiT takes square latents, but these are {height} x {width}")
        output = denoiser(noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]
        return output[:, :channels]  # behind it the learned variance

    def call_arguments(self, prompt: str | int, resolution: int) -> dict[str, Any]:
        return {"class_labels": [int(prompt)]}

    @classmethod
    def class_names(cls, index: Mapping[str, Any]) -> dict[int, str]:
        """The classes' names in a pipeline's index, by label; several names of one class are parted by commas."""
        return {int(label): names for label, names in (index.get("id2label") or {}).items()}

    @classmethod
    def class_label(cls, prompt: str | int, names: Mapping[int, str]) -> int:
        """The label that a class's name, one of its names, or its number stands for.

        Args:
            names: of the classes, by label; as many as are known.

        Raises:
            ValueError: where it is neither.
        """
        labels = {name.strip().lower(): label for label, all_ in names.items() for name in (all_, *all_.split(","))}
        text = str(prompt).strip().lower()
        if text in labels:
            return labels[text]
        if text.isdecimal() and int(text) < NULL_CLASS:
            return int(text)
        some = ", ".join(name.split(",")[0] for name in list(names.values())[:SHOWN_NAMES])
        accepted = f"a class's name, such as {some}, or its number" if some else "a class's number"
        raise ValueError(
            f"--validation_prompts {prompt}: this model draws classes; give {accepted}, 0 to {NULL_CLASS - 1}"
        )

    @classmethod
    def empty_caption(cls, configs: Configs) -> int:
        """The null class, one behind the last.

        Raises:
            ValueError: for a model with another number of classes than 1000, which the pipeline could not guide.
        """
        if (classes := configs[cls.denoiser_name]["num_embeds_ada_norm"]) != NULL_CLASS:
            raise ValueError(
                f"--pretrained_model_name_or_path: this DiT has {classes} classes, and its pipeline samples those "
                f"with {NULL_CLASS} only; choose one of these, your data may have fewer classes"
            )
        return NULL_CLASS

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        """The pipeline draws one size, the one that the model was made for."""
        side = cls.native_resolution(configs)
        return side, side
