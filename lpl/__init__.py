"""Latent perceptual loss for fine-tuning latent diffusion models.

>>> from lpl import LatentPerceptualLoss
>>> # loss_fn = LatentPerceptualLoss(vae); loss_fn(predicted_latents, latents) -> (B,)

The files in this folder implement the paper and need only torch, diffusers and numpy; the folders are the trainer.
Names are imported on first use, so that a command line can be checked before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lpl.features import DecoderFeatureExtractor
    from lpl.loss import LatentPerceptualLoss
    from lpl.objectives import get_objective, training_scheduler
    from lpl.outliers import outlier_mask


__version__ = "0.1.0"

__all__ = [
    "DecoderFeatureExtractor",
    "LatentPerceptualLoss",
    "get_objective",
    "outlier_mask",
    "training_scheduler",
]
_FILES = {
    "DecoderFeatureExtractor": "lpl.features",
    "LatentPerceptualLoss": "lpl.loss",
    "get_objective": "lpl.objectives",
    "outlier_mask": "lpl.outliers",
    "training_scheduler": "lpl.objectives",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FILES[name]), name)
