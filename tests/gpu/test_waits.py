"""No step of any family waits for the GPU, and the EMA in CPU memory has the numbers of the one on the GPU."""

import pytest
import torch
from gpu_loops import KINDS, run_watched, words
from known_waits import exempt
from tiny_families import TINY, data_fixture

from lpl.families import FAMILIES
from lpl.training.average import MovingAverage


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def watch(on):
    torch.cuda.set_sync_debug_mode("error" if on else "default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_step_waits(request, tmp_path, family, kind, precision):
    pipeline, images = (request.getfixturevalue(name) for name in (TINY[family.name][0], data_fixture(family)))
    flags = KINDS[kind] | {"mixed_precision": precision, "offload_ema": True, "debug_loss": True}
    with exempt():
        run_watched(words(pipeline, images, tmp_path / "run", **flags), watch)


@pytest.mark.parametrize("foreach", [False, True])
def test_an_average_in_cpu_memory_has_the_same_numbers(foreach):
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(2048, 2048, device="cuda")) for _ in range(8)]
    averages = [MovingAverage(weights, 0.9, foreach, offload) for offload in (False, True)]
    for step in range(10):
        averages[1].wait()
        with torch.no_grad():
            for weight in weights:
                weight += torch.randn(weight.shape, generator=generator, device="cuda")
        for average in averages:
            average.update(weights, torch.full((), float(step == 5), device="cuda"))
    copies = [[torch.nn.Parameter(torch.empty_like(weight)) for weight in weights] for _ in averages]
    for average, parameters in zip(averages, copies):
        average.copy_to(parameters)
    assert all(torch.equal(on_gpu, offloaded) for on_gpu, offloaded in zip(*copies))
