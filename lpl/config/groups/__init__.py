"""Every flag of the training script, declared once; names, meanings and defaults are those of diffusers' scripts.

Where diffusers' scripts differ, ``train_text_to_image.py`` decides. Many defaults of None are filled in later from the
pipeline (:func:`lpl.families.resolve.resolve`). Functions take the groups that they read, not the whole configuration.
"""

from lpl.config.groups.data import Data, Part, naming
from lpl.config.groups.lora import Lora
from lpl.config.groups.losses import Diffusion, Lpl
from lpl.config.groups.model import Model
from lpl.config.groups.optimization import Optimization
from lpl.config.groups.output import Output
from lpl.config.groups.validation import Evaluation, Validation


__all__ = [
    "Data",
    "Diffusion",
    "Evaluation",
    "Lora",
    "Lpl",
    "Model",
    "Optimization",
    "Output",
    "Part",
    "Validation",
    "naming",
]
