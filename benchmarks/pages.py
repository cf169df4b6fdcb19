"""Puts what was measured into pages that are otherwise written by hand."""

from __future__ import annotations


def filled(page: str, begin: str, end: str, text: str) -> str:
    """The page with the text between two marks, which stay.

    Raises:
        ValueError: where a mark is missing.

    >>> filled("a <!-- x --> old <!-- end --> b", "<!-- x -->", "<!-- end -->", "new")
    'a <!-- x -->\\nnew\\n<!-- end --> b'
    """
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the page has no {begin} ... {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
