"""What can be trained: one file per model family, found by the class name in a pipeline's ``model_index.json``.

``base.py`` is what the trainer asks of a family, ``description.py`` reads a pipeline's small configuration files,
``fit.py`` compares the components' numbers, ``resolve.py`` completes or refuses a configuration. ``derived.py`` makes
one pipeline of a single file (``checkpoint_files.py``), another denoiser and merged LoRA (``lora_files.py``). For
other programs, ``lora_layout.py`` names the layers of LoRA, ``single_file.py`` those of a whole model, and
``architecture.py`` the model.
May import: the paper (``lpl/*.py``), ``lpl.config``, ``lpl.tools``. A new family is one file here and its line in
``FAMILIES``, a tiny pipeline in ``tests/support/tiny.py`` and a recipe. Tests: ``tests/families``.
"""

from __future__ import annotations

from lpl.families.aura_flow import AuraFlow
from lpl.families.base import Conditions, Family
from lpl.families.chroma import Chroma
from lpl.families.dit import DiT
from lpl.families.ernie_image import ErnieImage
from lpl.families.flux import Flux
from lpl.families.flux2 import Flux2, Flux2Klein
from lpl.families.hidream import HiDream
from lpl.families.hunyuan_image import HunyuanImage
from lpl.families.kolors import Kolors
from lpl.families.krea2 import Krea2
from lpl.families.lumina2 import Lumina2
from lpl.families.pixart import PixArtAlpha, PixArtSigma
from lpl.families.qwen_image import QwenImage
from lpl.families.sana import Sana
from lpl.families.sd import StableDiffusion
from lpl.families.sd3 import StableDiffusion3
from lpl.families.sdxl import StableDiffusionXL
from lpl.families.wan import Wan
from lpl.families.z_image import ZImage


FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    PixArtAlpha,
    PixArtSigma,
    DiT,
    Flux,
    Sana,
    ZImage,
    QwenImage,
    ErnieImage,
    Krea2,
    Flux2Klein,
    Flux2,
    Chroma,
    Lumina2,
    AuraFlow,
    HiDream,
    Wan,
    Kolors,
    HunyuanImage,
)


def find_family(pipeline_class_name: str | None, what: str = "--pretrained_model_name_or_path") -> type[Family]:
    """The family whose pipeline has that class name.

    Args:
        what: the flag that gives the pipeline, and its value.

    Raises:
        ValueError: if no family has it.
    """
    for family in FAMILIES:
        if family.pipeline_class.__name__ == pipeline_class_name:
            return family
    known = ", ".join(f"{family.pipeline_class.__name__} ({family.name})" for family in FAMILIES)
    raise ValueError(f"{what}: the pipeline's class is {pipeline_class_name}; supported are {known}")


__all__ = ["FAMILIES", "Conditions", "Family", "find_family"]
