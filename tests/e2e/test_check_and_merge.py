"""`check`, `merge` and `bench` as a user runs them, on adapters and bases that are wrong in every way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.analysis import survival
from lorasmith.bases import fingerprint_directory, load_base
from lorasmith.cli import bench
from lorasmith.formats import read_adapter, write_adapter
from lorasmith.lora import Adapter
from tests.support.base import write_tiny_base
from tests.support.cli import run
from tests.support.models import make_adapter

WEIGHTS = "adapter_model.safetensors"
FORMATS = ["fp32", "bf16", "fp16", "int8", "nf4"]


def adapter_for(folder, base, **config) -> Adapter:
    """A lorasmith adapter with a sidecar, written to `folder`."""
    loaded = load_base(base, dtype="fp32")
    adapter = make_adapter(loaded.model, **config)
    adapter.provenance["base"] = {"name": "tiny", "fingerprint": fingerprint_directory(base).to_dict()}
    write_adapter(adapter, folder)
    return adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_tiny_base(folder / "base")
    write_tiny_base(folder / "other", seed=1)
    write_tiny_base(folder / "tied", tie_word_embeddings=True)
    adapter_for(folder / "good", folder / "base")
    return folder


def checked(folder, base, *more: str) -> tuple[int, dict]:
    result = run("check", folder, "--base", base, "--json", *more)
    return result.exit_code, json.loads(result.stdout)


def test_check_of_a_good_adapter(place):
    code, found = checked(place / "good", place / "base", "--effect")
    assert code == 0
    assert found["ok"]
    assert found["base_match"] is True
    assert found["effect"] > 0
    assert found["coverage"]["q_proj"] == {"0": [1, 1], "1": [1, 1]}


def edit(folder, change) -> None:
    """Change the tensors as a foreign tool would: the sidecar goes."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "lorasmith.json").unlink(missing_ok=True)


def drop_a_layer(tensors):
    for name in [n for n in tensors if ".layers.1." in n]:
        del tensors[name]


def zero_b(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def zero_one_b(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].zero_()


def plant_nan(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (drop_a_layer, "missing-factors", "layers.1.self_attn.q_proj"),
        (zero_b, "no-effect", "zero in every module"),
        (zero_one_b, "zero-factors", "layers.0.mlp.up_proj"),
        (plant_nan, "unreadable", "not finite"),
    ],
)
def test_check_names_what_is_wrong_with_the_numbers(place, tmp_path, change, kind, said):
    adapter_for(tmp_path / "a", place / "base", targets=["q_proj", "up_proj"])
    edit(tmp_path / "a", change)
    code, found = checked(tmp_path / "a", place / "base", "--effect")
    assert code == 1
    assert not found["ok"]
    assert found["base_match"] is None
    assert any(p["kind"] == kind and said in p["message"] for p in found["problems"])


def test_check_shows_every_fault_at_once(place, tmp_path):
    """A missing layer, a target that is nowhere, another base, a scaling out of proportion, a changed file."""
    adapter_for(tmp_path / "a", place / "base", targets=["q_proj", "up_proj"], alpha=3000)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["target_modules"].append("w_proj")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    drop_a_layer(tensors)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    code, found = checked(tmp_path / "a", place / "other")
    assert code == 1
    assert found["base_match"] is False
    assert {p["kind"] for p in found["problems"]} >= {
        "missing-factors", "unmatched-target", "base-mismatch", "unreadable",
    }  # fmt: skip
    text = run("check", tmp_path / "a", "--base", place / "other").stdout
    assert "differs in: the weights" in text
    (tmp_path / "a" / "lorasmith.json").unlink()
    assert "extreme-scaling" in {p["kind"] for p in checked(tmp_path / "a", place / "base")[1]["problems"]}


def test_check_loads_no_weight_of_the_base(place, monkeypatch):
    fingerprint_directory(place / "base")

    def refuse(*args, **kwargs):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("lorasmith.bases.load_base", refuse)
    monkeypatch.setattr("lorasmith.bases.load._load_model", refuse)
    assert checked(place / "good", place / "base")[0] == 0


def test_a_partly_missing_adapter_is_reported_wherever_it_is_loaded(place, tmp_path):
    adapter_for(tmp_path / "a", place / "base", targets=["q_proj", "up_proj"])
    edit(tmp_path / "a", drop_a_layer)
    arguments = ["--base", place / "base", "--adapter", tmp_path / "a", "--prompt", "x", "--max-tokens", 1]
    result = run("generate", *arguments)
    assert result.exit_code == 0
    assert "missing-factors: model.layers.1.self_attn.q_proj" in result.stderr
    edit(tmp_path / "a", zero_b)
    assert "no-effect" in run("generate", *arguments).stderr


def test_merge_without_out_shows_the_survival_in_every_format(place):
    result = run("merge", place / "good", "--base", place / "base", "--dtype", "bf16", "--json")
    found = json.loads(result.stdout)
    assert list(found["formats"]) == FORMATS
    adapter, base = read_adapter(place / "good"), load_base(place / "base", dtype="fp32")
    path = "model.layers.0.mlp.up_proj"
    expected = survival(base.model.get_submodule(path).weight.bfloat16(), adapter.factors[path], "bf16")
    assert found["survival"]["modules"][path]["kept"] == pytest.approx(expected.kept, abs=1e-12)
    assert found["survival"]["modules"].keys() == adapter.factors.keys()
    errors = [found["formats"][name]["relative_error"] for name in ("fp32", "fp16", "bf16", "int8", "nf4")]
    assert errors == sorted(errors)
    assert "nothing was written" in run("merge", place / "good", "--base", place / "base").stdout


def test_a_tied_head_is_merged_and_loads_again(place, tmp_path):
    adapter_for(tmp_path / "a", place / "tied", targets=["lm_head", "q_proj"])
    arguments = (
        "merge",
        tmp_path / "a",
        "--base",
        place / "tied",
        "--out",
        tmp_path / "m",
        "--dtype",
        "fp32",
    )
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["max_abs_logit_diff"] < 1e-4
    tied, merged = (
        load_base(place / "tied", dtype="fp32").model,
        load_base(tmp_path / "m", dtype="fp32").model,
    )
    assert torch.equal(merged.get_input_embeddings().weight, tied.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, tied.lm_head.weight)


def test_bench_runs_a_file_and_records_it(tmp_path, monkeypatch):
    shutil.copy(bench.FOLDER / "record.py", tmp_path)
    (tmp_path / "bench_nothing.py").write_text(
        "ABOUT = {'seed': 7}\n"
        "def run(peers, quick):\n    return [dict(what='sums', ours=1.0, peer=None, ratio=None, quick=quick)]\n"
    )
    (tmp_path / "bench_script.py").write_text("")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "record", raising=False)
    result = run("bench", "nothing", "--quick", "--json")
    assert json.loads(result.stdout)["rows"][0]["what"] == "sums"
    line = json.loads((tmp_path / "records" / "nothing.jsonl").read_text())
    assert line["seed"] == 7
    assert line["rows"][0]["quick"] is True
    assert {"device", "threads", "versions", "commit", "date"} <= line.keys()
    assert "sums" in run("bench", "nothing").stdout
    for name, said in (("noting", 'Did you mean "nothing"'), ("script", "has no run(peers, quick)")):
        result = run("bench", name)
        assert result.exit_code == 2
        assert said in result.stderr
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "none")
    assert "installed without its benchmarks" in run("bench", "switch").stderr


def test_the_switch_benchmark_can_be_loaded():
    assert bench._load("switch")[0].ABOUT["base"] == "smollm2-135m"
