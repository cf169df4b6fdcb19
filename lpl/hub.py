"""The run's page on the Hugging Face Hub: its repository, its model card, its upload.

A *Hub id* is `user/name` and names no folder of this machine. The *card* is README.md: YAML metadata that the Hub
reads and a text that visitors read. It is public, so nothing of this machine goes into it: local folders appear as
`path/to/name`, tokens not at all.

Before training, `prepare_repository` fails early and clearly; after it, `push_folder` never fails: a run of days must
not end in a traceback because the network is down. Both use the token given, else that of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from lpl.arguments import command_line, loss_flags
from lpl.families import Family
from lpl.files import write_whole
from lpl.loss import LatentPerceptualLoss


logger = logging.getLogger(__name__)

NOT_UPLOADED = (
    "checkpoint-*",
    ".checkpoint-*",
    "logs/*",
    "wandb/*",
    "recipe.yaml",
    "cache/*",
    ".cache/*",
    "*/.cache/*",
    "*tfevents*",
    "*.tmp",
    "evaluation/images/*",
    "evaluation/evaluation.*",
)
PICTURES = {
    "samples/before_after.png": "Samples before and after the training",
    "evaluation/curves.png": "Distances from real images over the training",
    "loss_curves.png": "Losses, LPL's share of them and the learning rate over the training",
}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
PAPER = "https://arxiv.org/abs/2411.04873"


class HubError(RuntimeError):
    """The Hub refuses or cannot be reached; the message is one sentence that names the flag to change."""


# Repository and upload ----------------------------------------------------------------------------------------------


def prepare_repository(
    repo_id: str | None, output_dir: str | os.PathLike, token: str | None = None, private: bool = False
) -> str:
    """Create the model repository, or find it there, before any work is done.

    Args:
        repo_id: `name` or `user/name`; None takes the name of `output_dir`.
        private: a new repository is private; else it is what the account's settings say.

    Returns:
        The full id, `user/name`.

    Raises:
        HubError: no token, a name that the Hub does not accept, no permission to write, or no network.
    """
    name = repo_id or Path(output_dir).resolve().name
    if not (token or get_token()):
        raise HubError(
            "--push_to_hub needs a Hugging Face token and there is none: run `hf auth login`, give --hub_token, or "
            "leave --push_to_hub out."
        )
    try:
        full_id = _api(token).create_repo(name, private=private or None, exist_ok=True).repo_id
        _check_write_permission(full_id, token)
    except (HTTPError, OSError, ValueError) as error:  # all that a request raises, a name it does not accept included
        raise HubError(f"--push_to_hub: {_explain(error, name)}") from error
    if private:
        _warn_where_public(full_id, token)
    return full_id


def push_folder(
    folder: str | os.PathLike, repo_id: str, token: str | None = None, commit_message: str = "End of training"
) -> str | None:
    """Upload all of `folder` that belongs on the Hub: not checkpoints, logs or caches.

    Returns:
        The page's address; or None when it failed, after a warning with the reason and the command that catches up.
    """
    try:
        commit = _api(token).upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=list(NOT_UPLOADED)
        )
        return str(commit.repo_url)
    except Exception as error:
        logger.warning(
            "The upload to %s failed (%s), all files are in %s; this command uploads them, after `hf auth login`: %s",
            *(repo_id, _reason(error), folder, _upload_command(folder, repo_id)),
        )
        return None


def _upload_command(folder: str | os.PathLike, repo_id: str) -> str:
    """What a shell has to run to do as `push_folder` does."""
    excluded = [part for pattern in NOT_UPLOADED for part in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo_id, str(folder), ".", *excluded])


def _api(token: str | None) -> HfApi:
    return HfApi(token=(token or "").strip() or None)


def _check_write_permission(repo_id: str, token: str | None) -> None:
    """Raise where the Hub says no: `create_repo` lets a read-only token pass when the repository exists."""
    try:
        _api(token).auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
        logger.debug("The Hub does not tell whether %s can be written to: %s", repo_id, _reason(error))


def _warn_where_public(repo_id: str, token: str | None) -> None:
    """`create_repo` leaves the visibility of a repository that exists as it is, without a word."""
    try:
        public = not _api(token).model_info(repo_id).private
    except (HTTPError, OSError):
        return
    if public:
        logger.warning("%s exists and is public: it stays public until its settings on the Hub are changed.", repo_id)


def _explain(error: Exception, name: str) -> str:
    """One sentence for the user: what happened and which flag changes it."""
    status, reason = getattr(getattr(error, "response", None), "status_code", None), _reason(error)
    if isinstance(error, HFValidationError):
        return f"{name!r} is no name for a repository ({reason}); give another one as --hub_model_id."
    if status == 401:
        return f"the Hub does not accept the token ({reason}); run `hf auth login` or give another --hub_token."
    if status == 403:
        return (
            f"the token may not write to {name!r} ({reason}); name a repository of yours as --hub_model_id, or use a "
            "token with write permission (`hf auth login`, --hub_token)."
        )
    if status:
        return f"the Hub refuses {name!r} ({reason}); check --hub_model_id, or leave --push_to_hub out."
    return f"the Hub cannot be reached ({reason}); leave --push_to_hub out and upload later with `hf upload`."


def _reason(error: BaseException) -> str:
    """The error and what it came from on one line of at most 200 characters, without request ids and tokens."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = " ".join(_without_secrets(re.sub(r"\(Request ID: [^)]*\)", "", said)).split()).rstrip(".")
    if status:
        return (said if str(status) in said else f"{status}: {said}")[:200]
    cause = _reason(error.__cause__) if error.__cause__ else ""
    return (said if cause in said else f"{said}: {cause}")[:200]


