"""Objectives (Table 1, Sec. 3.3) against their definitions per sample, and the schedulers they are trained on."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tiny import seeded

from lpl import get_objective, training_scheduler
from lpl.objectives import timestep_weights


DDPM_OBJECTIVES = ("epsilon", "v_prediction", "sample")
OBJECTIVES = (*DDPM_OBJECTIVES, "flow_matching")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler_for(name, **options):
    if name == "flow_matching":
        return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})
    return DDPMScheduler(**{**SD_BETAS, "clip_sample": False, "prediction_type": name, **options})


def timesteps_for(name):
    """Four timesteps, high to low; those of flow lie between the scheduler's own."""
    return torch.tensor([990.25, 500.5, 77.125, 3.0]) if name == "flow_matching" else torch.tensor([999, 500, 77, 0])


def a_and_b(name, scheduler, timestep):
    """The table's a_t and b_t for one timestep."""
    if name == "flow_matching":
        t = float(timestep) / scheduler.config.num_train_timesteps
        return 1 - t, t
    alpha_bar = scheduler.alphas_cumprod.double()[int(timestep)].item()
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def target_of(name, a, b, latents, noise):
    return {
        "epsilon": noise,
        "v_prediction": a * noise - b * latents,
        "sample": latents,
        "flow_matching": noise - latents,
    }[name]


def cube(seed, side=4, dtype=torch.float64):
    """B == C == H == W: a timestep broadcast along the wrong axis gives a wrong value, not an error."""
    with seeded(seed):
        return torch.randn(side, side, side, side, dtype=dtype)


@pytest.fixture(params=OBJECTIVES)
def name(request):
    return request.param


# --- the table -------------------------------------------------------------------------------------------------------


