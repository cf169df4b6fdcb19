"""FSDP2 over two processes on a CPU: the numbers of one process, and files that any engine goes on with."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import debug_launcher
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_families import TINY, data_fixture
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trainer import train, weights

from lpl.config import Config
from lpl.diagnosis.shards import other_processes
from lpl.families import find_family
from lpl.tools import layout
from lpl.training import sharding
from lpl.training.average import averaged
from lpl.training.sharding import Sharding, blocks_of, check_sharding, in_step, like
from lpl.training.start import start_accelerator
from tests.evaluation.test_command import photos  # noqa: F401
from tests.evaluation.test_training import FLAGS as EVALUATED
from tests.evaluation.test_training import found
from tests.runs.test_published_runs import RUN as PUBLISHED
from tests.runs.test_published_runs import hub  # noqa: F401


FLAGS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "use_ema": True,
    "lpl_sigma_threshold": 20,
    "validation_prompts": ["a cat"],
    "validation_steps": 4,
    "validation_every_nth": 3,
    "train_batch_size": 1,
}
ONE = FLAGS | {"gradient_accumulation_steps": 2}  # the same batches in one process


def entries(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(record["step"], name): record[name] for record in records for name in ("loss", "lpl") if name in record}


def two(jobs):
    """A process of two, which runs jobs one after the other; flags in capitals are of accelerate's configuration."""
    for pipeline, images, folder, flags in jobs:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | flags).items():
                if name.isupper():
                    patch.setenv(name, value)
            train(pipeline, images, folder, **{name: value for name, value in flags.items() if not name.isupper()})


@pytest.fixture
def sharded_runs():
    def run(*jobs):
        gc.collect()
        debug_launcher(two, args=(jobs,), num_processes=2)

    return run


def close(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if "k_proj.bias" in str(key):  # attention does not depend on it: its gradient is nothing but rounding errors
            continue
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=str(key))


