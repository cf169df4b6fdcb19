"""What is trained, and what it is called with."""

import torch
from tiny_families import batch_of
from torch.utils._pytree import tree_leaves
from trainer import parsed

from lpl.training.loading import load_family
from lpl.training.parts import TrainedParts


def parts(pipeline, images, folder):
    """A denoiser and its text encoders, trained together."""
    config, description = parsed(pipeline, images, folder, train_text_encoder=True)
    family = load_family(config.model, config.lora, description, torch.float32)
    return TrainedParts(family, config.lora, text_encoders=True)


def test_what_trained_text_encoders_are_given_is_on_the_device(sdxl_pipeline, image_folder, tmp_path):
    """DDP would copy everything else of the batch there too, images and noise, and wait for each copy."""
    trained = parts(sdxl_pipeline, image_folder, tmp_path)
    batch = batch_of(trained.family)
    batch |= {"tokens": trained.family.tokenize(batch["caption"]), "pixels": torch.ones(1), "bad": []}
    given = trained.conditions(batch, torch.device("meta"))
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) > 4 and all(tensor.is_meta for tensor in tensors)
    assert not {"pixels", "bad"} & given.keys() and given["caption"] == batch["caption"]
