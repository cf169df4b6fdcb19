"""What a run will need, and why it ended.

``plan.py`` knows a run before its first step, ``needs.py`` its sizes and the disk that it needs, ``dry_run.py`` the
time and memory of real steps. ``for_gpu.py`` reports those of a GPU that is not there, which ``estimate.py`` counts
(``counting.py``) on models ``without_weights.py``, with FSDP2 in ``shards.py``. ``status.py`` is what a run is doing,
``failures.py`` explains the error that ends it, ``remedies.py`` names the flags that need less memory.

May import ``lpl.training`` and below, never publishing or evaluation. A new remedy is one row of the table in
``remedies.py``. Tests: ``tests/diagnosis``.
"""
