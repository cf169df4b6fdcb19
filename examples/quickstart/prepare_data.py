"""Makes a small captioned data set of real photographs, without a network: about 1000 crops in 5 seconds on 2 cores.

The wheels of scikit-image and scikit-learn contain a few photographs. This script cuts square crops out of them,
scales the crops to 72 pixels (which leaves room for random 64-pixel crops in training) and writes an `imagefolder`
data set: `train/metadata.jsonl` with the columns `file_name` and `text`, and the PNG files. README.md in this folder
lists the sources and licences of the pictures.

    python examples/quickstart/prepare_data.py --output_dir quickstart/data
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image


FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


@dataclass(frozen=True)
class Subject:
    """What one picture shows, and where: crops of `sides` (smallest, largest) source pixels lie inside `window`."""

    source: str
    window: tuple[int, int, int, int]  # left, top, right, bottom; may extend beyond the picture
    sides: tuple[int, int]
    captions: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file inside the installed package, found without importing the package."""
        package, name = self.source.split("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{package} carries {name} and is not installed: pip install scikit-image scikit-learn")
        return Path(spec.submodule_search_locations[0]) / FOLDERS[package] / name


SUBJECTS = {
    "astronaut": Subject("skimage/astronaut.png", (40, 0, 430, 410), (250, 390),
                         ("an astronaut in an orange space suit", "a portrait of a smiling astronaut")),
    "shuttle": Subject("skimage/astronaut.png", (320, 0, 506, 280), (150, 186),
                       ("a space shuttle on the launch pad", "a white space shuttle with a brown tank")),
    "cat": Subject("skimage/chelsea.png", (90, 0, 451, 300), (190, 300),
                   ("a photo of a tabby cat", "the face of a ginger cat")),
    "coffee": Subject("skimage/coffee.png", (60, 0, 520, 400), (240, 400),
                      ("a cup of coffee on a saucer", "an espresso in a red cup on a wooden table")),
    "photographer": Subject("skimage/camera.png", (30, 40, 400, 480), (220, 370),
                            ("a photographer with a camera on a tripod", "a black and white photo of a photographer")),
    "coins": Subject("skimage/coins.png", (0, 0, 384, 303), (130, 240),
                     ("old coins on a dark cloth", "rows of ancient silver coins")),
    "color_wheel": Subject("skimage/color.png", (-10, -10, 381, 381), (310, 391),
                           ("a color wheel", "a wheel of all colors on black")),
    "grass": Subject("skimage/grass.png", (0, 0, 512, 512), (110, 220),
                     ("a texture of dry grass", "blades of grass in black and white")),
    "gravel": Subject("skimage/gravel.png", (0, 0, 512, 512), (110, 220),
                      ("a texture of gravel", "small grey stones")),
    "bricks": Subject("skimage/brick.png", (0, 0, 512, 512), (150, 320),
                      ("a wall of bricks", "a texture of grey bricks")),
    "horse": Subject("skimage/horse.png", (-5, -40, 405, 370), (310, 410),
                     ("the black silhouette of a horse", "a drawing of a horse in black")),
    "galaxies": Subject("skimage/hubble_deep_field.jpg", (0, 0, 1000, 872), (200, 420),
                        ("distant galaxies in deep space", "stars and galaxies in a black sky")),
    "tissue": Subject("skimage/ihc.png", (0, 0, 512, 512), (180, 360),
                      ("tissue under a microscope", "stained cells under the microscope")),
    "moon": Subject("skimage/moon.png", (20, 0, 470, 270), (150, 260),
                    ("craters on the moon", "the grey surface of the moon")),
    "motorcycle": Subject("skimage/motorcycle_left.png", (30, 20, 700, 490), (320, 470),
                          ("a red motorcycle in a garage", "a photo of a motorcycle")),
    "page": Subject("skimage/page.png", (0, 0, 384, 170), (80, 130),
                    ("printed text on a page", "a page of a book")),
    "retina": Subject("skimage/retina.jpg", (0, 0, 1411, 1411), (850, 1411),
                      ("the retina of a human eye", "blood vessels on a red retina")),
    "rocket": Subject("skimage/rocket.jpg", (150, 60, 490, 427), (210, 340),
                      ("a rocket on the launch pad at dusk", "a rocket before launch, lit by lamps")),
    "pagoda": Subject("sklearn/china.jpg", (90, 20, 510, 427), (260, 400),
                      ("a chinese pagoda above the trees", "a temple by a lake")),
    "dahlia": Subject("sklearn/flower.jpg", (130, 50, 490, 410), (190, 340),
                      ("an orange dahlia", "a flower in front of dark green leaves")),
}  # fmt: skip


def load_window(subject: Subject) -> Image.Image:
    """The window of the subject as RGB, padded outside the picture with the colour of its top left corner."""
    picture = Image.open(subject.path).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    left, top, right, bottom = subject.window
    canvas = Image.new("RGB", (right - left, bottom - top), picture.getpixel((0, 0)))
    canvas.paste(picture, (-left, -top))
    return canvas


def boxes(subject: Subject, count: int) -> Iterator[tuple[float, float, float, float]]:
    """Square boxes inside the window, in its pixels, that cover scales and places evenly.

    The k-th point of the R3 sequence (k times the powers of 1 / 1.2207, modulo one; 1.2207 is the root of x^4 = x + 1)
    gives size, x and y: evenly spread for every count, and with no random generator the same on every machine.
    """
    left, top, right, bottom = subject.window
    smallest, largest = subject.sides
    for k in range(1, count + 1):
        u, v, w = (k * 1.2207440846057596**-power % 1 for power in (1, 2, 3))
        side = smallest + u * (largest - smallest)
        x, y = v * (right - left - side), w * (bottom - top - side)
        yield x, y, x + side, y + side


def write_dataset(folder: Path, crops: int, size: int) -> int:
    """Writes the crops of all subjects and their captions, in turn, and returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, subject in SUBJECTS.items():
        window = load_window(subject)
        for k, box in enumerate(boxes(subject, crops)):
            file_name = f"{name}_{k:03d}.png"
            window.resize((size, size), Image.Resampling.LANCZOS, box=box).save(folder / file_name)
            rows.append({"file_name": file_name, "text": subject.captions[k % len(subject.captions)]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def write_contact_sheet(folder: Path, path: Path, columns: int = 12) -> None:
    """One row of crops per subject, to look at."""
    tiles = [sorted(folder.glob(f"{name}_*.png"))[:columns] for name in SUBJECTS]
    size = Image.open(tiles[0][0]).width
    sheet = Image.new("RGB", (size * columns, size * len(tiles)))
    for row, files in enumerate(tiles):
        for column, file in enumerate(files):
            sheet.paste(Image.open(file), (column * size, row * size))
    sheet.save(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for `train/` and a contact sheet.")
    parser.add_argument("--crops", type=int, default=52, help="Crops per subject (default: %(default)s).")
    parser.add_argument("--size", type=int, default=72, help="Side of a crop in pixels (default: %(default)s).")
    args = parser.parse_args()
    if args.crops < 1 or args.size < 1:
        parser.error(f"--crops and --size have to be positive, not {args.crops} and {args.size}")
    return args


def main() -> None:
    args = parse_args()
    count = write_dataset(args.output_dir / "train", args.crops, args.size)
    write_contact_sheet(args.output_dir / "train", args.output_dir.with_name(f"{args.output_dir.name}_contacts.png"))
    print(f"{count} crops of {len(SUBJECTS)} subjects in {args.output_dir}")


if __name__ == "__main__":
    main()
