"""What a run can run out of: the sizes are those of real optimizers and files, the advice can be followed and saves
what it says, and the run ends with one error that leaves the last checkpoint whole."""

import gc
import itertools
import os
import re
import shutil
import signal
import subprocess
import traceback
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import debug_launcher
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from trainer import metrics, parsed, same, script, train, weights

from lpl.config import Config, checks
from lpl.config.config import NEVER_CHANGED
from lpl.data.dataset import TrainingImages
from lpl.data.streaming import LostShard
from lpl.data.timeouts import HungLoader
from lpl.diagnosis import failures as ending
from lpl.diagnosis import needs as limits
from lpl.diagnosis.failures import Stage, Status, explained
from lpl.diagnosis.needs import DiskNeeds, NoRoom
from lpl.tools.process import SIGNALS
from lpl.training import checkpoints
from lpl.training.average import MovingAverage
from lpl.training.checkpoints import find_checkpoints
from lpl.training.loading import load_family
from lpl.training.parts import TrainedParts
from lpl.training.updates import make_optimizer


MIB = 2**20


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A run that ends by an error listens to signals until its process is gone."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture
def status(sd_pipeline, image_folder, tmp_path):
    """`status(stage, step, **flags)`: a run with those flags at that stage; `machine` says where."""

    def make(stage=Stage.LPL_STEP, step=3, pipeline=sd_pipeline, machine=None, **flags):
        args, configs = parsed(pipeline, image_folder, tmp_path / "out", **flags)
        precision = args.mixed_precision or "no"
        dtype = torch.float32 if precision == "no" else torch.bfloat16
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), mixed_precision=precision, num_processes=1, is_main_process=True
        )
        vars(accelerator).update(machine or {})
        return Status(
            args, accelerator, TrainedParts(load_family(args.model, args.lora, configs, dtype), args), stage, step
        )

    return make


ON_A_GPU = {"device": torch.device("cuda")}


@pytest.fixture
def with_gpu(monkeypatch):
    """What flags allow where there is one."""
    for module in (checks, ending):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def changed(flags, remedy):
    """The flags with a remedy's, which are as they are typed."""
    words = remedy.flags.split()
    if words[0] == "without":
        return flags | {words[1].removeprefix("--"): None}
    names = [word.removeprefix("--") for word in words if word.startswith("--")]
    values = [word for word in words if not word.startswith("--")] or [True] * len(names)
    return flags | dict(zip(names, values, strict=True))


def remedy(status, name):
    """The one with that flag."""
    (found,) = [remedy for remedy in status.remedies() if name in remedy.flags.split()]
    return found


def names(remedies):
    """The flags of remedies, without their values."""
    return {remedy.flags.split()[0 if remedy.flags.startswith("--") else 1] for remedy in remedies}


# Sizes ---------------------------------------------------------------------------------------------------------------


def state_bytes(optimizer):
    """Of the tensors that an optimizer has, each counted once."""
    tensors = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return limits.bytes_of({tensor.data_ptr(): tensor for tensor in tensors}.values())


