"""The contract of every model family, on its tiny pipelines."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from tiny import VAE_FACTOR
from tiny_families import (
    CPU,
    FAMILY_OF,
    SIZE,
    TINY,
    VIEWS,
    Calls,
    View,
    arguments_of,
    batch_of,
    captions_of,
    configs_of,
    inputs,
    load,
    sample,
    view_of,
)
from torch import nn

from lpl.autoencoders import decode, downscaling_factor, latent_channels, unscale
from lpl.objectives import OBJECTIVES, get_objective, training_scheduler
from lpl.training.loading import start_as_identity


@pytest.fixture(params=[name for names in TINY.values() for name in names])
def folder(request):
    return request.getfixturevalue(request.param)


def test_class_attributes_name_components_of_the_pipeline(folder):
    family = load(folder)
    expected = set(family.pipeline.components)
    assert {family.denoiser_name, *family.text_encoder_names, *family.optional_components, "vae"} <= expected
    encoders = {name for name in expected if name.startswith("text_encoder")}
    assert set(family.text_encoder_names) == encoders >= set(family.trainable_text_encoders)
    assert family.objectives and set(family.objectives) <= set(OBJECTIVES)
    assert family.class_conditional == (family.num_classes is not None)


def test_lora_targets_are_layers_of_the_denoiser(folder):
    family = load(folder)
    layers = dict(family.denoiser.named_modules())
    for target in family.lora_targets:
        found = [layer for name, layer in layers.items() if name == target or name.endswith("." + target)]
        assert found and all(isinstance(layer, nn.Linear) for layer in found), target


# --- loading ---------------------------------------------------------------------------------------------------------


def test_everything_is_frozen_and_in_its_precision(folder):
    family = load(folder, dtype=torch.bfloat16)
    assert family.vae.dtype == family.denoiser.dtype == torch.float32
    assert bool(family.text_encoders) != family.class_conditional
    assert all(encoder.dtype == torch.bfloat16 for encoder in family.text_encoders)
    for part in (family.denoiser, family.vae, *family.text_encoders):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


# --- the denoiser is called as the pipeline calls it -----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [77, 20])
def test_the_denoiser_is_called_as_the_pipeline_calls_it(folder, length, monkeypatch):
    """At the first step of sampling these captions without guidance: conditions, latents, timesteps, and its answer
    as the scheduler gets it."""
    family = load(folder, max_sequence_length=length, guidance_scale=3.5)  # 3.5: the default of Flux's pipeline
    view = view_of(family)
    captions = view.captions(captions_of(family))
    answers, step = [], family.pipeline.scheduler.step
    monkeypatch.setattr(
        family.pipeline.scheduler, "step", lambda answer, *a, **k: answers.append(answer) or step(answer, *a, **k)
    )
    with Calls(family) as sampling:
        sample(family, captions, **view.guidance_off)
    expected = view.call(sampling[0])
    latents = view.latents(expected)
    conditions = family.conditions(batch_of(family, captions), CPU)
    timesteps = family.pipeline.scheduler.timesteps[:1].expand(len(captions))
    with Calls(family) as training:
        answer = family.predict(family.denoiser, latents, timesteps, conditions)
    torch.testing.assert_close(answer, view.unpacked(answers[0]))
    assert len(training) == 1 and training[0].keys() == expected.keys() and len(expected) >= 3
    for name, value in training[0].items():
        there = view.given(expected[name], value)
        assert torch.equal(value, there) if view.exact else torch.allclose(value, there, atol=1e-5), name
        assert value.dtype == expected[name].dtype or name in ("timestep", "t"), name


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in sorted(TINY) if VIEWS.get(name, View).guides])
def test_no_caption_is_what_guidance_starts_from(name, request):
    """The unconditional half of a guided step."""
    family = load(request.getfixturevalue(TINY[name][0]))
    view = view_of(family)
    if family.name == "stable-diffusion-xl":  # else its pipeline takes zeros for an empty prompt
        family.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    prompts = [7] if family.class_conditional else ["a cat"]
    with Calls(family) as calls:
        sample(family, prompts, **{family.guidance_argument: 3.0})
    captions = [family.empty_caption(configs_of(family)), *prompts]
    captions = captions if view.empty_first else captions[::-1]
    for call, said in zip(
        map(view.call, calls), [captions] if view.calls_a_step == 1 else [captions[:1], captions[1:]]
    ):
        conditions = family.conditions(batch_of(family, said), CPU)
        timesteps = view.timesteps(call).float().expand(len(said))
        with Calls(family) as training:
            family.predict(family.denoiser, view.latents(call), timesteps, conditions)
        assert training[0].keys() == call.keys()
        for name, value in training[0].items():
            torch.testing.assert_close(value, view.given(call[name], value), check_dtype=False)


@torch.no_grad()
def test_call_arguments_draw_one_image(folder):
    family = load(folder)
    prompt = 207 if family.class_conditional else "a cat"
    arguments = {**family.call_arguments(prompt, SIZE, SIZE), "num_inference_steps": 2}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    drawn = [family.pipeline(**arguments, generator=generator) for generator in generators]
    (first,), (again,) = map(family.images_of, drawn)
    assert first.size == (SIZE, SIZE) and first.tobytes() == again.tobytes()
    if not family.class_conditional:
        assert arguments["prompt"] == prompt
        told = "max_sequence_length" in inspect.signature(family.pipeline.__call__).parameters
        assert arguments.get("max_sequence_length", 77) == 77
        assert ("max_sequence_length" in arguments) == bool(family.sequence_length and told)


@torch.no_grad()
def test_predict_answers_per_sample_in_the_latents_shape(folder):
    family = load(folder)
    latents, timesteps, conditions = inputs(family)
    output = family.predict(family.denoiser, latents, timesteps, conditions)
    assert output.shape == latents.shape and output.isfinite().all()
    for row in range(3):  # each sample alone gives the same: timesteps and conditions are its own
        alone = {name: value[row : row + 1] for name, value in conditions.items()}
        single = family.predict(family.denoiser, latents[row : row + 1], timesteps[row : row + 1], alone)
        assert torch.allclose(single, output[row : row + 1], atol=1e-5)


@torch.no_grad()
def test_timesteps_and_captions_matter(folder):
    family = load(folder)
    latents, timesteps, conditions = inputs(family)
    output = family.predict(family.denoiser, latents, timesteps, conditions)
    others = [7] * 3 if family.class_conditional else ["a dog"] * 3
    later = family.predict(family.denoiser, latents, timesteps + 50, conditions)
    other = family.conditions(batch_of(family, others), CPU)
    other = family.predict(family.denoiser, latents, timesteps, other)
    for changed in (later, other):
        assert (changed - output).abs().flatten(1).max(1).values.min() > 1e-6


@torch.no_grad()
def test_a_denoiser_in_half_precision_under_autocast(folder):
    """The frozen base of LoRA in bfloat16; latents and timesteps stay float32."""
    family = load(folder, dtype=torch.bfloat16)
    latents, timesteps, conditions = inputs(family)
    in_float32 = {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in conditions.items()
    }
    exact = family.predict(family.denoiser, latents, timesteps, in_float32)
    nn.Module.to(family.denoiser, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = family.predict(family.denoiser, latents, timesteps, conditions)
    assert (output.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_gradient_checkpointing_changes_no_answer(folder):
    """Chroma's transformer forgets a mask by it, with diffusers' own."""
    family = load(folder)
    latents, timesteps, conditions = inputs(family)
    with torch.no_grad():
        plain = family.predict(family.denoiser, latents, timesteps, conditions)
    family.denoiser.train().enable_gradient_checkpointing()
    answer = family.predict(family.denoiser, latents.requires_grad_(), timesteps, conditions)
    torch.testing.assert_close(answer, plain)
    answer.square().mean().backward()
    assert latents.grad.any()


# --- gradients -------------------------------------------------------------------------------------------------------


def test_a_family_knows_whether_weights_are_idle(folder):
    """Several processes that train one would wait for its gradient."""
    family = load(folder)
    family.denoiser.requires_grad_(True).train()
    family.predict(family.denoiser, *inputs(family)).square().mean().backward()
    idle = [name for name, parameter in family.denoiser.named_parameters() if parameter.grad is None]
    assert bool(idle) == family.idle_weights, idle


def test_gradients_stay_out_of_frozen_text_encoders(folder):
    family = load(folder)
    conditions = family.conditions(batch_of(family), CPU)
    assert not any(value.requires_grad for value in conditions.values() if torch.is_tensor(value))


@pytest.mark.parametrize("name", [name for name in TINY if FAMILY_OF[name].trainable_text_encoders])
def test_gradients_reach_trained_text_encoders(name, request):
    family = load(request.getfixturevalue(TINY[name][0]))
    encoders = [getattr(family.pipeline, encoder) for encoder in family.trainable_text_encoders]
    for encoder in encoders:
        encoder.requires_grad_(True)
    family.denoiser.requires_grad_(True)
    latents, timesteps, conditions = inputs(family)
    family.predict(family.denoiser, latents, timesteps, conditions).square().mean().backward()
    for part in (family.denoiser, *encoders):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert not any(
        p.requires_grad for encoder in family.text_encoders if encoder not in encoders for p in encoder.parameters()
    )


# --- sizes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_resolutions(folder):
    """The default is a multiple as needed; the largest works, and SD3 fails beyond it."""
    family = load(folder)
    configs = configs_of(family)
    multiple, (smallest, largest) = family.resolution_multiple(configs), family.resolution_range(configs)
    assert family.default_resolution(configs) % multiple == 0 and multiple % VAE_FACTOR == 0
    side = (largest or max(smallest, multiple * 3)) // VAE_FACTOR  # in latents
    latents, timesteps, conditions = inputs(family, batch=1, side=side)
    assert family.predict(family.denoiser, latents, timesteps, conditions).shape == latents.shape
    if family.name == "stable-diffusion-3":
        latents, timesteps, conditions = inputs(family, batch=1, side=side + multiple // VAE_FACTOR)
        with pytest.raises(ValueError):
            family.predict(family.denoiser, latents, timesteps, conditions)


REAL_SIZES = [  # the denoiser's and the VAE's configuration in the published models; default, multiple, range
    ("stable-diffusion", {"sample_size": 64}, 4, (512, 8, (1, None))),
    ("stable-diffusion-xl", {"sample_size": 128}, 4, (1024, 8, (1, None))),
    ("stable-diffusion-3", {"sample_size": 128, "patch_size": 2, "pos_embed_max_size": 192}, 4, (512, 16, (1, 3072))),
    ("pixart-alpha", {"sample_size": 128, "patch_size": 2}, 4, (1024, 16, (1, None))),
    ("pixart-sigma", {"sample_size": 64, "patch_size": 2}, 4, (512, 16, (1, None))),
    ("dit", {"sample_size": 32, "patch_size": 2}, 4, (256, 16, (256, 256))),
    ("flux", {"patch_size": 1}, 4, (1024, 16, (1, None))),
    ("sana", {"sample_size": 32, "patch_size": 1}, 6, (1024, 32, (1, None))),
    ("sana", {"sample_size": 64, "patch_size": 1}, 5, (1024, 32, (1, None))),  # whatever its autoencoder is
    ("z-image", {}, 4, (1024, 16, (1, None))),
    ("qwen-image", {}, 4, (1024, 16, (1, None))),
    ("krea-2", {}, 4, (1024, 16, (1, None))),
    ("ernie-image", {}, 5, (1024, 16, (1, None))),
    ("flux2-klein", {"patch_size": 1}, 5, (1024, 16, (1, None))),  # 4 levels, and patches of 2 x 2
    ("flux2", {"patch_size": 1}, 5, (1024, 16, (1, None))),
    ("chroma", {"patch_size": 1}, 4, (1024, 16, (1, None))),
    ("auraflow", {"sample_size": 64, "patch_size": 2, "pos_embed_max_size": 9216}, 4, (1024, 16, (1, 1536))),
    ("hidream-i1", {"patch_size": 2, "max_resolution": [128, 128]}, 4, (1024, 16, (1, None))),
    ("wan", {"patch_size": [1, 2, 2]}, 4, (640, 16, (1, None))),
    ("wan", {"patch_size": [1, 2, 2]}, 5, (640, 32, (1, None))),  # Wan 2.2, whose VAE has patches
    ("lumina-2", {"sample_size": 128, "patch_size": 2}, 4, (1024, 16, (1, None))),
    ("kolors", {"sample_size": 128}, 4, (1024, 8, (1, None))),
    ("hunyuan-image", {"patch_size": [1, 1]}, 6, (2048, 64, (1, None))),
]


def test_the_sizes_of_every_family_are_checked():
    assert {name for name, *_ in REAL_SIZES} == set(TINY)


@pytest.mark.parametrize("name, denoiser, levels, expected", REAL_SIZES)
def test_resolutions_of_the_published_models(name, denoiser, levels, expected):
    family = FAMILY_OF[name]
    key = "encoder_block_out_channels" if name == "sana" else "block_out_channels"
    configs = {"vae": {key: [8] * levels}, family.denoiser_name: denoiser}
    found = family.default_resolution(configs), family.resolution_multiple(configs), family.resolution_range(configs)
    assert found == expected


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["pixart_alpha_pipeline", "pixart_sigma_pipeline", "sana_pipeline"])
def test_captions_are_not_cleaned_in_training_nor_in_sampling(fixture, request, monkeypatch):
    """The pipelines can rewrite captions, where Beautiful Soup is installed, and do so by default."""
    family = load(request.getfixturevalue(fixture))
    seen, encode_prompt = [], family.pipeline.encode_prompt
    monkeypatch.setattr(
        family.pipeline, "encode_prompt", lambda *a, **k: seen.append(k["clean_caption"]) or encode_prompt(*a, **k)
    )
    family.conditions(batch_of(family), CPU)
    sample(family, ["a cat"])
    assert len(seen) >= 2 and not any(seen)


# --- from scratch ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_identity_layers_start_at_zero(folder):
    """A fresh transformer answers zero, and its blocks pass on their input; of a UNet nothing is changed."""
    family = load(folder)
    kind, before = type(family), {name: value.clone() for name, value in family.denoiser.state_dict().items()}
    start_as_identity(kind, family.denoiser)
    layers = {id(parameter) for layer in kind.identity_layers(family.denoiser) for parameter in layer.parameters()}
    for name, parameter in family.denoiser.named_parameters():
        assert not parameter.any() if id(parameter) in layers else torch.equal(parameter, before[name]), name
    assert bool(layers) == (family.denoiser_name == "transformer")
    answer = family.predict(family.denoiser, *inputs(family))
    assert bool(answer.any()) != bool(layers)


# --- what is trained can be sampled ----------------------------------------------------------------------------------


def oracle(family, objective, clean):
    """A denoiser's forward that knows z0: its exact answer to whatever z_t the pipeline hands it."""
    view = view_of(family)

    def forward(*args, **kwargs):
        call = arguments_of(family.denoiser, args, kwargs)
        noisy = view.latents(call)
        timesteps = view.timesteps(call).expand(len(noisy))
        a, b = (value.view(-1, 1, 1, 1) for value in objective.coefficients(timesteps))
        z0 = clean.double().expand_as(noisy)
        noise = (noisy - a * z0) / b
        answer = view.answer(objective.target(z0, noise, timesteps).float())
        return (answer,) if kwargs.get("return_dict") is False else SimpleNamespace(sample=answer)

    return forward


