"""The weight of LPL: a share of the total loss is hit exactly, a number is taken literally, a resume loses nothing."""

import pytest
import torch

from lpl.weighting import LplWeight


CPU = torch.device("cpu")
LOSSES = [(1.0, 8.0), (0.5, 0.0), (2.0, 3.0), (0.25, 5.0), (7.0, 1.0)]  # (diffusion loss, LPL) of each step


def one_process(sums):
    return sums


def step(weight, *micro_batches, reduce=one_process):
    """One optimizer step of these (diffusion loss, LPL)."""
    for losses in micro_batches:
        weight.observe(*torch.tensor(losses))
    return weight.end_step(reduce)


def share(weight, losses):
    """LPL's share of the total loss over these steps, under the present weight."""
    diffusion, lpl = (sum(column) for column in zip(*losses))
    weighted = float(weight.value) * lpl
    return weighted / (diffusion + weighted)


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.5, 0.9])
def test_the_measured_share_is_the_one_asked_for(wanted):
    weight = LplWeight(f"auto:{wanted}", len(LOSSES), CPU)
    for count, losses in enumerate(LOSSES, start=1):
        step(weight, losses)
        assert share(weight, LOSSES[:count]) == pytest.approx(wanted)  # while it measures, too
    assert weight.measured_share() == pytest.approx(wanted)


def test_the_first_step_has_no_weight_and_the_last_one_measured_fixes_it():
    weight = LplWeight("auto:0.2", 3, CPU)
    assert float(weight.value) == 0
    assert [step(weight, losses) for losses in LOSSES] == [False, False, True, False, False]
    assert share(weight, LOSSES[:3]) == pytest.approx(0.2)


def test_a_number_is_the_weight():
    weight = LplWeight("3.0", 2, CPU)
    ended = []
    for losses in LOSSES:
        assert float(weight.value) == 3
        ended.append(step(weight, losses))
    assert ended == [False, True, False, False, False]  # so that the run can say what share it is
    assert weight.measured_share() == pytest.approx(share(weight, LOSSES[:2]))


def test_micro_batches_and_processes_do_not_change_the_weight():
    whole, split, first, second = (LplWeight("auto:0.2", 2, CPU) for _ in range(4))
    for _ in range(2):
        step(whole, (3.0, 5.0))
        step(split, (2.0, 9.0), (4.0, 1.0))
        first.observe(*torch.tensor((2.0, 9.0)))
        second.observe(*torch.tensor((4.0, 1.0)))
        mean = (first._step_sums + second._step_sums) / 2
        for process in (first, second):
            process.end_step(lambda sums, mean=mean: mean)
    assert whole.value == split.value == first.value == second.value


def test_what_is_saved_does_not_depend_on_micro_batches():
    whole, split = LplWeight("auto:0.2", 2, CPU), LplWeight("auto:0.2", 2, CPU)
    step(whole, (3.0, 5.0))
    step(split, (2.0, 9.0), (4.0, 1.0))
    other = LplWeight("auto:0.2", 2, CPU)
    other.load_state_dict(split.state_dict())
    for weight in (whole, other):
        step(weight, (1.0, 7.0))
    assert whole.value == other.value


def test_without_a_sample_inside_the_threshold_the_measuring_goes_on():
    weight = LplWeight("auto:0.2", 2, CPU)
    assert [step(weight, (1.0, 0.0)) for _ in range(3)] == [False] * 3
    assert weight.measuring and float(weight.value) == 0
    assert step(weight, (1.0, 2.0))
    assert share(weight, [(1.0, 0.0)] * 3 + [(1.0, 2.0)]) == pytest.approx(0.2)


def test_the_weight_passes_no_gradient():
    weight = LplWeight("auto:0.2", 2, CPU)
    weight.observe(torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True))
    weight.end_step(one_process)
    assert not weight.value.requires_grad


def test_a_restored_weight_goes_on_measuring():
    uninterrupted, resumed = LplWeight("auto:0.2", 4, CPU), LplWeight("auto:0.2", 4, CPU)
    for losses in LOSSES[:2]:
        step(uninterrupted, losses)
    resumed.load_state_dict(uninterrupted.state_dict())
    assert resumed.value == uninterrupted.value
    for losses in LOSSES[2:]:
        assert step(resumed, losses) == step(uninterrupted, losses)
        assert resumed.value == uninterrupted.value


def test_another_number_of_measuring_steps_holds_after_a_resume():
    saved = LplWeight("auto:0.2", 4, CPU)
    step(saved, LOSSES[0])
    weight = LplWeight("auto:0.2", 2, CPU)
    weight.load_state_dict(saved.state_dict())
    assert step(weight, LOSSES[1]) and share(weight, LOSSES[:2]) == pytest.approx(0.2)


@pytest.mark.parametrize(("text", "again"), [("auto:0.2", True), ("3.0", False)])
def test_the_share_of_another_loss_is_measured_anew(text, again, caplog):
    saved = LplWeight(text, 1, CPU, loss="shared")
    step(saved, LOSSES[0])
    weight = LplWeight(text, 1, CPU, loss="none")
    weight.load_state_dict(saved.state_dict())
    assert weight.measuring == again and ("it is measured again" in caplog.text) == again


def test_a_saved_state_does_not_change_with_the_run():
    weight = LplWeight("auto:0.2", 4, CPU)
    step(weight, LOSSES[0])
    saved = weight.state_dict()
    step(weight, LOSSES[2])
    other = LplWeight("auto:0.2", 4, CPU)
    other.load_state_dict(saved)
    assert share(other, LOSSES[:1]) == pytest.approx(0.2)


@pytest.mark.parametrize("before", ["0", "1.0", "auto:0.5"])
def test_a_number_given_on_resume_counts(before):
    """LPL belongs to the latter stage of training: a baseline's checkpoint is resumed with `--lpl_weight 3`."""
    saved = LplWeight(before, 1, CPU)
    step(saved, LOSSES[0])
    weight = LplWeight("3.0", 1, CPU)
    weight.load_state_dict(saved.state_dict())
    assert float(weight.value) == 3


@pytest.mark.parametrize("before", ["0", "1.0", "auto:0.5"])
def test_a_share_given_on_resume_is_measured_anew(before):
    saved = LplWeight(before, 1, CPU)
    step(saved, LOSSES[0])
    weight = LplWeight("auto:0.2", 2, CPU)
    weight.load_state_dict(saved.state_dict())
    for losses in LOSSES[1:3]:
        step(weight, losses)
    assert not weight.measuring and share(weight, LOSSES[1:3]) == pytest.approx(0.2)


def test_what_is_not_finite_is_not_measured():
    weight = LplWeight("auto:0.2", 2, CPU)
    step(weight, (float("nan"), 1.0))
    step(weight, (1.0, 1.0))
    assert float(weight.value) == pytest.approx(0.25)  # 0.2 / 0.8
