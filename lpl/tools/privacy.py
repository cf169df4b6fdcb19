"""What of a run may be public: cards and recipes show no access token and no path of this machine.

A *Hub id* is ``user/name`` and names no local folder; a *file on the Hub* is ``user/name/FILE.safetensors`` or its
address. Local folders appear as ``path/to/name``.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
HUB_FILE = re.compile(
    rf"(?P<address>(https://)?(huggingface\.co|hf\.co)/)?(?P<repository>{HUB_ID.pattern})/"
    r"((blob|resolve)/(?P<revision>[\w.-]+)/)?(?P<file>([\w+()-][\w .+()-]*/)*[\w+()-][\w .+()-]*\.safetensors)"
    r"(\?download=true)?",
    re.ASCII,
)
WHOLE_PATH = re.compile(r"""([A-Za-z]:|[~.]{0,2})/[^:,;'"]*|[A-Za-z]:\\[^:,;'"]*|[^\s:,;'"]*/[^\s:,;'"]*""")
PATH_WITHIN = re.compile(r"""(?<![^\s,;:='"(|<>\[])(file:/{0,2})?~?(/[^\s/,;:'"]+)+/(?=[^\s/])""")
TOKEN = re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{16,}|\bhf_(oauth|jwt)_[\w.-]{16,}")
BEARER = re.compile(r"(?<=\bBearer )[\w.~+/-]{16,}=*", re.IGNORECASE)
CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")
SIGNED = re.compile(r"([?&]([\w-]*(token|key|secret|signature|password|credential)[\w-]*|sig)=)[^\s&'\"\\]+", re.I)


def public_command(argv: Sequence[str], local: Collection[str] = ()) -> str:
    """The command without tokens and local paths, one flag per line.

    Args:
        argv: sys.argv.
        local: arguments that are local folders although they look like plain words.
    """

    def show(value: str) -> str:
        return shlex.quote(local_name(value) if value in local else hide_paths(value))

    lines = [f"accelerate launch {shlex.quote(os.path.basename(argv[0]))}"]
    for argument in _without_token(argv[1:]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            lines.append(shlex.quote(name) + (equals + show(value) if equals else ""))
        else:
            lines[-1] += f" {show(argument)}"
    return " \\\n  ".join(lines)


def _without_token(arguments: Sequence[str]) -> Iterator[str]:
    """Drop ``--hub_token`` and its value, also as ``--hub_token=...`` and in argparse's abbreviations."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--hub_t") and "--hub_token".startswith(name)):
            yield argument
        elif not equals:
            next(rest, None)


def is_hub_id(source: str) -> bool:
    """Whether it has the form of a Hub id and no local path has that name."""
    return bool(HUB_ID.fullmatch(source)) and not os.path.exists(source)


class HubFile(NamedTuple):
    """A file in a repository on the Hub."""

    repository: str
    file: str
    revision: str | None  # of the address; None: it names none

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.repository}/blob/{self.revision or 'main'}/{self.file}"


def hub_file(source: str) -> HubFile | None:
    """The file on the Hub that an address or ``user/name/FILE.safetensors`` stands for; None if it is something else.

    >>> hub_file("user/name/model.safetensors")
    HubFile(repository='user/name', file='model.safetensors', revision=None)
    >>> hub_file("https://huggingface.co/user/name/blob/main/sub/model.safetensors?download=true")
    HubFile(repository='user/name', file='sub/model.safetensors', revision='main')
    """
    match = HUB_FILE.fullmatch(source)
    if match is None or os.path.exists(source):
        return None
    return HubFile(match["repository"], match["file"], match["revision"])


def is_local(source: str) -> bool:
    """Whether it is a local folder or file, rather than a Hub id or another address."""
    return shown(source) != source


def shown(source: str) -> str:
    """A model or data set as it may be public: Hub ids and addresses unchanged, local folders as ``path/to/name``."""
    return local_name(source) if os.path.exists(os.path.expanduser(source)) else hide_paths(source)


def local_name(path: str | os.PathLike) -> str:
    """A local path as ``path/to/`` and its last part; the home folder as ``path/to/folder``, without the user name."""
    place = os.path.abspath(os.path.expanduser(path))
    name = os.path.basename(place.replace("\\", "/")) if place != os.path.expanduser("~") else ""
    return f"path/to/{name or 'folder'}"


def hide_paths(text: str) -> str:
    """Replace every path in the text by ``path/to/`` and its last part; Hub ids, addresses and prose stay."""
    if is_hub_id(text) or hub_file(text):
        return text
    if WHOLE_PATH.fullmatch(text) or ("/" in text and os.path.exists(text)):
        return local_name(text)
    return PATH_WITHIN.sub("path/to/", text)


def without_secrets(text: str) -> str:
    """The text without access tokens, and without passwords and signatures in addresses."""
    text = BEARER.sub("...", TOKEN.sub("hf_...", text))
    return SIGNED.sub(r"\1...", CREDENTIALS.sub("", text))
