"""The page reference/cli.md, made from the commands themselves whenever the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    shown = [p for p in command.params if p.name != "help" and not p.hidden]
    context = command.context_class(command, info_name=name)
    arguments = [placeholder(p) for p in shown if p.param_type_name == "argument"]
    usage = " ".join(["lorasmith", name, "[OPTIONS]", *arguments])
    table = (
        ["| argument or option | value | meaning |", "|---|---|---|", *(row(p, context) for p in shown)]
        if shown
        else []
    )
    return "\n".join(
        [f"## lorasmith {name}", "", command.help or "", "", f"```text\n{usage}\n```", "", *table, ""]
    )


def placeholder(argument: Any) -> str:
    """How usage shows an argument: `ADAPTER`, `[ADAPTER]` where it may be left out."""
    text = argument.metavar or argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return text if argument.required or text.startswith("[") else f"[{text}]"


def row(parameter: Any, context: Any) -> str:
    """One line of the table."""
    is_argument = parameter.param_type_name == "argument"
    names = [placeholder(parameter)] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    is_flag = not is_argument and parameter.is_flag
    value = "" if is_flag else parameter.metavar or parameter.display_type(context).strip("<>")
    notes = [cell(parameter.help or ""), "**Required.**" if parameter.required else ""]
    if parameter.default is not None and parameter.default is not False and not parameter.required:
        notes.append(f"Default: `{parameter.default}`.")
    return f"| {' / '.join(f'`{n}`' for n in names)} | {cell(str(value))} | {' '.join(filter(None, notes))} |"


def cell(text: str) -> str:
    """Text that does not end its cell, nor pass for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
