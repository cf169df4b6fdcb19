"""What a run leaves: a pipeline that samples by itself, or a LoRA that one loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError

from lpl.config.groups import Model
from lpl.families.components import copy_component, copy_model, model_folder
from lpl.families.description import Description, read_pipeline
from lpl.tools import layout
from lpl.tools.files import filled_whole, write_text
from lpl.tools.results import last_samples
from lpl.tools.words import first_line, warn
from lpl.training.average import MovingAverage, averaged
from lpl.training.loading import replaced_components
from lpl.training.lora import save_for_other_programs
from lpl.training.parts import TrainedParts
from lpl.training.single_file import write_single_file
from lpl.training.start import Run


@dataclass
class Result:
    """The result with the present weights, the moving average's if there is one.

    Args:
        describe: adds metadata to the file of a LoRA.
        single_file: precision of the pipeline as one file; None: there is none.
        scheduler: what the result samples with.
        classes: names of a class-conditional model's classes, by label.
    """

    run: Run
    describe: Callable[[Path], None]
    model: Model
    description: Description
    trained: TrainedParts
    average: MovingAverage | None
    scheduler: Any
    classes: Mapping[int, str]
    single_file: str | None = None

    @property
    def folder(self) -> Path:
        return self.run.folder

    def write(self) -> None:
        """Write the result into the output folder; on the main process."""
        with averaged(self.average, self.trained), filled_whole(self.folder) as folder:
            self.trained.save(folder)  # first, so that nothing that follows can lose it
        with filled_whole(self.folder) as folder:
            self.save(folder)
        if self.single_file and not self.trained.lora:
            self._write_single_file()

    def _write_single_file(self) -> None:
        """Write the pipeline, which is whole by now, as one file; a failure leaves none."""
        path = self.folder / (self.folder.resolve().name + layout.SINGLE_FILE)
        try:
            description = read_pipeline(Model(pretrained_model_name_or_path=str(self.folder)))
            write_single_file(description, self.folder, path, self.single_file)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            path.unlink(missing_ok=True)  # of an earlier step
            warn(f"{path.name} could not be written ({first_line(error)}); the pipeline in the folder is whole")

    def save(self, folder: Path) -> None:
        """Write the result into an empty folder."""
        with averaged(self.average, self.trained):
            self._save_lora(folder) if self.trained.lora else self._save_pipeline(folder)

    @property
    def _changed(self) -> dict[str, Any]:
        """Components that the run has replaced."""
        return {"scheduler": self.scheduler} if self.scheduler is not self.description.scheduler else {}

    @property
    def _replaced_folder(self) -> Path | None:
        """Where the files of --pretrained_vae_model_name_or_path are."""
        path = self.model.pretrained_vae_model_name_or_path
        return model_folder(path, self.model.cache_dir) if path else None

    def _save_lora(self, folder: Path) -> None:
        self.trained.save(folder)
        name = self.folder.resolve().name
        others = save_for_other_programs(self.description.family.lora_layout, folder, self.trained.models, name)
        for path in sorted(folder.rglob("*.safetensors")):
            self.describe(path)
        samples = last_samples(self.folder, self.run.step)
        if others is not None and samples is not None:
            shutil.copyfile(samples / "00.png", folder / (name + layout.OTHERS_PREVIEW))
        for name, component in self._changed.items():
            component.save_pretrained(folder / name)

    def _save_pipeline(self, folder: Path) -> None:
        """What is new is saved; all other parts are the base's own files."""
        family, index = self.trained.family, dict(self.description.index)
        replaced = replaced_components(self.model)  # the run's own VAE may have lost its encoder to --cache_latents
        new: dict[str, Any] = self._changed | self.trained.models | replaced
        for name, component in new.items():
            if name in replaced and (source := self._replaced_folder):
                copy_model(source, folder / name)
            else:
                component.save_pretrained(folder / name)
            index[name] = [type(component).__module__.partition(".")[0], type(component).__name__]
        for name in self.description.listed:
            if name not in new:
                copy_component(family.folder / name, folder / name, self.model.variant)
        index |= dict.fromkeys(self.description.absent, [None, None])
        index |= {"_diffusers_version": diffusers.__version__}
        if self.classes:
            index["id2label"] = {str(label): name for label, name in sorted(self.classes.items())}
        left = ("_name_or_path", "_ignore_files")
        index = {name: value for name, value in index.items() if name not in left}
        write_text(folder / layout.INDEX, json.dumps(index, indent=2) + "\n")
