"""What other programs read in the header of a LoRA file. The names and values are those of their code.

`a1111` and `swarm` do what AUTOMATIC1111's extensions-builtin/Lora/network.py and SwarmUI's T2IModelClassSorter.cs do;
the versions are those that sd-scripts' load functions return, the architectures those of its sai_model_spec.py, and of
SwarmUI where sd-scripts has others.
"""

import hashlib
import json
import re
import shutil
from datetime import datetime

import pytest
from loras import tiny_lora
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny_families import FAMILY_OF, TINY, data_fixture
from trainer import train

from lpl.families import FAMILIES
from lpl.publishing.command import check_finished
from lpl.publishing.publication import published
from lpl.tools import layout


LORA = {"rank": 2, "lora_alpha": 3, "lpl_weight": 0, "max_train_steps": 1}
FILE, OTHERS = layout.LORA, "run" + layout.OTHERS_SUFFIX
# Family -> modelspec.architecture, ss_base_model_version, ss_network_module
KNOWN = {
    "stable-diffusion": ("stable-diffusion-v1/lora", "sd_v1", "networks.lora"),
    "stable-diffusion-xl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "networks.lora"),
    "stable-diffusion-3": ("stable-diffusion-v3-medium/lora", "3-medium", "networks.lora_sd3"),
    "flux": ("flux-1-dev/lora", "flux1", "networks.lora_flux"),
    "sana": ("nvidia-sana-1600/lora", "sana", "networks.lora"),
    "flux2": ("Flux.2-dev/lora", "flux2", "networks.lora"),
    "chroma": ("chroma/lora", "chroma", "networks.lora_flux"),
    "lumina-2": ("lumina-2/lora", "lumina2", "networks.lora_lumina"),
    "auraflow": ("auraflow-v1/lora", "auraflow", "networks.lora"),
    "wan": ("wan2.1/lora", "wan2.1", "networks.lora"),
    "pixart-sigma": ("pixart-ms-sigma-xl-2/lora", "pixart-sigma", "networks.lora"),
}
PREDICTIONS = {"stable-diffusion-3": "flow_matching", "flux": "flow_matching", "sana": "flow_matching"}
IMPLEMENTATIONS = {
    "stable-diffusion-xl": "https://github.com/Stability-AI/generative-models",
    "stable-diffusion-3": "https://github.com/Stability-AI/sd3-ref",
    "flux": "https://github.com/black-forest-labs/flux",
    "flux2": "https://github.com/black-forest-labs/flux2",
    "flux2-klein": "https://github.com/black-forest-labs/flux2",
    "chroma": "https://huggingface.co/lodestones/Chroma",
    "z-image": "https://github.com/Tongyi-MAI/Z-Image",
    "qwen-image": "https://github.com/QwenLM/Qwen-Image",
    "hidream-i1": "https://github.com/HiDream-ai/HiDream-I1",
    "wan": "https://github.com/Wan-Video/Wan2.1",
}
MUST = ("sai_model_spec", "architecture", "implementation", "title", "resolution")  # of ModelSpec 1.0.1


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def lora_files(folder):
    files = [folder / FILE, *folder.glob("*_comfyui.safetensors"), *folder.glob("*_lora/*.safetensors")]
    return [file for file in files if file.is_file()]


