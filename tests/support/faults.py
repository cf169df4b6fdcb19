"""Mistakes that cost a wait or an error on a GPU only, put into the program on purpose: each is a context."""

from unittest import mock

import torch
from torch.utils.data import DataLoader

import train_text_to_image_lpl as script
from lpl.gate import rows_inside
from lpl.objectives import DiffusionObjective
from lpl.outliers import outlier_mask


def _mask_read_on_the_host(*args, **kwargs):
    keep = outlier_mask(*args, **kwargs)
    return keep if bool(keep.any()) else torch.ones_like(keep)


def _tensor_without_device(objective, timesteps, *options):
    return torch.ones(len(timesteps))


def _gate_on_the_gpu(sigma, threshold):
    return rows_inside(sigma.to("cuda", non_blocking=True), threshold).cpu()


def _blocking_copies(tensors, device):
    return {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def _loader_that_does_not_pin(*args, **options):
    return DataLoader(*args, **options | {"pin_memory": False})


FAULTS = {
    "mask read on the host": lambda: mock.patch("lpl.loss.outlier_mask", _mask_read_on_the_host),
    "tensor without device": lambda: mock.patch.object(DiffusionObjective, "weight", _tensor_without_device),
    "gate on the GPU": lambda: mock.patch.object(script, "rows_inside", _gate_on_the_gpu),
    "blocking copies": lambda: mock.patch("lpl.families.tokens.on_device", _blocking_copies),
    "loader that does not pin": lambda: mock.patch("lpl.data.loader.DataLoader", _loader_that_does_not_pin),
}
