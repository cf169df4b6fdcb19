"""LoRA over a base of 8 or 4 bits (--quantize_base), and half precision with a gradient scaler: both need a GPU.

The script runs in this process, on the GPU, on the tiny pipelines of the other tests. What the family's parts are when
the run ends is looked at directly; what the run wrote is loaded as a user would load it.
"""

import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from trainer import ROOT, arguments, metrics, reset_accelerate, weights

import train_text_to_image_lpl as script


DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: bitsandbytes' quantised models and fp16 do not train without"
)
pytest.importorskip("bitsandbytes")

BITS = {"8bit": ("Linear8bitLt", torch.int8), "4bit": ("Linear4bit", torch.uint8)}  # layers, and what they store
PIPELINES = ("sd3_pipeline", "flux_pipeline", "sdxl_pipeline")
FILE = "pytorch_lora_weights.safetensors"


class Run:
    """A run of the script, and what it trained."""

    def __init__(self, pipeline, images, output_dir, **flags):
        self.folder = output_dir
        self.answers = set()  # precisions in which quantised layers answer
        loaded, load_family = [], script.load_family

        def load(*args):
            family = load_family(*args)
            # peft gives them other names, but they stay the same objects
            self.base = [(parameter, parameter.detach().clone()) for parameter in family.denoiser.parameters()]
            for module in family.denoiser.modules():
                if type(module).__name__ in dict(BITS.values()):
                    module.register_forward_hook(lambda _, inputs, output: self.answers.add(output.dtype))
            loaded.append(family)
            return family

        defaults = {"max_train_steps": 3, "lpl_sigma_threshold": 1e6, "mixed_precision": "bf16"}
        argv = [str(ROOT / "train_text_to_image_lpl.py"), *arguments(pipeline, images, output_dir, **defaults | flags)]
        reset_accelerate()
        try:
            with (
                mock.patch.object(sys, "argv", argv),
                mock.patch.object(script, "load_family", load),
                mock.patch.object(script, "loss_curves"),  # they take longer than the training
            ):
                script.main()
        finally:
            reset_accelerate()
        (self.family,) = loaded

    @property
    def denoiser(self):
        return self.family.denoiser

    def weights(self):
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def adapters(self):
        return load_file(self.folder / FILE)


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("bits", BITS)
def test_trains_lora_over_a_quantised_base(bits, pipeline, image_folder, tmp_path):
    run = Run(
        pipeline,
        image_folder,
        tmp_path,
        rank=4,
        quantize_base=bits,
        gradient_checkpointing=True,
        use_ema=True,
        validation_prompts=["a cat"],
    )
    layer, stored = BITS[bits]
    adapted = [module.base_layer for module in run.denoiser.modules() if hasattr(module, "base_layer")]
    assert adapted and {type(module).__name__ for module in adapted} == {layer}
    assert {module.weight.dtype for module in adapted} == {stored}
    assert run.answers == {torch.bfloat16}  # float32 activations would take the memory that the bits save
    assert run.denoiser.device.type == DEVICE
    for parameter, before in run.base:
        assert not parameter.requires_grad and torch.equal(parameter, before)

    assert {parameter.dtype for parameter in run.weights()} == {torch.float32}
    assert all(math.isfinite(loss) and lpl > 0 for loss, lpl in metrics(tmp_path, "loss", "lpl"))
    saved = run.adapters()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    changed = [name for name, value in saved.items() if "lora_B" in name and value.abs().max() > 0]  # zero at first
    assert len(changed) > len(saved) / 4  # of all but the few that no gradient reaches, and those are halves of pairs
    sample = np.asarray(Image.open(tmp_path / "samples" / "step-000003" / "00.png"))
    assert sample.std() > 0  # one that is not a number becomes black


