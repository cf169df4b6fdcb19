"""What README and docs/ say holds: links, commands, flags, figures. What README tells to run is run on tiny models."""

import importlib
import itertools
import json
import re
import shlex
from statistics import mean

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from trainer import ROOT, resolved, run

from benchmarks.recipes import END, SMALLER, START, needs, smaller_row
from lpl.config.choices import EMA_DECAY, EMA_DECAY_WITH_LPL
from lpl.config.command_line import build_parser
from lpl.config.foreign import FOREIGN
from lpl.tools.files import entries
from tests.runs.test_shipped_recipes import PIPELINES


README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
OTHERS = sorted(file for file in (ROOT / "examples").rglob("README.md") if "pipeline" not in file.parts)
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md", *OTHERS, ROOT / "tests/gpu/README.md"]
SHOWN = [README, *DOCS]  # what the site shows
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SCRIPT = "train_text_to_image_lpl.py"
DOORS = {  # python -m lpl.NAME -> the module that has its parser
    (door.parent if door.stem == "__main__" else door).stem: match[1]
    for door in (*(ROOT / "lpl").glob("*.py"), *(ROOT / "lpl").glob("*/__main__.py"))
    if (match := re.search(r"^from (lpl\.\w+\.\w+) import main$", door.read_text(), re.MULTILINE))
}
OF_OTHERS = {  # of accelerate, Docker, this repository's own scripts, and a line of sd-scripts' prompts
    *("--cpu", "--multi_gpu", "--num_processes", "--nodes", "--shm-size", "--rows", "--seeds", "--write", "--scale"),
    *("--n", "--w", "--h", "--d", "--l", "--s"),
}
LONGEST = 110


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language="bash"):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page):
    """The page without blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def commands(page):
    """The words of each command in a page."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def parser_of(door):
    return importlib.import_module(DOORS[door]).build_parser()


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


