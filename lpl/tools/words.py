"""Numbers, tables and errors as text."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


Rows = Sequence[tuple[str, str]]


def warn(message: str) -> None:
    """Warn on behalf of the caller's caller; the message names the flag."""
    warnings.warn(message, stacklevel=3)


def plain_warnings(program: str) -> None:
    """From here on warnings are one line, which begins with the program's name, and the first process alone warns."""
    warnings.formatwarning = lambda message, *_, **__: f"{program}: warning: {message}\n"
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore", UserWarning)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def close_match(name: str, known: Collection[Any], before: str = "") -> str:
    """The end of a sentence that suggests the closest known names; empty if none is close.

    A misspelling comes first, then a name that is shortened to its initials or to some of its words.

    >>> close_match("lr", ["lora", "learning_rate"], "--"), close_match("epochs", ["num_train_epochs", "seed"])
    ('; did you mean --learning_rate?', '; did you mean num_train_epochs?')
    """
    words = [str(word) for word in known]
    name = name.lstrip("-").replace("-", "_").lower()
    close = (
        difflib.get_close_matches(name, words, n=1, cutoff=0.85)
        or [word for word in words if name == "".join(part[:1] for part in word.split("_"))][:1]
        or difflib.get_close_matches(name, [word for word in words if _shortens(name, word)], n=3, cutoff=0)
        or difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    )
    return f"; did you mean {' or '.join(before + word for word in close)}?" if close else ""


def _shortens(name: str, word: str) -> bool:
    """Whether each part of the name begins a part of the word, in that order.

    >>> _shortens("batch_size", "train_batch_size"), _shortens("grad_acc", "gradient_accumulation_steps")
    (True, True)
    """
    parts = iter(word.split("_"))
    return bool(name) and all(any(part.startswith(short) for part in parts) for short in name.split("_"))


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word, or several, as they are and not as a part of others.

    >>> has_word("a photo of sks dog", "sks"), has_word("a photo of sksdog", "sks")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def why_no_folder(path: str) -> str | None:
    """Why what is found at a path is no folder, and what to give instead; None: it is one."""
    place = Path(path)
    if place.is_dir():
        return None
    if place.is_file():
        archive = place.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
        return "this is an archive; unpack it, and give the folder" if archive else "this is a file; give its folder"
    if place.is_symlink():
        return f"this is a link to {os.path.realpath(path)}, where nothing is"
    return "there is no such folder"


def size(count: float) -> str:
    """Bytes in the largest unit in which the number is at least 1.

    >>> size(512), size(3 * 2**30)
    ('512 bytes', '3.0 GiB')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in their two largest units.

    >>> duration(41.4), duration(9000), duration(180000)
    ('41 s', '2 h 30 min', '2 days 2 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def short_count(number: int) -> str:
    """A count with three or more digits in K, M or B.

    >>> short_count(999), short_count(1234567)
    ('999', '1.23M')
    """
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return str(number)


def decoded(content: bytes) -> str:
    """The text of a file's bytes in UTF-8, or in UTF-16 with a byte-order mark, as Windows writes it.

    Raises:
        ValueError: for another encoding.
    """
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not in UTF-8; save it in that encoding ({error})") from None


def counted(count: int, word: str) -> str:
    """A count with its noun.

    >>> counted(1, "process"), counted(2, "process"), counted(2, "image")
    ('1 process', '2 processes', '2 images')
    """
    return f"{count} {word}{'' if count == 1 else 'es' if word.endswith('s') else 's'}"


def distinct(names: Sequence[str]) -> list[str]:
    """Names, of which a repeated one gets a number that no other name has.

    >>> distinct(["a cat", "a dog", "a cat"]), distinct(["a cat", "a cat (2)", "a cat"])
    (['a cat', 'a dog', 'a cat (2)'], ['a cat', 'a cat (2)', 'a cat (3)'])
    """
    taken, found = set(names), list[str]()
    for name in names:
        if name in found:
            name = next(other for number in itertools.count(2) if (other := f"{name} ({number})") not in taken)
            taken.add(name)
        found.append(name)
    return found


def pixels(height: int, width: int) -> str:
    """
    >>> pixels(512, 512), pixels(512, 768)
    ('512 px', '512 x 768 px')
    """
    return f"{height} px" if height == width else f"{height} x {width} px"


def table(sections: Mapping[str, Rows]) -> str:
    """Titled sections of rows (name, value), with aligned values."""
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    blocks = []
    for title, rows in sections.items():
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))
    return "\n\n".join(blocks)


def percent(share: float) -> str:
    """A share as a percentage with three digits.

    >>> percent(0.0), percent(0.00012), percent(0.0123), percent(0.5)
    ('0%', '0.012%', '1.23%', '50%')
    """
    return f"{100 * share:.3g}%" if share >= 1e-5 or share == 0 else "<0.001%"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per row, with right-aligned columns.

    >>> aligned([("block", "share"), ("up_10", "5%")])
    ['block  share', 'up_10     5%']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows]
