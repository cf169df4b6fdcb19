"""Pipelines that are made of a single file, another denoiser and merged LoRA: weights arrive bit for bit."""

import json
import shutil

import pytest
import torch
import trainer
from loras import tiny_lora
from original_layout import component, single_file
from safetensors.torch import load_file, save_file
from tiny import tiny_sdxl
from trainer import same
from transformers import CLIPTextModel

from lpl.config.groups import Model
from lpl.families.derived import derived, origin
from lpl.families.description import read_pipeline
from lpl.publishing.export import export
from lpl.tools.layout import INDEX


SD = ("unet", "vae", "sd_text_encoder")
pytestmark = pytest.mark.filterwarnings("ignore:.*this is done once")


def weights(folder):
    """Without the prefix of CLIP's names, which transformers 5 writes no more."""
    found = trainer.weights(folder)
    return {(file, name.removeprefix("text_model.")): value for (file, name), value in found.items()}


@pytest.fixture
def made(tmp_path):
    """The flags, with the derived pipeline's folder."""

    def make(source, whole=True, **flags):
        model = Model(pretrained_model_name_or_path=str(source), cache_dir=str(tmp_path / "cache"), **flags)
        return derived(model, whole)

    return make


@pytest.fixture(scope="module")
def sdxl_file_pipeline(tmp_path_factory):
    """A tiny SDXL whose second encoder is as wide as its projection, as the original's conversion takes it to be."""
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl16"), projection_dim=16)


@pytest.fixture
def sd_file(sd_pipeline, tmp_path):
    return single_file(sd_pipeline, tmp_path / "model.safetensors", SD)


# Single files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pipeline, parts, lacks",
    [
        ("sd_pipeline", SD, []),
        ("sdxl_file_pipeline", ("unet", "vae", "xl_text_encoder", "xl_text_encoder_2"), []),
        ("sd3_pipeline", ("transformer", "vae"), ["text_encoder", "text_encoder_2", "text_encoder_3"]),
    ],
)
def test_a_single_file_becomes_the_pipeline_that_it_was_made_of(pipeline, parts, lacks, request, made, tmp_path):
    folder = request.getfixturevalue(pipeline)
    file = single_file(folder, tmp_path / "model.safetensors", parts)
    model = made(file, single_file_config=str(folder))
    assert same(weights(model.folder), weights(folder))
    assert origin(model) == (str(folder), lacks) and model.source == str(file)
    assert read_pipeline(model).family is read_pipeline(Model(pretrained_model_name_or_path=str(folder))).family


@pytest.mark.parametrize(
    "name", ["z_image", "krea2", pytest.param("ernie_image", marks=pytest.mark.slow), "flux2_klein"]
)
def test_an_exported_transformer_can_be_trained(name, request, made, tmp_path):
    folder = request.getfixturevalue(f"{name}_pipeline")
    model = made(export(folder, output=tmp_path / "model.safetensors"), single_file_config=str(folder))
    assert same(weights(model.folder), weights(folder))


def test_a_clip_encoder_has_the_names_that_all_versions_read(sd_file, sd_pipeline, made):
    folder = made(sd_file, single_file_config=str(sd_pipeline)).folder
    names = load_file(f"{folder}/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    read, before = (CLIPTextModel.from_pretrained(f"{place}/text_encoder") for place in (folder, sd_pipeline))
    assert same(read.state_dict(), before.state_dict())


def test_a_single_file_has_no_variant(sd3_pipeline, made, tmp_path):
    file = single_file(sd3_pipeline, tmp_path / "model.safetensors", ("transformer", "vae"))
    with pytest.warns(UserWarning, match="--variant has no effect in this run"):
        model = made(file, single_file_config=str(sd3_pipeline), variant="fp16")
    assert model.variant is None and same(weights(model.folder), weights(sd3_pipeline))


def test_weights_keep_the_precision_of_the_file(sd_pipeline, made, tmp_path):
    file = single_file(sd_pipeline, tmp_path / "model.safetensors", SD, torch.float16)
    folder = made(file, single_file_config=str(sd_pipeline)).folder
    assert same(weights(folder), {key: value.half() for key, value in weights(sd_pipeline).items()})


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "denoiser_model_name_or_path"])
@pytest.mark.parametrize(
    "source", ["org/repo/m.safetensors", "https://huggingface.co/org/repo/blob/main/m.safetensors"]
)
def test_a_file_of_the_hub_is_downloaded(flag, source, sd_file, sd_pipeline, made, monkeypatch):
    def download(repository, file, **_):
        assert (repository, file) == ("org/repo", "m.safetensors")
        return str(sd_file)

    monkeypatch.setattr("lpl.families.checkpoint_files.try_to_load_from_cache", lambda *_: str(sd_file))
    monkeypatch.setattr("lpl.families.checkpoint_files.hf_hub_download", download)
    denoiser = flag.startswith("denoiser")
    flags = {flag: source} if denoiser else {"single_file_config": str(sd_pipeline)}
    assert same(weights(made(sd_pipeline if denoiser else source, **flags).folder), weights(sd_pipeline))


