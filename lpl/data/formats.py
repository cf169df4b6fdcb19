"""Image formats: those that PIL decodes itself, HEIC where pillow-heif is installed, and what to do about the others.

AVIF is in PIL's own builds from 11.3 on; where it is not, pillow-avif-plugin adds it. Of an animated file or one with
several pages the first frame is read, as PIL opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from PIL import Image


Image.init()  # registers all of PIL's formats
with suppress(ImportError):
    import pillow_heif

    pillow_heif.options.DECODE_THREADS = 1  # the loader has processes for that
    pillow_heif.register_heif_opener()
if "AVIF" not in Image.OPEN:
    with suppress(ImportError):
        import pillow_avif  # type: ignore[import-not-found]  # noqa: F401  # registers itself

FORMATS = [kind for kind in Image.ID if kind != "EPS"]  # an EPS file is a program, which PIL runs in Ghostscript
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
PACKAGES = {  # what reads formats that PIL may lack
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow-avif-plugin"),
}
NOT_READ = {  # pictures that nothing here decodes, and films
    *(".jxl", ".svg", ".eps", ".ps", ".ai", ".pdf", ".exr", ".hdr"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi"),
}


def not_read(counts: Mapping[str, int]) -> list[str]:
    """What to do about the pictures of a folder that are not read.

    Args:
        counts: numbers of files by suffix, in lower case.
    """
    advice: dict[str, list[str]] = {}
    for suffix in sorted(counts.keys() - SUFFIXES):
        if suffix in PACKAGES:
            advice.setdefault(f"pip install {PACKAGES[suffix]}, which reads them", []).append(suffix)
        elif suffix in NOT_READ:
            advice.setdefault("convert them to .png or .jpg", []).append(suffix)
    return [
        f"files of kinds that are not read ({', '.join(f'{counts[suffix]} {suffix}' for suffix in suffixes)}); {what}"
        for what, suffixes in advice.items()
    ]
