"""Loss masks: the part of each image that the losses look at.

Vocabulary. A mask m is (B, 1, H, W) in [0, 1] at the images' pixels: 1 (white) = train here, 0 (black) = not. u is
--unmasked_weight, the share of the loss that stays where the mask is black. *Pooled* is a mask averaged over the area
of each position of a smaller map.

Both losses have the same form, u times the loss of the whole image plus 1 - u times the loss of the masked part:

- L_diffusion: the mean over all positions of (u + (1 - u) m) times the squared error, with m pooled to the latents.
  It is not divided by the masked area, as in other trainers: an image with a small mask counts little.
- LPL, and the student: 1 - u times the mean over the positions that the outlier mask keeps and where the pooled mask
  is above one half, statistics of the normalisation included, plus u times the mean without the mask.

A mask that is 1 everywhere changes no bit of either. The outlier mask is found on the whole map. Nothing waits for a
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class LossMask(NamedTuple):
    """The masks of a batch.

    >>> import torch
    >>> mask = LossMask(torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 1, 4), unmasked_weight=0.2)
    >>> mask.region((1, 2)).tolist(), mask.weights((1, 2)).flatten().tolist()
    ([[[[True, False]]]], [1.0, 0.6000000238418579])
    """

    pixels: Tensor  # m, (B, 1, H, W)
    unmasked_weight: float = 0.0  # u

    def pooled(self, size: Sequence[int]) -> Tensor:
        """The mask at another resolution, height and width -> (B, 1, h, w)."""
        height, width = size
        return F.adaptive_avg_pool2d(self.pixels, (height, width))

    def weights(self, size: Sequence[int]) -> Tensor:
        """u + (1 - u) m, (B, 1, h, w); exactly 1 where m is."""
        return 1 - (1 - self.unmasked_weight) * (1 - self.pooled(size))

    def region(self, size: Sequence[int]) -> Tensor:
        """The positions that LPL looks at, bool, (B, 1, h, w)."""
        return self.pooled(size) > 0.5

    def rows(self, rows: Tensor | slice) -> LossMask:
        """The masks of some samples."""
        return self._replace(pixels=self.pixels[rows])

    def within(self, window: tuple[int, int, int, int], shape: Sequence[int]) -> LossMask:
        """The masks of a part of the images.

        Args:
            window: (top, left, height, width) in latent positions.
            shape: height and width of the latents.
        """
        top, left, height, width = window
        rows, columns = (size // whole for size, whole in zip(self.pixels.shape[-2:], shape))
        part = self.pixels[..., top * rows : (top + height) * rows, left * columns : (left + width) * columns]
        return self._replace(pixels=part)


def masked_mean(values: Tensor, mask: LossMask | None) -> Tensor:
    """The mean of each sample's values over the region, (B, C, h, w) -> (B,); 0 if the region is empty."""
    whole = values.flatten(1).mean(1)
    if mask is None:
        return whole
    region = mask.region(values.shape[-2:])
    share = values[0, 0].numel() / region.flatten(1).sum(1).clamp(min=1)  # exactly 1 if the region is the whole map
    return ((values * region).flatten(1).mean(1) * share).lerp(whole, mask.unmasked_weight)
