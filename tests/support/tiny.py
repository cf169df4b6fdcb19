"""Tiny *real* diffusers pipelines and data sets, built offline.

Every builder writes a folder that `DiffusionPipeline.from_pretrained(folder)` (or `load_dataset("imagefolder", ...)`)
reads under HF_HUB_OFFLINE=1, and returns that folder. Weights are random but seeded, so a builder gives the same bits
every time; the caller's random state is left alone. The VAEs downsample by 4 (three levels): a 32 px image has 8 x 8
latents and decoder maps of 8 (mid), 16 (up_0), 32 (up_1) and 32 px (up_2).
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AsymmetricAutoencoderKL,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLKVAE,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


VAE_FACTOR = 4
VAE_CONFIGS = {
    "sd": {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "scaling_factor": 0.18215},
    "sd3": {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "asymmetric": {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "down_block_out_channels": (8, 8, 16),
        "layers_per_down_block": 1,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "up_block_out_channels": (8, 16, 16),
        "layers_per_up_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "standardised": {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "latents_mean": (0.5, -1.0, 0.0, 2.0),
        "latents_std": (2.0, 1.0, 0.5, 3.0),
    },
    "dc": {
        "latent_channels": 4,
        "attention_head_dim": 8,
        **{f"{side}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")},
        **{f"{side}_block_out_channels": (8, 16, 16) for side in ("encoder", "decoder")},
        **{f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")},
        **{f"{side}_qkv_multiscales": ((), (), (5,)) for side in ("encoder", "decoder")},
        "scaling_factor": 0.41407,
    },
}
_FRAMES = {  # Wan's decoder and Qwen's
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": (0.5, -1.0, 0.0, 2.0),
    "latents_std": (2.0, 1.0, 0.5, 3.0),
}
_RESIDUAL_FRAMES = {**_FRAMES, "is_residual": True, "decoder_base_dim": 4, "scale_factor_temporal": 2}
MORE_VAE_CONFIGS = {  # image decoders whose blocks are not those of AutoencoderKL; some need multiples of 32 channels
    "tiny": {
        **{f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")},
        "num_encoder_blocks": (1, 1, 2),
        "num_decoder_blocks": (2, 1, 1),
        "scaling_factor": 0.9,
    },
    "vq": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "vq_embed_dim": 3,
        "scaling_factor": 0.5,
    },
    "movq": {
        "block_out_channels": (32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_type": "spatial",
        "latent_channels": 4,
    },
    "flux2": {  # 16 channels of packed latents, for 8 x 8 pixels each
        "block_out_channels": (8, 16, 16),
        "decoder_block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    },
    "hunyuan": {  # its last two levels have one resolution
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "sample_size": 32,
        "scaling_factor": 0.75,
    },
    "kvae": {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 1)},
    "temporal": {
        "layers_per_block": 2,  # with one, its attention never runs
        "block_out_channels": (32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
    },
    "cosmos": {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8, 16, 16),
        "decode_block_out_channels": (8, 8, 16, 16),
        "num_layers": 1,
        "attention_resolutions": (),
        "patch_size": 2,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
        "latents_mean": tuple(0.1 * i for i in range(8)),  # of 4 channels at 2 frames
        "latents_std": tuple(1.0 + 0.1 * i for i in range(8)),
    },
    "refiner": {
        "latent_channels": 4,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
    },
    "qwen": _FRAMES,
    "qwen21": {**_RESIDUAL_FRAMES, "scale_factor_spatial": 4},  # with an alpha channel
    "wan": {**_FRAMES, "scale_factor_spatial": 4},
    "wan22": {  # patches of 2 x 2 pixels
        **_RESIDUAL_FRAMES,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 8,
    },
}
VAE_CLASSES = {  # of the others: AutoencoderKL
    "asymmetric": AsymmetricAutoencoderKL,
    "dc": AutoencoderDC,
    "tiny": AutoencoderTiny,
    "vq": VQModel,
    "movq": VQModel,
    "flux2": AutoencoderKLFlux2,
    "hunyuan": AutoencoderKLHunyuanImage,
    "kvae": AutoencoderKLKVAE,
    "temporal": AutoencoderKLTemporalDecoder,
    "cosmos": AutoencoderKLCosmos,
    "refiner": AutoencoderKLHunyuanImageRefiner,
    "qwen": AutoencoderKLQwenImage,
    "qwen21": AutoencoderKLQwenImage21,
    "wan": AutoencoderKLWan,
    "wan22": AutoencoderKLWan,
}
DIT_LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "207": "golden retriever"}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
CLIP_LENGTH = 77
T5_LENGTH = 512


@contextmanager
def seeded(seed):
    """Seeds torch inside the block, gives the caller's random state back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# --- autoencoders ----------------------------------------------------------------------------------------------------