def test_a_training_of_all_weights(sharded_runs, sd_pipeline, image_folder, tmp_path):
    """Half of it sharded, half of it in one process, and the other way round, equal one of one process."""
    alone, first, then, turned = (tmp_path / name for name in ("alone", "first", "then", "turned"))
    train(sd_pipeline, image_folder, alone, **ONE)
    train(sd_pipeline, image_folder, turned, **ONE | {"max_train_steps": 2})
    resumed = {"resume_from_checkpoint": "latest"}
    sharded_runs((sd_pipeline, image_folder, first, FLAGS), (sd_pipeline, image_folder, turned, FLAGS | resumed))
    train(sd_pipeline, image_folder, then, **ONE | {"resume_from_checkpoint": str(first / "checkpoint-2")})
    for folder in (first, turned):
        assert entries(folder) == pytest.approx(entries(alone), rel=1e-5), folder.name
        assert (folder / "samples/step-000004.png").is_file()
    for folder in (first, then, turned):
        close(weights(alone / "unet"), weights(folder / "unet"))  # the EMA
        for part in ("unet", "ema/unet"):
            close(weights(alone / "checkpoint-4" / part), weights(folder / "checkpoint-4" / part))
    index = json.loads((first / "model_index.json").read_text())
    assert index == json.loads((alone / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_in_half_precision_and_with_weights_that_stay_gathered(sharded_runs, sd_pipeline, image_folder, tmp_path):
    """Held-out losses come from calls without a backward pass; what these gather is not what is trained next."""
    often, half = {"validation_steps": 1, "validation_prompts": None}, {"mixed_precision": "bf16"}
    kept = {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    jobs = {"whole": often, "kept": often | kept, "lora": often | half | {"lora": True}}
    sharded_runs(*((sd_pipeline, image_folder, tmp_path / name, FLAGS | flags) for name, flags in jobs.items()))
    assert entries(tmp_path / "kept") == pytest.approx(entries(tmp_path / "whole"), rel=1e-6)
    for name in jobs:
        records = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert sum("validation_loss" in json.loads(record) for record in records) == 5


@pytest.mark.slow
def test_lora_and_text_encoders(sharded_runs, sd_pipeline, image_folder, tmp_path):
    lora = {"lora": True, "learning_rate": 0.01}
    encoder = {"train_text_encoder": True, "use_ema": None, "gradient_checkpointing": True}
    jobs = [("lora", lora), ("encoder", encoder)]
    for name, flags in jobs:
        train(sd_pipeline, image_folder, tmp_path / name, **ONE | flags)
    sharded_runs(*((sd_pipeline, image_folder, tmp_path / f"{name}-2", FLAGS | flags) for name, flags in jobs))
    for name, _ in jobs:
        assert entries(tmp_path / f"{name}-2") == pytest.approx(entries(tmp_path / name), rel=1e-5)
    loras = [load_file(tmp_path / name / layout.LORA) for name in ("lora", "lora-2")]
    close(*loras)
    close(weights(tmp_path / "encoder/text_encoder"), weights(tmp_path / "encoder-2/text_encoder"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for fixtures in TINY.values() for name in fixtures])
def test_every_family(name, sharded_runs, request, tmp_path):
    pipeline = request.getfixturevalue(name)
    family = find_family(json.loads((pipeline / layout.INDEX).read_text())["_class_name"])
    images = request.getfixturevalue(data_fixture(family))
    plain = {"use_ema": None, "validation_prompts": None, "validation_steps": None, "validation_every_nth": None}
    flags = FLAGS | plain | {"max_train_steps": 2}
    train(pipeline, images, tmp_path / "alone", **flags | {"gradient_accumulation_steps": 2})
    sharded_runs((pipeline, images, tmp_path / "sharded", flags))
    assert entries(tmp_path / "sharded") == pytest.approx(entries(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_a_run_that_is_evaluated(sharded_runs, sd_pipeline, image_folder, photos, tmp_path):  # noqa: F811
    """An odd number of images, of which one process has more to draw."""
    flags = FLAGS | EVALUATED | {"eval_data_dir": photos, "max_train_steps": 2, "train_batch_size": 1}
    train(sd_pipeline, image_folder, tmp_path / "alone", **flags | {"gradient_accumulation_steps": 2})
    sharded_runs((sd_pipeline, image_folder, tmp_path / "sharded", flags))
    alone, sharded = (found(tmp_path / name)["results"][-1] for name in ("alone", "sharded"))
    for network, metrics in alone["metrics"].items():
        for metric, estimate in metrics.items():
            assert sharded["metrics"][network][metric]["value"] == pytest.approx(estimate["value"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora": True}])
def test_a_run_that_is_published(changes, hub, sharded_runs, sd_pipeline, image_folder, tmp_path):  # noqa: F811
    flags = PUBLISHED | {"hub_strategy": "every_save", "train_batch_size": 1} | changes
    sharded_runs((sd_pipeline, image_folder, tmp_path / "run", flags))
    (repository,) = hub.repos.values()
    first, *_, last = [commit.files for commit in repository.branches["main"].history()[::-1]][1:]
    weights_file = layout.LORA if changes else "unet/diffusion_pytorch_model.safetensors"
    assert weights_file in first and weights_file in last and first[weights_file] != last[weights_file]


def halves():
    """A process of two, which takes its half of a tensor."""
    rank = start_accelerator(Config()).process_index
    weight = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)), [Shard(0)])
    assert like(torch.arange(4.0), weight.detach()).to_local().tolist() == [2 * rank, 2 * rank + 1]


def test_a_count_leaves_nothing_to_real_shards():
    """torch keeps what it has found out of sharded tensors; of those of a count, that this is process 0."""
    with other_processes(Sharding(), 2) as counted:
        distribute_tensor(torch.zeros(4), counted.mesh, [Shard(0)]).detach()
    debug_launcher(halves, num_processes=2)


def test_a_failed_save_leaves_no_average_in_place_of_the_weights():
    trained = SimpleNamespace(copies={"unet": "weights"}, averages={"unet": "average"})
    with pytest.raises(OSError), averaged(None, trained):
        assert trained.copies == {"unet": "average"}
        raise OSError
    assert trained.copies == {"unet": "weights"}


def test_a_state_of_another_shape_than_its_weight_is_refused():
    class Sharded(torch.Tensor):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "DTensor", Sharded)
        weight = torch.zeros(2, 3).as_subclass(Sharded)
        assert like(torch.tensor(1.0), weight) == 1
        with pytest.raises(ValueError, match="--optimizer: its state cannot be sharded"):
            like(torch.zeros(2), weight)


def test_items_in_step():
    """A process that has run out goes on as long as another one has items."""
    left = iter([2.0, 2.0, 1.0, 0.0])  # processes that still have one
    accelerator = SimpleNamespace(device="cpu", reduce=lambda mine, how: torch.tensor([next(left)]))
    assert list(in_step(iter("a"), lambda: "z", accelerator, True))[:1] == [("a", True)]
    left = iter([1.0, 1.0, 0.0])
    assert list(in_step(iter(""), lambda: "z", accelerator, True)) == [("z", False)] * 2
    assert list(in_step(iter("ab"), lambda: "z", None, False)) == [("a", True), ("b", True)]


def test_blocks_are_those_that_the_class_names():
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([inner, torch.nn.Linear(2, 2), torch.nn.Identity()])
    assert blocks_of(model) == []
    model._no_split_modules = ["Linear", "Identity"]  # the last has no weights
    assert blocks_of(model) == [model.blocks[1], inner[0]]
    assert blocks_of(model, ["Sequential"]) == [inner]


# What cannot work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, precision, processes, said",
    [
        ({"FSDP_VERSION": "1"}, "no", 2, "write fsdp_version: 2 under fsdp_config"),
        ({}, "no", 2, "write fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "no", 2, "give --gradient_checkpointing"),
        ({"FSDP_VERSION": "2"}, "fp16", 2, "give bf16 or no"),
        ({"FSDP_VERSION": "2"}, "fp16", 1, None),
        ({"FSDP_VERSION": "2"}, "no", 3, "leave it out"),  # for groups of processes
    ],
)
def test_accelerates_configuration(variables, precision, processes, said, monkeypatch):
    groups = object() if processes == 3 else None
    accelerator = SimpleNamespace(
        num_processes=processes,
        mixed_precision=precision,
        device=torch.device("cuda"),
        state=SimpleNamespace(distributed_type=DistributedType.FSDP),
        parallelism_config=groups,
    )
    assert Sharding.asked(accelerator) is None
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | variables).items():
        monkeypatch.setenv(name, value)
    if said is None:
        assert Sharding.asked(accelerator) is None
        assert accelerator.state.distributed_type is DistributedType.NO  # not accelerate's own
        return
    with pytest.raises(ValueError, match=said):
        Sharding.asked(accelerator)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"quantize_base": "4bit", "lora": True}, "--quantize_base 4bit: FSDP2"),
        ({"activation_offload": True}, "--activation_offload: with FSDP2"),
        ({"group_offload": True, "lora": True}, "fsdp_offload_params: true"),
        ({"use_8bit_adam": True}, "--use_8bit_adam: it cannot update sharded weights"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy: it cannot update sharded weights"),
        ({"optimizer": "prodigyopt:Prodigy"}, "Prodigy: it cannot update sharded weights"),
        ({"optimizer": "torch.optim:Adafactor"}, "Adafactor: it cannot update sharded weights"),
        ({"optimizer": "torch.optim._adafactor:Adafactor"}, "Adafactor: it cannot update sharded weights"),
        ({"optimizer": "schedulefree:AdamWScheduleFree"}, "ScheduleFree: it cannot update sharded weights"),
        ({"non_ema_revision": "v1", "use_ema": True}, "leave out --non_ema_revision, or --use_ema"),
        ({"channels_last": True}, "--channels_last is not supported with FSDP2"),
        ({"offload_ema": True, "use_ema": True}, "fsdp_offload_params"),
    ],
)
def test_flags(flags, said):
    config = Config().changed(**flags)
    check_sharding(None, config)
    with pytest.raises(ValueError, match=said):
        check_sharding(Sharding(offload=True), config)


@pytest.mark.parametrize("path", ["torch.optim:AdamW", "torch.optim:Muon", "torch.optim:RMSprop", "torch.optim:SGD"])
def test_classes_whose_state_is_shaped_as_the_weights(path):
    check_sharding(Sharding(), Config().changed(optimizer=path))


def test_one_process_has_nobody_to_share_with(monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(match="shards nothing in one process"):
        start_accelerator(Config().changed(report_to="none"))


def test_lora_takes_any_optimizer():
    check_sharding(Sharding(), Config().changed(lora=True, use_8bit_adam=True))