OPTIMIZERS = {
    "AdamW": {},
    "8bit": {"use_8bit_adam": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": None},
    "prodigy without momentum": {"optimizer": "prodigy", "learning_rate": 1.0, "adam_beta1": 0.0},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("flags", [{}, {"rank": 16}])
def test_an_optimizers_state_is_as_large_as_the_real_one(kind, flags, status):
    run = status(**OPTIMIZERS[kind] | flags)
    trained = run.trained.weights()
    extra = nn.Parameter(torch.randn(300, 100))  # whose last block of 8-bit state is not full
    with torch.no_grad():
        for parameter in trained:  # LoRA's zeros, of which Prodigy keeps no copy
            parameter += 1e-3
    optimizer = make_optimizer(run.args, run.trained, 1)
    optimizer.add_param_group({"params": [extra]})
    for parameter in (*trained, extra):
        parameter.grad = torch.ones_like(parameter)
    assert state_bytes(optimizer) == 0
    optimizer.step()
    assert limits.optimizer_bytes((*trained, extra), run.args) == state_bytes(optimizer)


def test_8_bits_begin_where_they_do_in_the_real_one():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    args = Namespace(optimizer="AdamW", use_8bit_adam=True)
    for count in (1, limits.SMALLEST_8BIT - 1, limits.SMALLEST_8BIT, limits.SMALLEST_8BIT + 1, 100 * 256 + 255):
        parameter = nn.Parameter(torch.zeros(count))
        parameter.grad = torch.ones(count)
        optimizer = bitsandbytes.optim.AdamW8bit([parameter])
        optimizer.step()
        assert limits.optimizer_bytes([parameter], args) == state_bytes(optimizer), count


def size_of(folder, pattern):
    return sum(file.stat().st_size for file in Path(folder).glob(pattern) if file.is_file())


@pytest.mark.parametrize("flags", [{}, {"use_ema": True}, {"rank": 64, "use_ema": True}, {"use_8bit_adam": True}])
def test_sizes_are_those_of_the_files(flags, status, sd_pipeline, image_folder, tmp_path):
    written = train(
        sd_pipeline, image_folder, tmp_path / "run", max_train_steps=1, lpl_weight=0, checkpointing_steps=1, **flags
    )
    run = status(lpl_weight=0, **flags)
    # The rest of a file are names and shapes, which count for something in models as small as these.
    estimate = limits.checkpoint_bytes(run.trained, run.args)
    assert 0.6 * size_of(written / "checkpoint-1", "**/*") < estimate < size_of(written / "checkpoint-1", "**/*")
    run.args.use_ema = False
    of_ema = estimate - limits.checkpoint_bytes(run.trained, run.args)
    ema = size_of(written / "checkpoint-1", "ema/**/*.safetensors")
    assert 0.7 * ema <= of_ema <= ema and (ema > 0) is flags.get("use_ema", False)
    result = size_of(written, "*.safetensors" if flags.get("rank") else "[tuv]*/*.safetensors")
    assert 0.6 * result < limits.result_bytes(run.trained) < result


@pytest.mark.parametrize(
    "count, said", [(1023, "1023 bytes"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2.5 * 2**40, "2.5 TiB")]
)
def test_sizes_in_words(count, said):
    assert limits.size(count) == said


# Advice --------------------------------------------------------------------------------------------------------------


def on_device(run):
    """Real bytes of a run in its second step: of models but the VAE; and of what is there because it is trained."""
    trained, args = run.trained, run.args
    trained = trained.weights()
    ema = MovingAverage(trained, 0.9) if args.use_ema else None
    optimizer = make_optimizer(args, trained, 1)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    modules = [*trained.parts.values(), *trained.family.text_encoders]
    models = limits.bytes_of({id(p): p for module in modules for p in module.parameters()}.values())
    held = limits.bytes_of(p.grad for p in trained) + state_bytes(optimizer)
    held += limits.bytes_of(ema.shadow_params) if ema else 0
    return models, held, limits.bytes_of(trained)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("--use_8bit_adam", {}),
        ("--use_8bit_adam", {"train_text_encoder": True, "use_ema": True}),
        ("--lora", {}),
        ("--lora", {"use_ema": True, "mixed_precision": "bf16"}),
        ("--lora", {"train_text_encoder": True, "use_ema": True, "mixed_precision": "bf16", "use_8bit_adam": True}),
        ("--train_text_encoder", {"train_text_encoder": True, "use_ema": True}),
        ("--train_text_encoder", {"train_text_encoder": True, "mixed_precision": "bf16"}),
        ("--train_text_encoder", {"train_text_encoder": True, "rank": 2, "use_ema": True}),
        ("--mixed_precision", {}),
        ("--mixed_precision", {"rank": 2}),
        ("--mixed_precision", {"rank": 2, "train_text_encoder": True}),
    ],
    ids=str,
)
def test_a_remedy_that_is_followed_saves_what_it_says(name, flags, status):
    run = status(**flags)
    advised = remedy(run, name)
    models, held, _ = on_device(run)
    other_models, other_held, adapters = on_device(status(**changed(flags, advised)))
    saved = models + held - other_models - other_held
    if name == "--lora":  # "less what the adapters need"
        saved += other_held + adapters
    assert advised.saved == saved > 0


def test_the_moving_average_that_is_offloaded(status, with_gpu):
    run = status(use_ema=True, machine=ON_A_GPU)
    ema = MovingAverage(run.trained.weights(), 0.9)
    assert remedy(run, "--offload_ema").saved == limits.bytes_of(ema.shadow_params)
    on_gpu = remedy(run, "--lora").saved
    assert on_gpu - remedy(status(use_ema=True, offload_ema=True, machine=ON_A_GPU), "--lora").saved == (
        limits.bytes_of(ema.shadow_params)
    )


