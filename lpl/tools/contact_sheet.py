"""A contact sheet: pictures in a grid, each whole, with a frame drawn in and words below.

A *tile* is one picture with what is drawn of it. Its *frame* is a part of the picture, (left, top, right, bottom) as
shares of its sides; what lies outside fades. Its *veil* is tinted, where a mask is black.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

from lpl.tools.pictures import INK, PAPER, text_image


SIDE = 240  # pixels, of the square that each picture is fitted into
COLUMNS = 6
GAP, MARGIN = 20, 28  # pixels between tiles, and around all of them
FADED = 0.72  # share of paper where a picture fades
TINTED = 0.5  # share of the tint
TINT, FRAME, SHADOW, GREY, ALERT = "#d0006f", "#ffc400", "#000000", "#777777", "#b45309"
TITLE, WORDS, SMALL = 22, 14, 12  # pixels, font sizes


class Tile(NamedTuple):
    """One picture of the sheet.

    Args:
        image: RGB; None: it cannot be read, and ``caption`` says why.
        mask: L, of the image's size; black parts are tinted.
        badge: in the lower left corner.
        alert: whether the badge warns of something.
        name: of the file, above the caption.
    """

    image: Image.Image | None
    name: str
    caption: str
    badge: str = ""
    alert: bool = False
    frame: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mask: Image.Image | None = None


def contact_sheet(tiles: Sequence[Tile], title: str, legend: Sequence[tuple[str, str]]) -> Image.Image:
    """Draws tiles in rows, under a title and the meanings of the colours.

    Args:
        legend: colours and what they mean.
    """
    columns = max(1, min(COLUMNS, len(tiles)))
    width = max(2 * MARGIN + columns * (SIDE + GAP) - GAP, 640)
    head = _head(title, legend, width - 2 * MARGIN)
    rows = [[_drawn(tile) for tile in tiles[first : first + columns]] for first in range(0, len(tiles), columns)]
    strips = [_row(row, width) for row in rows]
    height = 2 * MARGIN + head.height + sum(GAP + strip.height for strip in strips)
    sheet = Image.new("RGB", (width, height), PAPER)
    sheet.paste(head, (MARGIN, MARGIN))
    top = MARGIN + head.height + GAP
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    return sheet


def _head(title: str, legend: Sequence[tuple[str, str]], width: int) -> Image.Image:
    name = text_image(title, TITLE, width, align="left", lines=2)
    meanings = [(colour, text_image(words, WORDS, width // 2, align="left", lines=1)) for colour, words in legend]
    head = Image.new("RGB", (width, name.height + 12 + 24 * bool(meanings)), PAPER)
    head.paste(name, (0, 0))
    left, top, draw = 0, name.height + 12, ImageDraw.Draw(head)
    for colour, words in meanings:
        draw.rectangle((left, top + 2, left + 13, top + 15), fill=colour, outline=GREY)
        head.paste(words, (left + 20, top))
        left += 20 + words.width + 2 * GAP
    return head


def _row(tiles: Sequence[tuple[Image.Image, Image.Image]], width: int) -> Image.Image:
    """Pictures on one line, with their words below."""
    pictures, words = max(picture.height for picture, _ in tiles), max(text.height for _, text in tiles)
    strip = Image.new("RGB", (width, pictures + 8 + words), PAPER)
    for place, (picture, text) in enumerate(tiles):
        left = MARGIN + place * (SIDE + GAP)
        strip.paste(picture, (left, pictures - picture.height))
        strip.paste(text, (left, pictures + 8))
    return strip


def _drawn(tile: Tile) -> tuple[Image.Image, Image.Image]:
    """The picture, SIDE wide, and its words."""
    name = text_image(tile.name, SMALL, SIDE, align="left", lines=1, colours=(GREY, PAPER))
    colours = (ALERT if tile.image is None else INK, PAPER)
    caption = text_image(tile.caption, WORDS, SIDE, align="left", lines=4, colours=colours)
    words = Image.new("RGB", (SIDE, name.height + 4 + caption.height), PAPER)
    words.paste(name, (0, 0))
    words.paste(caption, (0, name.height + 4))
    return _picture(tile), words


def _picture(tile: Tile) -> Image.Image:
    if tile.image is None:
        empty = Image.new("RGB", (SIDE, SIDE), "#f4f4f4")
        draw = ImageDraw.Draw(empty)
        for line in ((0, 0, SIDE, SIDE), (0, SIDE, SIDE, 0)):
            draw.line(line, fill="#dddddd", width=2)
        return empty
    scale = SIDE / max(tile.image.size)
    width, height = (max(1, round(side * scale)) for side in tile.image.size)
    image = tile.image.resize((width, height), Image.Resampling.LANCZOS)
    if tile.mask is not None:
        share = ImageChops.invert(tile.mask.resize(image.size)).point([round(TINTED * level) for level in range(256)])
        image.paste(Image.new("RGB", image.size, TINT), mask=share)
    canvas = Image.new("RGB", (SIDE, height), PAPER)
    left = (SIDE - width) // 2
    canvas.paste(Image.blend(image, Image.new("RGB", image.size, PAPER), FADED), (left, 0))
    first, top, last, bottom = (round(share * side) for share, side in zip(tile.frame, (width, height) * 2))
    canvas.paste(image.crop((first, top, last, bottom)), (left + first, top))
    _frame(canvas, (left + first, top, left + last - 1, bottom - 1))
    if tile.badge:
        colours = (PAPER, ALERT) if tile.alert else (PAPER, INK)
        words = text_image(tile.badge, SMALL, SIDE, lines=1, colours=colours)
        badge = Image.new("RGB", (words.width + 10, words.height + 6), colours[1])
        badge.paste(words, (5, 2))
        canvas.paste(badge, (min(left + 4, SIDE - badge.width), max(0, height - 4 - badge.height)))
    return canvas


def _frame(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """A bright line between dark ones, which shows on any picture."""
    draw = ImageDraw.Draw(image)
    for inset, colour in enumerate((SHADOW, FRAME, FRAME, SHADOW)):
        left, top, right, bottom = box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset
        if right > left and bottom > top:
            draw.rectangle((left, top, right, bottom), outline=colour)
