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


def test_text_encoders_that_are_not_trained_stay_in_their_own_precision(sd3_pipeline, image_folder, tmp_path):
    """SD3's T5: under float16's autocast it overflows."""
    trained = parts(sd3_pipeline, image_folder, tmp_path)
    batch, seen = batch_of(trained.family), {}
    for name in ("text_encoder", "text_encoder_3"):
        encoder = getattr(trained.family.pipeline, name)
        encoder.register_forward_hook(lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")}))
    latents = torch.zeros(len(batch["caption"]), 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        trained(latents, torch.ones(len(latents)), trained.conditions(batch, torch.device("cpu")))
    assert seen == {"text_encoder": True, "text_encoder_3": False}
