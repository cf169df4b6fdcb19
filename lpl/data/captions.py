"""The caption of a sample, from its row of the data set and the sample's own random numbers.

A *text* is what a column of the row holds: a string, or one of a list of strings. White space alone is no text. With
several columns, one is drawn by its *share* among those that have a text in this row; --instance_prompt stands for a
text where none has. A *caption* is the text with its *tags* shuffled and dropped, then with prefix and suffix, then
behind the trigger word.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from datasets import Dataset

from lpl.config.groups import Data
from lpl.tools.words import has_word


logger = logging.getLogger(__name__)
Row = Mapping[str, Any]  # of a data set, by column
CAPTION_COLUMNS = "lpl_caption_columns"  # --caption_column of a row, where data sets differ (lpl.data.mixture)
PLACEHOLDER = "[trigger]"  # ai-toolkit's, which stands for the trigger word in a caption
CLOSING = ",.;:!?"  # no space comes before these


@dataclass(frozen=True)
class Captions:
    """Makes captions as the flags say.

    Args:
        columns: --caption_column, of rows that name no columns of their own in :data:`CAPTION_COLUMNS`.
        instance_prompt: of rows without a text; None: there they are refused.
        shuffle, dropout: of the tags that need not stay in place.
        kept: number of first tags that stay, where a text has no ``kept_separator``.
        separator: between tags.
        kept_separator: once or twice in a text: tags before the first and after the second one stay.
        several: some rows have several columns.
    """

    columns: str
    instance_prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    trigger: str | None = None
    shuffle: bool = False
    dropout: float = 0.0
    kept: int = 0
    separator: str = ","
    kept_separator: str | None = None
    several: bool = False

    @classmethod
    def of(cls, data: Data) -> Captions:
        return cls(
            columns=data.caption_column,
            instance_prompt=data.instance_prompt,
            prefix=data.caption_prefix or "",
            suffix=data.caption_suffix or "",
            trigger=data.trigger_word,
            shuffle=data.shuffle_tags,
            dropout=data.tag_dropout,
            kept=data.keep_tags,
            separator=data.tag_separator,
            kept_separator=data.keep_tags_separator,
            several=data.several_caption_columns,
        )

    @property
    def drawn(self) -> bool:
        """Whether a caption depends on more random numbers than the choice in a list."""
        return self.shuffle or self.dropout > 0 or self.several or "," in self.columns

    def caption(self, row: Row, choice: float = 0.0, generator: torch.Generator | None = None) -> str:
        """A caption of a row.

        Args:
            choice: draws one of a list of strings, in [0, 1).
            generator: draws the column, and what happens to the tags; None: the first column that has a share and a
                text, with its tags as they are.

        Raises:
            ValueError: if the row has no text, or what is no text.
        """
        found = self._texts(row)
        if not found:
            raise ValueError(
                "it has no caption: an empty --caption_column, or no text file beside it that can be used; "
                "--instance_prompt gives one to all that have none"
            )
        shares = list(accumulate(share for share, _ in found))
        drawn = 0.0 if generator is None else torch.rand((), generator=generator).item()
        _, texts = found[min(bisect_right(shares, drawn * shares[-1]), len(found) - 1)]
        return self._around(self._tagged(texts[int(choice * len(texts))], generator))

    def captions(self, row: Row) -> list[str] | None:
        """Every caption that a row can get, none twice; None: they cannot be listed, since tags are shuffled or
        dropped."""
        return None if self.shuffle or self.dropout else self.in_order(row)

    def in_order(self, row: Row) -> list[str]:
        """Every caption that a row can get with all tags in their order."""
        texts = (text for _, texts in self._texts(row) for text in texts)
        return list(dict.fromkeys(self._around(self._tagged(text, None)) for text in texts))

    def _texts(self, row: Row) -> list[tuple[float, list[str]]]:
        """The shares and texts of the columns that may be drawn. A share of 0 is for rows that have no other text."""
        columns = caption_columns(row.get(CAPTION_COLUMNS) or self.columns, row)
        found = [(share, texts) for name, share in columns.items() if (texts := texts_of(row.get(name)))]
        if not found and self.instance_prompt is not None:
            return [(1.0, [self.instance_prompt])]
        return [(share, texts) for share, texts in found if share] or found[:1]

    # Tags

    def _tagged(self, text: str, generator: torch.Generator | None) -> str:
        """The text with its tags shuffled and dropped, where a generator is given."""
        divided = bool(self.kept_separator) and str(self.kept_separator) in text
        if not divided and (generator is None or not (self.shuffle or self.dropout)):
            return text
        first, middle, last = self._parts(text)
        if generator is not None:
            stays = (torch.rand(len(middle), generator=generator) >= self.dropout).tolist()
            order = torch.randperm(len(middle), generator=generator).tolist()
            middle = [middle[place] for place in (order if self.shuffle else sorted(order)) if stays[place]]
        return self._mark.join([*first, *middle, *last])

    def _parts(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that stay in front, those that may move, and those that stay behind."""
        if not self.kept_separator or self.kept_separator not in text:
            tags = self._tags(text)
            return tags[: self.kept], tags[self.kept :], []
        first, middle, last, *_ = *text.split(self.kept_separator, 2), ""
        return self._tags(first), self._tags(middle), self._tags(last)

    def _tags(self, text: str) -> list[str]:
        return [tag for part in text.split(self.separator) if (tag := part.strip())]

    @property
    def _mark(self) -> str:
        """What stands between tags."""
        return f"{self.separator.strip()} "

    # Around the text

    def _around(self, text: str) -> str:
        text = _joined(_joined(self.prefix, text), self.suffix)
        if self.trigger is None:
            return text
        text = text.replace(PLACEHOLDER, self.trigger)
        if has_word(text, self.trigger):
            return text
        return f"{self.trigger}{self._mark}{text}" if text else self.trigger


