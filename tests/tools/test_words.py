"""Numbers in words."""

import pytest

from lpl.tools.words import duration, short_count, size


@pytest.mark.parametrize(
    "words, value, said",
    [
        (duration, 41.4, "41 s"),
        (duration, 90, "2 min"),
        (duration, 3599, "1 h 0 min"),
        (duration, 9000, "2 h 30 min"),
        (duration, 50 * 3600, "2 days 2 h"),
        (size, 1023, "1023 bytes"),
        (size, 1536, "1.5 KiB"),
        (size, 3 * 2**30, "3.0 GiB"),
        (size, 2.5 * 2**40, "2.5 TiB"),
        (short_count, 999, "999"),
        (short_count, 859_500_000, "859.50M"),
        (short_count, 12_000_000_000, "12.00B"),
    ],
)
def test_numbers_in_words(words, value, said):
    assert words(value) == said
