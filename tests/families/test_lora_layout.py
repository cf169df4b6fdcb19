"""Names of layers in the original models, as the converters of diffusers and shared LoRA files have them."""

from functools import partial

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_krea2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file
from tiny import seeded, tiny_krea2_transformer
from tiny_families import load
from torch import nn

from lpl.autoencoders import skeleton
from lpl.families.chroma import Chroma
from lpl.families.ernie_image import ErnieImage
from lpl.families.flux import Flux
from lpl.families.flux2 import Flux2
from lpl.families.krea2 import Krea2
from lpl.families.lora_files import read_lora
from lpl.families.sd3 import StableDiffusion3
from lpl.families.sdxl import StableDiffusionXL
from lpl.families.wan import Wan
from lpl.families.z_image import ZImage
from lpl.training import lora
from tests.training.test_lora import ALPHA, NAME, RANK, adapt, keys, layers, trained


def vector(size):
    return torch.arange(1.0, 1 + size).sin()


class OriginalCheckpoint(dict):
    """What the adapters of a file do to a vector, (out, 1), under the original's names; zeros where there is none.

    As in ComfyUI and sd-scripts, the original's name says where in the file to look; `read` is what was found there.
    """

    def __init__(self, tensors, *blocks):
        super().__init__(dict.fromkeys(blocks))  # the converters count them
        self.tensors, self.read = tensors, set()

    def pop(self, name):
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if key not in keys(self.tensors) or not name.endswith(".weight"):
            return torch.zeros(7 * 3072, 1) if "linear1" in name else torch.zeros(12, 1)
        self.read.add(key)
        down, up, alpha = (self.tensors[f"{key}.{kind}"] for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
        return (alpha / len(down) * (up.flatten(1) @ (down.flatten(1) @ vector(down[0].numel()))))[:, None]

    __missing__ = pop


def tiny_sd3_transformer():
    """As in SD 3.5 medium, some blocks attend twice."""
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def at_full_width(kind, **numbers):
    """As wide as the real one, the only width that diffusers' converter knows; all weights are one and the same 0."""
    with torch.device("meta"):
        model = kind(num_layers=1, num_single_layers=1, joint_attention_dim=32, **numbers)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(()).expand(module.weight.shape))
    return model


def tiny_flux2_transformer():
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
    )


def tiny_z_image_transformer():
    return ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6]
    )


def tiny_wan_transformer():
    return WanTransformer3DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=16
    )


WAN = [  # the weights of the original
    *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"),
    *(f"blocks.0.{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo"),
    *("blocks.0.ffn.0", "blocks.0.ffn.2", "head.head"),
]


Z_IMAGE = [  # the weights of the original
    *("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"),
    *("final_layer.linear", "final_layer.adaLN_modulation.1", "layers.0.adaLN_modulation.0"),
    "noise_refiner.0.adaLN_modulation.0",
    *(
        f"{block}.0.{layer}"
        for block in ("layers", "noise_refiner", "context_refiner")
        for layer in ("attention.qkv", "attention.out", *(f"feed_forward.w{number}" for number in (1, 2, 3)))
    ),
]
FLUX2 = [  # the weights of the original: its converter goes through them
    *("img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "guidance_in.in_layer", "guidance_in.out_layer"),
    *(f"double_stream_modulation_{side}.lin" for side in ("img", "txt")),
    *("single_stream_modulation.lin", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    *(f"double_blocks.0.{side}_attn.{layer}" for side in ("img", "txt") for layer in ("qkv", "proj")),
    *(f"double_blocks.0.{side}_mlp.{layer}" for side in ("img", "txt") for layer in (0, 2)),
    *("single_blocks.0.linear1", "single_blocks.0.linear2"),
]
KREA2 = [  # the weights of the original
    *("first", "tmlp.0", "tmlp.2", "tproj.1", "txtmlp.1", "txtmlp.3", "txtfusion.projector", "last.linear"),
    *(
        f"{block}.0.{layer}"
        for block in ("blocks", "txtfusion.layerwise_blocks", "txtfusion.refiner_blocks")
        for layer in (*(f"attn.{end}" for end in ("wq", "wk", "wv", "wo", "gate")), "mlp.gate", "mlp.up", "mlp.down")
    ),
]


@pytest.mark.parametrize(
    "family, build, convert, blocks",
    [
        (
            StableDiffusion3,
            tiny_sd3_transformer,
            convert_sd3_transformer_checkpoint_to_diffusers,
            ["joint_blocks.1.x_block", "joint_blocks.0.attn2.x"],
        ),
        (
            Flux,
            partial(at_full_width, FluxTransformer2DModel, pooled_projection_dim=16, guidance_embeds=True),
            convert_flux_transformer_checkpoint_to_diffusers,
            ["double_blocks.0.x", "single_blocks.0.x", "guidance_in.x"],
        ),
        (
            Flux2,
            tiny_flux2_transformer,
            convert_flux2_transformer_checkpoint_to_diffusers,
            [f"{name}.weight" for name in FLUX2],
        ),
        (
            Chroma,
            partial(at_full_width, ChromaTransformer2DModel, approximator_hidden_dim=16, approximator_layers=2),
            convert_chroma_transformer_checkpoint_to_diffusers,
            ["double_blocks.0.x", "single_blocks.0.x", "distilled_guidance_layer.layers.1.x"],
        ),
        (
            ZImage,
            tiny_z_image_transformer,
            convert_z_image_transformer_checkpoint_to_diffusers,
            [f"{name}.weight" for name in Z_IMAGE],
        ),
        (Wan, tiny_wan_transformer, convert_wan_transformer_to_diffusers, [f"{name}.weight" for name in WAN]),
        (
            Krea2,
            tiny_krea2_transformer,
            convert_krea2_transformer_checkpoint_to_diffusers,
            [f"{name}.weight" for name in KREA2],
        ),
    ],
    ids=["sd3", "flux", "flux2", "chroma", "z-image", "wan", "krea-2"],
)
def test_every_layer_of_a_transformer_is_found_under_its_original_name(family, build, convert, blocks, tmp_path):
    with seeded(0):
        model = build()
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    adapt(model, targets)
    path = lora.save_for_other_programs(family.lora_layout, tmp_path, {"transformer": model}, NAME)
    checkpoint = OriginalCheckpoint(load_file(path), *blocks)
    converted = convert(checkpoint)
    assert checkpoint.read == keys(checkpoint.tensors)
    assert layers(model).keys() == set(targets)
    for name, layer in layers(model).items():
        down, up = (factor["default"].weight.flatten(1) for factor in (layer.lora_A, layer.lora_B))
        expected = ALPHA / RANK * (up @ (down @ vector(down.shape[1])))
        torch.testing.assert_close(converted[f"{name}.weight"].flatten(), expected, atol=1e-3, rtol=1e-4)


@pytest.fixture
def sdxl_unet():
    """Small, with the blocks that SDXL has."""
    with seeded(0):
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8, 8),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        )


