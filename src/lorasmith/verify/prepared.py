"""Adapters on disk for servers that take theirs at the start, and what is known of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterFileError, ConfigError, OutputError

NOTE = "verify.json"


@dataclass(frozen=True)
class Prepared:
    """Adapters by our name.

    Attributes:
        directories: in PEFT's format.
        markers: the word of each; `foreign` is that of an adapter on the base's cache.
        spare: those that are not served at first.
        proof: how many answers and pairs the local base confirmed.
        served_as: our name → the server's, where it differs.
    """

    directories: dict[str, Path]
    markers: dict[str, str]
    foreign: str
    spare: tuple[str, ...] = ()
    proof: dict[str, Any] = field(default_factory=dict)
    served_as: dict[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> dict[str, tuple[str, Path]]:
        """Our name → the server's name and the directory."""
        return {n: (self.served_as.get(n, n), d) for n, d in self.directories.items() if n not in self.spare}

    def write_note(self, folder: Path) -> None:
        """Keep what `read_prepared` needs beside the directories."""
        values = {"markers": self.markers, "foreign": self.foreign, "proof": self.proof}
        try:
            (folder / NOTE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{folder / NOTE} cannot be written: {error}") from error


def read_prepared(pairs: Sequence[str]) -> Prepared:
    """What `--adapters name=DIR …` means: the server's name of a directory that `--prepare` wrote.

    Raises:
        ConfigError: a pair is malformed, or the directories are of two sets.
        AdapterFileError: a directory was not prepared by verify.
    """
    directories, served_as = {}, {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (equals and name and path):
            raise ConfigError(f'--adapters "{pair}": write name=DIR, such as amber=prepared/amber')
        directory = Path(path).resolve()
        directories[directory.name], served_as[directory.name] = directory, name
    folders = {d.parent for d in directories.values()}
    if len(folders) != 1:
        raise ConfigError("--adapters: give directories of one `lorasmith verify --prepare`")
    note = _read_note(folders.pop() / NOTE)
    if unknown := [n for n in directories if n not in note["markers"]]:
        raise AdapterFileError(f"{', '.join(unknown)}: not made by `lorasmith verify --prepare`")
    return Prepared(directories, note["markers"], note["foreign"], (), note["proof"], served_as)


def _read_note(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values["markers"], dict) and isinstance(values["foreign"], str) and values["proof"]:
            return dict(values)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise AdapterFileError(
        f"{path} is missing or damaged: make it with `lorasmith verify --prepare DIR --base B`"
    )
