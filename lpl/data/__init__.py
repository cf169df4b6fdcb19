"""Training data, and every random number of a sample.

Sources: ``source.py`` loads a data set, ``places.py`` finds it, ``folder.py`` lists a folder of images, ``texts.py``
and ``metadata.py`` read its captions, ``captioned.py`` makes a data set of it, ``mixture.py`` joins several. A sample:
``formats.py`` says which files are images, ``reading.py`` reads one, ``masks.py`` its loss mask, ``captions.py`` its
caption; ``dataset.py`` makes samples and batches, ``streaming.py`` does the same for --streaming, ``loader.py`` runs
worker processes, ``timeouts.py`` gives up slow files, ``bad_samples.py`` lists unreadable ones. Order: ``order.py``
holds it and the keyed generators, ``buckets.py`` that of several sizes. On the disk: ``index.py`` keeps what was found
of files, ``catalogue.py`` sizes and digests of images, ``cache.py`` and ``store.py`` latents and embeddings,
``fingerprint.py`` identifies a data set. ``command.py`` is ``python -m lpl.data``, ``report.py`` its table,
``sheet.py`` its contact sheet.

May import the paper (``lpl/*.py``), ``lpl.config`` and ``lpl.tools``. A newcomer may add a source or a reader; the
generators' keys (seed, epoch, index, stream) and the order of draws must not change. Tests: ``tests/data``.
"""
