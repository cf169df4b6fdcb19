"""The dry run's report: it is true, it is measured by the training loop's own steps, and it leaves nothing behind."""

import io
import itertools
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from trainer import script, train

from lpl.config.groups import Lpl
from lpl.diagnosis import dry_run as report
from lpl.diagnosis.dry_run import MEASURED_STEPS, Cost, DryRun, Report, whole_run_seconds
from lpl.diagnosis.needs import DiskNeeds
from lpl.tools import machine
from lpl.tools.words import duration, size
from lpl.weighting import LplWeight
from tests.data.test_streaming import write


CPU = torch.device("cpu")


def rows(text):
    """{name of a row: its value} of a printed report."""
    return dict(re.findall(r"^  (\S.*?)  +(.*)$", text, re.MULTILINE))


class Steps:
    """Optimizer steps with fixed losses; every call is kept. ``memory`` is enough for no step, plain ones, or all."""

    def __init__(self, weight, lpl=1.0, memory=2, pulls=None):
        self.weight, self.lpl, self.memory, self.pulls = weight, lpl, memory, pulls
        self.calls = []  # (with LPL, largest timestep)
        self.corrections = []  # factors on LPL less the student, of the steps with LPL

    def __call__(self, batches, with_lpl, observers=()):
        timesteps = next(batches)["timestep"]
        self.calls.append((with_lpl, int(timesteps.max())))
        if self.memory < 1 + with_lpl:
            raise torch.OutOfMemoryError("too small a machine")
        if with_lpl:
            self.corrections.append(self.weight.correction(1))
            for observer in observers:
                observer.observe(1, {}, SimpleNamespace(pulls=self.pulls), None, None)
            lpl = self.lpl * (1 if timesteps.any() else 1000)  # the warm-up's losses are no measure of a run
            self.weight.observe(torch.tensor(2.0), torch.tensor(lpl))
            self.weight.end_step(lambda sums: sums)
        return 1


def dry_run(plan, weight=None, **options):
    """The rows that a dry run prints, and the calls of its steps."""
    weight = weight or LplWeight(plan.config.lpl.lpl_weight, 50, CPU)
    steps = Steps(weight, **options)
    batches = itertools.repeat({"timestep": torch.tensor([400, 900])})
    with redirect_stdout(io.StringIO()) as printed:
        DryRun(plan, steps, batches, SimpleNamespace(optimizer=plan.schedule.optimizer), weight).report()
    return rows(printed.getvalue()), steps.calls


# The whole of it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(sd_pipeline, image_folder, tmp_path_factory):
    """The script's dry run: (what it printed, where its results would have been, kinds of its optimizer steps)."""
    place, kinds, step = tmp_path_factory.mktemp("dry_run") / "results", [], script.optimizer_step

    def kept(*args, **options):
        kinds.append(True)
        return step(*args, **options)

    flags = {"use_ema": True, "checkpointing_steps": 2, "max_train_steps": 5, "validation_prompts": ["a cat"]}
    with redirect_stdout(io.StringIO()) as text, pytest.MonkeyPatch().context() as patch:
        patch.setattr(script, "optimizer_step", kept)
        train(sd_pipeline, image_folder, place, dry_run=True, **flags)
    return text.getvalue(), place, len(kinds)


def test_nothing_is_written(printed):
    assert not printed[1].exists()
    assert printed[0].startswith("Dry run: nothing was written.")


def test_the_steps_are_those_of_the_training(printed):
    assert printed[2] == 2 * (1 + MEASURED_STEPS)


def test_what_the_report_says(printed):
    said = rows(printed[0])
    assert said["unet"].startswith("whole, ") and said["unet"].endswith("trained in float32")
    assert said["text_encoder"].startswith("frozen, ") and said["text_encoder"].endswith(" parameters, in float32")
    assert said["threshold"] == "sigma <= 3 : t <= 673 of 1000"
    assert re.fullmatch(rf"auto:0\.2, which is [\d.]+: 20\.0% .* over {MEASURED_STEPS} steps", said["weight"])
    assert said["optimizer"] == "AdamW" and said["learning rate"] == "0.001 throughout"
    assert said["scheduler in results"] == "PNDMScheduler, the pipeline's own"
    assert said["samples per step"] == "2 = 2 in a batch x 1 process x 1 accumulated"
    assert said["steps"] == "5, which is 1.2 epochs; 5 to go"
    assert said["checkpoints"].startswith("2, every 2 steps, 2 kept; ")
    assert said["validation"] == "1 sample, before, every 20 steps and at the end"
    assert said["folder"] == str(printed[1]) and said["seed"] == "0"
    assert all(float(said[row].split()[0]) > 0 for row in ("without LPL", "with LPL", "LPL costs"))
    assert "warning" not in said


