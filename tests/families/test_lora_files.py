"""LoRA of every origin are read to the same numbers; ranks and alphas are those of the file, layer by layer."""

import json

import pytest
import torch
from loras import tiny_lora
from safetensors.torch import load_file, save_file

from lpl.autoencoders import skeleton
from lpl.families import DiT, Flux, StableDiffusion, StableDiffusionXL, Wan
from lpl.families.lora_files import Adapter, read_lora


def denoiser(pipeline, name="unet"):
    config = json.loads((pipeline / name / "config.json").read_text())
    return {name: skeleton(config)}


def same(first, second):
    assert first.layers.keys() == second.layers.keys()
    for name, layer in first.layers.items():
        other = second.layers[name]
        assert torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up)
        assert (layer.rank, layer.alpha) == (other.rank, other.alpha)
    return True


@pytest.fixture(scope="module")
def sd_lora(sd_pipeline, tmp_path_factory):
    return tiny_lora(sd_pipeline, tmp_path_factory.mktemp("lora") / "sd")


def read(source, pipeline, family=StableDiffusion, name="unet"):
    return read_lora("lora_init", str(source), family, denoiser(pipeline, name))


def test_diffusers_and_kohyas_files_hold_the_same(sd_lora, sd_pipeline):
    ours = read(sd_lora, sd_pipeline)["unet"]
    assert (ours.rank, ours.alpha, ours.dora, ours.rslora) == (2, 4.0, False, False)
    assert same(read(sd_lora / "sd_comfyui.safetensors", sd_pipeline)["unet"], ours)


def test_pefts_files_hold_the_same(sd_lora, sd_pipeline, tmp_path):
    factors = load_file(sd_lora / "pytorch_lora_weights.safetensors")
    named = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in factors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    settings = {"r": 2, "lora_alpha": 4.0, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = read(tmp_path, sd_pipeline)["unet"]
    assert found.rslora and same(found, read(sd_lora, sd_pipeline)["unet"])


def test_files_of_older_versions_of_diffusers_are_read(sd_lora, sd_pipeline, tmp_path):
    factors = load_file(sd_lora / "pytorch_lora_weights.safetensors")
    old = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for name, value in factors.items()}
    save_file(old, tmp_path / "old.safetensors")
    found = read(tmp_path / "old.safetensors", sd_pipeline)["unet"]
    assert (found.rank, found.alpha) == (2, 2.0)  # without an alpha, it is the rank
    scaled = Adapter({name: layer._replace(alpha=4.0) for name, layer in found.layers.items()})
    assert same(scaled, read(sd_lora, sd_pipeline)["unet"])


def test_names_that_only_diffusers_knows_have_their_own_alphas(sdxl_pipeline, tmp_path):
    """Kohya's files name layers of SDXL as the original does; others use diffusers' names."""
    layer = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"lora_unet_{layer}.lora_down.weight": torch.ones(3, 16),
        f"lora_unet_{layer}.lora_up.weight": torch.ones(16, 3),
        f"lora_unet_{layer}.alpha": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    found = read(tmp_path / "file.safetensors", sdxl_pipeline, StableDiffusionXL)["unet"]
    (name,) = found.layers
    assert name == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert (found.layers[name].rank, found.layers[name].alpha) == (3, 1.5)


def test_a_dora_keeps_its_lengths(sd_pipeline, tmp_path):
    lora = tiny_lora(sd_pipeline, tmp_path / "dora", use_dora=True)
    ours = read(lora, sd_pipeline)["unet"]
    saved = load_file(lora / "pytorch_lora_weights.safetensors")
    assert ours.dora and len(ours.layers) == sum("magnitude" in name for name in saved)
    for name, layer in ours.layers.items():
        assert torch.equal(layer.magnitude, saved[f"unet.{name}.lora_magnitude_vector"])


def test_a_family_whose_pipeline_loads_no_lora_has_pefts(dit_pipeline, tmp_path):
    lora = tiny_lora(dit_pipeline, tmp_path / "dit")
    assert read(lora, dit_pipeline, DiT, "transformer")["transformer"].alpha == 4.0


