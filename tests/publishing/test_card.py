"""The model card: valid metadata, code that runs, a run's facts, the command that trains it again, and no secrets."""

import functools
import json
import math
import re
import shlex
import tomllib
from pathlib import Path

import jinja2
import numpy as np
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, metadata_load, metadata_save
from PIL import Image
from trainer import ROOT, train

from lpl.publishing.card import TEMPLATE, write_model_card
from lpl.publishing.run_card import RunCard
from lpl.tools.privacy import local_name
from lpl.tools.results import training_seconds
from tests.publishing.conftest import TOKEN


FINGERPRINT = f"sha256:{'0123456789abcdef' * 4}"
RESULT = EvalResult(
    task_type="text-to-image", dataset_type="imagefolder", dataset_name="foxes", metric_type="fid", metric_value=9.5,
    metric_name="FID (DINOv2)",
)  # fmt: skip


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """The template may use only what there is; by default jinja2 writes nothing for a misspelt name."""
    template = functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined)
    monkeypatch.setattr(jinja2, "Template", template)


def card(**changes) -> RunCard:
    facts = {
        "base_model": "someone/diffusion", "dataset": "someone/foxes", "pipeline_class": "StableDiffusionPipeline",
        "repo_id": "user/fox-lpl", "tags": ["stable-diffusion"], "size": (512, 512), "steps": 1000, "batch_size": 32,
        "learning_rate": 1e-5, "objective": "epsilon", "lpl_weight": 0.1534, "lpl_target": 0.2,
        "lpl_share": 0.196, "lpl_sigma_threshold": 6.0, "lpl_blocks": ("mid", "up_0"),
    }  # fmt: skip
    return RunCard(**{**facts, **changes})


def written(folder: Path, **changes) -> ModelCard:
    return ModelCard.load(write_model_card(folder, card(**changes)))


def code(text: str, language: str) -> str:
    return text.split(f"```{language}\n")[1].split("\n```")[0]


def python_of(folder: Path, **changes) -> str:
    """The card's code, which compiles."""
    python = code(written(folder, **changes).text, "python")
    compile(python, "card", "exec")
    return python