@pytest.mark.parametrize("bits", BITS)
def test_the_lora_loads_into_the_whole_pipeline(bits, pipeline, image_folder, tmp_path):
    Run(pipeline, image_folder, tmp_path, rank=4, quantize_base=bits, learning_rate=0.1)
    whole = DiffusionPipeline.from_pretrained(pipeline).to(DEVICE)
    before = drawn(whole)
    whole.load_lora_weights(str(tmp_path))
    after = drawn(whole)
    assert np.isfinite(after).all() and after.std() > 0
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_dora_over_a_quantised_base(bits, sdxl_pipeline, image_folder, tmp_path):
    run = Run(sdxl_pipeline, image_folder, tmp_path, rank=4, quantize_base=bits, use_dora=True)
    assert any("magnitude" in name for name in run.adapters())
    assert all(math.isfinite(loss) for (loss,) in metrics(tmp_path, "loss"))


def drawn(pipeline):
    """One image as numbers, always with the same noise."""
    return pipeline(
        "a cat",
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.mark.parametrize("bits", BITS)
def test_resumes(bits, sd3_pipeline, image_folder, tmp_path):
    flags = {"rank": 4, "quantize_base": bits, "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True}
    at_once = Run(sd3_pipeline, image_folder, tmp_path / "at_once", **flags).adapters()
    Run(sd3_pipeline, image_folder, tmp_path / "parts", **flags | {"max_train_steps": 2})
    resumed = Run(sd3_pipeline, image_folder, tmp_path / "parts", **flags, resume_from_checkpoint="latest")
    assert [record["step"] for record in metrics(resumed.folder)] == [1, 2, 3, 4]
    halfway = load_file(tmp_path / "parts" / "checkpoint-2" / "ema" / FILE)
    # Sums on a GPU come in no fixed order, so the two are only nearly the same.
    assert distance(at_once, resumed.adapters()) < 0.1 * distance(at_once, halfway)


def distance(first, second):
    assert first.keys() == second.keys()
    return sum(float((first[name] - second[name]).abs().sum()) for name in first)


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lora_in_half_precision(precision, bits, sdxl_pipeline, image_folder, tmp_path):
    """In fp16 a scaler unscales the gradients, which it refuses for parameters that are fp16 themselves; its first
    steps may overflow and be left out, hence more of them."""
    run = Run(
        sdxl_pipeline,
        image_folder,
        tmp_path,
        rank=4,
        quantize_base=bits,
        mixed_precision=precision,
        max_train_steps=12,
    )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {parameter.dtype for parameter in run.weights()} == {torch.float32}
    frozen = {p.dtype for p in run.denoiser.parameters() if not p.requires_grad and p.is_floating_point()}
    # Biases of 8-bit layers take on whatever precision their input had.
    assert half in frozen if bits == "8bit" else frozen == {half}
    assert all(math.isfinite(loss) for (loss,) in metrics(tmp_path, "loss"))
    saved = run.adapters()
    assert all(value.isfinite().all() for value in saved.values())
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_whole_training_in_half_precision(precision, pipeline, image_folder, tmp_path):
    run = Run(pipeline, image_folder, tmp_path, mixed_precision=precision, max_train_steps=12, learning_rate=1e-4)
    assert {parameter.dtype for parameter in run.weights()} == {torch.float32}
    assert all(math.isfinite(loss) for (loss,) in metrics(tmp_path, "loss"))
    before, after = weights(pipeline), weights(tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key[0].startswith(run.family.denoiser_name) for key in changed)
    assert all(after[key].isfinite().all() for key in changed)


@pytest.mark.parametrize("bits", BITS)
def test_dry_run(bits, flux_pipeline, image_folder, tmp_path, capsys):
    Run(flux_pipeline, image_folder, tmp_path / "output", rank=4, quantize_base=bits, dry_run=True)
    report = capsys.readouterr().out
    assert f"frozen in {bits.removesuffix('bit')} bits" in report and "x the peak memory" in report
    assert not (tmp_path / "output").exists()
