"""Tools: files, pictures, words, the machine, the process. Nothing here knows diffusion, and nothing imports our code.

``files.py`` writes files atomically, ``headers.py`` metadata of weights; ``pictures.py`` draws grids and curves;
``words.py`` formats numbers and tables; ``privacy.py`` decides what may be public; ``trust.py`` refuses pickles and
foreign code; ``machine.py`` knows memory, disk and devices; ``process.py`` ends a process; ``console.py`` hushes the
libraries; ``layout.py`` has every name in an output folder, once. Add a helper here only if two rooms need it. Tests:
``tests/tools``.
"""
