"""The command ``python -m lpl.inspect``: what it writes, and what it refuses before it loads weights."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from original_layout import single_file
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_vae

from lpl.config.groups import Lpl
from lpl.inspection import command as inspect
from lpl.inspection.vae import check_vae
from tests.inspection.test_measure import noise_image


FILES = {"features.png", "outliers.png", "balance.png", "errors.png", "interpolation.png", "inspect.json"}


@pytest.fixture(scope="module", autouse=True)
def as_before():
    """The command changes how warnings are printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        yield


def words(model, images, folder, *more):
    return [
        *("--pretrained_model_name_or_path", str(model), "--images", *map(str, images), "--output_dir", str(folder)),
        *("--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def command(sd_pipeline, image_folder, tmp_path_factory):
    """The folder that the command has filled, for two of eight images, and what it has printed."""
    folder = tmp_path_factory.mktemp("inspected") / "deep"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
        inspect.main(words(sd_pipeline, [image_folder], folder, "--num_images", "2", "--lpl_blocks", "up_1", "mid"))
    return folder, "\n".join(printed)


@pytest.fixture
def numbers(command):
    return json.loads((command[0] / "inspect.json").read_text())


# What is written


def test_pictures_and_numbers_are_written(command, numbers, image_folder):
    folder, printed = command
    assert {file.name for file in folder.iterdir()} == FILES
    for file in FILES - {"inspect.json"}:
        picture = np.asarray(Image.open(folder / file).convert("L"))
        assert 900 <= picture.shape[1] <= 1200 and picture.std() > 5, file
    files = sorted(path for path in image_folder.iterdir() if path.suffix != ".jsonl")
    assert numbers["images"] == [str(files[0]), str(files[4])]  # evenly spread
    assert numbers["resolution"] == 32 and list(numbers["outliers"]["blocks"]) == ["mid", "up_1"]
    for told in (numbers["balance"]["flags"], numbers["outliers"]["advice"]["why"], "mid", "16x32x32"):
        assert told in printed
    assert numbers["balance"]["flags"].startswith("--lpl_blocks mid up_1 --lpl_depth_weighting 1 ")


def test_warnings_are_in_plain_words(command):
    assert warnings.formatwarning("few images", UserWarning, "f.py", 1) == (
        "python -m lpl.inspect: warning: few images\n"
    )


def test_a_vae_alone_will_do(tmp_path):
    tiny_vae("dc").save_pretrained(tmp_path / "vae")
    noise_image().save(tmp_path / "image.png")
    given = words(tmp_path / "vae", [tmp_path / "image.png"], tmp_path / "out", "--resolution", "32")
    found = inspect.run(*inspect.groups_of(vars(inspect.build_parser().parse_args(given))))
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert found["vae"]["class"] == "AutoencoderDC" and list(found["outliers"]["blocks"]) == ["up_0", "up_1", "up_2"]
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == found


@pytest.mark.parametrize("parts", [("unet", "vae"), ("unet",)], ids=["with VAE", "without"])
def test_a_single_file_is_its_vae(parts, sd_pipeline, command, image_folder, tmp_path, numbers):
    """Or that of the pipeline with its configuration. The numbers are the pipeline's; a denoiser changes nothing."""
    file = single_file(sd_pipeline, tmp_path / "model.safetensors", parts)
    more = "--single_file_config", str(sd_pipeline), "--denoiser_model_name_or_path", str(file)
    same = "--num_images", "2", "--lpl_blocks", "up_1", "mid"
    given = words(file, [image_folder], tmp_path / "out", *more, *same)
    with pytest.warns(UserWarning, match="--denoiser_model_name_or_path has no effect") as told:
        found = inspect.run(*inspect.groups_of(vars(inspect.build_parser().parse_args(given))))
    assert found["vae"].pop("path") == str(file) and numbers["vae"].pop("path") == str(sd_pipeline)
    assert json.loads(json.dumps(found)) == numbers
    assert not any("single_file_config" in str(warning.message) for warning in told)


# Refusals


@pytest.fixture
def refuse(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    """Run the command with something changed; what it says on the way out. No weights may be loaded."""
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))

    def run(*more, model=sd_pipeline, images=(image_folder,)):
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inspect.main(words(model, images, tmp_path / "out", *more))
        assert ended.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "more, said",
    [
        (["--num_images", "0"], "--num_images 0: it must be more than 0"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--lpl_outlier_quantile", "0.5"], "--lpl_outlier_quantile 0.5: it must be more than 0 and less than 0.5"),
        (["--lpl_outlier_margin", "-2"], "--lpl_outlier_margin -2.0: it must be 0 or more"),
        (
            ["--lpl_blocks", "up_7"],
            "there is no up_7, did you mean up_2? this decoder's blocks are mid, up_0, up_1, up_2",
        ),
        (["--lpl_blocks", "rgb"], "pixels are no features"),
        (["--resolution", "30"], "--resolution 30: this VAE takes multiples of 4 from 8 on, such as 28 or 32"),
        (["--resolution", "4"], "--resolution 4: this VAE takes multiples of 4 from 8 on, such as 8 or 12"),
        (["--lpl_vae_dtype", "float16"], "--lpl_vae_dtype float16 needs a GPU"),
        (["--device", "meta"], "--device meta: PyTorch cannot compute on it here"),
        (["--device", "gpu"], "--device gpu"),
        (["--lpl_block", "mid"], "did you mean --lpl_blocks?"),
    ],
)
def test_flags_that_cannot_be_are_refused(refuse, more, said):
    assert said in refuse(*more)


def test_images_that_are_not_there_are_refused(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for path, said in (("nowhere", "no such file"), ("empty", "has no images"), ("broken.png", "cannot be read")):
        assert f"--images {tmp_path / path}: " in (told := refuse(images=[tmp_path / path])) and said in told


def test_models_that_are_none_are_refused(refuse, tmp_path):
    assert "neither a pipeline nor a VAE is found there" in refuse(model=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    assert "of the class AutoencoderOobleck; supported are AutoencoderKL," in refuse(model=tmp_path)


def test_a_single_file_that_is_none_is_refused(refuse, tmp_path):
    save_file({"lora_unet.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    file = tmp_path / "lora.safetensors"
    assert f"--pretrained_model_name_or_path {file}: this is a LoRA" in refuse(model=file)


def test_a_vae_that_overflows_in_half_precision_is_refused():
    config = {**tiny_vae("sd").config, "_class_name": "AutoencoderKL", "force_upcast": True}
    with pytest.raises(ValueError, match="force_upcast"):
        check_vae(Lpl(lpl_vae_dtype="float16"), config)


@pytest.mark.parametrize("sample_size, resolution", [(64, 64), (1024, 512), ([480, 720], 512), (2, 8)])
def test_the_default_resolution_is_the_vaes_but_at_most_512(sample_size, resolution):
    config = {**tiny_vae("sd").config, "sample_size": sample_size}
    assert inspect.image_size(None, config) == (resolution, resolution)


def test_shared_flags_are_those_of_the_training_script():
    """Names, types, defaults and help."""
    from lpl.config.command_line import build_parser

    theirs = {action.dest: action for action in build_parser().flags}
    ours = {action.dest: action for action in inspect.build_parser().flags}
    for name in inspect.SHARED_FLAGS:
        for what in ("default", "help", "choices", "type", "nargs"):
            assert getattr(ours[name], what) == getattr(theirs[name], what), name


def test_nothing_is_written_among_the_images(sd_pipeline, image_folder):
    given = words(sd_pipeline, [image_folder], image_folder / "inspected")
    with pytest.raises(ValueError, match="--output_dir .* lies in --images"):
        inspect.run(*inspect.groups_of(vars(inspect.build_parser().parse_args(given))))
