"""The configuration files of a pipeline, and of the VAE that replaces its own."""

import json
import shutil

import pytest
from commands import cases, edited, refusal
from tiny import tiny_vae
from trainer import arguments, parsed

from lpl.families import FAMILIES, resolve
from lpl.families.sd import StableDiffusion


OF_FACTOR_2 = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}

NOWHERE = cases(
    (
        {"pretrained_model_name_or_path": "no/where"},
        ["--pretrained_model_name_or_path no/where", "no pipeline of that"],
    ),
    ({"lpl_vae_name_or_path": "no/where"}, ["--lpl_vae_name_or_path no/where"]),
    ({"pretrained_vae_model_name_or_path": "no/where"}, ["--pretrained_vae_model_name_or_path no/where"]),
)


@pytest.mark.parametrize("flags, words", NOWHERE)
def test_nothing_is_there(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


def test_an_unknown_family(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    kandinsky = edited(sd_pipeline, tmp_path / "pipeline", None, _class_name="KandinskyPipeline")
    message = refusal(capsys, arguments(kandinsky, image_folder, tmp_path / "out"))
    supported = [family.pipeline_class.__name__ for family in FAMILIES]
    assert all(word in message for word in ("--pretrained_model_name_or_path", "KandinskyPipeline", *supported))


def test_an_unknown_scheduler(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, scheduler=["diffusers", "MyScheduler"])
    assert "MyScheduler" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))


EDM = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "sigma_data": 0.5}


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"]
)
@pytest.mark.filterwarnings("ignore:.*--prediction_type")
def test_a_scheduler_without_betas(name, sdxl_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sdxl_pipeline, tmp_path / "pipeline", None, scheduler=["diffusers", name])
    config = json.dumps({"_class_name": name} | EDM)
    (pipeline / "scheduler/scheduler_config.json").write_text(config)
    for flags in ({}, {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}):
        message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out", **flags))
        assert all(words in message for words in (name, "EDM", "--prediction_type flow_matching"))
    parsed(pipeline, image_folder, tmp_path / "out", prediction_type="flow_matching")


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
def test_an_incomplete_pipeline(part, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "pipeline")
    shutil.rmtree(pipeline / part)
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert part in message and "--pretrained_model_name_or_path" in message


def test_what_is_read_of_a_pipeline(sd_pipeline, sd3_without_t5, image_folder, tmp_path):
    _, sd = parsed(sd_pipeline, image_folder, tmp_path)
    assert sd.family.name == "stable-diffusion" and sd.index["_class_name"] == "StableDiffusionPipeline"
    assert sd.parts == {"vae": sd.vae, "unet": sd.denoiser} and sd.denoiser["_class_name"] == "UNet2DConditionModel"
    _, sd3 = parsed(sd3_without_t5, image_folder, tmp_path)
    assert {"text_encoder_3", "tokenizer_3"} <= set(sd3.absent) and "text_encoder" not in sd3.absent


def test_an_autoencoder_of_another_make(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "vae", _class_name="ConsistencyDecoderVAE")
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "the pipeline's VAE" in message and "ConsistencyDecoderVAE" in message and "AutoencoderKL" in message
    for flag in ("lpl_vae_name_or_path", "pretrained_vae_model_name_or_path"):
        words = arguments(sd_pipeline, image_folder, tmp_path / "out", **{flag: pipeline / "vae"})
        message = refusal(capsys, words)
        assert f"--{flag}" in message and "ConsistencyDecoderVAE" in message


@pytest.mark.parametrize("where", ["pipeline", "lpl_vae_name_or_path"])
def test_modules_of_an_autoencoder_of_another_make_are_named_by_path(
    where, sd_pipeline, image_folder, tmp_path, capsys, monkeypatch, no_weights
):
    """As if the pipeline's VAE were of an unknown class."""
    if where == "pipeline":
        monkeypatch.setattr(StableDiffusion, "vaes", ())
    else:
        monkeypatch.setattr(resolve, "SUPPORTED", ())
    flags = {} if where == "pipeline" else {where: sd_pipeline / "vae"}
    words = arguments(sd_pipeline, image_folder, tmp_path, **flags)
    assert "path in --lpl_blocks" in refusal(capsys, words)
    parsed(sd_pipeline, image_folder, tmp_path, **flags, lpl_blocks=["decoder.mid_block", "decoder.up_blocks.0"])
    message = refusal(capsys, [*words, "--lpl_blocks", "decoder.mid_blok"])
    assert "--lpl_blocks decoder.mid_blok" in message and "decoder.mid_block" in message


@pytest.mark.parametrize("kind", ["asymmetric", "tiny", "dc", "hunyuan", "wan", "temporal"])
def test_vaes_of_other_classes_with_the_same_latent_space(kind, sd_pipeline, image_folder, tmp_path, capsys):
    """LPL looks through any of them; the pipeline must also be able to sample."""
    vae = tiny_vae(kind)
    vae.save_config(tmp_path / "vae")
    parsed(sd_pipeline, image_folder, tmp_path / "out", lpl_vae_name_or_path=tmp_path / "vae")
    flags = {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", **flags)
    if type(vae).__name__ in StableDiffusion.vaes:
        parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
    else:
        assert "--pretrained_vae_model_name_or_path" in refusal(capsys, words)


@pytest.mark.parametrize("kind", ["vq", "flux2"])
def test_vaes_of_other_classes_with_other_latents(kind, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    tiny_vae(kind).save_config(tmp_path / "vae")
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", lpl_vae_name_or_path=tmp_path / "vae")
    assert "same latent space" in refusal(capsys, words)


@pytest.mark.parametrize("flag", ["lpl_vae_name_or_path", "pretrained_vae_model_name_or_path"])
def test_a_vae_with_another_latent_space(flag, sd_pipeline, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    words = arguments(sd_pipeline, image_folder, tmp_path, **{flag: sd3_pipeline / "vae"})
    message = refusal(capsys, words)
    assert all(word in message for word in (f"--{flag}", "16 channels", "4"))


def test_another_vae_counts_instead_of_the_pipelines_own(sd_pipeline, image_folder, tmp_path):
    """The pipeline's own would be refused, and the other one's factor is 2."""
    other = edited(sd_pipeline, tmp_path / "other", "vae", **OF_FACTOR_2) / "vae"
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "vae", _class_name="ConsistencyDecoderVAE")
    flags = {"pretrained_vae_model_name_or_path": other, "resolution": 30, "lpl_blocks": ["up_1"]}
    _, configs = parsed(pipeline, image_folder, tmp_path / "out", **flags)
    assert configs.vae["block_out_channels"] == [8, 16]
    with pytest.raises(ValueError, match="--lpl_blocks up_2"):
        parsed(pipeline, image_folder, tmp_path / "out", **flags | {"lpl_blocks": ["up_2"]})
