"""Loss masks: the part of each image that the losses look at.

Vocabulary. A mask m is (B, 1, H, W) in [0, 1] at the images' pixels: 1 (white) = train here, 0 (black) = not. u is
--unmasked_weight, the share of the loss that stays where the mask is black. *Pooled* is a mask averaged over the area
of each position of a smaller map.

Both losses have the same form, u times the loss of the whole image plus 1 - u times the loss of the masked part:

- L_diffusion: 1 - u times the mean of the squared error over the mask pooled to the latents, whatever its area, plus u
  times the mean without the mask.
- LPL, and the student: 1 - u times the mean over the positions that the outlier mask keeps and where the pooled mask
  is above one half, statistics of the normalisation included, plus u times the mean without the mask.

A mask that is 1 everywhere changes no bit of the diffusion loss and LPL. The outlier mask is found on the whole map.
Nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


SMALLEST = 1e-6  # positions; less than one faint pixel of a mask


class LossMask(NamedTuple):
    """The masks of a batch.

    >>> import torch
    >>> mask = LossMask(torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 1, 4), unmasked_weight=0.2)
    >>> mask.region((1, 2)).tolist(), mask.pooled((1, 2)).flatten().tolist()
    ([[[[True, False]]]], [1.0, 0.5])
    """

    pixels: Tensor  # m, (B, 1, H, W)
    unmasked_weight: float = 0.0  # u

    def pooled(self, size: Sequence[int]) -> Tensor:
        """The mask at another resolution, height and width -> (B, 1, h, w)."""
        height, width = size
        return F.adaptive_avg_pool2d(self.pixels, (height, width))

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


def pooled_mean(values: Tensor, mask: LossMask | None) -> Tensor:
    """The mean of each sample's values over the pooled mask, mixed with that over all positions as u says.

    (B, C, h, w) -> (B,); if the mask is black, only u's part is left.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    part = mask.pooled(values.shape[-2:])
    share = values[0, 0].numel() / part.sum((1, 2, 3), keepdim=True).clamp(min=SMALLEST)  # 1 / the part's area
    weights = 1 - (1 - mask.unmasked_weight) * (1 - share * part)  # exactly 1 if the part is the whole map
    return (values * weights).flatten(1).mean(1)
