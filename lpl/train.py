"""``lpl-train``: runs ``train_text_to_image_lpl.py``, which an installation has as a module beside ``lpl``."""

import runpy


def main() -> None:
    """Run the training script as a program, so that it checks its flags before the libraries are imported."""
    runpy.run_module("train_text_to_image_lpl", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