def put(folder: Path, *names: str) -> Path:
    """Files that are there; pictures and the like, whose content nobody looks at."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def put_samples(folder: Path, name: str, prompts: list, seed: int = 7) -> Path:
    put(folder, f"samples/{name}.png", *(f"samples/{name}/{number:02d}.png" for number in range(len(prompts))))
    (folder / "samples" / name / "settings.json").write_text(json.dumps({"prompts": prompts, "seed": seed}))
    return folder


def test_the_template_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert TEMPLATE.name in project["tool"]["setuptools"]["package-data"]["lpl.publishing"]


# Metadata


def test_the_metadata(tmp_path, hub):
    card = written(tmp_path, licence={"license": "creativeml-openrail-m"}, results=[RESULT])
    card.validate()
    data = card.data
    assert data.base_model == "someone/diffusion" and data.base_model_relation == "finetune"
    assert data.datasets == ["someone/foxes"] and data.license == "creativeml-openrail-m" and data.inference is True
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert {"diffusers", "text-to-image", "latent-perceptual-loss", "stable-diffusion"} <= set(data.tags)
    assert data.eval_results == [RESULT] and data.model_name == "fox-lpl"


def test_the_hubs_own_tools_read_it_and_change_it(tmp_path):
    put_samples(tmp_path, "step-001000", ["a: fox #1", "'"])
    readme = write_model_card(tmp_path, card(licence={"license": "other", "license_name": "x-1"}, results=[RESULT]))
    before, text = metadata_load(readme), ModelCard.load(readme).text
    assert before["model-index"][0]["results"][0]["metrics"][0]["value"] == 9.5
    metadata_save(readme, before | {"license_link": "https://host/x"})
    assert metadata_load(readme) == before | {"license_link": "https://host/x"}
    assert ModelCard.load(readme).text == text


def test_only_hub_ids_are_metadata_and_a_lora_is_an_adapter(tmp_path):
    data = written(tmp_path, base_model=str(tmp_path), dataset="../pictures/foxes").data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(data)
    data = written(tmp_path, lora_rank=8).data
    assert data.base_model_relation == "adapter" and "lora" in data.tags


def test_what_is_trained_from_scratch_has_no_base_model(tmp_path):
    card = written(tmp_path, from_scratch=True, licence={"license": "mit"})
    assert not {"base_model", "base_model_relation", "license"} & set(card.data.to_dict())
    assert "trained from random weights" in card.text and "| Configuration of | [someone/diffusion]" in card.text
    assert "Licence" not in card.text


def test_class_conditional_models(tmp_path):
    put_samples(tmp_path, "step-001000", [1])
    facts = {"prompt": 1, "pipeline_class": "DiTPipeline", "classes": {0: "cats", 1: "do\ngs"}}
    card, python = written(tmp_path, **facts), python_of(tmp_path, **facts)
    assert 'class_labels=[1],  # "do\\ngs"' in python and "height" not in python and "prompt" not in python
    assert "class-conditional" in card.data.tags and card.data.pipeline_tag == "unconditional-image-generation"
    assert "widget" not in card.data.to_dict() and "| Classes | 0 cats, 1 do gs |" in card.text


def test_the_trigger_word_is_on_the_card(tmp_path):
    card = written(tmp_path, trigger="a photo of `sks`\ndog")
    assert card.data.instance_prompt == "a photo of `sks`\ndog"
    assert "Put `a photo of 'sks' dog` into the prompt" in card.text
    card = written(tmp_path)
    assert "instance_prompt" not in card.content and "into the prompt" not in card.content


def test_the_widget_shows_the_last_samples(tmp_path):
    prompts = ["a fox: red", "", "狐 \udcff"]
    for name in ("step-000500", "step-001000", "step-001000-ema", "step-002000"):  # the last is of an earlier run
        put_samples(tmp_path, name, prompts)
    put(tmp_path, "samples/step-001000-broken/settings.json")
    assert written(tmp_path).data.widget == [
        {"text": "a fox: red", "output": {"url": "samples/step-001000-ema/00.png"}},
        {"text": "狐 ?", "output": {"url": "samples/step-001000-ema/02.png"}},
    ]
    assert written(tmp_path, steps=600).data.widget[0]["output"]["url"] == "samples/step-000500/00.png"
    assert "widget" not in written(tmp_path, steps=400).data.to_dict()


# The licence


def test_the_licence_in_words(tmp_path):
    link = "https://host/licence"
    text = written(tmp_path, licence={"license": "other", "license_name": "fox-1", "license_link": link}).text
    assert f"| Licence | [fox-1]({link}), the base model's |" in text
    assert "| Licence | a, b, the base model's |" in written(tmp_path, licence={"license": ["a", "b"]}).text
    assert "| Licence | that of [someone/diffusion](https" in written(tmp_path).text
    assert "Licence" not in written(tmp_path, base_model=str(tmp_path)).text


# Pictures


def test_pictures_are_shown_where_they_are(tmp_path):
    assert "![" not in written(tmp_path).text
    put(tmp_path, "samples/before_after.png", "loss_curves.png", "evaluation/curves.png", "metrics.jsonl")
    text = written(tmp_path).text
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert shown == ["samples/before_after.png", "loss_curves.png", "evaluation/curves.png"]
    assert text.index("before_after") < text.index("## Use it") < text.index("## Training") < text.index("loss_curves")


def test_a_few_grids_of_the_way_are_behind_a_fold(tmp_path):
    put(tmp_path, "samples/before_after.png", *(f"samples/step-{step:06d}.png" for step in range(0, 1300, 100)))
    text = written(tmp_path).text
    assert text.count("<details>") == text.count("</details>")
    fold = text.partition("<details>")[2].partition("</details>")[0]
    steps = [int(step) for step in re.findall(r"samples/step-(\d+).png", fold)]
    assert steps == [100, 300, 500, 700, 900]  # neither what was before, nor the last, nor an earlier run's
    assert len(re.findall("step-", written(tmp_path, steps=10**6).text)) <= 6


# How to use it


def test_the_code_that_draws_an_image(tmp_path):
    text = python_of(tmp_path, prompt='a "red" fox 狐', guidance_scale=5.0, dtype="bfloat16", size=(512, 768))
    assert 'StableDiffusionPipeline.from_pretrained("user/fox-lpl", dtype=torch.bfloat16)' in text
    assert (
        'prompt="a \\"red\\" fox 狐"' in text and "height=512,\n    width=768" in text and "guidance_scale=5.0" in text
    )
    assert "num_inference_steps" not in text and "generator" not in text


def test_further_arguments_of_the_call(tmp_path):
    text = python_of(tmp_path, sampling_arguments={"binned": False, "height": 256, "extra": None})
    assert "binned=False" in text and "height=256" in text and "extra" not in text


def test_the_code_draws_the_first_sample_where_there_is_one(tmp_path):
    put_samples(tmp_path, "step-001000", ["a fox"], seed=7)
    assert "manual_seed(7)" in python_of(tmp_path, prompt="a fox")
    assert "](samples/step-001000/00.png) again" in written(tmp_path, prompt="a fox").text
    assert "manual_seed" not in written(tmp_path, prompt="a hen").text
    assert "manual_seed" not in written(tmp_path, prompt="a fox", steps=1100, max_steps=2000).text  # other weights


def test_the_code_of_merged_lora(tmp_path):
    """By diffusers; by peft for pipelines that load none, and for peft's own files."""
    facts = {"lora_rank": 4, "merged": [("user/style", 0.5), ("user/light", 1.0)]}
    python = python_of(tmp_path, **facts)
    assert 'pipeline.load_lora_weights("user/style")\npipeline.fuse_lora(lora_scale=0.5)' in python
    assert "from peft" not in python
    python = python_of(tmp_path, **facts, pipeline_class="PixArtSigmaPipeline")
    assert 'PeftModel.from_pretrained(pipeline.transformer, "user/style", subfolder="transformer_lora")' in python
    assert "with rescale_adapter_scale(pipeline.transformer, 0.5):" in python
    assert 'load_lora_weights("user' not in python.replace("user/fox-lpl", "") and "from peft import" in python
    own = tmp_path / "own"
    own.mkdir()
    (own / "adapter_config.json").write_text("{}")
    python = python_of(tmp_path, lora_rank=4, merged=[(str(own), 1.0)])
    assert 'PeftModel.from_pretrained(pipeline.unet, "path/to/own")' in python


