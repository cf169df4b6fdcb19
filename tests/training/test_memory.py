"""Frozen weights that are on the device only while they are used: the same numbers, and little is there at a time.

The CPU stands for a device here: everything happens as on one, and only the memory is the same.
"""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from trainer import metrics, parsed, same, train, weights

from lpl.training import memory
from lpl.training.loading import load_family
from lpl.training.memory import Group, has_own_memory
from lpl.training.parts import TrainedParts


CPU = torch.device("cpu")
OFFLOADS = {"group_offload": True, "offload_frozen": True, "activation_offload": True}


@pytest.fixture
def device(monkeypatch):
    """The CPU as a device with memory of its own."""
    monkeypatch.setattr(memory, "has_own_memory", lambda device: True)
    monkeypatch.setattr(memory, "SMALL", 0)


def test_a_cpu_has_no_memory_of_its_own():
    assert not has_own_memory(CPU) and has_own_memory(torch.device("cuda"))


@pytest.mark.parametrize("name, dtype", [("sd_pipeline", "float32"), ("sd3_pipeline", "bfloat16")])
def test_a_training_has_the_same_numbers(name, dtype, request, device, image_folder, tmp_path):
    """With LPL through the pipeline's VAE or a copy of it, held-out losses, and samples."""
    flags = {"rank": 2, "gradient_checkpointing": True, "lpl_sigma_threshold": 20, "use_ema": True}
    flags |= {"validation_prompts": ["a cat"], "validation_every_nth": 4, "lpl_vae_dtype": dtype}
    pipeline = request.getfixturevalue(name)
    plain, offloaded = (
        train(pipeline, image_folder, tmp_path / kind, **flags | more) for kind, more in (("a", {}), ("b", OFFLOADS))
    )
    assert metrics(plain) == metrics(offloaded)
    assert same(weights(plain), weights(offloaded))
    pictures = [(folder / "samples/step-000002/00.png").read_bytes() for folder in (plain, offloaded)]
    assert pictures[0] == pictures[1]


def test_text_encoders_that_samples_load_again_come_by_layers_too(device, sd_pipeline, image_folder, tmp_path):
    flags = {"max_train_steps": 1, "cache_text_embeddings": True, "validation_prompts": ["a cat"], "lpl_weight": 0}
    flags |= {"data_cache_dir": tmp_path / "cache"}
    found = []
    for kind in (False, True):
        folder = train(sd_pipeline, image_folder, tmp_path / f"{kind}", **flags, offload_frozen=kind)
        found.append((folder / "samples/step-000001/00.png").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["sd_pipeline", "sd3_pipeline"])
def test_a_training_over_a_base_in_8_bits_is_close(name, request, device, image_folder, tmp_path):
    """The same numbers wherever they rest."""
    flags = {"rank": 2, "gradient_checkpointing": True, "lpl_sigma_threshold": 20}
    kinds = {"plain": {}, "fp8": {"quantize_base": "fp8"}, "both": {"quantize_base": "fp8", "group_offload": True}}
    plain, fp8, both = (
        train(request.getfixturevalue(name), image_folder, tmp_path / kind, **flags | more)
        for kind, more in kinds.items()
    )
    assert metrics(fp8) == metrics(both) and same(weights(fp8), weights(both))
    assert metrics(fp8, "loss") != metrics(plain, "loss")
    for one, other in zip(metrics(fp8, "loss", "lpl"), metrics(plain, "loss", "lpl"), strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("base", ["torchao:int8wo", "torchao:float8wo"])
def test_a_training_over_a_base_of_torchao_is_close(base, sd3_pipeline, image_folder, tmp_path):
    pytest.importorskip("torchao")
    flags = {"rank": 2, "lpl_weight": 0, "mixed_precision": "bf16"}
    plain, packed = (
        train(sd3_pipeline, image_folder, tmp_path / f"{q}", **flags, quantize_base=q) for q in (None, base)
    )
    assert metrics(packed, "loss") != metrics(plain, "loss")
    for one, other in zip(metrics(packed, "loss"), metrics(plain, "loss"), strict=True):
        assert one == pytest.approx(other, rel=0.02)


def test_inputs_of_blocks_wait_elsewhere(device, monkeypatch):
    """Of a checkpointed layer its input; of one that is not, what its backward pass needs, but no weight."""
    moved, on_host = [], memory.on_host
    monkeypatch.setattr(memory, "on_host", lambda x, device: moved.append(tuple(x.shape)) or on_host(x, device))
    hidden = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4))
    model, inputs = nn.Sequential(nn.Linear(3, 4), Checkpointed(hidden), nn.Linear(4, 5)), torch.ones(2, 3)
    model(inputs).square().sum().backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    memory.offload_activations(model)
    output = model(inputs)
    assert sorted(moved) == [(2, 3), (2, 4), (2, 4)]  # nothing of the hidden layer
    output.square().sum().backward()
    assert all(torch.equal(weight.grad, grad) for weight, grad in zip(model.parameters(), expected, strict=True))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return checkpoint(self.inner, inputs, use_reentrant=False)