def test_values_are_aligned(printed):
    starts = {re.match(r"  \S.*?  +", line).end() for line in printed[0].splitlines() if re.match(r"  \S.*?  ", line)}
    assert len(starts) == 1


def test_counts_of_parameters(planned):
    plan = planned(rank=2)
    unet = plan.trained.denoiser
    adapter = sum(p.numel() for name, p in unet.named_parameters() if "lora" in name)
    total = sum(p.numel() for p in unet.parameters())
    assert 0 < adapter < 10_000 < total
    assert dry_run(plan)[0]["unet"] == (
        f"LoRA of rank 2, {adapter / 1000:.2f}K of {total / 1000:.2f}K parameters, trained in float32, "
        "frozen in float32"
    )


# Measuring -----------------------------------------------------------------------------------------------------------


def test_steps_without_and_then_with_lpl(planned):
    """The first of each kind has no noise: all samples are inside, and LPL needs the most memory it can."""
    kind = [0] + [900] * MEASURED_STEPS
    assert dry_run(planned())[1] == [(False, t) for t in kind] + [(True, t) for t in kind]


def test_without_lpl_only_plain_steps(planned):
    said, calls = dry_run(planned(lpl_weight=0))
    assert [with_lpl for with_lpl, _ in calls] == [False] * (1 + MEASURED_STEPS)
    assert said["weight"] == "0: it is off" and "with LPL" not in said and "LPL costs" not in said


@pytest.mark.parametrize(
    "flags, costs, minutes",
    [
        ({}, "1.50 x the time", 5),  # 100 steps of 3 s
        ({"lpl_every": 5}, "1.10 x the time on average over 5 steps", 4),  # 80 steps of 2 s and 20 of 3 s
    ],
    ids=str,
)
def test_seconds_are_those_of_one_step(planned, monkeypatch, flags, costs, minutes):
    ticks = iter([10.0, 10.0 + 2.0 * MEASURED_STEPS, 50.0, 50.0 + 3.0 * MEASURED_STEPS])
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    said, _ = dry_run(planned(max_train_steps=100, **flags))
    assert said["without LPL"].startswith("2 s, ") and said["with LPL"].startswith("3 s, ")
    assert said["LPL costs"].startswith(costs) and said["time"].startswith(f"about {minutes} min, ")
    assert said["weight"].startswith("auto:0.2, which is 0.5: 20.0% of")


@pytest.mark.parametrize(
    "weight, lpl, said, warns",
    [
        ("auto:0.2", 1.0, "auto:0.2, which is 0.5: 20.0% of", False),
        ("0.5", 1.0, "0.5: 20.0% of", False),
        ("3", 1.0, "3: 60.0% of", True),
        ("0.01", 1.0, "0.01: 0.5% of", True),
        ("auto:0.2", 0.0, "auto:0.2; not measured: no sample was inside", False),
    ],
)
def test_weight_and_share(planned, weight, lpl, said, warns):
    found, _ = dry_run(planned(lpl_weight=weight), lpl=lpl)
    assert found["weight"].startswith(said)
    assert ("--lpl_weight auto:0.2 finds" in found.get("warning", "")) is warns


@pytest.mark.parametrize(
    "pulls, said, warns",
    [
        (
            [0.04, 0.02, torch.nan],
            "+0.030 ± 0.003 towards contrast, above 0 is good; cosine, mean of 10 samples",
            False,
        ),
        ([-0.04, -0.02], "-0.030 ± 0.003 ", True),
        ([0.006, 0.004], "+0.005 ± 0.000 ", True),
        ([-0.5, 0.4], "-0.050 ± 0.150 ", False),  # it may be chance
        ([torch.nan, torch.nan], None, False),
    ],
)
def test_a_pull_towards_less_contrast_is_warned_of(planned, pulls, said, warns):
    found, _ = dry_run(planned(lpl_detach_statistics=True), pulls=torch.tensor(pulls))
    assert found.get("pull", "").startswith(said or "") and ("pull" in found) is (said is not None)
    assert ("leave out --lpl_detach_statistics" in found.get("warning", "")) is warns


