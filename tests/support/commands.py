"""Command lines of a text, compared with the commands and options that exist."""

from __future__ import annotations

import re
import shlex

import typer

from lorasmith.cli.app import app


def command_lines(text: str) -> list[list[str]]:
    """Words after `lorasmith` of every line that starts with it, or with torchrun; comments are left out."""
    lines = re.findall(r"^ *(?:torchrun .*-m )?lorasmith (.+)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def unknown_options(words: list[str]) -> set[str]:
    """Options in `words` that their command does not have.

    Raises:
        KeyError: the command is not there.
    """
    command = typer.main.get_command(app).commands[words[0]]
    if hasattr(command, "commands"):
        command = command.commands[words[1]]
    known = {name for p in command.params for name in [*p.opts, *p.secondary_opts]}
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known