def tiny_vae(kind="sd", dtype=torch.float32, seed=0, **overrides):
    """An autoencoder alone, in eval mode, on the CPU.

    "sd": 4 latent channels, quant and post-quant convs, scaling factor 0.18215, no shift.
    "sd3": 16 latent channels, no quant convs, scaling factor 1.5305, shift factor 0.0609.
    "asymmetric": AsymmetricAutoencoderKL, whose decoder is wider than its encoder (the paper's main results).
    "standardised": as "sd", with a mean and a deviation for each latent channel.
    "dc": AutoencoderDC (Sana), without a mid block: maps of 8 (up_0), 16 (up_1) and 32 px (up_2) for a 32 px image.
    The kinds of MORE_VAE_CONFIGS are there too, each a class of its own.
    `overrides` go to the constructor; `block_out_channels` also decides the number of levels (AutoencoderKL).
    """
    configs = VAE_CONFIGS | MORE_VAE_CONFIGS
    if kind not in configs:
        raise ValueError(f"kind is {kind!r}, accepted: {', '.join(configs)}")
    config = {**configs[kind], **overrides}
    if kind in VAE_CONFIGS and kind != "dc":
        config = {"sample_size": 32, "norm_num_groups": 4, **config}
    if kind not in VAE_CLASSES:
        levels = len(config["block_out_channels"])
        config["down_block_types"] = ("DownEncoderBlock2D",) * levels
        config["up_block_types"] = ("UpDecoderBlock2D",) * levels
    with seeded(seed):
        vae = VAE_CLASSES.get(kind, AutoencoderKL)(**config)
        if kind == "flux2":  # as if trained
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 4.0)
    return torch.nn.Module.to(vae, dtype).eval()  # diffusers' own `to` logs a warning at every cast


# --- tokenizers and text encoders ------------------------------------------------------------------------------------


def _clip_tokenizer(pad_token="<|endoftext|>", length=CLIP_LENGTH):
    letters = [chr(code) for code in range(33, 127)]
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>")]
    pieces += ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=length)


def _clip_config(tokenizer, hidden_size, projection_dim, layers=2):
    vocab = tokenizer.get_vocab()
    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection_dim,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab[tokenizer.pad_token],
    )


def _t5_tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-'\"()"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(letter, -3.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def _t5_config(tokenizer, d_model):
    return T5Config(
        vocab_size=len(tokenizer.get_vocab()),
        d_model=d_model,
        d_kv=8,
        d_ff=2 * d_model,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _gemma_tokenizer():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]  # what no other piece covers falls back to bytes
    pieces += [chr(code) for code in range(33, 127)]
    merges = [
        ("▁", "a"),
        ("▁", "t"),
        ("i", "n"),
        ("e", "r"),
        ("o", "r"),
        ("r", "e"),
        ("t", "h"),
        ("e", "d"),
        ("a", "t"),
    ]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=8192)


def _gemma_config(tokenizer, hidden_size):
    return Gemma2Config(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
    )


