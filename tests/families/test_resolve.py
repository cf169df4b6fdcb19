"""What a pipeline completes or refuses: a bad command gets one sentence before anything is loaded."""

import diffusers
import pytest
from commands import cases, edited, refusal, warned
from peft import LoraConfig, inject_adapter_in_model
from tiny_families import FAMILY_OF, TINY, data_fixture
from trainer import arguments, parsed

from lpl.families.resolve import with_decoder_dtype
from lpl.families.sd import StableDiffusion
from tests.families.test_description import OF_FACTOR_2


WITH_SD = cases(
    ({"text_encoder_dropout": [0.1, 0.1]}, ["--text_encoder_dropout 0.1 0.1", "has 1, text_encoder;"]),
    ({"lpl_blocks": ["up_9"]}, ["--lpl_blocks up_9", "no up_9, did you mean up_2?", "mid, up_0, up_1, up_2", "rgb"]),
    ({"lpl_num_blocks": 9}, ["--lpl_blocks", "up_8", "mid, up_0, up_1, up_2"]),
    ({"lpl_blocks": ["mid", "mid"]}, ["--lpl_blocks mid mid", "once"]),
    ({"lpl_blocks": ["rgb", "mid"]}, ["--lpl_blocks rgb mid", "rgb goes alone"]),
    ({"lpl_depth_weighting": [1, 2, 3]}, ["--lpl_depth_weighting", "4 finite"]),
    (
        {"lpl_weight": 0, "validation_every_nth": 2, "lpl_blocks": ["up_9"]},
        ["--lpl_blocks up_9", "mid, up_0, up_1, up_2"],
    ),
    ({"lpl_crop": 6}, ["--lpl_crop 6", "--resolution 32", "are 16, 32:", "4 pixels"]),
    ({"lpl_crop": 24}, ["--lpl_crop 24", "are 16, 32:"]),  # whole positions, but 32 px are no multiple
    ({"lpl_crop": 64}, ["--lpl_crop 64", "are 16, 32:"]),
    ({"lpl_crop": 8, "resolution": 96}, ["--lpl_crop 8", "--resolution 96", "are 16, 24, 32, 48, 96:"]),
    ({"resolution": 30}, ["--resolution 30", "multiples of 4", "28 or 32"]),
    ({"resolution": 2}, ["--resolution 2", "multiples of 4"]),
    ({"precondition_outputs": 1}, ["--precondition_outputs", "flow_matching", "epsilon"]),
    ({"weighting_scheme": "mode"}, ["--weighting_scheme", "flow_matching", "--snr_gamma"]),
    (
        {"prediction_type": "v_prediction", "dream_training": True},
        ["--dream_training", "epsilon", "v_prediction"],
    ),
    ({"prediction_type": "flow_matching", "dream_training": True}, ["--dream_training", "epsilon", "flow_matching"]),
    (
        {"prediction_type": "flow_matching", "timestep_bias_strategy": "later"},
        ["--timestep_bias_strategy", "flow_matching", "--weighting_scheme"],
    ),
    (
        {"timestep_bias_strategy": "range", "timestep_bias_end": 1001},
        ["--timestep_bias_end 1001", "1000 timesteps"],
    ),
    (
        {"timestep_bias_strategy": "later", "timestep_bias_portion": 1e-4},
        ["--timestep_bias_portion 0.0001", "1000 timesteps"],
    ),
    (
        {"lora": True, "lora_target_modules": ["to_q", "to_z"]},
        ["--lora_target_modules to_z", "unet", "for example", "to_k", "to_out.0"],
    ),
)
WITH_SD3 = cases(
    ({"text_encoder_dropout": [0.1, 0.1]}, ["--text_encoder_dropout 0.1 0.1", "has 3", "text_encoder_3; give a"]),
    ({"resolution": 36}, ["--resolution 36", "multiples of 8", "32 or 40"]),
    ({"resolution": 264}, ["--resolution 264", "256 at most"]),
    ({"max_sequence_length": 600}, ["--max_sequence_length 600", "512 at most"]),
    ({"snr_gamma": 5}, ["--snr_gamma", "flow_matching", "--weighting_scheme"]),
    ({"timestep_bias_strategy": "later"}, ["--timestep_bias_strategy", "flow_matching", "--weighting_scheme"]),
    ({"dream_training": True}, ["--dream_training", "epsilon", "flow_matching"]),
    ({"lora": True, "lora_target_modules": ["conv_in"]}, ["--lora_target_modules conv_in", "transformer", "to_q"]),
)