def test_a_folder_that_holds_only_a_file_is_that_file(sd_file, sd_pipeline, made, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(sd_file, alone)
    assert same(weights(made(alone, single_file_config=str(sd_pipeline)).folder), weights(sd_pipeline))
    shutil.copy(sd_file, alone / "other.safetensors")
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path {alone}: .*several files.* give one of"):
        made(alone, single_file_config=str(sd_pipeline))


def test_a_file_is_converted_once_and_again_when_it_changes(sd_file, sd_pipeline, made):
    with pytest.warns(UserWarning, match="is converted to a pipeline of diffusers; this is done once, in"):
        first = made(sd_file, single_file_config=str(sd_pipeline)).folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpl.families.derived.load_component", None)  # nothing may be converted
        assert made(sd_file, single_file_config=str(sd_pipeline)).folder == first
    tensors = load_file(sd_file)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, sd_file, {"format": "pt"})
    second = made(sd_file, single_file_config=str(sd_pipeline)).folder
    assert second != first
    assert torch.equal(component(second, "unet")["conv_out.bias"], component(first, "unet")["conv_out.bias"] + 1)


def test_a_failed_conversion_leaves_nothing_that_counts(sd_file, sd_pipeline, made, tmp_path):
    tensors = load_file(sd_file)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, sd_file, {"format": "pt"})
    with pytest.raises(ValueError, match="it lacks weights of the unet that .* --single_file_config"):
        made(sd_file, single_file_config=str(sd_pipeline))
    assert [place.suffix for place in (tmp_path / "cache/lpl/pipelines").iterdir()] in ([], [".lock"])


def test_a_file_says_that_it_predicts_v(sd_pipeline, made, tmp_path):
    file = single_file(sd_pipeline, tmp_path / "model.safetensors", SD, extra=("v_pred", "ztsnr"))
    description = read_pipeline(made(file, single_file_config=str(sd_pipeline)))
    assert description.scheduler.config.prediction_type == "v_prediction"
    assert description.scheduler.config.timestep_spacing == "trailing"


def test_an_estimate_needs_configurations_only(sd_file, sd_pipeline, made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpl.families.derived.load_component", None)
        model = made(sd_file, whole=False, single_file_config=str(sd_pipeline))
    assert read_pipeline(model, weights=False).denoiser["_class_name"] == "UNet2DConditionModel"


WHOLE = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"lora_unet_x.lora_down.weight": torch.zeros(1, 2)}, "this is a LoRA; .* --lora_init .* --merge_lora"),
        ({"encoder.conv_in.weight": torch.zeros(1)}, "this is a VAE alone; .* --pretrained_vae_model_name_or_path"),
        ({"text_model.embeddings.x": torch.zeros(1)}, "this is a text encoder alone"),
        ({"emb_params": torch.zeros(2, 3)}, "diffusers does not know this layout"),
        (WHOLE | {"scaled_fp8": torch.zeros(1)}, "its weights are quantised"),
        ({"model.diffusion_model.strange": torch.zeros(1)}, "does not know its architecture; .* --single_file_config"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_its_header(tensors, words, made, tmp_path):
    save_file(tensors, tmp_path / "file.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"--pretrained_model_name_or_path {tmp_path / 'file.safetensors'}: .*{words}"
    ):
        made(tmp_path / "file.safetensors")


def test_a_configuration_that_cannot_be_had_is_named(sd_file, made):
    with pytest.raises(ValueError, match="--single_file_config stable-diffusion-v1-5/.*: there is no such folder"):
        made(sd_file)  # offline


def test_a_configuration_of_another_kind_is_named(sd_file, sd_pipeline, made, tmp_path):
    folder = shutil.copytree(sd_pipeline, tmp_path / "other")
    index = json.loads((folder / INDEX).read_text())
    for change, words in (
        ({"_class_name": "OtherPipeline"}, "the pipeline's class is OtherPipeline; supported are"),
        ({"vae": ["other", "VAE"]}, "its vae is other.VAE, which is no class of"),
    ):
        (folder / INDEX).write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=f"^--single_file_config {folder}: {words}"):
            made(sd_file, single_file_config=str(folder))


