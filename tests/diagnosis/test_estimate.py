"""The estimate for a GPU that is not there: what real tensors take, by the flags, without weights."""

import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel
from tiny_families import FAMILY_OF, TINY, data_fixture
from torch.utils.checkpoint import checkpoint
from trainer import ROOT, parsed, script

from lpl import loss
from lpl.config.checks import gpus
from lpl.config.choices import FP8, QUANTIZED
from lpl.diagnosis import counting
from lpl.diagnosis.counting import GPU, HOST, Counting, as_on_gpu
from lpl.diagnosis.estimate import CONTEXT, PACKED, Estimate, Method, estimate
from lpl.diagnosis.for_gpu import _flags, attempts
from lpl.diagnosis.needs import bytes_of, optimizer_bytes
from lpl.diagnosis.status import Stage
from lpl.diagnosis.without_weights import OneGpu
from lpl.loss import LatentPerceptualLoss
from lpl.student import Student
from lpl.training.sharding import Sharding
from tests.diagnosis.conftest import trained_parts


MIB = 2**20
METHOD = Method(script.Losses, script.optimizer_step)


@pytest.fixture
def counted(sd_pipeline, image_folder, tmp_path):
    """`counted(**flags)`: the estimate of that command on a tiny Stable Diffusion, or on another `pipeline`."""

    def count(
        pipeline=sd_pipeline, precision="no", processes=1, counting=None, sharding=None, images=image_folder, **flags
    ):
        config, description = parsed(pipeline, images, tmp_path / "out", **flags)
        return estimate(config, description, METHOD, precision, processes, counting=counting, sharding=sharding)

    return count


# Real tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"gradient_checkpointing": True, "use_ema": True, "gradient_accumulation_steps": 2},
        {"rank": 4, "lpl_gradient_checkpointing": True},
    ],
    ids=["whole", "checkpointed", "lora"],
)
def test_it_is_what_real_tensors_take(flags, counted, monkeypatch):
    """Masks are left out: a CPU forms them with NumPy."""
    monkeypatch.setattr(OneGpu, "device", HOST)
    flags = flags | {"resolution": 64, "train_batch_size": 2, "lpl_no_outlier_mask": True}
    real, fake = (counted(counting=Counting(fake=fake), **flags) for fake in (False, True))
    assert real.operations == fake.operations and real.parameters == fake.parameters
    assert real.peak > 5 * MIB
    for stage, memory in real.memory.items():
        assert fake.memory[stage] == pytest.approx(memory, rel=0.01, abs=MIB / 10), stage


def test_memory_is_that_of_live_storages():
    with Counting() as counting:
        first = torch.empty(1024, dtype=torch.float32)
        view = first.view(32, 32)
        assert counting.current == 4096
        second = first * 2
        assert counting.current == counting.peak == 8192
        del first
        assert counting.current == 8192  # the view holds it
        del view, second
        assert counting.current == 0 and counting.peak == 8192
        counting.reset()
        small = torch.empty(1)
        assert counting.peak == 512  # what an allocator rounds up to
        counting.leave_out([small])
        assert counting.current == 0
        counting.offload([view := torch.empty(512, dtype=torch.uint8)[:1]])
        assert counting.current == 0 and counting.host == 512 and counting.rests(view) and not counting.rests(small)
        del view
        assert counting.host == 0
    assert counting.operations == 0


def test_operations_are_two_for_each_product():
    with Counting() as counting:
        layer = torch.nn.Linear(8, 16)
        layer(torch.empty(4, 8)).sum().backward()
    assert counting.operations == 2 * 2 * 4 * 8 * 16  # forward, and backward to the weight; the input needs none


# As on a GPU ---------------------------------------------------------------------------------------------------------