def test_the_code_of_an_adapter_saved_by_peft(tmp_path):
    for place in ("transformer_lora", "checkpoint-500/transformer_lora"):
        put(tmp_path, f"{place}/adapter_config.json")
    text = python_of(tmp_path, lora_rank=8)
    loaded = 'PeftModel.from_pretrained(pipeline.transformer, "user/fox-lpl", subfolder="transformer_lora")'
    assert f"pipeline.transformer = {loaded}" in text


def test_other_kinds_of_adapters_say_who_reads_them(tmp_path):
    put(tmp_path, "unet_lora/adapter_config.json")
    oft = written(tmp_path, lora_rank=32, adapter="oft")
    assert "An OFT with blocks of 32 for" in oft.text and "rotates what a layer puts out" in oft.text
    assert "oft" in oft.data.tags and "lora" not in oft.data.tags
    assert "pipeline.unet = PeftModel.from_pretrained(pipeline.unet, " in code(oft.text, "python")
    assert "have no names for these layers" in written(tmp_path, lora_rank=4, adapter="lokr").text
    put(tmp_path, "fox_comfyui.safetensors")
    lokr = written(tmp_path, lora_rank=4, adapter="lokr")
    assert "A LoKr of rank 4 for" in lokr.text and "For ComfyUI and LyCORIS, use" in lokr.text