def test_a_share_that_a_checkpoint_has_is_not_measured_again(planned):
    weight = LplWeight("auto:0.2", 1, CPU)
    weight.observe(torch.tensor(4.0), torch.tensor(1.0))
    weight.end_step(lambda sums: sums)
    said, _ = dry_run(planned(), weight)
    assert said["weight"] == "auto:0.2, which is 1: 20.0% of the total loss, measured over 1 step"


# Memory and disk -----------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_measured(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    said, _ = dry_run(planned())
    assert said["without LPL"].endswith("peak memory not measured") and "memory" not in said["LPL costs"]


@pytest.mark.parametrize("memory", [0, 1])
def test_a_step_that_is_out_of_memory(planned, memory):
    """The warning names the flags that save memory in such a step, and no others."""
    said, _ = dry_run(planned(gradient_checkpointing=True), memory=memory)
    assert f"a step {'with' if memory else 'without'} LPL is out of memory; what saves memory: " in said["warning"]
    assert "--train_batch_size 1 --gradient_accumulation_steps 2 (" in said["warning"]
    assert "--use_8bit_adam (" in said["warning"] and "--gradient_checkpointing (" not in said["warning"]
    assert ("--lpl_chunk_size 1 (" in said["warning"]) is (memory == 1)
    assert said["with LPL" if memory else "without LPL"] == "out of memory"
    assert said["weight"].endswith("not measured: out of memory") and "time" not in said
    assert ("s, peak memory" in said["without LPL"]) is (memory == 1)


def test_another_error_is_raised(planned):
    def broken(batches, with_lpl):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    plan = planned()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        DryRun(plan, broken, iter([]), None, LplWeight("1", 50, CPU)).report()


@pytest.mark.parametrize("begins", [False, True])
def test_a_disk_that_is_too_small(planned, monkeypatch, begins):
    """For the result, or for all the checkpoints."""
    plan = planned(max_train_steps=10, checkpointing_steps=1)
    needs = DiskNeeds.of(plan.trained, plan.config.optimization, plan.config.output, 10, 0)
    free = needs.bytes - 1 if begins else 1000
    monkeypatch.setattr(report, "free_space", lambda folder: free)
    said, _ = dry_run(plan)
    words = "set --checkpoints_total_limit to 9 at most" if begins else "the result needs about"
    assert words in said["warning"] and f"{size(free)} are free" in said["warning"]
    assert said["disk"].endswith(f" needed (weights, EMA, optimizer), {size(free)} free")


# The run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, start, every, done, seconds",
    [
        ("1", 0, 1, 0, 10 * 3),
        ("1", 4, 1, 0, 4 * 2 + 6 * 3),
        ("1", 4, 1, 3, 1 * 2 + 6 * 3),
        ("1", 4, 1, 6, 4 * 3),
        ("1", 50, 1, 0, 10 * 2),
        ("0", 0, 1, 0, 10 * 2),
        ("1", 0, 1, 12, 0),
        ("1", 0, 4, 0, 7 * 2 + 3 * 3),  # the 1st, 5th and 9th
        ("1", 3, 4, 0, 8 * 2 + 2 * 3),  # the 4th and 8th
        ("1", 3, 4, 4, 5 * 2 + 1 * 3),
        ("1", 50, 4, 0, 10 * 2),
        ("1", 0, 4, 12, 0),
    ],
)
def test_time_of_the_whole_run(weight, start, every, done, seconds):
    lpl = Lpl(lpl_weight=weight, lpl_start_step=start, lpl_every=every)
    assert whole_run_seconds(lpl, done, 10, without_lpl=2.0, with_lpl=3.0) == seconds


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, "none"),
        ({"validation_every_nth": 4}, "the losses on held-out images, before, every 15 steps and at the end"),
        (
            {"validation_prompts": ["a", "b"], "validation_steps": 3},
            "2 samples, before, every 3 steps and at the end",
        ),
    ],
    ids=str,
)
def test_validation(planned, flags, said):
    plan = planned(**flags)
    report_of = Report(plan, SimpleNamespace(optimizer=None), LplWeight("1", 5, CPU), Cost(1.0, None), None)
    assert dict(report_of._run())["validation"] == said


