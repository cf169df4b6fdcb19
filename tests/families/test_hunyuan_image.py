"""HunyuanImage: text in quotes, the distilled model, and guidance by a component of the pipeline."""

import numpy as np
import pytest
import torch
from commands import edited
from tiny import tiny_hunyuan_image
from tiny_families import CPU, Calls, batch_of, load, sample
from trainer import parsed

from lpl.evaluation.generation import draw


@torch.no_grad()
def test_what_is_in_quotes_is_what_the_second_encoder_gets(hunyuan_image_pipeline):
    """Next to captions that have none; the pipeline encodes one after the other."""
    family = load(hunyuan_image_pipeline)
    captions = ["a cat", "a sign, \"cats\" and 'dogs'", "the word “猫”"]
    found = family.encode_prompts(captions, CPU, None)
    _, _, embeddings, mask = family.pipeline.encode_prompt(captions, CPU, batch_size=3)
    torch.testing.assert_close(found["encoder_hidden_states_2"], embeddings)
    assert torch.equal(found["encoder_attention_mask_2"], mask)
    assert found["lengths_2"] == tuple(mask.sum(1).tolist()) and found["lengths_2"][0] == 0 < min(
        found["lengths_2"][1:]
    )
    other = family.encode_prompts([captions[1].replace("cats", "owls")], CPU, None)["encoder_hidden_states_2"]
    assert not torch.allclose(found["encoder_hidden_states_2"][1], other[0])


@torch.no_grad()
def test_the_distilled_transformer_is_told_guidance_and_a_second_time(tmp_path):
    """In training both times are the same, at which the mean velocity is that of flow matching."""
    family = load(tiny_hunyuan_image(tmp_path, distilled=True), guidance_scale=3.25)  # the default of its pipeline
    with Calls(family) as sampling:
        sample(family, ["a cat"])
    with Calls(family) as training:
        family.predict(
            family.denoiser,
            sampling[0]["hidden_states"],
            sampling[0]["timestep"],
            family.conditions(batch_of(family, ["a cat"]), CPU),
        )
    call = training[0]
    assert call.keys() == sampling[0].keys() and torch.equal(call["guidance"], sampling[0]["guidance"])
    assert torch.equal(call["timestep_r"], call["timestep"])
    assert torch.equal(sampling[0]["timestep_r"], sampling[1]["timestep"])


@pytest.mark.parametrize("distilled", [False, True])
def test_a_scale_of_guidance_that_the_guider_has(distilled, hunyuan_image_pipeline, image_folder, tmp_path):
    changes = {"guidance_embeds": distilled, "use_meanflow": distilled}
    pipeline = edited(hunyuan_image_pipeline, tmp_path / "pipeline", "transformer", **changes)
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- {prompt: a cat, guidance_scale: 2.0}\n")
    flags = {"validation_guidance_scale": 2.0, "validation_prompts_file": prompts}
    with pytest.warns(UserWarning) as caught:
        parsed(pipeline, image_folder, tmp_path / "out", **flags)
    texts = " ".join(str(warning.message) for warning in caught)
    assert ("--validation_guidance_scale has no effect" in texts) != distilled
    assert ("prompt 1: its guidance_scale has no effect" in texts) != distilled


def test_an_image_does_not_depend_on_the_others_of_its_batch(hunyuan_image_pipeline):
    """One caption with text in quotes would have all images of its batch drawn with the guider for these."""
    family = load(hunyuan_image_pipeline)
    family.pipeline.ocr_guider.guidance_scale = 20.0
    captions, size = ["a cat", 'a sign that says "STOP"'], (64, 64)
    together = list(draw(family, captions, [0, 1], size, steps=2))
    alone = [next(draw(family, [caption], [seed], size, steps=2)) for seed, caption in enumerate(captions)]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))
