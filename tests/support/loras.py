"""LoRA of tiny pipelines, with random weights instead of a training."""

from pathlib import Path

import torch
from tiny import seeded

from lpl.config.command_line import config_of
from lpl.config.groups import Model
from lpl.families.description import read_pipeline
from lpl.training.loading import load_family
from lpl.training.lora import save_for_other_programs
from lpl.training.parts import TrainedParts


def tiny_lora(pipeline, folder, *, rank=2, alpha=4.0, text_encoders=False, seed=0, **lora):
    """Write a LoRA as a run does, for diffusers or peft and for other programs; returns the folder."""
    config = config_of({"lora": True, "rank": rank, "lora_alpha": alpha, **lora})
    description = read_pipeline(Model(pretrained_model_name_or_path=str(pipeline)))
    family = load_family(Model(pretrained_model_name_or_path=str(pipeline)), config.lora, description, torch.float32)
    trained = TrainedParts(family, config.lora, text_encoders=text_encoders)
    with seeded(seed), torch.no_grad():
        for weight in trained.weights():
            weight.add_(0.1 * torch.randn_like(weight))
    Path(folder).mkdir(parents=True)
    trained.save(folder)
    save_for_other_programs(family.lora_layout, folder, trained.models, Path(folder).name)
    return Path(folder)