# The model card -----------------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes; those not installed are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What the model card says about a run; plain values, of any model family.

    Base model and data set may be local folders, `command` may hold a token: the card shows neither path nor token.
    """

    # What it is
    base_model: str  # Hub id or local folder
    dataset: str  # Hub id or local folder
    pipeline_class: str  # diffusers class that loads the result, "StableDiffusionPipeline"
    repo_id: str | None = None  # None: not on the Hub, and the folder's name is the title
    tags: Sequence[str] = ()  # the family: "stable-diffusion", "sd3", ...
    license: str | None = None  # the Hub's identifier, "creativeml-openrail-m"
    # How to use it
    resolution: int  # pixels
    prompt: str | int = "a photo of a lighthouse at dusk"  # an int is a class label, for class-conditional models
    classes: Mapping[int, str] = field(default_factory=dict)  # the data's, by label, in class-conditional models
    dtype: str = "float16"  # of torch, for inference
    inference_steps: int | None = None  # None: the pipeline's default
    guidance_scale: float | None = None  # None: the pipeline's default
    loading_arguments: Mapping[str, None] = field(default_factory=dict)  # components that the pipeline does without
    sampling_arguments: Mapping[str, object] = field(default_factory=dict)  # further ones of the pipeline's call
    # How it was trained
    steps: int  # optimizer steps
    batch_size: int  # samples per optimizer step, over all devices and accumulation
    learning_rate: float
    objective: str  # "epsilon", "v_prediction", "sample", "flow_matching"
    lr_scheduler: str | None = None
    mixed_precision: str | None = None  # None or "no": float32
    ema_decay: float | None = None  # None: no EMA
    lora_rank: int | None = None  # None: full fine-tuning
    trained: str | None = None  # what was, in words
    from_scratch: bool = False  # the base model gave its configuration only
    seed: int | None = None
    hardware: str | None = None  # "1 x NVIDIA H200"
    # What LPL did
    lpl_weight: float | None = None  # w as it was in the end; None or 0: LPL was off
    lpl_weight_setting: str | None = None  # as the user gave it, "auto:0.2" or "3.0"
    lpl_share: float | None = None  # measured share of the total loss, 0 to 1
    lpl_sigma_threshold: float | None = None  # tau at this resolution; None or inf: none
    lpl_blocks: Sequence[str] = ()  # of the decoder, "mid", "up_0"
    lpl_start_step: int = 0
    lpl_options: str = ""  # flags that make another loss than the default
    results: Sequence[EvalResult] = ()  # what was measured of the trained model
    results_table: str = ""  # the same for people, Markdown
    # How to run it again
    command: Sequence[str] = ()  # sys.argv
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    @property
    def lpl(self) -> bool:
        return bool(self.lpl_weight)

    @property
    def class_conditional(self) -> bool:
        return isinstance(self.prompt, int)


def describe(
    args: Namespace,
    family: Family,
    lpl_loss: LatentPerceptualLoss | None,
    records: list[dict[str, float]],
    steps: int,
    global_batch: int,
    threshold: float,
    hardware: str,
    mixed_precision: str,
    dtype: torch.dtype,
    prompts: list[str] | list[int],
    classes: Mapping[int, str],
    trained: str,
) -> RunCard:
    """The run, as its model card tells it."""
    with_lpl = [record for record in records if record.get("lpl_weight", 0) > 0 and "lpl_share" in record]
    return RunCard(
        base_model=args.pretrained_model_name_or_path,
        dataset=args.dataset_name or args.train_data_dir,
        pipeline_class=family.pipeline_class.__name__,
        repo_id=args.hub_model_id,
        tags=(family.name,),
        resolution=args.resolution,
        prompt=(prompts or [0 if family.class_conditional else "a photo"])[0],
        classes=classes,
        dtype=str(dtype).removeprefix("torch."),
        trained=trained,
        from_scratch=args.from_scratch,
        inference_steps=args.validation_inference_steps,
        guidance_scale=args.validation_guidance_scale,
        loading_arguments=family.loading_arguments(),
        sampling_arguments=family.sampling_arguments(),
        steps=steps,
        batch_size=global_batch,
        learning_rate=args.learning_rate * (global_batch if args.scale_lr else 1),
        objective=args.prediction_type,
        lr_scheduler=args.lr_scheduler,
        mixed_precision=mixed_precision,
        ema_decay=args.ema_decay,
        lora_rank=args.rank if args.lora else None,
        seed=args.seed,
        hardware=hardware,
        lpl_weight=with_lpl[-1]["lpl_weight"] if with_lpl else None,
        lpl_weight_setting=args.lpl_weight,
        lpl_share=sum(record["lpl_share"] for record in with_lpl) / len(with_lpl) if with_lpl else None,
        lpl_sigma_threshold=threshold,
        lpl_blocks=lpl_loss.block_names if args.lpl else (),
        lpl_start_step=args.lpl_start_step,
        lpl_options=loss_flags(args),
        command=[sys.argv[0], *command_line(args)],
    )


def write_model_card(folder: str | os.PathLike, card: RunCard) -> Path:
    """Write README.md into `folder`, which holds the result by now: pictures and adapter are shown as found there.

    Returns:
        The path of README.md.
    """
    folder = Path(folder)
    sections = (_introduction, _pictures, _use, _training, _perceptual_loss, _results, _rerun, _citation)
    body = "\n\n".join(text for section in sections if (text := section(folder, card)))
    content = f"---\n{_metadata(folder, card).to_yaml()}\n---\n\n{body}\n"
    content = _without_secrets(content).encode(errors="replace").decode()  # a prompt may hold bytes that are no UTF-8
    return write_whole(folder / "README.md", ModelCard(content).save)


def _metadata(folder: Path, card: RunCard) -> ModelCardData:
    """What the Hub indexes; only Hub ids count as base model and data set there."""
    own = _is_hub_id(card.base_model)
    tags = ["diffusers", *(["class-conditional"] if card.class_conditional else ["text-to-image"])]
    tags += ["diffusers-training", *(["lora"] if card.lora_rank else []), *card.tags]
    return ModelCardData(
        base_model=card.base_model if own else None,
        base_model_relation=("adapter" if card.lora_rank else "finetune") if own else None,
        eval_results=list(card.results) or None,
        model_name=_title(folder, card) if card.results else None,
        datasets=[card.dataset] if _is_hub_id(card.dataset) else None,
        inference=True,
        library_name="diffusers",
        license=card.license,
        pipeline_tag=None if card.class_conditional else "text-to-image",
        tags=tags + (["latent-perceptual-loss"] if card.lpl else []),
    )


def _introduction(folder: Path, card: RunCard) -> str:
    base = _link(card.base_model)
    what = f"This is a LoRA of rank {card.lora_rank} for {base}, trained" if card.lora_rank else None
    if card.from_scratch:
        what = f"This is a model of the same shape as {base}, trained from random weights"
    what = what or f"This is {base}, fine-tuned"
    text = f"{what} on {_link(card.dataset, 'datasets/')} for {card.steps:,} steps at {card.resolution} px"
    if card.lpl:
        text += (
            f" with the [latent perceptual loss]({PAPER}) (LPL). Beside the usual diffusion loss, LPL compares the "
            "predicted latents with the true ones in the features of the autoencoder's decoder, and so weighs the "
            "errors that would show in the image"
        )
    return f"# {_title(folder, card)}\n\n{text}."


def _pictures(folder: Path, card: RunCard) -> str:
    return "\n\n".join(f"![{text}]({name})" for name, text in PICTURES.items() if (folder / name).is_file())


def _use(folder: Path, card: RunCard) -> str:
    """Code that draws one image, with the whole pipeline or with the base model's and the LoRA found in `folder`."""
    here = _literal(card.repo_id or _local_name(folder))
    source = _literal(_shown(card.base_model)) if card.lora_rank else here
    classes, imports, adapted = [card.pipeline_class], ["import torch"], []
    if card.lora_rank and (adapter := _peft_folder(folder)):
        imports.append("from peft import PeftModel")
        loaded = f"PeftModel.from_pretrained(pipeline.transformer, {here}, subfolder={_literal(adapter.name)})"
        adapted.append(f"pipeline.transformer = {loaded}")
    elif card.lora_rank:
        adapted.append(f"pipeline.load_lora_weights({here})")
    if card.lora_rank and (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():  # a new objective's
        classes.insert(0, json.loads(scheduler.read_text())["_class_name"])
        adapted.append(f'pipeline.scheduler = {classes[0]}.from_pretrained({here}, subfolder="scheduler")')
    imports.insert(1, f"from diffusers import {', '.join(classes)}")
    absent = "".join(f", {name}=None" for name in card.loading_arguments)
    load = f"pipeline = {card.pipeline_class}.from_pretrained({source}, dtype=torch.{card.dtype}{absent})"
    call = ["image = pipeline(", *(f"    {argument}," for argument in _call_arguments(card)), ").images[0]"]
    code = [*imports, "", load, *adapted, 'pipeline.to("cuda")', "", *call, 'image.save("image.png")']
    return "## Use it\n\n" + _fenced("python", "\n".join(code))


def _peft_folder(folder: Path) -> Path | None:
    """Where in `folder` peft saved an adapter; None where diffusers saved it, or nobody."""
    return next((path.parent for path in sorted(folder.glob("*/adapter_config.json"))), None)


def _call_arguments(card: RunCard) -> list[str]:
    """Text pipelines take prompt and size; class-conditional ones take labels and draw at the one size they know."""
    arguments = {"prompt": card.prompt, "height": card.resolution, "width": card.resolution}
    if card.class_conditional:
        arguments = {"class_labels": [card.prompt]}
    arguments |= {"num_inference_steps": card.inference_steps, "guidance_scale": card.guidance_scale}
    arguments |= card.sampling_arguments
    return [f"{name}={_literal(value)}" for name, value in arguments.items() if value is not None]


def _literal(value: object) -> str:
    """Python source of a plain value; text stands in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _training(folder: Path, card: RunCard) -> str:
    precision = card.mixed_precision if card.mixed_precision not in (None, "no") else None
    rows = {
        "Base model": _link(card.base_model),
        "Data set": _link(card.dataset, "datasets/"),
        "Trained": card.trained,
        "Objective": f"`{card.objective}`",
        "Classes": _classes(card.classes) if card.classes else None,
        "Resolution": f"{card.resolution} px",
        "Steps": f"{card.steps:,}",
        "Batch size": f"{card.batch_size:,} ({card.steps * card.batch_size:,} samples seen)",
        "Learning rate": f"{card.learning_rate:g}" + (f", {card.lr_scheduler}" if card.lr_scheduler else ""),
        "Precision": f"{precision} mixed precision" if precision else "float32",
        "EMA": f"decay {card.ema_decay:g}" if card.ema_decay else "none",
        "Seed": card.seed,
        "Hardware": card.hardware,
        "Libraries": ", ".join(f"{name} {version}" for name, version in card.versions.items()) or None,
    }
    return "## Training\n\n" + _table(rows)


def _classes(names: Mapping[int, str], shown: int = 20) -> str:
    """Labels and names of the first classes."""
    listed = ", ".join(f"{label} {name}" for label, name in list(names.items())[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _perceptual_loss(folder: Path, card: RunCard) -> str:
    if not card.lpl:
        return "The latent perceptual loss was off: this model was trained on the diffusion loss alone."
    threshold = card.lpl_sigma_threshold
    bounded = threshold is not None and threshold != float("inf")
    rows = {
        "Weight": f"{card.lpl_weight:.4g}" + _how_set(card.lpl_weight_setting),
        "Share of the total loss": f"{card.lpl_share:.1%}, mean of the run" if card.lpl_share is not None else None,
        "Applied at": f"noise-to-signal ratio σ ≤ {threshold:g}" if bounded else "all noise levels",
        "Decoder blocks": ", ".join(f"`{name}`" for name in card.lpl_blocks) or None,
        "Options": f"`{card.lpl_options}`" if card.lpl_options else None,
        "From step": f"{card.lpl_start_step:,}" if card.lpl_start_step else None,
    }
    return "## Latent perceptual loss\n\n" + _table(rows)


def _results(folder: Path, card: RunCard) -> str:
    return f"## Results\n\n{card.results_table}" if card.results_table else ""


def add_results(readme: Path, results: Sequence[EvalResult], table: str) -> None:
    """Put what was measured into a card that is there, its metadata and its text, in the place of earlier results."""
    card = ModelCard.load(readme)
    before, _, rest = card.text.partition("\n## Results\n")
    behind = rest.partition("\n## ")
    card.text = f"{before.rstrip()}\n\n## Results\n\n{table}\n" + (f"\n## {behind[2]}" if behind[1] else "")
    card.data.eval_results = list(results)
    card.data.model_name = card.data.model_name or readme.resolve().parent.name
    write_whole(readme, card.save)


def _how_set(setting: str | None) -> str:
    """What follows the weight: given as a number, or measured for a share of the loss ("auto:0.2")."""
    if not (setting or "").startswith("auto"):
        return ", set by hand"
    share = re.fullmatch(r"auto:(0?\.\d+)", setting)
    return ", measured in the first steps" + (f" to make LPL {float(share[1]):.0%} of the loss" if share else "")


def _rerun(folder: Path, card: RunCard) -> str:
    if not card.command:
        return ""
    local = {source for source in (card.base_model, card.dataset) if os.path.exists(source)}
    return "## Train it again\n\n" + _fenced("bash", public_command(card.command, local))


def _citation(folder: Path, card: RunCard) -> str:
    if not card.lpl:
        return ""
    entry = (
        "@inproceedings{berrada2025boosting,\n"
        "  title = {Boosting Latent Diffusion with Perceptual Objectives},\n"
        "  author = {Berrada Ifriqi, Tariq and Astolfi, Pietro and Hall, Melissa and Havasi, Marton and\n"
        "            Benchetrit, Yohann and Romero-Soriano, Adriana and Alahari, Karteek and Drozdzal, Michal and\n"
        "            Verbeek, Jakob},\n"
        "  booktitle = {International Conference on Learning Representations},\n  year = {2025},\n"
        f"  url = {{{PAPER}}},\n}}"
    )
    return "## Citation\n\n" + _fenced("bibtex", entry)


def _title(folder: Path, card: RunCard) -> str:
    return (card.repo_id or folder.resolve().name).rpartition("/")[2]


def _table(rows: Mapping[str, object]) -> str:
    """Two columns of Markdown; rows whose value is None are left out."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        if value is not None:
            lines.append(f"| {name} | {' '.join(str(value).split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _fenced(language: str, code: str) -> str:
    """A code block whose fence is longer than any in the code."""
    longest = max((len(ticks) for ticks in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _link(source: str, kind: str = "") -> str:
    """A link to the Hub, or the source in code type; `kind` is "datasets/" for data sets."""
    return f"[{source}](https://huggingface.co/{kind}{source})" if _is_hub_id(source) else f"`{_shown(source)}`"


# What may be shown --------------------------------------------------------------------------------------------------

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
WHOLE_PATH = re.compile(r"""([A-Za-z]:|[~.]{0,2})/[^:,;'"]*|[A-Za-z]:\\[^:,;'"]*|[^\s:,;'"]*/[^\s:,;'"]*""")
PATH_WITHIN = re.compile(r"""(?<![^\s,;:='"(|<>\[])(file:/{0,2})?~?(/[^\s/,;:'"]+)+/(?=[^\s/])""")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")


def public_command(argv: Sequence[str], local: Collection[str] = ()) -> str:
    """The command as others may see it: no token, no path of this machine, one flag a line.

    Args:
        argv: sys.argv.
        local: arguments that are folders of this machine though they look like plain words.
    """

    def show(value: str) -> str:
        return shlex.quote(_local_name(value) if value in local else _hide_paths(value))

    lines = [f"accelerate launch {shlex.quote(os.path.basename(argv[0]))}"]
    for argument in _without_token(argv[1:]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            lines.append(shlex.quote(name) + (equals + show(value) if equals else ""))
        else:
            lines[-1] += f" {show(argument)}"
    return " \\\n  ".join(lines)


def _without_token(arguments: Sequence[str]) -> Iterator[str]:
    """Leave out `--hub_token` and its value, also as `--hub_token=...` and in the short forms of argparse."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--hub_t") and "--hub_token".startswith(name)):
            yield argument
        elif not equals:
            next(rest, None)


def _is_hub_id(source: str) -> bool:
    return bool(HUB_ID.fullmatch(source)) and not os.path.exists(source)


def _shown(source: str) -> str:
    """A base model or data set: Hub ids and addresses as they are, folders of this machine by their own name."""
    return _local_name(source) if os.path.exists(os.path.expanduser(source)) else _hide_paths(source)


def _local_name(path: str | os.PathLike) -> str:
    name = os.path.basename(os.path.abspath(os.path.expanduser(path)).replace("\\", "/"))
    return f"path/to/{name or 'folder'}"


def _hide_paths(text: str) -> str:
    """`path/to/` before the last part of every path in `text`; Hub ids, addresses and prose stay."""
    if _is_hub_id(text):
        return text
    if WHOLE_PATH.fullmatch(text) or ("/" in text and os.path.exists(text)):
        return _local_name(text)
    return PATH_WITHIN.sub("path/to/", text)


def _without_secrets(text: str) -> str:
    """`text` without access tokens and without the passwords of addresses."""
    return CREDENTIALS.sub("", TOKEN.sub("hf_...", text))
