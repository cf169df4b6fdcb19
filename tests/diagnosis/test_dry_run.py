"""The dry run's report: what it says is true, it is measured by real steps, and it leaves nothing behind."""

import io
import logging
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from trainer import parsed, reset_accelerate, train

from lpl.autoencoders import downscaling_factor
from lpl.data.dataset import LatentSpace, TrainingImages
from lpl.data.loader import training_batches
from lpl.data.order import KeyedBatches
from lpl.data.source import load_training_images
from lpl.diagnosis import dry_run as report
from lpl.diagnosis import needs as limits
from lpl.diagnosis.dry_run import DryRun
from lpl.diagnosis.needs import DiskNeeds
from lpl.diagnosis.plan import Plan
from lpl.objectives import get_objective
from lpl.training import updates as optimizers
from lpl.training.loading import load_family
from lpl.training.losses import BatchLosses
from lpl.training.parts import TrainedParts
from lpl.training.updates import Updates
from lpl.weighting import LplWeight
from tests.data.test_streaming import write


def rows(text):
    """{name of a row: its value} of a printed report."""
    return dict(re.findall(r"^  (\S.*?)  +(.*)$", text, re.MULTILINE))


def steps_of(kind):
    """Optimizer steps that a dry run takes of one kind."""
    return {"warm-up": 1, "measured": report.MEASURED_STEPS}[kind]