def test_values_per_sample(name):
    scheduler, timesteps = scheduler_for(name), timesteps_for(name)
    objective = get_objective(name, scheduler)
    latents, noise = cube(0), cube(1)
    noisy, target = objective.add_noise(latents, noise, timesteps), objective.target(latents, noise, timesteps)
    sigma = objective.sigma(timesteps)
    assert sigma.shape == (4,)
    for i, timestep in enumerate(timesteps.tolist()):
        a, b = a_and_b(name, scheduler, timestep)
        torch.testing.assert_close(noisy[i], a * latents[i] + b * noise[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(target[i], target_of(name, a, b, latents[i], noise[i]), rtol=1e-6, atol=1e-6)
        assert sigma[i].item() == pytest.approx(b / a, rel=1e-5)


def test_clean_latents_inverts_the_target(name):
    objective, timesteps = get_objective(name, scheduler_for(name)), timesteps_for(name)
    latents, noise = cube(0), cube(1)
    noisy = objective.add_noise(latents, noise, timesteps)
    clean = objective.clean_latents(objective.target(latents, noise, timesteps), noisy, timesteps)
    torch.testing.assert_close(clean, latents, rtol=1e-10, atol=1e-10)


def test_clean_latents_of_any_output(name):
    """The formula itself, which the identity above does not pin: how an error of D passes into z0_hat."""
    scheduler, timesteps = scheduler_for(name), timesteps_for(name)
    objective, output, noisy = get_objective(name, scheduler), cube(2), cube(3)
    clean = objective.clean_latents(output, noisy, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        a, b = a_and_b(name, scheduler, timestep)
        s = b / a
        expected = {
            "epsilon": math.sqrt(1 + s * s) * noisy[i] - s * output[i],
            "v_prediction": a * noisy[i] - b * output[i],
            "sample": output[i],
            "flow_matching": noisy[i] - b * output[i],
        }[name]
        torch.testing.assert_close(clean[i], expected, rtol=1e-5, atol=1e-5)


def test_one_sample_as_in_the_batch(name):
    objective, timesteps = get_objective(name, scheduler_for(name)), timesteps_for(name)
    latents, noise = cube(0), cube(1)
    together = objective.add_noise(latents, noise, timesteps)
    for i in range(4):
        alone = objective.add_noise(latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=0)


def test_non_square_latents(name):
    objective, timesteps = get_objective(name, scheduler_for(name)), timesteps_for(name)
    latents = cube(0)[:, :3, :2]
    noise = cube(1)[:, :3, :2]
    noisy = objective.add_noise(latents, noise, timesteps)
    clean = objective.clean_latents(objective.target(latents, noise, timesteps), noisy, timesteps)
    assert noisy.shape == (4, 3, 2, 4)
    torch.testing.assert_close(clean, latents, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (4, 1), (1, 4), (4, 1, 1, 1)])
def test_timesteps_of_a_wrong_rank_are_refused(name, shape):
    objective = get_objective(name, scheduler_for(name))
    timesteps = torch.full(shape, 500)
    with pytest.raises(ValueError):
        objective.add_noise(cube(0), cube(1), timesteps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_estimates_are_float32_under_mixed_precision(name, dtype):
    """bf16 in, float32 out, and computed in float32: no rounding on the way."""
    scheduler, timesteps = scheduler_for(name), timesteps_for(name)
    objective = get_objective(name, scheduler)
    latents, noise, output = (cube(seed, dtype=dtype) for seed in range(3))
    noisy = objective.add_noise(latents, noise, timesteps)
    clean = objective.clean_latents(output, noisy, timesteps)
    assert noisy.dtype == clean.dtype == torch.float32
    exact = objective.add_noise(latents.double(), noise.double(), timesteps)
    torch.testing.assert_close(noisy.double(), exact, rtol=1e-5, atol=1e-5)
    exact = objective.clean_latents(output.double(), noisy.double(), timesteps)
    torch.testing.assert_close(clean.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_clean_latents(name):
    objective, timesteps = get_objective(name, scheduler_for(name)), timesteps_for(name)
    output, noisy = cube(2).requires_grad_(), cube(3)
    gradient = torch.autograd.grad(objective.clean_latents(output, noisy, timesteps).sum(), output)[0]
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().sum(1) > 0).all()


# --- zero terminal SNR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DDPM_OBJECTIVES)
def test_zero_terminal_snr(name):
    scheduler = scheduler_for(name, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    objective, timesteps = get_objective(name, scheduler), torch.tensor([999, 500, 999, 0])
    latents, noise = cube(0), cube(1)
    sigma = objective.sigma(timesteps)
    assert sigma.isinf().tolist() == [True, False, True, False] and not sigma.isnan().any()
    noisy, target = objective.add_noise(latents, noise, timesteps), objective.target(latents, noise, timesteps)
    torch.testing.assert_close(noisy[0], noise[0])
    assert target.isfinite().all()
    rows = slice(None) if name != "epsilon" else [1, 3]  # nothing can be told from pure noise and its own estimate
    clean = objective.clean_latents(target, noisy, timesteps)
    torch.testing.assert_close(clean[rows], latents[rows], rtol=1e-8, atol=1e-8)


# --- flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_takes_timesteps_as_they_are(shift):
    """The scheduler's shift is in its timesteps already; the objective must not apply it again."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective, timesteps = get_objective("flow_matching", scheduler), scheduler.timesteps[[3, 400, 800, 999]]
    latents, noise = cube(0, dtype=torch.float32), cube(1, dtype=torch.float32)
    noisy = objective.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_draws_continuous_timesteps_with_the_shift_applied_once(shift):
    """On the scheduler's grid the drawn timesteps are the scheduler's; between two of its points they lie between."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective, index = get_objective("flow_matching", scheduler), torch.tensor([0, 1, 250, 700, 998])
    on_grid, between = (objective.sample_timesteps((index + offset).double() / 1000) for offset in (0, 0.5))
    torch.testing.assert_close(on_grid.float(), scheduler.timesteps[index], rtol=1e-5, atol=1e-3)
    assert (between < scheduler.timesteps[index]).all() and (between > scheduler.timesteps[index + 1]).all()


def test_flow_at_both_ends():
    objective = get_objective("flow_matching", scheduler_for("flow_matching"))
    timesteps = torch.tensor([0.0, 1000.0, 0.25, 999.75])
    sigma = objective.sigma(timesteps)
    assert sigma[0] == 0 and sigma[1].isinf() and sigma[3].isfinite() and not sigma.isnan().any()
    noisy = objective.add_noise(cube(0), cube(1), timesteps)
    torch.testing.assert_close(noisy[0], cube(0)[0])
    torch.testing.assert_close(noisy[1], cube(1)[1])


def test_flow_of_another_length():
    objective = get_objective("flow_matching", scheduler_for("flow_matching", num_train_timesteps=500))
    assert objective.sigma(torch.tensor([250.0])).item() == pytest.approx(1.0)


# --- which timesteps are drawn ---------------------------------------------------------------------------------------

BIAS = {"multiplier": 3.0, "begin": 100, "end": 300, "portion": 0.25}
BIASED = {"earlier": range(250), "later": range(750, 1000), "range": range(100, 300)}
EVEN = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # uniform numbers without chance


@pytest.mark.parametrize("strategy", BIASED)
@pytest.mark.parametrize("name", DDPM_OBJECTIVES)
def test_biased_timesteps_are_drawn_so_much_more_often(name, strategy):
    objective = get_objective(name, scheduler_for(name))
    drawn = objective.sample_timesteps(EVEN, timestep_weights(strategy, 1000, **BIAS))
    assert not drawn.is_floating_point()
    inside = torch.zeros(1000, dtype=torch.bool)
    inside[list(BIASED[strategy])] = True
    expected = torch.where(inside, 3.0, 1.0).double()
    counts = torch.bincount(drawn, minlength=1000)
    torch.testing.assert_close(counts.double(), expected / expected.sum() * len(EVEN), rtol=0, atol=1.01)
    assert (drawn.diff() >= 0).all()  # so that quantiles mean the same as without bias


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 2.0])
def test_a_bias_over_everything_is_none(multiplier):
    objective = get_objective("epsilon", scheduler_for("epsilon"))
    weights = timestep_weights("later", 1000, **BIAS | {"portion": 1.0, "multiplier": multiplier})
    assert torch.equal(objective.sample_timesteps(EVEN, weights), objective.sample_timesteps(EVEN))
    assert timestep_weights("none", 1000, **BIAS) is None


def test_both_ends_of_biased_draws():
    objective = get_objective("epsilon", scheduler_for("epsilon", num_train_timesteps=50))
    ends = torch.tensor([0.0, 1 - 2**-24, 1.0])  # float32's last number below 1, and 1 itself
    for strategy in ("earlier", "later"):
        weights = timestep_weights(strategy, 50, **BIAS)
        assert len(weights) == 50
        assert objective.sample_timesteps(ends, weights).tolist() == [0, 49, 49]


def test_a_timestep_begins_where_the_one_before_it_ends():
    objective = get_objective("epsilon", scheduler_for("epsilon", num_train_timesteps=4))
    weights = timestep_weights("earlier", 4, **BIAS)  # 3, 1, 1, 1
    quantiles = torch.tensor([0, 2.9, 3, 3.9, 4, 5, 5.9], dtype=torch.float64) / 6
    assert objective.sample_timesteps(quantiles, weights).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_a_range_leaves_its_end_out():
    weights = timestep_weights("range", 4, multiplier=0.5, begin=1, end=3, portion=1.0)
    assert weights.tolist() == [1.0, 0.5, 0.5, 1.0]


def test_unknown_biases_are_refused():
    with pytest.raises(ValueError, match="--timestep_bias_strategy 'middle'.*earlier"):
        timestep_weights("middle", 1000, **BIAS)


def test_flow_has_no_timesteps_to_weigh():
    objective = get_objective("flow_matching", scheduler_for("flow_matching"))
    with pytest.raises(ValueError, match="--timestep_bias_strategy.*--weighting_scheme"):
        objective.sample_timesteps(EVEN[:2], timestep_weights("later", 1000, **BIAS))


# --- which scheduler serves which objective --------------------------------------------------------------------------


def test_unknown_names_are_refused():
    with pytest.raises(ValueError) as error:
        get_objective("velocity", scheduler_for("epsilon"))
    for word in ("velocity", *OBJECTIVES):
        assert word in str(error.value)


FLOW_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
]
DDPM_SCHEDULERS = [
    DDPMScheduler(**SD_BETAS),
    DDIMScheduler(**SD_BETAS),
    PNDMScheduler(**SD_BETAS),
    DPMSolverMultistepScheduler(**SD_BETAS),
]


def class_name(scheduler):
    return type(scheduler).__name__


@pytest.mark.parametrize("name", DDPM_OBJECTIVES)
@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=class_name)
def test_flow_schedulers_cannot_serve_ddpm_objectives(name, scheduler):
    with pytest.raises(ValueError, match=class_name(scheduler)):
        get_objective(name, scheduler)


