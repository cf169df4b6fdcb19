"""Builds the site from README, docs/ and the files that they link to, without copies of any page (``make site``).

mkdocs reads one folder; here every page keeps its place in the repository, so that its links are the same on GitHub
and on the site. Links to a folder lead to its README. Formulas become MathML, which browsers draw without a script.
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)([^)]*)\)")


def destination(page: Path, target: str) -> Path:
    """The file that a link of a page leads to; of a folder, its README, which need not exist."""
    place = (page.parent / target).resolve()
    return place / "README.md" if place.is_dir() else place


def on_files(files, config):
    """README, the pages in docs/, and what they link to, in place of one folder's files."""
    wanted, todo = set(), [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/site/extra.css"]
    while todo:
        place = todo.pop()
        if place in wanted or not place.is_file() or not place.is_relative_to(ROOT):
            continue
        wanted.add(place)
        if place.suffix == ".md":
            todo += [destination(place, target) for _, target, _ in LINK.findall(place.read_text(encoding="utf-8"))]
    own = [
        File(str(place.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls)
        for place in sorted(wanted)
    ]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *own])


def on_page_markdown(markdown, page, **_):
    """Links to folders lead to their README, or are words where there is none."""
    source = Path(page.file.abs_src_path)

    def led(match):
        words, target, rest = match.groups()
        place = destination(source, target)
        if not (source.parent / target).is_dir():
            return match[0]
        return f"[{words}]({os.path.relpath(place, source.parent)}{rest})" if place.is_file() else words

    return LINK.sub(led, markdown)


def on_page_content(content, **_):
    """Formulas, which pymdownx.arithmatex has marked, as MathML."""

    def drawn(match):
        formula = html.unescape(match[2])[2:-2]  # without \( \) or \[ \]
        return convert(formula, display="block" if match[1] == "div" else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', drawn, content, flags=re.DOTALL)