# Another denoiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_another_denoiser_takes_the_place_of_the_pipelines(kind, sd_pipeline, sd_v_pipeline, made, tmp_path):
    place = tmp_path / "unet"
    shutil.copytree(sd_v_pipeline / "unet", place)
    tensors = component(place.parent, "unet")
    tensors["conv_in.bias"] += 1
    save_file(tensors, place / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    source = place if kind == "folder" else single_file(tmp_path, tmp_path / "unet.safetensors", ("unet",))
    model = made(sd_pipeline, denoiser_model_name_or_path=str(source))
    assert same(component(model.folder, "unet"), tensors)
    rest = {name: value for name, value in weights(sd_pipeline).items() if not name[0].startswith("unet")}
    assert same({k: v for k, v in weights(model.folder).items() if not k[0].startswith("unet")}, rest)


def test_a_denoiser_of_the_hub(sd_pipeline, sd_v_pipeline, made, tmp_path, monkeypatch):
    """Its configuration is looked at first; what lies below belongs to something else."""
    asked, found = [], sd_v_pipeline / "unet"

    def download(repository, allow_patterns, ignore_patterns, cache_dir, revision):
        asked.append((repository, allow_patterns[-1], ignore_patterns, revision))
        return str(found)

    monkeypatch.setattr("lpl.families.derived.snapshot_download", download)
    model = made(sd_pipeline, denoiser_model_name_or_path="org/unet", revision="main")
    assert same(component(model.folder, "unet"), component(sd_v_pipeline, "unet"))
    assert [each[0] for each in asked] == ["org/unet"] * 2 and [each[3] for each in asked] == [None] * 2
    assert asked[0][1] == "config.json" and asked[1][2] == ["*/*"]
    found = sd_pipeline / "scheduler"
    with pytest.raises(ValueError, match="--denoiser_model_name_or_path org/pipe: this repository has no config.json"):
        made(sd_pipeline, denoiser_model_name_or_path="org/pipe")


def test_a_whole_pipeline_is_no_denoiser(sd_pipeline, made):
    with pytest.raises(
        ValueError, match="--denoiser_model_name_or_path .* this is a pipeline; give the folder of its"
    ):
        made(sd_pipeline, denoiser_model_name_or_path=str(sd_pipeline))


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_what_is_damaged_is_named_as_it_was_given(part, sd_pipeline, made, tmp_path):
    """Not the folder in the cache."""
    pipeline, unet = (
        shutil.copytree(sd_pipeline, tmp_path / "sd"),
        shutil.copytree(sd_pipeline / "unet", tmp_path / "u"),
    )
    if part == "scheduler":
        shutil.rmtree(pipeline / part)
    else:
        folder = unet if part == "unet" else pipeline / part
        (folder / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    named = {"unet": f"--denoiser_model_name_or_path {unet}: unet/diffusion_"}
    with pytest.raises(ValueError) as refused:
        read_pipeline(made(pipeline, denoiser_model_name_or_path=str(unet)))
    assert str(refused.value).startswith(named.get(part, f"--pretrained_model_name_or_path {pipeline}: "))
    assert "cache" not in str(refused.value)


# Merged LoRA ---------------------------------------------------------------------------------------------------------


def test_merged_lora_are_added_to_the_weights(sd_pipeline, made, tmp_path):
    lora = tiny_lora(sd_pipeline, tmp_path / "lora", text_encoders=True)
    folder = made(sd_pipeline, merge_lora=(f"{lora}:0.5", f"{lora / 'lora_comfyui.safetensors'}:0.25")).folder
    factors = load_file(lora / "pytorch_lora_weights.safetensors")
    before, after = weights(sd_pipeline), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(factors) / 2
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    added = 2 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]  # alpha 4, rank 2
    weight = ("unet/diffusion_pytorch_model.safetensors", f"{key.removeprefix('unet.')}.weight")
    torch.testing.assert_close(after[weight], before[weight] + 0.75 * added)


def test_a_changed_alpha_is_merged_anew(dit_pipeline, made, tmp_path):
    lora = tiny_lora(dit_pipeline, tmp_path / "lora")
    first = made(dit_pipeline, merge_lora=(str(lora),)).folder
    assert made(dit_pipeline, merge_lora=(str(lora),)).folder == first
    config = lora / "transformer_lora/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 8.0}))
    assert made(dit_pipeline, merge_lora=(str(lora),)).folder != first


def test_a_lora_of_another_base_is_refused_before_anything_is_merged(sd_pipeline, sdxl_pipeline, made, tmp_path):
    lora = tiny_lora(sdxl_pipeline, tmp_path / "lora")
    with pytest.raises(ValueError, match=f"--merge_lora {lora}: it is of another base model"):
        made(sd_pipeline, merge_lora=(str(lora),))
    assert not (tmp_path / "cache").exists()
