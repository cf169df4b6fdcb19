"""Single files of whole models: diffusers' converters, which turn originals into its own, give back what was written.

They also hold the names: they take all of a transformer's weights out of the file. Those that they would pass on
unchanged, and those of the original UNets, autoencoders and text encoders are listed here as the published files have
them.
"""

import json
import re
import shutil

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_lumina2_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import seeded, tiny_vae
from transformers import CLIPTextModelWithProjection

from lpl.families import chroma, flux, lumina2, sd3
from lpl.families import sd as stable_diffusion
from lpl.families.flux import Flux
from lpl.families.sd3 import StableDiffusion3
from lpl.families.sdxl import unet_state
from lpl.families.single_file import autoencoder
from lpl.publishing.export import export, main
from tests.families.test_lora_layout import FLUX2, KREA2, Z_IMAGE, tiny_sd3_transformer


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def read(pipeline_class, path, folder, **components):
    return pipeline_class.from_single_file(str(path), config=str(folder), local_files_only=True, **components)


def states(pipeline):
    return {name: part.state_dict() for name, part in pipeline.components.items() if hasattr(part, "state_dict")}


def assert_read_again(path, folder):
    before = DiffusionPipeline.from_pretrained(folder)
    after = states(read(type(before), path, folder))
    assert all(same(state, after[name]) for name, state in states(before).items())


@pytest.fixture(scope="module")
def sdxl_folder(sdxl_pipeline, tmp_path_factory):
    """diffusers tells the text encoders apart by their widths, and splits OpenCLIP's weights by its projection's."""
    folder = shutil.copytree(sdxl_pipeline, tmp_path_factory.mktemp("sdxl") / "sdxl")
    encoder, unet = (json.loads((folder / f"{name}/config.json").read_text()) for name in ("text_encoder_2", "unet"))
    kind = CLIPTextModelWithProjection.config_class
    with seeded(5):
        encoder |= {"hidden_size": 24, "projection_dim": 24}
        CLIPTextModelWithProjection(kind(**encoder)).save_pretrained(folder / "text_encoder_2")
        unet["cross_attention_dim"] = 16 + 24
        UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    return folder


# --- whole pipelines -------------------------------------------------------------------------------------------------


def test_stable_diffusion_1(sd_pipeline, tmp_path):
    path = export(sd_pipeline, output=tmp_path / "sd.safetensors")
    assert_read_again(path, sd_pipeline)
    names = {name.rpartition(".")[0] for name in load_file(path)}
    assert {
        "model.diffusion_model.time_embed.0",
        "model.diffusion_model.input_blocks.0.0",
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k",
        "model.diffusion_model.middle_block.1.proj_in",
        "model.diffusion_model.out.0",
        "first_stage_model.quant_conv",
        "first_stage_model.encoder.down.0.downsample.conv",
        "first_stage_model.decoder.up.2.upsample.conv",
        "first_stage_model.decoder.mid.attn_1.proj_out",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    } <= names


def test_stable_diffusion_2(sd_v_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "WIDTH_OF_SECOND", 16)
    with pytest.warns(UserWarning, match="predicts v"):
        path = export(sd_v_pipeline, output=tmp_path / "sd2.safetensors")
    assert_read_again(path, sd_v_pipeline)
    start = "cond_stage_model.model."
    names = {name.removeprefix(start) for name in load_file(path) if name.startswith("cond_stage_model")}
    assert {"token_embedding.weight", "positional_embedding", "ln_final.bias"} <= names
    layer = {name.removeprefix("transformer.resblocks.1.") for name in names if "resblocks.1." in name}
    ends = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj")
    assert layer == {"attn.in_proj_weight", "attn.in_proj_bias"} | {
        f"{end}.{kind}" for end in ends for kind in ("weight", "bias")
    }


def test_stable_diffusion_xl(sdxl_folder, tmp_path):
    path = export(sdxl_folder, output=tmp_path / "xl.safetensors")
    assert_read_again(path, sdxl_folder)
    names = load_file(path)
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in names
    assert "conditioner.embedders.1.model.text_projection" in names
    assert "model.diffusion_model.label_emb.0.2.weight" in names and "v_pred" not in names
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base" and about["modelspec.title"] == "xl"


