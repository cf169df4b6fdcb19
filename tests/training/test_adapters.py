"""LoHa, LoKr and OFT: peft reads every one of them, other programs LoHa and LoKr, and patterns reach the files."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import seeded
from tiny_families import load

from lpl.config.groups import Lora
from lpl.training import lora
from tests.training.test_lora import FIXTURES, NAME, assert_same_image, changed, image, merged


RANK, ALPHA = 2, 5.0
KINDS = {
    "loha": {"adapter": "loha"},
    "lokr": {"adapter": "lokr"},
    "lokr of factors": {"adapter": "lokr", "decompose_both": True, "decompose_factor": 4, "rank": 1},
    "lokr, whole": {"adapter": "lokr", "rank": 64},
    "oft": {"adapter": "oft", "oft_block_size": 4, "rank": None, "lora_alpha": None},
    "patterns": {"lora_rank_pattern": ("to_q=3", "1.*to_k=5"), "lora_alpha_pattern": ("to_q=1.5", "to_v=0.5")},
    "loha, patterns": {"adapter": "loha", "lora_rank_pattern": ("to_q=3",), "lora_alpha_pattern": ("to_v=0.5",)},
}
READ = ["loha", "lokr", "lokr of factors", "lokr, whole", "loha, patterns"]  # by other programs
CONVOLUTIONS = ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "conv", "time_emb_proj"]


def trained(folder, kind, targets=None):
    """(family, its denoiser with an adapter that changes something)."""
    family = load(folder)
    flags = Lora(**{"lora": True, "rank": RANK, "lora_alpha": ALPHA} | KINDS[kind])
    lora.add_lora(family.denoiser, targets or family.lora_targets, flags, denoiser=True)
    with seeded(1), torch.no_grad():
        for parameter in family.denoiser.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return family, family.denoiser.eval()


def save(family, folder):
    parts = {family.denoiser_name: family.denoiser}
    lora.save_lora(family.pipeline_class, folder, parts)
    return lora.save_for_other_programs(family.lora_layout, folder, parts, NAME)


def delta(weight, tensors, key):
    """What ComfyUI adds to a weight for the adapter of that key."""
    own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{key}.")}
    if "hada_w1_a" in own:
        first, second = own["hada_w1_a"] @ own["hada_w1_b"], own["hada_w2_a"] @ own["hada_w2_b"]
        return own["alpha"] / len(own["hada_w1_b"]) * (first * second).reshape(weight.shape)
    rank, factors = None, []
    for number in "12":
        if f"lokr_w{number}" in own:
            factors.append(own[f"lokr_w{number}"])
        else:
            rank = len(own[f"lokr_w{number}_b"])
            factors.append(own[f"lokr_w{number}_a"] @ own[f"lokr_w{number}_b"])
    if factors[1].ndim == 4:
        factors[0] = factors[0][:, :, None, None]
    return (1.0 if rank is None else own["alpha"] / rank) * torch.kron(*factors).reshape(weight.shape)


@pytest.mark.parametrize(
    "name, kind",
    [*(("sd", kind) for kind in KINDS), *((n, k) for n in FIXTURES for k in ("lokr", "oft") if n != "sd")],
)
def test_the_trained_image_comes_back(name, kind, request, tmp_path):
    """By the lines that the model card gives: out of one folder in peft's format, or diffusers' file for LoRA."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    fresh = load(folder)
    base = image(fresh)
    family, denoiser = trained(folder, kind)
    save(family, tmp_path)
    part = family.denoiser_name
    if kind == "patterns":
        fresh.pipeline.load_lora_weights(tmp_path, weight_name=lora.FILE)
    else:
        assert {path.name for path in tmp_path.iterdir()} <= {f"{part}_lora", f"{NAME}_comfyui.safetensors"}
        setattr(fresh.pipeline, part, PeftModel.from_pretrained(fresh.denoiser, tmp_path, subfolder=f"{part}_lora"))
    assert_same_image(image(fresh), image(family), base)
    assert all(value.dtype == torch.float32 for value in denoiser.parameters() if value.requires_grad)


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name, start", [("sd", "lora_unet_"), ("sd3", "lycoris_"), ("flux", "lycoris_")])
def test_other_programs_get_what_was_trained(name, start, kind, request, tmp_path):
    """Found by the names of the layers with "_" for "."; the scale follows from the file alone."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    family, denoiser = trained(folder, kind, CONVOLUTIONS if name == "sd" else None)
    tensors = load_file(save(family, tmp_path))
    found = {key.partition(".")[0] for key in tensors}
    fresh = load(folder).denoiser
    with torch.no_grad():
        expected = weights_of(denoiser)
    assert found == {start + layer.replace(".", "_") for layer in expected} and expected
    for layer, weight in expected.items():
        before = fresh.get_submodule(layer).weight
        torch.testing.assert_close(before + delta(before, tensors, start + layer.replace(".", "_")), weight)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr, whole", "loha, patterns", "patterns"])
def test_layers_that_lycoris_makes_of_the_file_answer_alike(kind, sd_pipeline, tmp_path):
    """Its layers, not its merge, which in 4.1.3 scales LoHa and LoKr twice."""
    modules = pytest.importorskip("lycoris.modules")
    family, denoiser = trained(sd_pipeline, kind, CONVOLUTIONS)
    tensors, fresh = load_file(save(family, tmp_path)), load(sd_pipeline).denoiser
    for layer in layers_of(denoiser):
        name, place, ours = (
            f"lora_unet_{layer.replace('.', '_')}",
            fresh.get_submodule(layer),
            denoiser.get_submodule(layer),
        )
        found, factors = modules.get_module(tensors, name)
        sizes = (2, place.weight.shape[1], *[8] * (place.weight.ndim - 2))
        inputs = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            modules.make_module(found, factors, name, place).apply_to()
            torch.testing.assert_close(place(inputs), ours(inputs), rtol=1e-4, atol=1e-5, msg=layer)


def layers_of(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


def weights_of(model):
    """Every weight with its adapter in it, by peft, which changes the model."""
    layers = layers_of(model)
    for layer in layers.values():
        layer.merge()
    return {name: layer.base_layer.weight for name, layer in layers.items()}


def test_layers_of_sdxl_have_the_names_of_the_original(sdxl_pipeline, tmp_path):
    family, _ = trained(sdxl_pipeline, "loha")
    keys = {key.partition(".")[0] for key in load_file(save(family, tmp_path))}
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q" in keys


@pytest.mark.parametrize("name, kind", [("sd", "oft"), ("flux", "oft"), ("sana", "lokr"), ("dit", "loha")])
def test_there_is_no_file_that_nobody_reads(name, kind, request, tmp_path):
    assert save(trained(request.getfixturevalue(f"{name}_pipeline"), kind)[0], tmp_path) is None


def test_where_the_original_has_several_layers_in_one_there_is_no_file(sd3_pipeline, tmp_path):
    """Unless the programs know diffusers' own names."""
    family, denoiser = trained(sd3_pipeline, "lokr")
    layout = family.lora_layout._replace(own_prefix=None)
    assert lora.save_for_other_programs(layout, tmp_path, {"transformer": denoiser}, NAME) is None


