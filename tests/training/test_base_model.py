"""Another base model on resume."""

import shutil

import pytest
from diffusers import UNet2DConditionModel
from trainer import train


FLAGS = {"lpl_weight": 0, "checkpointing_steps": 1}


@pytest.fixture
def wider(sd_pipeline, tmp_path):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "wider")
    config = UNet2DConditionModel.load_config(pipeline / "unet")
    UNet2DConditionModel.from_config(config, block_out_channels=(8, 24)).save_pretrained(pipeline / "unet")
    return pipeline


@pytest.mark.parametrize("flags", [{}, {"rank": 2}])
def test_a_base_of_other_layers_is_refused(flags, sd_pipeline, wider, image_folder, tmp_path, monkeypatch):
    flags = FLAGS | flags
    out = train(sd_pipeline, image_folder, tmp_path / "out", max_train_steps=1, **flags)
    monkeypatch.setattr("train_text_to_image_lpl.load_weights", None)
    with pytest.raises(SystemExit, match="another base model than --pretrained_model_name_or_path"):
        train(wider, image_folder, out, resume_from_checkpoint="latest", **flags)


def test_another_base_at_the_same_place_is_named(sd_pipeline, image_folder, tmp_path, caplog):
    pipeline, flags = shutil.copytree(sd_pipeline, tmp_path / "sd"), FLAGS | {"rank": 2}
    out = train(pipeline, image_folder, tmp_path / "out", max_train_steps=1, **flags)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(pipeline / "unet"))
    unet.save_pretrained(pipeline / "unet")
    train(pipeline, image_folder, out, resume_from_checkpoint="latest", **flags)
    assert "this is not the base model that the run to resume began with" in caplog.text