@pytest.mark.parametrize("flags, words", WITH_SD)
@pytest.mark.filterwarnings("ignore:.*--(prediction_type|lpl_num_blocks)")
def test_refused_with_sd(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("flags, words", WITH_SD3)
def test_refused_with_sd3(flags, words, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd3_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


def test_a_text_encoder_that_is_absent_has_no_probability(sd3_without_t5, image_folder, tmp_path):
    config, _ = parsed(sd3_without_t5, image_folder, tmp_path, text_encoder_dropout=[0.1, 0])
    assert config.data.text_encoder_dropout == (0.1, 0.0)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("instance_prompt", "x"), ("caption_prefix", "x"), ("caption_suffix", "x"), ("trigger_word", "x")),
        *(("shuffle_tags", True), ("tag_dropout", 0.1), ("text_encoder_dropout", 0.1)),
    ],
)
def test_class_labels_are_no_captions(name, value, dit_pipeline, class_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(dit_pipeline, class_folder, tmp_path, caption_column=None, **{name: value}))
    assert f"--{name} is for captions, and dit is trained on class labels" in message


def test_dropout_of_sanas_only_text_encoder(sana_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sana_pipeline, image_folder, tmp_path, text_encoder_dropout=0.1))
    assert "--text_encoder_dropout: sana" in message and "--proportion_empty_prompts" in message


def test_a_small_sd3_has_its_own_default_resolution(sd3_pipeline, image_folder, tmp_path):
    assert parsed(sd3_pipeline, image_folder, tmp_path, resolution=None)[0].data.resolution == 32


def test_a_pipeline_trained_on_an_unknown_objective(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "scheduler", prediction_type="score")
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "'score'" in message and "--prediction_type" in message and "v_prediction" in message


def test_an_objective_that_the_pipeline_cannot_sample(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "objectives", ("epsilon", "v_prediction"))
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, prediction_type="sample"))
    words = ("--prediction_type sample", "StableDiffusionPipeline can only sample", "epsilon or v_prediction")
    assert all(word in message for word in words)


@pytest.fixture(params=FAMILY_OF)
def of_family(request):
    """A family, images that it can be trained on, and its tiny pipeline."""
    family = FAMILY_OF[request.param]
    return family, *map(request.getfixturevalue, (data_fixture(family), TINY[family.name][0]))


def test_every_familys_objectives(of_family, tmp_path, capsys):
    family, images, pipeline = of_family
    for objective in ("epsilon", "v_prediction", "sample", "flow_matching"):
        flags = {"prediction_type": objective, "from_scratch": True}
        if objective in family.objectives:
            assert parsed(pipeline, images, tmp_path, **flags)[0].model.prediction_type == objective
        else:
            message = refusal(capsys, arguments(pipeline, images, tmp_path, **flags))
            assert f"{family.pipeline_class.__name__} can only sample" in message


def test_every_familys_defaults_are_accepted(of_family, tmp_path):
    family, images, pipeline = of_family
    trained = bool(family.trainable_text_encoders)
    config, description = parsed(pipeline, images, tmp_path, lora=True, train_text_encoder=trained)
    rate, decay = config.optimization.text_encoder_lr, config.optimization.adam_weight_decay_text_encoder
    assert (rate is not None) is (decay is not None) is trained
    assert config.data.proportion_empty_prompts == family.empty_share
    assert config.model.max_sequence_length == family.sequence_length
    # The family's own LoRA targets are there.
    parsed(pipeline, images, tmp_path, lora=True, lora_target_modules=config.lora.lora_target_modules)
    default = family.default_resolution(description.parts)
    assert default % family.resolution_multiple(description.parts) == 0


def test_text_encoders_that_are_not_trained(dit_pipeline, class_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(dit_pipeline, class_folder, tmp_path, train_text_encoder=True))
    assert all(word in message for word in ("--train_text_encoder", "dit", "stable-diffusion-xl"))


def test_sd3_at_its_default_resolution(sd3_pipeline, image_folder, tmp_path):
    pipeline = edited(sd3_pipeline, tmp_path / "pipeline", "transformer", pos_embed_max_size=64)
    assert parsed(pipeline, image_folder, tmp_path / "out", resolution=None)[0].data.resolution == 512


def test_a_pipeline_of_one_size(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "resolution_range", classmethod(lambda cls, configs: (32, 32)))
    parsed(sd_pipeline, image_folder, tmp_path, resolution=32)
    assert "32 at least" in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, resolution=28))
    assert "32 at most" in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, resolution=36))


