"""What a run's numbers depend on besides its flags, and how that differs where its recipe is run again.

A recipe records these facts under ``measured``; ``config.rerun_of`` has those of the recipe that a run started from.
"""

from __future__ import annotations

import logging
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import PIL
from datasets import Dataset, IterableDataset
from huggingface_hub import try_to_load_from_cache

from lpl import __version__
from lpl.config import Config
from lpl.config.recipes import recipe_text
from lpl.data.fingerprint import data_facts, other_data, shard_paths
from lpl.tools import layout
from lpl.tools.files import write_text
from lpl.tools.privacy import hub_file, is_hub_id
from lpl.tools.words import counted
from lpl.training.base_model import identity
from lpl.training.start import Run


logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes; those not installed are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


MODELS = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "lpl_vae_name_or_path"),
    *("single_file_config", "denoiser_model_name_or_path", "lpl_student"),
)
LORAS = ("merge_lora", "lora_init", "training_adapter")
COMMIT = re.compile(r"[0-9a-f]{40}")
LETTERS = re.compile(r"[^a-z0-9]")  # all else


# The facts -----------------------------------------------------------------------------------------------------------


def measured_facts(
    config: Config,
    dataset: Dataset | IterableDataset,
    num_processes: int,
    hardware: str,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts, in YAML's types. Reads images, see :mod:`lpl.data.fingerprint`.

    Args:
        dataset: what is trained on.
        hardware: for example "8 x NVIDIA H200".
        data: :func:`lpl.data.fingerprint.data_facts`, if they are known already.
    """
    optimization = config.optimization
    return {
        "data": data or data_facts(dataset, config.data, config.model.cache_dir),
        "base": identity(config.model),
        "num_processes": num_processes,
        "global_batch": optimization.train_batch_size * num_processes * optimization.gradient_accumulation_steps,
        "commits": commits(config, dataset),
        "hardware": hardware,
        "libraries": {"lpl": __version__, **installed_versions(), "pillow": PIL.__version__},
    }


def write_recipe(folder: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write every flag of the run with its resolved value, for --config, and the facts."""
    write_text(folder / layout.RECIPE, recipe_text(recipe, facts))


def commits(config: Config, dataset: Dataset | IterableDataset) -> dict[str, str]:
    """``user/repo@commit`` by flag, for models and data set of the Hub, as far as the caches record it."""
    files = dict.fromkeys(MODELS, "config.json") | dict.fromkeys((MODELS[0], "single_file_config"), layout.INDEX)
    values, commits = config.values(), cast(dict[str, str], {})
    for name, file in files.items():
        revision = config.model.revision if name == MODELS[0] else None
        if (source := values[name]) and (commit := _model_commit(source, [file], config.model.cache_dir, revision)):
            commits[name] = f"{source}@{commit}"
    loras = [(name, source) for name in LORAS[1:] if (source := values[name])]
    loras += [(LORAS[0], source) for source, _ in config.model.merged]
    for name, source in loras:
        if commit := _model_commit(source, [layout.LORA, "adapter_model.safetensors"], config.model.cache_dir):
            commits[name if name != LORAS[0] else f"{name} {source}"] = f"{source}@{commit}"
    for part in config.data.parts:
        source = part.data.dataset_name
        if source and is_hub_id(source) and (commit := _data_commit(dataset, source)):
            name = "dataset_name" if config.data.datasets is None else f"dataset_name of {part.name}"
            commits[name] = f"{source}@{commit}"
    return commits


def _model_commit(source: str, files: Sequence[str], cache_dir: str | None, revision: str | None = None) -> str | None:
    """The commit that the cache has a model of the Hub at."""
    if (place := hub_file(source)) is not None:
        source, files, revision = place.repository, [place.file], place.revision or revision
    elif not is_hub_id(source):
        return None
    found = (try_to_load_from_cache(source, file, cache_dir, revision) for file in files)
    path = next((path for path in found if isinstance(path, str)), None)
    return None if path is None else next((part for part in Path(path).parts if COMMIT.fullmatch(part)), None)


def _data_commit(dataset: Dataset | IterableDataset, name: str) -> str | None:
    """The commit that a data set of the Hub was read at, from its files' addresses or their place in the cache."""
    if isinstance(dataset, IterableDataset):
        paths = (re.search(rf"hf://datasets/{re.escape(name)}@(\w+)", path) for path in shard_paths(dataset))
        return next((path[1] for path in paths if path), None)
    folders = [os.path.dirname(file["filename"]) for file in dataset.cache_files]
    # The library's cache writes user___my_pictures for user/MyPictures.
    own = [folder for folder in folders if LETTERS.sub("", name.lower()) in LETTERS.sub("", folder.lower())]
    return next((found for found in map(os.path.basename, own) if COMMIT.fullmatch(found)), None)


def start_recipe(
    config: Config,
    run: Run,
    dataset: Dataset | IterableDataset,
    hardware: str,
    measured: Mapping[str, Any],
) -> None:
    """Write the run's recipe, and warn of what differs from the recipe that it started from; on the main process.

    Args:
        measured: facts that are known already.
    """
    if not run.is_main:
        return
    processes, data = run.accelerator.num_processes, run.facts.get("data")
    run.facts = measured_facts(config, dataset, processes, hardware, data) | dict(measured)
    rerun_of = {name: fact for name, fact in config.rerun_of.items() if name != "data" or run.resumed is None}
    for difference in compare_with(rerun_of, run.facts, config.optimization.train_batch_size):
        logger.warning(difference)
    write_recipe(run.folder, run.recipe, run.facts)


def update_recipe(run: Run, measured: Mapping[str, Any]) -> None:
    """Add facts to the run's recipe as soon as they are known. The main process only."""
    if run.is_main and not measured.items() <= run.facts.items():
        run.facts |= measured
        write_recipe(run.folder, run.recipe, run.facts)


# Comparison ----------------------------------------------------------------------------------------------------------


def compare_with(recipe: Mapping[str, Any], now: Mapping[str, Any], train_batch_size: int) -> list[str]:
    """Why a run's numbers will differ from those of the run whose recipe it started from, one sentence each.

    Args:
        recipe: what that recipe records; it may be anything, and what cannot be compared is ignored.
        now: :func:`measured_facts` of this run.
        train_batch_size: of this run.
    """
    data = _other_data(recipe, now)
    # A commit of a data set may change a word only.
    sources = [name for name in now["commits"] if data or not name.startswith("dataset_name")]
    sentences = [data, _other_batch(recipe, now, train_batch_size)]
    sentences += [_other_commit(name, recipe, now) for name in sources]
    return [sentence for sentence in (*sentences, _other_libraries(recipe, now)) if sentence]


def _other_data(recipe: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    difference = other_data(_mapping(recipe.get("data")), now["data"])
    return (
        f"the data is not that of the recipe's run ({difference}), so the loss curve will differ"
        if difference
        else None
    )


def _other_batch(recipe: Mapping[str, Any], now: Mapping[str, Any], train_batch_size: int) -> str | None:
    batch, processes = _count(recipe.get("global_batch")), _count(recipe.get("num_processes"))
    if processes is None:
        return None
    here, there = counted(now["num_processes"], "process"), counted(processes, "process")
    if batch not in (None, now["global_batch"]):
        return (
            f"a step takes {counted(now['global_batch'], 'image')} on {here} and took {batch} on {there} in the "
            "recipe's run, so the loss curve will differ; "
            f"{_same_batch(batch, now['num_processes'], train_batch_size)}"
        )
    if processes != now["num_processes"] and "images" not in now["data"]:
        return (
            f"--streaming reads in another order on {here} than on {there}, as in the recipe's run, so the loss curve "
            "will differ"
        )
    return None


def _same_batch(batch: int, processes: int, train_batch_size: int) -> str:
    """The flags that give as many images per step, with micro-batches that are no larger."""
    each, rest = divmod(batch, processes)
    if rest:
        return f"{counted(processes, 'process')} cannot share {batch} images"
    size = next(size for size in range(min(train_batch_size, each), 0, -1) if each % size == 0)
    smaller = f" --train_batch_size {size}" if size != train_batch_size else ""
    return f"--gradient_accumulation_steps {each // size}{smaller} gives the same"


def _other_commit(name: str, recipe: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    source, _, commit = now["commits"][name].partition("@")
    theirs, _, before = str(_mapping(recipe.get("commits")).get(name)).partition("@")
    if theirs != source or before == commit or not COMMIT.fullmatch(before):
        return None
    return (
        f"{name} {source} is at commit {commit[:7]} now and was at {before[:7]} in the recipe's run, so the loss "
        f"curve may differ{f'; --revision {before} is the same' if name == MODELS[0] else ''}"
    )


def _other_libraries(recipe: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    theirs = {**_mapping(recipe.get("libraries")), "hardware": recipe.get("hardware")}
    ours = {**now["libraries"], "hardware": now["hardware"]}
    other = [name for name in ours if isinstance(theirs.get(name), str) and theirs[name] != ours[name]]
    shown = ", ".join(f"{name} {ours[name]} ({reprlib.repr(theirs[name])[1:-1]})" for name in other)
    return f"different from the recipe's run (in brackets): {shown}; last digits may differ" if other else None


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 2**31 else None
