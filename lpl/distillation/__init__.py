"""Making a student of a VAE's decoder, which stands in for the latent perceptual loss at a small part of its cost.

``command.py`` is ``python -m lpl.distill``; ``pairs.py`` makes what the student learns from: latents, estimates of
them, and LPL with its gradient there; ``fit.py`` trains the student and measures it on held-out images; ``report.py``
writes its card and its picture. The network itself is ``lpl/student.py``. May import: all but ``lpl.diagnosis`` and
``lpl.evaluation``. A new kind of error is one function in ``pairs.py``. Tests: ``tests/distillation``.
"""