def _joined(first: str, second: str) -> str:
    """Both with a space between, unless there is one or a comma follows.

    >>> _joined("a photo of", "a cat"), _joined("a cat", ", 4k"), _joined("", "a cat")
    ('a photo of a cat', 'a cat, 4k', 'a cat')
    """
    apart = first and second and not (first[-1].isspace() or second[0].isspace() or second[0] in CLOSING)
    return f"{first} {second}" if apart else first + second


def texts_of(value: object) -> list[str]:
    """The texts of a column in one row; none where it is empty.

    Raises:
        ValueError: if it is neither a string nor a list of strings.

    >>> texts_of("a cat"), texts_of(["a cat", " ", None]), texts_of(None)
    (['a cat'], ['a cat'], [])
    """
    found = []
    for text in value if isinstance(value, list | tuple) else (value,):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"a caption must be a string or a list of strings, but one is {text!r} (--caption_column)"
            )
        found += [text] if text and not text.isspace() else []
    return found


# Columns -------------------------------------------------------------------------------------------------------------


def caption_columns(words: str, available: Collection[str]) -> dict[str, float]:
    """The columns that --caption_column names, with their shares, whether or not there are such columns.

    A column of exactly that name goes first, whatever characters it has.

    Raises:
        ValueError: for shares that are no numbers, or not given for all columns.

    >>> caption_columns("text:0.7,tags:0.3", ["text", "tags"]), caption_columns("a,b", ["a,b"])
    ({'text': 0.7, 'tags': 0.3}, {'a,b': 1.0})
    """
    if words in available or not ("," in words or ":" in words):
        return {words: 1.0}
    found: dict[str, float | None] = {}
    for part in (part.strip() for part in words.split(",")):
        name, colon, share = (part, "", "") if part in available else part.rpartition(":")
        name, share = (name.strip(), share) if colon else (part, "")
        if not name or name in found:
            raise ValueError(
                f"--caption_column {words}: {'a column is named twice' if name else 'a name is missing'}; accepted "
                "are columns with their shares, such as text:0.7,tags:0.3, or without, text,tags"
            )
        found[name] = _share(words, share) if colon else None
    shares = {name: share for name, share in found.items() if share is not None}
    if shares and (len(shares) < len(found) or not sum(shares.values())):
        raise ValueError(
            f"--caption_column {words}: give a share to each column, more than 0 to one of them, such as "
            "text:0.7,tags:0.3; or to none, so that all count alike"
        )
    return shares or dict.fromkeys(found, 1.0)


def _share(words: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise ValueError(
            f"--caption_column {words}: {text!r} is no share; accepted are numbers from 0 on, such as "
            "text:0.7,tags:0.3, and there is no column of that very name"
        )
    return share


def columns_of(data: Data, available: Collection[str]) -> list[str]:
    """The columns of the captions; none where --instance_prompt stands for all, since there is no default column.

    Raises:
        ValueError: as :func:`caption_columns`.
    """
    default = data.caption_column == Data.caption_column
    if default and data.instance_prompt is not None and data.caption_column not in available:
        return []
    if CAPTION_COLUMNS not in available:
        return list(caption_columns(data.caption_column, available))
    found = (name for part in data.parts for name in caption_columns(part.data.caption_column, available))
    return [CAPTION_COLUMNS, *(name for name in dict.fromkeys(found) if name in available)]


def caption_rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the columns of the captions, row after row, and reads no image."""
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    for batch in cast(Iterator[dict[str, list[Any]]], dataset.select_columns(list(columns)).iter(1000)):
        yield from (dict(zip(columns, values)) for values in zip(*(batch[name] for name in columns)))


def report_instance_prompt(dataset: Dataset, data: Data) -> None:
    """Say of how many images --instance_prompt is the caption, if not of all."""
    if data.instance_prompt is None:
        return
    columns = columns_of(data, dataset.column_names)
    own = sum(any(texts_of(value) for value in row.values()) for row in caption_rows(dataset, columns))
    if own == len(dataset):
        logger.warning("--instance_prompt has no effect, since every image has a caption of its own")
    elif own:
        logger.warning(
            "--instance_prompt: %d of %d images have captions of their own, which they keep; the others get it",
            *(own, len(dataset)),
        )
