"""Kernels, compilation and memory layout: what is refused, and that the numbers stay."""

import shutil
import warnings

import pytest
import torch
from tiny import tiny_vae
from torch._dynamo.testing import CompileCounterWithBackend
from trainer import metrics, parsed, train, weights

from lpl import LatentPerceptualLoss, features
from lpl.training.updates import Updates


FLUX, SD = "flux_pipeline", "sd_pipeline"


@pytest.mark.parametrize(
    "pipeline, flags, said",
    [
        (FLUX, {"attention_backend": "flas"}, "--attention_backend flas: accepted are flash, flash_hub, "),
        (FLUX, {"attention_backend": "sage"}, "--attention_backend sage: it has no backward pass"),
        (FLUX, {"attention_backend": "_sage_qk_int8_pv_fp16_cuda"}, "it has no backward pass"),
        (FLUX, {"attention_backend": "xformers"}, "Please install `xformers"),
        (
            SD,
            {"torch_compile": True, "lpl_blocks": "decoder.up_blocks.1.resnets.0.conv1"},
            "--lpl_blocks decoder.up_blocks.1.resnets.0.conv1: --torch_compile compiles the part",
        ),
        (SD, {"attention_backend": "native"}, "the attention of UNet2DConditionModel has PyTorch's own kernel"),
    ],
)
def test_what_cannot_be_faster_is_refused_before_it_is_loaded(pipeline, flags, said, request, image_folder, tmp_path):
    with pytest.raises(ValueError) as error:
        parsed(request.getfixturevalue(pipeline), image_folder, tmp_path, **flags)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "pipeline, flags, said",
    [
        (
            FLUX,
            {},
            ["--channels_last changes the VAE only: FluxTransformer2DModel has no convolutions but those of pat"],
        ),
        ("sd3_pipeline", {}, ["--channels_last changes the VAE only: SD3Transformer2DModel has"]),
        ("sana_pipeline", {}, []),
        (SD, {}, []),
        (SD, {"use_8bit_adam": True}, ["--channels_last changes the VAE only: the optimizers of bitsandbytes"]),
        (SD, {"use_8bit_adam": True, "lora": True}, []),
    ],
)
def test_what_stays_contiguous_is_warned_of(pipeline, flags, said, request, image_folder, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parsed(request.getfixturevalue(pipeline), image_folder, tmp_path, channels_last=True, **flags)
    found = [str(item.message) for item in caught if "--channels_last" in str(item.message)]
    assert len(found) == len(said) and all(map(str.startswith, found, said))


def losses(pipeline, images, folder, **flags):
    return [entry["loss"] for entry in metrics(train(pipeline, images, folder, **flags))]


def test_another_kernel_gives_the_same_losses(flux_pipeline, image_folder, tmp_path, capsys):
    plain, other = (
        losses(flux_pipeline, image_folder, tmp_path / str(name), attention_backend=name, max_train_steps=3)
        for name in (None, "_native_math")
    )
    assert other == pytest.approx(plain, rel=1e-4)
    with pytest.raises(
        SystemExit, match="--attention_backend _native_cudnn: it cannot train here, with --mixed_precision no"
    ):
        train(flux_pipeline, image_folder, tmp_path / "cudnn", attention_backend="_native_cudnn")


def assert_alike(plain, compiled, count, rtol):
    """Value and gradient of two losses are the same for that many latents."""
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(count))
    predicted = [(latents * 0.9 + 0.1).requires_grad_() for _ in range(2)]
    values = [loss(given, latents) for loss, given in zip((plain, compiled), predicted, strict=True)]
    for value in values:
        value.sum().backward()
    torch.testing.assert_close(values[1], values[0], rtol=rtol, atol=0)
    largest = predicted[0].grad.abs().max()
    torch.testing.assert_close(predicted[1].grad, predicted[0].grad, rtol=0, atol=rtol * float(largest))


