"""Coverage-guided fuzzing of image files, by hand: each gives pixels, or is a bad sample.

    pip install atheris
    HF_HUB_OFFLINE=1 python tests/support/fuzz_images.py -max_total_time=600 -timeout=20 -rss_limit_mb=4096 [CORPUS]

The arguments are libFuzzer's; CORPUS is a folder where files that reach new code are kept from run to run. What breaks
is written into the working directory as crash-... and tried again by `python tests/support/fuzz_images.py crash-...`.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    import atheris  # which nothing else needs

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    with atheris.instrument_imports(include=["PIL", "lpl.data", "lpl.tools.pictures"], enable_loader_override=False):
        from PIL import Image

        import lpl.data.dataset  # noqa: F401
    from tests.runs.test_properties import FILES, is_read

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    Image.MAX_IMAGE_PIXELS = 1_000_000  # what a broken head claims is allocated before it is found out
    given = [Path(word) for word in sys.argv[1:] if not word.startswith("-")]
    again = any(path.is_file() for path in given)
    with tempfile.TemporaryDirectory() as seeds:
        for name, content in FILES.items():
            Path(seeds, name).write_bytes(content)
        for path in [] if again else given:
            path.mkdir(parents=True, exist_ok=True)
        atheris.Setup([*sys.argv, *([] if again else [seeds])], lambda content: is_read(content) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
