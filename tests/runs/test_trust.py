"""Attacks: what is loaded is data. Each file here would leave a mark if any of it were run; none may.

What is refused has to be refused in a sentence; what costs its sample only is listed with the reason.
"""

import builtins
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from commands import edited, refusal
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import EpsImagePlugin, Image
from tiny import tiny_vae
from torch import nn
from trainer import ROOT, arguments, parsed, settings

from lpl.data.reading import lies_in
from lpl.data.source import data_folders
from lpl.evaluation import Preprocessing, folder_images, load_network
from lpl.evaluation.generation import trained_parts
from lpl.evaluation.networks import check_network
from lpl.evaluation.sources import Model, find_models
from lpl.inspection import command as inspect
from lpl.tools import trust
from lpl.training.loading import load_family
from tests.data.test_dataset import load_data, over, static


class Evil:
    """Leaves the mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    """The file that any code that is run would write; it must not be there in the end."""
    mark = tmp_path / "mark"
    yield mark
    assert not mark.exists()


@pytest.fixture
def code(mark):
    """A module that leaves the mark when it is imported."""
    return f"open({str(mark)!r}, 'w')\nclass Model: pass\nclass Config: pass\n"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    """Whoever is asked might say yes."""

    def asked(*words):
        raise AssertionError("the user is asked")

    monkeypatch.setattr(builtins, "input", asked)


def pickled(source, target, part, mark):
    """A copy of a pipeline (or, with part "", of a model) whose weights are a pickle."""
    shutil.copytree(source, target)
    for file in (target / part).glob("*.safetensors"):
        file.unlink()
        name = "diffusion_pytorch_model.bin" if "diffusion" in file.name else "pytorch_model.bin"
        torch.save({"weight": Evil(mark)}, target / part / name)
    return target


def test_the_attacks_work_where_nobody_looks(tmp_path):
    mark = tmp_path / "a mark"
    torch.save({"weight": Evil(mark)}, tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert mark.exists()
    mark.unlink()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_pickles_are_refused(part, sd_pipeline, image_folder, tmp_path, capsys, mark, monkeypatch):
    pipeline = pickled(sd_pipeline, tmp_path / "pipeline", part, mark)
    words = arguments(pipeline, image_folder, tmp_path / "run")
    message = refusal(capsys, words)
    assert f"beside {part}/" in message and ".bin, a pickle" in message
    assert f"DiffusionPipeline.from_pretrained({str(pipeline)!r}).save_pretrained" in message
    # Nor are they read where that check does not see them.
    monkeypatch.setattr("lpl.families.description.check_weights", lambda *_: None)
    args, configs = parsed(pipeline, image_folder, tmp_path / "run")
    with pytest.raises(OSError, match="safetensors"):
        load_family(args.model, args.lora, configs, torch.float32)


def test_weights_that_are_not_read_may_be_pickles(sd_pipeline, image_folder, tmp_path, mark):
    pipeline = pickled(sd_pipeline, tmp_path / "pipeline", "unet", mark)
    args, configs = parsed(pipeline, image_folder, tmp_path / "run", from_scratch=True)
    assert load_family(args.model, args.lora, configs, torch.float32).denoiser.training is False


def test_the_advice_converts_them(sd_pipeline, image_folder, tmp_path, capsys):
    import diffusers

    pipeline = tmp_path / "pipeline"
    shutil.copytree(sd_pipeline, pipeline)
    whole = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict()
    (pipeline / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(whole, pipeline / "unet/diffusion_pytorch_model.bin")
    advice = re.search(r"diffusers\.DiffusionPipeline\S+", refusal(capsys, arguments(pipeline, image_folder, "run")))
    eval(advice[0].rstrip(","), {"diffusers": diffusers})
    args, configs = parsed(pipeline, image_folder, tmp_path / "run")
    assert torch.equal(
        load_family(args.model, args.lora, configs, torch.float32).denoiser.conv_in.weight, whole["conv_in.weight"]
    )


@pytest.mark.parametrize("flag", ["pretrained_vae_model_name_or_path", "lpl_vae_name_or_path"])
def test_another_vae_that_is_a_pickle_or_brings_code(flag, sd_pipeline, image_folder, tmp_path, capsys, mark, code):
    tiny_vae("sd").save_pretrained(tmp_path / "vae")
    vae = pickled(tmp_path / "vae", tmp_path / "pickled", "", mark)
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path / "run", **{flag: vae}))
    assert message.startswith(f"--{flag} {vae}: ") and "a pickle" in message and "AutoModel" in message
    config = json.loads((tmp_path / "vae/config.json").read_text()) | {"auto_map": {"AutoModel": "mine.Model"}}
    vae = tmp_path / "vae"
    (vae / "config.json").write_text(json.dumps(config))
    (vae / "mine.py").write_text(code)
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path / "run", **{flag: vae}))
    assert f"--{flag} {vae}" in message and "code of its own" in message


def test_the_files_of_a_repository_are_asked_for(monkeypatch):
    files = ["model_index.json", "unet/diffusion_pytorch_model.bin", "vae/model.safetensors", "vae/old.bin"]
    asked = []
    monkeypatch.setattr(trust.HfApi, "list_repo_files", lambda _, *words, **more: asked.append((words, more)) or files)
    trust.check_weights("--flag", "user/model", ["vae", "tokenizer"], "a branch")
    with pytest.raises(ValueError, match="--flag: .* unet/diffusion_pytorch_model.bin.*'user/model'.*'converted'"):
        trust.check_weights("--flag", "user/model", ["unet"])
    assert asked[0] == (("user/model",), {"revision": "a branch"})


def test_a_run_whose_weights_are_pickles_is_not_evaluated(sd_pipeline, image_folder, tmp_path, mark):
    _, configs = parsed(sd_pipeline, image_folder, tmp_path / "run")
    weights = pickled(sd_pipeline, tmp_path / "checkpoint", "unet", mark)
    shutil.rmtree(weights / "text_encoder")
    with pytest.raises(OSError, match="safetensors"):
        trained_parts(Model("a run", 1, None, configs, weights), {"unet": torch.float32})


def test_a_lora_that_is_a_pickle_is_none(sd_pipeline, image_folder, tmp_path, mark):
    _, configs = parsed(sd_pipeline, image_folder, tmp_path / "run")
    place = tmp_path / "checkpoint" / "unet_lora"
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["to_q"]}')
    torch.save({"weight": Evil(mark)}, place / "adapter_model.bin")
    with pytest.raises(ValueError, match="neither trained parts nor a LoRA"):
        trained_parts(Model("a run", 1, None, configs, place.parent), {})


def test_inspect_reads_no_pickle(sd_pipeline, image_folder, tmp_path, mark):
    pipeline = pickled(sd_pipeline, tmp_path / "pipeline", "vae", mark)
    words = ["--pretrained_model_name_or_path", str(pipeline), "--images", str(image_folder)]
    words += ["--output_dir", str(tmp_path / "inspected")]
    with pytest.raises(ValueError, match="beside vae/diffusion_pytorch_model.bin, a pickle"):
        inspect.run(*inspect.groups_of(vars(inspect.build_parser().parse_args(words))))


# Code of a pipeline --------------------------------------------------------------------------------------------------


def test_a_part_with_a_class_of_its_own_is_refused(sd_pipeline, image_folder, tmp_path, capsys, code, mark):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, unet=["mine", "Model"])
    (pipeline / "unet/mine.py").write_text(code)
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "run"))
    assert "its unet is mine.Model" in message and "is not run" in message


@pytest.mark.parametrize("entry", [["os", "system"], ["diffusers"], [1, 2], [["mine"], "Model"], ["mine", None], []])
def test_an_index_may_say_anything(entry, sd_pipeline, image_folder, tmp_path, capsys):
    for name in ("unet", "scheduler"):
        pipeline = edited(sd_pipeline, tmp_path / name, None, **{name: entry})
        assert f"its {name} is" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "run"))


@pytest.mark.parametrize("name", ["logging", "DiffusionPipeline", "os", ["a"], 3, None])
def test_a_class_has_to_be_one_of_its_kind(name, sd_pipeline, image_folder, tmp_path, capsys):
    pipeline = edited(sd_pipeline, tmp_path / "unet", "unet", _class_name=name)
    assert "no model" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "run"))
    pipeline = edited(sd_pipeline, tmp_path / "vae", "vae", _class_name=name)
    words = arguments(pipeline, image_folder, tmp_path / "run", lpl_blocks=["mid"])
    assert "is of the class" in refusal(capsys, words)
    if isinstance(name, str):
        pipeline = edited(sd_pipeline, tmp_path / "index", None, scheduler=["diffusers", name])
        assert "no scheduler" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "run"))


@pytest.mark.parametrize("kind", [["pipeline", "Model"], "pipeline"])
def test_a_pipeline_of_its_own_is_refused(kind, sd_pipeline, image_folder, tmp_path, capsys, code, mark):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, _class_name=kind, custom_pipeline="pipeline")
    (pipeline / "pipeline.py").write_text(code)
    assert "the pipeline's class is" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "run"))


def test_code_beside_a_known_class_is_not_run(sd_pipeline, image_folder, tmp_path, code, mark):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, custom_pipeline="pipeline")
    for name in ("pipeline.py", "unet/diffusers.py", "text_encoder/transformers.py", "scheduler/diffusers.py"):
        (pipeline / name).write_text(code)
    args, configs = parsed(pipeline, image_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="custom code"):
        load_family(args.model, args.lora, configs, torch.float32)
    for name in ("unet/diffusers.py", "text_encoder/transformers.py", "scheduler/diffusers.py"):
        (pipeline / name).unlink()
    config = json.loads((pipeline / "text_encoder/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (pipeline / "text_encoder/config.json").write_text(json.dumps(config))
    (pipeline / "text_encoder/mine.py").write_text(code)
    assert load_family(args.model, args.lora, configs, torch.float32)


# Networks that measure -----------------------------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path):
    from transformers import BitImageProcessorPil, ViTConfig, ViTModel

    folder = tmp_path / "vit"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_a_network_that_is_a_pickle(network, tmp_path, mark, monkeypatch):
    pickled(network, tmp_path / "pickled", "", mark)
    name = str(tmp_path / "pickled")
    with pytest.raises(ValueError, match="--features .*pytorch_model.bin, a pickle.*transformers.AutoModel"):
        load_network(name)
    monkeypatch.setattr("lpl.evaluation.networks.check_weights", lambda *_, **__: None)
    with pytest.raises(ValueError, match="it cannot be loaded.*safetensors"):
        load_network(name)


@pytest.mark.parametrize("model_type", ["mine", "vit"])
def test_a_network_with_code_of_its_own(model_type, network, code, mark):
    config = json.loads((network / "config.json").read_text()) | {"model_type": model_type}
    names = {f"Auto{kind}": "mine.Model" for kind in ("Config", "Model", "ImageProcessor", "Tokenizer")}
    (network / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (network / "mine.py").write_text(code)
    if model_type == "vit":  # transformers has that class itself
        assert load_network(str(network)).features([Image.new("RGB", (8, 8))]).shape == (1, 8)
        return
    for load in (load_network, check_network):
        with pytest.raises(ValueError, match="code of its own, which is not run"):
            load(str(network))


def test_a_processor_with_code_of_its_own(network, code, mark):
    config = json.loads((network / "preprocessor_config.json").read_text())
    config |= {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Model"}}
    (network / "preprocessor_config.json").write_text(json.dumps(config))
    (network / "mine.py").write_text(code)
    with pytest.raises(ValueError, match="--features .*cannot be loaded"):
        load_network(str(network))


def test_inceptions_weights_are_read_as_tensors_only(tmp_path, mark, monkeypatch):
    """They are there as a pickle only, which the library loads with weights_only=False."""
    torch.save({"weight": Evil(mark)}, tmp_path / "inception.pth")
    loaded = []

    class Metric:
        def __init__(self, **options):
            loaded.append(torch.load(tmp_path / "inception.pth", weights_only=False))
            self.inception = nn.Identity()

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Metric)
    monkeypatch.setattr("lpl.evaluation.networks.INCEPTION_NEEDS", {})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    with pytest.raises(ValueError, match="--features inception: .*Weights only load failed"):
        load_network("inception")
    assert not loaded and os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0") == "0"
    torch.save({"weight": torch.ones(2)}, tmp_path / "inception.pth")
    assert load_network("inception").name == "inception" and len(loaded) == 1


# Data sets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """An image that no data set here holds."""
    path = tmp_path / "elsewhere" / "secret.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 40), "red").save(path)
    return path


def rows(folder, tmp_path, **flags):
    """(file or None, reason or None) of each sample of a data set that --dataset_name or --train_data_dir names."""
    flags = flags or {"dataset_name": str(folder)}
    config = settings(cache_dir=str(tmp_path / "cache"), **flags)
    images = over(load_data(config)[0], config)
    found = []
    for index in range(len(images)):
        found.append(dict(images[0, index]["bad"]).get(index))
    return found


def with_good(folder, *lines):
    """A folder of a good image, and a metadata.jsonl that has these lines too."""
    folder.mkdir()
    static(40, 40).save(folder / "good.png")
    lines = [{"file_name": "good.png", "text": "good"}, *lines]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("name", ["../elsewhere/secret.png", "{}", "file://{}", "good.png/../../elsewhere/secret.png"])
def test_names_in_metadata_cannot_leave_the_folder(name, secret, tmp_path):
    folder = with_good(tmp_path / "data", {"file_name": name.format(secret), "text": "secret"})
    with pytest.raises(ValueError, match=f"--train_data_dir {folder}: .*file_name.*inside the directory"):
        rows(folder, tmp_path, train_data_dir=str(folder))


def test_an_address_in_metadata_is_not_fetched(tmp_path):
    folder = with_good(tmp_path / "data", {"file_name": "https://example.com/cat.png", "text": "far"})
    with pytest.raises(ValueError, match="file_name.*inside the directory"):
        rows(folder, tmp_path, train_data_dir=str(folder))


def test_links_cannot_leave_the_folder(secret, tmp_path):
    lines = [{"file_name": f"{name}.png", "text": name} for name in ("out", "in")]
    folder = with_good(tmp_path / "data", *lines)
    (folder / "out.png").symlink_to(secret)
    (folder / "in.png").symlink_to(folder / "good.png")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):  # the folder itself may be a link
        reasons = rows(folder, tmp_path, train_data_dir=str(place))
        outside = f"{place}/out.png is a link to {secret}, which is not in the data set's folder; copy it there"
        assert [why for why in reasons if why] == [outside]


IMAGE_AND_TEXT = Features({"image": ImageFeature(), "text": Value("string")})


def parquet(folder, *images):
    """A data set of a parquet file that says what its images are."""
    folder.mkdir()
    table = pyarrow.table({"image": pyarrow.array(images, ImageFeature().pa_type), "text": ["x"] * len(images)})
    described = json.dumps({"info": {"features": IMAGE_AND_TEXT.to_dict()}})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": described}), folder / "train.parquet")
    return folder


def test_paths_in_parquet_files_cannot_leave_the_folder(secret, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    static().save(buffer, "PNG")
    paths = [
        str(secret),
        f"file://{secret}",
        f"{tmp_path}/data/../elsewhere/secret.png",
        "https://example.com/cat.png",
    ]
    paths += [
        f"zip://a.png::{secret}",
        f"{tmp_path}/data/x::file://{secret}",
        "secret.png",
        "hf://datasets/me/mine/a.png",
    ]
    good = {"bytes": buffer.getvalue(), "path": str(secret)}
    folder = parquet(tmp_path / "data", good, *({"bytes": None, "path": path} for path in paths))
    monkeypatch.chdir(secret.parent)
    reasons = rows(folder, tmp_path)
    assert reasons == [None, *(f"{path} is not in the data set's folder; copy it there" for path in paths)]


def test_images_in_the_folder_may_be_named(tmp_path):
    static().save(tmp_path / "a.png")
    folder = parquet(tmp_path / "data", {"bytes": None, "path": str(tmp_path / "data" / "a.png")})
    shutil.move(tmp_path / "a.png", folder)
    assert rows(folder, tmp_path) == [None]


def test_a_card_cannot_point_elsewhere(secret, tmp_path):
    for name, pattern in (("absolute", f"{secret.parent}/**"), ("relative", "../elsewhere/**")):
        folder = tmp_path / name
        with_good(folder)
        (secret.parent / "metadata.jsonl").write_text('{"file_name": "secret.png", "text": "a secret"}\n')
        card = {"configs": [{"config_name": "default", "data_files": pattern}]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        with pytest.raises(
            ValueError, match="no image .* can be read.*the first: .*secret.png is not in the data set's folder"
        ):
            rows(folder, tmp_path)
        card = {"dataset_info": {"features": IMAGE_AND_TEXT._to_yaml_list()}}
        other = tmp_path / f"{name} json"
        other.mkdir()
        (other / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        (other / "train.jsonl").write_text(json.dumps({"image": str(secret), "text": "x"}) + "\n")
        with pytest.raises(
            ValueError, match="no image .* can be read.*the first: .*secret.png is not in the data set's folder"
        ):
            rows(other, tmp_path)


def test_archives_are_read_where_they_are(secret, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    static().save(tmp_path / "a.png")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
        archive.write(secret, "../elsewhere/secret.png")
        archive.writestr("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n')
    config = settings(train_data_dir=str(folder))
    found = load_dataset(
        "imagefolder", data_files=[str(folder / "images.zip")], split="train", cache_dir=str(tmp_path / "cache")
    )
    images = over(found.cast_column("image", ImageFeature(decode=False)), config)
    assert len(images) == 1 and images[0, 0]["bad"] == []


@pytest.mark.parametrize(
    "path, folder, inside",
    [
        ("/data/a.png", "/data", True),
        ("/data/sub/../a.png", "/data", True),
        ("/data/../a.png", "/data", False),
        ("/database/a.png", "/data", False),
        ("zip://a.png::/data/a.zip", "/data", True),
        ("zip://a.png::/a.zip", "/data", False),
        ("zip://a.png::/data/a.zip::file:///etc/a.zip", "/data", False),
        ("zip://a.png::/data/x::/etc/a.zip", "/data", False),
        ("reference://::/data/a.json", "/data", False),
        ("hf://datasets/a/b@main/c.png", "hf://datasets/a/b", True),
        ("zip://x.png::hf://datasets/a/b/c.zip", "hf://datasets/a/b", True),
        ("hf://datasets/a/bc/c.png", "hf://datasets/a/b", False),
        ("hf://datasets/a/b/../c/c.png", "hf://datasets/a/b", False),
        ("hf://datasets/a/b/x::file:///etc/a.png", "hf://datasets/a/b", False),
        ("https://example.com/a.png", "/data", False),
        ("datasets/a/b/c.png", "hf://datasets/a/b", False),
    ],
)
def test_where_a_path_leads(path, folder, inside):
    assert lies_in(path, folder) is inside


def test_a_data_set_of_the_hub_lies_in_what_was_downloaded():
    folders = data_folders(settings(dataset_name="user/pictures").data, "kept")
    assert folders[0] == "hf://datasets/user/pictures" and "kept/downloads" in folders
    assert data_folders(settings(train_data_dir="pictures").data, None) == ["pictures"]
    assert data_folders(settings().data, None) == []


def test_scripts_of_data_sets_are_not_run(tmp_path, code, mark):
    folder = with_good(tmp_path / "data")
    (folder / "data.py").write_text(code)
    with pytest.raises(ValueError, match="--dataset_name .*scripts are no longer supported"):
        rows(folder, tmp_path)


def test_pickles_are_no_data_sets(tmp_path, mark):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.pkl").write_bytes(pickle.dumps(Evil(mark)))
    for flags in ({"dataset_name": str(folder)}, {"dataset_name": "pandas", "train_data_dir": str(folder)}):
        with pytest.raises(ValueError, match="--dataset_name .*cannot be loaded: (No|Pickle)"):
            rows(folder, tmp_path, **flags)


def archive(place, files):
    place.parent.mkdir()
    with tarfile.open(place, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return place.parent


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "npy", "npz"])
def test_pickles_in_archives_stay_closed(suffix, tmp_path, mark):
    buffer = io.BytesIO()
    static().save(buffer, "PNG")
    evil = pickle.dumps(Evil(mark))
    if suffix == "npy":
        stream = io.BytesIO()
        import numpy

        numpy.save(stream, numpy.array([Evil(mark)], dtype=object), allow_pickle=True)
        evil = stream.getvalue()
    files = {"0.png": buffer.getvalue(), "0.txt": b"a caption", f"0.{suffix}": evil}
    folder = archive(tmp_path / "data" / "train.tar", files)
    flags = {"dataset_name": str(folder), "image_column": "png", "caption_column": "txt"}
    if suffix in ("pyd", "pickle", "pkl"):
        assert rows(folder, tmp_path, **flags) == [None]
    else:
        with pytest.raises(ValueError, match="--dataset_name .*cannot be loaded"):
            rows(folder, tmp_path, **flags)


def test_programs_are_no_images(tmp_path, mark, monkeypatch):
    """PIL would give EPS to Ghostscript, which is an interpreter."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\n[ $1 = --version ] || touch {mark}\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.eps")
    with pytest.raises(OSError):
        Image.open(tmp_path / "a.eps").load()
    assert mark.exists()
    mark.unlink()
    lines = [{"file_name": name, "text": "x"} for name in ("a.png", "a.eps")]
    folder = with_good(tmp_path / "data", *lines)
    for line in lines:
        shutil.copy(tmp_path / "a.eps", folder / line["file_name"])
    reasons = rows(folder, tmp_path, train_data_dir=str(folder))
    assert (
        sum(reason is None for reason in reasons) == 1 and sum("cannot identify" in str(why) for why in reasons) == 2
    )
    assert len(folder_images(folder, Preprocessing(8), progress=False)) == 1
    with pytest.raises(ValueError, match="cannot identify"):
        inspect.read_image(folder / "a.png", 8)