def test_the_code_of_a_lora_with_another_objective(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    text = python_of(tmp_path, lora_rank=8)
    assert "from diffusers import DDIMScheduler, Stable" in text
    assert 'pipeline.scheduler = DDIMScheduler.from_pretrained("user/fox-lpl", subfolder="scheduler")' in text
    assert "scheduler" not in python_of(tmp_path)  # a whole pipeline has it inside


def test_the_code_of_a_lora(tmp_path):
    card = written(tmp_path, lora_rank=8, base_model=str(tmp_path / "sd"), repo_id=None)
    text = code(card.text, "python")
    assert 'from_pretrained("path/to/sd"' in text and f'load_lora_weights("path/to/{tmp_path.name}"' in text
    assert "ComfyUI" not in card.text
    put(tmp_path, "fox 1_comfyui.safetensors")
    assert "[`fox 1_comfyui.safetensors`](fox%201_comfyui.safetensors)" in written(tmp_path, lora_rank=8).text


def test_the_code_of_a_lora_names_the_base_that_it_was_trained_on(tmp_path):
    where = {"revision": "fp16", "variant": "fp16"}
    assert 'revision="fp16", variant="fp16")' in written(tmp_path, lora_rank=4, base_arguments=where).text
    assert "revision=" not in written(tmp_path, base_arguments=where).text


def test_the_code_of_a_lora_loads_what_replaced_parts_of_its_base(tmp_path):
    changes = {"lora_rank": 4, "vae": "user/vae", "denoiser": ("unet", "raw"), "base_model": "user/sd"}
    python = python_of(tmp_path, **changes)
    assert 'vae = AutoModel.from_pretrained("user/vae"' in python and "vae=vae, unet=unet)" in python
    assert 'unet = AutoModel.from_pretrained("user/sd", subfolder="unet", revision="raw"' in python
    assert "AutoModel" not in python_of(tmp_path, vae="user/vae")  # it is in the result
    assert "| VAE | [user/vae](" in written(tmp_path, vae="user/vae").text


def test_a_branch_is_named_where_something_is_loaded(tmp_path):
    text = written(tmp_path, revision="v2").text
    assert 'from_pretrained("user/fox-lpl", revision="v2", dtype' in text and "--config user/fox-lpl@v2" in text
    assert written(tmp_path, revision="main").text == written(tmp_path).text


# Facts


def test_the_tables(tmp_path):
    facts = {"mixed_precision": "bf16", "ema_decay": 0.99975, "hardware": "1 x | GPU", "images": 1500}
    text = written(tmp_path, **facts, seconds=11000.0, peak_memory=3 * 2**29, fingerprint=FINGERPRINT).text
    for fact in ("1,000", "32,000 samples seen, 21.3 epochs", "1e-05", "`epsilon`", "bf16", "0.99975", "1 x \\| GPU"):
        assert fact in text
    for fact in ("0.1534, measured", "20% of the loss", "19.6%", "σ ≤ 6", "`mid`, `up_0`", "torch 2."):
        assert fact in text
    assert "| Data | [someone/foxes](https://huggingface.co/datasets/someone/foxes), 1,500 images, finger" in text
    assert "`sha256:0123456789ab…`" in text and "| Time | 3 h 3 min, " in text and "| 1.5 GiB, tensors on one" in text


def test_facts_that_nobody_knows_are_left_out(tmp_path):
    text = written(tmp_path).text
    assert not any(f"| {name} |" in text for name in ("Time", "Peak memory", "Hardware", "Seed", "Trained"))
    assert "epochs" not in text and "None" not in text


def test_the_time_is_that_of_the_steps():
    records = [{"step": 1, "images_per_second": 2.0}, {"step": 1, "validation_loss": 1.0},
               {"step": 4, "images_per_second": 3.0}]  # fmt: skip
    assert training_seconds(records, 6) == 3.0 + 6.0
    assert training_seconds([], 6) == 0


def test_a_weight_set_by_hand_and_no_lpl(tmp_path):
    assert "| Weight | 3, set by hand |" in written(tmp_path, lpl_weight=3.0, lpl_target=None).text
    card = written(tmp_path, lpl_weight=0.0)
    assert "No step had the latent perceptual loss" in card.text and "arxiv" not in card.text
    assert "latent-perceptual-loss" not in card.data.tags


def test_a_run_that_goes_on(tmp_path):
    put(tmp_path, "samples/before_after.png")  # of an earlier run
    for step in (0, 250, 500):
        put_samples(tmp_path, f"step-{step:06d}", ["a fox"])
    card = written(tmp_path, steps=500, max_steps=2000)
    assert "after step 500 of 2,000 (25%)" in card.text and "| Steps | 500 of 2,000 |" in card.text
    assert "before_after" not in card.text
    assert card.text.index("(samples/step-000500.png)") < card.text.index("(samples/step-000250.png)")
    done = written(tmp_path, steps=500, max_steps=500)
    assert "goes on" not in done.text and "before_after" in done.text and "| Steps | 500 |" in done.text


# The command that trains it again


def test_the_id_is_enough_where_everything_is_on_the_hub(tmp_path):
    put(tmp_path, "recipe.yaml", "metrics.jsonl")
    recipe = {"pretrained_model_name_or_path": "someone/diffusion", "dataset_name": "someone/foxes", "seed": 1}
    text = written(tmp_path, recipe=recipe, fingerprint=FINGERPRINT, hardware="1 x CPU").text
    assert code(text, "bash") == "accelerate launch train_text_to_image_lpl.py --config user/fox-lpl"
    again = text.partition("## Train it again")[2]
    assert "[recipe.yaml](recipe.yaml)" in again and "[metrics.jsonl](metrics.jsonl)" in again
    assert "fingerprint" in again and "bit for bit" in again and "your own copy" not in again
    assert "bit for bit" not in written(tmp_path, hardware="1 x GPU").text  # its kernels do not promise that


def test_what_was_local_has_to_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "my photos", "run"):
        (tmp_path / name).mkdir()
    recipe = {"pretrained_model_name_or_path": "base", "train_data_dir": str(tmp_path / "my photos")}
    text = written(tmp_path / "run", recipe=recipe, repo_id=None, processes=2).text
    words = shlex.split(code(text, "bash").replace("\\\n", ""))
    assert words == [
        *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "train_text_to_image_lpl.py"),
        *("--config", "path/to/run/recipe.yaml", "--pretrained_model_name_or_path", "path/to/base"),
        *("--train_data_dir", "path/to/my photos"),
    ]
    assert "your own copy: `path/to/base` and `path/to/my photos`" in text


