"""The contact sheet of a data set: some images, each whole, with the crop of the first epoch, loss mask and caption.

A mirrored sample is shown as its file is, with the crop where it lies in it.
"""

from __future__ import annotations

from PIL import Image

from lpl.data.dataset import TrainingImages
from lpl.data.fingerprint import spaced
from lpl.data.reading import Picture, place_of
from lpl.data.report import drawn_caption, read_item
from lpl.tools.contact_sheet import ALERT, FRAME, SIDE, TINT, Tile, contact_sheet
from lpl.tools.words import counted, first_line, pixels


def sheet_of(images: TrainingImages, name: str, count: int) -> Image.Image:
    """A sheet of ``count`` evenly spaced items."""
    items = spaced(len(images), count)
    total = counted(len(images), "sample")
    which = total if len(items) == len(images) else f"{len(items)} of {total}, evenly spaced"
    tiles = [tile_of(images, item) for item in items]
    legend = [(FRAME, "what is trained on: the crop of the first epoch")]
    if images.data.masks:
        legend.append((TINT, "outside the loss mask"))
    if any(tile.alert for tile in tiles):
        legend.append((ALERT, "enlarged, since it is smaller than its size in training"))
    return contact_sheet(tiles, f"{name}: {which}", legend)


def tile_of(images: TrainingImages, item: int) -> Tile:
    """An item, read at the size that it is shown at."""
    name = images.file_names([images.row_of(item)])[images.row_of(item)] or f"row {images.row_of(item)}"
    try:
        picture = read_item(images, item, (SIDE, SIDE))
    except Exception as error:  # broken files raise a dozen kinds
        return Tile(None, name, f"left out: {first_line(error)}")
    left, top, right, bottom = map(round, picture.box)
    shown = picture.image.crop((left, top, right, bottom))
    height, width = images.size_of(item)
    scale = max(height / picture.height, width / picture.width)
    enlarged = f", x {scale:.2g}" if scale > 1 else ""
    return Tile(
        image=shown.convert("RGB"),
        name=f"{name}  {pixels(picture.height, picture.width)}",
        caption=drawn_caption(images, item),
        badge=pixels(height, width) + enlarged,
        alert=scale > 1,
        frame=frame_of(images, item, picture),
        mask=shown.getchannel(3) if len(shown.getbands()) > 3 else None,
    )


def frame_of(images: TrainingImages, item: int, picture: Picture) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the crop, as shares of the image's sides."""
    size, draws = images.size_of(item), images.draws(0, item)
    top, left = place_of(picture.height, picture.width, size, draws.shares)
    scale = max(size[0] / picture.height, size[1] / picture.width)
    down, across = picture.height * scale, picture.width * scale
    if draws.flip:
        left = across - left - size[1]
    edges = left / across, top / down, (left + size[1]) / across, (top + size[0]) / down
    return tuple(min(max(edge, 0.0), 1.0) for edge in edges)  # type: ignore[return-value]