def test_processes_exchange_gradients_in_memory_of_their_own(status):
    alone, one_of_two = (remedy(status(machine={"num_processes": count}), "--lora").saved for count in (1, 2))
    assert one_of_two - alone == limits.bytes_of(status().trained.weights())


@pytest.mark.parametrize("precision, item", [("no", 4), ("bf16", 2)])
def test_weights_in_4_bits(precision, item, status, with_gpu):
    quantize = pytest.importorskip("bitsandbytes").functional.quantize_4bit
    run = status(rank=2, mixed_precision=precision, machine=ON_A_GPU)
    saved = 0
    for name, module in run.trained.denoiser.named_modules():
        if isinstance(module, nn.Linear) and "lora" not in name:
            assert module.weight.element_size() == item
            packed, state = quantize(module.weight.detach(), quant_type="nf4")
            saved += limits.bytes_of([module.weight]) - limits.bytes_of([packed, state.absmax])
    assert remedy(run, "--quantize_base").saved == pytest.approx(saved, rel=0.01)


def test_shares_of_activations(status):
    run = status(train_batch_size=6, gradient_accumulation_steps=2)
    found = {remedy.flags: str(remedy) for remedy in run.remedies()}
    assert found["--train_batch_size 3 --gradient_accumulation_steps 4"].startswith("50% of all")
    assert found["--lpl_chunk_size 1"].startswith("up to 83% of")
    assert found["--lpl_max_samples 3"].startswith("half of") and found["--lpl_crop 16"].startswith("nearly 75% of")
    flags = {remedy.flags: str(remedy) for remedy in status(train_batch_size=7).remedies()}
    assert flags["--train_batch_size 1 --gradient_accumulation_steps 7"].startswith("86% of all")


