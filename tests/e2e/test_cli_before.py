"""`plan`, `data check --html`, `advise` and `runs` as a user runs them, on a tiny base."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from lorasmith.cli.app import app
from tests.support.base import write_tiny_base

WORDS = ("ab", "cd", "ef", "gh", "ij", "kl")
RECORDS = [{"prompt": f"say {word}", "completion": word * 2} for word in WORDS]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def answer(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    write_tiny_base(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for name, rank in (("small", 2), ("large", 6)):
        answer(
            "train", "--base", folder / "base", "--data", folder / "data.jsonl", "--out", folder / "runs" / name,
            "--epochs", 12, "--batch-size", 3, "--rank", rank, "--lr", "0.02", "--eval-data", folder / "data.jsonl",
        )  # fmt: skip
    return folder


def test_plan_reads_no_weight_and_answers_for_both_methods(place, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in (place / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = base / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # the header stays, the numbers are gone
        file.truncate(header)
        file.truncate(size)
    assert set(weights.read_bytes()[header:]) == {0}
    found = answer("plan", "--base", base, "--data", place / "data.jsonl", "--batch-size", 2, "--rank", 4)
    keys = {
        "weights_bytes",
        "adapter_bytes",
        "optimizer_bytes",
        "activation_bytes",
        "peak_bytes",
        "checkpoint_bytes",
        "train_s",
    }
    for method in ("lora", "full"):
        assert keys <= found[method].keys()
        assert found[method]["peak_bytes"] > found[method]["weights_bytes"]
    assert found["steps"] == 3
    assert found["recommended"]["rank"] == 4
    assert found["lora"]["trainable_params"] < found["full"]["trainable_params"]


def test_plan_within_a_budget_on_a_device_and_from_a_run_file(place, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[lora]\nrank = 3\n[train]\nbatch_size = 2\nrecompute = "layers"\n')
    data = ("--base", place / "base", "--data", place / "data.jsonl")
    on_gpu = answer("plan", *data, "--device", "t4", "--config", file)
    assert on_gpu["machine"]["name"] == "T4"
    assert on_gpu["recommended"]["rank"] == 3
    assert on_gpu["recommended"]["recompute"] == "layers"
    refused = run("plan", *data, "--budget", "1MB", "--json")
    assert refused.exit_code == 1
    assert "Nothing fits" in json.loads(refused.stdout)["recommended"]["reason"]
    table = run("plan", *data)
    assert "activation" in table.output
    assert "recommended: --rank 16" in table.output
    for flags, said in (
        (("--budget", "lots"), "8GiB"),
        (("--device", "X9"), "known:"),
        (("--device", "T4", "--measure"), "calibrate"),
    ):
        result = run("plan", *data, *flags)
        assert result.exit_code == 2
        assert said in result.stderr


def test_plan_measures_a_real_step(place):
    found = answer(
        "plan", "--base", place / "base", "--data", place / "data.jsonl", "--measure", "--batch-size", 3
    )
    assert found["lora"]["train_s"] > 0


def test_data_check_writes_a_page_and_finds_overlap(place, tmp_path):
    page = tmp_path / "data.html"
    result = run(
        "data", "check", place / "data.jsonl", "--base", place / "base", "--html", page, "--against", place / "data.jsonl", "--json",
    )  # fmt: skip
    assert result.exit_code == 1
    assert {p["kind"] for p in json.loads(result.stdout)["problems"]} == {"overlap"}
    text = page.read_text()
    assert "Token by token" in text
    assert "http" not in text.replace("http-equiv", "")


def test_advise_gives_all_tiers_with_evidence(place, monkeypatch):
    from lorasmith.train import probing

    monkeypatch.setattr(probing, "PROBE_STEPS", 8)
    monkeypatch.setattr(probing, "DIMENSIONS", (4, 64, 1024))
    data = ("--base", place / "base", "--data", place / "data.jsonl")
    quick = answer("advise", *data)
    assert quick["capacity_rank"] == 1
    assert quick["d90"] is None
    assert "bits" in quick["recommendations"][0]["evidence"]
    found = answer("advise", *data, "--run", place / "runs/large", "--dimension", "--lr-range", "--seeds", 1)
    assert 1 <= found["r90"] <= found["r99"] <= 6
    assert found["d90"] in (4, 64, 1024, None)
    assert {r["what"] for r in found["recommendations"]} >= {"rank", "learning rate"}
    assert all(r["reason"] and r["evidence"] for r in found["recommendations"])
    losses = found["truncation_losses"]
    assert losses["6"] < found["truncation_base_loss"]


def test_runs_are_listed_and_compared(place, tmp_path):
    ask = tmp_path / "ask.jsonl"
    ask.write_text(
        "".join(json.dumps(r) + "\n" for r in [*RECORDS, {"prompt": "say <b>", "completion": "b"}][-2:])
    )
    page = tmp_path / "runs.html"
    found = answer("runs", place / "runs", "--samples", ask, "--html", page)
    assert [r["name"] for r in found["runs"]] == ["large", "small"]
    rows = [json.loads(x) for x in (place / "runs/small/samples.jsonl").read_text().splitlines()]
    assert [row["wanted"] for row in rows] == [RECORDS[-1]["completion"], "b"]
    assert {"prompt", "base", "tuned"} < rows[0].keys()
    assert all(r["is_finished"] and r["steps"] == r["total_steps"] == 24 for r in found["runs"])
    assert found["differences"]["lora.rank"] == [6, 2]
    assert all(key.startswith("lora.") for key in found["differences"])
    text = page.read_text()
    assert text.count("<polyline") == 2
    assert "say &lt;b&gt;" in text
    assert "http" not in text
    assert "large" in run("runs", place / "runs").output
    assert [r["name"] for r in answer("runs", place / "runs/small")["runs"]] == ["small"]
    for bad, said in ((place / "base", "holds no run"), (place / "nowhere", "not a folder")):
        result = run("runs", bad)
        assert result.exit_code == 2
        assert said in result.stderr


def test_event_files_need_tensorboard_and_say_so(place, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run("runs", place / "runs", "--tensorboard", tmp_path / "events")
    assert result.exit_code == 2
    assert "lorasmith[tensorboard]" in result.stderr
    assert not os.path.exists(tmp_path / "events")


def test_train_auto_decides_and_says_why(place, tmp_path):
    data = ("--base", place / "base", "--data", place / "data.jsonl", "--batch-size", 3, "--epochs", 2)
    found = answer("train", *data, "--auto", "--out", tmp_path / "run")
    decisions = {d["what"]: d for d in found["decisions"]}
    assert set(decisions) == {"budget", "rank", "lr"}
    assert all(d["reason"] and d["evidence"] for d in decisions.values())
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["lora"]["rank"] == decisions["rank"]["value"] == 8
    assert record["train"]["lr"] == decisions["lr"]["value"]
    assert record["train"]["recompute"] == "none"
    kept = answer("train", *data, "--auto", "--rank", 3, "--lr", "0.01", "--out", tmp_path / "given")
    assert [d["what"] for d in kept["decisions"]] == ["budget"]
    refused = run("train", *data, "--auto", "--resume", "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "--resume keeps" in refused.stderr