# Layout --------------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(text_of(README).splitlines()) <= 150


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_lines_are_short(page):
    """But rows of tables, what a program writes between marks, and what cannot be broken."""
    written = re.sub(r"^<!-- .*? -->\n.*?^<!-- end.*? -->$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for line in written.splitlines():
        breakable = " " in re.sub(r"\[[^\]]*\]\([^)]*\)", "", line.strip()) and not line.lstrip().startswith(
            ("|", "$$")
        )
        assert len(line) <= LONGEST or not breakable, line


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_begins_with_the_command_that_answers_it(page):
    title, _, rest = text_of(page).partition("\n")
    assert title.startswith("# ") and rest.startswith("\n```bash\n")


def test_every_page_is_in_readme_and_on_the_site():
    menu = text_of(ROOT / "mkdocs.yml")
    for page in DOCS:
        assert f"(docs/{page.name})" in text_of(README) and f": docs/{page.name}\n" in menu, page.name


# Links ---------------------------------------------------------------------------------------------------------------


def anchors(page):
    """Headings as GitHub and the site name them."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


# Commands and flags --------------------------------------------------------------------------------------------------


def training_flags(words):
    return words[words.index(SCRIPT) + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name):
    for words in commands(ROOT / name):
        if SCRIPT in words and words[:3] != ["python", "-m", "lpl.compare"]:
            args = build_parser().parse_args([word for word in training_flags(words) if word not in ("...", "--help")])
            assert (
                args.config is None
                or "/" not in args.config
                or not args.config.startswith("examples")
                or (ROOT / args.config).is_file()
            )
        elif words[:2] == ["python", "-m"] and words[2].startswith("lpl."):
            own = words[3 : words.index("--")] if "--" in words else words[3:]
            parser_of(words[2].removeprefix("lpl.")).parse_args(own)
            if "--" in words:
                build_parser().parse_args(training_flags(words))
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", text_of(ROOT / "Makefile"), re.MULTILINE), words
        else:
            script = next((word for word in words if word.endswith((".py", ".sh"))), None)
            assert script is None or (ROOT / script).is_file(), words


def told_flags(page):
    """Flags that a page gives as its own; of the tables of other trainers, the right column."""
    text = prose(page)
    if page.name in ("migrate.md", "data-from-others.md"):
        text = re.sub(r"^\|.*\|(?=[^|]*\|$)", "", text, flags=re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.parametrize("name", NAMES)
def test_flags_exist(name):
    known = set().union(options(build_parser()), *(options(parser_of(door)) for door in DOORS))
    assert told_flags(ROOT / name) <= known | OF_OTHERS


def test_flags_have_the_defaults_that_are_stated():
    parser = build_parser()
    for page in (README, ROOT / "docs/flags.md"):
        table = re.findall(r"^\| `--(\w+)` \| `([^`]+)`", text_of(page), re.MULTILINE)
        assert len(table) >= 3
        for name, default in table:
            value = getattr(parser.parse_args([f"--{name}", *default.split()]), name)
            assert parser.get_default(name) in (value, *(value if isinstance(value, list) else ())), name


def test_every_flag_of_lpl_is_explained():
    ours = {option for option in options(build_parser()) if option.startswith("--lpl_")} - {
        f"--{name}" for name in FOREIGN
    }
    assert ours <= told_flags(ROOT / "docs/flags.md")


def test_the_flags_of_other_scripts_are_translated():
    page = text_of(ROOT / "docs/migrate.md")
    assert all(f"--{name}" in page for name in FOREIGN - {"local_rank"})


# Runs ----------------------------------------------------------------------------------------------------------------

SMALL = [
    *("--resolution", "32", "--max_train_steps", "1", "--train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--lr_warmup_steps", "0", "--validation_inference_steps", "1", "--num_validation_samples", "1"),
    *("--dataloader_num_workers", "0", "--lpl_threshold_base_resolution", "0", "--report_to", "none"),
]


def shown_trainings(page):
    return [training_flags(words) for words in commands(page) if SCRIPT in words and words[0] != "python"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory, request):
    """README's dry run, then its training, on a tiny SDXL; the result."""
    folder, images = tmp_path_factory.mktemp("readme"), request.getfixturevalue("image_folder")
    dry, training, *_ = shown_trainings(README)
    assert "--dry_run" in dry and "--output_dir" in training
    for words in (dry, training):
        words = [str(images) if word == "path/to/images" else word for word in words]
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
        pipeline = ["--pretrained_model_name_or_path", str(request.getfixturevalue("sdxl_pipeline"))]
        run(
            [
                *words,
                *pipeline,
                *SMALL,
                "--output_dir",
                str(folder / "sdxl-lora"),
                "--cache_dir",
                str(folder / "cache"),
            ]
        )
    return folder / "sdxl-lora"


def replaced(code, changes):
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


@pytest.mark.parametrize("page", [README, ROOT / "docs/first-lora.md"], ids=lambda page: page.name)
def test_the_lora_is_used_as_shown(page, lora, sdxl_pipeline, tmp_path):
    assert (lora / "sdxl-lora_comfyui.safetensors").is_file() and "sdxl-lora/sdxl-lora_comfyui.safetensors" in text_of(
        page
    )
    code = replaced(
        blocks(page, "python")[0],
        {
            '"stabilityai/stable-diffusion-xl-base-1.0"': repr(str(sdxl_pipeline)),
            'dtype=torch.bfloat16).to("cuda")': "dtype=torch.bfloat16)",
            '"sdxl-lora", weight_name': f"{str(lora)!r}, weight_name",
            "num_inference_steps=25": "num_inference_steps=1, height=32, width=32",
            '"cat.png"': repr(str(tmp_path / "cat.png")),
        },
    )
    exec(compile(code, page.name, "exec"), {})
    assert (tmp_path / "cat.png").is_file()


def test_the_own_loop_of_readme(sd_pipeline):
    """LPL is added for the samples inside the threshold, and the gradient reaches the model's output."""
    pipeline = DiffusionPipeline.from_pretrained(sd_pipeline)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 999])
    scheduler = pipeline.scheduler
    output = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    names = {
        "vae": pipeline.vae,
        "noise_scheduler": scheduler,
        "timesteps": timesteps,
        "model_output": output,
        "noisy_latents": scheduler.add_noise(latents, noise, timesteps),
        "latents": latents,
        "loss": torch.zeros(()),
    }
    (code,) = [block for block in blocks(README, "python") if "LatentPerceptualLoss" in block]
    exec(compile(code, "README.md", "exec"), names)
    assert names["inside"].tolist() == [True, False] and names["loss"] > 0
    names["loss"].backward()
    assert output.grad[0].any() and not output.grad[1].any()