@pytest.mark.parametrize("scheduler", DDPM_SCHEDULERS, ids=class_name)
def test_ddpm_schedulers_cannot_serve_flow(scheduler):
    with pytest.raises(ValueError, match=class_name(scheduler)):
        get_objective("flow_matching", scheduler)


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=class_name)
def test_every_flow_scheduler_serves_flow(scheduler):
    assert get_objective("flow_matching", scheduler).sigma(torch.tensor([500.0])).item() == pytest.approx(1.0)


@pytest.mark.parametrize("scheduler", DDPM_SCHEDULERS, ids=class_name)
def test_every_ddpm_scheduler_serves_its_own_prediction(scheduler):
    abar = scheduler.alphas_cumprod[500].item()
    sigma = get_objective("epsilon", scheduler).sigma(torch.tensor([500]))
    assert sigma.item() == pytest.approx(math.sqrt((1 - abar) / abar), rel=1e-5)


# --- training_scheduler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DDPM_OBJECTIVES)
@pytest.mark.parametrize(
    "source",
    [
        PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        DDPMScheduler(beta_start=0.001, beta_end=0.03, beta_schedule="linear", clip_sample=False),
        DDPMScheduler(num_train_timesteps=400, **SD_BETAS, clip_sample=False),
        DDPMScheduler(num_train_timesteps=10, trained_betas=[0.01 * (i + 1) for i in range(10)], clip_sample=False),
        DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False),
    ],
    ids=["pndm", "linear", "length", "trained_betas", "zero_snr"],
)
def test_ddim_with_the_models_own_betas(name, source):
    scheduler = training_scheduler(name, source)
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == name and not scheduler.config.clip_sample
    torch.testing.assert_close(scheduler.alphas_cumprod, source.alphas_cumprod)


