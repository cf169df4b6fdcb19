"""The tiny pipelines and data are what the other tests take them for: real, offline, reproducible."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny import CLASSES, DIT_LABELS, VAE_FACTOR, WITHOUT_T5, tiny_dit, tiny_sana, tiny_sd, tiny_vae


PIPELINES = {
    "sd_pipeline": StableDiffusionPipeline,
    "sd_v_pipeline": StableDiffusionPipeline,
    "sdxl_pipeline": StableDiffusionXLPipeline,
    "sdxl_v_pipeline": StableDiffusionXLPipeline,
    "sd3_pipeline": StableDiffusion3Pipeline,
    "sd3_without_t5": StableDiffusion3Pipeline,
    "pixart_alpha_pipeline": PixArtAlphaPipeline,
    "pixart_sigma_pipeline": PixArtSigmaPipeline,
    "dit_pipeline": DiTPipeline,
    "flux_pipeline": FluxPipeline,
    "sana_pipeline": SanaPipeline,
}


def load(folder):
    without_t5 = WITHOUT_T5 if "without_t5" in folder.name else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **without_t5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline):
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    if isinstance(pipeline, DiTPipeline):
        return pipeline([1], **arguments).images
    if isinstance(pipeline, PixArtAlphaPipeline | PixArtSigmaPipeline | SanaPipeline):
        arguments |= {"use_resolution_binning": False, "clean_caption": False}
    return pipeline("a cat", height=32, width=32, **arguments).images


@pytest.mark.parametrize("fixture, kind", PIPELINES.items())
def test_pipeline_loads_offline_and_samples(fixture, kind, request):
    folder = request.getfixturevalue(fixture)
    pipeline = load(folder)
    assert type(pipeline) is kind
    assert not list(folder.rglob("*.bin")), "safetensors only"
    images = sample(pipeline)
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all() and images.std() > 0.01
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1.5e6


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_v_pipeline_says_so(family, request):
    for fixture, objective in ((f"{family}_pipeline", "epsilon"), (f"{family}_v_pipeline", "v_prediction")):
        assert load(request.getfixturevalue(fixture)).scheduler.config.prediction_type == objective


def test_dit_reads_its_labels(dit_pipeline):
    labels = load(dit_pipeline).labels
    assert labels["goldfish"] == 1 and len(labels) == sum(len(names.split(",")) for names in DIT_LABELS.values())


def test_third_encoder_is_optional(sd3_pipeline, sd3_without_t5):
    assert load(sd3_pipeline).text_encoder_3 is not None
    without = load(sd3_without_t5)
    assert without.text_encoder_3 is None and without.tokenizer_3 is None


@pytest.mark.parametrize(
    "builder, fixture, denoiser",
    [
        (tiny_sd, "sd_pipeline", "unet"),
        (tiny_dit, "dit_pipeline", "transformer"),
        (tiny_sana, "sana_pipeline", "transformer"),
    ],
)
def test_a_builder_gives_the_same_bits_and_leaves_the_random_state(builder, fixture, denoiser, request, tmp_path):
    torch.manual_seed(3)
    builder(tmp_path)
    after = torch.rand(())
    torch.manual_seed(3)
    assert after == torch.rand(())
    again, first = load(tmp_path), load(request.getfixturevalue(fixture))
    for part in (denoiser, "vae"):
        for ours, theirs in zip(getattr(first, part).parameters(), getattr(again, part).parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_gemma_reads_every_character(sana_pipeline):
    tokenizer = load(sana_pipeline).tokenizer
    for text in ("a cat", "A café, 100 °C; 猫"):
        tokens = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in tokens and tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_tokenizers_tell_words_apart(sd3_pipeline):
    pipeline = load(sd3_pipeline)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        cat, dog = (tokenizer(text, padding="max_length", max_length=16).input_ids for text in ("a cat", "a dog"))
        assert len(cat) == len(dog) == 16 and cat != dog
        assert tokenizer.unk_token_id is None or tokenizer("a cat").input_ids.count(tokenizer.unk_token_id) <= (
            tokenizer.unk_token_id == tokenizer.eos_token_id
        )


@pytest.mark.parametrize("kind, channels", [("sd", 4), ("sd3", 16), ("asymmetric", 4), ("standardised", 4), ("dc", 4)])
def test_vae_shapes(kind, channels):
    vae = tiny_vae(kind)
    encoded = vae.encode(torch.zeros(1, 3, 32, 48))
    latents = encoded.latent if kind == "dc" else encoded.latent_dist.mean
    assert latents.shape == (1, channels, 32 // VAE_FACTOR, 48 // VAE_FACTOR)
    assert vae.decode(latents).sample.shape == (1, 3, 32, 48)


def test_image_folder_has_captions_sizes_and_modes(image_folder, tmp_path):
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(image_folder), split="train", cache_dir=str(tmp_path))
    images = data["image"][:]
    assert len(data) == 8 and len(set(data["text"])) == 8
    assert {"RGB", "L", "RGBA", "P", "CMYK"} <= {image.mode for image in images}
    assert len({image.size for image in images}) >= 4 and min(min(image.size) for image in images) == 48


def test_class_folder_has_labels(class_folder, tmp_path):
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(class_folder), split="train", cache_dir=str(tmp_path))
    assert data.features["label"].names == sorted(CLASSES) and sorted(data["label"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert min(min(image.size) for image in data["image"]) == 40