STAGES = {
    Stage.READING: set(),
    Stage.LOADING: {"--mixed_precision", "--lora", "--train_text_encoder"},
    Stage.STEP: {"--gradient_checkpointing", "--train_batch_size", "--offload_ema", "--mixed_precision"}
    | {"--use_8bit_adam", "--lora", "--train_text_encoder"},
    Stage.SAMPLES: {"--offload_ema", "--mixed_precision", "--use_8bit_adam", "--lora", "--train_text_encoder"},
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
    assert names(status(stage, pipeline=sd3_pipeline, machine=ON_A_GPU, **flags).remedies()) == STAGES[stage]


def test_what_is_not_there_yet_saves_nothing(status, with_gpu):
    """Before the first step there is no optimizer's state; where the models are loaded no gradient."""
    assert "--use_8bit_adam" not in names(status(Stage.SAMPLES, step=0).remedies())
    assert "--use_8bit_adam" in names(status(Stage.SAMPLES, step=1).remedies())
    assert "--lora" not in names(status(Stage.LOADING).remedies())  # float32 either way
    assert "--use_8bit_adam" not in names(status(rank=1).remedies())  # adapters that small stay in 32 bits
    assert "--mixed_precision" not in names(status(Stage.LOADING, mixed_precision="bf16").remedies())
    assert "--offload_ema" not in names(status(use_ema=True).remedies())  # on a CPU


def test_before_the_models_are_there(status, with_gpu):
    run = status(Stage.LOADING, machine=ON_A_GPU, rank=2)
    run.trained = None
    assert names(run.remedies()) == {"--mixed_precision", "--quantize_base"}
    assert all(remedy.saved is None for remedy in run.remedies())


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
    """Every so many-th of all combinations that are allowed."""
    for number, values in enumerate(itertools.product(*MATRIX.values())):
        flags = dict(zip(MATRIX, values))
        lpl, saving = flags.pop("lpl"), flags.pop("saving")
        refused = lpl == "cheap" and flags["train_batch_size"] == 1 or saving == "from scratch" and flags["rank"]
        if number % stride == 0 and not refused:
            yield flags | LPL[lpl] | SAVING[saving]


def refused_or_idle(pipeline, images, place, flags):
    """What is said against the flags, if anything is."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            parsed(pipeline, images, place, **flags)
        except (ValueError, SystemExit) as error:
            return [f"refused: {error}"]
    return [str(warning.message) for warning in said if "has no effect" in str(warning.message)]


def in_use(flags, words):
    """Whether one of the words asks for what is there already, or for more."""
    for name, value in changed({}, SimpleNamespace(flags=words)).items():
        present = flags.get(name)
        smaller = name.endswith(("batch_size", "chunk_size", "max_samples", "crop"))
        if value is True and present or smaller and present is not None and int(value) >= present:
            return True
    return words.startswith("without ") and not flags.get(words.split()[1].removeprefix("--"))


@pytest.mark.parametrize(
    "pipeline, stride",
    [
        ("sd_pipeline", 17),
        ("dit_pipeline", 29),
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
        args, configs = parsed(pipeline, images, tmp_path / "out", **flags)
        key = args.lora, args.train_text_encoder, args.mixed_precision
        if key not in runs:
            dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
            runs[key] = TrainedParts(load_family(args.model, args.lora, configs, dtype), args)
        machine = SimpleNamespace(
            device=torch.device("cuda"), mixed_precision=args.mixed_precision or "no", num_processes=1
        )
        # what says nothing against the flags themselves
        before = refused_or_idle(pipeline, images, tmp_path / "out", flags)
        stages = [Stage.LPL_STEP if args.lpl else Stage.STEP, Stage.SAMPLES]
        for stage in [*stages, *([Stage.LOSSES] if flags.get("validation_every_nth") else [])]:
            for remedy in Status(args, machine, runs[key], stage, 3).remedies():
                assert not in_use(flags, remedy.flags), (flags, remedy.flags)
                said = refused_or_idle(pipeline, images, tmp_path / "out", changed(flags, remedy))
                own = [words for words in said if words not in before]
                assert not [w for w in own if w.startswith("refused")], (flags, remedy.flags, own)
                assert not [w for w in own if remedy.flags.split()[0] in w.split()], (flags, remedy.flags, own)
                assert remedy.saved is None or remedy.saved > 0
                advised.add(
                    remedy.flags.split()[-1] if remedy.flags.startswith("without") else remedy.flags.split()[0]
                )
    expected = STAGES[Stage.LPL_STEP] | {"--quantize_base"}
    assert advised == expected - ({"--train_text_encoder"} if "dit" in str(pipeline) else set())


def test_a_decoder_of_unknown_parts_is_not_computed_in_parts(status, monkeypatch):
    run = status()
    assert "--lpl_gradient_checkpointing" in names(run.remedies())
    run.trained.family.pipeline.vae.decoder = nn.Identity()
    assert "--lpl_gradient_checkpointing" not in names(run.remedies())


# The peak of memory


def test_peak_memory_is_the_highest_since_the_reset():
    device = torch.device("cpu")
    if not limits.reset_peak_memory(device):
        pytest.skip("the peak of this process cannot be reset here")
    before = limits.peak_memory(device)
    much = torch.ones(64 * MIB)  # of 4 bytes
    del much
    with_much = limits.peak_memory(device)
    assert with_much - before == pytest.approx(256 * MIB, rel=0.1)
    limits.reset_peak_memory(device)
    assert limits.peak_memory(device) - before < 64 * MIB


# Out of memory -------------------------------------------------------------------------------------------------------


def too_much():
    torch.empty(2**46)


def far_too_much():
    bytearray(2**60)


@pytest.mark.parametrize("ask, wanted", [(too_much, "256.0 TiB more were asked for"), (far_too_much, "")])
def test_what_the_machine_really_has_not(ask, wanted):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        ask()
    assert limits.is_out_of_memory(error.value) and wanted in limits.wanted_memory(error.value)


@pytest.mark.parametrize(
    "error, is_one",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert limits.is_out_of_memory(error) is is_one
    assert limits.wanted_memory(error) == ("; 2.50 GiB more were asked for" if "2.50" in str(error) else "")


def test_what_a_gpu_had(monkeypatch):
    device = torch.device("cuda")
    values = {"memory_reserved": 70 * 2**30, "max_memory_allocated": 66 * 2**30, "get_device_name": "H100"}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    words = "H100 has 80.0 GiB, this run's process had 66.0 GiB at most, 9.0 GiB are taken by other programs"
    assert limits.memory_in_words(device) == words
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 80 * 2**30))
    assert "other programs" not in limits.memory_in_words(device)


def in_child(function):
    """What a forked process ends with: its error's words, or nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        words = ""
        try:
            function()
        except SystemExit as error:
            words = str(error.code)
        except BaseException:
            words = traceback.format_exc()
        os.write(writing, words.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        words = stream.read().decode()
    os.waitpid(child, 0)
    return words


def at_call(monkeypatch, owner, name, when, error):
    """Let that call of a method, counted from 1, raise an error."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")
RUN = {"max_train_steps": 4, "checkpointing_steps": 2, "lpl_measuring_steps": 2, "use_ema": True, "ema_decay": 0.5}


def ended(*arguments, **flags):
    """The error that the run ends with."""
    with pytest.raises(SystemExit) as left:
        train(*arguments, **flags)
    return left.value.code


def test_a_step_without_memory(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """It is said once, with what would help; the checkpoint before is whole, and the run goes on as if uninterrupted,
    with flags that need less memory."""
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **RUN)
    with monkeypatch.context() as patch:
        at_call(patch, UNet2DConditionModel, "forward", 3, OUT)
        said = ended(sd_pipeline, image_folder, tmp_path / "run", **RUN)
    first, *rows, last = said.splitlines()
    assert re.fullmatch(
        r"train_text_to_image_lpl.py: error: out of memory in step 3, which has LPL: this machine has [\d.]+ GiB, "
        r"this run's process had [\d.]+ [MG]iB at most; 20.00 MiB more were asked for; what saves memory:",
        first,
    )
    assert {row.split()[0] for row in rows} >= {"--gradient_checkpointing", "--train_batch_size", "--lpl_chunk_size"}
    assert all(("in a new run only" in row) is (row.split()[0][2:] in NEVER_CHANGED) for row in rows)
    assert any("in a new run only" in row for row in rows)
    assert last == (
        "checkpoint-2 is whole: with such flags the same command with --resume_from_checkpoint latest goes on from "
        "there"
    )
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    cheaper = {"gradient_checkpointing": True, "lpl_chunk_size": 1, "resume_from_checkpoint": "latest"}
    train(sd_pipeline, image_folder, tmp_path / "run", **RUN | cheaper)
    one, other = weights(whole / "unet"), weights(tmp_path / "run/unet")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.slow  # where it runs out depends on what the tests before have left in this process
def test_memory_that_really_runs_out(sd_pipeline, image_folder, tmp_path):
    """In the middle of a step, wherever the system says so."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").is_file():
        pytest.skip("what this process has mapped is not known here")

    def limited():
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 300 * MIB, mapped + 300 * MIB))
        train(sd_pipeline, image_folder, tmp_path / "run", resolution=64, train_batch_size=400, lpl_weight=0)

    said = in_child(limited)
    assert re.match(r"train_text_to_image_lpl.py: error: out of memory in step [12]: this machine has ", said), said
    assert "more were asked for; what saves memory:" in said and "  --train_batch_size 200 " in said