def test_trainings_in_the_docs_resolve(request, image_folder, class_folder, no_weights):
    """Every training command of docs/ is accepted, on a tiny model of its family."""
    count = 0
    for page in DOCS:
        for words in shown_trainings(page):
            if "--help" in words or "--lpl_student" in words:  # there is no student
                continue
            count += 1
            recipe = build_parser().parse_args(words).config
            values = yaml.safe_load(text_of(ROOT / recipe)) if recipe and recipe.startswith("examples/") else {}
            source = values.get("pretrained_model_name_or_path", "stabilityai/stable-diffusion-xl-base-1.0")
            pipeline = request.getfixturevalue(PIPELINES.get(source, "dit_pipeline"))
            data = class_folder if "dit" in str(recipe) else image_folder
            drop = {"--for_gpu", "24GB", "16GB", "8x80GB", "--config", recipe}
            words = [word for word in words if word not in drop]
            config = ["--config", str(ROOT / recipe)] if values else []
            changes = {"path/to/images": data, "path/to/imagenet/train": data, "PIPELINE": pipeline}
            words = [str(changes.get(word, word)) for word in words]
            more = [
                "--pretrained_model_name_or_path",
                str(pipeline),
                "--train_data_dir",
                str(data),
                "--resolution",
                "32",
            ]
            resolved([*config, *words, *more])
    assert count >= 10


# Figures -------------------------------------------------------------------------------------------------------------


def recipe_rows():
    """Recipe -> GPUs, GiB with LPL and without, TFLOP with LPL and without."""
    pattern = r"^\| \[(\w+)\.yaml\].*? \| (\d+ x \d+ GB) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$"
    return {row[0]: row[1:] for row in re.findall(pattern, text_of(ROOT / "examples/recipes/README.md"), re.MULTILINE)}


def number(cell):
    return float(cell.split()[0])


def test_readme_has_the_memory_that_is_counted():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) x \|$", text_of(README), re.MULTILINE)
    assert 6 <= len(rows) <= 8
    for name, gpu, with_lpl, without, ratio in rows:
        gpus, *cells = recipe_rows()[name]
        assert (f"1 x {gpu}", with_lpl, without) == (gpus, *cells[:2])
        assert ratio == f"{number(cells[2]) / number(cells[3]):.1f}"


def test_hardware_has_what_the_recipes_say():
    for name, cells in recipe_rows().items():
        if not cells[0].startswith("8 x"):
            row = rf"^\| `{name}` \| [^|]+ \| {re.escape(' | '.join(cells))} \|$"
            assert re.search(row, text_of(ROOT / "docs/hardware.md"), re.MULTILINE), name


def smaller_rows():
    (table,) = re.findall(f"{START}\n(.*?)\n{END}", text_of(ROOT / "docs/hardware.md"), re.DOTALL)
    return table.splitlines()[2:]


def test_smaller_gpus_have_room():
    assert len(smaller_rows()) == len(SMALLER)
    for row, (name, flags, gigabytes) in zip(smaller_rows(), SMALLER, strict=True):
        assert row.startswith(f"| `{name}` | `{flags}` | {gigabytes} GB | ")
        assert number(row.split(" | ")[3]) <= gigabytes
        assert gigabytes < int(recipe_rows()[name][0].split()[2])


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(SMALLER)))
def test_smaller_gpus_have_the_memory_that_is_counted(place):
    name, flags, gigabytes = SMALLER[place]
    assert smaller_rows()[place] == smaller_row(name, flags, gigabytes, needs(name, flags=flags.split()))


