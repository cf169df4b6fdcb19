"""Flags: what is trained, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from lpl.config import rules
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, REFUSED, flag, own_flag
from lpl.options import OBJECTIVE_NAMES


@dataclass(frozen=True)
class Model:
    """model"""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "pipeline to fine-tune: a local folder, a Hub id, or a single file, local or ORG/REPO/FILE.safetensors",
        public=rules.model_on_the_hub,
        path=True,
    )
    revision: str | None = flag(
        None, "branch, tag or commit of the pipeline on the Hub", public=rules.is_revision, used=rules.from_the_hub
    )
    variant: str | None = flag(None, "variant of the weight files, e.g. fp16", public=rules.is_word)
    non_ema_revision: str | None = flag(
        None,
        "Hub revision of the pipeline with non-EMA denoiser weights, to start training from",
        public=rules.is_revision,
        used=rules.from_the_hub,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "VAE to encode and decode with instead of the pipeline's: a local folder or a Hub id",
        public=rules.on_the_hub,
        path=True,
    )
    single_file_config: str | None = flag(
        None,
        "for a single file: folder or Hub id of a pipeline with its configuration, tokenizers and the components that "
        "it lacks; default: the one on the Hub that diffusers takes",
        public=rules.on_the_hub,
        path=True,
        used=rules.from_a_file,
    )
    denoiser_model_name_or_path: str | None = flag(
        None,
        "denoiser to train instead of the pipeline's: a folder with a config.json, a Hub id, or a single file",
        public=rules.model_on_the_hub,
        path=True,
    )
    merge_lora: tuple[str, ...] | None = flag(
        None,
        "LoRA to merge into the pipeline before the training, each FILE or FILE:STRENGTH; also folders and Hub ids",
        public=rules.all_on_the_hub,
        path=True,
    )
    cache_dir: str | None = own_flag(None, "folder for downloaded models and data sets", path=True)
    from_scratch: bool = flag(False, "start the denoiser from random weights instead of the pipeline's")
    train_text_encoder: bool = flag(
        False, "also train the CLIP text encoders, with the learning rate --text_encoder_lr", on_resume=REFUSED
    )
    max_sequence_length: int | None = flag(
        None,
        "maximum number of tokens per caption for T5 and Gemma text encoders; default: the family's",
        range=POSITIVE,
    )
    guidance_scale: float = flag(3.5, "guidance value passed to Flux's denoiser in training", range=NOT_NEGATIVE)
    prediction_type: str | None = flag(
        None,
        "training objective of the denoiser; default: the pipeline's own",
        choices=OBJECTIVE_NAMES,
        on_resume=REFUSED,
    )

    folder: str | None = None  # no flag: of the pipeline that these flags make, see lpl.families.derived

    @property
    def pipeline(self) -> str:
        """Folder or Hub id of the pipeline that is loaded; available after the checks."""
        return self.folder or self.source

    @property
    def source(self) -> str:
        """What the user has named as the pipeline; available after the checks."""
        assert self.pretrained_model_name_or_path is not None
        return self.pretrained_model_name_or_path

    @property
    def merged(self) -> list[tuple[str, float]]:
        """The LoRA of --merge_lora and their strengths."""
        return [rules.source_and_strength(word) for word in self.merge_lora or ()]

    @property
    def objective(self) -> str:
        """Name of the objective; available after ``resolve``."""
        assert self.prediction_type is not None
        return self.prediction_type