@pytest.fixture
def planned(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """`planned(**flags)` is the plan of that command on a tiny Stable Diffusion, or on another `pipeline`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()

    def make(pipeline=sd_pipeline, **flags):
        args, configs = parsed(pipeline, image_folder, tmp_path / "out", **flags)
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
        )
        trained = TrainedParts(load_family(args.model, args.lora, configs, torch.float32), args)
        objective = get_objective(args.prediction_type, configs.scheduler)
        space = LatentSpace(configs.vae["latent_channels"], downscaling_factor(configs.vae))
        dataset, _ = load_training_images(args.data, args.seed, args.cache_dir)
        images = TrainingImages(dataset, objective, space, args.data, args.diffusion, args.seed)
        optimizer = torch.optim.AdamW(trained.weights(), lr=args.learning_rate, fused=True)
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        global_batch = args.train_batch_size * args.gradient_accumulation_steps
        threshold, steps = args.lpl_sigma_threshold, args.max_train_steps
        return Plan(args, trained, accelerator, images, objective, threshold, steps, 0, global_batch, schedule)

    yield make
    reset_accelerate()


class Losses:
    """Fixed losses of a sample, with a gradient to the weights; every call is kept."""

    def __init__(self, diffusion_loss=2.0, lpl=1.0, inside=1, memory=2):
        self.diffusion_loss, self.lpl, self.inside, self.memory = diffusion_loss, lpl, inside, memory
        self.calls = []  # (with LPL, largest timestep)

    def __call__(self, model, batch, with_lpl):
        self.calls.append((with_lpl, float(batch["timestep"].max())))
        if self.memory < 1 + with_lpl:
            raise torch.OutOfMemoryError("too small a machine")
        attached = sum((parameter * torch.ones_like(parameter)).sum() for parameter in model.weights())
        errors = self.diffusion_loss + (attached - attached.detach()).expand(len(batch["timestep"]))
        without_noise = not batch["timestep"].any()  # the step that warms up, whose losses are no measure of a run
        lpl = torch.tensor(self.lpl * with_lpl * (1000 if without_noise else 1))
        return BatchLosses(errors, lpl, None, self.inside, with_lpl)


def dry_run(plan, losses):
    """What the dry run prints, and the dry run."""
    batches = KeyedBatches(len(plan.images), plan.args.train_batch_size, 0, 0, 1, 0)
    model, optimizer = plan.accelerator.prepare(plan.trained, plan.schedule.optimizer)
    updates = Updates(
        plan.accelerator, plan.trained, optimizer, plan.schedule, plan.max_steps, None, plan.args.max_grad_norm
    )
    weight = LplWeight(plan.args.lpl_weight, 50, torch.device("cpu"))
    done = DryRun(plan, losses, model, updates, training_batches(plan.images, batches), weight)
    with redirect_stdout(io.StringIO()) as printed:
        done.report()
    return printed.getvalue(), done


# The whole of it


@pytest.fixture(scope="module")
def printed(sd_pipeline, image_folder, tmp_path_factory):
    """The script's dry run; (what it printed, where its results would have been)."""
    place = tmp_path_factory.mktemp("dry_run") / "results"
    flags = {"use_ema": True, "checkpointing_steps": 2, "max_train_steps": 5, "validation_prompts": ["a cat"]}
    with redirect_stdout(io.StringIO()) as text:
        train(sd_pipeline, image_folder, place, dry_run=True, **flags)
    return text.getvalue(), place


def test_nothing_is_written(printed):
    assert not printed[1].exists()
    assert printed[0].startswith("Dry run: nothing was written.")


def test_what_the_report_says(printed):
    said = rows(printed[0])
    assert said["unet"].startswith("whole, ") and said["unet"].endswith("trained in float32")
    assert said["text_encoder"].startswith("frozen, ") and said["text_encoder"].endswith("frozen in float32")
    assert said["threshold"] == "sigma <= 3 : t <= 673 of 1000"
    assert re.fullmatch(rf"auto:0\.2, which is [\d.]+: 20\.0% .* over {report.MEASURED_STEPS} steps", said["weight"])
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
    text, _ = dry_run(plan, Losses())
    assert 0 < adapter < 10_000 < total
    assert rows(text)["unet"] == (
        f"LoRA of rank 2, {adapter / 1000:.2f}K of {total / 1000:.2f}K parameters, trained in float32, "
        "frozen in float32"
    )


def test_a_changed_objective_changes_the_scheduler(planned, sd_pipeline):
    plan = planned()
    plan.args.prediction_type = "v_prediction"
    assert plan.saved_scheduler() == "DDIMScheduler, in place of the pipeline's PNDMScheduler"


# Measuring


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_taken_without_and_then_with_lpl(planned, accumulation):
    losses = Losses()
    dry_run(planned(gradient_accumulation_steps=accumulation), losses)
    of_kind = accumulation * (steps_of("warm-up") + steps_of("measured"))
    assert [with_lpl for with_lpl, _ in losses.calls] == [False] * of_kind + [True] * of_kind
    for calls in (losses.calls[:of_kind], losses.calls[of_kind:]):
        timesteps = [timestep for _, timestep in calls]
        assert set(timesteps[:accumulation]) == {0.0}  # all samples inside: the most memory that LPL can need
        assert min(timesteps[accumulation:]) > 0


def test_they_are_real_steps(planned):
    plan = planned(gradient_accumulation_steps=2)
    before = [parameter.clone() for parameter in plan.trained.weights()]
    _, done = dry_run(plan, Losses())
    moved = [(old - new).abs().max().item() for old, new in zip(before, plan.trained.weights(), strict=True)]
    steps = 2 * (steps_of("warm-up") + steps_of("measured"))
    assert min(moved) > 0.9 * steps * 1e-3  # AdamW at its learning rate, once for two batches
    assert max(moved) < 1.1 * steps * 1e-3
    assert all(parameter.grad is None for parameter in plan.trained.weights())
    assert done.lpl_weight.steps == steps_of("measured")


def test_gradients_are_clipped(planned, monkeypatch):
    plan, norms = planned(max_grad_norm=0.5), []
    monkeypatch.setattr(optimizers, "clip_grads_with_norm_", lambda parameters, norm, total: norms.append(norm))
    dry_run(plan, Losses())
    assert norms == [0.5] * 2 * (steps_of("warm-up") + steps_of("measured"))


def test_without_lpl_only_plain_steps(planned):
    losses = Losses()
    text, _ = dry_run(planned(lpl_weight=0), losses)
    assert len(losses.calls) == steps_of("warm-up") + steps_of("measured")
    assert not any(with_lpl for with_lpl, _ in losses.calls)
    assert rows(text)["weight"] == "0: it is off" and "with LPL" not in rows(text) and "LPL costs" not in rows(text)


def test_seconds_are_those_of_one_step(planned, monkeypatch):
    ticks = iter([10.0, 10.0 + 2.0 * steps_of("measured"), 50.0, 50.0 + 3.0 * steps_of("measured")])
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    said = rows(dry_run(planned(max_train_steps=100), Losses())[0])
    assert said["without LPL"].startswith("2 s, ") and said["with LPL"].startswith("3 s, ")
    assert said["LPL costs"].startswith("1.50 x the time")
    assert said["time"].startswith("about 5 min, ")  # 100 steps of 3 s


def test_lpl_on_some_steps_costs_its_part(planned, monkeypatch):
    ticks = iter([10.0, 10.0 + 2.0 * steps_of("measured"), 50.0, 50.0 + 3.0 * steps_of("measured")])
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    said = rows(dry_run(planned(max_train_steps=100, lpl_every=5), Losses())[0])
    assert said["with LPL"].startswith("3 s, ")
    assert said["LPL costs"].startswith("1.10 x the time on average over 5 steps")
    assert said["time"].startswith("about 4 min, ")  # 80 steps of 2 s and 20 of 3 s
    assert said["weight"].startswith("auto:0.2, which is 0.5: 20.0% of")  # in expectation


# The weight


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
    found = rows(dry_run(planned(lpl_weight=weight), Losses(lpl=lpl))[0])
    assert found["weight"].startswith(said)
    assert ("warning" in found) is warns
    if warns:
        assert "auto:0.2" in found["warning"]


def test_what_a_checkpoint_has_measured_is_not_measured_again(planned):
    plan = planned()
    weight = LplWeight("auto:0.2", 1, torch.device("cpu"))
    weight.observe(torch.tensor(4.0), torch.tensor(1.0))
    weight.end_step(lambda sums: sums)
    done = DryRun(plan, Losses(), None, SimpleNamespace(), None, weight)
    done._measured = lambda with_lpl: report.Cost(1.0, None)
    done.updates.optimizer = torch.optim.AdamW(plan.trained.weights())
    with redirect_stdout(io.StringIO()) as printed:
        done.report()
    assert "auto:0.2, which is 1: 20.0% of the total loss, measured over 1 steps" in printed.getvalue()


# The threshold


@pytest.mark.parametrize("threshold", [0.1, 3.0, 12.0])
def test_the_threshold_in_timesteps(planned, threshold):
    plan = planned()
    plan.threshold = threshold
    sigma = plan.objective.sigma(torch.arange(1000))
    last = int(re.fullmatch(r"t <= (\d+) of 1000", plan.timesteps_inside())[1])
    assert sigma[last] <= threshold < sigma[last + 1]


@pytest.mark.parametrize("threshold", [1.0, 3.0, 12.0])
def test_the_threshold_as_a_fraction_of_a_flow(planned, threshold):
    plan = planned()
    plan.objective, plan.threshold = get_objective("flow_matching", FlowMatchEulerDiscreteScheduler()), threshold
    t = float(re.fullmatch(r"t <= (0\.\d{3})", plan.timesteps_inside())[1])
    sigma = plan.objective.sigma(torch.tensor([1000 * (t - 1e-3), 1000 * (t + 1e-3)]))
    assert sigma[0] < threshold < sigma[1]


def test_a_threshold_below_every_timestep(planned):
    plan = planned()
    plan.threshold = 1e-3
    assert plan.timesteps_inside() == "no timestep of 1000" and plan.share_inside() == 0


def test_the_share_inside_is_that_of_the_timesteps_drawn(planned):
    plan = planned()
    drawn = []

    def timestep(epoch, index):  # every timestep twice
        drawn.append((epoch, index))
        return torch.tensor(index % 1000)

    plan.images = SimpleNamespace(timestep=timestep)
    assert plan.share_inside() == pytest.approx(0.674)  # t <= 673
    assert len(set(drawn)) == report.DRAWS
    # An infinite sigma, where a schedule ends without any signal, is outside whatever the threshold is.
    plan.objective = get_objective("epsilon", DDPMScheduler(rescale_betas_zero_snr=True))
    plan.threshold = float("inf")
    assert plan.share_inside() == pytest.approx(0.999)


# Learning rates


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


def test_a_constant_learning_rate_is_told_once(planned):
    assert planned(max_train_steps=200).learning_rates() == ["0.001 throughout"]


def test_text_encoders_have_their_own(planned):
    plan = planned()
    parameters = plan.trained.weights()
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 5e-6}], lr=1e-4, fused=True
    )
    plan.schedule = get_scheduler("constant", optimizer)
    said = rows(dry_run(plan, Losses())[0])
    assert said["learning rate"] == "0.0001 throughout" and said["of text encoders"] == "5e-06 throughout"