def operations():
    """The table of docs/cost.md: the cells of each model."""
    (table,) = re.findall(
        r"<!-- python -m benchmarks.operations -->\n(.*?)\n<!-- end -->", text_of(ROOT / "docs/cost.md"), re.DOTALL
    )
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_readme_has_the_cost_that_is_counted():
    rows = [cells for name, cells in recipe_rows().items() if f"| `{name}` |" in text_of(README)]
    more = max(number(cells[1]) - number(cells[2]) for cells in rows)
    ratios = [number(cells[3]) / number(cells[4]) for cells in rows]
    text = " ".join(text_of(README).split())
    assert f"up to {more:.1f} GiB more memory and {min(ratios):.1f} to {max(ratios):.1f} times the operations" in text
    student, sd15 = " ".join(text_of(ROOT / "docs/student.md").split()), operations()[0]
    share = float(re.search(r"needs ([\d.]+)% of LPL's operations", student)[1]) / 100
    assert f"at most {1 + (max(ratios) - 1) * share:.2f} times. A small one" in text
    assert (
        f"takes {sd15['a student']} times the operations of one without LPL instead of {sd15['x, at that share']}"
        in student
    )
    assert f"up to {max(ratios):.1f} times the operations" in text_of(ROOT / "docs/questions.md")


def measured(name):
    return json.loads(text_of(ROOT / f"benchmarks/results/{name}.json"))


def test_the_cheaper_ways_have_what_was_measured():
    """docs/cost.md: bias and variance; time and memory."""
    estimators, steps = measured("lpl_estimators"), measured("lpl_step_cpu")["results"]
    found = {name.removeprefix("--lpl_student, "): numbers for name, numbers in estimators.items()}
    page, compared = text_of(ROOT / "docs/cost.md"), 0
    for name, *cells in re.findall(
        r"^\| `(--lpl_[^`]+)`[^|]*\| [^|]+ \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \|$", page, re.MULTILINE
    ):
        numbers = found.get(name) or found.get(f"{name}, margin 8")
        if cells[0] and numbers:
            compared += 1
            assert float(cells[0]) == pytest.approx(numbers["bias"], abs=0.00051), name
            assert float(cells[1]) == pytest.approx(numbers["added_variance"], abs=0.0051), name
        if cells[2] and name in steps:
            compared += 1
            wanted = [steps[name]["time"], steps[name]["memory"]]
            assert [float(cell) for cell in cells[2:]] == pytest.approx(wanted, abs=0.0051), name
    assert compared >= 15
    whole, student, corrected = list(measured("lpl_step_student_cpu")["results"].values())[1:]
    text = " ".join(page.split())
    assert f"LPL takes {whole['time']:.2f} times" in text
    assert f"width 256 takes {student['time']:.2f} times" in text
    assert (
        f"every 32nd step {corrected['time']:.2f} times. Memory, with the UNet's weights and gradients, is "
        f"{whole['memory_with_weights']:.2f}, {student['memory_with_weights']:.2f} and" in text
    )


def study():
    return json.loads(text_of(ROOT / "benchmarks/results/study_photographs.json"))["rows"]


def test_readme_has_the_results_of_the_study():
    change = {
        name: mean(run["change"] for run in study()[name].values()) for name in ("flow_lpl", "v_lpl", "epsilon_lpl")
    }
    lower = [f"{-value:.0%}" for value in change.values()]
    text = " ".join(text_of(README).split())
    assert "by {} with flow matching, {} with v prediction and {} with epsilon, in each seed".format(*lower) in text
    for plain in ("flow", "v", "epsilon"):
        for seed, numbers in study()[f"{plain}_lpl"].items():
            without = study()[plain][seed]
            assert numbers["change"] < 0
            assert numbers["precision"] > without["precision"] and numbers["recall"] > without["recall"]
            assert numbers["band_2"] > max(without["band_2"], 1) or plain == "epsilon"  # away from the real images' 1