CHAT = (  # as Qwen3's, without what tools and thinking add
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
INSTRUCTION = (  # of Lumina-Image 2, in its pipeline
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
MESSAGES = (  # as Mistral's, of texts only
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYS]{{ message.content[0].text }}[/SYS]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)

WORDS = [  # one token each in Qwen's vocabulary; Qwen-Image's instruction has 34 tokens there, and here
    *("system", "user", "assistant", "Describe", " the", " image", " by", " detailing", " color", " shape", " size"),
    *(" texture", " quantity", " text", " spatial", " relationships", " of", " objects", " and", " background"),
]


def _qwen_tokenizer():
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=8192
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(WORDS)
    tokenizer.chat_template = CHAT
    return tokenizer


def _mistral_tokenizer():
    """In place of the processor that the model has, which needs torchvision; both answer to messages alike."""
    marks = ["<pad>", "<s>", "</s>", "<unk>", "[SYS]", "[/SYS]", "[INST]", "[/INST]", SYSTEM_MESSAGE]  # a token each
    pieces = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, additional_special_tokens=marks[4:], padding_side="left"
    )
    tokenizer.chat_template = MESSAGES
    return tokenizer


def _tokenizer_with_start():
    """Puts <s> before each text, so that the empty one has a token too."""
    backend = _qwen_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<s>"])
    place = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", place)])
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8192, **names)


def _qwen3_config(tokenizer, hidden_size, layers=2):
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
    )


def _qwen2_5_vl_config(tokenizer, layers=1):
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


# --- pipelines -------------------------------------------------------------------------------------------------------


