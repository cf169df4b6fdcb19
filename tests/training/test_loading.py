"""What the weights' files hold is what the configurations say, or the run is refused: nothing is drawn at random."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer import train


def without(key):
    return lambda weights: weights.pop(key)


def cut(key):
    return lambda weights: weights.update({key: weights[key][:-1].clone()})


@pytest.mark.parametrize(
    "file, change, words",
    [
        (
            "unet/diffusion_pytorch_model",
            without("conv_in.bias"),
            "unet: its files lack 1 weight that it needs, such as",
        ),
        ("vae/diffusion_pytorch_model", without("decoder.conv_in.weight"), "vae: its files lack 1 weight"),
        ("text_encoder/model", without("encoder.layers.0.mlp.fc1.bias"), "text_encoder: its files lack 1 weight"),
        ("text_encoder/model", cut("embeddings.token_embedding.weight"), "token_embedding.weight is (195, 16) in its"),
    ],
)
def test_files_that_lack_weights_are_refused(file, change, words, sd_pipeline, image_folder, tmp_path):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "sd")
    path = pipeline / f"{file}.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(SystemExit) as left:
        train(pipeline, image_folder, tmp_path / "out", lpl_weight=0)
    assert words in left.value.code and f"--pretrained_model_name_or_path {pipeline}" in left.value.code


@pytest.mark.parametrize("flag", ["pretrained_vae_model_name_or_path", "lpl_vae_name_or_path"])
def test_a_damaged_vae_is_named_by_its_flag(flag, sd_pipeline, image_folder, tmp_path):
    vae = shutil.copytree(sd_pipeline / "vae", tmp_path / "vae")
    (vae / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "out", **{flag: vae})
    assert f"--{flag} {vae}: its weights cannot be loaded" in left.value.code


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(sd_pipeline, image_folder, tmp_path):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "sd")
    path, config = pipeline / "text_encoder/model.safetensors", pipeline / "text_encoder/config.json"
    weights = load_file(path)
    name = "embeddings.token_embedding.weight"
    weights[name] = torch.zeros(100, weights[name].shape[1])
    save_file(weights, path, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 100}))
    with pytest.raises(SystemExit, match="embeddings of 100 tokens, and its tokenizer has 196 tokens"):
        train(pipeline, image_folder, tmp_path / "out", lpl_weight=0)
