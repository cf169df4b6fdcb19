"""What a run leaves: a pipeline that samples by itself, or a LoRA that one loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl.config.groups import Model
from lpl.families.description import Description
from lpl.tools.files import filled_whole
from lpl.training.average import MovingAverage, averaged
from lpl.training.loading import pipeline_source, replaced_components
from lpl.training.lora import save_for_other_programs
from lpl.training.parts import TrainedParts


@dataclass
class Result:
    """The result with the present weights, the moving average's if there is one.

    Args:
        folder: the run's output folder.
        scheduler: what the result samples with.
        classes: names of a class-conditional model's classes, by label.
    """

    folder: Path
    model: Model
    description: Description
    trained: TrainedParts
    average: MovingAverage | None
    scheduler: Any
    classes: Mapping[int, str]

    def write(self) -> None:
        """Write the result into the output folder; on the main process."""
        with averaged(self.average, self.trained), filled_whole(self.folder) as folder:
            self.trained.save(folder)  # first, so that nothing that follows can lose it
        with filled_whole(self.folder) as folder:
            self.save(folder)

    def save(self, folder: Path) -> None:
        """Write the result into an empty folder."""
        with averaged(self.average, self.trained):
            self._save_lora(folder) if self.trained.lora else self._save_pipeline(folder)

    @property
    def _changed(self) -> dict[str, Any]:
        """Components that the run has replaced."""
        return {"scheduler": self.scheduler} if self.scheduler is not self.description.scheduler else {}

    def _save_lora(self, folder: Path) -> None:
        self.trained.save(folder)
        save_for_other_programs(
            self.description.family.lora_layout, folder, self.trained.models, self.folder.resolve().name
        )
        for name, component in self._changed.items():
            component.save_pretrained(folder / name)

    def _save_pipeline(self, folder: Path) -> None:
        # The frozen parts as they were shipped, not as this run cast them.
        components = self._changed | replaced_components(self.model) | self.trained.models
        source = pipeline_source(self.model, self.description) | components
        pipeline_class = self.description.family.pipeline_class
        pipeline = pipeline_class.from_pretrained(self.model.pipeline, **source)
        if self.classes:  # which the pipeline reads from its index, but would not write there
            names = {str(label): name for label, name in sorted(self.classes.items())}
            pipeline.register_to_config(id2label=names)
        pipeline.save_pretrained(folder)
