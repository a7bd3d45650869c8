"""The command line, called in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from lorasmith.cli.app import app


def run(*arguments: object) -> Any:
    """The result of `lorasmith ARGUMENTS`: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict:
    """The JSON that a successful command prints."""
    result = run(*arguments, "--json")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(result.stdout)
