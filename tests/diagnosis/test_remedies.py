"""The advice where memory is short: it can be followed, and it is for what the run is doing."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainer import parsed

from lpl.diagnosis import remedies as remedies_of
from lpl.diagnosis.remedies import remedies
from lpl.diagnosis.status import Stage, Status
from tests.diagnosis.conftest import trained_parts


ON_A_GPU = {"device": torch.device("cuda")}


def changed(flags, remedy):
    """The flags with those of a remedy, which are as typed."""
    words = remedy.split()
    if words[0] == "without":
        return flags | {words[1].removeprefix("--"): None}
    names = [word.removeprefix("--") for word in words if word.startswith("--")]
    values = [word for word in words if not word.startswith("--")] or [True] * len(names)
    return flags | dict(zip(names, values, strict=True))


def name(remedy):
    """The first flag of a remedy, without its value."""
    return next(word for word in remedy.flags.split() if word.startswith("--"))


def names(status):
    return {name(remedy) for remedy in remedies(status)}


# Which flags ---------------------------------------------------------------------------------------------------------


STAGES = {
    Stage.READING: set(),
    Stage.LOADING: {"--mixed_precision", "--lora", "--train_text_encoder", "--offload_frozen"},
    Stage.STEP: {"--gradient_checkpointing", "--train_batch_size", "--offload_ema", "--mixed_precision"}
    | {"--offload_frozen"}
    | {"--use_8bit_adam", "--lora", "--train_text_encoder"},
    Stage.SAMPLES: {
        "--offload_frozen",
        "--offload_ema",
        "--mixed_precision",
        "--use_8bit_adam",
        "--lora",
        "--train_text_encoder",
    },
}
STAGES[Stage.LPL_STEP] = STAGES[Stage.STEP] | {
    f"--lpl_{name}" for name in ("gradient_checkpointing", "chunk_size", "max_samples", "crop")
}
STAGES[Stage.LOSSES] = STAGES[Stage.SAMPLES] | {"--train_batch_size", "--lpl_chunk_size"}
STAGES[Stage.EVALUATION] = STAGES[Stage.SAMPLES] | {"--eval_batch_size"}
STAGES[Stage.SAVING] = STAGES[Stage.SAMPLES]


@pytest.mark.parametrize("stage", Stage)
def test_advice_is_for_the_stage(stage, status, with_gpu, sd3_pipeline):
    flags = {"use_ema": True, "train_text_encoder": True}  # T5 is frozen all the same
    assert names(status(stage, pipeline=sd3_pipeline, machine=ON_A_GPU, **flags)) == STAGES[stage]


def test_what_does_not_exist_yet_saves_nothing(status, with_gpu):
    """Before the first step there is no optimizer state, and while the models are loaded no gradient."""
    assert "--use_8bit_adam" not in names(status(Stage.SAMPLES, step=0))
    assert "--use_8bit_adam" in names(status(Stage.SAMPLES, step=1))
    assert "--lora" not in names(status(Stage.LOADING))  # float32 either way
    assert "--lora" in names(status(Stage.LOADING, mixed_precision="bf16"))
    assert "--mixed_precision" not in names(status(Stage.LOADING, mixed_precision="bf16"))
    assert "--offload_ema" not in names(status(use_ema=True))  # on a CPU


def test_before_the_models_are_there(status, with_gpu):
    run = status(Stage.LOADING, machine=ON_A_GPU, rank=2)
    run.trained = None
    assert names(run) == {"--mixed_precision", "--quantize_base", "--offload_frozen"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_gpu_that_is_not_there_has_what_a_gpus_machine_has(status, monkeypatch):
    """As --for_gpu imagines it, whatever is installed here."""
    monkeypatch.setattr(remedies_of, "missing", lambda package: package == "bitsandbytes")
    advised = names(status(machine=ON_A_GPU, rank=2))
    assert {"--mixed_precision", "--quantize_base"} <= advised
    assert "--use_8bit_adam" in names(status(machine=ON_A_GPU)) and "--use_8bit_adam" not in names(status())


def test_values_follow_the_flags_in_use(status):
    advised = {remedy.flags for remedy in remedies(status(train_batch_size=6, gradient_accumulation_steps=2))}
    assert advised >= {
        "--train_batch_size 3 --gradient_accumulation_steps 4",
        "--lpl_chunk_size 1",
        "--lpl_max_samples 3",
        "--lpl_crop 16",
    }
    advised = {remedy.flags for remedy in remedies(status(train_batch_size=7))}
    assert "--train_batch_size 1 --gradient_accumulation_steps 7" in advised


def test_what_no_checkpoint_can_be_resumed_under(status):
    new_run_only = {name(remedy) for remedy in remedies(status(train_text_encoder=True)) if remedy.new_run_only}
    assert new_run_only == {"--use_8bit_adam", "--train_text_encoder", "--lora"}


def test_a_decoder_of_unknown_parts_is_not_checkpointed(status):
    run = status()
    assert "--lpl_gradient_checkpointing" in names(run)
    run.trained.family.pipeline.vae.decoder = nn.Identity()
    assert "--lpl_gradient_checkpointing" not in names(run)


def test_the_machines_memory_beside_a_gpu(status):
    """What is on the GPU is no advice there."""
    run = status(machine=ON_A_GPU, use_ema=True, offload_ema=True, dataloader_num_workers=3)
    advised = [remedy.flags for remedy in remedies(run, torch.device("cpu"))]
    assert advised == ["--dataloader_num_workers 1", "without --offload_ema"]
    assert "--dataloader_num_workers" in names(status(dataloader_num_workers=3))  # a run on the CPU


# With all other flags ------------------------------------------------------------------------------------------------


MATRIX = {
    "use_ema": [None, True],
    "rank": [None, 4],
    "train_text_encoder": [None, True],
    "train_batch_size": [1, 6],
    "lpl": ["on", "off", "held out", "cheap", "reference"],
    "saving": [None, "gradients", "bits", "prodigy", "from scratch"],
}
LPL = {
    "on": {},
    "off": {"lpl_weight": 0},
    "held out": {"validation_every_nth": 4},
    "reference": {"lpl_variant": "reference", "lpl_max_samples": 4},
    "cheap": {"lpl_chunk_size": 2, "lpl_max_samples": 3, "lpl_crop": 16, "lpl_gradient_checkpointing": True},
}
SAVING = {
    None: {},
    "gradients": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "bits": {"mixed_precision": "bf16", "use_8bit_adam": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "from scratch": {"from_scratch": True},
}


def flag_sets(stride):
    """Every ``stride``-th of all combinations that are allowed."""
    for number, values in enumerate(itertools.product(*MATRIX.values())):
        flags = dict(zip(MATRIX, values))
        lpl, saving = flags.pop("lpl"), flags.pop("saving")
        refused = lpl == "cheap" and flags["train_batch_size"] == 1 or saving == "from scratch" and flags["rank"]
        if number % stride == 0 and not refused:
            yield flags | LPL[lpl] | SAVING[saving]


def refused_or_idle(pipeline, images, place, flags):
    """What the checks say against the flags."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            parsed(pipeline, images, place, **flags)
        except (ValueError, SystemExit) as error:
            return [f"refused: {error}"]
    return [str(warning.message) for warning in said if "has no effect" in str(warning.message)]


