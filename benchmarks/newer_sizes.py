"""The architectures of the newer models that recipes name: the numbers of their config.json.

They are counted (:mod:`benchmarks.counted`), and not measured on a GPU as those of :mod:`benchmarks.real_sizes` are.
"""

from __future__ import annotations

from dataclasses import replace

import diffusers
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline

from benchmarks.real_sizes import (
    CHECKPOINTING,
    MODELS,
    SDXL_VAE,
    STABLE_DIFFUSION_BETAS,
    TINY_KL_VAE,
    WITHOUT_QUANT_CONVS,
    Model,
    kl_vae,
)


FLUX_VAE = kl_vae(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024, **WITHOUT_QUANT_CONVS
)

FLUX2_KLEIN = Model(
    public="black-forest-labs/FLUX.2-klein-base-4B",
    pipeline=diffusers.Flux2KleinPipeline,
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    denoiser=(
        diffusers.Flux2Transformer2DModel,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    vae=(diffusers.AutoencoderKLFlux2, {}),  # the class's defaults are its numbers
    parameters=(3_875_544_576, 84_046_115),
    encoders=(("", "qwen3_lm", 2560, 0),),
    tiny=(
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 4, 4, 4),
            "joint_attention_dim": 48,
        },
        {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        ((16, 0),),
    ),
    resolution=(1024, 64),
    batch=1,
    kinds=("lora",),
    flags=CHECKPOINTING,
)

