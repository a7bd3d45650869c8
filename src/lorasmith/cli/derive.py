"""Adapters that commands make of adapters: where they may go, and what they were made from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import say
from lorasmith.errors import BaseMismatchError, BaseNotFoundError, ConfigError, OutputError

if TYPE_CHECKING:
    from lorasmith.lora import Adapter

AdapterArgument = Annotated[Path, typer.Argument(help="Adapter directory (PEFT's format, or MLX's).")]
OutOption = Annotated[Path, typer.Option(help="Folder for the new adapter.")]
PlotOption = Annotated[
    Path | None, typer.Option(help="PNG to draw; by default named like --out, beside it.", show_default=False)
]


def read_any(path: Path) -> Adapter:
    """Read an adapter of PEFT's format or of MLX-LM's."""
    from lorasmith.formats import is_mlx, read_adapter, read_mlx

    return read_mlx(path) if is_mlx(path) else read_adapter(path)


def read_base_config(directory: Path) -> dict[str, Any]:
    """A base's `config.json`.

    Raises:
        BaseNotFoundError: it cannot be read, or holds no JSON object.
    """
    file = directory / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseNotFoundError(f"{file} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise BaseNotFoundError(f"{file} holds no JSON object, so it describes no model.")
    return values


def require_new(out: Path, plot: Path | None = None) -> Path:
    """Refuse outputs that are there already, before any work; return where the plot goes.

    Raises:
        OutputError: something is in the way.
        ConfigError: the plot would not be a PNG.
    """
    if out.exists():
        raise OutputError(f"{out} exists already. Choose another folder; nothing was written.")
    if plot is not None:
        check_plot(plot)
        return plot
    beside = out.with_name(f"{out.name}.png")
    if beside.exists():
        raise OutputError(
            f"{beside} exists already, where the plot would go. Choose another place with --plot."
        )
    return beside


def check_plot(plot: Path) -> None:
    """Refuse a plot that would overwrite something, has no folder to lie in, or is no PNG."""
    if plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: plots are PNG files, so give a name that ends in .png.")
    if plot.exists():
        raise OutputError(f"{plot} exists already. Choose another name with --plot; nothing was written.")
    if not os.access(plot.absolute().parent, os.W_OK):
        raise OutputError(
            f"--plot {plot}: its folder cannot be written. Choose another place; nothing was written."
        )


def derived_from(command: str, sources: Mapping[str, Adapter], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the sidecar says of an adapter that was computed: command, settings, sources with digests, versions."""
    from lorasmith.train import commit, versions

    return {
        "made_by": {
            "command": command,
            "settings": {key: value for key, value in settings.items() if value is not None},
            "from": [
                {"path": path, "digest": adapter.digest, "made_by": adapter.provenance.get("made_by")}
                for path, adapter in sources.items()
            ],
            "versions": versions(),
            "commit": commit(),
        }
    }


def shared_base(sources: Mapping[str, Adapter], *, allow_mismatch: bool) -> dict[str, Any]:
    """The base that all sources were trained on, for the new sidecar; empty where that is not known of each.

    Raises:
        BaseMismatchError: two sidecars name different bases, and that is not allowed.
    """
    from lorasmith.bases import Fingerprint

    noted = {path: a.provenance["base"] for path, a in sources.items() if "base" in a.provenance}
    for path in sources.keys() - noted.keys():
        say(f"{path} carries no lorasmith sidecar: that it was trained on the same base cannot be verified")
    if not noted:
        return {}
    (first, base), *others = noted.items()
    prints = {path: Fingerprint.from_dict(b.get("fingerprint") or {}) for path, b in noted.items()}
    differing = [(path, prints[first].differences(prints[path])) for path, _ in others]
    faults = [f"{path} differs from {first} in: {', '.join(d)}" for path, d in differing if d]
    if faults and not allow_mismatch:
        raise BaseMismatchError(
            "The adapters were trained on different bases, so their sum means nothing.\n  "
            + "\n  ".join(faults)
            + "\n  If you know that the bases agree, pass --allow-base-mismatch."
        )
    if faults or len(noted) < len(sources):
        return {}
    name = {"base_name": base["name"]} if isinstance(base.get("name"), str) else {}
    return {"base": base} | name


def described(values: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns."""
    rows = list(values)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, with rate, time left and memory; silent where nobody watches."""
    import psutil
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
               TextColumn("{task.fields[memory]:.1f} GB"), TimeRemainingColumn()]  # fmt: skip
    with Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task("", total=None, memory=0.0)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, memory=psutil.Process().memory_info().rss / 1e9)

        yield report
