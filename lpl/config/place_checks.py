"""Checks of the paths that flags name: that each can be looked up, and is a file or a folder where one is needed."""

from __future__ import annotations

import os
import reprlib
import stat
from pathlib import Path

from lpl.config.config import FLAGS, Config
from lpl.tools.words import why_no_folder


MAY_BE_FILES = (
    *("config", "pretrained_model_name_or_path", "denoiser_model_name_or_path"),
    *("lora_init", "merge_lora", "training_adapter", "validation_prompts_file"),
)


def check_places(config: Config) -> None:
    for name, value in config.values().items():
        if FLAGS[name].path:
            for place in value if isinstance(value, tuple) else (value,):
                check_place(name, place)


def check_place(name: str, place: str | None) -> None:
    """Refuse an empty path, one that cannot be looked up (too long, or its folder may not be read), and a file."""
    if place == "":
        raise ValueError(f"--{name}: the path is empty; give one, or leave the flag out")
    try:
        file = not stat.S_ISDIR(os.stat(place or ".").st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass  # not a local path
    except OSError as error:
        raise ValueError(f"--{name} {reprlib.repr(place)}: {error.strerror}") from error
    else:
        if file and name not in MAY_BE_FILES:
            why = why_no_data if name in ("train_data_dir", "dataset_name") else why_no_folder
            raise ValueError(f"--{name} {place}: {why(str(place))}")


def why_no_data(path: str) -> str | None:
    if Path(path).is_file() and Path(path).suffix.lower() in (".parquet", ".tar"):
        return "this is a file; give its folder"
    return why_no_folder(path)