def test_the_first_steps_without_memory(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, UNet2DConditionModel, "forward", 1, OUT)
    said = ended(sd_pipeline, image_folder, tmp_path, lpl_weight=0, train_batch_size=1, gradient_checkpointing=True)
    assert "out of memory in step 1: " in said and "--lpl" not in said and "--train_batch_size" not in said
    assert "  --lora  " in said and "in a new run only" not in said
    assert said.endswith("\nthere is no checkpoint of this run to go on from")


def test_no_memory_for_samples(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, AutoencoderKL, "_decode", 2, OUT)
    flags = {"validation_prompts": ["a cat"], "validation_steps": 2, "checkpointing_steps": 2, "lpl_weight": 0}
    said = ended(sd_pipeline, image_folder, tmp_path, **flags)
    assert "out of memory while samples were drawn after step 2: " in said
    assert "--use_8bit_adam" in said and "--train_batch_size" not in said and "--gradient_checkpointing" not in said
    assert "checkpoint-2 is whole" in said


def test_no_memory_for_the_models(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, UNet2DConditionModel, "to", 1, OUT)
    said = ended(sd_pipeline, image_folder, tmp_path)
    assert "out of memory while the models were loaded: " in said
    assert "--mixed_precision bf16  about " in said and "--train_batch_size" not in said and "8bit" not in said


