"""Grids of checkpoints and of strengths show the samples that were drawn, and the adapters are put back exactly."""

import json
from unittest import mock

import numpy as np
import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from trainer import train

from lpl.training import comparisons, validation
from lpl.training.adapters import scaled
from tests.training.test_sampling import pixels


@pytest.fixture(scope="module")
def trained(sd_pipeline, image_folder, tmp_path_factory):
    """Three steps of LoRA with samples after each, and the columns and names of the two grids."""
    grids = {}

    def recorded(columns, names):
        grids["scales" if "LoRA x 1" in columns else "steps"] = (
            {head: [np.asarray(image) for image in column] for head, column in columns.items()},
            list(names),
        )
        return compared(columns, names)

    compared, folder = comparisons.compared, tmp_path_factory.mktemp("compared")
    prompts = ["a cat", "a cat", json.dumps({"prompt": "a dog", "seed": 3})]
    flags = {"validation_prompts": prompts, "validation_steps": 1, "validation_lora_scales": [0, 0.5, 1]}
    flags |= {"rank": 2, "learning_rate": 0.1, "lpl_weight": 0, "max_train_steps": 3}
    with mock.patch.object(validation, "compared", recorded):
        train(sd_pipeline, image_folder, folder, **flags)
    return folder / "samples", grids


def saved(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_a_column_for_each_step(trained):
    folder, grids = trained
    columns, names = grids["steps"]
    assert names == ["a cat", "a cat", "a dog, seed 3"] and (folder / "checkpoints.png").is_file()
    assert list(columns) == ["before training", "step 1", "step 2", "step 3"]
    for step, images in enumerate(columns.values()):
        assert pixels(images) == pixels(saved(folder / f"step-{step:06d}"))


def test_a_column_for_each_strength(trained):
    folder, grids = trained
    columns, _ = grids["scales"]
    assert list(columns) == ["LoRA x 0", "LoRA x 0.5", "LoRA x 1"] and (folder / "lora_scales.png").is_file()
    none, half, whole = (pixels(images) for images in columns.values())
    assert none == pixels(saved(folder / "step-000000")) and whole == pixels(saved(folder / "step-000003"))
    assert half == pixels(saved(folder / "lora-scale-0.5")) and len({*none, *half, *whole}) == 9


def test_the_strength_is_put_back_exactly_even_after_an_error(sd_pipeline):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model

    unet = UNet2DConditionModel.from_pretrained(sd_pipeline, subfolder="unet")
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=0.7, target_modules=["to_q"]), unet)
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.scaling["default"] for layer in layers]
    with pytest.raises(KeyError), scaled([unet], 0.3):
        assert [layer.scaling["default"] for layer in layers] == [0.3 * scale for scale in before]
        raise KeyError
    assert before and [layer.scaling["default"] for layer in layers] == before


def test_names_stand_in_every_row_once_and_large_grids_shrink(monkeypatch):
    found = []
    monkeypatch.setattr(comparisons, "labelled_grid", lambda *given: found.append(given))
    image = Image.new("RGB", (1024, 512))
    comparisons.compared({"step 1": [image] * 3, "step 2": [image] * 3}, ["a", "a (2)", "a"])
    comparisons.compared({"step 1": [image] * 120, "step 2": [image] * 120}, ["a"] * 120)
    (rows, heads, tile), (many, _, smaller) = found
    assert list(rows) == ["a", "a (2)", "a (3)"] and heads == ["step 1", "step 2"] and tile is None
    assert len(many) == comparisons.MOST_ROWS and smaller == int((64e6 / 200) ** 0.5)
    assert comparisons.evenly(range(100)) == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]


def test_of_no_checkpoints_there_is_no_grid(sampling):
    samples = sampling.draw("a cat", step=0)
    sampling.draw("a cat", step=1)
    (samples.folder / "checkpoints.png").write_bytes(b"of an earlier run")
    assert samples.checkpoints(1) is None and not (samples.folder / "checkpoints.png").exists()
    sampling.draw("a cat", step=2)
    assert samples.checkpoints(1) is None and samples.checkpoints(2) is not None
