"""Kernels, compilation and memory layout: what is refused, and that the numbers stay."""

import pytest
from trainer import metrics, parsed, train


FLUX, SD = "flux_pipeline", "sd_pipeline"


@pytest.mark.parametrize(
    "pipeline, flags, said",
    [
        (FLUX, {"attention_backend": "flas"}, "--attention_backend flas: accepted are flash, flash_hub, "),
        (FLUX, {"attention_backend": "sage"}, "--attention_backend sage: it has no backward pass"),
        (FLUX, {"attention_backend": "_sage_qk_int8_pv_fp16_cuda"}, "it has no backward pass"),
        (FLUX, {"attention_backend": "xformers"}, "Please install `xformers"),
        (SD, {"attention_backend": "native"}, "the attention of UNet2DConditionModel has PyTorch's own kernel"),
    ],
)
def test_what_cannot_be_faster_is_refused_before_it_is_loaded(pipeline, flags, said, request, image_folder, tmp_path):
    with pytest.raises(ValueError) as error:
        parsed(request.getfixturevalue(pipeline), image_folder, tmp_path, **flags)
    assert said in str(error.value)


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
