"""Where a training loop may wait for the GPU: functions, as ``module:function``, and why. docs/gpu.md lists them.

Of this project, only what takes the place of more waits in a library runs in each step; it covers what is called
within. A library's function covers its own lines only.
"""

import importlib
from contextlib import ExitStack, contextmanager
from functools import reduce, wraps
from unittest import mock

import torch


KNOWN = {
    # at logging steps
    "lpl.training.log:Log.write": "at logging steps: the means are read",
    "lpl.training.skipped_steps:SkippedSteps.write": "at logging steps: the skipped steps are read",
    "lpl.training.updates:Updates.learning_rate": "at logging steps: the learning rate is read",
    # at checkpoints and validations
    "lpl.training.log:Log.state": "at checkpoints: the sums are saved",
    "lpl.training.log:Log.paused": "at checkpoints and validations: the clock stops when the steps are done",
    # once in a run
    "lpl.weighting:LplWeight.any_inside": "once, when the measuring of the weight ends",
    "lpl.weighting:LplWeight.report": "once, when the measuring of the weight ends",
    "lpl.weighting:LplWeight.facts": "once, when the measuring of the weight ends: the recipe has the weight",
    "lpl.objectives:DiffusionObjective.coefficients": "in the first step: the noise schedule is copied to the GPU",
    "lpl.families.base:tables_on_device": "in the first step: the tables of positions are copied to the GPU",
    "lpl.autoencoders:_affine": "in the first step: some VAEs' mean and deviation of latents are copied to the GPU",
    "diffusers.models.transformers.transformer_qwenimage:QwenEmbedRope._get_device_freqs": (
        "in the first step: Qwen-Image's tables of positions are copied to the GPU"
    ),
    # in each step
    "lpl.families.hidream:rows_of_each": (
        "in each step: HiDream's layers with experts read how many tokens ask each, once a layer"
    ),
    # in each step, by libraries
    "diffusers.pipelines.flux.pipeline_flux:FluxPipeline.encode_prompt": (
        "in each step: the pipeline makes the positions of the text, 3 numbers a token, on the CPU"
    ),
    "diffusers.pipelines.sana.pipeline_sana:SanaPipeline.encode_prompt": (
        "in each step: the pipeline selects tokens by a Python list, which is copied to the GPU"
    ),
    "diffusers.models.transformers.transformer_chroma:ChromaCombinedTimestepTextProjEmbeddings.forward": (
        "in each step: the transformer makes its guidance, which is always 0, on the CPU"
    ),
    "diffusers.models.transformers.transformer_hidream_image:HiDreamImageTransformer2DModel.patchify": (
        "in each step: the transformer copies the size of the image, two numbers"
    ),
    "diffusers.models.transformers.transformer_qwenimage:compute_text_seq_len_from_mask": (
        "in each step with captions of several lengths: Qwen-Image's transformer copies one number"
    ),
    "transformers.cache_utils:DynamicSlidingWindowLayer.lazy_initialization": (
        "in each step: Gemma makes a cache that nothing uses, and copies a number for each layer with a window"
    ),
}


def is_known(frames):
    """Whether a wait is in the list, by the functions on its stack, the innermost first."""
    own = any(frame in KNOWN for frame in frames if frame.startswith("lpl."))
    return own or bool(frames and frames[0] in KNOWN)


def resolved(name):
    """The owner of a function, its attribute's name, and the function."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    return owner, attribute, vars(owner)[attribute]


@contextmanager
def exempt():
    """Within, the known functions may wait under ``torch.cuda.set_sync_debug_mode("error")``."""
    with ExitStack() as stack:
        for name in KNOWN:
            owner, attribute, function = resolved(name)
            if isinstance(function, property):
                without_check = property(_without_check(function.fget))
            else:
                without_check = _without_check(function)
            stack.enter_context(mock.patch.object(owner, attribute, without_check))
        yield


def _without_check(function):
    @wraps(function)
    def call(*args, **kwargs):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    return call
