"""Work that is shared: each process does a part of it, and all get all results. Two real processes, forked."""

import json
import logging
import os

import numpy as np
import pytest
from accelerate import PartialState, debug_launcher
from PIL import Image
from tiny import tiny_image_folder

from lpl.evaluation import Preprocessing, folder_images, spectrum_of
from lpl.evaluation import processes as shared
from lpl.evaluation.processes import everywhere, in_parts, processes, threaded


def doubled(count):
    """All results of doubling so many numbers, and which of them this process has computed."""
    computed = []

    def double(mine):
        computed.extend(mine)
        return [2 * index for index in mine]

    return in_parts(count, double), computed


def work(folder):
    """All that this process gets, and which parts of it are its own."""
    opened, real = [], Image.open
    Image.open = lambda file, *more, **kwargs: opened.append(os.path.basename(file)) or real(file, *more, **kwargs)
    images = folder_images(folder, Preprocessing(24), progress=False)
    files, opened[:] = sorted(opened), []
    spectrum = spectrum_of(images)
    Image.open = real
    return {
        "everywhere": everywhere(processes().process_index),
        "shares": {str(count): doubled(count) for count in (0, 1, 2, 7)},
        "files": files,
        "again": sorted(opened),
        "captions": images.captions,
        "digests": [images.digest(index) for index in range(len(images))],
        "enlarged": images.enlarged,
        "log_power": spectrum.log_power.tolist(),
        "energy": spectrum.high_frequency_energy,
    }


def one_of_two(folder, output):
    PartialState._reset_state()  # the parent's, which was the only process
    processes()
    (output / f"{processes().process_index}.json").write_text(json.dumps(work(folder)))
    threaded(str, range(3), f"bar of process {processes().process_index}")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven pictures, one of them broken and one of 16 pixels."""
    folder = tiny_image_folder(tmp_path_factory.mktemp("images"), count=7)
    next(folder.glob("003-*")).write_text("no image")
    small = next(folder.glob("002-*"))
    Image.open(small).resize((16, 16)).save(small)
    return folder


def test_two_processes_share_the_work_and_get_all_of_it(images, tmp_path, capfd):
    debug_launcher(one_of_two, args=(images, tmp_path), num_processes=2)
    said = capfd.readouterr().err
    assert "bar of process 0" in said and "bar of process 1" not in said
    both = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1)]
    alone = work(images)
    names = [file.name for file in sorted(images.glob("0*"))]
    for number, found in enumerate(both):
        assert found["everywhere"] == [0, 1]
        for count, (results, computed) in found["shares"].items():
            assert results == [2 * index for index in range(int(count))] == alone["shares"][count][0]
            assert computed == list(range(number, int(count), 2))
        assert found["files"] == names[number::2]
        readable = names[:3] + names[4:]
        assert found["again"] == readable[number::2]
        for name in ("captions", "digests", "enlarged"):
            assert found[name] == alone[name]
        assert np.array_equal(found["log_power"], alone["log_power"]) and found["energy"] == alone["energy"]
    assert len(alone["captions"]) == 6 and alone["enlarged"] == 1 and alone["files"] == names


def test_the_only_process_does_all(monkeypatch):
    monkeypatch.setattr(shared, "gather_object", lambda value: pytest.fail("nobody else is there"))
    assert doubled(3) == ([0, 2, 4], [0, 1, 2])
    assert everywhere("a") == ["a"]


def test_threads_keep_the_order_and_pass_errors_on(caplog, capfd):
    with caplog.at_level(logging.WARNING):
        assert threaded(lambda number: number**2, range(50)) == [number**2 for number in range(50)]
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        threaded(lambda number: 1 / number, [1, 0])
