"""Commands that are refused or warned of, and pipelines whose configuration is changed."""

import json
import shutil
import warnings

import pytest
from trainer import parsed, resolved


def refusal(capsys, words):
    """The message of a refused command: one sentence."""
    with pytest.raises((SystemExit, ValueError)) as error:
        resolved(words)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        message = capsys.readouterr().err.rpartition("error: ")[2]
    else:
        message = str(error.value)
    assert message and "\n" not in message.strip()
    return message


def warned(pipeline, images, output_dir, /, **flags):
    """The warnings of an accepted command that name a flag."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parsed(pipeline, images, output_dir, **flags)
    return [text for warning in caught if "--" in (text := str(warning.message))]


def cases(*rows):
    return [pytest.param(flags, words, id=" ".join(f"{k}={v}" for k, v in flags.items())) for flags, words in rows]


def edited(source, target, part, **changes):
    """A copy of a pipeline with another configuration of a part, or another index (part None)."""
    shutil.copytree(source, target)
    name = {None: "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(part, f"{part}/config.json")
    config = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(config | changes))
    return target
