"""The same training with and without the latent perceptual loss, measured against held-out images.

``command.py`` is ``python -m lpl.compare``; ``runs.py`` has the runs: their command lines, and how one is started,
interrupted and resumed; ``measures.py`` has the numbers, their differences and the verdict; ``report.py`` writes the
page and the picture. May import all rooms. A new measure is one line of :func:`lpl.comparison.measures.measures_of`.
Tests: ``tests/comparison``.
"""
