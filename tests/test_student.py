"""The student of the decoder: its value and gradient, its corrections, and whose student it is."""

import json

import pytest
import torch
from tiny import tiny_vae

from lpl import LatentPerceptualLoss
from lpl.student import (
    Student,
    StudentLoss,
    check_configuration,
    check_decoder,
    difference,
    fidelity,
    load_student,
    probe,
    relative_pull,
)


@pytest.fixture(scope="module")
def loss():
    return LatentPerceptualLoss(tiny_vae("sd"))


@pytest.fixture(scope="module")
def student(loss):
    torch.manual_seed(0)
    return Student(4, width=16, depth=2, loss=loss.options, decoder=probe(loss.vae))


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)
    latents, error = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return latents + 0.2 * error, latents


def gradient_of(function, predicted):
    predicted = predicted.clone().requires_grad_()
    return torch.autograd.grad(function(predicted), predicted)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detach_statistics": True},
        {"distance": "l1"},
        {"normalization": "separate"},
        {"normalization": "none"},
        {"variant": "reference"},
    ],
)
def test_value_and_gradient_are_those_of_the_formula(options, loss, pair):
    """S_b = sum_k mean_c a_kc mean_hw (f_k(z0_hat) - f_k(z0))^2 / (var_kc + e), normalised as the loss is."""
    predicted, latents = pair
    torch.manual_seed(0)
    student = Student(4, width=16, depth=2, loss=loss.options | options)
    torch.nn.init.normal_(student.log_weights)
    ours = StudentLoss(student)

    def formula(z):
        parts = []
        for x, y, a in zip(student(z), student(latents), student.log_weights.exp()):
            (mean, v), (mean_y, v_y) = ((z.mean((2, 3)), z.var((2, 3), correction=0)) for z in (x, y))
            v, v_y = ((v + 1e-4 * v.mean(1, keepdim=True).detach())[:, :, None, None] for v in (v, v_y))
            if options.get("normalization") == "separate":
                x, y = (x - mean[:, :, None, None]) / v.sqrt(), (y - mean_y[:, :, None, None]) / v_y.sqrt()
            if options.keys() & {"normalization", "variant"}:
                v = torch.ones(())
            if "detach_statistics" in options:
                v = v.detach()
            difference = (x - y).abs() / v.sqrt() if "distance" in options else (x - y).square() / v
            parts.append((a[:, None, None] * difference).mean((1, 2, 3)))
        return sum(parts)

    weights = torch.tensor([1.0, 2.0, 0.5])
    assert torch.allclose(ours(predicted, latents), formula(predicted), rtol=1e-5)
    expected = gradient_of(lambda z: (weights * formula(z)).sum(), predicted)
    assert torch.allclose(gradient_of(lambda z: (weights * ours(z, latents)).sum(), predicted), expected, rtol=1e-4)
    assert torch.equal(ours(latents, latents), torch.zeros(3))
    assert torch.allclose(ours(predicted[1:2], latents[1:2]), ours(predicted, latents)[1:2], rtol=1e-5)
    assert torch.allclose(sum(ours.last.terms.values()), ours(predicted, latents))


@pytest.mark.parametrize("every", [1, 3])
def test_with_corrections_the_mean_gradient_is_that_of_lpl(every, student, loss, pair):
    predicted, latents = pair
    ours = StudentLoss(student)
    plain = gradient_of(lambda z: ours(z, latents).sum(), predicted)

    def off(z):
        return difference(ours(z, latents), loss(z, latents), z, torch.arange(3))[0]

    correction = gradient_of(lambda z: every * off(z).sum(), predicted)
    mean = sum([plain + correction, *[plain] * (every - 1)]) / every
    whole = gradient_of(lambda z: loss(z, latents).sum(), predicted)
    assert torch.allclose(mean, whole, atol=1e-5 * whole.abs().max().item())
    assert not torch.allclose(plain, whole, rtol=0.1)
    value = ours(predicted, latents) + off(predicted.clone().requires_grad_())
    assert torch.allclose(value, loss(predicted, latents), rtol=1e-5)


def test_fidelity_compares_the_gradients(student, loss, pair):
    predicted, latents = pair
    ours = StudentLoss(student)
    (one, other) = (gradient_of(lambda z, f=f: f(z, latents).sum(), predicted).flatten(1) for f in (ours, loss))
    at = predicted.clone().requires_grad_()
    places = torch.tensor([2, 0])
    off, found = difference(ours(at, latents), loss(at[places], latents[places]), at, places)
    whole = difference(ours(at, latents), loss(at, latents), at, torch.arange(3))
    assert torch.allclose(off, whole[0][places], rtol=1e-5)
    assert torch.allclose(found.relative_error, whole[1].relative_error[places], rtol=1e-4)
    found = whole[1]
    assert torch.allclose(found.cosine, (one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1), atol=1e-5)
    assert torch.allclose(found.relative_error, (one - other).norm(dim=1) / other.norm(dim=1), rtol=1e-4)
    same = latents.clone().requires_grad_()  # there is no gradient, so no direction to compare
    _, of_equal = difference(ours(same, latents), loss(same, latents), same, torch.arange(3))
    assert torch.equal(of_equal.summed(), torch.zeros(6)) and found.summed()[-1] == 3
    centred = predicted - predicted.mean((2, 3), keepdim=True)
    pulls = [-(gradient * centred.flatten(1)).sum(1) for gradient in (one, other)]
    assert torch.allclose(found.pull, pulls[0], rtol=1e-4) and torch.allclose(found.exact_pull, pulls[1], rtol=1e-4)


def test_a_pull_is_compared_where_lpl_has_one():
    """The exact gradient pulls towards contrast as strongly as it can, or away; the other, half as strongly."""
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    contrast = z - z.mean((2, 3), keepdim=True)
    *pulls, number = fidelity(-contrast / 2, -contrast, z).summed()[2:].tolist()
    largest = contrast.square().sum().item()
    assert pulls == pytest.approx([largest / 2, largest, largest]) and number == 2
    assert relative_pull(*pulls) == pytest.approx(0.5)
    assert relative_pull(*fidelity(contrast / 2, contrast, z).summed()[2:5].tolist()) is None


def test_it_loads_as_it_was_saved(student, loss, pair, tmp_path):
    student.save_pretrained(tmp_path)
    assert torch.equal(load_student(str(tmp_path), loss)(*pair), StudentLoss(student)(*pair))


def test_a_student_of_an_earlier_version_is_refused(student, loss, tmp_path):
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "form"}))
    with pytest.raises(ValueError, match=f"--lpl_student {tmp_path}: it is of an earlier version"):
        load_student(str(tmp_path), loss)


def test_half_precision_is_the_same_decoder(student, loss):
    check_decoder("it", student.config, tiny_vae("sd").to(torch.bfloat16))


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: LatentPerceptualLoss(tiny_vae("sd3")), "it takes latents of 4 channels, and this VAE's have 16"),
        (lambda: LatentPerceptualLoss(tiny_vae("sd", seed=1)), "another VAE's decoder"),
        (lambda: LatentPerceptualLoss(tiny_vae("sd"), normalization="none"), "normalization shared of the loss"),
        (lambda: LatentPerceptualLoss(tiny_vae("sd"), blocks=("mid",)), "blocks"),
        (lambda: LatentPerceptualLoss(tiny_vae("sd"), outliers={"margin": 3.0}), "outliers"),
    ],
)
def test_a_student_of_something_else_is_refused(other, words, student):
    with pytest.raises(ValueError, match=words):
        check_configuration("it", {"_class_name": "Student", **student.config}, other())
        check_decoder("it", student.config, other().vae)
