"""What a run says before its first step is true."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler

from lpl.diagnosis import needs
from lpl.diagnosis import plan as plans
from lpl.diagnosis.needs import DiskNeeds, NoRoom
from lpl.objectives import get_objective


# The log at every start ----------------------------------------------------------------------------------------------


def test_announcement(planned, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(plans, "slowness_of_bfloat16", lambda: 0.5)
    plan = planned(rank=2, mixed_precision="bf16", max_train_steps=6)
    plan.announce()
    text = caplog.text
    assert "8 images, 6 steps of 2: 1.5 epochs" in text
    assert re.search(
        r"training LoRA of rank 2 and alpha 2 on unet, [\d.]+K parameters, in float32 under bf16 autocast", text
    )
    assert f"objective epsilon, 32 px, seed 0, results in {plan.config.output.output_dir}" in text
    assert re.search(r"LPL with weight auto:0\.2 where sigma <= 3: 6\d% of the samples are inside", text)
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)


def test_a_baseline_says_nothing_of_lpl(planned, caplog):
    caplog.set_level(logging.INFO)
    planned(lpl_weight=0).announce()
    assert "training all of unet, " in caplog.text and "LPL" not in caplog.text


@pytest.mark.parametrize("step, said", [(5, False), (6, False), (7, True)])
def test_a_run_that_is_resumed_beyond_its_length(planned, step, said):
    plan = planned(max_train_steps=6)
    plan.run.step = step
    expected = "no step is trained: the run to resume has 7, beyond the 6 asked for"
    assert any(expected in warning for warning in plan.warnings()) == said


def test_the_disk_is_checked_before_the_first_step(planned, caplog, monkeypatch):
    plan = planned(max_train_steps=10, checkpointing_steps=1)
    disk = DiskNeeds.of(plan.trained, plan.config.optimization, plan.config.output, 10, 0)
    monkeypatch.setattr(needs, "free_space", lambda folder: disk.bytes - 1)
    plan.announce()
    assert "the result and 10 checkpoints of" in caplog.text
    monkeypatch.setattr(needs, "free_space", lambda folder: 1000)
    with pytest.raises(NoRoom, match="--output_dir .*1000 bytes are free"):
        plan.announce()
    plan.run.accelerator = SimpleNamespace(is_main_process=False, mixed_precision="no", device=torch.device("cpu"))
    plan.announce()  # only the main process refuses


# Where LPL applies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 3.0, 12.0])
def test_the_threshold_in_timesteps(planned, threshold):
    plan = planned(lpl_sigma_threshold=threshold)
    sigma = plan.objective.sigma(torch.arange(1000))
    last = int(re.fullmatch(r"t <= (\d+) of 1000", plan.timesteps_inside())[1])
    assert sigma[last] <= threshold < sigma[last + 1]


@pytest.mark.parametrize("threshold", [1.0, 3.0, 12.0])
def test_the_threshold_as_a_fraction_of_a_flow(planned, threshold):
    plan = planned(lpl_sigma_threshold=threshold)
    plan.images.objective = get_objective("flow_matching", FlowMatchEulerDiscreteScheduler())
    t = float(re.fullmatch(r"t <= (0\.\d{3})", plan.timesteps_inside())[1])
    sigma = plan.objective.sigma(torch.tensor([1000 * (t - 1e-3), 1000 * (t + 1e-3)]))
    assert sigma[0] < threshold < sigma[1]


def test_a_threshold_below_every_timestep(planned):
    plan = planned(lpl_sigma_threshold=1e-3)
    assert plan.timesteps_inside() == "no timestep of 1000" and plan.share_inside() == 0
    assert any("LPL applies to only 0.0% of the samples" in warning for warning in plan.warnings())


def test_the_threshold_is_scaled_to_the_size(planned):
    assert planned(lpl_threshold_base_resolution=64).threshold == 1.5


def test_the_share_inside_is_that_of_the_timesteps_drawn(planned, monkeypatch):
    plan = planned()
    drawn = []

    def timestep(epoch, index):  # every timestep twice
        drawn.append((epoch, index))
        return torch.tensor(index % 1000)

    plan.images = SimpleNamespace(timestep=timestep, objective=plan.objective)
    assert plan.share_inside() == pytest.approx(0.674)  # t <= 673
    assert len(set(drawn)) == plans.DRAWS
    # An infinite sigma, at the end of a schedule without any signal, is outside every threshold.
    plan.images.objective = get_objective("epsilon", DDPMScheduler(rescale_betas_zero_snr=True))
    monkeypatch.setattr(type(plan), "threshold", float("inf"))
    assert plan.share_inside() == pytest.approx(0.999)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, ""),
        ({"lpl_every": 4}, "one step in 4, at 4 times the weight"),
        ({"lpl_max_samples": 1, "lpl_crop": 16}, "at most 1 of 2 samples, one of 4 parts of 16 px"),
    ],
    ids=str,
)
def test_the_part_that_lpl_is_computed_on(planned, caplog, flags, said):
    caplog.set_level(logging.INFO)
    plan = planned(**flags)
    plan.announce()
    assert plan.applied_to() == said
    assert (f"are inside; {said}" if said else "are inside\n") in caplog.text


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"lpl_start_step": 10}, "--lpl_start_step 10: the run ends after 10, without LPL"),
        ({"lpl_start_step": 5, "lpl_ramp_steps": 10}, "--lpl_ramp_steps 10: the run ends where LPL has 50% of"),
    ],
    ids=str,
)
def test_lpl_that_begins_too_late(planned, flags, said):
    (warning,) = planned(max_train_steps=10, **flags).warnings()
    assert warning.startswith(said)


# What may not be meant -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, "--lr_warmup_steps 500: the run ends after 10, at 2% of --learning_rate"),  # the default
        ({"lr_warmup_steps": 10}, "--lr_warmup_steps 10: the run ends after 10, at 100% of --learning_rate"),
        ({"lr_warmup_steps": 9}, None),
        ({"lr_warmup_steps": 0.5}, None),
        ({"lr_scheduler": "constant"}, None),  # which has no warm-up
    ],
    ids=str,
)
def test_a_warm_up_that_is_longer_than_the_run(planned, flags, said):
    warnings = planned(lpl_weight=0, max_train_steps=10, **{"lr_scheduler": "cosine"} | flags).warnings()
    assert len(warnings) == (said is not None) and all(warning.startswith(said) for warning in warnings)


@pytest.mark.parametrize(
    "precision, slowness, said",
    [
        (
            "bf16",
            17.0,
            ["a product of matrices takes 17 times as long in bfloat16 on this CPU; give --mixed_precision no"],
        ),
        ("bf16", 0.5, []),
        ("no", 17.0, []),
    ],
)
def test_a_cpu_that_emulates_bfloat16_is_warned_of(planned, monkeypatch, precision, slowness, said):
    monkeypatch.setattr(plans, "slowness_of_bfloat16", lambda: slowness)
    assert planned(lpl_weight=0, mixed_precision=precision).warnings() == said


@pytest.mark.parametrize("device, computes", [("cuda", True), ("cuda", False), ("mps", True)])
def test_a_gpu_that_emulates_bfloat16_is_warned_of(planned, monkeypatch, device, computes):
    monkeypatch.setattr(plans, "slowness_of_bfloat16", lambda: 17.0)  # of the CPU
    plan = planned(lpl_weight=0, mixed_precision="bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: computes)
    gpu = SimpleNamespace(device=torch.device(device), mixed_precision="bf16", num_processes=1)
    plan = replace(plan, run=replace(plan.run, accelerator=gpu))
    said = "this GPU only emulates bfloat16; give --mixed_precision fp16"
    assert plan.warnings() == ([] if computes else [said])


def test_captions_that_are_cut_off(planned, caplog):
    plan = planned(lpl_weight=0)
    assert plan.warnings() == []
    long = " ".join(["a cat on a mat"] * 40)
    rows = plan.images.dataset
    captions = [[long, "a cat"] if place in (1, 2) else ["a cat"] for place in range(len(rows))]
    plan.images.dataset = rows.remove_columns("text").add_column("text", captions)
    assert plan.warnings() == [
        "--caption_column text: 2 of 10 captions have more than the 77 tokens that the text encoder takes, and are "
        "cut off there"
    ]
    plan.announce()
    assert "2 of 10 captions" in caplog.text


@pytest.mark.parametrize("tokens, limit", [(None, 77), (300, 300)])
def test_the_encoder_that_takes_most_counts(sd3_pipeline, planned, tokens, limit):
    counts, found = planned(pipeline=sd3_pipeline, max_sequence_length=tokens).trained.family.caption_lengths(["cat"])
    assert found == limit and len(counts) == 1


def test_an_instruction_counts_as_the_encoder_sees_it(lumina2_pipeline, planned):
    """What the encoder takes has the instruction in front of the caption."""
    family = planned(pipeline=lumina2_pipeline, lpl_weight=0).trained.family
    (count,), limit = family.caption_lengths(["cat"])
    (alone,) = map(len, family.pipeline.tokenizer(["cat"]).input_ids)
    assert count > alone and limit == family.tokens


def test_a_system_message_counts_too(flux2_pipeline, planned):
    family = planned(pipeline=flux2_pipeline, lpl_weight=0).trained.family
    (short, long), limit = family.caption_lengths(["cat", " ".join(1000 * ["cat"])])
    whole = int(family.tokenize(["cat"])["tokenizer"]["attention_mask"].sum())
    assert limit == family.tokens and short == whole and long > 1000


# Learning rates and scheduler ----------------------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_schedule(planned):
    plan = planned(lr_scheduler="cosine", lr_warmup_steps=30, max_train_steps=200)
    (curve,) = plan.learning_rates()
    assert plan.schedule.last_epoch == 0  # it was not moved
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule, rates = get_scheduler("cosine", optimizer, num_warmup_steps=30, num_training_steps=200), []
    for _ in range(200):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    points = re.findall(r"(\S+) at step (\d+)", curve)
    assert [int(step) for _, step in points] == [1, 31, 51, 101, 151, 200]
    assert all(float(rate) == pytest.approx(rates[int(step) - 1], rel=0.05, abs=1e-9) for rate, step in points)


def test_each_group_of_parameters_has_its_learning_rate(planned):
    plan = planned(max_train_steps=200)
    assert plan.learning_rates() == ["0.001 throughout"]
    first, *others = plan.trained.weights()
    groups = [{"params": [first]}, {"params": others, "lr": 5e-6}]
    plan.schedule = get_scheduler("constant", torch.optim.AdamW(groups, lr=1e-4))
    assert plan.learning_rates() == ["0.0001 throughout", "5e-06 throughout"]


def test_a_changed_objective_changes_the_scheduler(planned):
    plan = planned()
    assert plan.saved_scheduler() == "PNDMScheduler, the pipeline's own"
    plan.config = plan.config.changed(prediction_type="v_prediction")
    assert plan.saved_scheduler() == "DDIMScheduler, in place of the pipeline's PNDMScheduler"