def test_a_resumed_run_has_fewer_steps_to_go(planned):
    plan = planned(max_train_steps=10)
    plan.run.step = 4
    assert dry_run(plan)[0]["steps"].endswith("; 6 to go")


@pytest.mark.parametrize("measured", [0, 50])
def test_lpl_itself_is_timed_before_the_student(measured, planned, monkeypatch):
    """Also where a resumed run's weight is measured already, so that its steps have the student."""
    monkeypatch.setattr("lpl.families.resolve._check_student", lambda *_: None)
    plan, weight = planned(lpl_student="user/student"), LplWeight("auto:0.2", 50, CPU)
    weight.steps = measured
    steps = Steps(weight)
    batches = itertools.repeat({"timestep": torch.tensor([400, 900])})
    with redirect_stdout(io.StringIO()):
        DryRun(plan, steps, batches, SimpleNamespace(optimizer=plan.schedule.optimizer), weight).report()
    half = len(steps.corrections) // 2
    assert steps.corrections == [1] * half + [0] * half and half > MEASURED_STEPS


@pytest.mark.parametrize(
    "weight, done, every, seconds",
    [
        ("auto:0.2", 0, 1, 100 * 60 + 50 * 120),  # 50 steps of 180 s
        ("auto:0.2", 30, 1, 70 * 60 + 20 * 120),
        ("auto:0.2", 60, 1, 40 * 60),
        ("0.3", 0, 1, 100 * 60),  # LPL itself is never computed
        ("auto:0.2", 0, 4, 75 * 30 + 25 * 180),  # it is measured throughout
    ],
)
def test_the_steps_that_measure_a_students_share_take_longer(planned, monkeypatch, weight, done, every, seconds):
    monkeypatch.setattr("lpl.families.resolve._check_student", lambda *_: None)
    plan = planned(lpl_student="user/student", lpl_weight=weight, lpl_every=every, max_train_steps=100)
    plan.run.step = done
    costs = Cost(30.0, None), Cost(180.0, None), Cost(60.0, None, 0.5)
    said = Report(plan, SimpleNamespace(optimizer=None), LplWeight(weight, 50, CPU), *costs)
    assert dict(said._run())["time"] == f"about {duration(seconds)}, without samples and checkpoints"
    steps = {("auto:0.2", 0, 1): 50, ("auto:0.2", 30, 1): 20, ("auto:0.2", 0, 4): 25}.get((weight, done, every))
    told = [words for _, words in said._costs() if "compute LPL too" in words]
    assert told == ([f"(its first {steps} steps compute LPL too, for --lpl_weight {weight})"] if steps else [])


def test_warnings_of_the_plan_are_in_the_report(planned):
    said, _ = dry_run(planned(lpl_sigma_threshold=0.03, lpl_every=2))
    assert "of the samples; raise --lpl_sigma_threshold" in said["warning"]
    assert said["computed on"] == "one step in 2, at 2 times the weight"


@pytest.mark.parametrize(
    "flags, images, steps, validation",
    [
        ({}, "streamed", "4; 4 to go", "none"),
        (
            {"validation_every_nth": 3, "max_train_samples": 4},
            "4",
            "4, which is 2.0 epochs; 4 to go",
            "the losses on held-out images, before, every 10 steps and at the end",
        ),
    ],
    ids=str,
)
def test_streamed_images(flags, images, steps, validation, sd_pipeline, tmp_path):
    """Their number is not known, unless --max_train_samples is given."""
    place, data = tmp_path / "out", write(tmp_path / "data", (5, 6))
    with redirect_stdout(io.StringIO()) as text:
        train(sd_pipeline, data, place, streaming=True, dry_run=True, max_train_steps=4, **flags)
    said = rows(text.getvalue())
    assert said["images"] == f"{images} at 32 px" and said["steps"] == steps and said["validation"] == validation
    assert said["look at them"].startswith("python -m lpl.data --train_data_dir ")
    assert not place.exists()