# Memory


def test_memory_that_cannot_be_measured_is_not_told(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    said = rows(dry_run(planned(), Losses())[0])
    assert said["without LPL"].endswith("peak memory not measured") and "memory" not in said["LPL costs"]


@pytest.mark.parametrize("memory", [0, 1])
def test_what_does_not_fit_is_told(planned, memory):
    """With what saves memory in such a step, and nothing else."""
    said = rows(dry_run(planned(gradient_checkpointing=True), Losses(memory=memory))[0])
    assert f"a step {'with' if memory else 'without'} LPL needs more memory than there is" in said["warning"]
    assert "--train_batch_size 1 --gradient_accumulation_steps 2 (50% of" in said["warning"]
    assert "--use_8bit_adam (about " in said["warning"] and "--gradient_checkpointing (" not in said["warning"]
    assert ("--lpl_chunk_size 1 (" in said["warning"]) is (memory == 1)
    assert said["with LPL" if memory else "without LPL"] == "out of memory"
    assert said["weight"].endswith("not measured: out of memory") and "time" not in said
    assert ("s, peak memory" in said["without LPL"]) is (memory == 1)


def test_another_error_is_none_of_memory(planned, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dry_run(planned(), broken)


# The disk


@pytest.mark.parametrize("enough", [False, True])
def test_a_disk_that_is_too_small(planned, monkeypatch, enough):
    """For anything, or for all the checkpoints."""
    plan = planned(max_train_steps=10, checkpointing_steps=1)
    free = DiskNeeds.of(plan.trained, plan.args, 10, 0).bytes - 1 if enough else 1000
    monkeypatch.setattr(report, "free_space", lambda folder: free)
    said = rows(dry_run(plan, Losses())[0])
    words = "set --checkpoints_total_limit to 9 at most" if enough else "the result needs about"
    assert words in said["warning"] and f"{limits.size(free)} are free" in said["warning"]
    assert said["disk"].endswith(f" needed (weights, EMA, optimizer), {limits.size(free)} free")


# The run


@pytest.mark.parametrize(
    "lpl, start, every, done, seconds",
    [
        (True, 0, 1, 0, 10 * 3),
        (True, 4, 1, 0, 4 * 2 + 6 * 3),
        (True, 4, 1, 3, 1 * 2 + 6 * 3),
        (True, 4, 1, 6, 4 * 3),
        (True, 50, 1, 0, 10 * 2),
        (False, 0, 1, 0, 10 * 2),
        (True, 0, 1, 12, 0),
        (True, 0, 4, 0, 7 * 2 + 3 * 3),  # the 1st, 5th and 9th
        (True, 3, 4, 0, 8 * 2 + 2 * 3),  # the 4th and 8th
        (True, 3, 4, 4, 5 * 2 + 1 * 3),
        (True, 50, 4, 0, 10 * 2),
        (True, 0, 4, 12, 0),
    ],
)
def test_time_of_the_whole_run(lpl, start, every, done, seconds):
    args = SimpleNamespace(lpl=lpl, lpl_start_step=start, lpl_every=every)
    plan = SimpleNamespace(args=args, max_steps=10, steps_done=done, steps_to_go=max(0, 10 - done))
    assert report.whole_run_seconds(plan, without_lpl=2.0, with_lpl=3.0) == seconds


def test_a_run_to_resume_has_steps_behind_it(planned):
    plan = planned(max_train_steps=10)
    plan.steps_done = 4
    assert rows(dry_run(plan, Losses())[0])["steps"].endswith("; 6 to go")


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, "none"),
        ({"validation_every_nth": 4}, "the losses on what is held out, before, every 15 steps and at the end"),
        (
            {"validation_prompts": ["a", "b"], "validation_steps": 3},
            "2 samples, before, every 3 steps and at the end",
        ),
    ],
)
def test_when_is_validated(planned, flags, said):
    assert rows(dry_run(planned(**flags), Losses())[0])["validation"] == said


