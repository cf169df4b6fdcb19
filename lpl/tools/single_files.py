"""Whether a model is named by a single file, from names alone.

A *single file* is a ``.safetensors`` of the original programs, local or on the Hub, or a folder that holds only one.
"""

from __future__ import annotations

from pathlib import Path

from lpl.tools import layout
from lpl.tools.privacy import hub_file


PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def single_file(source: str) -> str | None:
    """The file that a source is: itself, or the only one of a folder that is no pipeline; None if it is no file.

    Raises:
        ValueError: for a folder with several such files.
    """
    place = Path(source)
    if not place.is_dir():
        return source if place.is_file() or hub_file(source) else None
    files = sorted(place.glob("*.safetensors"))
    if not files or files[0].name == layout.LORA or list(place.glob("*.json")) or list(place.glob("*/*.json")):
        return None
    if len(files) > 1:
        raise ValueError(f"this folder has several files, no model_index.json; give one of them, {files[0]} perhaps")
    return str(files[0])


def why_no_file(path: str) -> str | None:
    """Why a file, by its name, is no checkpoint, and what to give instead; None if it may be one."""
    suffix = Path(path).suffix.lower()
    if suffix in PICKLES:
        return (
            "this is a pickle, which can run any code when it is read; give the model's .safetensors file or, if you "
            "trust this one, convert it once with from_single_file and save_pretrained of diffusers"
        )
    if suffix == ".gguf":
        return "its weights are quantised (GGUF), which cannot be trained; give the .safetensors file in 16 or 32 bits"
    return None if suffix == ".safetensors" else "this is no checkpoint; give a .safetensors file, or a pipeline"