def test_every_layer_of_sdxls_unet_is_found_under_its_original_name(sdxl_unet, tmp_path):
    config = dict(sdxl_unet.config)
    targets = [name for name, module in sdxl_unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    adapt(sdxl_unet, targets)
    path = lora.save_for_other_programs(StableDiffusionXL.lora_layout, tmp_path, {"unet": sdxl_unet}, NAME)
    fresh = UNet2DConditionModel.from_config(config)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=fresh.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, fresh)
    read = layers(fresh)
    assert read.keys() == layers(sdxl_unet).keys() == set(targets)
    for name, layer in layers(sdxl_unet).items():
        torch.testing.assert_close(read[name].get_delta_weight("default_0"), layer.get_delta_weight("default"))


def test_names_in_sdxls_files_as_they_are_shared(sdxl_unet, tmp_path):
    """Some that LoRA files of sd-scripts have."""
    adapt(sdxl_unet, ["to_q", "conv1", "conv", "time_emb_proj", "conv_shortcut"])
    tensors = load_file(
        lora.save_for_other_programs(StableDiffusionXL.lora_layout, tmp_path, {"unet": sdxl_unet}, NAME)
    )
    attention = "transformer_blocks.0.attn1.to_q", "transformer_blocks_0_attn1_to_q"
    expected = {
        f"down_blocks.1.attentions.0.{attention[0]}": f"input_blocks_4_1_{attention[1]}",
        f"down_blocks.2.attentions.1.{attention[0]}": f"input_blocks_8_1_{attention[1]}",
        f"mid_block.attentions.0.{attention[0]}": f"middle_block_1_{attention[1]}",
        f"up_blocks.0.attentions.2.{attention[0]}": f"output_blocks_2_1_{attention[1]}",
        f"up_blocks.1.attentions.0.{attention[0]}": f"output_blocks_3_1_{attention[1]}",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    }
    for name, original in expected.items():
        up = tensors[f"lora_unet_{original}.lora_up.weight"]
        assert torch.equal(up, sdxl_unet.get_submodule(name).lora_B["default"].weight)


def test_a_layout_of_our_own_names_keeps_the_order_of_the_rows(qwen_image_pipeline, tmp_path):
    """Only originals that are named otherwise have scale and shift the other way round."""
    family, parts = trained(qwen_image_pipeline, targets=["norm_out.linear"])
    path = lora.save_for_other_programs(family.lora_layout, tmp_path, parts, NAME)
    layer = parts["transformer"].get_submodule("norm_out.linear")
    up = layer.lora_B["default"].weight
    assert torch.equal(load_file(path)["lora_unet_norm_out_linear.lora_up.weight"], up)
    meta = {"transformer": skeleton(dict(load(qwen_image_pipeline).denoiser.config))}
    read = read_lora("lora_init", str(path), type(family), meta)["transformer"]
    assert torch.equal(read.layers["norm_out.linear"].up, up)


@pytest.mark.parametrize("name, family", [("krea2", Krea2), ("ernie_image", ErnieImage)], ids=lambda value: str(value))
def test_names_that_diffusers_knows_in_the_files_of_other_programs(name, family, request):
    """Their LoRA have the original's names behind ``diffusion_model.``; ours have "_" for "." in them."""
    transformer = load(request.getfixturevalue(f"{name}_pipeline")).denoiser
    targets = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    originals = family.lora_layout.originals(transformer, targets)
    ends = "lora_A.weight", "lora_B.weight"
    state = {f"diffusion_model.{original}.{end}": torch.ones(1, 1) for original in originals for end in ends}
    read = family.pipeline_class.lora_state_dict(state)
    assert read.keys() == {f"transformer.{target}.{end}" for target in targets for end in ends}
