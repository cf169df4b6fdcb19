"""Sana: the instruction before captions."""

import torch
from tiny_families import CPU, load


def test_sana_mixes_captions_with_and_without_text(sana_pipeline):
    family = load(sana_pipeline)
    together = family.encode_prompts(["", "a cat", "", "a dog"], CPU, None)
    for row, caption in enumerate(["", "a cat", "", "a dog"]):
        for name, value in family.encode_prompts([caption], CPU, None).items():
            torch.testing.assert_close(together[name][row : row + 1], value, msg=f"{caption!r}, {name}")
