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


def test_every_command_that_the_readme_names_exists():
    group = typer.main.get_command(app)
    named = set(re.findall(r"^lorasmith (\w+)", README.read_text(), re.M))
    assert {"train", "eval", "generate", "check", "merge", "data"} <= named
    assert named <= set(group.commands)