def test_neither_path_nor_token_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "my photos", "runs/fox"):
        (tmp_path / name).mkdir(parents=True)
    command = [
        str(tmp_path / "train_text_to_image_lpl.py"), f"--pretrained_model_name_or_path={tmp_path}/base",
        "--train_data_dir", str(tmp_path / "my photos"), "--output_dir", "runs/fox", "--hub_token", TOKEN,
        "--push_to_hub", "--dataset_name", f"pipe:curl -H 'Authorization:Bearer {TOKEN}' https://me:secret@host/a/b.tar",
        "--validation_prompts", "a cat / dog, and/or a fox", f"{tmp_path}/a.txt,{tmp_path}/b.txt", "",
    ]  # fmt: skip
    recipe = {"pretrained_model_name_or_path": "base", "train_data_dir": str(tmp_path / "my photos")}
    facts = {"base_model": "base", "dataset": str(tmp_path / "my photos"), "recipe": recipe, "images": 9}
    text = write_model_card(tmp_path, card(**facts, command=command)).read_text()
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    assert TOKEN not in text and "hub_token" not in text and "me:secret" not in text
    assert code(text.partition("flag by flag")[2], "bash").splitlines() == [
        "accelerate launch train_text_to_image_lpl.py \\",
        "  --pretrained_model_name_or_path=path/to/base \\",
        "  --train_data_dir 'path/to/my photos' \\",
        "  --output_dir path/to/fox \\",
        "  --push_to_hub \\",
        """  --dataset_name 'pipe:curl -H '"'"'Authorization:Bearer hf_...'"'"' https://host/a/b.tar' \\""",
        "  --validation_prompts 'a cat / dog, and/or a fox' path/to/a.txt,path/to/b.txt ''",
    ]
    assert "A `StableDiffusionPipeline` that is not on the Hub, fine-tuned on 9 images" in text
    assert "| the local folder `base` |" in text and "| the local folder `my photos`, 9 images |" in text