def test_metadata_of_real_images_cannot_leave_the_folder(secret, tmp_path, caplog):
    names = ["../elsewhere/secret.png", str(secret), "link.png"]
    folder = with_good(tmp_path / "data", *({"file_name": name, "text": "secret"} for name in names))
    (folder / "link.png").symlink_to(secret)
    images = folder_images(folder, Preprocessing(8), progress=False)
    assert images.captions == ["good"] and "3 images are left out" in caplog.text
    assert caplog.text.count("is not in the data set's folder") == 3


# Recipes -------------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: !!python/object/apply:builtins.open ['{mark}', 'w']", "could not determine a constructor"),
        ("seed: !!python/object/new:os.system ['touch {mark}']", "could not determine a constructor"),
        ("!!python/object/apply:os.system ['touch {mark}']", "could not determine a constructor"),
        ("? !!python/name:os.system\n: 1", "could not determine a constructor"),
        (LAUGHS + "use_ema: *a29", "reference"),
        (LAUGHS + "validation_prompts: *a29", "reference"),
        ("use_ema: &a {{b: *a}}", "reference"),
        ("use_ema: " + "[" * 5000, "recursion"),
        ("validation_prompts: " + "[" * 300 + "]" * 300, "plain value"),
        ("a" * 1_000_001, "1,000,000 bytes"),
        ("seed: " + "9" * 5000, "digits"),
        ("seed: 2020-13-45", "month"),
        ("seed: 1e400", "seed"),
        ("trust_remote_code: true", "there is no flag 'trust_remote_code'"),
        ("'__class__': 1", "there is no flag"),
        ("given: [seed]", "there is no flag 'given'"),
        ("config: other.yaml", "there is no flag 'config'"),
        ("? [a, b]\n: 1", "unhashable"),
        ("1: 2", "there is no flag 1"),
        ("\0", "not allowed"),
        ("seed: |\n  1\n  2", "invalid int value"),
    ],
)
def test_recipes_are_data(text, said, sd_pipeline, image_folder, tmp_path, capsys, mark):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("{mark}", str(mark)).replace("{{", "{").replace("}}", "}"))
    message = refusal(capsys, [*arguments(sd_pipeline, image_folder, tmp_path / "run"), "--config", str(recipe)])
    assert message.startswith(f"--config {recipe}: ") and said in message and len(message) < 1000
    (tmp_path / "run").mkdir()
    shutil.copy(recipe, tmp_path / "run")
    with pytest.raises((ValueError, SystemExit)):
        find_models(str(tmp_path / "run"))