@torch.no_grad()
@pytest.mark.parametrize(
    "name, objective_name",
    [(name, objective) for family in TINY for name in TINY[family] for objective in FAMILY_OF[family].objectives],
)
def test_what_is_trained_can_be_sampled(name, objective_name, request, tmp_path, monkeypatch):
    """The family's pipeline with the scheduler of training, as saved and read again, leads to z0."""
    family = load(request.getfixturevalue(name))
    family.pipeline.register_modules(scheduler=training_scheduler(objective_name, family.pipeline.scheduler))
    family.pipeline.save_pretrained(tmp_path)
    family = load(tmp_path)
    objective = get_objective(objective_name, family.pipeline.scheduler)
    side = SIZE // downscaling_factor(family.vae.config)
    clean = torch.randn(1, latent_channels(family.vae.config), side, side, generator=torch.manual_seed(5))
    expected = unscale(family.vae, clean)
    picture = (decode(family.vae, expected) / 2 + 0.5).clamp(0, 1)
    monkeypatch.setattr(family.denoiser, "forward", oracle(family, objective, clean))
    decoded = []
    plain = family.vae.decode
    monkeypatch.setattr(family.vae, "decode", lambda z, *a, **k: decoded.append(z) or plain(z, *a, **k))
    prompts = [7] if family.class_conditional else ["a cat"]
    images = torch.stack(list(sample(family, prompts, num_inference_steps=20, output_type="pt")))
    assert (decoded[0].reshape(expected.shape) - expected).abs().max() < 0.02 * expected.abs().max()
    assert images.shape == picture.shape and (images - picture).abs().max() < 0.02