# Whatever it is about


@pytest.mark.parametrize("prompt", ["a: b # c\n---\n", "```", "\udcff", "| a | b", "{{ x }}"])
def test_odd_texts_leave_a_card_that_reads(tmp_path, prompt):
    card = written(tmp_path, prompt=prompt, trigger=prompt, dataset=prompt, command=["train.py", "--prompt", prompt])
    assert card.data.library_name == "diffusers" and card.text.count("\n## ") == 5
    yaml.safe_load(card.data.to_yaml())


# Real runs


ASKED = {"negative_prompt": "blurry", "seed": 5, "width": 64, "guidance_scale": 3.0, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def run(sd_pipeline, image_folder, tmp_path_factory):
    """Output folder of a short run with samples."""
    prompts = [json.dumps({"prompt": "a cat"} | ASKED), "a cup"]
    flags = {"validation_prompts": prompts, "validation_steps": 1, "use_ema": True, "ema_decay": 0.5}
    return train(sd_pipeline, image_folder, tmp_path_factory.mktemp("card") / "cats", max_train_steps=2, **flags)


def drawn_by(folder: Path, *others: Path) -> np.ndarray:
    """The image that the code of a folder's card draws, run elsewhere; with the real places for path/to/NAME."""
    python = code((folder / "README.md").read_text(), "python").replace('"cuda"', '"cpu"')
    for place in (folder, *others):
        python = python.replace(f'"{local_name(place)}"', f'"{place}"')
    assert Path.cwd() != folder and "path/to" not in python
    exec(python, {})
    return np.asarray(Image.open("image.png"), dtype=int)


def test_the_card_of_a_run(run, sd_pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(run / "README.md")
    assert [example["text"] for example in card.data.widget] == ["a cat", "a cup"]
    assert [example.get("parameters") for example in card.data.widget] == [{"negative_prompt": "blurry"}, None]
    assert all((run / example["output"]["url"]).is_file() for example in card.data.widget)
    for link in re.findall(r"\]\(([^):]+)\)", card.text):
        assert (run / link).is_file()
    assert "](samples/before_after.png)" in card.text and "](samples/checkpoints.png)" in card.text
    assert "| Time |" in card.text and "1 x CPU" in card.text
    machine = (run.parent, sd_pipeline.parent, image_folder.parent, Path.home(), Path.cwd())
    assert not any(str(place) in (run / "README.md").read_text() for place in machine if place != Path("/"))
    words = shlex.split(code(card.text, "bash").replace("\\\n", ""))
    assert words[words.index("--config") + 1] == "path/to/cats/recipe.yaml"
    assert {"--train_data_dir", "--pretrained_model_name_or_path"} < set(words)
    assert "--max_train_steps 2" in card.text and "--output_dir" not in card.text  # which moves no number
    sampled = np.asarray(Image.open(run / "samples/step-000002-ema/00.png"), dtype=int)
    assert np.abs(drawn_by(run) - sampled).max() <= 1


def test_the_card_of_a_lora_loads_it(dit_pipeline, class_folder, tmp_path, monkeypatch):
    flags = {"rank": 4, "learning_rate": 0.1, "validation_prompts": ["cups"], "validation_steps": 1}
    folder = train(dit_pipeline, class_folder, tmp_path / "cups", max_train_steps=1, **flags)
    monkeypatch.chdir(tmp_path)
    before, after = (
        np.asarray(Image.open(folder / f"samples/step-{step:06d}/00.png"), dtype=int) for step in range(2)
    )
    drawn = drawn_by(folder, dit_pipeline)
    assert np.abs(drawn - after).max() <= 1 < np.abs(drawn - before).max()
    assert '# "cups"' in (folder / "README.md").read_text()


def test_the_time_of_a_run(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = training_seconds(records, 2)
    speeds = [record["images_per_second"] for record in records if "images_per_second" in record]
    assert math.isclose(seconds, sum(2 / speed for speed in speeds))
