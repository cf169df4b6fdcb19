"""Every VAE class against its modules called by hand, and against what the pipelines of its models do with latents."""

import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, Flux2Pipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from helpers import hook_count
from tiny import MORE_VAE_CONFIGS, VAE_CONFIGS, seeded, tiny_vae
from torch import nn

from lpl import DecoderFeatureExtractor, LatentPerceptualLoss
from lpl.autoencoders import (
    SUPPORTED,
    decode,
    decoder_blocks,
    decoder_levels,
    decoder_parts,
    downscaling_factor,
    encode,
    exact_precision,
    feature_map,
    latent_channels,
    skeleton,
    unscale,
)


KINDS = [*VAE_CONFIGS, *MORE_VAE_CONFIGS]
FRAMES = ["qwen", "qwen21", "wan", "wan22", "cosmos", "refiner"]  # decoders with a time axis
ROUNDED = ["qwen", "qwen21", "wan", "wan22"]  # upsample in float32, whatever their dtype


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def latents_for(vae, batch=2, height=4, width=6, seed=0):
    """Scaled latents as the denoiser sees them, in the VAE's dtype."""
    with seeded(seed):
        latents = torch.randn(batch, latent_channels(vae.config), height, width, dtype=torch.float64)
    return latents.to(vae.dtype)


# --- by hand ---------------------------------------------------------------------------------------------------------


def run(features, hidden, **parts):
    """Calls each named block (a list of modules, or one), keeps what comes out; gives the last one's output."""
    for name, part in parts.items():
        for module in part if isinstance(part, list) else [part]:
            hidden = module(hidden)
        features[name] = hidden
    return hidden


def ups(blocks):
    return {f"up_{index}": block for index, block in enumerate(blocks)}


def by_hand(kind, vae, raw):
    """{"mid": ..., "up_0": ..., ..., "rgb": ...} from raw latents, one module after the other; frames are kept."""
    decoder, features = vae.decoder, {}
    if getattr(vae, "post_quant_conv", None) is not None:
        raw = vae.post_quant_conv(raw[:, :, None] if kind in FRAMES else raw)
    elif kind in FRAMES:
        raw = raw[:, :, None]
    if kind == "tiny":  # 2, 1 and 1 blocks between the upsamplings
        layers = list(decoder.layers)
        stages = {"mid": layers[:4], "up_0": layers[4:7], "up_1": layers[7:10]}
        features["rgb"] = layers[10](run(features, 3 * torch.tanh(raw / 3), **stages)) * 2 - 1
        return features
    if kind == "dc":
        hidden = decoder.conv_in(raw) + raw.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
        hidden = run(features, hidden, **ups(decoder.up_blocks[::-1]))
        hidden = decoder.norm_out(hidden.movedim(1, -1)).movedim(-1, 1)
        features["rgb"] = decoder.conv_out(decoder.conv_act(hidden))
        return features
    hidden = decoder.conv_in(raw)
    if kind == "kvae":

        def conditioned(*blocks):
            return [lambda x, block=block: block(x, None, raw) for block in blocks]

        levels = [conditioned(*level.block) + ([level.upsample] if i else []) for i, level in enumerate(decoder.up)]
        stages = {"mid": conditioned(decoder.mid.block_1, decoder.mid.block_2), **ups(levels[::-1])}
        hidden = run(features, hidden, **stages)
        features["rgb"] = decoder.conv_out(nn.functional.silu(decoder.norm_out(hidden, raw)))
        return features
    if kind == "hunyuan":  # two resnets a level, and an upsampling behind all but the last
        hidden = hidden + raw.repeat_interleave(decoder.repeat, dim=1)
        flat = list(decoder.up_blocks)
        hidden = run(features, hidden, mid=decoder.mid_block, **ups([flat[:3], flat[3:6], flat[6:]]))
    elif kind == "movq":  # norms look at the latents
        conditions = quantized(vae, raw)
        stages = {"mid": decoder.mid_block, **ups(decoder.up_blocks)}
        stages = {name: lambda x, block=block: block(x, conditions) for name, block in stages.items()}
        hidden = run(features, hidden, **stages)
        features["rgb"] = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden, conditions)))
        return features
    elif kind == "temporal":
        images = torch.zeros(len(raw), 1, dtype=raw.dtype)
        stages = {"mid": decoder.mid_block, **ups(decoder.up_blocks)}
        stages = {name: lambda x, block=block: block(x, images) for name, block in stages.items()}
        hidden = run(features, hidden, **stages)
    elif kind in ("qwen21", "wan22"):
        blocks = [lambda x, block=block: block(x, first_chunk=True) for block in decoder.up_blocks]
        hidden = run(features, hidden, mid=decoder.mid_block, **ups(blocks))
    elif kind == "refiner":
        hidden = hidden + raw.repeat_interleave(decoder.repeat, dim=1)
        hidden = run(features, hidden, mid=decoder.mid_block, **ups(decoder.up_blocks))
    else:
        hidden = run(features, hidden, mid=decoder.mid_block, **ups(decoder.up_blocks))
    norm = decoder.conv_norm_out if hasattr(decoder, "conv_norm_out") else decoder.norm_out
    hidden = decoder.conv_out(nn.functional.silu(norm(hidden)))
    if kind == "temporal":
        hidden = decoder.time_conv_out(hidden[:, :, None])[:, :, 0]
    if kind == "cosmos":
        hidden = decoder.unpatch_embed(hidden)
    if kind == "wan22":  # (c, right, down) -> pixels
        frames = hidden.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 5, 3, 6, 2)
        hidden = frames.reshape(len(raw), 3, 1, 2 * raw.shape[-2] * 4, 2 * raw.shape[-1] * 4)
    if kind in ROUNDED:
        hidden = hidden.clamp(-1, 1)
    features["rgb"] = hidden
    return features