def in_use(flags, words):
    """Whether one of the words asks for what is in use, or for more."""
    for name, value in changed({}, words).items():
        present = flags.get(name)
        smaller = name.endswith(("batch_size", "chunk_size", "max_samples", "crop"))
        if value is True and present or smaller and present is not None and int(value) >= present:
            return True
    return words.startswith("without ") and not flags.get(words.split()[1].removeprefix("--"))


@pytest.mark.parametrize(
    "pipeline, stride",
    [
        ("sd_pipeline", 17),
        ("dit_pipeline", 31),
        *(pytest.param(f"{name}_pipeline", 2, marks=pytest.mark.slow) for name in ("sd", "sd3", "sdxl", "dit")),
    ],
)
def test_advice_can_be_followed(pipeline, stride, request, with_gpu, image_folder, class_folder, tmp_path):
    """Nothing is advised that is in use, that the checks refuse with the other flags, or that has no effect."""
    images = class_folder if pipeline == "dit_pipeline" else image_folder
    pipeline, advised = request.getfixturevalue(pipeline), set()
    runs = {}
    for flags in flag_sets(stride):
        if "dit" in str(pipeline) and flags["train_text_encoder"]:
            continue
        config, description = parsed(pipeline, images, tmp_path / "out", **flags)
        precision = config.optimization.mixed_precision or "no"
        key = config.lora.lora, config.model.train_text_encoder, precision
        if key not in runs:
            runs[key] = trained_parts(config, description, torch.bfloat16 if precision == "bf16" else torch.float32)
        machine = SimpleNamespace(device=torch.device("cuda"), mixed_precision=precision, num_processes=1)
        # What the checks say against the flags themselves
        before = refused_or_idle(pipeline, images, tmp_path / "out", flags)
        stages = [Stage.LPL_STEP if config.lpl.enabled else Stage.STEP, Stage.SAMPLES]
        for stage in [*stages, *([Stage.LOSSES] if flags.get("validation_every_nth") else [])]:
            for remedy in remedies(Status(config, machine, runs[key], stage, 3)):
                assert not in_use(flags, remedy.flags), (flags, remedy.flags)
                said = refused_or_idle(pipeline, images, tmp_path / "out", changed(flags, remedy.flags))
                own = [words for words in said if words not in before]
                assert not [w for w in own if w.startswith("refused")], (flags, remedy.flags, own)
                assert not [w for w in own if remedy.flags.split()[0] in w.split()], (flags, remedy.flags, own)
                advised.add(name(remedy))
    expected = STAGES[Stage.LPL_STEP] | {"--quantize_base", "--activation_offload", "--group_offload"}
    assert advised == expected - ({"--train_text_encoder"} if "dit" in str(pipeline) else set())
