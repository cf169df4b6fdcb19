"""What a step costs at the models' real sizes, with and without LPL, as the script's own --dry_run measures it.

    python tests/gpu/real_sizes.py                                    # every family, whole and LoRA, on a GPU
    python tests/gpu/real_sizes.py --families sdxl flux --kinds lora lora-4bit -- --lpl_gradient_checkpointing
    python tests/gpu/real_sizes.py --scale tiny --mixed_precision no  # the same path with shrunken models, on a CPU

No weights are loaded from anywhere: denoiser and VAE have the architecture of a public model and random weights, which
cost as much as trained ones. Text encoders are narrow stand-ins that give embeddings of the right width, so that their
own time and memory are NOT in the numbers; LPL's share of the loss means nothing here. One family at a time is
written to a temporary folder, in bfloat16, and removed again. Results are written after every run; a run that is
measured again replaces the earlier one, and one that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]  # tests/tiny.py and the package

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Gemma2Model, T5EncoderModel  # noqa: E402


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
KINDS = {
    "full": (),
    "lora": ("--rank", "16"),
    "lora-8bit": ("--rank", "16", "--quantize_base", "8bit"),
    "lora-4bit": ("--rank", "16", "--quantize_base", "4bit"),
}
NOT_BUILT = "none"  # in the place of a kind where the model could not even be made


# Building -----------------------------------------------------------------------------------------------------------


def shrunk(model: Model, scale: str) -> tuple[Config, Config, tuple[tuple[int, int], ...]]:
    """Configurations of denoiser and VAE, and (hidden size, projection) of each text encoder."""
    configs = (model.denoiser[1], model.vae[1])
    widths = tuple(encoder[2:] for encoder in model.encoders)
    if scale == "real":
        return *configs, widths
    denoiser, vae = (config | changes for config, changes in zip(configs, model.tiny, strict=False))
    return denoiser, vae, model.tiny[2]


@contextmanager
def in_bfloat16(device: str) -> Iterator[None]:
    """Modules that are made within are born in bfloat16 on the device: no copy of twice the size comes first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def text_encoder(kind: str, width: int, projection: int, second: bool) -> tuple[nn.Module, Any]:
    """A stand-in of one or two layers whose embeddings have that width, and its tokenizer."""
    if kind == "t5":
        tokenizer = tiny._t5_tokenizer()
        return T5EncoderModel(tiny._t5_config(tokenizer, width)), tokenizer
    if kind == "gemma":
        tokenizer = tiny._gemma_tokenizer()
        return Gemma2Model(tiny._gemma_config(tokenizer, width)), tokenizer
    tokenizer = tiny._clip_tokenizer(**({"pad_token": "!"} if second else {}))
    cls = CLIPTextModelWithProjection if kind == "clip_projected" else CLIPTextModel
    return cls(tiny._clip_config(tokenizer, width, projection)), tokenizer


def build(model: Model, scale: str, folder: Path, device: str) -> dict[str, int]:
    """Write the pipeline with random weights; how many parameters denoiser and VAE have."""
    denoiser_config, vae_config, widths = shrunk(model, scale)
    with tiny.seeded(0):
        with in_bfloat16(device):
            parts = {model.denoiser_name: model.denoiser[0](**denoiser_config), "vae": model.vae[0](**vae_config)}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        for (number, kind, *_), width in zip(model.encoders, widths, strict=True):
            encoder, tokenizer = text_encoder(kind, *width, second=number == "_2")
            parts |= {f"text_encoder{number}": encoder.to(torch.bfloat16), f"tokenizer{number}": tokenizer}
    model.pipeline(**parts, scheduler=model.scheduler, **model.others).save_pretrained(folder)
    return counts


def write_images(folder: Path, resolution: int, count: int, labels: bool) -> None:
    """Smooth noise in the size that is trained, with captions, or in two classes' sub-folders."""
    generator = np.random.default_rng(0)
    lines = []
    for index in range(count):
        place = folder / ("even", "odd")[index % 2] if labels else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((resolution, resolution)).save(place / f"{index}.jpg")
        lines.append(json.dumps({"file_name": f"{index}.jpg", "text": f"smooth noise, number {index}"}))
    if not labels:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