def test_a_file_without_the_prefix_of_transformers_4(sdxl_folder, tmp_path):
    """Text encoders that transformers 5 wrote anew lack it, and the original needs it."""
    folder = shutil.copytree(sdxl_folder, tmp_path / "new")
    weights = folder / "text_encoder/model.safetensors"
    bare = {name.removeprefix("text_model."): tensor for name, tensor in load_file(weights).items()}
    save_file({f"text_model.{name}": tensor for name, tensor in bare.items()}, tmp_path / "old.safetensors")
    save_file(bare, weights)
    new = load_file(export(folder, output=tmp_path / "new.safetensors"))
    shutil.copyfile(tmp_path / "old.safetensors", weights)
    assert same(new, load_file(export(folder, output=tmp_path / "old_names.safetensors")))


def test_sdxl_is_marked_where_it_predicts_v(sdxl_v_pipeline, tmp_path):
    """As ComfyUI's SDXL.model_type looks for it."""
    folder = shutil.copytree(sdxl_v_pipeline, tmp_path / "xl")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    names = load_file(export(folder))
    assert names["v_pred"].numel() == names["ztsnr"].numel() == 0


def test_stable_diffusion_3(sd3_pipeline, tmp_path):
    """Transformer and VAE, as in the file of 3.5 large."""
    path = export(sd3_pipeline, output=tmp_path / "sd3.safetensors")
    before = DiffusionPipeline.from_pretrained(sd3_pipeline)
    others = {name: part for name, part in before.components.items() if name.startswith("text_encoder")}
    after = read(type(before), path, sd3_pipeline, **others)
    assert same(before.transformer.state_dict(), after.transformer.state_dict())
    assert same(before.vae.state_dict(), after.vae.state_dict())
    assert {name.split(".")[0] for name in load_file(path)} == {"model", "first_stage_model"}


NORMS = [f"{norm}_norm.scale" for norm in ("query", "key")]
OTHERS = {  # weights of the originals beside those of the linear layers
    "flux2": [*(f"double_blocks.0.{side}_attn.norm.{norm}" for side in ("img", "txt") for norm in NORMS)]
    + [f"single_blocks.0.norm.{norm}" for norm in NORMS],
    "z_image": [
        *("x_pad_token", "cap_pad_token", "cap_embedder.0.weight"),
        *(
            f"{block}.0.{norm}.weight"
            for block in ("layers", "noise_refiner", "context_refiner")
            for norm in ("attention.q_norm", "attention.k_norm", "attention_norm1", "attention_norm2", "ffn_norm1")
            + ("ffn_norm2",)
        ),
    ],
    "krea2": [
        *("txtmlp.0.scale", "last.norm.scale", "last.modulation.lin", "blocks.0.mod.lin"),
        *(
            f"{block}.0.{norm}.scale"
            for block in ("blocks", "txtfusion.layerwise_blocks", "txtfusion.refiner_blocks")
            for norm in ("attn.qknorm.qnorm", "attn.qknorm.knorm", "prenorm", "postnorm")
        ),
    ],
}
KLEIN = [name for name in FLUX2 if not name.startswith("guidance_in")]


@pytest.mark.parametrize(
    "name, linear, others",
    [
        ("flux2", FLUX2, OTHERS["flux2"]),
        ("flux2_klein", KLEIN, OTHERS["flux2"]),
        ("z_image", Z_IMAGE, OTHERS["z_image"]),
        ("krea2", KREA2, OTHERS["krea2"]),
        ("aura_flow", None, ()),
        ("qwen_image", None, ()),
        ("ernie_image", None, ()),
    ],
)
def test_transformers_alone(name, linear, others, request, tmp_path):
    """What the file has is the transformer, which diffusers reads again; blocks are those of the first number."""
    folder = request.getfixturevalue(f"{name}_pipeline")
    path = export(folder, output=tmp_path / "x.safetensors")
    before = DiffusionPipeline.from_pretrained(folder).transformer
    after = type(before).from_single_file(
        str(path), config=str(folder), subfolder="transformer", local_files_only=True
    )
    assert same(before.state_dict(), after.state_dict())
    if linear is not None:
        names = {re.sub(r"^(\w+)\.\d+\.(?=.*\.)", r"\1.0.", name) for name in load_file(path)}
        biases = {f"{name}.bias" for name in linear} & names
        assert names == {f"{name}.weight" for name in linear} | biases | set(others)