def test_autocast_chooses_as_on_a_gpu():
    with Counting(), as_on_gpu(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16)
        assert x.device == GPU
        assert F.group_norm(x, 2).dtype == F.layer_norm(x, (4,)).dtype == x.softmax(-1).dtype == torch.float32
        assert F.interpolate(x, scale_factor=2.0).dtype == torch.bfloat16  # in float32 on a CPU
        assert F.conv2d(x.float(), torch.empty(8, 8, 3, 3)).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert F.group_norm(x, 2).dtype == torch.bfloat16


def test_what_a_backward_pass_recomputes_is_on_the_gpu_too():
    seen = []

    def block(x):
        seen.append((x.device, F.layer_norm(x, (4,)).dtype))
        return F.layer_norm(x, (4,)) * 2

    with Counting(), as_on_gpu(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.empty(4, 4, dtype=torch.bfloat16, requires_grad=True)
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == [(GPU, torch.float32)] * 2


def test_everything_is_as_before_afterwards():
    with Counting(), as_on_gpu():
        x = torch.empty(2)
        assert torch.device("cuda") == GPU and torch.get_device_module("cuda") is torch.cuda
    assert torch.get_device_module("cuda") is torch.cuda
    assert x.device == HOST and torch.empty(2).device == HOST
    assert torch.autocast.__name__ == "autocast" and torch.ones(2).sum() == 2


# Families and flags --------------------------------------------------------------------------------------------------


def test_another_decoder_whatever_was_loaded_before(counted, tmp_path, monkeypatch):
    """A model that AutoModel loads from a pipeline changes where it looks for configurations."""
    widths, blocks = (8,) * 3, (1,) * 3
    AutoencoderTiny(3, 3, widths, widths, num_encoder_blocks=blocks, num_decoder_blocks=blocks).save_config(tmp_path)
    monkeypatch.setattr(AutoModel, "config_name", "model_index.json")
    own, tiny = counted(), counted(lpl_vae_name_or_path=str(tmp_path))
    assert tiny.operations[Stage.LPL_STEP] != own.operations[Stage.LPL_STEP]


@pytest.mark.slow
def test_a_student_is_counted(counted, sd_pipeline, tmp_path):
    """It takes the place of LPL, whose memory is needed only while w is measured, and for corrections."""
    loss = LatentPerceptualLoss(AutoencoderKL.from_pretrained(sd_pipeline, subfolder="vae", use_safetensors=True))
    Student(latent_channels=4, width=8, depth=1, loss=loss.options).save_config(tmp_path)
    usual = {"precision": "bf16", "resolution": 64, "train_batch_size": 4}
    flags = usual | {"lpl_student": str(tmp_path)}
    own, measured = counted(**usual), counted(**flags)
    alone, corrected = counted(lpl_weight="1", **flags), counted(lpl_weight="1", lpl_correct_every=8, **flags)
    for found in (measured, alone, corrected):
        assert own.operations[Stage.STEP] < found.student_operations
        assert found.operations == own.operations  # the steps that measure, and the corrections, have both
    assert own.student_operations == 0
    assert alone.memory[Stage.LPL_STEP] < measured.memory[Stage.LPL_STEP] == corrected.memory[Stage.LPL_STEP]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("flags", [{}, {"rank": 4}], ids=["whole", "lora"])
def test_every_family_is_estimated(name, flags, counted, request):
    pipeline, images = map(request.getfixturevalue, (TINY[name][0], data_fixture(FAMILY_OF[name])))
    found = counted(pipeline, "bf16", images=images, gradient_checkpointing=True, **flags)
    assert found.memory[Stage.LOADING] < found.memory[Stage.STEP] <= found.memory[Stage.LPL_STEP] == found.peak
    assert 0 < found.operations[Stage.STEP] < found.operations[Stage.LPL_STEP]
    assert found.memory[Stage.SAMPLES] > found.memory[Stage.SAVING] > found.memory[Stage.LOADING]


@pytest.mark.parametrize("name", [name for name in TINY if not FAMILY_OF[name].class_conditional])
def test_cached_encoders_are_not_there(name, counted, request):
    of = {"pipeline": request.getfixturevalue(TINY[name][0]), "precision": "bf16", "center_crop": True}
    plain, cached = counted(**of), counted(**of, cache_latents=True, cache_text_embeddings=True)
    assert cached.text_encoder_operations == 0 < plain.text_encoder_operations
    encoders = plain.parameters.keys() - cached.parameters.keys()
    assert encoders == {part for part in plain.parameters if part.startswith("text_encoder")}
    assert cached.parameters["vae"][1] < plain.parameters["vae"][1]
    for stage in (Stage.LOADING, Stage.STEP):
        assert cached.memory[stage] < plain.memory[stage]
    assert cached.operations[Stage.STEP] < plain.operations[Stage.STEP]
    assert cached.memory[Stage.SAMPLES] > cached.memory[Stage.LOADING]


def test_weights_gradients_and_state_are_those_of_the_flags(counted, sd_pipeline, image_folder, tmp_path):
    config, description = parsed(sd_pipeline, image_folder, tmp_path / "out", use_8bit_adam=True)
    weights = trained_parts(config, description).weights()
    trained, packed = bytes_of(weights), optimizer_bytes(weights, config.optimization)
    rounding = 512 * 3 * len(weights)
    plain, small, average, offloaded, several = (
        counted(**flags)
        for flags in (
            *({}, {"use_8bit_adam": True}, {"use_ema": True}, {"use_ema": True, "offload_ema": True}),
            {"processes": 2},
        )
    )
    state = plain.memory[Stage.SAVING] - plain.memory[Stage.LOADING]
    assert state == pytest.approx(2 * trained, abs=rounding)
    assert small.memory[Stage.SAVING] - small.memory[Stage.LOADING] == pytest.approx(packed, abs=rounding)
    assert average.memory[Stage.LOADING] - plain.memory[Stage.LOADING] == pytest.approx(trained, abs=rounding)
    assert offloaded.memory[Stage.SAVING] == pytest.approx(plain.memory[Stage.SAVING], abs=1024)
    assert offloaded.host == pytest.approx(trained, abs=rounding) and average.host == 0
    assert several.memory[Stage.SAVING] - plain.memory[Stage.SAVING] == pytest.approx(trained, abs=rounding)


def test_frozen_weights_that_rest_are_elsewhere(counted):
    """On the device is what of them runs at a time: of the text encoder a layer, of the denoiser about a block."""
    flags = {"precision": "bf16", "rank": 2, "gradient_checkpointing": True}
    plain, frozen, base = (counted(**flags | more) for more in ({}, {"offload_frozen": True}, {"group_offload": True}))
    of = {name: 2 * (count - trained) for name, (trained, count) in plain.parameters.items()}
    saved = {
        kind: plain.memory[Stage.LOADING] - found.memory[Stage.LOADING] for kind, found in ((1, frozen), (2, base))
    }
    assert saved[1] > of["text_encoder"] + of["vae"] and frozen.host > of["text_encoder"] + of["vae"]
    assert 0.6 * of["unet"] < saved[2] < of["unet"] and base.host > 0.6 * of["unet"]
    for found, by in ((frozen, saved[1]), (base, saved[2])):
        assert plain.memory[Stage.STEP] - found.memory[Stage.STEP] > 0.6 * by
        assert found.operations == plain.operations and found.parameters == plain.parameters


def test_every_quantised_base_is_counted(counted):
    assert PACKED.keys() == QUANTIZED.keys() - {FP8}
    flags = {"precision": "bf16", "rank": 2, "gradient_checkpointing": True, "resolution": 64}
    host, packed = (counted(**flags, group_offload=True, quantize_base=base).host for base in (None, "fp8"))
    assert (
        0.5 * host < packed < 0.9 * host
    )  # norms and embeddings stay as they are, and blocks of memory are rounded up


def test_accumulated_gradients_are_there_in_the_next_micro_batch(counted):
    one, two = (counted(resolution=64, gradient_accumulation_steps=steps) for steps in (1, 2))
    assert two.memory[Stage.STEP] > one.memory[Stage.STEP]
    assert two.operations[Stage.STEP] == 2 * one.operations[Stage.STEP]


@pytest.mark.slow
def test_flags_that_save_memory_do(counted):
    flags = {"resolution": 64, "train_batch_size": 4}
    plain = counted(precision="bf16", **flags)
    for saving in ({"gradient_checkpointing": True}, {"lpl_gradient_checkpointing": True}, {"lpl_chunk_size": 1}):
        assert counted(precision="bf16", **flags | saving).peak < plain.peak, saving
    without = counted(precision="bf16", lpl_weight="0", lpl_threshold_base_resolution=None, **flags)
    decoder = plain.memory[Stage.STEP] - without.peak  # LPL's copy in bfloat16, there in each step
    assert 0 < decoder < 2 * plain.parameters["vae"][1]


def test_flags_are_added_until_it_fits(sd_pipeline, image_folder, tmp_path):
    config, description = parsed(sd_pipeline, image_folder, tmp_path / "out", resolution=64, train_batch_size=4)
    found = estimate(config, description, METHOD, "no")
    capacity = CONTEXT + (found.peak + found.memory[Stage.SAVING]) // 2
    tried = attempts(config, description, METHOD, "no", capacity, found)
    assert tried[-1].found.fits(capacity) and not any(each.found.fits(capacity) for each in tried[:-1])
    assert not attempts(config, description, METHOD, "no", found.peak + CONTEXT, found)


# FSDP2 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact(counted, monkeypatch):
    """`counted` without an allocator's blocks, which hide a tiny model's weights."""
    monkeypatch.setattr(counting, "BLOCK", 1)
    return partial(counted, use_ema=True, train_batch_size=1, gradient_checkpointing=True)


def test_a_process_has_its_part_of_what_is_trained_and_a_block_of_the_rest(exact):
    """Weights, EMA, both moments and gradients; what is gathered besides is less than all weights."""
    whole, shards, kept = (
        exact(processes=processes, sharding=sharding)
        for processes, sharding in ((1, None), (4, Sharding()), (4, Sharding(reshard_after_forward=False)))
    )
    trained, largest = 4 * whole.parameters["unet"][0], 16 * 32 * 9 * 4
    assert shards.parameters == whole.parameters and shards.operations == whole.operations
    saved = {stage: whole.memory[stage] - shards.memory[stage] for stage in whole.memory}
    assert saved[Stage.LOADING] == 2 * trained * 3 / 4
    assert saved[Stage.SAVING] == 4 * trained * 3 / 4 - largest  # a weight is made whole before it is written
    own = whole.memory[Stage.LOADING] - 2 * trained + 5 * trained / 4
    assert own < shards.memory[Stage.STEP] < own + trained < kept.memory[Stage.STEP]
    assert saved[Stage.LPL_STEP] > 0.9 * saved[Stage.LOADING]


def test_shards_are_what_real_shards_take(exact, monkeypatch):
    """Under FSDP2, whose other process is not there in both."""
    monkeypatch.setattr(OneGpu, "device", HOST)
    quickstart = ROOT / "examples" / "quickstart" / "pipeline"
    flags = {
        "pipeline": quickstart,
        "max_sequence_length": 4,
        "lpl_no_outlier_mask": True,
        "gradient_accumulation_steps": 2,
        "processes": 2,
    }
    real, fake = (exact(counting=Counting(fake=fake), sharding=Sharding(), **flags) for fake in (False, True))
    assert real.operations == fake.operations
    for stage, memory in real.memory.items():
        assert fake.memory[stage] == pytest.approx(memory, rel=0.002), stage


def test_offloaded_shards_are_in_the_cpus_memory(exact):
    here, there = (exact(processes=4, sharding=Sharding(offload=offload)) for offload in (False, True))
    trained = 4 * here.parameters["unet"][0]
    assert here.host == 0 and there.host == pytest.approx(5 * trained / 4, rel=0.01)  # and the moments' counts
    assert here.memory[Stage.SAVING] - there.memory[Stage.SAVING] == pytest.approx(4 * trained / 4, rel=0.01)
    for stage in (Stage.STEP, Stage.LPL_STEP, Stage.SAMPLES):
        assert 0.9 * trained < here.memory[stage] - there.memory[stage] < there.host, stage
    assert here.operations == there.operations


def test_of_lora_the_frozen_base_is_divided(exact):
    whole, here, there = (
        exact(rank=2, offload_frozen=True, processes=2, sharding=sharding)
        for sharding in (None, Sharding(), Sharding(offload=True))
    )
    trained, count = here.parameters["unet"]
    base, buckets = 4 * (count - trained), 4 * trained
    assert whole.memory[Stage.LOADING] - here.memory[Stage.LOADING] == base / 2 + buckets
    assert here.memory[Stage.LOADING] - there.memory[Stage.LOADING] == base / 2 == there.host - here.host
    assert whole.host == here.host > 0  # text encoders and VAE


def test_lpl_sees_as_many_samples_at_a_time_as_without_shards(counted, monkeypatch):
    monkeypatch.setattr(loss, "MEMORY", 32 * MIB)  # some samples of the batch
    flags = {"resolution": 64, "train_batch_size": 8, "gradient_checkpointing": True}
    plain, shards = (counted(**flags, processes=2, sharding=sharding).memory for sharding in (None, Sharding()))
    more = [memory[Stage.LPL_STEP] - memory[Stage.STEP] for memory in (plain, shards)]
    assert more[1] == pytest.approx(more[0], rel=0.1)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def configurations(sd_pipeline, tmp_path):
    """A pipeline without weights and vocabularies."""
    folder = tmp_path / "configurations"
    for name in ("model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sd_pipeline / name, folder / name)
    shutil.copytree(sd_pipeline / "scheduler", folder / "scheduler")
    return folder


def test_the_command_needs_configurations_only(configurations, tmp_path, capsys, monkeypatch):
    from lpl.config import command_line

    words = ["--dry_run", "--for_gpu", "8GB", "--pretrained_model_name_or_path", str(configurations)]
    words += ["--output_dir", str(tmp_path / "out"), "--resolution", "64", "--validation_prompts", "a cat"]
    monkeypatch.setattr(script, "CONFIG", command_line.parse(words))
    script.main()
    text = capsys.readouterr().out
    rows = dict(re.findall(r"^  (\S.*?)  +(.*)$", text, re.MULTILINE))
    assert {"models loaded", "step", "step with LPL", "samples", "saving", "LPL costs"} <= rows.keys()
    assert rows["on 8GB"].startswith("fits: ") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_would(configurations, tmp_path, capsys, monkeypatch):
    from lpl.config import command_line

    words = ["--dry_run", "--for_gpu", "1GB", "--pretrained_model_name_or_path", str(configurations)]
    words += ["--output_dir", str(tmp_path / "out"), "--resolution", "64"]
    monkeypatch.setattr(script, "CONFIG", command_line.parse(words))
    script.main()
    text = capsys.readouterr().out
    assert "does not fit" in text and "--gradient_checkpointing" in text and "or a larger GPU" in text


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def reported(configurations, tmp_path, capsys, monkeypatch, recwarn):
    """`reported(gpus, environment, *flags)`: the rows of the report, and the warnings."""
    from lpl.config import command_line

    def report(for_gpu, environment, *flags):
        words = ["--dry_run", "--for_gpu", for_gpu, "--pretrained_model_name_or_path", str(configurations)]
        words += ["--output_dir", str(tmp_path / "out"), "--resolution", "64", *flags]
        monkeypatch.setattr(script, "CONFIG", command_line.parse(words))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        recwarn.clear()
        script.main()
        warnings = " ".join(str(warning.message) for warning in recwarn)
        return dict(re.findall(r"^  (\S.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE)), warnings

    return report


def test_a_gpu_that_emulates_bfloat16_is_warned_of(reported):
    said = "only emulates bfloat16; give --mixed_precision fp16"
    assert f"--for_gpu 2xT4: it {said}" in reported("2xT4", {}, "--mixed_precision", "bf16")[1]
    assert said not in reported("2xT4", {}, "--mixed_precision", "fp16")[1]
    assert said not in reported("24GB", {}, "--mixed_precision", "bf16")[1]


def test_the_command_counts_fsdp2(reported):
    """As accelerate's configuration says; the number of processes comes from the flag or from the launcher."""
    one, warning = reported("8GB", FSDP2)
    assert one["a step"].endswith(", 1 GPU") and "shards nothing on one GPU" in warning
    two, warning = reported("2x8GB", FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"})
    assert two["a step"].endswith(", 2 GPUs, FSDP2 with shards in CPU memory") and "FSDP2" not in warning
    assert two["of the CPU"].endswith(" for each GPU, what is offloaded")
    assert two["on 2x8GB"].startswith("fits on each GPU: ")
    launched, _ = reported("8GB", FSDP2 | {"WORLD_SIZE": "2"})
    assert launched.pop("on 8GB") == two.pop("on 2x8GB") and launched == two
    assert float(two["models loaded"].split()[0]) < float(one["models loaded"].split()[0])


@pytest.mark.parametrize(
    "text, environment, flags, said",
    [
        ("4x8GB", {"WORLD_SIZE": "2"}, [], "launch one"),
        ("2x8GB", {"FSDP_VERSION": "1"}, [], "fsdp_version: 2"),
        ("2x8GB", {}, ["--channels_last"], "--channels_last is not supported with FSDP2"),
        ("2x8GB", {}, ["--mixed_precision", "fp16"], "give bf16 or no"),
        ("2x8GB", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "parallelism_config"),
    ],
)
def test_what_cannot_be_sharded_is_refused(text, environment, flags, said, reported):
    with pytest.raises(SystemExit, match=said):
        reported(text, FSDP2 | environment, *flags)


def test_remedies_go_with_shards(sd_pipeline, image_folder, tmp_path):
    flags = {"resolution": 64, "gradient_checkpointing": True}
    config, description = parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
    plain, shards = (_flags(config, description, "no", Stage.STEP, sharding) for sharding in (None, Sharding()))
    assert "--activation_offload" in plain and "--offload_frozen" in plain
    assert "--activation_offload" not in shards and "--offload_frozen" in shards


def test_an_estimate_fits_with_what_cuda_takes():
    found = Estimate({}, {Stage.STEP: 3 * 2**30}, {})
    assert found.fits(4 * 2**30) and not found.fits(4 * 2**30 - 1)


@pytest.mark.parametrize(
    "text, count, gibibytes",
    [
        *(("24GB", None, 24), ("24", None, 24), ("80 GiB", None, 80), ("NVIDIA A100", None, 80), ("h100", None, 79.6)),
        *(("8x80GB", 8, 80), ("16 x H100", 16, 79.6), ("2X24", 2, 24)),
    ],
)
def test_gpus_are_given_by_memory_or_name_and_number(text, count, gibibytes):
    assert gpus(text) == (count, pytest.approx(gibibytes * 2**30, abs=2**30 / 10))


@pytest.mark.parametrize("text", ["", "0GB", "many", "24TB", "-1GB", "8x", "0x80GB", "x80GB", "1.5x80GB"])
def test_other_gpus_are_refused(text):
    with pytest.raises(ValueError, match="--for_gpu .*: accepted are .* 24GB, and .*h100"):
        gpus(text)
