"""Every family, in pairwise combinations of what a run can be; and each family once as users launch it.

The combinations cover every pair of values of family, whole or LoRA, LPL on or off, objective and precision, so that
no two features go together untested; combinations that the script refuses are left out by the reason that it gives.
"""

import math
import re
from itertools import combinations, product

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import TINY, data_fixture
from trainer import launch, metrics, train, validation_metrics, weights

from lpl.families import FAMILIES


FAMILY = {family.name: family for family in FAMILIES}
FOLDERS = {name: (TINY[name][0], data_fixture(family)) for name, family in FAMILY.items()}  # fixtures
AXES = {
    "family": tuple(FAMILY),
    "lora": (False, True),
    "lpl": (True, False),
    "objective": ("epsilon", "v_prediction", "sample", "flow_matching"),
    "precision": ("no", "bf16"),
}


def possible(row):
    return row["objective"] in FAMILY[row["family"]].objectives


def pairs(row):
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def pairwise():
    """Rows, chosen greedily, that together hold every pair of values that any possible row holds."""
    rows = [row for values in product(*AXES.values()) if possible(row := dict(zip(AXES, values)))]
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def name_of(row):
    kind, lpl = "lora" if row["lora"] else "full", "lpl" if row["lpl"] else "plain"
    return "-".join((row["family"], kind, lpl, row["objective"], row["precision"]))


def prompt_of(family):
    return "cats" if FAMILY[family].class_conditional else "a cat"


@pytest.fixture(params=pairwise(), ids=name_of)
def row(request):
    return request.param


def is_trained(key, family):
    return key[0].startswith(f"{FAMILY[family].denoiser_name}/")


@pytest.mark.filterwarnings("ignore:--prediction_type")
def test_trains_saves_reloads_and_samples(row, request, tmp_path):
    pipeline, images = (request.getfixturevalue(name) for name in FOLDERS[row["family"]])
    train(
        pipeline,
        images,
        tmp_path,
        prediction_type=row["objective"],
        mixed_precision=row["precision"],
        rank=2 if row["lora"] else None,
        lpl_weight="auto:0.2" if row["lpl"] else 0,
        lpl_sigma_threshold=1e6 if row["lpl"] else None,
        validation_prompts=[prompt_of(row["family"])],
        validation_lora_scales=[0, 1] if row["lora"] else None,
    )
    records = metrics(tmp_path)
    assert all(math.isfinite(record["loss"]) for record in records)
    assert ["lpl" in record and record["lpl"] > 0 for record in records] == [row["lpl"]] * 2

    before = weights(pipeline)
    if row["lora"]:
        adapters = [value for key, value in weights(tmp_path).items() if "lora_B" in key[1]]
        assert adapters and all(value.dtype == torch.float32 for value in adapters)
        assert any(value.abs().max() > 0 for value in adapters)  # they begin as zeros
        for strength, step in (("0", "000000"), ("1", "000002")):
            assert drawn(tmp_path, f"lora-scale-{strength}") == drawn(tmp_path, f"step-{step}")
    else:
        after = weights(tmp_path)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert after.keys() == before.keys() and changed and all(is_trained(key, row["family"]) for key in changed)

    # The card's own lines draw what validation showed, with what was saved and the scheduler that was saved.
    image = run_card(tmp_path, pipeline)
    assert image.size == (32, 32) and np.asarray(image).std() > 0
    if row["precision"] == "no":
        seen = Image.open(tmp_path / "samples" / "step-000002" / "00.png")
        assert np.abs(np.asarray(image, float) - np.asarray(seen, float)).max() <= 1


def drawn(folder, name):
    return Image.open(folder / "samples" / name / "00.png").tobytes()


def run_card(folder, base):
    """The image that the code in a model card draws, on the CPU and with the places as they are on this machine."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    for place in (folder, base):
        code = code.replace(f'"path/to/{place.name}"', repr(str(place)))
    image = folder / "image.png"
    code = code.replace('"cuda"', '"cpu"').replace('"image.png"', repr(str(image)))
    code = code.replace("image = pipeline(", "torch.manual_seed(0)\nimage = pipeline(")
    exec(compile(code, "card", "exec"), {})
    return Image.open(image)


LAUNCHED = ("stable-diffusion-3",)  # the others in the long tests


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in LAUNCHED else pytest.mark.slow) for name in FAMILY]
)
def test_launched(family, request, tmp_path):
    """By accelerate, in bf16, with everything that a run leaves behind; whole and LoRA in turn over the families."""
    lora = list(FAMILY).index(family) % 2 == 1
    pipeline, images = (request.getfixturevalue(name) for name in FOLDERS[family])
    launch(
        pipeline,
        images,
        tmp_path,
        "--mixed_precision=bf16",
        max_train_steps=2,
        rank=2 if lora else None,
        lpl_sigma_threshold=1e6,
        validation_prompts=[prompt_of(family)],
        validation_every_nth=4,
        use_ema=True,
        gradient_checkpointing=True,
        checkpointing_steps=1,
        dataloader_num_workers=1,
        report_to="tensorboard",
    )
    assert list((tmp_path / "logs").rglob("*tfevents*"))
    for name in ("recipe.yaml", "README.md", "loss_curves.png", "samples/before_after.png", "checkpoint-2/ema"):
        assert (tmp_path / name).exists(), name
    assert all(math.isfinite(loss) and lpl > 0 for loss, lpl in metrics(tmp_path, "loss", "lpl"))
    assert len(validation_metrics(tmp_path)) == 2  # before, and at the end
    assert run_card(tmp_path, pipeline).size == (32, 32)
