"""Both terms of Eq. 3 for a micro-batch, by hand."""

from types import SimpleNamespace

import pytest
import torch

from lpl.config.groups import Lpl
from lpl.training.losses import BatchLosses, lpl_weight


def test_a_measured_weight_belongs_to_the_loss_and_to_its_decoder():
    """Another one, of a resumed run, is measured again."""
    saved = lpl_weight(Lpl(), torch.device("cpu"))
    for lpl, alike in (
        (Lpl(lpl_chunk_size=2), True),
        (Lpl(lpl_vae_name_or_path="user/vae"), False),
        (Lpl(lpl_blocks=("mid",)), False),
    ):
        assert (lpl_weight(lpl, torch.device("cpu")).loss == saved.loss) is alike


def compared(of_lpl, of_diffusion, project=False):
    """Losses whose gradients at the model's output are these, two samples of (2, 1, 1), and that output."""
    output = torch.zeros(2, 2, 1, 1, requires_grad=True)
    by_term = [output.squeeze() * torch.tensor(gradient) for gradient in (of_lpl, of_diffusion)]
    terms = BatchLosses(2 * by_term[1].sum(1), 3 + by_term[0].sum(), output, 2, True)
    terms.compare_gradients(project)
    return terms, output


def test_gradients_at_the_models_output():
    terms, output = compared([[3.0, 4.0], [0.0, 0.0]], [[4.0, 3.0], [1.0, 2.0]])
    assert terms.cosines[0].item() == pytest.approx(24 / 25) and terms.cosines[1].isnan()
    assert terms.squares.tolist() == [25.0, 30.0] and not terms.squares.requires_grad
    (terms.diffusion_loss + terms.lpl).backward()  # the graph is still there
    assert output.grad.squeeze().tolist() == [[7.0, 7.0], [1.0, 2.0]]


def test_what_conflicts_is_taken_out_of_lpls_gradient():
    """Of the sample whose cosine is negative; the value stays, and the cosine is that of before."""
    terms, output = compared([[-1.0, 2.0], [3.0, 4.0]], [[2.0, 0.0], [4.0, -3.0]], project=True)
    assert terms.lpl.item() == 3.0 and terms.cosines[0].item() == pytest.approx(-(5**-0.5))
    assert terms.squares.tolist() == [4.0 + 25.0, 4.0 + 25.0]
    (0.5 * terms.lpl).backward()
    assert output.grad.squeeze().tolist() == [[0.0, 1.0], [1.5, 2.0]]


def test_without_a_sample_inside_lpl_has_no_gradient():
    output = torch.ones(2, 1, 1, 1, requires_grad=True) * 1
    for project in (False, True):
        terms = BatchLosses(output.flatten().square(), torch.zeros(()), output, 0, True)
        terms.compare_gradients(project)
        assert terms.squares.tolist() == [0.0, 2.0] and terms.cosines.isnan().all() and not terms.lpl.any()


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