@pytest.mark.parametrize("name", DDPM_OBJECTIVES)
@pytest.mark.parametrize("source", FLOW_SCHEDULERS, ids=class_name)
def test_ddim_of_a_model_that_was_flow(name, source):
    scheduler = training_scheduler(name, source)
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == name and not scheduler.config.clip_sample
    expected = DDPMScheduler(**SD_BETAS)
    torch.testing.assert_close(scheduler.alphas_cumprod, expected.alphas_cumprod)


@pytest.mark.parametrize("source", DDPM_SCHEDULERS, ids=class_name)
def test_flow_of_a_model_that_was_not(source):
    scheduler = training_scheduler("flow_matching", source)
    assert scheduler.config.use_flow_sigmas and scheduler.config.prediction_type == "flow_prediction"
    assert "Multistep" in class_name(scheduler)


def test_flow_stays_flow():
    scheduler = training_scheduler("flow_matching", FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.shift == 3.0


def test_unknown_objectives_have_no_scheduler():
    with pytest.raises(ValueError, match="velocity"):
        training_scheduler("velocity", scheduler_for("epsilon"))


SOURCES = {
    "pndm": PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "ddpm": DDPMScheduler(**SD_BETAS, clip_sample=False),
    "euler_flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "multistep_flow": FLOW_SCHEDULERS[1],
}


@pytest.mark.parametrize("source", SOURCES)
def test_its_result_serves_the_objective_and_survives_a_save(name, source, tmp_path):
    scheduler = training_scheduler(name, SOURCES[source])
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    timesteps = timesteps_for(name)
    torch.testing.assert_close(
        get_objective(name, again).sigma(timesteps), get_objective(name, scheduler).sigma(timesteps)
    )


@pytest.mark.parametrize("source", SOURCES)
def test_sampling_with_an_exact_denoiser_finds_the_image(name, source):
    """A denoiser that knows z0 must lead any start there; z0 reaches 4, so that a clipped sample shows."""
    scheduler = training_scheduler(name, SOURCES[source])
    latents = cube(0, dtype=torch.float32)
    latents = latents * 4 / latents.abs().max()
    scheduler.set_timesteps(25)
    sample = cube(1, dtype=torch.float32) * scheduler.init_noise_sigma if name != "flow_matching" else cube(1).float()
    for timestep in scheduler.timesteps:
        a, b = a_and_b(name, scheduler, timestep)
        model_input = scheduler.scale_model_input(sample, timestep) if name != "flow_matching" else sample
        noise = (model_input - a * latents) / b
        sample = scheduler.step(target_of(name, a, b, latents, noise), timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=0, atol=0.2)
