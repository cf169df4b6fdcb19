"""The tiny pipelines by family, loaded; batches and calls of any family.

A new family needs its line in TINY.
"""

import inspect
import json

import torch

from lpl.autoencoders import latent_channels
from lpl.families import FAMILIES, find_family


TINY = {  # family -> fixtures of tests/conftest.py
    "stable-diffusion": ["sd_pipeline", "sd_v_pipeline"],
    "stable-diffusion-xl": ["sdxl_pipeline"],
    "stable-diffusion-3": ["sd3_pipeline", "sd3_without_t5"],
    "pixart-alpha": ["pixart_alpha_pipeline"],
    "pixart-sigma": ["pixart_sigma_pipeline"],
    "dit": ["dit_pipeline"],
    "flux": ["flux_pipeline"],
    "sana": ["sana_pipeline"],
    "z-image": ["z_image_pipeline"],
    "qwen-image": ["qwen_image_pipeline"],
    "ernie-image": ["ernie_image_pipeline"],
    "krea-2": ["krea2_pipeline"],
    "flux2-klein": ["flux2_klein_pipeline"],
    "flux2": ["flux2_pipeline"],
    "chroma": ["chroma_pipeline"],
    "lumina-2": ["lumina2_pipeline"],
    "auraflow": ["aura_flow_pipeline"],
    "hidream-i1": ["hidream_pipeline"],
    "wan": ["wan_pipeline", "wan22_pipeline"],
    "kolors": ["kolors_pipeline"],
    "hunyuan-image": ["hunyuan_image_pipeline"],
}
FAMILY_OF = {family.name: family for family in FAMILIES}
CAPTIONS = ["a cat", "", "the dog, and a very long caption " * 8]
LABELS = [3, 1000, 999]  # the null class in the middle
SIZE = 32  # pixels
CPU = torch.device("cpu")


def data_fixture(family):
    """The fixture with images that a family can be trained on."""
    return "class_folder" if family.class_conditional else "image_folder"


def load(folder, dtype=torch.float32, max_sequence_length=77, guidance_scale=3.5):
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    kind = find_family(index["_class_name"])
    dtypes = {"default": torch.float32, **dict.fromkeys(kind.text_encoder_names, dtype)}
    arguments = {"max_sequence_length": max_sequence_length, "guidance_scale": guidance_scale}
    family = kind.load(folder, dtypes, **arguments, **absent)
    family.pipeline.set_progress_bar_config(disable=True)
    return family


def configs_of(family):
    return {name: dict(getattr(family.pipeline, name).config) for name in ("vae", family.denoiser_name)}


def captions_of(family, count=3):
    return (LABELS if family.class_conditional else CAPTIONS)[:count]


def batch_of(family, captions=None, **sizes):
    """A batch of whole images of SIZE px, as the data gives it."""
    captions = captions_of(family) if captions is None else captions
    whole = {"original_size": (SIZE, SIZE), "crop_top_left": (0, 0), "target_size": (SIZE, SIZE)}
    return {"caption": captions} | {
        name: torch.tensor([size] * len(captions)) for name, size in (whole | sizes).items()
    }


def inputs(family, batch=3, side=8):
    """Latents, timesteps and conditions of a batch; no two samples are alike."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, latent_channels(family.vae.config), side, side, generator=generator)
    conditions = family.conditions(batch_of(family, captions_of(family, batch)), CPU)
    return latents, torch.tensor([1.0, 500.0, 900.0])[:batch], conditions


class Calls:
    """What the denoiser is called with while the context lasts, see :func:`arguments_of`."""

    def __init__(self, family):
        self.family, self.calls = family, []

    def __enter__(self):
        self.handle = self.family.denoiser.register_forward_pre_hook(self.note, with_kwargs=True)
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()

    def note(self, module, args, kwargs):
        self.calls.append(arguments_of(module, args, kwargs))


def arguments_of(denoiser, args, kwargs):
    """The tensors of a call by argument; those of nested dictionaries and lists too."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    call = dict(zip(names, args)) | kwargs
    call |= call.pop("added_cond_kwargs", None) or {}
    for name, value in list(call.items()):
        if isinstance(value, list | tuple):
            call |= {f"{name}.{place}": part for place, part in enumerate(value)}
    call = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    return {{"sample": "hidden_states"}.get(name, name): value for name, value in call.items()}


def sample(family, prompts, **arguments):
    """What the pipeline draws, for the call that the family gives; of several prompts at once."""
    calls = [family.call_arguments(prompt, SIZE, SIZE) for prompt in prompts]
    merged = {key: [x for call in calls for x in call[key]] for key in ("class_labels",) if key in calls[0]}
    merged |= {key: [call[key] for call in calls] for key in ("prompt", "negative_prompt") if key in calls[0]}
    return family.images_of(family.pipeline(**{**calls[0], **merged, "num_inference_steps": 2, **arguments}))