# Measuring ----------------------------------------------------------------------------------------------------------


def command(model: Model, kind: str, resolution: int, batch: int, precision: str, flags: Sequence[str]) -> list[str]:
    """The script's command, to be run beside the folders "pipeline" and "images"."""
    return [
        *("accelerate", "launch", "--num_processes", "1", "train_text_to_image_lpl.py", "--dry_run"),
        *("--pretrained_model_name_or_path", "pipeline", "--train_data_dir", "images", "--output_dir", "output"),
        *("--cache_dir", "cache", "--resolution", str(resolution), "--train_batch_size", str(batch)),
        *("--max_train_steps", "1000", "--learning_rate", "1e-5", "--seed", "0", "--report_to", "none"),
        *("--dataloader_num_workers", "2", "--mixed_precision", precision),
        *model.flags,
        *KINDS[kind],
        *flags,
    ]


def execute(words: Sequence[str], folder: Path, seconds: float) -> tuple[str, str | None]:
    """Run the command; what it printed, and why it failed."""
    script = str(ROOT / "train_text_to_image_lpl.py")
    words = [script if word == Path(script).name else word for word in words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the launcher's own child has to end with it
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "", f"took longer than {seconds:.0f} s"
    return output, None if process.returncode == 0 else last_error(errors, folder)


def last_error(text: str, folder: Path) -> str:
    """The line of a command's errors that says what went wrong, without paths of the machine."""
    for place in (folder, ROOT, Path(sys.prefix)):
        text = text.replace(f"{place}/", "")
    lines = [line.strip() for line in text.splitlines() if line.strip() and "CalledProcessError" not in line]
    told = [line for line in lines if re.match(r"\S*(Error|Exception|error)\b|\S+\.py: error", line)]
    return (told or lines or ["no message"])[-1][:500]


def read_report(text: str) -> dict[str, dict[str, str]]:
    """The dry run's report: titles, and under each its rows."""
    sections: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            rows = sections.setdefault(line, {})
        elif match := re.match(r" {2}(\S.*?) {2,}(.+)", line):
            rows[match[1]] = match[2]
    return sections


UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def read_cost(text: str) -> dict[str, float | int | None]:
    """Seconds and bytes of "0.1 s, peak memory 2.0 GiB"; None where a step ran out of memory or was not measured.

    Raises:
        ValueError: for another text, so that a changed report does not go unnoticed.
    """
    if text == "out of memory":
        return {"seconds": None, "memory": None}
    match = re.fullmatch(r"([\d.e+-]+) s, peak memory (?:([\d.]+) (\w+)|not measured)", text)
    if match is None:
        raise ValueError(f"{text!r} is not the cost of a step as the dry run tells it")
    return {"seconds": float(match[1]), "memory": round(float(match[2]) * UNITS[match[3]]) if match[2] else None}


def read_results(text: str) -> dict[str, Any]:
    """The numbers of a dry run's report, and its rows on what was trained and on LPL."""
    sections = read_report(text)
    step = next((rows for title, rows in sections.items() if title.startswith("One step")), {})
    costs = {name: read_cost(step[name]) for name in ("without LPL", "with LPL") if name in step}
    if not costs:
        raise ValueError("the dry run's report has no costs of a step")
    told = {title: sections.get(title, {}) for title in ("What is trained", "Latent perceptual loss")}
    return costs | told


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def measure(name: str, args: argparse.Namespace, save: Any) -> None:
    """Build one family, take its measurements, and hand each to ``save``."""
    model = MODELS[name]
    resolution = args.resolution or model.resolution[args.scale == "tiny"]
    batch = args.batch or model.batch
    setting = {"family": name, "model": model.public, "resolution": resolution, "batch": batch, "scale": args.scale}
    setting |= {"mixed_precision": args.mixed_precision, "flags": shlex.join(args.flags), "device": device_name()}
    setting["versions"] = {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as place:
        folder = Path(place)
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            setting["parameters"] = build(model, args.scale, folder / "pipeline", device)
            write_images(folder / "images", resolution, 4 * batch, labels=name.startswith("dit"))
        except Exception as error:  # whatever it is, the other families are still measured
            save(setting | {"kind": NOT_BUILT, "error": last_error(f"{type(error).__name__}: {error}", folder)})
            return
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # what is left here would be missing there
        for kind in args.kinds or model.kinds:
            if kind == "full" and kind not in model.kinds:
                continue
            words = command(model, kind, resolution, batch, args.mixed_precision, args.flags)
            output, error = execute(words, folder, args.timeout)
            run = setting | {"kind": kind, "command": shlex.join(words)}
            try:
                save(run | (read_results(output) if error is None else {"error": error}))
            except ValueError as unread:
                save(run | {"error": str(unread)})


# Telling ------------------------------------------------------------------------------------------------------------

KEYS = ("family", "resolution", "batch", "scale", "mixed_precision", "flags", "device")


def merged(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """With one more run, which replaces an earlier one of the same settings, and the failure to build its model."""
    kinds = (run["kind"], NOT_BUILT)
    return [old for old in runs if old["kind"] not in kinds or any(old[key] != run[key] for key in KEYS)] + [run]


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of all runs, and below it their commands."""
    heads = ["model", "kind", "px", "batch", "s/step", "with LPL", "x", "GiB", "with LPL", "x", "device"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for run in runs:
        cells = [run["family"], run["kind"], run["resolution"], run["batch"], *cost_cells(run), run["device"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    told = {f"{run['device']}: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}
    lines += ["", "Text encoders are stand-ins: their time and memory are not included.", *sorted(told), ""]
    lines += [f"    {run['command']}" for run in runs if "command" in run]
    return "\n".join(lines) + "\n"


def cost_cells(run: Mapping[str, Any]) -> list[str]:
    """Seconds without and with LPL and their ratio, then GiB likewise; an error in the place of the first."""
    if "error" in run:
        return [run["error"].replace("|", "/"), *[""] * 5]
    cells = []
    for measure, unit in (("seconds", 1), ("memory", 2**30)):
        plain, with_lpl = (run.get(name, {}).get(measure) for name in ("without LPL", "with LPL"))
        cells += ["-" if value is None else f"{value / unit:.3g}" for value in (plain, with_lpl)]
        cells.append(f"{with_lpl / plain:.2f}" if plain and with_lpl else "-")
    return cells


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--families", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--kinds", nargs="+", choices=list(KINDS), help="what is trained; every family's own: full and lora")
    add("--scale", choices=("real", "tiny"), default="real", help="tiny: shrunken models, to try this on a CPU")
    add("--batch", type=int, help="samples in a batch; each family's own")
    add("--resolution", type=int, help="side in pixels; each family's own, and DiT takes no other")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), default="bf16")
    add("--timeout", type=float, default=580, help="seconds for each command")
    add("--work_dir", help="where pipelines are written for a while: 24 GB for Flux; the system's temporary folder")
    add(
        "--output", type=Path, help="JSON file that the results are added to; beside this file, none with --scale tiny"
    )
    add("flags", nargs="*", help="after --: further flags of the training script")
    args = parser.parse_args(words)
    if args.output is None and args.scale == "real":
        args.output = HERE / "results.json"
    return args


def main() -> None:
    args = parse()
    if args.scale == "real" and not torch.cuda.is_available():
        sys.exit("real_sizes.py: error: models of real size need a GPU; give --scale tiny to try this on a CPU")
    runs: list[Any] = json.loads(args.output.read_text()) if args.output and args.output.exists() else []
    done: list[Any] = []

    def save(run: Mapping[str, Any]) -> None:
        nonlocal runs
        runs = merged(runs, run)
        done.append(run)
        print(f"{run['family']} {run['kind']}: {' '.join(cost_cells(run))}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(runs, indent=2) + "\n")
            args.output.with_suffix(".md").write_text(markdown(runs))

    for name in args.families:
        measure(name, args, save)
    print(markdown(done))
    sys.exit(any("error" in run for run in done))


if __name__ == "__main__":
    main()