def content(path):
    """The bytes after the header, as the programs hash them."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def a1111(values):
    """For which models A1111 lists a LoRA, and by what name it is called in a prompt."""
    if values.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL", values["ss_output_name"]
    return "SD2" if values.get("ss_v2") == "True" else "SD1", values["ss_output_name"]


def swarm(values):
    """Class, width and height in SwarmUI."""
    remaps = {"flux-1-dev/lora": "Flux.1-dev/lora", "flux-1-schnell/lora": "Flux.1-dev/lora"}
    width, height = re.fullmatch(r"(\d+)x(\d+)", values["modelspec.resolution"]).groups()
    return remaps.get(values["modelspec.architecture"], values["modelspec.architecture"]), int(width), int(height)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_file_of_every_family_says_what_it_is_for(name, request, tmp_path):
    family = FAMILY_OF[name]
    images = request.getfixturevalue(data_fixture(family))
    out = train(request.getfixturevalue(TINY[name][0]), images, tmp_path / "run", **LORA)
    files = lora_files(out)
    assert len(files) == 1 + (family.lora_layout is not None)
    for file in files:
        values, digest = metadata(file), hashlib.sha256(content(file)).hexdigest()
        spec = {key.removeprefix("modelspec."): value for key, value in values.items()}
        assert all(spec[key] for key in MUST)
        known = KNOWN.get(name, (f"{name}/lora", name, "networks.lora"))
        assert (spec["architecture"], values["ss_base_model_version"], values["ss_network_module"]) == known
        assert spec["implementation"] == (
            IMPLEMENTATIONS.get(name, "diffusers") if file.name == OTHERS else "diffusers"
        )
        only = family.objectives[0] if len(family.objectives) == 1 else "epsilon"
        assert spec["prediction_type"] == PREDICTIONS.get(name, only)
        assert (spec["hash_sha256"], values["sshs_model_hash"]) == (f"0x{digest}", digest)
        assert a1111(values) == ("SDXL" if name == "stable-diffusion-xl" else "SD1", "run")
        assert swarm(values)[1:] == (32, 32)
        assert {key: values[f"ss_{key}"] for key in ("network_dim", "network_alpha", "resolution", "v2", "steps")} == {
            "network_dim": "2",
            "network_alpha": "3",
            "resolution": "(32, 32)",
            "v2": "False",
            "steps": "1",
        }
        assert str(tmp_path) not in str(values) and str(images.parent) not in str(values)
        assert save(load_file(file))[-len(content(file)) :] == content(file)  # whole, and read by safetensors itself
    check_finished(out)


@pytest.mark.parametrize(
    "name, configuration, prediction, architecture, version",
    [
        ("stable-diffusion", {"cross_attention_dim": 768}, "v_prediction", "stable-diffusion-v1", "sd_v1_v"),
        ("stable-diffusion", {"cross_attention_dim": 1024}, "epsilon", "stable-diffusion-v2-512", "sd_v2"),
        ("stable-diffusion", {"cross_attention_dim": 1024}, "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v"),
        ("stable-diffusion-xl", {}, "v_prediction", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        ("stable-diffusion-3", {"qk_norm": "rms_norm"}, "flow_matching", "stable-diffusion-v3.5-large", "3-5-large"),
        (
            "stable-diffusion-3",
            {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
            "flow_matching",
            "stable-diffusion-v3.5-medium",
            "3-5-medium",
        ),
        ("flux", {"guidance_embeds": False}, "flow_matching", "flux-1-schnell", "flux1"),
    ],
)
def test_kinds_of_a_family(name, configuration, prediction, architecture, version):
    family = FAMILY_OF[name]
    found = family.architecture({family.denoiser_name: configuration}, prediction)
    assert (found.name, found.version) == (architecture, version)
    assert a1111({"ss_v2": str(found.second), "ss_output_name": "x"})[0] == ("SD2" if "v2" in architecture else "SD1")


@pytest.fixture(scope="module")
def run(sd_v_pipeline, image_folder, tmp_path_factory):
    """A rank-stabilised LoRA with a trigger word and samples, on captions that hold what is not for the public."""
    images = shutil.copytree(image_folder, tmp_path_factory.mktemp("data") / "secret/pictures")
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = f"red, small, /home/somebody/{row['file_name']}, hf_{'a' * 30}"
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"trigger_word": "sks /home/somebody/toy", "use_rslora": True, "validation_prompts": ["a cat"]}
    flags |= {"validation_inference_steps": 1, "lpl_weight": 0.1, "lpl_sigma_threshold": 100}
    return train(sd_v_pipeline, images, tmp_path_factory.mktemp("out") / "run", **LORA | flags)


def test_tags_trigger_and_method(run):
    for file in lora_files(run):
        values = metadata(file)
        tags = json.loads(values["ss_tag_frequency"])["pictures"]
        assert tags["red"] == tags["small"] == 8 and tags["hf_..."] == 8
        assert values["modelspec.trigger_phrase"] == "sks path/to/toy"
        assert values["modelspec.usage_hint"] == "Trigger word: sks path/to/toy"
        assert "trained on 8 images for 1 step" in values["modelspec.description"]
        assert "latent perceptual loss" in values["ss_training_comment"]
        assert "latent-perceptual-loss" in values["modelspec.tags"].split(", ")
        assert values["modelspec.prediction_type"] == "v" and values["ss_base_model_version"] == "sd_v1_v"
        assert datetime.fromisoformat(values["modelspec.date"]).tzinfo is not None
        assert "somebody" not in str(values) and "secret" not in str(values) and "aaaa" not in str(values)


def test_alpha_is_the_one_that_gives_the_scale(run):
    """Of rank-stabilised LoRA, alpha / sqrt(rank): what a program computes of dimension and alpha, and in the file."""
    values, tensors = metadata(run / OTHERS), load_file(run / OTHERS)
    alphas = {float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    assert {round(alpha, 3) for alpha in alphas} == {round(float(values["ss_network_alpha"]), 3)} == {4.243}


def test_ranks_that_differ_and_a_base_with_a_merged_lora(sd_pipeline, image_folder, tmp_path):
    merged = tiny_lora(sd_pipeline, tmp_path / "style")
    flags = LORA | {"lora_rank_pattern": ["to_q=4"], "merge_lora": [f"{merged}:0.5"]}
    values = metadata(train(sd_pipeline, image_folder, tmp_path / "run", **flags) / OTHERS)
    assert values["ss_network_dim"] == values["ss_network_alpha"] == "Dynamic"
    base = f"{sd_pipeline.name} with 1 merged LoRA"
    assert values["ss_sd_model_name"] == base and base in values["modelspec.description"]


def test_diffusers_own_metadata_stays(run):
    own = json.loads(metadata(run / FILE)["lora_adapter_metadata"])
    assert own["unet.r"] == 2 and own["unet.use_rslora"]


def test_the_preview_is_the_last_sample(run):
    """Under a name that A1111, Forge, ComfyUI and managers look for: the file's, with .preview.png."""
    preview = run / "run_comfyui.preview.png"
    assert preview.read_bytes() == (run / "samples/step-000001/00.png").read_bytes()
    assert Image.open(preview).size == (32, 32)
    assert {preview.name, FILE, OTHERS} <= {str(path) for path in published(run)}


def test_no_preview_without_samples(sd_pipeline, image_folder, tmp_path):
    out = train(sd_pipeline, image_folder, tmp_path / "run", **LORA)
    assert not list(out.glob("*.preview.png"))
