"""Latent perceptual loss for fine-tuning latent diffusion models.

>>> from lpl import LatentPerceptualLoss
>>> # loss_fn = LatentPerceptualLoss(vae); loss_fn(predicted_latents, latents) -> (B,)
"""

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