def test_readme_has_the_results_of_the_study_of_emoji():
    """Each seed has two runs, one in each precision."""
    rows = json.loads(text_of(ROOT / "examples/study/results.json"))["rows"]
    change = {
        name: mean(rows["flow_lpl"][key][name] / rows["flow"][key][name] - 1 for key in "012")
        for name in ("fid", "texture")
    }
    text = " ".join(text_of(README).split())
    words = "in each of three seeds, the Fréchet distance is {fid:.0%} lower, that of textures {texture:.0%}"
    assert words.format(**{name: -value for name, value in change.items()}) in text
    assert len(rows["flow_lpl"]) == 6
    for key, numbers in rows["flow_lpl"].items():
        lower = [numbers[name] < rows["flow"][key][name] for name in (*change, "validation_loss", "validation_lpl")]
        assert all(lower)
    kept = dict[str, list[float]](student=[], mid=[])
    for objective, key, name in itertools.product(("flow", "epsilon"), "012", change):
        plain, lpl = (rows[row][key][name] for row in (objective, f"{objective}_lpl"))
        for way, shares in kept.items():
            row = "mid" if (objective, way) == ("flow", "mid") else f"{objective}_{way}"
            shares.append((plain - rows[row][key][name]) / (plain - lpl))
    student, mid = (f"{100 * min(shares):.0f} to {max(shares):.0%}" for shares in kept.values())
    assert f"kept {student} of LPL's gain with emoji" in text
    for page in ("cost", "results", "student"):
        assert mid in " ".join(text_of(ROOT / f"docs/{page}.md").split())
    guided = [
        run["fid"] / rows[f"guidance_{scale}"][key]["fid"] - 1
        for scale in ("1_5", 2, 3, 4)
        for key, run in rows[f"guidance_{scale}_lpl"].items()
    ]
    assert f"with guidance, the former is {100 * min(guided):.0f} to {max(guided):.0%} higher" in text


def test_the_ema_of_a_comparison_is_told_wherever_lpl_is_turned_off():
    for page in (README, *DOCS):
        text = " ".join(prose(page).split())
        if "`--lpl_weight 0`" in text and page.name not in ("first-lora.md",):
            assert f"--ema_decay {EMA_DECAY_WITH_LPL}" in text, page.name
    page = " ".join(text_of(ROOT / "docs/flags.md").split())
    assert f"default decay is {EMA_DECAY_WITH_LPL} with LPL and {EMA_DECAY} without" in page


LOGS = ROOT / "examples/quickstart/logs"


def test_the_log_page_has_the_ranges_of_its_logs():
    """Healthy ranges, and what the two runs in trouble show."""
    found = {log.stem: entries(log) for log in LOGS.glob("*.jsonl")}
    assert sorted(found) == ["healthy", "learning_rate", "weight"]
    trained = [entry for entry in found["healthy"] if "lr" in entry]
    page = text_of(ROOT / "docs/logs.md")

    def span(key):
        values = [entry[key] for entry in trained]
        return min(values), max(values)

    for key, form in (("diffusion_loss", "{:.2f} to {:.2f}"), ("lpl", "{:.2f} to {:.2f}, falling")):
        assert form.format(*span(key)) in page, key
    for key in ("lpl_share", "lpl_gradient_share", "inside"):
        low, high = span(key)
        assert f"{low * 100:.0f} to {high:.0%}" in page, key
    assert f"| {trained[-1]['lpl_weight']:.2f} after 50 steps" in page
    for key in trained[0]:
        assert f"`{key}`" in page or key.startswith(("lpl/up", "kept/up", "step", "lpl_gradient_cosine/")), key


def test_the_site_needs_no_network():
    site = text_of(ROOT / "mkdocs.yml")
    assert "font: false" in site and "http" not in site
