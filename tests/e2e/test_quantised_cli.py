"""A quantised base through the commands: trained on, evaluated, served, checked and merged."""

from __future__ import annotations

import json

import pytest
import torch

from lorasmith.analysis import survival_report
from lorasmith.bases import load_base
from lorasmith.engine import Engine, Request
from lorasmith.formats import read_adapter
from lorasmith.inject import base_matrices, inject, merge
from lorasmith.quantised import dequantise_linears, quantisation_of
from tests.support.base import write_tiny_base
from tests.support.cli import answer, run
from tests.support.tolerance import close

RECORDS = [{"prompt": f"{c}{c} is", "completion": f" {c.upper()}{i}."} for i, c in enumerate("abcdefgh")]
QUICK = ("--rank", "4", "--lr", "0.02", "--epochs", "12", "--batch-size", "4", "--dtype", "fp32")
KIND = pytest.mark.parametrize("kind", ["nf4", "int8"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_tiny_base(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for kind in ("nf4", "int8"):
        asked = ("--base", folder / "base", "--data", folder / "data.jsonl", "--out", folder / kind, *QUICK)
        (folder / f"{kind}.json").write_text(json.dumps(answer("train", *asked, "--quantize", kind)))
    return folder


@KIND
def test_training_learns_and_notes_what_it_was_trained_on(place, kind):
    adapter = place / kind / "adapter"
    base = ("--base", place / "base", "--data", place / "data.jsonl", "--dtype", "fp32", "--quantize", kind)
    before, after = answer("eval", *base), answer("eval", *base, "--adapter", adapter)
    assert after["loss"] < 0.8 * before["loss"]
    noted = read_adapter(adapter).provenance["base"]["fingerprint"]
    assert noted["quantised"] == kind
    assert json.loads((place / kind / "run.json").read_text())["base_fingerprint"] == noted
    kernels = json.loads((place / kind / "run.json").read_text())["policy"]
    assert any("block (proved on a probe for 2 of 2 layers" in line for line in kernels)


@KIND
def test_check_against_the_right_the_plain_and_the_other_base(place, kind):
    def checked(*more):
        result = run("check", place / kind / "adapter", "--base", place / "base", "--json", *more)
        return result.exit_code, json.loads(result.stdout)

    code, found = checked("--quantize", kind, "--effect")
    assert (code, found["base_match"], found["ok"]) == (0, True, True)
    assert found["effect"] > 0
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    for more, here in (((), "none"), (("--quantize", other), other)):
        code, found = checked(*more)
        assert (code, found["base_match"]) == (1, False)
        assert f"differs in: the quantisation ({kind} there, {here} here)" in found["problems"][0]["message"]
    result = run("check", place / kind / "adapter", "--base", place / "base", "--quantize", "nf3")
    assert result.exit_code == 2
    assert 'quantize="nf3" is unknown' in result.stderr


@KIND
def test_the_engine_serves_what_the_model_computes(place, kind):
    adapter = read_adapter(place / kind / "adapter")
    base = load_base(place / "base", dtype="fp32", quantize=kind)
    engine = Engine(base, max_rows=2, merge_after_steps=1)
    engine.add_adapter("tuned", adapter)
    assert "not plain nn.Linear" in engine.why_not_fast
    ids = base.tokenizer("cc is").input_ids
    served = engine.generate(
        [Request(ids, adapter=name, max_tokens=6, ignore_eos=True) for name in ("tuned", None)]
    )
    alone = engine.generate([Request(ids, adapter="tuned", max_tokens=6, ignore_eos=True)])
    engine.close()
    assert alone[0].token_ids == served[0].token_ids  # codes cannot be merged into, so it stays unmerged
    assert greedy(base.model, ids) == list(served[1].token_ids)
    inject(base.model, adapter)
    assert greedy(base.model, ids) == list(served[0].token_ids)


@torch.no_grad()
def greedy(model, ids, count=6):
    tokens = torch.tensor([ids])
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(ids) :].tolist()


@KIND
def test_merge_writes_the_dequantised_base_with_the_adapter_in_it(place, kind, tmp_path):
    adapter = place / kind / "adapter"
    out = tmp_path / "merged"
    made = answer(
        "merge", adapter, "--base", place / "base", "--quantize", kind, "--out", out, "--dtype", "fp32"
    )
    tuned = read_adapter(adapter)
    wanted = load_base(place / "base", dtype="fp32", quantize=kind).model
    dequantise_linears(wanted)
    report = survival_report(base_matrices(wanted, tuned), tuned, torch.float32)
    assert made["survival"]["kept"] == pytest.approx(report.kept)
    merge(wanted, tuned)
    found = load_base(out, dtype="fp32").model
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    ids = torch.arange(8)[None]
    live = load_base(place / "base", dtype="fp32", quantize=kind).model
    inject(live, tuned)
    close(found(ids).logits, live(ids).logits, torch.float32)


@KIND
def test_a_plain_merge_is_refused_and_says_what_differs(place, kind, tmp_path):
    out = tmp_path / "merged"
    result = run("merge", place / kind / "adapter", "--base", place / "base", "--out", out)
    assert result.exit_code == 2
    assert f"the quantisation ({kind} there, none here)" in result.stderr
    assert not out.exists()


@KIND
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loading_quantises_the_files_numbers_in_any_dtype(place, kind, dtype):
    base = load_base(place / "base", dtype=dtype, quantize=kind)
    found = quantisation_of(base.model)
    assert found.layers == 14
    assert f"{kind}: 14 linear layers of {found.params:,} weights at" in base.dtype_reason
    wide = load_base(place / "base", dtype="fp32", quantize=kind)
    for (name, one), (_, other) in zip(base.model.named_buffers(), wide.model.named_buffers(), strict=True):
        assert torch.equal(one, other), name  # the codes come from the file, not from what bf16 leaves of it
    wanted = load_base(place / "base", dtype=dtype).model.dtype
    assert {p.dtype for p in base.model.parameters()} == {wanted} == {base.model.dtype}
    assert base.fingerprint.digest != load_base(place / "base").fingerprint.digest


@pytest.mark.parametrize("method", ["full", "top-k", "intrinsic"])
def test_methods_that_change_weights_refuse_codes(place, tmp_path, method):
    asked = (
        "--base",
        place / "base",
        "--data",
        place / "data.jsonl",
        "--out",
        tmp_path / "run",
        "--quantize",
        "nf4",
    )
    result = run("train", *asked, "--method", method)
    assert result.exit_code == 2
    assert "can neither be trained" in result.stderr
    assert not (tmp_path / "run").exists()


def test_plan_sweep_and_a_run_file(place, tmp_path):
    asked = ("--base", place / "base", "--data", place / "data.jsonl", "--dtype", "fp32")
    plain, four = answer("plan", *asked), answer("plan", *asked, "--quantize", "nf4")
    assert four["lora"]["weights_bytes"] < plain["lora"]["weights_bytes"]
    assert four["full"]["weights_bytes"] == plain["full"]["weights_bytes"]
    base = load_base(place / "base", dtype="fp32", quantize="nf4").model
    held = sum(p.nbytes for p in base.parameters()) + quantisation_of(base).stored_bytes
    assert four["lora"]["weights_bytes"] == held
    file = tmp_path / "run.toml"
    file.write_text('quantize = "nf4"\n[train]\nmax_steps = 2\n')
    answer("train", *asked, "--out", tmp_path / "run", "--config", file)
    assert read_adapter(tmp_path / "run" / "adapter").provenance["base"]["fingerprint"]["quantised"] == "nf4"
    swept = answer(
        "sweep",
        *asked,
        "--out",
        tmp_path / "sweep",
        "--grid",
        "rank=2,4",
        "--max-steps",
        "2",
        "--quantize",
        "nf4",
    )
    best = read_adapter(swept["runs"][0]["adapter_dir"])
    assert best.provenance["base"]["fingerprint"]["quantised"] == "nf4"