def quantized(vae, decoded):
    """What `post_quant_conv` was given, a 1 x 1 convolution undone."""
    weight, bias = vae.post_quant_conv.weight[:, :, 0, 0], vae.post_quant_conv.bias
    return torch.einsum("ij,bjhw->bihw", weight.inverse(), decoded - bias[:, None, None])


def one_frame(maps):
    return maps[:, :, 0] if maps.ndim == 5 else maps


@torch.no_grad()
def test_features_and_pixels_are_those_of_the_modules_called_by_hand(kind):
    vae = tiny_vae(kind, torch.float64)
    latents = latents_for(vae)
    raw = unscale(vae, latents)
    expected = {name: one_frame(maps) for name, maps in by_hand(kind, vae, raw).items()}
    pixels = expected.pop("rgb")[:, :3]
    features = DecoderFeatureExtractor(vae)(latents)
    assert list(features) == list(expected)
    precision = {"rtol": 1e-5, "atol": 1e-5} if kind in ROUNDED else {"rtol": 1e-9, "atol": 1e-9}
    for name, maps in features.items():
        torch.testing.assert_close(maps, expected[name], **precision)
    assert next(iter(features.values())).shape[-2:] == raw.shape[-2:], "the first block works on the raw latents' grid"
    found = DecoderFeatureExtractor(vae, ("rgb",))(latents)["rgb"]
    torch.testing.assert_close(found, pixels, **precision)
    factor = downscaling_factor(vae.config)
    assert found.shape == (2, 3, 4 * factor, 6 * factor)


# --- as the pipelines do it ------------------------------------------------------------------------------------------