# The code itself -----------------------------------------------------------------------------------------------------

SOURCES = [ROOT / "train_text_to_image_lpl.py", *sorted((ROOT / "lpl").rglob("*.py"))]
NEVER = (
    *(r"trust_remote_code\W*True", r"custom_pipeline", r"allow_pickle", r"weights_only\W*False"),
    *(r"\b(c?[pP]ickle|dill|joblib|marshal|shelve)\.", r"torch\.load\(", r"\b(np|numpy)\.load\("),
    *(r"yaml\.(load\((?!content, RecipeLoader)|unsafe|full)", r"(?<![\w.])(eval|exec)\(", "subprocess", r"os\.system"),
)


def test_the_code_has_no_way_in():
    """But lpl.compare starts the user's own training command."""
    for file in SOURCES:
        if file == ROOT / "lpl/comparison/runs.py":
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if any(re.search(pattern, line) for pattern in NEVER)]
        assert not found, f"{file.name}: {found}"


def test_from_pretrained_reads_safetensors_only():
    """Whatever of ours loads weights says so, each time."""
    classes = (
        "Config",
        "config_class",
        "Tokenizer",
        "ImageProcessor",
        "pipeline_class",
        "DiffusionPipeline",
        "SchedulerMixin",
    )
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        for call in re.finditer(r"(\w+)(?:\([^()]*\))?\.from_pretrained\(([^()]|\([^()]*\))*\)", text):
            if call[1].endswith(classes) or call[1] == "PeftModel" or "`" in text[call.start() - 3 : call.end() + 3]:
                continue
            assert "use_safetensors=True" in call[0] or "**source" in call[0], f"{file.name}: {call[0]}"