@pytest.mark.parametrize(
    "flags, images, steps, validation",
    [
        ({}, "streamed", "4; 4 to go", "none"),
        (
            {"validation_prompts": ["a"], "validation_steps": 2},
            *("streamed", "4; 4 to go", "1 sample, before, every 2 steps and at the end"),
        ),
        (
            {"validation_every_nth": 3, "max_train_samples": 4},
            *(
                "4",
                "4, which is 2.0 epochs; 4 to go",
                "the losses on what is held out, before, every 10 steps and at the end",
            ),
        ),
    ],
)
def test_streamed_images(flags, images, steps, validation, sd_pipeline, tmp_path):
    """Nobody knows how many they are, unless --max_train_samples tells; then validation asks for its own steps."""
    place = tmp_path / "out"
    with redirect_stdout(io.StringIO()) as text:
        train(
            sd_pipeline,
            write(tmp_path / "data", (5, 6)),
            place,
            streaming=True,
            dry_run=True,
            max_train_steps=4,
            **flags,
        )
    said = rows(text.getvalue())
    assert said["images"] == f"{images} at 32 px" and said["steps"] == steps and said["validation"] == validation
    assert not place.exists()


# The start of every run


def test_announcement(planned, caplog):
    caplog.set_level(logging.INFO)
    plan = planned(rank=2, mixed_precision="bf16", max_train_steps=6)
    plan.announce()
    text = caplog.text
    assert "8 images, 6 steps of 2: 1.5 epochs" in text
    assert re.search(
        r"training LoRA of rank 2 and alpha 2 on unet, [\d.]+K parameters, in float32 under bf16 autocast", text
    )
    assert f"objective epsilon, 32 px, seed 0, results in {plan.args.output_dir}" in text
    assert re.search(r"LPL with weight auto:0\.2 where sigma <= 3: 6\d% of the samples are inside", text)
    assert not any(
        record.levelno >= logging.WARNING for record in caplog.records if record.name == "lpl.diagnosis.dry_run"
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, None),
        ({"lpl_every": 4}, "one step in 4, at 4 times the weight"),
        ({"lpl_max_samples": 1, "lpl_crop": 16}, "at most 1 of 2 samples, one of 4 parts of 16 px"),
    ],
    ids=str,
)
def test_what_lpl_looks_at_is_told_by_both(planned, caplog, flags, said):
    caplog.set_level(logging.INFO)
    plan = planned(**flags)
    plan.announce()
    assert (f"are inside; {said}" if said else "are inside\n") in caplog.text
    assert rows(dry_run(plan, Losses())[0]).get("looked at") == said


