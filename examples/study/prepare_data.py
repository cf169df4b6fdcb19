"""Cuts the study's pictures into three parts that share no pixel: for training, as the reference, for the features.

Every photograph and texture of scikit-image and scikit-learn is divided into square *cells*; each cell belongs to one
*part* (`train`, `reference`, `features`), in a pattern that spreads all parts over the picture. Crops lie inside
cells. Each picture is a class: its label is its place in PICTURES.

    python examples/study/prepare_data.py --output_dir study/data
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
PICTURES = {  # pixels that a cell's side has: as large as three parts leave room for
    "skimage/astronaut.png": 128,
    "skimage/brick.png": 128,
    "skimage/camera.png": 128,
    "skimage/cell.png": 110,
    "skimage/chelsea.png": 75,
    "skimage/clock_motion.png": 75,
    "skimage/coffee.png": 100,
    "skimage/coins.png": 75,
    "skimage/grass.png": 128,
    "skimage/gravel.png": 128,
    "skimage/hubble_deep_field.jpg": 145,
    "skimage/ihc.png": 128,
    "skimage/moon.png": 128,
    "skimage/motorcycle_left.png": 122,
    "skimage/page.png": 64,
    "skimage/retina.jpg": 200,
    "skimage/rocket.jpg": 106,
    "skimage/text.png": 86,
    "sklearn/china.jpg": 106,
    "sklearn/flower.jpg": 106,
}
PATTERN = ("train", "reference", "train", "features")  # of the cells along a row; each row begins one further on
CROPS = {"train": 140, "reference": 64, "features": 100}  # of each picture
SMALLEST = 0.6  # side of a crop, of its cell's
SIZE = 72  # pixels; the autoencoder and the feature network take 64 of them, the others scale them to 64


def read(source: str) -> Image.Image:
    package, name = source.split("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} carries {name} and is not installed: pip install scikit-image scikit-learn")
    return Image.open(Path(spec.submodule_search_locations[0], FOLDERS[package], name)).convert("RGB")


def cells(size: tuple[int, int], side: int) -> dict[str, list[tuple[int, int]]]:
    """Left and top of each part's cells.

    >>> cells((256, 128), 128)
    {'train': [(0, 0)], 'reference': [(128, 0)], 'features': []}
    """
    found: dict[str, list[tuple[int, int]]] = {part: [] for part in CROPS}
    for row in range(size[1] // side):
        for column in range(size[0] // side):
            found[PATTERN[(row + column) % len(PATTERN)]].append((column * side, row * side))
    return found


def write_part(folder: Path, part: str) -> int:
    """An imagefolder with the columns `file_name`, `text` (the picture's name) and `label`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for label, (source, side) in enumerate(tqdm(PICTURES.items(), desc=part)):
        picture, random = read(source), np.random.default_rng([label, sorted(CROPS).index(part)])
        places = cells(picture.size, side)[part]
        name = Path(source).stem
        for number in range(CROPS[part]):
            left, top = places[number % len(places)]
            cell = picture.crop((left, top, left + side, top + side))  # resizing looks beyond its box
            crop = random.uniform(SMALLEST * side, side)
            x, y = random.uniform(0, side - crop, 2)
            file = f"{name}_{number:03d}.png"
            box = (x, y, x + crop, y + crop)
            cell.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box).save(folder / file)
            rows.append({"file_name": file, "text": name, "label": label})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    for part in CROPS:  # `train/` inside, where the quickstart's autoencoder looks for pictures
        count = write_part(args.output_dir / part / "train", part)
        print(f"{args.output_dir / part}: {count} crops of {len(PICTURES)} pictures")


if __name__ == "__main__":
    main()
