"""The README's Python example runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.commands import command_lines, unknown_options

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    exec(compile(example, str(README), "exec"), {})
    assert "2 modules adapted" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_every_command_and_option_that_the_readme_names_exists():
    lines = command_lines(README.read_text())
    assert len(lines) > 10
    for words in lines:
        assert not unknown_options(words), words
