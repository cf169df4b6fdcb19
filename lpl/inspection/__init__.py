"""Looking into a VAE: what the latent perceptual loss sees in it and in your images, before a training run.

``command.py`` is ``python -m lpl.inspect``; ``vae.py`` finds and loads the VAE, ``measure.py`` (:class:`Inspector`)
takes the measurements, ``advice.py`` summarises them and derives flags from them, ``figures.py`` draws them. May
import: the paper, ``lpl.config``, ``lpl.families``, ``lpl.data``, ``lpl.tools``. A new measurement is one method of
:class:`Inspector`, one part of :func:`lpl.inspection.advice.summary` and one figure. Tests: ``tests/inspection``.
"""