def test_what_keeps_its_name(aura_flow_pipeline, qwen_image_pipeline, ernie_image_pipeline, tmp_path):
    """Of AuraFlow the tokens outside all layers; of Qwen-Image and ERNIE-Image all."""
    for folder, kept in ((aura_flow_pipeline, 1), (qwen_image_pipeline, None), (ernie_image_pipeline, None)):
        own = DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
        names = load_file(export(folder, output=tmp_path / f"{folder.name}.safetensors")).keys()
        assert len(names & own.keys()) == (kept or len(own))


@pytest.mark.parametrize("dtype, expected", [("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)])
def test_precision(dtype, expected, sd_pipeline, tmp_path):
    tensors = load_file(export(sd_pipeline, dtype, tmp_path / "sd.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    name = "model.diffusion_model.out.2.weight"
    weights = load_file(sd_pipeline / "unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(tensors[name], weights["conv_out.weight"].to(expected))


def test_a_number_that_the_precision_cannot_hold_is_refused(sd_pipeline, tmp_path):
    folder = shutil.copytree(sd_pipeline, tmp_path / "sd")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.weight"][0, 0] = 1e5
    save_file(state, weights)
    with pytest.raises(ValueError, match="the unet cannot be written: conv_out.weight has numbers that fp16 cannot"):
        export(folder, "fp16")
    assert not list(folder.glob("*.safetensors"))
    export(folder, "bf16")


def test_the_only_variant_is_taken(sd_pipeline, tmp_path):
    folder = shutil.copytree(sd_pipeline, tmp_path / "sd")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert same(load_file(export(folder)), load_file(export(sd_pipeline, output=tmp_path / "plain.safetensors")))
    shutil.copyfile(
        folder / "vae/diffusion_pytorch_model.fp16.safetensors",
        folder / "vae/diffusion_pytorch_model.ema.safetensors",
    )
    with pytest.raises(ValueError, match=r"the vae cannot be written: .*several variants \(ema, fp16\)"):
        export(folder)


# --- layouts of the real sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [(), (0,)], ids=["large", "medium"])
def test_transformers_of_sd3(dual):
    with seeded(0):
        model = tiny_sd3_transformer()
        model = SD3Transformer2DModel.from_config({**model.config, "dual_attention_layers": dual})
    original = sd3.transformer_state(model.config | {"_class_name": "SD3Transformer2DModel"}, model.state_dict())
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert not original  # all was taken: there is no name that the original does not have
    assert same(converted, model.state_dict())


@pytest.mark.parametrize(
    "kind, numbers, write, convert",
    [
        (
            FluxTransformer2DModel,
            {"num_single_layers": 1, "pooled_projection_dim": 16, "guidance_embeds": True},
            flux.transformer_state,
            convert_flux_transformer_checkpoint_to_diffusers,
        ),
        (
            ChromaTransformer2DModel,
            {"num_single_layers": 1, "approximator_layers": 2},
            chroma.transformer_state,
            convert_chroma_transformer_checkpoint_to_diffusers,
        ),
        (
            Lumina2Transformer2DModel,
            {"num_refiner_layers": 2},
            lumina2.transformer_state,
            convert_lumina2_to_diffusers,
        ),
    ],
    ids=["flux", "chroma", "lumina2"],
)
def test_transformers_as_wide_as_the_real_ones(kind, numbers, write, convert):
    """diffusers' converters know no other width."""
    with torch.device("meta"):
        model = kind(num_layers=1, **numbers)
    state = {
        name: torch.arange(1.0, 1 + len(tensor)).reshape(-1, *[1] * (tensor.ndim - 1)) * (1 + number)
        for number, (name, tensor) in enumerate(model.state_dict().items())
    }
    original = write({**model.config, "_class_name": kind.__name__}, dict(state))
    assert not set(original) & set(state) - SAME
    converted = convert(original)
    assert not original and same(converted, state)


SAME = {  # in the originals of Chroma and Lumina-Image 2
    *(f"distilled_guidance_layer.{end}_proj.{kind}" for end in ("in", "out") for kind in ("weight", "bias")),
    *("x_embedder.weight", "x_embedder.bias", "layers.0.ffn_norm1.weight", "layers.0.ffn_norm2.weight"),
    *(
        f"{side}_refiner.{block}.ffn_norm{norm}.weight"
        for side in ("noise", "context")
        for block in (0, 1)
        for norm in (1, 2)
    ),
}


SD15 = {
    "block_out_channels": (4, 8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "transformer_layers_per_block": 1,
}
SDXL = {
    "block_out_channels": (4, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


@pytest.mark.parametrize(
    "config, last_input, last_output, total",
    [(SD15, 11, 11, 686), (SDXL, 8, 8, 1680)],
    ids=["SD 1.5", "SDXL"],
)
def test_unets_with_the_blocks_of_the_real_ones(config, last_input, last_output, total):
    """The UNet of the original SD 1.5 has 686 weights, in 12 input and 12 output blocks; that of SDXL 1680 in 9."""
    with seeded(0):
        model = UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2, **config)
    settings = {**model.config, "_class_name": "UNet2DConditionModel"}
    original = unet_state(settings, model.state_dict())
    for side, last in (("input", last_input), ("output", last_output)):
        numbers = {int(name.split(".")[1]) for name in original if name.startswith(f"{side}_blocks.")}
        assert numbers == set(range(last + 1))
    assert len(original) == total
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    assert same(convert_ldm_unet_checkpoint(file, settings), model.state_dict())


def test_older_names_in_an_autoencoder():
    """The repository of Stable Diffusion 1.5 still has them."""
    vae = tiny_vae("sd")
    config = {**vae.config, "_class_name": "AutoencoderKL"}
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in vae.state_dict().items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    original = autoencoder(config, state)
    assert same(original, autoencoder(config, vae.state_dict()))
    assert original["decoder.mid.attn_1.q.weight"].ndim == 4
    file = {f"first_stage_model.{name}": tensor for name, tensor in original.items()}
    assert same(convert_ldm_vae_checkpoint(file, config), vae.state_dict())


# --- what cannot be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [("pixart_sigma", "pixart-sigma is not written"), ("dit", "of dit"), ("sana", "of sana")],
)
def test_families_without_such_a_file(name, words, request, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(request.getfixturevalue(f"{name}_pipeline"), output=tmp_path / "x.safetensors")


def test_another_vae_has_no_place(sd_pipeline, tmp_path):
    folder = shutil.copytree(sd_pipeline, tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    tiny_vae("asymmetric").save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="and this VAE is of the class AsymmetricAutoencoderKL"):
        export(folder)
    assert not list(folder.glob("*.safetensors"))


def test_layers_that_the_original_lacks(sd_pipeline, tmp_path):
    folder = shutil.copytree(sd_pipeline, tmp_path / "sd")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"class_embedding.linear_1.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="the unet cannot be written: the original has no layer like class_embedding"):
        export(folder)


def test_the_command_refuses_in_a_sentence(tmp_path, capsys):
    (tmp_path / "run_comfyui.safetensors").write_bytes(b"")
    for folder, words in (
        (tmp_path, "it is a LoRA, and run_comfyui.safetensors is its file"),
        (tmp_path / "no", "no"),
    ):
        with pytest.raises(SystemExit, match=words):
            main([str(folder)])


@pytest.mark.parametrize(
    "name, words",
    [
        ("sd/unet/diffusion_pytorch_model.safetensors", "this place belongs to what is in"),
        ("sd/unet/new.safetensors", "this place belongs to what is in"),
        ("sd/../sd/pytorch_lora_weights.safetensors", "this place belongs to what is in"),
        ("sd/model_index.json", "the file is a .safetensors file"),
        ("model", "the file is a .safetensors file"),
        ("sd", "this is a folder; give a file in it, such as"),
        ("taken/model.safetensors", "taken is no folder; give a folder that can be written to"),
    ],
)
def test_a_file_that_must_not_be_written_is_refused_first(name, words, sd_pipeline, tmp_path, monkeypatch):
    folder, target = shutil.copytree(sd_pipeline, tmp_path / "sd"), tmp_path / name
    (tmp_path / "taken").write_bytes(b"")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    monkeypatch.setattr("lpl.publishing.export.read_pipeline", lambda model: pytest.fail("too late"))
    with pytest.raises(SystemExit) as end:
        main([str(folder), "--output", str(target)])
    assert f"error: --output {target}: " in str(end.value) and words in str(end.value)


def test_an_earlier_file_is_replaced(sd_pipeline, tmp_path):
    folder = shutil.copytree(sd_pipeline, tmp_path / "sd")
    export(folder, output=folder / "own.safetensors")
    tensors = load_file(export(folder, "fp16", folder / "own.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_what_the_families_list():
    assert [part.name for part in StableDiffusion3.single_file({})] == ["transformer", "vae"]
    assert [part.prefix for part in Flux.single_file({})] == [""]
