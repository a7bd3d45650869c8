"""The page reference/cli.md, made from the commands themselves whenever the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import typer

PAGE = "reference/cli.md"
HEAD = """# Command line

Made from the commands themselves at every build of this site.
Every command exits with 0, with 1 when a check found a problem, and with 2 on bad input, with a message that says
what was asked, what was found and what to do. With `--json` a command prints one JSON object on stdout; progress
goes to stderr.
"""


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this once per build, before the navigation is made."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Markdown of all commands, in the order in which `lorasmith --help` lists them."""
    from lorasmith.cli.app import app

    return "\n".join(
        [HEAD, *(section(name, command) for name, command in commands(typer.main.get_command(app)))]
    )


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`store add`, the command) for every command that does something itself."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        elif not command.hidden:
            yield f"{prefix}{name}", command


def section(name: str, command: Any) -> str:
    """Heading, purpose, usage and a table of arguments and options."""
    context = click.Context(command, info_name=f"lorasmith {name}")
    usage = " ".join(["lorasmith", name, *command.collect_usage_pieces(context)])
    rows = [row(p, context) for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    table = ["| argument or option | value | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join(
        [f"## lorasmith {name}", "", command.help or "", "", f"```text\n{usage}\n```", "", *table, ""]
    )


def row(parameter: Any, context: click.Context) -> str:
    """One line of the table."""
    names = " / ".join(f"`{n}`" for n in [*parameter.opts, *parameter.secondary_opts] if n.startswith("-"))
    shown = names or f"`{parameter.make_metavar(ctx=context)}`"
    is_flag = getattr(parameter, "is_flag", False)
    value = "" if is_flag else parameter.metavar or parameter.type.name
    default = parameter.default
    notes = [cell(getattr(parameter, "help", None) or "")]
    if parameter.required:
        notes.append("**Required.**")
    elif (
        default is not None
        and not callable(default)
        and default is not False
        and str(default) != "Sentinel.UNSET"
    ):
        notes.append(f"Default: `{default}`.")
    return f"| {shown} | {cell(value)} | {' '.join(filter(None, notes))} |"


def cell(text: str) -> str:
    """Text that does not end its cell, nor pass for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
