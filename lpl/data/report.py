"""What will be trained on, in numbers and in words, before any model is there.

Sizes of all images come from the index (:mod:`lpl.data.catalogue`), captions from the data set's columns. Images are
*decoded* as training does, in worker processes: all of them, or ``DECODED`` evenly spaced ones of a large data set.
Which files are the same is known only if all of them are read.

An image that is smaller than its size in training is *enlarged*. Of an image the *cut* is the share of its pixels
outside the crop.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from lpl.data.buckets import Items
from lpl.data.catalogue import Catalogue
from lpl.data.dataset import TrainingImages
from lpl.data.fingerprint import spaced
from lpl.data.loader import watched_loader
from lpl.data.masks import picture_in
from lpl.data.reading import Picture
from lpl.data.source import data_folders
from lpl.data.timeouts import at_most
from lpl.tools.words import Rows, counted, first_line, percent, pixels


DECODED = 1000  # images of a data set, unless all are asked for
EXAMPLES, FREQUENT, NAMED, SIZES = 4, 12, 5, 16  # captions, words, files, and sizes in a table
SIDES = (0, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # pixels, between the bars of the sizes
BAR = 30  # characters of the longest bar
TAGS = 3  # captions with as many separators on average consist of tags
SHORT = 4  # letters; words with fewer say little
Facts = dict[str, Any]  # in JSON's types


@dataclass(frozen=True)
class Look:
    """What has been found out of the data.

    Args:
        known: sizes of all images; their digests, if all were read.
        held_out: number of images held out for validation.
        decoded: number of images that were decoded.
        bad: reasons of those that cannot be, by row.
        said: what the folder's reader leaves out or warns of.
    """

    images: TrainingImages
    known: Catalogue
    held_out: int = 0
    decoded: int = 0
    bad: Mapping[int, str] = field(default_factory=dict)
    said: Sequence[str] = ()

    @property
    def left(self) -> int:
        """Images that can be trained on, as far as is known."""
        unknown = np.flatnonzero((self.known.sizes == 0).any(1)).tolist()
        return len(self.known.sizes) - len({*unknown, *self.bad})

    def facts(self) -> Facts:
        """Everything, for a JSON file."""
        images = self.images
        return {
            "images": len(images.dataset),
            "samples_per_epoch": len(images),
            "held_out": self.held_out,
            "data_sets": [] if images.mixture is None else [list(entry) for entry in images.mixture.in_words()],
            "masks": mask_facts(images),
            "sizes": size_facts(self.known.sizes, items_of_all(images)),
            "buckets": bucket_facts(images),
            "captions": class_facts(images) if isinstance(images.empty_caption, int) else caption_facts(images),
            "files": self._files(),
            "warnings": list(self.said),
        }

    def _files(self) -> Facts:
        names = self.images.file_names(list(self.bad))
        bad = [{"row": row, "file": names[row], "reason": reason} for row, reason in self.bad.items()]
        same = same_files(self.known.digests)
        named = self.images.file_names([row for rows in same for row in rows])
        return {
            "decoded": self.decoded,
            "unreadable": bad,
            "same": [[named[row] or f"row {row}" for row in rows] for rows in same] if self.known.digests else None,
        }


# Sizes ---------------------------------------------------------------------------------------------------------------


def items_of_all(images: TrainingImages) -> Items:
    """The items of all images, also if all have one size."""
    if images.items is not None:
        return images.items
    rows = np.arange(len(images.dataset)) if images.mixture is None else images.mixture.rows
    return Items(rows, np.tile(np.array(images.data.size, np.int32), (len(rows), 1)))


def size_facts(sizes: np.ndarray, items: Items) -> Facts:
    """
    Args:
        sizes: height and width of each image, (N, 2); zeros where unknown.
    """
    known = sizes[(sizes > 0).all(1)].astype(np.int64)
    found: Facts = {"unknown": len(sizes) - len(known)}
    if not len(known):
        return found
    order = np.argsort(known.prod(1), kind="stable")
    places = {"smallest": 0, "median": len(order) // 2, "largest": -1}
    found |= {name: known[order[place]].tolist() for name, place in places.items()}
    bars = np.searchsorted(SIDES, np.sqrt(known.prod(1)), side="right") - 1
    counts = np.bincount(bars, minlength=len(SIDES))
    found["sides"] = {str(side): int(count) for side, count in zip(SIDES, counts)}
    height, width = known[:, 0], known[:, 1]
    found["shapes"] = {
        "portrait": int((height > width).sum()),
        "square": int((height == width).sum()),
        "landscape": int((height < width).sum()),
    }
    of_items = sizes[items.rows]
    usable = (of_items > 0).all(1)
    of_items, trained = of_items[usable].astype(np.float64), items.sizes[usable]
    scale = (trained / of_items).max(1)
    cut = 1 - trained.prod(1) / (of_items.prod(1) * scale**2)
    found["enlarged"] = int((scale > 1).sum())
    found["cut"] = {"mean": float(cut.mean()), "most": float(cut.max())} if len(cut) else {"mean": 0.0, "most": 0.0}
    return found


def bucket_facts(images: TrainingImages) -> Facts:
    items = items_of_all(images)
    buckets = [{"size": list(size), "samples": len(found)} for size, found in items.buckets.items()]
    return {"sizes": buckets, "left_out": len(items.left_out)}


def mask_facts(images: TrainingImages) -> Facts | None:
    """Where loss masks come from, and how many there are; None: it is not known before images are decoded."""
    if (column := images.data.mask_column) is None:
        return {"from": images.data.masks, "images": None} if images.data.masks else None
    rows = images.dataset.select_columns([column]).with_format("arrow")
    lacking = sum(cast(Any, batch)[column].null_count for batch in rows.iter(1000))
    return {"from": images.data.masks, "images": len(images.dataset) - lacking}


# Captions ------------------------------------------------------------------------------------------------------------


def caption_facts(images: TrainingImages) -> Facts:
    """Numbers of captions, with prefix and suffix but all tags in their order, and some as they are drawn."""
    captions: Counter[str] = Counter()
    several = missing = 0
    total = len(images.dataset)
    for found in tqdm(images.captions_at(), "reading captions", total, delay=2, leave=False):
        captions.update(cast(Sequence[str], found))
        several += len(found) > 1
        missing += not found
    lengths = np.repeat([len(caption.split()) for caption in captions], list(captions.values()))
    tags = are_tags(captions, images.data.tag_separator)
    return {
        "missing": missing,
        "several": several,
        "captions": captions.total(),
        "different": len(captions),
        "words": dict(zip(("shortest", "median", "longest"), _three(lengths))),
        "kind": "tags" if tags else "words",
        "frequent": frequent(captions, images.data.tag_separator if tags else None),
        "repeated": [[caption, count] for caption, count in captions.most_common(NAMED) if count > 1],
        "examples": [drawn_caption(images, item) for item in spaced(len(images), EXAMPLES)],
    }


def _three(lengths: np.ndarray) -> list[int]:
    """The least, the median and the most of some numbers."""
    return [int(np.quantile(lengths, share, method="nearest")) for share in (0, 0.5, 1)] if len(lengths) else []


def are_tags(captions: Counter[str], separator: str) -> bool:
    """Whether captions consist of tags, rather than of sentences."""
    separators = sum(caption.count(separator) * count for caption, count in captions.items())
    return separators >= TAGS * max(1, captions.total())


def frequent(captions: Mapping[str, int], separator: str | None, most: int = FREQUENT) -> list[list[Any]]:
    """Words, or what stands between separators, with the number of captions that have them; the ``most`` frequent."""
    counts: Counter[str] = Counter()
    for caption, count in captions.items():
        if separator is None:
            parts = {word for word in re.findall(r"[^\W_]+", caption.lower()) if len(word) >= SHORT}
        else:
            parts = {tag.strip() for tag in caption.split(separator)}
        for part in parts - {""}:
            counts[part] += count
    return [[part, count] for part, count in sorted(counts.items(), key=lambda found: (-found[1], found[0]))[:most]]


def drawn_caption(images: TrainingImages, item: int) -> str:
    """The caption of an item in the first epoch, in words."""
    data, draws, row = images.data, images.draws(0, item), images.row_of(item)
    if draws.drop < (data.proportion_empty_prompts or 0):
        return "(dropped)"
    try:
        found = images.caption(images.dataset[row], draws.choice, (0, item))
    except ValueError:
        return "(no caption)"
    return images.class_names.get(found, f"class {found}") if isinstance(found, int) else found


def class_facts(images: TrainingImages) -> Facts:
    """Numbers of images by class."""
    counts = Counter(label for found in images.captions_at() for label in cast(Sequence[int], found))
    missing, names = len(images.dataset) - counts.total(), images.class_names
    classes = [[names.get(label, str(label)), count] for label, count in sorted(counts.items())]
    return {"missing": missing, "classes": classes}


# Files ---------------------------------------------------------------------------------------------------------------


def same_files(digests: Sequence[str]) -> list[list[int]]:
    """Rows whose files have the same bytes.

    >>> same_files(["a", "b", "a", "", ""])
    [[0, 2]]
    """
    rows = defaultdict(list)
    for row, digest in enumerate(digests):
        rows[digest].append(row)
    return [found for digest, found in rows.items() if digest and len(found) > 1]


def read_item(images: TrainingImages, item: int, size: tuple[int, int] | None = None) -> Picture:
    """The image of an item; raises whatever makes it unreadable.

    Args:
        size: that it is read for; None: that of the item.
    """
    row, data = images.row_of(item), images.data
    with images.readings.noted(row), at_most(data.dataloader_timeout):
        values = images.dataset[row]
        images.caption(values)
        return picture_in(values, data, data_folders(data, images.cache_dir), size or images.size_of(item))


@dataclass
class _Reasons(TorchDataset[tuple[int, str]]):
    """Of an item its row, and why it cannot be read; empty if it can."""

    images: TrainingImages

    def __getitem__(self, item: int) -> tuple[int, str]:
        try:
            read_item(self.images, item)
        except Exception as error:  # broken files raise a dozen kinds
            return self.images.row_of(item), first_line(error)
        return self.images.row_of(item), ""


def unreadable(images: TrainingImages, items: Sequence[int]) -> dict[int, str]:
    """Decodes images in worker processes; returns the reasons of those that cannot be, by row.

    Raises:
        HungLoader: if a file cannot be read and its reading cannot be interrupted.
    """
    found = watched_loader(images, _Reasons, batch_size=None, sampler=list(items), collate_fn=tuple)
    bad = {}
    for _ in tqdm(items, desc="decoding", delay=2, leave=False, unit=" images"):
        row, reason = next(found)
        if reason:
            bad[row] = reason
    return bad


def items_to_decode(images: TrainingImages, everything: bool) -> list[int]:
    """One item of each row that is trained on: of all, or of DECODED rows."""
    first = np.unique(items_of_all(images).rows, return_index=True)[1]
    return [int(first[place]) for place in spaced(len(first), len(first) if everything else DECODED)]


# Words ---------------------------------------------------------------------------------------------------------------


def sections(facts: Facts, images: TrainingImages) -> dict[str, Rows]:
    """The facts as a table, see :func:`lpl.tools.words.table`."""
    found = {
        "Images": _image_rows(facts),
        "Sizes": _size_rows(facts["sizes"], facts["samples_per_epoch"]),
        "Trained at": _bucket_rows(facts["buckets"], facts["samples_per_epoch"], images),
        "Captions": (_class_rows if "classes" in facts["captions"] else _caption_rows)(facts["captions"]),
        "Files": _file_rows(facts["files"], facts["images"]),
    }
    if facts["warnings"]:
        found["Left out, and warnings"] = [(str(number), words) for number, words in enumerate(facts["warnings"], 1)]
    return found


def _image_rows(facts: Facts) -> Rows:
    rows = [("images", f"{facts['images']:,}")]
    rows += [(f"of {name}", words) for name, words in facts["data_sets"]]
    if facts["samples_per_epoch"] != facts["images"]:
        rows.append(("an epoch", f"{facts['samples_per_epoch']:,} samples"))
    if facts["held_out"]:
        rows.append(("held out", f"{counted(facts['held_out'], 'image')} besides, for validation"))
    if masks := facts["masks"]:
        count = masks["images"]
        rows.append(("masks", masks["from"] + ("" if count is None else f"; {count} of {facts['images']} have one")))
    return rows


def _size_rows(sizes: Facts, samples: int) -> Rows:
    rows = [(name, _size(sizes[name])) for name in ("smallest", "median", "largest") if name in sizes]
    if "sides" in sizes:
        rows.append(("shapes", ", ".join(f"{count} {name}" for name, count in sizes["shapes"].items() if count)))
        rows += _bars({_range(number): sizes["sides"][str(side)] for number, side in enumerate(SIDES)})
        words = f"{sizes['enlarged']:,} of {samples:,} samples, smaller than their size in training"
        rows.append(("enlarged", words if sizes["enlarged"] else "none"))
        cut = sizes["cut"]
        rows.append(("cut off", f"{percent(cut['mean'])} of the pixels on average, at most {percent(cut['most'])}"))
    if sizes["unknown"]:
        rows.append(("unknown", f"{counted(sizes['unknown'], 'image')} that cannot be opened"))
    return rows


def _size(size: Sequence[int]) -> str:
    """Height and width in words, and their nearest side of a square."""
    return f"{pixels(*size)} (height x width)" if size[0] != size[1] else pixels(*size)


def _range(number: int) -> str:
    """What a bar of the sides stands for."""
    if number == len(SIDES) - 1:
        return f"{SIDES[number]} px and more"
    return f"{SIDES[number]} to {SIDES[number + 1] - 1} px"


def _bars(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """A histogram, without the empty bars at both ends.

    >>> _bars({"a": 0, "b": 30, "c": 0, "d": 15, "e": 0})[::2]
    [('b', '############################## 30'), ('d', '############### 15')]
    """
    names = [name for name, count in counts.items() if count]
    inside = list(counts)[list(counts).index(names[0]) : list(counts).index(names[-1]) + 1]
    most = max(counts.values())
    return [(name, ("#" * -(-BAR * counts[name] // most) + f" {counts[name]}").strip()) for name in inside]


def _bucket_rows(buckets: Facts, samples: int, images: TrainingImages) -> Rows:
    data = images.data
    sizes = {pixels(*found["size"]): found["samples"] for found in buckets["sizes"]}
    shown = dict(list(sizes.items())[:SIZES])
    rows = _bars(shown) if len(sizes) > 1 else [(name, "all of them") for name in shown]
    if more := len(sizes) - len(shown):
        rest = samples - sum(shown.values())
        rows.append((f"{more} more", f"{counted(rest, 'sample')}"))
    if buckets["left_out"]:
        rows.append(("left out", f"{counted(buckets['left_out'], 'image')} smaller than all sizes"))
    crops = "at the centre" if data.center_crop else "at random"
    if data.crops_per_image and not data.center_crop:
        crops += f", {data.crops_per_image} for each image"
    return [*rows, ("crops", crops + (", half of them mirrored" if data.random_flip else ""))]


def _caption_rows(captions: Facts) -> Rows:
    rows = []
    if captions["captions"]:
        least, median, most = (captions["words"][name] for name in ("shortest", "median", "longest"))
        rows = [
            ("captions", f"{captions['captions']:,}, of which {captions['different']:,} different"),
            ("length", f"{least} to {most} words, median {median}" if most > least else counted(most, "word")),
        ]
    if captions["frequent"]:
        frequent = ", ".join(f"{part} ({count})" for part, count in captions["frequent"])
        rows.append((f"frequent {captions['kind']}", frequent))
    if captions["several"]:
        rows.append(("several", f"{counted(captions['several'], 'image')} with more than one, of which one is drawn"))
    if captions["missing"]:
        rows.append(("missing", f"{counted(captions['missing'], 'image')}, which others replace"))
    rows += [(f"{count} times", shortened(caption)) for caption, count in captions["repeated"]]
    return rows + [("drawn" if not place else "", shortened(text)) for place, text in enumerate(captions["examples"])]


def shortened(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _class_rows(captions: Facts) -> Rows:
    classes = captions["classes"]
    rows = [("classes", f"{len(classes)}, labels instead of captions")]
    rows += _bars(dict(map(tuple, classes[:FREQUENT]))) if classes else []
    if len(classes) > FREQUENT:
        rows.append((f"{len(classes) - FREQUENT} more", f"{sum(count for _, count in classes[FREQUENT:])} images"))
    if captions["missing"]:
        rows.append(("missing", f"{counted(captions['missing'], 'image')}, which others replace"))
    return rows


def _file_rows(files: Facts, images: int) -> Rows:
    decoded, bad, same = files["decoded"], files["unreadable"], files["same"]
    some = f"{decoded:,} of {images:,}, evenly spaced; --read_all decodes all of them"
    rows = [("looked at", some if same is None else "all of them")]
    rows.append(("unusable", f"{counted(len(bad), 'image')}, which others replace" if bad else "none of them"))
    rows += [("", f"{found['file'] or found['row']}: {shortened(found['reason'])}") for found in bad[:NAMED]]
    if len(bad) > NAMED:
        rows.append(("", f"and {len(bad) - NAMED} more; --json FILE lists all"))
    if same is None:
        return [*rows, ("duplicates", "not looked for; --read_all compares the bytes of all files")]
    extra = sum(map(len, same)) - len(same)
    words = f"{counted(extra, 'file')} with the bytes of another" if same else "none, by their bytes"
    rows.append(("duplicates", words))
    rows += [("", " = ".join(group[:NAMED]) + (" = ..." if len(group) > NAMED else "")) for group in same[:NAMED]]
    if len(same) > NAMED:
        rows.append(("", f"and {len(same) - NAMED} more groups; --json FILE lists all"))
    return rows
