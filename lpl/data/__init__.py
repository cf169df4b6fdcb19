"""Training data, and every random number of a sample.

``source.py`` loads a data set, ``folder.py`` a folder of images, ``formats.py`` says which files are images,
``reading.py`` reads one image, ``masks.py`` its loss mask, ``captions.py`` its caption; ``order.py`` holds the keyed
generators and the order, ``buckets.py`` sizes and their order, ``catalogue.py`` what is known of each image,
``cache.py`` and ``store.py`` cached latents and embeddings; ``dataset.py`` makes samples and batches, ``streaming.py``
does the same for --streaming, ``loader.py`` runs worker processes, ``timeouts.py`` gives up slow files,
``bad_samples.py`` lists unreadable ones, ``fingerprint.py`` identifies a data set; ``command.py`` is ``python -m
lpl.data``, ``report.py`` its table, ``sheet.py`` its contact sheet. May import the paper (``lpl/*.py``),
``lpl.config`` and ``lpl.tools``. A newcomer may add a source or a reader; the generators' keys
(seed, epoch, index, stream) and the order of draws must not change. Tests: ``tests/data``.
"""