def tiny_sd(folder, prediction_type="epsilon"):
    """StableDiffusionPipeline as SD 1.5 (epsilon) or 2.1 (v_prediction) have it, without a safety checker."""
    tokenizer = _clip_tokenizer()
    with seeded(1):
        text_encoder = CLIPTextModel(_clip_config(tokenizer, hidden_size=16, projection_dim=16))
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae("sd"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_sd3(folder, t5=True):
    """StableDiffusion3Pipeline with both CLIPs; `t5=False` leaves the third encoder and tokenizer out (None).

    diffusers saves such a pipeline but loads it only with `from_pretrained(folder, **WITHOUT_T5)`: the two are no
    optional components of the class.
    """
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    tokenizer_3 = _t5_tokenizer() if t5 else None
    joint_dim = 32  # = the T5's d_model; the two CLIPs together (16 + 16) are padded to it
    with seeded(2):
        text_encoder = CLIPTextModelWithProjection(_clip_config(tokenizer, hidden_size=16, projection_dim=16))
        text_encoder_2 = CLIPTextModelWithProjection(_clip_config(tokenizer_2, hidden_size=16, projection_dim=24))
        text_encoder_3 = T5EncoderModel(_t5_config(tokenizer_3, joint_dim)) if t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,  # heads * head_dim
            joint_attention_dim=joint_dim,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=32,
        )
    pipeline = StableDiffusion3Pipeline(
        vae=tiny_vae("sd3"),
        transformer=transformer,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_sdxl(folder, prediction_type="epsilon", projection_dim=24):
    """StableDiffusionXLPipeline with both CLIPs."""
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    with seeded(3):
        text_encoder = CLIPTextModel(_clip_config(tokenizer, hidden_size=16, projection_dim=16))
        text_encoder_2 = CLIPTextModelWithProjection(
            _clip_config(tokenizer_2, hidden_size=16, projection_dim=projection_dim)
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 16,  # both encoders' hidden sizes
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + projection_dim,  # the six numbers, and the pooled embedding
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae("sd", scaling_factor=0.13025),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_pixart(folder, kind="alpha"):
    """PixArtAlphaPipeline as the 1024 px one, which wants the image's size, or PixArtSigmaPipeline, which does not."""
    alpha = kind == "alpha"
    tokenizer = _t5_tokenizer()
    with seeded(4):
        text_encoder = T5EncoderModel(_t5_config(tokenizer, d_model=32))
        transformer = PixArtTransformer2DModel(
            sample_size=128 if alpha else 8,  # by this number the pipeline knows that the size is wanted
            use_additional_conditions=alpha,
            patch_size=2,
            in_channels=4,
            out_channels=8,  # the second half is a learned variance
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,  # a third of the width embeds the size
            cross_attention_dim=24,
            caption_channels=32,
        )
    pipeline = (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        vae=tiny_vae("sd", scaling_factor=0.18215 if alpha else 0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_dit(folder):
    """DiTPipeline with 1000 classes; names of some are in model_index.json, as facebook/DiT-XL-2-256 has them."""
    with seeded(5):
        transformer = DiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_embeds_ada_norm=1000,  # the pipeline's null class is 1000
        )
        for module in transformer.modules():  # else they are drawn with a deviation of 1 and drown the timesteps
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=0.2)
    pipeline = DiTPipeline(
        transformer=transformer,
        vae=tiny_vae("sd"),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = Path(folder, "model_index.json")  # diffusers reads the names there, but does not write them
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": DIT_LABELS}, indent=2))
    return Path(folder)


def tiny_flux(folder):
    """FluxPipeline as FLUX.1-dev has it: guidance is embedded, the schedule's shift depends on the image's size."""
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    with seeded(6):
        text_encoder = CLIPTextModel(_clip_config(tokenizer, hidden_size=16, projection_dim=16))
        text_encoder_2 = T5EncoderModel(_t5_config(tokenizer_2, d_model=32))
        transformer = FluxTransformer2DModel(
            in_channels=4 * 16,  # 2 x 2 latent positions of 16 channels
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    pipeline = FluxPipeline(
        vae=tiny_vae("sd3", scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_sana(folder):
    """SanaPipeline with a Gemma 2 and an AutoencoderDC that downsamples by 4."""
    tokenizer = _gemma_tokenizer()
    with seeded(7):
        text_encoder = Gemma2Model(_gemma_config(tokenizer, hidden_size=16))
        transformer = SanaTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            timestep_scale=0.5,  # 1 in the first models, but there is such a number
        )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae("dc"),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_z_image(folder):
    """ZImagePipeline with a Qwen3."""
    tokenizer = _qwen_tokenizer()
    with seeded(8):
        text_encoder = Qwen3Model(_qwen3_config(tokenizer, hidden_size=16))
        transformer = ZImageTransformer2DModel(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        )  # fmt: skip
        for value in (transformer.x_pad_token, transformer.cap_pad_token):
            value.data.normal_()
    pipeline = ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae("sd3", scaling_factor=0.3611, shift_factor=0.1159),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_qwen_image(folder):
    """QwenImagePipeline with a Qwen2.5-VL and a VAE with a time axis."""
    tokenizer = _qwen_tokenizer()
    with seeded(9):
        text_encoder = Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl_config(tokenizer))
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    pipeline = QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae("qwen"),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_ernie_image(folder):
    """ErnieImagePipeline with a Ministral 3, without the model that rewrites prompts."""
    tokenizer = _tokenizer_with_start()
    text = {
        "model_type": "ministral3",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with seeded(10):
        text_encoder = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))
        transformer = ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        )
        for layer in (transformer.adaLN_modulation[-1], transformer.final_linear):  # which start at zero
            layer.weight.data.normal_(std=0.2)
    pipeline = ErnieImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae("flux2", block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                     up_block_types=("UpDecoderBlock2D",) * 2, decoder_block_out_channels=(8, 16)),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_krea2_transformer():
    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_krea2(folder):
    """Krea2Pipeline with two layers of a Qwen3-VL."""
    tokenizer = _qwen_tokenizer()
    text = _qwen3_config(tokenizer, hidden_size=16).to_dict()
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    vision["deepstack_visual_indexes"] = []
    with seeded(11):
        text_encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
        transformer = tiny_krea2_transformer()
    pipeline = Krea2Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae("qwen"),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder_select_layers=(1, 2),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_flux2(folder, kind="klein"):
    """Flux2KleinPipeline with a Qwen3, or Flux2Pipeline with a Mistral 3, whose transformer is told the guidance."""
    klein = kind == "klein"
    tokenizer = _qwen_tokenizer() if klein else _mistral_tokenizer()
    with seeded(9):
        if klein:
            text_encoder = Qwen3ForCausalLM(_qwen3_config(tokenizer, hidden_size=8, layers=28))
        else:
            sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 4}
            text = {"num_hidden_layers": 31, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
            images = {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
            config = Mistral3Config(
                text_config={"model_type": "mistral", **sizes, **text},
                vision_config={"model_type": "pixtral", **sizes, **images},
            )
            text_encoder = Mistral3ForConditionalGeneration(config)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=not klein,
        )
    two_levels = {"block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16)}  # and patches of 2 x 2
    two_levels |= {
        f"{way}_block_types": (f"{way.title()}{side}Block2D",) * 2
        for way, side in (("down", "Encoder"), ("up", "Decoder"))
    }
    pipeline = (Flux2KleinPipeline if klein else Flux2Pipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae("flux2", **two_levels),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_chroma(folder):
    """ChromaPipeline with a T5."""
    tokenizer = _t5_tokenizer()
    with seeded(10):
        text_encoder = T5EncoderModel(_t5_config(tokenizer, d_model=32))
        transformer = ChromaTransformer2DModel(
            in_channels=4 * 16,  # 2 x 2 latent positions of 16 channels
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae("sd3", scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_lumina2(folder):
    """Lumina2Pipeline with a Gemma 2, and a VAE of the factor 8 that the pipeline takes for granted."""
    tokenizer = _gemma_tokenizer()
    tokenizer.add_tokens([INSTRUCTION])  # else it would fill all tokens that tests have
    with seeded(11):
        text_encoder = Gemma2Model(_gemma_config(tokenizer, hidden_size=16))
        transformer = Lumina2Transformer2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            cap_feat_dim=16,
        )
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae("sd3", block_out_channels=(8, 8, 16, 16), scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_aura_flow(folder):
    """AuraFlowPipeline with a UMT5."""
    tokenizer = _t5_tokenizer()
    with seeded(12):
        text_encoder = UMT5EncoderModel(UMT5Config(**_t5_config(tokenizer, d_model=32).to_diff_dict()))
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=16**2,
        )
        for module in transformer.modules():
            if isinstance(module, AdaLayerNormZero):  # else the blocks add hardly anything
                module.linear.weight.data.mul_(8)
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae("sd", scaling_factor=0.13025),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_hidream(folder):
    """HiDreamImagePipeline with both CLIPs, which take longer captions than others', a T5 and a Llama."""
    tokenizer, tokenizer_2 = (_clip_tokenizer(length=248) for _ in range(2))
    tokenizer_3, tokenizer_4 = _t5_tokenizer(), _tokenizer_with_start()
    with seeded(13):
        text_encoder = CLIPTextModelWithProjection(_clip_config(tokenizer, hidden_size=16, projection_dim=16))
        text_encoder_2 = CLIPTextModelWithProjection(_clip_config(tokenizer_2, hidden_size=16, projection_dim=24))
        text_encoder_3 = T5EncoderModel(_t5_config(tokenizer_3, d_model=32))
        text_encoder_4 = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer_4),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        )
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=16 + 24,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 1, 1],
        )
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae("sd3", scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=text_encoder_4,
        tokenizer_4=tokenizer_4,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_wan(folder, kind="wan"):
    """WanPipeline with a UMT5; "wan22" has a VAE of patches, and gives each patch a timestep."""
    tokenizer, patches = _t5_tokenizer(), kind == "wan22"
    with seeded(14):
        text_encoder = UMT5EncoderModel(UMT5Config(**_t5_config(tokenizer, d_model=32).to_diff_dict()))
        transformer = WanTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
        )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(kind),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
        expand_timesteps=patches,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_kolors(folder):
    """KolorsPipeline with a ChatGLM, whose tokenizer needs sentencepiece."""
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer(_sentencepiece_model(Path(folder)))
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        seq_length=256,
        add_qkv_bias=True,
        original_rope=True,
    )
    with seeded(13):
        text_encoder = ChatGLMModel(config, empty_init=False)
        for name, parameter in text_encoder.named_parameters():
            parameter.data.fill_(1.0) if name.endswith("norm.weight") else parameter.data.normal_(std=0.3)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=24,
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj",
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,  # the six numbers, and the pooled embedding
        )
    pipeline = KolorsPipeline(
        vae=tiny_vae("sd", scaling_factor=0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.014,
            beta_schedule="scaled_linear",
            num_train_timesteps=1100,
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def _sentencepiece_model(folder):
    """The file of a vocabulary that sentencepiece makes of a few words."""
    import sentencepiece

    texts = ["a cat", "the dog, and a very long caption", "a house by the lake", "".join(map(chr, range(33, 127)))]
    place = folder / "vocabulary"
    with open(place, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=120, minloglevel=2
        )
    return str(place)


def tiny_hunyuan_image(folder, distilled=False):
    """HunyuanImagePipeline with a Qwen2.5-VL and a ByT5; as the distilled model has it, or guided by a guider."""
    tokenizer, tokenizer_2 = _qwen_tokenizer(), ByT5Tokenizer()
    with seeded(14):
        text_encoder = Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl_config(tokenizer, layers=3))
        text_encoder_2 = T5EncoderModel(_t5_config(tokenizer_2, d_model=24))
        transformer = HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=24,
            rope_axes_dim=(8, 8),
            guidance_embeds=distilled,
            use_meanflow=distilled,
        )
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=tiny_vae("hunyuan"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        guider=None if distilled else AdaptiveProjectedMixGuidance(),
        ocr_guider=None if distilled else AdaptiveProjectedMixGuidance(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


# --- data ------------------------------------------------------------------------------------------------------------

PICTURES = {  # pictures that scikit-image ships
    "astronaut": "a smiling astronaut in an orange suit",
    "chelsea": "a ginger cat looking to the side",
    "coffee": "a cup of coffee with a spoon",
    "rocket": "a rocket on its launch pad",
    "camera": "a man with a camera",
}
MODES = (("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"))
SHAPES = ((1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (1.25, 1.25), (1.0, 1.75), (2.0, 1.5), (1.0, 1.0))  # width, height


def tiny_image_folder(folder, count=8, size=48):
    """An imagefolder data set of real pictures with captions ("text") in metadata.jsonl.

    Widths and heights are multiples of `size` between 1 and 2, modes and formats vary; each crop has its own caption.
    """
    import skimage.data
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PICTURES}
    names = list(PICTURES)
    lines = []
    for index in range(count):
        name = names[index % len(names)]
        mode, suffix = MODES[index % len(MODES)]
        width, height = (round(factor * size) for factor in SHAPES[index % len(SHAPES)])
        image = _crop(pictures[name], width, height, index)
        file_name = f"{index:03d}-{name}.{suffix}"
        image.convert(mode).save(folder / file_name)
        lines.append({"file_name": file_name, "text": f"{PICTURES[name]}, crop {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


CLASSES = {"cats": "chelsea", "cups": "coffee", "rockets": "rocket"}  # a class's sub-folder: its picture


def tiny_class_folder(folder, count=3, size=40):
    """An imagefolder data set with three classes ("label"): a sub-folder each, of `count` real pictures."""
    import skimage.data
    from PIL import Image

    for name, picture in CLASSES.items():
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(getattr(skimage.data, picture)())
        for index in range(count):
            _crop(picture, size + 8 * index, size, index).save(Path(folder) / name / f"{index}.png")
    return Path(folder)


def _crop(picture, width, height, index):
    """Crop number `index`: half the picture's extent, walking over its corners, then reduced to width x height."""
    scale = min(picture.width / width, picture.height / height) / 2
    crop_width, crop_height = round(width * scale), round(height * scale)
    left = (picture.width - crop_width) * (index % 3) // 2
    top = (picture.height - crop_height) * (index // 3 % 3) // 2
    return picture.crop((left, top, left + crop_width, top + crop_height)).resize((width, height))
