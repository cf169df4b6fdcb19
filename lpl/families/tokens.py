"""Captions as token ids before the step: the loader's processes make them, and the pipelines' ``encode_prompt`` uses
them.

A pipeline's ``encode_prompt`` calls its tokenizers and copies what they return to the device, which waits for it. Here
:class:`Tokenize` makes the same call in the loader, and :func:`with_tokens` gives a pipeline whose tokenizers answer
that call with the ids that are on the device already. To any other call they answer as before, so that a family whose
call is not the expected one is only slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin


Tokens = dict[str, Any]  # of a batch; of each tokenizer by its name, texts, and ids and mask, both (B, tokens)
NEUTRAL = {  # what encode_prompt may say besides, and what changes no ids
    "return_tensors": "pt",
    "add_special_tokens": True,
    "return_length": False,
    "return_overflowing_tokens": False,
    "return_attention_mask": True,
}


@dataclass(frozen=True)
class Tokenize:
    """Captions -> tokens, as ``encode_prompt`` would. Holds no models: it is sent to the loader's processes.

    Args:
        tokenizers: by the pipeline's names.
        lengths: how many tokens each of them is asked for; None: as many as it takes.
        texts: what the tokenizers are given for captions.
        empty: the caption that stands for none.
    """

    tokenizers: Mapping[str, Any]
    lengths: Mapping[str, int | None]
    texts: Callable[[Sequence[str]], list[str]] = list
    empty: str = ""

    def __call__(self, captions: Sequence[str], dropped: Tensor | None = None) -> Tokens:
        """The tokens of B captions.

        Args:
            dropped: whether each tokenizer gets the empty text instead, (B, tokenizers); ``texts`` stay, by which
                :class:`Tokenized` knows the call. None: none does.
        """
        texts, tokens = self.texts(captions), {}
        for number, name in enumerate(self.tokenizers):
            encoded = self._encoded(name, texts)
            if dropped is not None:
                empty = self._encoded(name, self.texts([self.empty]))  # (1, tokens)
                rows = dropped[:, number, None]  # (B, 1)
                encoded = {part: torch.where(rows, empty[part], ids) for part, ids in encoded.items()}
            tokens[name] = {"texts": texts, "attention_mask": None} | encoded
        return tokens

    def _encoded(self, name: str, texts: list[str]) -> dict[str, Tensor]:
        length = self.lengths[name]
        found = self.tokenizers[name](
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return {part: found[part] for part in ("input_ids", "attention_mask") if found.get(part) is not None}


def chat_texts(tokenizer: Any, captions: Sequence[str], **options: Any) -> list[str]:
    """Each caption as a user's message to a language model, which is asked to answer.

    Args:
        options: of the tokenizer's template.
    """
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, **options
        )
        for caption in captions
    ]


def of_text(tokenizer: Any) -> Any:
    """The tokenizer itself, or that of a processor, which also takes images."""
    processor: Any = tokenizer
    return processor.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def with_tokens(pipeline: Any, tokens: Tokens | None, device: torch.device) -> Any:
    """A copy of a pipeline whose tokenizers give those tokens; for None the pipeline itself. Models are shared."""
    if tokens is None:
        return pipeline
    pipeline = copy.copy(pipeline)
    for name, found in tokens.items():
        vars(pipeline)[name] = Tokenized(getattr(pipeline, name), found["texts"], on_device(found, device))
    return pipeline


def on_device(tensors: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors among some values, copied to the device without a wait if they are pinned."""
    return {name: value.to(device, non_blocking=True) for name, value in tensors.items() if isinstance(value, Tensor)}


def conditions_on_device(entries: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Conditions of a batch that come from the cache; ``lengths`` stay here, see :mod:`lpl.families.base`."""
    lengths = {name: tuple(value.tolist()) for name, value in entries.items() if name.startswith("lengths")}
    return on_device(entries, device) | lengths


def lengths_of(mask: Tensor) -> tuple[int, ...]:
    """How many tokens each caption has, by a mask on the host, (B, tokens)."""
    return tuple(mask.sum(1).tolist())


def in_front(hidden: Tensor, mask: Tensor) -> Tensor:
    """Embeddings, (B, tokens, dim), with those of the mask, (B, tokens), first in their order, and zeros behind.

    As ``hidden[mask]`` for each caption, for which the device would have to be waited for.
    """
    order = mask.int().argsort(dim=1, descending=True, stable=True)[..., None]
    return hidden.masked_fill(mask[..., None] == 0, 0).take_along_dim(order, 1)


class Tokenized:
    """A tokenizer that knows the tokens of some texts already.

    Args:
        encoded: ``input_ids`` and ``attention_mask``, (B, tokens).
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], encoded: Mapping[str, Tensor]) -> None:
        self.tokenizer, self.texts, self.encoded = tokenizer, list(texts), encoded

    def __call__(self, text: Any, **options: Any) -> Any:
        if list(text) == self.texts:
            if options == {"padding": "longest", "return_tensors": "pt"}:  # whether to warn of truncation; we do
                return SimpleNamespace(input_ids=torch.empty(len(self.texts), 0, dtype=torch.long))
            if self._is_known(**options):
                return SimpleNamespace(**self.encoded)
        return self.tokenizer(text, **options)

    def _is_known(
        self, padding: Any = False, truncation: Any = False, max_length: int | None = None, **options: Any
    ) -> bool:
        same = (padding, truncation, max_length) == ("max_length", True, self.encoded["input_ids"].shape[1])
        return same and options.items() <= NEUTRAL.items()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text that may have to be replaced by several; only a textual inversion has such."""
        added = self.tokenizer.added_tokens_encoder
        return self.tokenizer.tokenize(text) if any(f"{token}_1" in added for token in added) else []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)
