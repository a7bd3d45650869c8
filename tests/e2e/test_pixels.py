"""`python -m lorasmith.recipes.pixels`, and lorasmith's own commands on the adapter that it makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("stable_baselines3", reason='the recipe needs pip install "lorasmith[rl]"')

from PIL import Image

from lorasmith.cli.app import app
from lorasmith.recipes.pixels.__main__ import main
from lorasmith.recipes.pixels.settings import Arm, Settings, arm_key, encoder_key

ROOT = Path(__file__).parents[2]
DOCS, RECORD = ROOT / "docs" / "pixels.md", ROOT / "benchmarks" / "records" / "pixels.json"
TINY = {"game": "tests.support.catch:Catch-v0", "frames": 256, "updates": 20, "latent": 8, "steps": 512,
        "games": 4, "rollout": 64, "batch": 64}  # fmt: skip
FLAGS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


def test_one_command_runs_resumes_and_its_adapter_is_like_any_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "pixels"
    command = ["--out", str(out), "--seeds", "0", "--ranks", "2", "--jobs", "1", "--json", *FLAGS]
    first_code = main(command)
    first = json.loads(capsys.readouterr().out)
    assert first_code in (0, 1)
    assert [row["name"] for row in first["arms"]] == ["frozen", "lora-2", "full", "scratch"]
    assert first["adapters"][0]["unmerge_bit_identical"]
    assert json.loads((out / "pixels.json").read_text()) == first
    with Image.open(out / "policy.gif") as film:
        assert film.n_frames == 10
    for name in ("arms.png", "reconstructions.png"):
        with Image.open(out / name) as drawn:
            assert drawn.width > 600

    runs = {folder: folder.stat().st_mtime_ns for folder in (out / "arms").iterdir()}
    assert main(command) == first_code
    again = json.loads(capsys.readouterr().out)
    assert (again["arms"], again["adapters"]) == (first["arms"], first["adapters"])
    assert {folder: folder.stat().st_mtime_ns for folder in (out / "arms").iterdir()} == runs

    settings = Settings(**TINY, seeds=(0,), ranks=(2,))
    adapter = str(out / "arms" / arm_key(settings, Arm("lora", 2), 0) / "adapter")
    eyes = str(out / "encoders" / encoder_key(settings, 0))
    checked = CliRunner().invoke(app, ["check", adapter, "--base", eyes, "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["base_match"] is True
    inspected = CliRunner().invoke(app, ["inspect", adapter, "--json"])
    assert {m["path"] for m in json.loads(inspected.stdout)["modules"]} == {"conv1", "conv2", "to_latent"}

    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    exec(compile(example, str(DOCS), "exec"), {})
    assert "parameters move the description" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--game", "MinAtar/Breakuot-v1"], "Breakout"),
        (["--ranks", "0"], "ranks=[0]"),
        (["--steps", "9"], "steps=9"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(arguments, said, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "new"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lorasmith.recipes.pixels.__main__.NEEDED", ("no_such_package",))
    assert main(["--out", str(tmp_path / "new")]) == 2
    assert 'no_such_package: pip install "lorasmith[rl]"' in capsys.readouterr().err


def test_the_docs_say_what_the_record_says():
    record, text = json.loads(RECORD.read_text()), DOCS.read_text()
    for row in record["arms"]:
        seeds = ", ".join(f"{x:.2f}" for x in row["last_returns"])
        start = f"| {row['label']} | {row['encoder_params_trained']:,} | {row['mean']:.2f} | {seeds} |"
        assert start in text
    assert f"| random play | | {record['random']['mean']:.2f} |" in text
    assert record["lora_above_frozen"]
    assert record["settings"] == json.loads(json.dumps(Settings().to_dict()))
