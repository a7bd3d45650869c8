"""`python -m lorasmith.recipes.pixels`, and lorasmith's own commands on the adapter that it makes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("stable_baselines3", reason='the recipe needs pip install "lorasmith[rl]"')

from PIL import Image

from lorasmith.cli.app import app
from lorasmith.recipes.pixels.__main__ import main
from lorasmith.recipes.pixels.settings import Arm, Settings, arm_key, encoder_key

TINY = {"game": "tests.support.catch:Catch-v0", "frames": 256, "updates": 20, "latent": 8, "steps": 512,
        "games": 4, "rollout": 64, "batch": 64}  # fmt: skip
FLAGS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


def test_one_command_runs_resumes_and_its_adapter_is_like_any_other(tmp_path, capsys):
    command = ["--out", str(tmp_path), "--seeds", "0", "--ranks", "2", "--jobs", "1", "--json", *FLAGS]
    first_code = main(command)
    first = json.loads(capsys.readouterr().out)
    assert first_code in (0, 1)
    assert [row["name"] for row in first["arms"]] == ["frozen", "lora-2", "full", "scratch"]
    assert first["adapters"][0]["unmerge_bit_identical"]
    assert json.loads((tmp_path / "pixels.json").read_text()) == first
    with Image.open(tmp_path / "policy.gif") as film:
        assert film.n_frames == 10
    for name in ("arms.png", "reconstructions.png"):
        with Image.open(tmp_path / name) as drawn:
            assert drawn.width > 600

    runs = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "arms").iterdir()}
    assert main(command) == first_code
    again = json.loads(capsys.readouterr().out)
    assert (again["arms"], again["adapters"]) == (first["arms"], first["adapters"])
    assert {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "arms").iterdir()} == runs

    settings = Settings(**TINY, seeds=(0,), ranks=(2,))
    adapter = str(tmp_path / "arms" / arm_key(settings, Arm("lora", 2), 0) / "adapter")
    eyes = str(tmp_path / "encoders" / encoder_key(settings, 0))
    checked = CliRunner().invoke(app, ["check", adapter, "--base", eyes, "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["base_match"] is True
    inspected = CliRunner().invoke(app, ["inspect", adapter, "--json"])
    assert {m["path"] for m in json.loads(inspected.stdout)["modules"]} == {"conv1", "conv2", "to_latent"}


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