def pipeline_pixels(kind, vae, latents):
    """How the pipelines of diffusers that have such a VAE end."""
    config = vae.config
    if kind == "flux2":  # Flux2Pipeline; so do Flux2KleinPipeline and BriaFibo2Pipeline
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        return vae.decode(Flux2Pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]
    if kind in ("qwen", "qwen21", "wan", "wan22"):  # QwenImagePipeline, QwenImage21Pipeline, WanPipeline
        mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1).to(latents)
        std = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1).to(latents)
        return vae.decode(latents[:, :, None] / std + mean, return_dict=False)[0][:, :3, 0]
    if kind == "cosmos":  # CosmosTextToWorldPipeline, with a sigma_data of 1
        mean, std = (
            torch.tensor(values).view(1, config.latent_channels, -1, 1, 1)[:, :, :1].to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        return vae.decode(latents[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
    if kind == "refiner":  # HunyuanImageRefinerPipeline, once its two halves are one frame again
        return vae.decode(latents[:, :, None] / config.scaling_factor, return_dict=False)[0].squeeze(2)
    if kind == "tiny":  # DreamLitePipeline
        return vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    if kind == "vq":  # LDMTextToImagePipeline, which quantises
        return vae.decode(1 / config.scaling_factor * latents, force_not_quantize=True).sample
    if kind == "movq":  # Kandinsky3Pipeline, KandinskyV22Pipeline
        return vae.decode(latents, force_not_quantize=True)["sample"]
    if kind == "temporal":  # StableVideoDiffusionPipeline
        return vae.decode(1 / config.scaling_factor * latents, num_frames=1).sample
    if kind == "kvae":
        return vae.decode(latents, return_dict=False)[0]
    if kind == "standardised":  # StableDiffusionXLPipeline
        mean, std = (
            torch.tensor(values).view(1, 4, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std)
        )
        return vae.decode(latents * std / config.scaling_factor + mean, return_dict=False)[0]
    # StableDiffusion3Pipeline; StableDiffusionPipeline, SanaPipeline and HunyuanImagePipeline have no shift
    shift = config.get("shift_factor") or 0.0
    return vae.decode(latents / config.scaling_factor + shift, return_dict=False)[0]


@torch.no_grad()
def test_pixels_are_those_of_the_pipeline(kind):
    vae = tiny_vae(kind, torch.float64)
    latents = latents_for(vae)
    expected = pipeline_pixels(kind, vae, latents)
    torch.testing.assert_close(DecoderFeatureExtractor(vae, ("rgb",))(latents)["rgb"], expected)
    assert expected.std() > 0.01


def test_a_vqmodel_that_looks_tokens_up_is_refused():
    """Amused's denoiser predicts indices, so there is no latent to compare."""
    vae = tiny_vae("vq", lookup_from_codebook=True)
    with pytest.raises(ValueError, match="lookup_from_codebook"):
        DecoderFeatureExtractor(vae)(latents_for(vae))


# --- encoding --------------------------------------------------------------------------------------------------------


def test_encode_is_what_unscale_undoes(kind):
    vae = tiny_vae(kind)
    factor, channels = downscaling_factor(vae.config), latent_channels(vae.config)
    with seeded(0):
        pixels = torch.rand(2, 3, 4 * factor, 6 * factor) * 2 - 1
        noise = torch.randn(2, channels, 4, 6)
    images = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1) if kind == "qwen21" else pixels  # opaque
    (encoded,) = vae.encode(images[:, :, None] if kind in FRAMES else images, return_dict=False)
    latents = encode(vae, pixels, noise)
    assert latents.shape == noise.shape and not latents.requires_grad
    raw = unscale(vae, latents)
    if isinstance(encoded, torch.Tensor) or kind == "cosmos":  # no posterior
        expected = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
        torch.testing.assert_close(raw, one_frame(expected), rtol=1e-4, atol=1e-4)
        return
    mean, std = one_frame(encoded.mean), one_frame(encoded.std)
    raw_noise = Flux2Pipeline._unpatchify_latents(noise) if kind == "flux2" else noise
    assert (std * raw_noise).abs().max() > 0.1
    torch.testing.assert_close(raw, mean + std * raw_noise, rtol=1e-4, atol=1e-4)


# --- gradients and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_every_block_reaches_the_latents(kind, dtype):
    vae = tiny_vae(kind, dtype)
    latents = latents_for(vae).float().requires_grad_()
    for maps in DecoderFeatureExtractor(vae)(latents).values():
        assert maps.dtype == dtype and maps.isfinite().all()
        (gradient,) = torch.autograd.grad(maps.float().square().mean(), latents, retain_graph=True)
        assert gradient.isfinite().all() and all(sample.abs().sum() > 0 for sample in gradient)


def test_gradient_checkpointing_changes_nothing(kind):
    vae = tiny_vae(kind, torch.float64)
    outcomes = []
    for recompute in (False, True):
        latents = latents_for(vae).requires_grad_()
        features = DecoderFeatureExtractor(vae, gradient_checkpointing=recompute)(latents)
        sum(maps.square().mean() for maps in features.values()).backward()
        outcomes.append((*features.values(), latents.grad))
    for plain, recomputed in zip(*outcomes, strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_every_block_is_recomputed_in_parts_that_run_once(kind):
    vae, calls = tiny_vae(kind), []
    parts = decoder_parts(vae)
    for part in parts:
        part.register_forward_hook(lambda module, *_: calls.append(module))
    decode(vae, unscale(vae, latents_for(vae)))
    assert len(calls) == len(parts) >= 5 and set(calls) == set(parts)
    blocks = [module for modules in decoder_levels(vae).values() for module in modules]
    inside, whole = ({weight for module in of for weight in module.parameters()} for of in (parts, blocks))
    assert inside == whole


@torch.no_grad()
def test_no_block_writes_over_the_features_of_another(kind):
    vae = tiny_vae(kind, torch.float64)
    latents = latents_for(vae)
    for name, maps in DecoderFeatureExtractor(vae)(latents).items():
        assert torch.equal(maps, DecoderFeatureExtractor(vae, (name,))(latents)[name])


def test_a_decode_that_ends_early_leaves_the_vae_as_it_was(kind):
    vae = tiny_vae(kind)
    latents = latents_for(vae)
    raw, before = unscale(vae, latents), vae.state_dict()
    pixels = decode(vae, raw)
    DecoderFeatureExtractor(vae, (next(iter(decoder_blocks(vae))),))(latents.requires_grad_())
    assert hook_count(vae) == 0
    assert torch.equal(decode(vae, raw), pixels)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(cache is None for cache in getattr(vae, "_feat_map", [])), "nor does it keep what it has computed"


@pytest.mark.parametrize("kind", ["qwen", "qwen21", "wan", "wan22"])
def test_nothing_is_kept_for_a_next_frame(kind):
    """These decoders would copy the input of every convolution for it."""
    vae, kept = tiny_vae(kind), []
    vae.decoder.up_blocks[-1].register_forward_hook(lambda *_: kept.extend(vae._feat_map or []))
    decode(vae, unscale(vae, latents_for(vae)))
    assert not any(isinstance(cache, torch.Tensor) for cache in kept)


def test_the_loss_works_on_every_decoder(kind):
    vae = tiny_vae(kind)
    loss = LatentPerceptualLoss(vae)
    latents = latents_for(vae)
    predicted = (latents + 0.3 * latents_for(vae, seed=1)).requires_grad_()
    values = loss(predicted, latents)
    values.sum().backward()
    assert values.shape == (2,) and (values > 0).all() and predicted.grad.isfinite().all()
    assert list(loss.last.terms) == list(decoder_blocks(vae))
    with torch.no_grad():
        assert loss(latents, latents).abs().max() == 0


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_and_sizes_from_the_configuration_alone(kind, tmp_path):
    """As it is read from a file, before any weights are loaded."""
    vae = tiny_vae(kind)
    vae.save_config(tmp_path)
    config = AutoencoderKL.load_config(tmp_path)
    assert config["_class_name"] in SUPPORTED
    assert tuple(decoder_blocks(skeleton(config))) == tuple(decoder_blocks(vae)) == tuple(decoder_levels(vae))
    assert latent_channels(config) == latent_channels(vae.config)
    assert downscaling_factor(config) == (8 if kind in ("flux2", "wan22") else 4)
    in_memory = [parameter for parameter in skeleton(config).parameters() if not parameter.is_meta]
    assert sum(parameter.numel() for parameter in in_memory) < 100  # a few scalars have a device of their own


def test_an_asymmetric_autoencoder_of_the_first_versions():
    """Its configuration lacks the common key."""
    config = {name: value for name, value in tiny_vae("asymmetric").config.items() if name != "block_out_channels"}
    config["_class_name"] = "AsymmetricAutoencoderKL"
    assert (
        tuple(decoder_blocks(skeleton(config))) == ("mid", "up_0", "up_1", "up_2") and downscaling_factor(config) == 4
    )


def test_every_class_has_a_tiny_counterpart():
    assert {type(tiny_vae(kind)).__name__ for kind in KINDS} == set(SUPPORTED)


def test_the_classes_of_the_pipelines_are_known():
    """Of the VAEs that text-to-image pipelines of diffusers name, under the components' usual names."""
    import inspect
    import re

    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    named = set()
    for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        parameters = inspect.signature(pipeline.__init__).parameters
        for name in {"vae", "vqvae", "movq"} & set(parameters):
            named |= set(re.findall(r"\w*(?:Autoencoder|VQModel)\w*", str(parameters[name].annotation)))
    assert {"AutoencoderKL", "AutoencoderDC", "VQModel"} <= named <= set(SUPPORTED)


def test_modules_are_named_by_path_and_mixed_with_names():
    vae = tiny_vae("sd", torch.float64)
    latents, path = latents_for(vae), "decoder.up_blocks.1.resnets.0"
    features = DecoderFeatureExtractor(vae, ("up_1", path))(latents)
    assert set(features) == {"up_1", path}
    whole = DecoderFeatureExtractor(vae)(latents)
    assert torch.equal(features["up_1"], whole["up_1"])
    expected = vae.decoder.up_blocks[1].resnets[0](whole["up_0"], None)
    torch.testing.assert_close(features[path], expected)
    assert features[path].shape[-2:] == whole["up_0"].shape[-2:] != whole["up_1"].shape[-2:]


@pytest.mark.parametrize(
    "kind, path", [("sd", "decoder.up_blocks.1.resnets.0.conv1"), ("kvae", "decoder.up.1.block.0.conv1")]
)
def test_decoding_may_end_inside_a_part_that_is_recomputed(kind, path):
    vae, outcomes = tiny_vae(kind, torch.float64), []
    for recompute in (False, True):
        latents = latents_for(vae).requires_grad_()
        DecoderFeatureExtractor(vae, (path,), recompute)(latents)[path].square().mean().backward()
        outcomes.append(latents.grad)
    assert outcomes[0].abs().sum() > 0
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_a_path_on_every_decoder(kind):
    """The first convolution of each, which none but some of Wan's kind have under another name."""
    vae = tiny_vae(kind)
    path = "decoder.layers.0" if kind == "tiny" else "decoder.conv_in"
    (maps,) = DecoderFeatureExtractor(vae, (path,))(latents_for(vae)).values()
    assert maps.ndim == 4 and maps.shape[-2:] == unscale(vae, latents_for(vae)).shape[-2:]


class OtherVAE(ModelMixin, ConfigMixin):
    """A decoder that nobody knows."""

    @register_to_config
    def __init__(self, latent_channels=4, scaling_factor=0.5):
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.Upsample(scale_factor=2), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)
        )

    def decode(self, z, return_dict=True):
        return (self.decoder(z),)


def test_a_decoder_of_another_make_by_paths():
    with seeded(0):
        vae = OtherVAE().double()
    latents = latents_for(vae)
    features = DecoderFeatureExtractor(vae, ("decoder.0", "decoder.2"))(latents)
    torch.testing.assert_close(features["decoder.0"], vae.decoder[0](latents / 0.5))
    torch.testing.assert_close(features["decoder.2"], vae.decoder[:3](latents / 0.5))
    torch.testing.assert_close(DecoderFeatureExtractor(vae, ("rgb",))(latents)["rgb"], vae.decode(latents / 0.5)[0])
    loss = LatentPerceptualLoss(vae, blocks=("decoder.0", "decoder.2"))
    assert (loss(latents + 0.1, latents) > 0).all()


def test_a_decoder_of_another_make_needs_paths():
    with pytest.raises(ValueError, match=r"(?s)OtherVAE.*AutoencoderKL.*--lpl_blocks.*decoder\.\d"):
        DecoderFeatureExtractor(OtherVAE())


@pytest.mark.parametrize(
    "blocks",
    [
        ("decoder.up_blocks.7",),  # none of that number
        ("mid", "decoder.up_blocks.1.resnet.0"),  # misspelt
        ("decoder.up_blocks",),  # a list, which is never called
        ("encoder.conv_in",),
        ("decoder.conv_in", "decoder.conv_in"),
        ("decoder.conv_in", "rgb"),
    ],
)
def test_wrong_paths_are_refused(blocks):
    with pytest.raises(ValueError) as error:
        DecoderFeatureExtractor(tiny_vae("sd"), blocks)
    assert f"--lpl_blocks {' '.join(blocks)}" in str(error.value), "says what was given"
    assert "mid, up_0, up_1, up_2" in str(error.value) and "such as decoder" in str(error.value), "and what there is"


def test_near_paths_are_proposed():
    with pytest.raises(ValueError, match=r"decoder\.up_blocks\.1\.resnets\.0"):
        decoder_blocks(tiny_vae("sd"), ("decoder.up_blocks.1.resnet.0",))


def test_a_module_that_does_not_run_is_refused():
    vae = tiny_vae("sd")
    with pytest.raises(ValueError, match=r"quant_conv.*did not run"):
        DecoderFeatureExtractor(vae, ("mid", "quant_conv"))(latents_for(vae))
    assert hook_count(vae) == 0


def test_a_module_that_returns_no_map_is_refused():
    vae = tiny_vae("sd")
    with pytest.raises(ValueError, match=r"\(2, 24, 16\).*\(B, C, H, W\)"):
        DecoderFeatureExtractor(vae, ("decoder.mid_block.attentions.0.to_q",))(latents_for(vae))
    with pytest.raises(ValueError, match=r"--lpl_blocks"):
        feature_map(torch.zeros(1, 2, 3, 4, 4))  # three frames
    assert feature_map((torch.zeros(1, 2, 1, 4, 4), None)).shape == (1, 2, 4, 4)


def test_a_path_is_checked_before_weights_are_loaded(tmp_path):
    tiny_vae("sd").save_config(tmp_path)
    vae = skeleton(AutoencoderKL.load_config(tmp_path))
    assert list(decoder_blocks(vae, ("up_1", "mid"))) == ["mid", "up_1"]
    assert list(decoder_blocks(vae, ("decoder.up_blocks.0.resnets.0",))) == ["decoder.up_blocks.0.resnets.0"]
    with pytest.raises(ValueError, match="decoder.nothing"):
        decoder_blocks(vae, ("decoder.nothing",))
    with pytest.raises(ValueError, match="AutoencoderOfTomorrow"):
        skeleton({"_class_name": "AutoencoderOfTomorrow"})


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [False, True])
def test_convolutions_may_use_tf32_in_the_vae_and_nowhere_else(allowed):
    """Also where the process excludes it; afterwards the process has its own setting again."""
    convolutions, before = torch.backends.cudnn.conv, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        with pytest.raises(RuntimeError, match="within"), exact_precision(torch.device("cpu")):
            assert convolutions.fp32_precision == "tf32"
            raise RuntimeError("within")
        assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_the_decoder_runs_at_that_precision_in_both_directions():
    vae = tiny_vae("sd")
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return features.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return gradient

    vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: Watched.apply(output))
    latents = torch.randn(1, 4, 4, 4)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        LatentPerceptualLoss(vae)((latents + 0.3).requires_grad_(), latents)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert seen == ["tf32"] * 3, "two decodes and the backward pass"