def test_ranks_may_differ_from_layer_to_layer(sd_lora, sd_pipeline, tmp_path):
    tensors = load_file(sd_lora / "sd_comfyui.safetensors")
    key = next(name.partition(".")[0] for name in tensors)
    tensors[f"{key}.lora_down.weight"] = torch.ones(5, tensors[f"{key}.lora_down.weight"].shape[1])
    tensors[f"{key}.lora_up.weight"] = torch.ones(len(tensors[f"{key}.lora_up.weight"]), 5)
    tensors[f"{key}.alpha"] = torch.tensor(2.5)
    save_file(tensors, tmp_path / "file.safetensors")
    found = read(tmp_path / "file.safetensors", sd_pipeline)["unet"]
    assert sorted({(layer.rank, layer.alpha) for layer in found.layers.values()}) == [(2, 4.0), (5, 2.5)]
    model = denoiser(sd_pipeline)["unet"].to_empty(device="cpu")
    found.inject(model, "default")
    layers = {name: module for name, module in model.named_modules() if name in found.layers}
    assert all(layers[name].r["default"] == layer.rank for name, layer in found.layers.items())
    assert all(layers[name].scaling["default"] == layer.alpha / layer.rank for name, layer in found.layers.items())


def test_names_of_diffusers_may_have_alphas_too(flux_pipeline, tmp_path):
    name = "transformer"
    modules = dict(denoiser(flux_pipeline, name)[name].named_modules())
    layer, module = next((layer, module) for layer, module in modules.items() if layer.endswith("attn.to_q"))
    tensors = {
        f"{name}.{layer}.lora_A.weight": torch.ones(2, module.in_features),
        f"{name}.{layer}.lora_B.weight": torch.ones(module.out_features, 2),
        f"{name}.{layer}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    found = read(tmp_path / "file.safetensors", flux_pipeline, Flux, name)[name]
    assert (found.rank, found.alpha) == (2, 1.0)


def test_an_adapter_leaves_the_precision_of_its_base(sd_lora, sd_pipeline):
    model = denoiser(sd_pipeline)["unet"].to_empty(device="cpu").to(torch.bfloat16)
    read(sd_lora, sd_pipeline)["unet"].inject(model, "default")
    found = {(".default." in name, weight.dtype) for name, weight in model.named_parameters()}
    assert found == {(True, torch.float32), (False, torch.bfloat16)}


def test_pefts_file_needs_its_settings(sd_lora, sd_pipeline, tmp_path):
    save_file({"base_model.model.conv_in.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has no adapter_config.json beside it, which has its alpha"):
        read(tmp_path, sd_pipeline)


@pytest.mark.parametrize("kohya", [True, False])
def test_a_dora_that_would_be_read_as_a_lora_is_refused(kohya, sd_lora, sd_pipeline, tmp_path):
    """With norms over the inputs, as LyCORIS writes them, and under names of diffusers."""
    tensors = load_file(sd_lora / ("sd_comfyui.safetensors" if kohya else "pytorch_lora_weights.safetensors"))
    name = next(name for name in tensors if name.endswith("down.weight" if kohya else "lora_A.weight"))
    tensors[f"{name.rpartition('.lora_')[0]}.dora_scale"] = torch.ones(1, tensors[name].shape[1])
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="this is a DoRA"):
        read(tmp_path / "file.safetensors", sd_pipeline)


def test_a_lora_of_another_family_is_refused(sd_lora, wan_pipeline):
    """Whatever the converters of diffusers raise."""
    with pytest.raises(ValueError, match="it is of another base model"):
        read(sd_lora / "sd_comfyui.safetensors", wan_pipeline, Wan, "transformer")


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, "this is no LoRA but hada"),
        ({"x.hada_w1_a": torch.zeros(2, 2)}, "this is no LoRA but hada"),
        ({"conv_in.weight": torch.zeros(2, 2)}, "this is no LoRA"),
        (
            {"unet.nowhere.lora_A.weight": torch.zeros(1, 2), "unet.nowhere.lora_B.weight": torch.zeros(2, 1)},
            "it is of another base model: the unet has no layer nowhere",
        ),
        (
            {
                "unet.conv_in.lora_A.weight": torch.zeros(1, 9, 3, 3),
                "unet.conv_in.lora_B.weight": torch.zeros(8, 1, 1, 1),
            },
            "it is of another base model: the adapter of conv_in does not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tensors, words, sd_pipeline, tmp_path):
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=f"--lora_init {tmp_path / 'file.safetensors'}: {words}"):
        read(tmp_path / "file.safetensors", sd_pipeline)
