"""No step of any family waits for the GPU: its training loop runs on CUDA tensors without data (tests/support).

A family of the registry is tested without further work.
"""

import json
import os
import subprocess
import sys

import fake_cuda_library
import known_waits
import pytest
from diffusers import AutoencoderKL
from faults import FAULTS
from gpu_loops import KINDS, words
from tiny_families import FAMILY_OF, TINY, data_fixture
from trainer import ROOT, train

from lpl import LatentPerceptualLoss
from lpl.families import FAMILIES
from lpl.student import Student, probe


SHORT = {"max_train_steps": 1, "gradient_accumulation_steps": 1, "mixed_precision": "bf16"}
SHORT |= {"lpl_project_conflicts": True}
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="module")
def library(request):
    """Fake CUDA, compiled once and kept in pytest's cache."""
    if why := fake_cuda_library.missing():
        pytest.skip(why)
    return fake_cuda_library.build(request.config.cache.mkdir("fake_cuda"))


@pytest.fixture
def results_of(request, library, tmp_path):
    """Runs loops, by name (family, flags of each, fault), a name in a process of its own; their results by name."""

    def run(loops):
        jobs = {}
        for name, (family, flags, fault) in loops.items():
            pipeline, images = (request.getfixturevalue(it) for it in (TINY[family.name][0], data_fixture(family)))
            commands = [words(pipeline, images, tmp_path / f"{name}-{n}", **of) for n, of in enumerate(flags)]
            jobs[name] = {"commands": commands, "fault": fault}
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
        command = [sys.executable, str(SUPPORT / "fake_cuda_jobs.py"), str(library), str(tmp_path / "result")]
        given = json.dumps(jobs, default=str)
        done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


def unknown(result):
    """The waits of a loop that are not known, and the end of the error that ended it."""
    waits = [wait for wait in result["waits"] if not known_waits.is_known(wait["frames"])]
    found = {f"{wait['what']} at {wait['place']}" for wait in waits}
    return sorted(found | ({result["error"][-600:]} if result["error"] else set()))


def check(results, updates):
    """No loop has waited, and each has trained and written its log."""
    assert {name: found for name, result in results.items() if (found := unknown(result))} == {}
    for name, result in results.items():
        seen = {frame for wait in result["waits"] for frame in wait["frames"]}
        assert {"lpl.training.log:Log.write", "lpl.weighting:LplWeight.report"} <= seen, name
        assert result["updates"] == updates, name


FIRST, NEWER = FAMILIES[:9], FAMILIES[9:]
LATER = [FIRST[1::2], *([family] for family in NEWER)]


@pytest.mark.parametrize("families", [FIRST[::2], *(pytest.param(part, marks=pytest.mark.slow) for part in LATER)])
def test_no_step_waits(results_of, families):
    kinds = [SHORT | flags for flags in KINDS.values()]
    check(results_of({family.name: (family, kinds, None) for family in families}), updates=len(kinds))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_step_waits_with_other_flags(results_of, family):
    others = {"gradient_checkpointing": True, "lpl_gradient_checkpointing": True, "debug_loss": True}
    if family.trainable_text_encoders:
        others["train_text_encoder"] = True
    loops = {
        precision: (family, [flags | {"mixed_precision": precision} for flags in KINDS.values()], None)
        for precision in ("no", "fp16", "bf16")
    }
    bf16 = {"mixed_precision": "bf16", "use_ema": True}
    foreach = bf16 | {"foreach_ema": True, "offload_ema": True, "lpl_max_samples": 1}
    foreach |= {"alpha_mask": True, "unmasked_weight": 0.1}
    loops["flags"] = family, [bf16 | others | {"offload_ema": True}, foreach], None
    groups = 2 if family.trainable_text_encoders else 1
    results = results_of(loops)
    check({"flags": results.pop("flags")}, updates=2 * groups + 2)
    check(results, updates=4)


OFFLOADS = {"offload_frozen": True, "group_offload": True, "activation_offload": True, "quantize_base": "fp8"}


@pytest.mark.parametrize(
    "families",
    [["stable-diffusion"], *(pytest.param([family.name], marks=pytest.mark.slow) for family in FAMILIES[1:])],
)
def test_no_step_waits_for_weights_that_come_when_they_run(families, results_of):
    """And none of them is missing on the device, in either pass, or in LPL."""
    flags = SHORT | KINDS["LoRA"] | OFFLOADS | {"gradient_checkpointing": True}
    check(results_of({name: (FAMILY_OF[name], [flags], None) for name in families}), updates=1)


@pytest.mark.slow
def test_no_step_waits_with_a_student(results_of, sd_pipeline, tmp_path):
    """In the first step, which measures the weight on LPL, with a correction, and without."""
    loss = LatentPerceptualLoss(AutoencoderKL.from_pretrained(sd_pipeline / "vae"))
    decoder = {name: [0.0] * len(values) for name, values in probe(loss.vae).items()}  # what is read without data
    Student(4, 16, 1, loss=loss.options, decoder=decoder).save_pretrained(tmp_path / "student")
    flags = {
        "mixed_precision": "bf16",
        "lpl_student": tmp_path / "student",
        "lpl_vae_dtype": "float32",
        "alpha_mask": True,
    }
    kinds = [flags | of | {"max_train_steps": 3, "lpl_correct_every": 2} for of in KINDS.values()]
    check(results_of({"student": (FAMILY_OF["stable-diffusion"], kinds, None)}), updates=3 * len(kinds))


@pytest.mark.slow
def test_no_step_waits_with_caches(results_of, sdxl_pipeline, image_folder, tmp_path):
    """Of images of several sizes; the caches are filled on the CPU, with the same weights."""
    flags = {"mixed_precision": "bf16", "data_cache_dir": tmp_path / "cache", "cache_latents": True}
    flags |= {"cache_text_embeddings": True, "crops_per_image": 2, "aspect_ratio_buckets": "32,32;24,32"}
    train(sdxl_pipeline, image_folder, tmp_path / "filled", max_train_steps=1, **flags)
    loops = {"caches": (FAMILY_OF["stable-diffusion-xl"], [flags | of for of in KINDS.values()], None)}
    check(results_of(loops), updates=2 * len(KINDS))


@pytest.mark.slow
def test_faults_are_found(results_of):
    flags = SHORT | {"train_batch_size": 8}
    loops = {fault: (FAMILY_OF["stable-diffusion"], [flags], fault) for fault in FAULTS}
    results = results_of(loops)
    missed = [fault for fault, result in results.items() if not unknown(result)]
    assert not missed
    for fault, sign in {
        "mask read on the host": "a value is read on the host at",
        "tensor without device": "device",
        "gate on the GPU": "depends on values at",
        "blocking copies": "a blocking copy to the device, (8, 77) at",
        "loader that does not pin": "a copy from memory that is not pinned",
    }.items():
        assert any(sign in found for found in unknown(results[fault])), (fault, unknown(results[fault]))


@pytest.mark.parametrize("name", known_waits.KNOWN)
def test_known_waits_are_functions_and_documented(name):
    assert known_waits.resolved(name)
    listed = (ROOT / "docs" / "gpu.md").read_text()
    assert f"| `{name.split(':')[1]}` | {known_waits.KNOWN[name]} |" in listed
