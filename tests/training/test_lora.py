"""LoRA files: every program that reads one gets the model that was trained.

diffusers reads its own file, and kohya's layout where it can; peft reads its folders. ComfyUI and sd-scripts are not
here: `changed` does to a weight what they do, and the converters of diffusers, which turn original checkpoints into
its own, say in tests/families/test_lora_layout.py which weight of ours an original's name means.
"""

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import seeded
from tiny_families import TINY, configs_of, load

from lpl.config.groups import Lora
from lpl.families import FAMILIES
from lpl.training import lora


RANK, ALPHA = 2, 5.0
KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "all-linear": {"targets": ["all-linear"]},
}
FOR_OTHERS = [kind for kind in KINDS if kind != "DoRA"]
SCALE = dict.fromkeys(KINDS, ALPHA / RANK) | {"rank-stabilised": ALPHA / RANK**0.5}
NAME = "my-run"
ROUNDING = 2e-5  # of an image in [0, 1] in float32
FIXTURES = [fixtures[0].removesuffix("_pipeline") for fixtures in TINY.values()]
WITH_ENCODERS = ["sd", "sdxl", "sd3", "flux"]
# Families whose LoRA only diffusers and peft read
WITHOUT_OTHERS = {
    *("pixart-alpha", "pixart-sigma", "dit", "sana", "lumina-2", "auraflow"),
    *("kolors", "hunyuan-image"),
}
FLUX_DOUBLE_BLOCK = [f"transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "ff.net.2")]


def adapt(model, targets, rank=RANK, use_rslora=False, use_dora=False):
    """A model with a LoRA that changes something, as after a training."""
    flags = Lora(lora=True, rank=rank, lora_alpha=ALPHA, lora_dropout=0.1, use_rslora=use_rslora, use_dora=use_dora)
    lora.add_lora(model, targets, flags, denoiser=True)
    with seeded(1), torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model.eval()


def trained(folder, encoders=False, targets=None, **kind):
    """(family, adapted parts by name) of a pipeline; the denoiser's LoRA alone may be DoRA, as in the trainer."""
    family = load(folder)
    parts = {family.denoiser_name: adapt(family.denoiser, targets or family.lora_modules(configs_of(family)), **kind)}
    if encoders:
        kind.pop("use_dora", None)
        for name in family.trainable_text_encoders:
            parts[name] = adapt(getattr(family.pipeline, name), lora.TEXT_ENCODER_TARGETS, **kind)
    return family, parts


def save(family, parts, folder):
    """All files of a result; the one for other programs."""
    lora.save_lora(family.pipeline_class, folder, parts)
    return lora.save_for_other_programs(family.lora_layout, folder, parts, NAME)


@torch.no_grad()
def image(family):
    """float32 in [0, 1], (H, W, 3)."""
    prompt = 207 if family.class_conditional else "a cat"
    call = family.call_arguments(prompt, 32, 32) | {"num_inference_steps": 2, "output_type": "np"}
    return family.images_of(family.pipeline(**call, generator=torch.Generator().manual_seed(0)))[0]


def assert_same_image(first, second, base):
    assert np.abs(first - base).max() > 100 * ROUNDING
    np.testing.assert_allclose(first, second, rtol=0, atol=ROUNDING)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merged(model):
    """Every weight with its adapter in it, by peft, which changes the model."""
    for layer in layers(model).values():
        layer.merge()
    return {name: layer.base_layer.weight for name, layer in layers(model).items()}


def changed(weight, tensors, key):
    """A weight with the adapter of that key in it, as ComfyUI and sd-scripts do it."""
    down, up, alpha = (tensors[f"{key}.{kind}"] for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
    return weight + alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def keys(tensors):
    return {key.split(".")[0] for key in tensors}


# --- what diffusers and peft read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FIXTURES)
def test_the_trained_image_comes_back(name, kind, request, tmp_path):
    """Out of a folder that has the file for other programs too, by the lines that the model card gives."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    fresh = load(folder)
    base = image(fresh)
    family, parts = trained(folder, encoders=name in WITH_ENCODERS, **KINDS[kind])
    save(family, parts, tmp_path)
    if lora.in_one_file(family.pipeline_class):
        fresh.pipeline.load_lora_weights(tmp_path)
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["transformer_lora"]
        fresh.pipeline.transformer = PeftModel.from_pretrained(fresh.denoiser, tmp_path / "transformer_lora")
    assert_same_image(image(fresh), image(family), base)
    scales = [scale for layer in layers(fresh.denoiser).values() for scale in layer.scaling.values()]
    assert scales == pytest.approx([SCALE[kind]] * len(scales))
    if kind == "all-linear":
        assert {type(layer.base_layer) for layer in layers(family.denoiser).values()} == {torch.nn.Linear}
        others = [m for m in family.denoiser.modules() if isinstance(m, torch.nn.Linear)]
        own = [m for layer in layers(family.denoiser).values() for m in layer.modules()]
        assert all(any(module is mine for mine in own) for module in others)


@pytest.mark.parametrize("kind", ["plain", "rank-stabilised"])
@pytest.mark.parametrize(
    "name, encoders, targets",
    [
        ("sd", False, None),
        ("sd", True, None),
        ("sdxl", True, None),
        ("flux", True, FLUX_DOUBLE_BLOCK),
        ("flux2_klein", False, None),
        ("qwen_image", False, None),
        ("z_image", False, None),
    ],
)
def test_diffusers_reads_kohyas_layout(name, encoders, targets, kind, request, tmp_path):
    """But for DoRA's scale, which it leaves out, SD3, and Flux' single blocks at any width but 3072."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    fresh = load(folder)
    base = image(fresh)
    family, parts = trained(folder, encoders, targets, **KINDS[kind])
    path = save(family, parts, tmp_path)
    assert path == tmp_path / f"{NAME}_comfyui.safetensors"
    fresh.pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    for part, model in parts.items():
        assert layers(getattr(fresh.pipeline, part)).keys() == layers(model).keys()
    assert_same_image(image(fresh), image(family), base)


def test_text_encoders_keep_the_names_that_older_transformers_have(sd_pipeline, tmp_path):
    """ComfyUI and transformers 4 look for `text_model`; files from before that, too, are read."""
    family, parts = trained(sd_pipeline, encoders=True)
    save(family, parts, tmp_path)
    tensors = load_file(tmp_path / lora.FILE)
    inside = {key for key in tensors if key.startswith("text_encoder.")}
    assert inside and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in inside)
    (tmp_path / "before").mkdir()
    save_file(
        {key.replace("text_model.", ""): value for key, value in tensors.items()}, tmp_path / "before" / lora.FILE
    )
    for place in (tmp_path, tmp_path / "before"):
        _, others = trained(sd_pipeline, encoders=True)
        for name, parameter in [entry for part in others.values() for entry in part.named_parameters()]:
            if "lora_" in name:
                parameter.data.zero_()
        lora.load_lora(family.pipeline_class, place, others)
        for name, part in parts.items():
            assert all(torch.equal(value, others[name].state_dict()[key]) for key, value in part.state_dict().items())


# --- what other programs read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_a_file_for_other_programs_or_none_that_they_read(family, tmp_path):
    path = lora.save_for_other_programs(family.lora_layout, tmp_path, {}, NAME)
    assert (path is None) == (family.name in WITHOUT_OTHERS) and list(tmp_path.iterdir()) == [path] * (
        path is not None
    )


@torch.no_grad()
def assert_read(model, tensors, start, adapted):
    """Every module of an untouched model, found by its name with "_" for ".", gets what peft makes of the adapted."""
    names = {start + name.replace(".", "_"): name for name, _ in model.named_modules()}
    found = {names[key]: key for key in keys(tensors) if key.startswith(start)}
    expected = merged(adapted)
    assert found.keys() == expected.keys()
    for name, key in found.items():
        torch.testing.assert_close(changed(model.get_submodule(name).weight, tensors, key), expected[name])


def test_no_file_of_dora_is_written_for_others(sd_pipeline, tmp_path):
    """None would be exact in all of them."""
    family, parts = trained(sd_pipeline, encoders=True, use_dora=True)
    assert save(family, parts, tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [lora.FILE]


@pytest.mark.parametrize("kind", FOR_OTHERS)
def test_a_reader_that_knows_names_alone_gets_what_was_trained(kind, sd_pipeline, tmp_path):
    """In float32, with an alpha that gives the scale without further knowledge."""
    targets = ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "conv", "time_emb_proj"]
    family, parts = trained(sd_pipeline, **{"targets": targets} | KINDS[kind])
    path = save(family, parts, tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() is None
    tensors = load_file(path)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert all(tensors[f"{key}.alpha"] == pytest.approx(RANK * SCALE[kind]) for key in keys(tensors))
    assert_read(load(sd_pipeline).denoiser, tensors, "lora_unet_", parts["unet"])


@pytest.mark.parametrize(
    "name, starts",
    [
        ("sd", {"text_encoder": "lora_te_text_model_"}),
        ("sdxl", {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}),
        ("sd3", {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}),
        ("flux", {"text_encoder": "lora_te1_text_model_"}),
    ],
)
def test_a_reader_of_text_encoders_gets_what_was_trained(name, starts, request, tmp_path):
    """By the names that transformers 4 has; in version 5 some lack their start."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    family, parts = trained(folder, encoders=True)
    tensors = load_file(save(family, parts, tmp_path))
    assert {key for key in keys(tensors) if key.startswith(tuple(starts.values()))} == {
        key for key in keys(tensors) if not key.startswith("lora_unet_")
    }
    fresh = load(folder)
    for part, start in starts.items():
        assert_read(getattr(fresh.pipeline, part), tensors, start, parts[part])


@pytest.mark.parametrize("kind", FOR_OTHERS)
@pytest.mark.parametrize(
    "name, targets, original, stacked",
    [
        ("sd3", None, "joint_blocks_1_context_block_attn_qkv", "transformer_blocks.1.attn.add_{}_proj"),
        ("sd3", ["attn.to_q", "attn.to_v"], "joint_blocks_0_x_block_attn_qkv", "transformer_blocks.0.attn.to_{}"),
        ("flux", None, "double_blocks_0_txt_attn_qkv", "transformer_blocks.0.attn.add_{}_proj"),
        ("flux", None, "single_blocks_0_linear1", "single_transformer_blocks.0.attn.to_{}"),
    ],
)
def test_weights_that_the_original_has_in_one(name, targets, original, stacked, kind, request, tmp_path):
    """Queries, keys and values, some without an adapter."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    family, parts = trained(folder, **{"targets": targets} | KINDS[kind])
    tensors = load_file(save(family, parts, tmp_path))
    names = [stacked.format(part) for part in "qkv"]
    if name == "flux" and "single" in stacked:
        names.append("single_transformer_blocks.0.proj_mlp")
    before, after = load(folder).denoiser, merged(parts["transformer"])
    whole = torch.cat([before.get_submodule(layer).weight for layer in names])
    expected = torch.cat([after.get(layer, before.get_submodule(layer).weight) for layer in names])
    assert (expected != whole).any()
    torch.testing.assert_close(changed(whole, tensors, f"lora_unet_{original}"), expected)
