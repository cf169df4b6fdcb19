"""Make a small data set of 3D emoji: one object on white, with its name as caption.

    npm pack @lobehub/fluent-emoji-3d@1.1.0  # 16 MB
    python examples/quickstart/make_data.py --package lobehub-fluent-emoji-3d-1.1.0.tgz

The pictures are Microsoft's Fluent emoji in 3D under the MIT licence, as that npm package has them: 256 px on a
transparent ground, named by their code points. Captions are the names that Unicode gives these. Flags, key caps and
code points that Python's Unicode does not know are left out.

``plain/`` has the pictures without a skin tone, which the quickstart's pipeline was trained on. ``toned/`` has those
of people with a medium skin tone, which the quickstart learns; each has a picture without a tone in ``plain/``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture


PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SHA512 = (
    "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb4"
    "45d267bba207914232a87a10c75ee549d9069e720979c1106feb4954006de1ee"
)
FEATURES = Features({"image": Image(), "text": Value("string"), "code_points": Value("string")})
JOINER, VARIANT, KEY_CAP = 0x200D, 0xFE0F, 0x20E3
TONES = range(0x1F3FB, 0x1F400)
MEDIUM = 0x1F3FD
LETTERS = range(0x1F1E6, 0x1F200)  # of flags
TAGS = range(0xE0000, 0xE0080)  # of the flags of England, Scotland and Wales
SIGNS = {"FEMALE SIGN": "woman", "MALE SIGN": "man"}
DATA = Path(__file__).resolve().parent / "data"  # as it is stored here
README = """# Fluent emoji, 3D

{plain} pictures in `plain/` and {toned} in `toned/`, {side} px, each with its name. Made by
`examples/quickstart/make_data.py` of LobeHub's npm package `@lobehub/fluent-emoji-3d` 1.1.0 (MIT), which has
Microsoft's Fluent emoji (https://github.com/microsoft/fluentui-emoji).

MIT License. Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions: The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS
OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE
AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR
OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def name_of(points: list[int]) -> str | None:
    """The caption; None where there is none.

    >>> name_of([0x1F600]), name_of([0x1F469, 0x200D, 0x1F4BB]), name_of([0x1F1EC, 0x1F1E7])
    ('grinning face', 'woman, personal computer', None)
    """
    if any(point in LETTERS or point in TAGS or point == KEY_CAP or point > sys.maxunicode for point in points):
        return None
    shown = [point for point in points if point not in (JOINER, VARIANT) and point not in TONES]
    names = [unicodedata.name(chr(point), "") for point in shown]
    return ", ".join(SIGNS.get(name, name.lower()) for name in names) if all(names) and names else None


def emoji(package: bytes) -> Iterator[tuple[list[int], bytes]]:
    """Code points and the file of each picture, in the order of their names."""
    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        files = sorted((file for file in tar if file.name.endswith(".webp")), key=lambda file: file.name)
        for file in files:
            content = tar.extractfile(file)
            assert content is not None
            yield [int(point, 16) for point in Path(file.name).stem.split("-")], content.read()


def on_white(content: bytes, side: int) -> bytes:
    """The picture as a JPEG without chroma subsampling, which would blur its edges."""
    picture = Picture.open(io.BytesIO(content)).convert("RGBA")
    ground = Picture.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    output = io.BytesIO()
    ground.convert("RGB").resize((side, side), Picture.Resampling.LANCZOS).save(
        output, "JPEG", quality=93, subsampling=0
    )
    return output.getvalue()


@cache
def read_pictures(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """What `main` has written: uint8 (N, 3, side, side), and captions."""
    table = pyarrow.parquet.read_table(folder)
    pictures = [np.asarray(Picture.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), table["text"].to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DATA, help="default: data/ beside this script")
    parser.add_argument("--package", type=Path, required=True, help="the file that npm pack has downloaded")
    parser.add_argument("--resolution", type=int, default=96)
    args = parser.parse_args()
    package = args.package.read_bytes() if args.package.is_file() else b""
    if hashlib.sha512(package).hexdigest() != SHA512:
        parser.error(f"--package {args.package}: this is not the file that npm pack {PACKAGE} downloads")
    parts: dict[str, list[dict[str, Any]]] = {"plain": [], "toned": []}
    for points, content in emoji(package):
        tones = {point for point in points if point in TONES and len(points) > 1}
        part = "plain" if not tones else "toned" if tones == {MEDIUM} else None
        text = name_of(points)
        if part and text:
            image = {"bytes": on_white(content, args.resolution), "path": None}
            parts[part].append({"image": image, "text": text, "code_points": "-".join(f"{p:x}" for p in points)})
    known = {row["text"] for row in parts["plain"]}
    parts["toned"] = [row for row in parts["toned"] if row["text"] in known]
    for part, rows in parts.items():
        folder = args.output_dir / part
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "emoji.parquet")
    counts = {part: len(rows) for part, rows in parts.items()}
    (args.output_dir / "README.md").write_text(README.format(side=args.resolution, **counts))
    print(f"{counts['plain']} pictures in {args.output_dir / 'plain'}, {counts['toned']} in toned")


if __name__ == "__main__":
    main()
