"""What only Wan has: pipelines with two transformers, and a LoRA that diffusers reads by the original's names."""

import pytest
from commands import edited, refusal
from diffusers import WanPipeline
from safetensors.torch import load_file
from trainer import arguments, parsed

from lpl.training import lora
from tests.training.test_lora import NAME, layers, trained


@pytest.mark.parametrize(
    "index", [{"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"boundary_ratio": 0.875}]
)
def test_two_transformers_are_refused(index, wan_pipeline, image_folder, tmp_path, capsys, no_weights):
    folder = edited(wan_pipeline, tmp_path / "pipeline", None, **index)
    message = refusal(capsys, arguments(folder, image_folder, tmp_path / "out"))
    assert f"--pretrained_model_name_or_path {folder}: it has a transformer for high noise" in message


@pytest.mark.parametrize("missing", ["transformer_2", "boundary_ratio", "expand_timesteps"])
def test_an_older_index_lacks_what_is_newer(missing, wan_pipeline, image_folder, tmp_path):
    """That of Wan 2.1."""
    folder = edited(wan_pipeline, tmp_path / "pipeline", None)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(f'"{missing}"', '"_other"'))
    parsed(folder, image_folder, tmp_path / "out")


def test_diffusers_reads_a_lora_for_other_programs(wan_pipeline, tmp_path):
    """By the names of the original that musubi-tuner's files have."""
    family, parts = trained(wan_pipeline)
    path = lora.save_for_other_programs(family.lora_layout, tmp_path, parts, NAME)
    read = WanPipeline.lora_state_dict(load_file(path))
    for name, layer in layers(parts["transformer"]).items():
        up, down = (read[f"transformer.{name}.lora_{side}.weight"] for side in "BA")
        expected = layer.get_delta_weight("default")
        assert (up @ down - expected).abs().max() < 1e-5 * expected.abs().max()