class View:
    """How a family's pipeline and its denoiser see what training sees as latents, timesteps and D.

    Whoever adds a family states it here by the pipeline's own means, so that the family's file is not its own proof.
    """

    guidance_off = {"guidance_scale": 1.0}
    guides = True  # by a second answer, for no caption
    empty_first = True  # of both halves of a guided step
    exact = True  # conditions are equal bit for bit; False: captions are padded to another length
    calls_a_step = 1  # of the denoiser; 2: the halves come one after the other

    def __init__(self, family):
        self.family, self.pipeline = family, family.pipeline

    def captions(self, captions):
        """Those that the pipeline takes as training does, without guidance."""
        return captions

    def call(self, call):
        """The arguments of the pipeline's call of the denoiser, in training's shapes."""
        return call

    def latents(self, call):
        """z_t, (B, C, h, w), in a call of the denoiser."""
        return self.unpacked(call["hidden_states"])

    def timesteps(self, call):
        """Training's timesteps, (B,), in a call of the denoiser."""
        return call["timestep"].reshape(-1).double() / self.family.denoiser.config.get("timestep_scale", 1.0)

    def given(self, value, like):
        """A tensor that the pipeline gives the denoiser, in the shape that training gives it."""
        return value.expand_as(like)

    def unpacked(self, value):
        """What the pipeline calls latents, as (B, C, h, w)."""
        return value

    def answer(self, output):
        """D, (B, C, h, w), as the denoiser returns it, with a learned variance if it has one."""
        channels = self.family.denoiser.config.get("out_channels") or output.shape[1]
        return torch.cat([output, torch.full_like(output, 7.0)], 1) if channels == 2 * output.shape[1] else output


class DiTView(View):
    empty_first = False


class FluxView(View):
    guidance_off, guides = {}, False  # its `guidance_scale` is told to the denoiser

    def timesteps(self, call):
        return call["timestep"].double() * 1000

    def unpacked(self, value):
        return self.pipeline._unpack_latents(value, SIZE, SIZE, self.pipeline.vae_scale_factor)

    def answer(self, output):
        return self.pipeline._pack_latents(output, *output.shape)


class ZImageView(View):
    guidance_off, empty_first = {"guidance_scale": 0.0}, False

    def latents(self, call):
        return torch.stack([value for name, value in call.items() if name.startswith("x.")]).squeeze(2)

    def timesteps(self, call):
        return 1000 - call["t"].double() * 1000

    def answer(self, output):
        return list(-output.unsqueeze(2))


class SanaView(View):
    def captions(self, captions):
        return [caption for caption in captions if caption]  # the empty one is guidance's


class ErnieImageView(View):
    exact = False

    def captions(self, captions):
        return [caption for caption in captions if len(caption) < 15]  # it cuts none


class QwenImageView(View):
    guidance_off, empty_first, calls_a_step, exact = {"true_cfg_scale": 1.0}, False, 2, False

    def timesteps(self, call):
        return call["timestep"].double() * 1000

    def unpacked(self, value):
        return self.pipeline._unpack_latents(value, SIZE, SIZE, self.pipeline.vae_scale_factor).squeeze(2)

    def answer(self, output):
        return self.pipeline._pack_latents(output, *output.shape)


class Krea2View(QwenImageView):
    guidance_off, exact = {"guidance_scale": 0.0}, True

    def unpacked(self, value):
        return self.pipeline._unpack_latents(value, SIZE, SIZE).squeeze(2)


class Flux2View(FluxView):
    guidance_off = {"guidance_scale": 3.5}

    def unpacked(self, value):
        factor = 2 * self.pipeline.vae_scale_factor
        places = torch.empty(len(value), 1, SIZE // factor, SIZE // factor)
        return self.pipeline._unpack_latents_with_ids(value, self.pipeline._prepare_latent_ids(places))

    def answer(self, output):
        return self.pipeline._pack_latents(output)


class Flux2KleinView(Flux2View):
    guidance_off, guides, calls_a_step = {"guidance_scale": 1.0}, True, 2
    empty_first = False


class ChromaView(FluxView):
    guidance_off, guides, calls_a_step = {"guidance_scale": 1.0}, True, 2
    empty_first = False


class Lumina2View(SanaView):
    calls_a_step, empty_first = 2, False

    def timesteps(self, call):
        return 1000 - call["timestep"].double() * 1000

    def answer(self, output):
        return -output


class AuraFlowView(View):
    def timesteps(self, call):
        return call["timestep"].double() * 1000


class HiDreamView(View):
    guidance_off, exact = {"guidance_scale": 1.0}, False  # its Llama keeps its attention

    def timesteps(self, call):
        return call["timesteps"].double()

    def answer(self, output):
        return -output


class WanView(View):
    calls_a_step, empty_first = 2, False

    def call(self, call):
        timesteps = call["timestep"]
        return call | {"timestep": timesteps[:, 0] if timesteps.ndim == 2 else timesteps}  # one of each patch

    def timesteps(self, call):
        return self.call(call)["timestep"].double()

    def unpacked(self, value):
        return value.squeeze(2)

    def answer(self, output):
        return output.unsqueeze(2)


class HunyuanImageView(View):
    empty_first, calls_a_step, exact = False, 2, False

    @property
    def guidance_off(self):
        self.pipeline.guider.disable(), self.pipeline.ocr_guider.disable()  # its call takes no scale
        return {}

    def captions(self, captions):
        """With text to draw; shorter than what they are padded to, which training leaves out."""
        return [*captions[:2], "a sign, \"cats\" and 'dogs'"]

    def given(self, value, like):
        return (value[:, : like.shape[1]] if value.ndim > 1 else value).expand_as(like)


VIEWS = {
    "hidream-i1": HiDreamView,
    "wan": WanView,
    "hunyuan-image": HunyuanImageView,
    "krea-2": Krea2View,
    "sana": SanaView,
    "ernie-image": ErnieImageView,
    "qwen-image": QwenImageView,
    "dit": DiTView,
    "flux": FluxView,
    "z-image": ZImageView,
    "flux2": Flux2View,
    "flux2-klein": Flux2KleinView,
    "chroma": ChromaView,
    "lumina-2": Lumina2View,
    "auraflow": AuraFlowView,
}


def view_of(family):
    return VIEWS.get(family.name, View)(family)
