"""What a full fine-tuning leaves: the trained weights, and beside them the base's own files, byte for byte."""

import json
import shutil

import pytest
import torch
from commands import refusal
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hub_server import HubServer, Repository
from safetensors.torch import load_file, save_file
from tiny_families import FAMILY_OF, TINY, data_fixture
from trainer import arguments, train

from lpl.families import FAMILIES
from lpl.publishing.publication import published


FLAGS = {"lpl_weight": 0, "max_train_steps": 1}
OF_OLDER_LIBRARIES = {"vocab.json": "{}", "merges.txt": "#version: 0.2\n", "spiece.model": "not read"}


def base(pipeline, folder):
    """A copy with the vocabularies that transformers 4 reads, and transformers 5 would not write."""
    shutil.copytree(pipeline, folder)
    for tokenizer in folder.glob("tokenizer*"):
        for name, text in OF_OLDER_LIBRARIES.items():
            (tokenizer / name).write_text(text)
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frozen(folder, *trained):
    """The files of the components that were not trained."""
    parts = json.loads((folder / "model_index.json").read_text())
    left = {name for name, entry in parts.items() if isinstance(entry, list)} - set(trained)
    return {name: content for name, content in files_of(folder).items() if name.split("/")[0] in left}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_what_was_not_trained_is_the_bases_own_files(name, request, tmp_path):
    family = FAMILY_OF[name]
    pipeline = base(request.getfixturevalue(TINY[name][0]), tmp_path / "base")
    images = request.getfixturevalue(data_fixture(family))
    out = train(pipeline, images, tmp_path / "run", use_ema=True, **FLAGS)
    kept = frozen(pipeline, family.denoiser_name)
    assert frozen(out, family.denoiser_name) == kept
    assert any(path.endswith("vocab.json") for path in kept) == bool(family.text_encoder_names)


def test_a_base_and_a_vae_of_the_hub(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """A variant loses its name, a VAE in half precision keeps it, and what else lies beside it stays there."""
    pipeline = base(sd_pipeline, tmp_path / "base")
    half = {
        name: tensor.half() for name, tensor in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors").items()
    }
    vae = {"config.json": (pipeline / "vae/config.json").read_bytes(), "sdxl.vae.safetensors": b"another layout"}
    save_file(half, tmp_path / "vae.safetensors", {"format": "pt"})
    vae["diffusion_pytorch_model.safetensors"] = (tmp_path / "vae.safetensors").read_bytes()
    for weights in [*pipeline.rglob("*.safetensors")]:
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.repos["user/sd"], hub.repos["user/vae"] = Repository(), Repository()
        hub.repos["user/sd"].files |= files_of(pipeline)
        hub.repos["user/vae"].files |= vae
        flags = FLAGS | {"variant": "fp16", "from_scratch": True, "pretrained_vae_model_name_or_path": "user/vae"}
        out = train("user/sd", image_folder, tmp_path / "run", cache_dir=tmp_path / "hub", **flags)
    found = frozen(out, "unet")
    mine = {name.removeprefix("vae/"): found.pop(name) for name in sorted(found) if name.startswith("vae/")}
    assert mine == {name: content for name, content in vae.items() if name != "sdxl.vae.safetensors"}
    theirs = {name.replace(".fp16", ""): content for name, content in frozen(pipeline, "unet", "vae").items()}
    assert found == theirs
    assert DiffusionPipeline.from_pretrained(out).vae.config.scaling_factor == 0.18215


def test_a_single_file_beside_the_pipeline(sd_pipeline, image_folder, tmp_path):
    """With the moving average's weights, as the pipeline; published, named on the card, and set aside with it."""
    flags = FLAGS | {"use_ema": True, "train_text_encoder": True}
    out = train(sd_pipeline, image_folder, tmp_path / "run", save_single_file="fp16", **flags)
    file = out / "run_single_file.safetensors"
    read = StableDiffusionPipeline.from_single_file(str(file), config=str(out), local_files_only=True)
    saved = DiffusionPipeline.from_pretrained(out)
    for name in ("unet", "vae", "text_encoder"):
        found = getattr(read, name).state_dict()
        assert all(torch.equal(x.half(), found[key].half()) for key, x in getattr(saved, name).state_dict().items())
    assert "`models/checkpoints`" in (out / "README.md").read_text() and file.name in (out / "README.md").read_text()
    assert file.name in {str(path) for path in published(out)}
    train(sd_pipeline, image_folder, out, rank=2, **FLAGS)
    assert not file.exists() and (out / "earlier-run" / file.name).is_file()


def test_a_family_without_a_single_file_is_refused_first(dit_pipeline, class_folder, tmp_path, capsys, no_weights):
    words = arguments(dit_pipeline, class_folder, tmp_path / "run", save_single_file="fp16", lpl_weight=0)
    assert "--save_single_file fp16: a single file of dit is not written" in refusal(capsys, words)


def test_layers_without_a_place_in_a_single_file_are_refused_first(sd_pipeline, image_folder, tmp_path, capsys):
    folder = shutil.copytree(sd_pipeline, tmp_path / "base")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"time_cond_proj_dim": 8}))
    words = arguments(folder, image_folder, tmp_path / "run", save_single_file="fp16", lpl_weight=0)
    assert "--save_single_file fp16: the original has no layer like time_embedding.cond_proj" in refusal(capsys, words)


def test_a_single_file_that_cannot_be_written_costs_nothing_else(sd_pipeline, image_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("lpl.training.result.write_single_file", full)
    with pytest.warns(UserWarning, match=r"run_single_file.safetensors could not be written \(no space left\)"):
        out = train(sd_pipeline, image_folder, tmp_path / "run", save_single_file="fp16", **FLAGS)
    DiffusionPipeline.from_pretrained(out)