TARGETS = ("to_q", "to_out.0", "conv1", "proj_in", "mid_block.attentions.0", "to_out", "norm1", "0", "z", "to_")


@pytest.mark.parametrize("target", TARGETS)
def test_lora_targets_are_those_that_peft_takes(target, sd_pipeline, image_folder, tmp_path, capsys):
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_pipeline, subfolder="unet")
    flags = {"rank": 1, "lora_target_modules": [target]}
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[target]), unet)
    except ValueError:
        message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
        assert f"--lora_target_modules {target}:" in message
    else:
        assert parsed(sd_pipeline, image_folder, tmp_path, **flags)[0].lora.lora_target_modules == (target,)


def test_a_vae_with_latents_of_another_size(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    """Their channels alone would fit; with --pretrained_vae_model_name_or_path it is the only VAE there is."""
    other = edited(sd_pipeline, tmp_path / "other", "vae", **OF_FACTOR_2) / "vae"
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, lpl_vae_name_or_path=other))
    assert all(word in message for word in ("--lpl_vae_name_or_path", "2 pixels", "pipeline's 4", "latent space"))
    flags = {"pretrained_vae_model_name_or_path": other, "lpl_vae_name_or_path": other}
    parsed(sd_pipeline, image_folder, tmp_path, **flags)


@pytest.mark.parametrize("where", ["pipeline", "lpl_vae_name_or_path"])
def test_a_vae_that_overflows_in_float16(where, sd_pipeline, image_folder, tmp_path, capsys, gpu):
    robust = edited(sd_pipeline, tmp_path / "robust", "vae", force_upcast=False)
    fragile = edited(sd_pipeline, tmp_path / "fragile", "vae", force_upcast=True)
    parsed(robust, image_folder, tmp_path / "out", lpl_vae_dtype="float16")
    parsed(fragile, image_folder, tmp_path / "out", lpl_vae_dtype="bfloat16")
    pipeline, flags = (fragile, {}) if where == "pipeline" else (robust, {where: fragile / "vae"})
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out", lpl_vae_dtype="float16", **flags))
    assert all(word in message for word in ("--lpl_vae_dtype float16", "force_upcast", "bfloat16"))


@pytest.mark.parametrize(
    "flags, precision, expected",
    [
        ({}, "bf16", "bfloat16"),
        ({}, "fp16", "float32"),
        ({}, "no", "float32"),
        ({"lpl_vae_dtype": "float32"}, "bf16", "float32"),
        ({"lpl_vae_dtype": "bfloat16"}, "no", "bfloat16"),
        ({"lpl_weight": 0}, "bf16", "auto"),
        ({"lpl_weight": 0, "validation_every_nth": 2}, "bf16", "bfloat16"),
    ],
)
def test_the_decoders_precision_follows_the_run(flags, precision, expected, sd_pipeline, image_folder, tmp_path):
    config, _ = parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
    assert with_decoder_dtype(config, precision).lpl.lpl_vae_dtype == expected


def test_idle_flags_without_a_default_are_forgotten(sd_pipeline, image_folder, tmp_path):
    """So that the run's recipe does not bring the warning again."""
    flags = {"text_encoder_lr": 1e-5, "adam_weight_decay_text_encoder": 0.1, "max_sequence_length": 128}
    with pytest.warns(UserWarning, match="no effect"):
        config, _ = parsed(sd_pipeline, image_folder, tmp_path, **flags)
    assert {name: config.values()[name] for name in flags} == dict.fromkeys(flags)


def test_a_flux_without_embedded_guidance(flux_pipeline, image_folder, tmp_path):
    schnell = edited(flux_pipeline, tmp_path / "schnell", "transformer", guidance_embeds=False)
    assert "--guidance_scale" in warned(schnell, image_folder, tmp_path / "out", guidance_scale=2.0)[-1]


@pytest.mark.parametrize(
    "fixture, folder, part, changes, word",
    [
        ("flux2_klein", "base", None, {}, None),
        ("flux2_klein", "klein", None, {"is_distilled": True}, "is_distilled"),
        ("flux2_klein", "My-Turbo", None, {}, "turbo"),
        ("flux", "flux", "transformer", {"guidance_embeds": False}, "guidance_embeds"),
        ("hunyuan_image", "hunyuan", "transformer", {"use_meanflow": True}, "use_meanflow"),
        ("sdxl", "dreamshaper", None, {"scheduler": ["diffusers", "LCMScheduler"]}, "LCMScheduler"),
        ("chroma", "Chroma1-Flash", None, {}, "flash"),
    ],
)
def test_distilled_models_are_warned_of(fixture, folder, part, changes, word, image_folder, tmp_path, request):
    """By the index, by the name, by the configuration."""
    pipeline = edited(request.getfixturevalue(f"{fixture}_pipeline"), tmp_path / folder, part, **changes)
    texts = [text for text in warned(pipeline, image_folder, tmp_path / "out") if "distilled to sample" in text]
    assert len(texts) == bool(word) and all(word in text for text in texts)