# Groups --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers():
    """Two frozen layers that share a weight, and a trained one."""
    shared, trained = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    model = nn.Sequential(shared, trained, nn.Linear(3, 3, bias=False)).requires_grad_(False)
    model[2].weight = shared.weight
    trained.requires_grad_(True)
    return model


def test_a_group_comes_and_goes(layers):
    before, inputs = layers[0].weight.detach().clone(), torch.ones(2, 3)
    expected = layers(inputs)
    group = Group(layers.modules(), CPU)
    group.follow(layers)
    for _ in range(2):
        assert layers[0].weight.isnan().all() and layers[0].weight.shape == (3, 3)
        assert layers[0].weight.untyped_storage().nbytes() == 4
        assert layers[1].weight.isfinite().all() and layers[1].weight.requires_grad
        with group, group:
            assert layers[0].weight is layers[2].weight and torch.equal(layers[0].weight, before)
            assert torch.equal(layers(inputs), expected)
            assert torch.equal(layers[0].weight, before)
    assert torch.equal(layers(inputs), expected)


def test_a_group_leaves_after_an_error(layers):
    Group(layers.modules(), CPU).follow(layers)
    with pytest.raises(RuntimeError, match="shapes"):
        layers(torch.ones(2, 4))
    assert layers[0].weight.isnan().all()


def test_each_row_in_8_bits_has_a_scale():
    """A number is off by half a step at most: 1/16 of itself, or of what is 2^-6 of the scale's unit."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 3).requires_grad_(False)
    layer.weight *= torch.tensor([[1e-6], [1.0], [0.0]])
    before, bias = layer.weight.clone(), layer.bias.clone()
    with Group([layer], CPU, host=False, packed=[layer]) as group:
        largest = before.abs().amax(1, keepdim=True)
        most = torch.maximum(before.abs(), largest / 448 * 2**-6) / 16
        assert ((layer.weight - before).abs() <= most * 1.001).all()
        assert torch.equal(layer.bias, bias)
        assert not torch.equal(layer.weight, before)
    (resting,) = (resting for *_, resting in group.places)
    assert resting.numbers.dtype == torch.float8_e4m3fn and layer.weight.isnan().all()


def test_sensitive_layers_stay_as_they_are(sd3_pipeline, image_folder, tmp_path):
    config, description = parsed(sd3_pipeline, image_folder, tmp_path, rank=2)
    trained = TrainedParts(load_family(config.model, config.lora, description, torch.float32), config.lora)
    packed = memory.in_8_bits(trained.denoiser)
    names = {name for name, module in trained.denoiser.named_modules() if module in packed}
    assert {"transformer_blocks.0.attn.to_q.base_layer", "transformer_blocks.0.ff.net.2"} <= names
    assert not [name for name in names if "norm" in name or "pos_embed" in name or "lora" in name]


def test_several_processes_do_not_exchange_what_is_not_there(device, sd_pipeline, image_folder, tmp_path, monkeypatch):
    """DDP would write the first process's stand-ins over those of the others, which have no memory."""
    flags = {"rank": 2, "gradient_checkpointing": True, "group_offload": True}
    config, description = parsed(sd_pipeline, image_folder, tmp_path, **flags)
    trained = TrainedParts(load_family(config.model, config.lora, description, torch.float32), config.lora)
    memory.place(trained.denoiser, trained, config, CPU)
    assert sent_by_ddp(trained, monkeypatch)  # the adapter


@pytest.mark.parametrize("flags", [{"rank": 2, "train_text_encoder": True}, {}], ids=["lora", "whole"])
def test_several_processes_exchange_only_what_is_trained(flags, sd3_pipeline, image_folder, tmp_path, monkeypatch):
    """Each has loaded the rest: frozen weights, which torchao's tensors cannot be sent of, and tables of positions."""
    config, description = parsed(sd3_pipeline, image_folder, tmp_path, **flags)
    family = load_family(config.model, config.lora, description, torch.float32)
    trained = TrainedParts(family, config.lora, text_encoders=config.model.train_text_encoder)
    for part in trained.parts.values():
        memory.place(part, trained, config, CPU)
    assert list(trained.denoiser.buffers())
    assert sent_by_ddp(trained, monkeypatch) == {weight.data_ptr() for weight in trained.weights()}


def sent_by_ddp(trained, monkeypatch):
    """The addresses of the tensors that the first process sends to the others, before and in two forward passes."""
    sent, send = set(), distributed._broadcast_coalesced

    def record(group, tensors, *args):
        sent.update(tensor.data_ptr() for tensor in tensors)
        return send(group, tensors, *args)

    monkeypatch.setattr(distributed, "_broadcast_coalesced", record)
    monkeypatch.setattr(trained, "forward", lambda: sum(weight.sum() for weight in trained.weights()))
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = DistributedDataParallel(trained)
        for _ in range(2):
            model().backward()
    finally:
        distributed.destroy_process_group()
    return sent