def test_few_samples_inside_are_warned_of_by_both(planned, caplog):
    plan = planned(lpl_sigma_threshold=0.03)
    plan.announce()
    warned = "of the samples only; raise --lpl_sigma_threshold, which is scaled to this resolution unless"
    assert warned in caplog.text
    assert warned in rows(dry_run(plan, Losses())[0])["warning"]


def test_what_will_not_fit_on_the_disk_is_said_before_the_first_step(planned, caplog, monkeypatch):
    plan = planned(max_train_steps=10, checkpointing_steps=1)
    monkeypatch.setattr(limits, "free_space", lambda folder: DiskNeeds.of(plan.trained, plan.args, 10, 0).bytes - 1)
    plan.announce()
    assert "the result and 10 checkpoints of" in caplog.text
    monkeypatch.setattr(limits, "free_space", lambda folder: 1000)
    with pytest.raises(limits.NoRoom, match="--output_dir .*1000 bytes are free"):
        plan.announce()
    plan.accelerator = SimpleNamespace(is_main_process=False, mixed_precision="no")
    plan.announce()  # the main process says it


def test_a_baseline_says_nothing_of_lpl(planned, caplog):
    caplog.set_level(logging.INFO)
    planned(lpl_weight=0).announce()
    assert "training all of unet, " in caplog.text and "LPL" not in caplog.text


# Words


@pytest.mark.parametrize(
    "words, value, said",
    [
        (report.duration, 41.4, "41 s"),
        (report.duration, 90, "2 min"),
        (report.duration, 3599, "1 h 0 min"),
        (report.duration, 9000, "2 h 30 min"),
        (report.duration, 50 * 3600, "2 days 2 h"),
        (limits.size, 1023, "1023 bytes"),
        (limits.size, 1536, "1.5 KiB"),
        (limits.size, 3 * 2**30, "3.0 GiB"),
        (report._count, 999, "999"),
        (report._count, 859_500_000, "859.50M"),
        (report._count, 12_000_000_000, "12.00B"),
    ],
)
def test_numbers_in_words(words, value, said):
    assert words(value) == said