@pytest.mark.parametrize("original", ["joint_blocks_0_x_block_attn_qkv"])
def test_stacked_layers_keep_the_scale_of_each(original, sd3_pipeline, tmp_path):
    family, denoiser = trained(sd3_pipeline, "patterns")
    tensors, fresh = load_file(save(family, tmp_path)), load(sd3_pipeline).denoiser
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    whole = torch.cat([fresh.get_submodule(name).weight for name in names])
    after = merged(denoiser)
    expected = torch.cat([after[name] for name in names])
    torch.testing.assert_close(changed(whole, tensors, f"lora_unet_{original}"), expected)


@pytest.mark.parametrize("init", ["gaussian", "default", "orthogonal"])
def test_no_first_weights_change_the_image(init, sd_pipeline):
    family = load(sd_pipeline)
    base = image(family)
    flags = Lora(lora=True, rank=RANK, lora_alpha=ALPHA, init_lora_weights=init)
    lora.add_lora(family.denoiser, family.lora_targets, flags, denoiser=True)
    assert abs(image(family) - base).max() < 1e-5
    first = next(value for name, value in family.denoiser.named_parameters() if ".lora_A." in name)
    assert first.abs().max() > 0


def test_patterns_are_of_the_denoiser(sd_pipeline):
    family = load(sd_pipeline)
    flags = Lora(lora=True, rank=RANK, lora_alpha=ALPHA, lora_rank_pattern=("q_proj=7", "to_q=7"))
    lora.add_lora(family.denoiser, family.lora_targets, flags, denoiser=True)
    encoder = family.text_encoders[0]
    lora.add_lora(encoder, lora.TEXT_ENCODER_TARGETS, flags)
    assert ranks_of(family.denoiser) == {2, 7} and ranks_of(encoder) == {2}


def ranks_of(model):
    return {rank for layer in layers_of(model).values() for rank in layer.r.values()}