NEWER = {
    "z-image": Model(
        public="Tongyi-MAI/Z-Image",
        pipeline=diffusers.ZImagePipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        denoiser=(diffusers.ZImageTransformer2DModel, {}),  # the class's defaults are its numbers
        vae=(diffusers.AutoencoderKL, FLUX_VAE),
        parameters=(6_154_908_736, 83_819_683),
        encoders=(("", "qwen3", 2560, 0),),
        tiny=(
            {
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 16,
                "axes_dims": (4, 6, 6),
            },
            TINY_KL_VAE,
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "qwen-image": Model(
        public="Qwen/Qwen-Image",
        pipeline=diffusers.QwenImagePipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        denoiser=(diffusers.QwenImageTransformer2DModel, {}),  # the class's defaults are its numbers
        vae=(diffusers.AutoencoderKLQwenImage, {}),
        parameters=(20_430_401_088, 126_892_531),
        encoders=(("", "qwen2_5_vl", 3584, 0),),
        tiny=(
            {
                "num_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "joint_attention_dim": 16,
                "axes_dims_rope": (4, 6, 6),
            },
            {"base_dim": 8, "num_res_blocks": 1},
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "ernie-image": Model(
        public="baidu/ERNIE-Image",
        pipeline=diffusers.ErnieImagePipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        denoiser=(
            diffusers.ErnieImageTransformer2DModel,
            {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_layers": 36,
                "ffn_hidden_size": 12288,
                "text_in_dim": 3072,
            },
        ),
        vae=(diffusers.AutoencoderKLFlux2, {}),
        parameters=(8_033_490_048, 84_046_115),
        encoders=(("", "ministral3", 3072, 0),),
        tiny=(
            {
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_layers": 1,
                "ffn_hidden_size": 32,
                "text_in_dim": 16,
                "rope_axes_dim": (4, 6, 6),
            },
            TINY_KL_VAE,
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "krea-2": Model(
        public="krea/Krea-2-Raw",
        pipeline=diffusers.Krea2Pipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        denoiser=(diffusers.Krea2Transformer2DModel, {}),  # the class's defaults are its numbers
        vae=(diffusers.AutoencoderKLQwenImage, {}),
        parameters=(12_820_073_036, 126_892_531),
        encoders=(("", "qwen3_vl", 2560, 0),),
        tiny=(
            {
                "num_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "attention_head_dim": 16,
                "intermediate_size": 16,
                "text_hidden_dim": 16,
                "text_num_attention_heads": 2,
                "text_num_key_value_heads": 2,
                "text_intermediate_size": 16,
                "axes_dims_rope": (4, 6, 6),
            },
            {"base_dim": 8, "num_res_blocks": 1},
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "flux2-klein": FLUX2_KLEIN,
    "flux2": replace(
        FLUX2_KLEIN,
        public="black-forest-labs/FLUX.2-dev",
        pipeline=diffusers.Flux2Pipeline,
        denoiser=(diffusers.Flux2Transformer2DModel, {}),  # the class's defaults are its numbers
        parameters=(32_223_281_152, 84_046_115),
        encoders=(("", "mistral3", 5120, 0),),
    ),
    "chroma": Model(
        public="lodestones/Chroma1-HD",
        pipeline=diffusers.ChromaPipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        denoiser=(diffusers.ChromaTransformer2DModel, {}),  # the class's defaults are its numbers
        vae=(diffusers.AutoencoderKL, FLUX_VAE),
        parameters=(8_899_983_424, 83_819_683),
        encoders=(("", "t5", 4096, 0),),
        tiny=(
            {
                "num_layers": 1,
                "num_single_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "axes_dims_rope": (4, 6, 6),
                "joint_attention_dim": 16,
                "approximator_hidden_dim": 16,
            },
            TINY_KL_VAE,
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "lumina-2": Model(
        public="Alpha-VLLM/Lumina-Image-2.0",
        pipeline=diffusers.Lumina2Pipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        denoiser=(diffusers.Lumina2Transformer2DModel, {"cap_feat_dim": 2304}),
        vae=(diffusers.AutoencoderKL, FLUX_VAE),
        parameters=(2_609_769_152, 83_819_683),
        encoders=(("", "gemma", 2304, 0),),
        tiny=(
            {
                "hidden_size": 32,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 16,
                "axes_dim_rope": (4, 6, 6),
                "cap_feat_dim": 16,
            },
            TINY_KL_VAE,
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "auraflow": Model(
        public="fal/AuraFlow-v0.3",
        pipeline=diffusers.AuraFlowPipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        denoiser=(diffusers.AuraFlowTransformer2DModel, {"pos_embed_max_size": 96**2}),
        vae=(diffusers.AutoencoderKL, SDXL_VAE),
        parameters=(6_858_605_568, 83_653_863),
        encoders=(("", "umt5", 2048, 0),),
        tiny=(
            {
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "joint_attention_dim": 16,
                "caption_projection_dim": 32,
            },
            TINY_KL_VAE,
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "hidream-i1": Model(
        public="HiDream-I1-Full",  # the one on the Hub lacks its Llama
        pipeline=diffusers.HiDreamImagePipeline,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        denoiser=(
            diffusers.HiDreamImageTransformer2DModel,
            {
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "caption_channels": (4096, 4096),
                "axes_dims_rope": (64, 32, 32),
                "llama_layers": (*range(32), *(31,) * 16),
            },
        ),
        vae=(diffusers.AutoencoderKL, FLUX_VAE),
        parameters=(17_105_733_184, 83_819_683),
        encoders=(
            ("", "clip_long", 768, 768),
            ("_2", "clip_long", 1280, 1280),
            ("_3", "t5", 4096, 0),
            ("_4", "llama", 4096, 0),
        ),
        tiny=(
            {
                "num_layers": 1,
                "num_single_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "caption_channels": (16, 16),
                "text_emb_dim": 16,
                "axes_dims_rope": (8, 4, 4),
                "llama_layers": (0, 0),
            },
            TINY_KL_VAE,
            ((8, 8), (8, 8), (16, 0), (16, 0)),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "wan-2.1": Model(
        public="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        pipeline=diffusers.WanPipeline,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        denoiser=(diffusers.WanTransformer3DModel, {}),  # the class's defaults are its numbers
        vae=(diffusers.AutoencoderKLWan, {}),
        parameters=(14_288_491_584, 126_892_531),
        encoders=(("", "umt5", 4096, 0),),
        tiny=(
            {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 16},
            {"base_dim": 8, "num_res_blocks": 1},
            ((16, 0),),
        ),
        resolution=(960, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
    "kolors": replace(
        MODELS["sdxl"],
        public="Kwai-Kolors/Kolors-diffusers",
        pipeline=KolorsPipeline,
        scheduler=diffusers.EulerDiscreteScheduler(
            **STABLE_DIFFUSION_BETAS | {"beta_end": 0.014},
            num_train_timesteps=1100,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        denoiser=(
            diffusers.UNet2DConditionModel,
            MODELS["sdxl"].denoiser[1]
            | {
                "encoder_hid_dim": 4096,
                "encoder_hid_dim_type": "text_proj",
                "projection_class_embeddings_input_dim": 5632,
            },
        ),
        parameters=(2_579_458_820, 83_653_863),
        encoders=(("", "chatglm", 4096, 0),),
        tiny=(
            MODELS["sdxl"].tiny[0] | {"encoder_hid_dim": 16, "projection_class_embeddings_input_dim": 6 * 8 + 16},
            TINY_KL_VAE,
            ((16, 0),),
        ),
        kinds=("lora",),
    ),
    "hunyuan-image": Model(
        public="hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
        pipeline=diffusers.HunyuanImagePipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        denoiser=(diffusers.HunyuanImageTransformer2DModel, {"text_embed_2_dim": 1472}),
        vae=(
            diffusers.AutoencoderKLHunyuanImage,
            {
                "in_channels": 3,
                "out_channels": 3,
                "latent_channels": 64,
                "block_out_channels": (128, 256, 512, 512, 1024, 1024),
                "layers_per_block": 2,
                "spatial_compression_ratio": 32,
                "sample_size": 384,
                "scaling_factor": 0.75289,
            },
        ),
        parameters=(17_425_795_520, 405_575_491),
        encoders=(("", "qwen2_5_vl", 3584, 0), ("_2", "byt5", 1472, 0)),
        tiny=(
            {
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "rope_axes_dim": (8, 8),
                "text_embed_dim": 16,
                "text_embed_2_dim": 16,
            },
            {"block_out_channels": (64, 64, 64, 64, 128, 128), "layers_per_block": 1},
            ((16, 0), (16, 0)),
        ),
        resolution=(2048, 128),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
}
