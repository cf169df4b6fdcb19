"""One run, from its start to its result.

``start.py`` starts or resumes it, ``loading.py`` loads the pipeline, ``parts.py`` is what is trained, ``average.py``
its EMA, ``lora.py`` its adapters; ``losses.py`` and ``updates.py`` are one step; ``log.py``, ``validation.py``,
``sampling.py``, ``checkpoints.py``, ``pauses.py``, ``preemption.py`` and ``skipped_steps.py`` go with it;
``preflight.py`` refuses what this machine cannot run; ``result.py`` and ``provenance.py`` are what it leaves.
May import: data, families, and what they may. A new optimizer is one branch of ``updates.make_optimizer``.
Tests: ``tests/training``; whole runs: ``tests/runs``.
"""