@pytest.mark.slow
def test_the_decoder_is_compiled_for_a_few_sizes_and_gives_the_same_loss(monkeypatch):
    """What is padded changes neither the loss nor its gradient, but for the order of sums."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(features, "BACKEND", counter)
    torch._dynamo.reset()
    vae = tiny_vae()
    plain, compiled = LatentPerceptualLoss(vae), LatentPerceptualLoss(vae, compile_for=6)
    sizes = (1, 3, 4, 5, 6)
    assert [compiled.extractor.padded_size(count) for count in (*sizes, 7)] == [1, 4, 4, 6, 6, 7]
    graphs = []
    for count in sizes:
        assert_alike(plain, compiled, count, 1e-5)
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0] * times for times in (1, 2, 2, 3, 3)]


@pytest.mark.slow  # a C++ compiler takes seconds for each kernel
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_real_compiler_gives_the_same_loss():
    torch._dynamo.reset()
    vae = tiny_vae()
    plain, compiled = LatentPerceptualLoss(vae, ["mid"]), LatentPerceptualLoss(vae, ["mid"], compile_for=2)
    assert_alike(plain, compiled, 2, 1e-4)


@pytest.mark.parametrize(
    "flags",
    [{"use_ema": True}, pytest.param({"lora": True, "gradient_checkpointing": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_compiled_run_gives_the_same_losses_and_files(flags, sd_pipeline, image_folder, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(features, "BACKEND", counter)
    flags = flags | {"train_batch_size": 4, "checkpointing_steps": 1, "validation_prompts": "a cat"}
    plain = train(sd_pipeline, image_folder, tmp_path / "plain", **flags)
    assert counter.frame_count == 0
    other = train(sd_pipeline, image_folder, tmp_path / "compiled", **flags, torch_compile=True)
    assert counter.frame_count > 0
    expected, found = ([entry["loss"] for entry in metrics(folder)] for folder in (plain, other))
    assert found == pytest.approx(expected, rel=1e-3)
    for name in ("checkpoint-2", "." if "lora" in flags else "unet"):
        assert weights(other / name).keys() == weights(plain / name).keys()
    again = flags | {"max_train_steps": 3, "resume_from_checkpoint": "latest", "torch_compile": True}
    assert len(metrics(train(sd_pipeline, image_folder, other, **again))) == 3


@pytest.mark.parametrize(
    "flags",
    [
        {"use_ema": True, "lpl_vae_dtype": "bfloat16"},
        {"lora": True, "lora_target_modules": ["conv1", "conv2"], "gradient_checkpointing": True},
    ],
    ids=["full", "lora"],
)
def test_channels_last_gives_the_same_losses_and_files_and_resumes_exactly(
    flags, sd_pipeline, image_folder, tmp_path, monkeypatch
):
    original, laid_out = Updates.step, []

    def step(updates):  # fused kernels go through weight, gradient and state in the order of memory
        for weight in updates.parameters:
            state = (value for value in updates.optimizer.state.get(weight, {}).values() if value.ndim)
            assert {tensor.stride() for tensor in (weight.grad, *state)} <= {weight.stride()}
        laid_out.append(sum(not weight.is_contiguous() for weight in updates.parameters))
        original(updates)

    monkeypatch.setattr(Updates, "step", step)
    flags = flags | {"max_train_steps": 4, "checkpointing_steps": 2}
    plain = train(sd_pipeline, image_folder, tmp_path / "plain", **flags)
    assert laid_out == [0] * 4
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **flags, channels_last=True)
    assert min(laid_out[4:]) > 0
    expected, found = ([entry["loss"] for entry in metrics(folder)] for folder in (plain, whole))
    assert found == pytest.approx(expected, rel=1e-3)
    result = "." if "lora" in flags else "unet"
    torch.testing.assert_close(weights(whole / result), weights(plain / result), rtol=1e-2, atol=1e-3)
    halves = flags | {"max_train_steps": 2, "channels_last": True}
    train(sd_pipeline, image_folder, tmp_path / "halves", **halves)
    again = train(
        sd_pipeline,
        image_folder,
        tmp_path / "halves",
        **flags,
        channels_last=True,
        resume_from_checkpoint="latest",
    )
    resumed = weights(again / result)
    assert all(torch.equal(value, resumed[name]) for name, value in weights(whole / result).items())
