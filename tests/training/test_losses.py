"""Both terms of Eq. 3 for a micro-batch, by hand."""

from types import SimpleNamespace

import pytest
import torch

from lpl.training.losses import BatchLosses


def squares(*vectors):
    return [sum(value**2 for value in vector) for vector in vectors]


def test_gradients_at_the_models_output():
    output = torch.tensor([1.0, -2.0], requires_grad=True) * 1
    terms = BatchLosses(output.square(), 3 * output.sum(), output, 2, True)
    found = terms.gradients(torch.tensor(0.5))
    assert found.tolist() == pytest.approx(squares((1.5, 1.5), (1.0, -2.0))) and not found.requires_grad
    (terms.diffusion_loss + terms.lpl).backward()  # the graph is still there


def test_without_a_sample_inside_lpl_has_no_gradient():
    output = torch.tensor([1.0, -2.0], requires_grad=True) * 1
    assert BatchLosses(output.square(), torch.zeros(()), output, 0, True).gradients(torch.tensor(0.5)).tolist() == [
        0.0,
        5.0,
    ]


def test_the_parts_of_blocks_add_up_to_what_is_taken():
    found = SimpleNamespace(
        block_names=("mid", "up_0"),
        last=SimpleNamespace(
            terms={"up_0": torch.tensor([1.0, 2.0]), "mid": torch.tensor([3.0, 4.0])},
            kept={"up_0": torch.tensor([0.5, 1.0]), "mid": torch.tensor([1.0, 1.0])},
        ),
    )
    terms = BatchLosses(torch.zeros(8), torch.zeros(()), torch.zeros(8), 4, True)
    terms.take(torch.tensor([2, 5]), torch.tensor([4.0, 6.0]), 4 / 8, found)  # two of four inside, of eight
    assert terms.lpl.item() == 2.5 and terms.rows == 2
    assert terms.by_block.tolist() == [[1.75, 0.75], [2.0, 1.5]]
    assert not terms.not_finite().any()


def test_samples_that_are_not_finite_are_found_by_term():
    nan, inf = float("nan"), float("inf")
    terms = BatchLosses(torch.tensor([0.0, nan, 1.0, inf]), torch.zeros(()), torch.zeros(4), 2, True)
    terms.by_row = torch.tensor([3, 0]), torch.tensor([1.0, nan])
    assert terms.not_finite().nonzero().tolist() == [[0, 1], [1, 0], [3, 0]]


def test_weights_of_samples_weigh_lpl_and_its_parts():
    last = SimpleNamespace(terms={"mid": torch.tensor([4.0, 6.0])}, kept={"mid": torch.tensor([1.0, 1.0])})
    found = SimpleNamespace(block_names=("mid",), last=last)
    terms = BatchLosses(
        torch.zeros(4), torch.zeros(()), torch.zeros(4), 2, True, weights=torch.tensor([9.0, 0, 0.5, 0])
    )
    terms.take(torch.tensor([1, 2]), torch.tensor([4.0, 6.0]), 2 / 4, found)
    assert terms.lpl.item() == 0.75 and terms.by_block.tolist() == [[0.75], [2.0]]
    terms.correct(torch.tensor([2]), torch.tensor([8.0]), 0.5)
    assert terms.lpl.item() == 2.75