@pytest.mark.parametrize(
    "fixture, name, flags, steps, guidance",
    [
        ("z_image", "Z-Image", {}, 25, None),
        ("z_image", "Z-Image-Turbo", {}, 8, 0.0),
        ("sdxl", "sdxl-turbo", {}, 8, 1.0),
        ("sdxl", "sdxl-turbo", {"validation_inference_steps": 4, "validation_guidance_scale": 2.0}, 4, 2.0),
        ("sdxl", "sdxl-turbo", {"validation_inference_steps": 30}, 30, 1.0),
        ("hunyuan_image", "hunyuan-turbo", {}, 8, None),  # its guider has the scale
        ("flux", "flux-turbo", {}, 8, None),  # it is told the scale of what it was distilled from
    ],
)
def test_samples_of_distilled_models(fixture, name, flags, steps, guidance, image_folder, tmp_path, request):
    pipeline = edited(request.getfixturevalue(f"{fixture}_pipeline"), tmp_path / name, None)
    flags = {"validation_inference_steps": None} | flags  # tests have few otherwise
    validation = parsed(pipeline, image_folder, tmp_path / "out", **flags)[0].validation
    assert validation.validation_inference_steps == steps and validation.validation_guidance_scale == guidance


def test_every_single_block_of_flux2_is_adapted(flux2_klein_pipeline, image_folder, tmp_path):
    config, _ = parsed(flux2_klein_pipeline, image_folder, tmp_path, rank=2)
    wanted = {f"single_transformer_blocks.{block}.attn.to_out" for block in (0, 1)}
    assert wanted <= set(config.lora.lora_target_modules)


def test_prodigy_has_one_learning_rate(sd3_pipeline, image_folder, tmp_path):
    flags = {"optimizer": "prodigy", "learning_rate": 1.0, "train_text_encoder": True}
    for optimizer, rate in (("prodigy", 1.0), ("AdamW", 5e-6)):
        config, _ = parsed(sd3_pipeline, image_folder, tmp_path, **flags | {"optimizer": optimizer})
        assert config.optimization.text_encoder_lr == rate


def test_objectives_follow_the_pipeline(sd_pipeline, sd_v_pipeline, sd3_pipeline, image_folder, tmp_path):
    def resolved(pipeline, **flags):
        config, _ = parsed(pipeline, image_folder, tmp_path, **flags)
        return config.model.prediction_type, config.diffusion.weighting_scheme

    assert resolved(sd_pipeline) == ("epsilon", None)
    assert resolved(sd_v_pipeline) == ("v_prediction", None)
    assert resolved(sd3_pipeline) == ("flow_matching", "logit_normal")
    with pytest.warns(UserWarning, match="trained on epsilon"):
        assert resolved(sd_pipeline, prediction_type="flow_matching") == ("flow_matching", "logit_normal")


def test_a_shift_that_depends_on_the_size(sd3_pipeline, image_folder, tmp_path):
    pipeline = edited(sd3_pipeline, tmp_path / "pipeline", "scheduler", use_dynamic_shifting=True)
    with pytest.warns(UserWarning, match="shift depends on the image's size"):
        parsed(pipeline, image_folder, tmp_path / "out")


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("lora_rank_pattern", ("q_proj=3", "no adapted module", "to_q")),
        ("lora_alpha_pattern", ("conv1=3", "no adapted module")),  # it is there, and not adapted
        ("lora_rank_pattern", ("to_(=3", "no regular expression")),
    ],
)
def test_patterns_are_of_modules_that_are_adapted(pattern, words, sd_pipeline, image_folder, tmp_path):
    flags = {"rank": 2, pattern: words[0]}
    with pytest.raises(ValueError) as error:
        parsed(sd_pipeline, image_folder, tmp_path, **flags)
    assert all(word in str(error.value) for word in (f"--{pattern} {words[0][:-2]}", *words[1:]))
    parsed(sd_pipeline, image_folder, tmp_path, **flags | {pattern: "1.*attn2.to_q=3"})
    parsed(sd_pipeline, image_folder, tmp_path, **flags | {pattern: "conv1=3", "lora_target_modules": ["conv1"]})
