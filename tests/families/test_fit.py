"""Components that do not fit one another are refused by their configurations, one number at a time."""

import json
import shutil
from importlib.util import find_spec

import pytest
from commands import edited, refusal
from tiny_families import FAMILY_OF, TINY
from trainer import arguments, parsed, resolved, train

from lpl.families import FAMILIES


UNET = ["in_channels", "out_channels", "cross_attention_dim"]
BROKEN = {  # family -> component -> numbers that another component depends on
    "stable-diffusion": {"unet": UNET, "vae": ["latent_channels"], "text_encoder": ["hidden_size"]},
    "stable-diffusion-xl": {
        "unet": [*UNET, "projection_class_embeddings_input_dim", "addition_time_embed_dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
        "text_encoder_2": ["hidden_size", "projection_dim"],
    },
    "stable-diffusion-3": {
        "transformer": [
            *("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"),
            *("caption_projection_dim", "attention_head_dim"),
        ],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size", "projection_dim"],
        "text_encoder_2": ["hidden_size", "projection_dim"],
        "text_encoder_3": ["d_model"],
    },
    **dict.fromkeys(
        ("pixart-alpha", "pixart-sigma"),
        {
            "transformer": ["in_channels", "out_channels", "caption_channels", "cross_attention_dim"],
            "vae": ["latent_channels"],
            "text_encoder": ["d_model"],
        },
    ),
    "dit": {"transformer": ["in_channels", "out_channels"], "vae": ["latent_channels"]},
    "flux": {
        "transformer": ["in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
        "text_encoder_2": ["d_model"],
    },
    "sana": {
        "transformer": ["in_channels", "out_channels", "caption_channels", "cross_attention_dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
    },
    "qwen-image": {"transformer": ["in_channels", "out_channels", "joint_attention_dim"], "vae": ["z_dim"]},
    "ernie-image": {"transformer": ["in_channels", "out_channels", "text_in_dim"], "vae": ["latent_channels"]},
    "krea-2": {"transformer": ["in_channels", "text_hidden_dim", "attention_head_dim"], "vae": ["z_dim"]},
    "z-image": {
        "transformer": ["in_channels", "cap_feat_dim", "dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
    },
    "flux2-klein": {
        "transformer": ["in_channels", "joint_attention_dim", "attention_head_dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
    },
    "chroma": {
        "transformer": ["in_channels", "out_channels", "joint_attention_dim", "attention_head_dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["d_model"],
    },
    "lumina-2": {
        "transformer": ["in_channels", "cap_feat_dim", "hidden_size"],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
    },
    "auraflow": {
        "transformer": ["in_channels", "out_channels", "joint_attention_dim", "caption_projection_dim"],
        "vae": ["latent_channels"],
        "text_encoder": ["d_model"],
    },
    "hidream-i1": {
        "transformer": ["in_channels", "out_channels", "text_emb_dim", "attention_head_dim", "num_layers"],
        "vae": ["latent_channels"],
        "text_encoder": ["projection_dim"],
        "text_encoder_2": ["projection_dim"],
        "text_encoder_3": ["d_model"],
        "text_encoder_4": ["hidden_size"],
    },
    "wan": {
        "transformer": ["in_channels", "out_channels", "text_dim"],
        "vae": ["z_dim"],
        "text_encoder": ["d_model"],
    },
    "flux2": {"transformer": ["in_channels", "joint_attention_dim"], "vae": ["latent_channels"]},
    "kolors": {
        "unet": [
            *("in_channels", "out_channels", "encoder_hid_dim"),
            *("projection_class_embeddings_input_dim", "addition_time_embed_dim"),
        ],
        "vae": ["latent_channels"],
        "text_encoder": ["hidden_size"],
    },
    "hunyuan-image": {
        "transformer": ["in_channels", "out_channels", "text_embed_dim", "text_embed_2_dim", "attention_head_dim"],
        "vae": ["latent_channels"],
        "text_encoder_2": ["d_model"],
    },
}
NUMBERS = [
    (family, part, number) for family, parts in BROKEN.items() for part, numbers in parts.items() for number in numbers
]


def data_of(family, request):
    return request.getfixturevalue("class_folder" if FAMILY_OF[family].class_conditional else "image_folder")


def test_every_family_is_here():
    assert set(BROKEN) == {family.name for family in FAMILIES} == set(TINY)


@pytest.mark.parametrize("family, part, number", NUMBERS)
def test_a_number_that_does_not_fit(family, part, number, tmp_path, request, capsys, no_weights):
    whole = request.getfixturevalue(TINY[family][0])
    before = json.loads((whole / part / "config.json").read_text())[number] or 64
    pipeline = edited(whole, tmp_path / "pipeline", part, **{number: 3 * before})
    message = refusal(capsys, arguments(pipeline, data_of(family, request), tmp_path / "out"))
    assert f"--pretrained_model_name_or_path {pipeline}: its components do not fit one another" in message
    assert f" of its {FAMILY_OF[family].denoiser_name} is " in message and "must be" in message


def test_a_unet_for_inpainting(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "unet", in_channels=9)
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert all(words in message for words in ("in_channels of its unet is 9 and must be 4", "VAE", "inpainting"))


def test_a_width_for_each_block(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "unet", cross_attention_dim=[16, 24])
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "cross_attention_dim of its unet is 24 and must be 16" in message


def test_an_older_configuration_without_a_number(sd_pipeline, image_folder, tmp_path):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None)
    config = json.loads((pipeline / "unet/config.json").read_text())
    config.pop("encoder_hid_dim"), config.pop("in_channels")  # 4 by default
    (pipeline / "unet/config.json").write_text(json.dumps(config))
    parsed(pipeline, image_folder, tmp_path / "out")


def test_a_denoiser_of_another_family(sd_pipeline, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, unet=["diffusers", "SD3Transformer2DModel"])
    shutil.copytree(sd3_pipeline / "transformer", pipeline / "unet", dirs_exist_ok=True)
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "SD3Transformer2DModel" in message and "StableDiffusionPipeline" in message


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="for where torchvision is missing")
def test_a_tokenizer_that_needs_another_package(flux2_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(flux2_pipeline, tmp_path / "pipeline", None, tokenizer=["transformers", "PixtralProcessor"])
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "its tokenizer cannot be loaded: PixtralProcessor requires the Torchvision library" in message


def test_a_tokenizer_without_its_package(kolors_pipeline, image_folder, tmp_path, capsys, no_weights, monkeypatch):
    monkeypatch.setattr("lpl.families.description.missing", lambda package: package == "sentencepiece")
    message = refusal(capsys, arguments(kolors_pipeline, image_folder, tmp_path / "out"))
    assert f"--pretrained_model_name_or_path {kolors_pipeline}: its tokenizer needs sentencepiece" in message


# Missing encoders ----------------------------------------------------------------------------------------------------

ENCODERS = [(family.name, name) for family in FAMILIES for name in family.text_encoder_names]


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
@pytest.mark.parametrize("family, encoder", ENCODERS)
def test_a_missing_encoder_or_tokenizer(family, encoder, part, tmp_path, request, capsys, no_weights):
    """Those that the index lists and the folder lacks are in test_components.py."""
    name, optional = encoder.replace("text_encoder", part), FAMILY_OF[family].optional_components
    pipeline = edited(request.getfixturevalue(TINY[family][0]), tmp_path / "null", None, **{name: [None, None]})
    words = arguments(pipeline, data_of(family, request), tmp_path / "out")
    if name in optional and part == "text_encoder":
        resolved(words)
    else:
        assert f"no {name}, which training needs" in refusal(capsys, words)


def test_what_is_said_of_a_missing_t5_can_be_done(sd3_pipeline, image_folder, tmp_path):
    null = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    pipeline = edited(sd3_pipeline, tmp_path / "pipeline", None, **null)
    shutil.rmtree(pipeline / "text_encoder_3"), shutil.rmtree(pipeline / "tokenizer_3")
    train(pipeline, image_folder, tmp_path / "out", max_train_steps=1)
