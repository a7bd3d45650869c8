"""The methods LoRA is compared with, as a user runs them: train, then everything that reads what was written."""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_cli import RECORDS, answer, run
from tests.support.base import write_tiny_base

METHODS = {
    "houlsby": ("--bottleneck", 4),
    "lin": ("--bottleneck", 4),
    "prefix": ("--virtual-tokens", 2),
    "prompt": ("--init-text", "say it"),
    "bitfit": ("--biases", "added"),
    "top-k": ("--top-layers", 1),
    "intrinsic": ("--dimension", 50, "--said"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_tiny_base(folder / "base")
    write_tiny_base(folder / "other", seed=1)
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return folder


def trained(place, method: str, *options: object) -> dict:
    out = place / f"{method}-run"
    data = ("--base", place / "base", "--data", place / "data.jsonl")
    return answer("train", *data, "--out", out, "--method", method, "--epochs", 8, "--lr", 0.02, *options)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_read_by_every_command(place, method):
    data = ("--base", place / "base", "--data", place / "data.jsonl")
    before = answer("eval", *data)
    folder = trained(place, method, *METHODS[method])["adapter_dir"]
    after = answer("eval", *data, "--adapter", folder, "--metric", "loss,bleu,accuracy", "--max-tokens", 4)
    assert after["loss"] < before["loss"]
    assert after["bleu"] is not None
    said = answer(
        "generate", "--base", place / "base", "--adapter", folder, "--prompt", "say ab", "--max-tokens", 4
    )
    assert said["tokens"] <= 4
    assert said["adapter"] == folder
    assert len(said["adapter_digest"]) == 64
    looked = answer("inspect", folder)
    assert looked["method"] == method
    assert looked["params"] == sum(m["params"] for m in looked["modules"])
    checked = answer("check", folder, "--base", place / "base", "--effect")
    assert checked["ok"]
    assert checked["effect"] > 0
    assert method in run("inspect", folder).stdout
    wrong = run("check", folder, "--base", place / "other")
    assert wrong.exit_code == 1
    assert "another base" in wrong.stdout
    for command in (("merge", folder, "--base", place / "base", "--out", place / "merged"), ("eval", *data[:1], place / "other", *data[2:], "--adapter", folder)):  # fmt: skip
        refused = run(*command)
        assert refused.exit_code == 2
        assert ("no LoRA adapter" in refused.stderr) or ("differs in" in refused.stderr)
    assert not (place / "merged").exists()


def test_a_full_fine_tune_is_a_base(place):
    folder = trained(place, "full")["adapter_dir"]
    data = ("--data", place / "data.jsonl")
    assert (
        answer("eval", "--base", folder, *data)["loss"]
        < answer("eval", "--base", place / "base", *data)["loss"]
    )
    refused = run("eval", "--base", place / "base", *data, "--adapter", folder)
    assert refused.exit_code == 2
    assert "give it as --base" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "houlsby", "--rank", 4), "--rank: belongs to LoRA"),
        (("--bottleneck", 4), "belongs to houlsby, lin, and the method is lora"),
        (("--method", "bitfit"), 'biases="added"'),
        (("--method", "houlsbi"), "use one of lora, full, houlsby"),
        (("--method", "prompt", "--recompute", "layers"), "keeps what its layers compute"),
    ],
)
def test_what_cannot_be_is_refused(place, options, message):
    data = ("--base", place / "base", "--data", place / "data.jsonl", "--out", place / "never")
    result = run("train", *data, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (place / "never").exists()


def test_a_method_shares_no_batch(place):
    folder = trained(place, "houlsby", "--bottleneck", 4, "--resume")["adapter_dir"]
    result = run(
        "generate", "--base", place / "base", "--adapter", folder, "--adapter", f"b={folder}", "--prompt", "a"
    )
    assert result.exit_code == 2
    assert "Give it alone" in result.stderr
