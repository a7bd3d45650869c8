"""The README's Python example runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from lorasmith.cli.app import app

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    exec(compile(example, str(README), "exec"), {})
    assert "2 modules adapted" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_every_command_and_option_that_the_readme_names_exists():
    app_group = typer.main.get_command(app)
    lines = re.findall(r"^lorasmith (.+)$", README.read_text(), re.M)
    assert len(lines) > 10
    for line in lines:
        words = line.split("#")[0].split()
        command = app_group.commands[words[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
