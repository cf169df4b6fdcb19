"""The tiny pipelines and data are what the other tests take them for: real, offline, reproducible."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from tiny import VAE_FACTOR, WITHOUT_T5, tiny_sd, tiny_vae


def load(folder):
    without_t5 = WITHOUT_T5 if "without_t5" in folder.name else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **without_t5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline):
    generator = torch.Generator().manual_seed(0)
    out = pipeline("a cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt")
    return out.images


@pytest.mark.parametrize(
    "fixture, kind",
    [
        ("sd_pipeline", StableDiffusionPipeline),
        ("sd_v_pipeline", StableDiffusionPipeline),
        ("sd3_pipeline", StableDiffusion3Pipeline),
        ("sd3_without_t5", StableDiffusion3Pipeline),
    ],
)
def test_pipeline_loads_offline_and_samples(fixture, kind, request):
    folder = request.getfixturevalue(fixture)
    pipeline = load(folder)
    assert type(pipeline) is kind
    assert not list(folder.rglob("*.bin")), "safetensors only"
    images = sample(pipeline)
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_v_pipeline_says_so(sd_pipeline, sd_v_pipeline):
    assert load(sd_pipeline).scheduler.config.prediction_type == "epsilon"
    assert load(sd_v_pipeline).scheduler.config.prediction_type == "v_prediction"


def test_third_encoder_is_optional(sd3_pipeline, sd3_without_t5):
    assert load(sd3_pipeline).text_encoder_3 is not None
    without = load(sd3_without_t5)
    assert without.text_encoder_3 is None and without.tokenizer_3 is None


def test_a_builder_gives_the_same_bits_and_leaves_the_random_state(sd_pipeline, tmp_path):
    torch.manual_seed(3)
    again = load(tiny_sd(tmp_path))
    after = torch.rand(())
    torch.manual_seed(3)
    assert after == torch.rand(())
    for ours, theirs in zip(load(sd_pipeline).unet.parameters(), again.unet.parameters()):
        assert torch.equal(ours, theirs)


def test_tokenizers_tell_words_apart(sd3_pipeline):
    pipeline = load(sd3_pipeline)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        cat, dog = (tokenizer(text, padding="max_length", max_length=16).input_ids for text in ("a cat", "a dog"))
        assert len(cat) == len(dog) == 16 and cat != dog
        assert tokenizer.unk_token_id is None or tokenizer("a cat").input_ids.count(tokenizer.unk_token_id) <= (
            tokenizer.unk_token_id == tokenizer.eos_token_id
        )


@pytest.mark.parametrize("kind, channels", [("sd", 4), ("sd3", 16), ("asymmetric", 4)])
def test_vae_shapes(kind, channels):
    vae = tiny_vae(kind)
    latents = vae.encode(torch.zeros(1, 3, 32, 48)).latent_dist.mean
    assert latents.shape == (1, channels, 32 // VAE_FACTOR, 48 // VAE_FACTOR)
    assert vae.decode(latents).sample.shape == (1, 3, 32, 48)


def test_image_folder_has_captions_sizes_and_modes(image_folder, tmp_path):
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(image_folder), split="train", cache_dir=str(tmp_path))
    images = data["image"][:]
    assert len(data) == 8 and len(set(data["text"])) == 8
    assert {"RGB", "L", "RGBA", "P", "CMYK"} <= {image.mode for image in images}
    assert len({image.size for image in images}) >= 4 and min(min(image.size) for image in images) == 48