def test_no_memory_of_the_machine(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, TrainingImages, "__getitem__", 4, MemoryError())  # the first one is a trial
    said = ended(sd_pipeline, image_folder, tmp_path)
    assert "out of memory in step 2, which has LPL: this machine has " in said


def test_the_machines_memory_beside_a_gpu(status):
    """What is on the GPU is no advice there."""
    flags = {"use_ema": True, "offload_ema": True, "dataloader_num_workers": 3}
    said = status(machine=ON_A_GPU, **flags).why(MemoryError())
    rows = [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ")]
    assert rows == ["--dataloader_num_workers 1", "without --offload_ema"] and "this machine has" in said


def test_nothing_is_left_to_save(status):
    flags = {"train_batch_size": 1, "rank": 1, "gradient_checkpointing": True, "mixed_precision": "bf16"}
    said = status(Stage.STEP, lpl_weight=0, use_8bit_adam=True, **flags).why(OUT)
    assert "what saves memory" not in said and said.endswith("there is no checkpoint of this run to go on from")


def test_checkpoints_of_another_run_are_none_of_this_one(status, tmp_path):
    for step in (2, 9):
        checkpoints.checkpoint_path(tmp_path / "out", step).mkdir(parents=True)
        checkpoints.Progress(step, seed=0).save(checkpoints.checkpoint_path(tmp_path / "out", step))
    os.utime(checkpoints.checkpoint_path(tmp_path / "out", 9), (0, 0))
    assert "checkpoint-2 is whole: with such flags the same command with --resume_from_checkpoint checkpoint-2 " in (
        status().why(OUT)
    )
    os.utime(checkpoints.checkpoint_path(tmp_path / "out", 2), (0, 0))
    assert "there is no checkpoint of this run" in status().why(OUT)
    assert "--resume_from_checkpoint latest goes" in status(resume_from_checkpoint="latest").why(OUT)


def test_other_errors_are_as_they_were(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, UNet2DConditionModel, "forward", 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(sd_pipeline, image_folder, tmp_path)


# Processes -----------------------------------------------------------------------------------------------------------


def test_a_loaders_process_that_was_killed(sd_pipeline, image_folder, tmp_path, monkeypatch):
    main, sample = os.getpid(), TrainingImages.__getitem__

    def killed(self, key):
        if os.getpid() != main and key[0] == 1:  # in the second epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(self, key)

    monkeypatch.setattr(TrainingImages, "__getitem__", killed)
    flags = {"dataloader_num_workers": 1, "checkpointing_steps": 1, "max_train_steps": 50, "lpl_weight": 0}
    said = ended(sd_pipeline, image_folder, tmp_path, **flags)
    assert "a process that loads images was killed in step " in said
    assert "try --dataloader_num_workers 0\ncheckpoint-" in said


def test_a_loader_without_shared_memory(status):
    said = status(dataloader_num_workers=4).why(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that")
    )
    assert "shared memory" in said and "try --dataloader_num_workers 2" in said
    assert status().why(RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")) is None


def test_a_loader_that_hangs(status):
    said = status().why(LostShard("--streaming: shard 3 cannot be read"))
    assert said == "--streaming: shard 3 cannot be read\nthere is no checkpoint of this run to go on from"
    said = status().why(HungLoader("the reading of a.png does not end"))
    assert said == "the reading of a.png does not end\nthere is no checkpoint of this run to go on from"


def one_of_two(pipeline, images, folder):
    """A process of two; the second one has no memory in the third step."""
    if torch.distributed.get_rank() == 1:
        at_call(pytest.MonkeyPatch(), UNet2DConditionModel, "forward", 3, OUT)
    train(pipeline, images, folder, **RUN)


def test_one_process_of_two_without_memory(sd_pipeline, image_folder, tmp_path, capfd):
    """It leaves with exit code 1 and its error, and keeps nobody waiting."""
    gc.collect()
    with pytest.raises(Exception, match="exit code 1"):
        debug_launcher(one_of_two, args=(sd_pipeline, image_folder, tmp_path / "run"), num_processes=2)
    said = capfd.readouterr().err
    assert "error: out of memory in step 3, which has LPL: " in said and "checkpoint-2 is whole" in said
    assert "goes on from there\nthis was process 1 of 0 to 1\n" in said and "Traceback" not in said
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_the_others_say_that_it_was_not_them(status):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20129")
    assert "another process of the run has ended in step 3" in status(machine={"num_processes": 2}).why(error)
    assert status().why(error) is None


# Disk ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, done, every, limit, there, written, kept, bytes",
    [
        (10, 0, 3, None, 0, 3, 3, 3 * 10 + 5),
        (9, 0, 3, None, 0, 3, 3, 3 * 10 + 5),
        (9, 0, 3, None, 4, 3, 3, 3 * 10 + 5),
        (10, 0, 3, 1, 0, 3, 1, 2 * 10),  # the old one goes when the new one is whole
        (10, 0, 3, 2, 0, 3, 2, 3 * 10),
        (10, 0, 3, 5, 0, 3, 3, 3 * 10 + 5),
        (10, 6, 3, None, 2, 1, 1, 1 * 10 + 5),
        (10, 6, 3, 2, 2, 1, 1, 1 * 10),  # one comes, one goes
        (10, 6, 3, 1, 2, 1, 1, 1 * 10),
        (2, 0, 3, 1, 0, 0, 0, 5),
        (5, 6, 3, None, 2, 0, 0, 5),
    ],
)
def test_what_a_run_needs_on_the_disk(steps, done, every, limit, there, written, kept, bytes, monkeypatch):
    """Checkpoints of 10, and a result of 3 that takes 5 to write."""
    monkeypatch.setattr(limits, "checkpoint_bytes", lambda trained, args: 10)
    monkeypatch.setattr(limits, "result_bytes", lambda trained: 3)
    monkeypatch.setattr(limits, "_saved_bytes", lambda trained: 2)
    args = SimpleNamespace(checkpointing_steps=every, checkpoints_total_limit=limit, push_to_hub=False)
    needs = DiskNeeds.of(SimpleNamespace(lora=False), args, steps, done, there)
    assert (needs.written, needs.kept, needs.bytes) == (written, kept, bytes)
    args.push_to_hub, args.hub_strategy = True, "every_save"
    assert DiskNeeds.of(SimpleNamespace(lora=False), args, steps, done, there).bytes == bytes + 3


def test_what_does_not_fit_is_refused_or_warned_of():
    needs = DiskNeeds(result=30 * MIB, writing=50 * MIB, checkpoint=100 * MIB, written=4, limit=None)
    assert needs.refusal(49 * MIB).startswith("the result needs about 50.0 MiB while it is written, and 49.0 MiB are")
    assert needs.refusal(99 * MIB).startswith("a checkpoint needs about 100.0 MiB")
    assert needs.refusal(100 * MIB) is None
    said = needs.warning(449 * MIB)
    assert said.startswith("the result and 4 checkpoints of 100.0 MiB need about 450.0 MiB, and 449.0 MiB are free; ")
    assert needs.warning(450 * MIB) is None
    fits = int(re.search(r"--checkpoints_total_limit to (\d+) at most", said)[1])
    assert fits == 3 and needs.bytes_with(fits) <= 449 * MIB < needs.bytes_with(fits + 1)
    assert "--checkpoints_total_limit" not in needs.warning(150 * MIB)  # two are there for a moment with any
    assert DiskNeeds(30, 50, 100, written=0, limit=None).refusal(60) is None  # there will be none


def test_free_space_is_that_of_the_place(tmp_path):
    there = shutil.disk_usage(tmp_path).free
    assert limits.free_space(tmp_path / "a" / "b") == pytest.approx(there, rel=0.01)
    assert not (tmp_path / "a").exists()


def test_checkpoints_that_are_there_count(status, tmp_path, monkeypatch):
    run = status(checkpointing_steps=1, max_train_steps=10, checkpoints_total_limit=2)
    free = DiskNeeds.of(run.trained, run.args, 10, 0, there=2).bytes
    monkeypatch.setattr(limits, "free_space", lambda folder: free)
    assert limits.check_disk(run.trained, run.args, 10, 0) is not None
    for step in (1, 2):
        checkpoints.checkpoint_path(tmp_path / "out", step).mkdir(parents=True)
        checkpoints.Progress(step, seed=0).save(checkpoints.checkpoint_path(tmp_path / "out", step))
    assert limits.check_disk(run.trained, run.args, 10, 0) is None


def test_a_run_without_room_does_not_begin(sd_pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "free_space", lambda folder: 1000)
    at_call(monkeypatch, UNet2DConditionModel, "forward", 1, AssertionError("a step"))
    said = ended(sd_pipeline, image_folder, tmp_path / "run")
    assert said.startswith(
        f"train_text_to_image_lpl.py: error: --output_dir {tmp_path / 'run'}: the result needs about"
    )
    assert "1000 bytes are free" in said and "\n" not in said
    assert issubclass(NoRoom, ValueError)


def test_a_file_that_may_not_be_so_large(sd_pipeline, image_folder, tmp_path):
    """A real write that fails in the middle of a checkpoint."""
    resource = pytest.importorskip("resource")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # the weights fit, the optimizer's state not
        train(sd_pipeline, image_folder, tmp_path / "run", checkpointing_steps=2, lpl_weight=0)

    said = in_child(limited)
    assert said.startswith(f"train_text_to_image_lpl.py: error: {tmp_path / 'run/checkpoint-2'} cannot be written: ")
    assert "File too large" in said and "a checkpoint needs " in said
    assert not list((tmp_path / "run").glob("*checkpoint*")) and not list((tmp_path / "run").glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a real disk of that size; called again, it has another."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(count):
        again = ",remount" if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"size={count}{again}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


CHECKPOINT, RESULT = 830_000, 850_000  # bytes of the tiny model without EMA: a checkpoint, the result being written


def test_a_full_disk_ends_the_run_with_what_was_whole(sd_pipeline, image_folder, tmp_path, small_disk, caplog):
    flags = {"max_train_steps": 6, "checkpointing_steps": 2, "lpl_weight": 0}
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **flags)
    disk = small_disk(int(2.5 * CHECKPOINT))
    said = ended(sd_pipeline, image_folder, disk / "run", **flags)
    assert "the result and 3 checkpoints of " in caplog.text  # it was warned of
    assert said.startswith(f"train_text_to_image_lpl.py: error: {disk / 'run/checkpoint-6'} cannot be written: ")
    assert "No space left on device" in said and "\ncheckpoint-4 is whole: then the same command" in said
    assert sorted(path.name for path in (disk / "run").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert not list((disk / "run").glob(".*"))
    small_disk(int(4 * CHECKPOINT + RESULT))
    train(sd_pipeline, image_folder, disk / "run", **flags, resume_from_checkpoint="latest")
    assert same(weights(disk / "run/unet"), weights(whole / "unet")) and metrics(disk / "run") == metrics(whole)


def test_a_checkpoint_that_would_go_anyway_makes_room(sd_pipeline, image_folder, small_disk, caplog):
    """Two checkpoints and the result fit on the disk, but not three checkpoints."""
    flags = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "lpl_weight": 0, "use_ema": True}
    flags |= OPTIMIZERS["prodigy"] | {"max_train_steps": 8}  # its state is four times the weights
    disk = small_disk(4_750_000)  # each takes 1.7 MB, and writing the result 0.9 MB
    train(sd_pipeline, image_folder, disk / "run", **flags)
    assert [path.name for path in find_checkpoints(disk / "run")] == ["checkpoint-6", "checkpoint-8"]
    assert (disk / "run/model_index.json").is_file() and not list((disk / "run").glob(".*"))
    assert "the disk is full: checkpoint-2 makes room for checkpoint-6" in caplog.text


def test_a_full_disk_beside_the_checkpoints(status, tmp_path):
    (tmp_path / "out/.result.unfinished").mkdir(parents=True)
    said = status(Stage.SAVING).why(OSError(28, "No space left on device"))
    assert said.startswith("a file cannot be written while the result was saved: No space left on device; ")
    assert not (tmp_path / "out/.result.unfinished").exists() and ", or set --checkpoints_total_limit\n" in said
    assert "; make room\n" in status(checkpoints_total_limit=1).why(OSError(28, "No space left on device"))
    assert status().why(OSError(2, "No such file or directory")) is None


def test_the_words_are_an_error_of_the_script():
    with pytest.raises(SystemExit) as left, explained(script.SCRIPT, Config()):
        raise NoRoom("--output_dir x: no room")
    assert left.value.code == "train_text_to_image_lpl.py: error: --output_dir x: no room"
