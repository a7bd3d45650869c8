"""inspect, compress, combine, extract and export as a user runs them, and wrong inputs with their messages."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorasmith.bases import load_base
from lorasmith.formats import read_adapter, write_adapter
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import LoRAConfig
from tests.support.base import write_tiny_base
from tests.support.cli import answer, run
from tests.support.models import randomise
from tests.support.tolerance import close


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two bases; adapters a and b of the first with their sidecars, c of the second, d without a sidecar."""
    folder = tmp_path_factory.mktemp("algebra")
    for number, name in enumerate(("base", "other")):
        write_tiny_base(folder / name, seed=number)
        base = load_base(str(folder / name), dtype="fp32")
        for seed, adapter in enumerate({"base": "abd", "other": "c"}[name]):
            config = LoRAConfig(rank=4, alpha=8, exclude=["down_proj"] if adapter == "b" else [])
            inject(base.model, config, seed=seed)
            made = randomise(extract(base.model), seed=seed)
            eject(base.model)
            if adapter != "d":
                made.provenance = {"base": {"name": base.name, "fingerprint": base.fingerprint.to_dict()}}
            write_adapter(made, folder / adapter)
    return folder


@pytest.fixture(scope="module")
def tuned(place):
    """The base plus adapter a and noise, as a fine-tune in two shards: (folder, path → what was added)."""
    shutil.copytree(place / "base", place / "tuned")
    file = place / "tuned" / "model.safetensors"
    weights, adapter = load_file(file), read_adapter(place / "a")
    file.unlink()
    added = {p: f.scaling * (f.B.double() @ f.A.double()) for p, f in adapter.factors.items()}
    for path, delta in added.items():
        weights[f"{path}.weight"] = (weights[f"{path}.weight"].double() + delta).float()
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({n: weights[n] for n in held}, place / "tuned" / shard, metadata={"format": "pt"})
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (place / "tuned" / "model.safetensors.index.json").write_text(json.dumps(index))
    return place / "tuned", added


def dense(adapter) -> dict[str, torch.Tensor]:
    return {p: f.scaling * (f.B.double() @ f.A.double()) for p, f in adapter.factors.items()}


def is_png(path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5_000


def test_inspect(place, tmp_path):
    result = answer("inspect", place / "a", "--plot", tmp_path / "a.png")
    adapter = read_adapter(place / "a")
    assert result["params"] == adapter.num_params
    assert result["bytes"] == adapter.num_bytes
    assert {m["path"] for m in result["modules"]} == set(adapter.factors)
    for module in result["modules"]:
        S = torch.linalg.svdvals(dense(adapter)[module["path"]])[: module["rank"]]
        shares = S**2 / (S**2).sum()
        close(torch.tensor(module["energy"]), shares.cumsum(0), torch.float32)
        assert module["effective_rank"] == pytest.approx(
            (-(shares * shares.log()).sum()).exp().item(), rel=1e-5
        )
    assert is_png(tmp_path / "a.png")
    text = run("inspect", place / "a")
    assert text.exit_code == 0
    assert "q_proj" in text.stdout


def test_inspect_against_another(place, tmp_path):
    result = answer("inspect", place / "a", "--against", place / "b", "--plot", tmp_path / "ab.png")
    a, b = dense(read_adapter(place / "a")), dense(read_adapter(place / "b"))
    flat_a = torch.cat([a[p].flatten() for p in sorted(a)])
    flat_b = torch.cat([b.get(p, torch.zeros_like(a[p])).flatten() for p in sorted(a)])
    wanted = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0).item()
    assert result["comparison"]["cosine"] == pytest.approx(wanted, abs=1e-9)
    distance = (flat_a - flat_b).norm() / flat_a.norm()
    assert result["comparison"]["relative_difference"] == pytest.approx(distance.item(), rel=1e-9)
    assert is_png(tmp_path / "ab.png")
    assert "cosine" in run("inspect", place / "a", "--against", place / "b").stdout


@pytest.mark.parametrize(("option", "value"), [("--rank", 2), ("--energy", 0.7)])
def test_compress(place, tmp_path, option, value):
    result = answer("compress", place / "a", option, value, "--out", tmp_path / "small")
    before, after = read_adapter(place / "a"), read_adapter(tmp_path / "small")
    lost = sum((dense(before)[p] - d).norm() ** 2 for p, d in dense(after).items())
    size = sum(d.norm() ** 2 for d in dense(before).values())
    assert result["relative_error"] == pytest.approx((lost / size).sqrt().item(), rel=1e-4)
    tails = 0.0
    for path, delta in dense(before).items():
        S2 = torch.linalg.svdvals(delta) ** 2
        kept = value if option == "--rank" else int((S2.cumsum(0) / S2.sum() < value).sum()) + 1
        assert after.factors[path].rank == kept
        tails += float(S2[kept:].sum())
    assert result["relative_error"] == pytest.approx((tails / float(size)) ** 0.5, rel=1e-4)
    assert result["rank_before"] == 4
    assert result["rank_after"] == max(f.rank for f in after.factors.values())
    made_by = after.provenance["made_by"]
    assert made_by["from"][0]["digest"] == before.digest
    assert made_by["command"] == "compress"
    assert is_png(tmp_path / "small.png")
    assert answer("check", tmp_path / "small", "--base", place / "base")["base_match"] is True


def test_combine(place, tmp_path):
    result = answer("combine", place / "a", place / "b", "--weights", "0.5,-2", "--out", tmp_path / "sum")
    a, b = dense(read_adapter(place / "a")), dense(read_adapter(place / "b"))
    made = read_adapter(tmp_path / "sum")
    for path, delta in dense(made).items():
        close(delta, 0.5 * a[path] - 2 * b.get(path, torch.zeros_like(a[path])), torch.float32)
    assert made.factors.keys() == a.keys()
    assert result["relative_error"] < 1e-6
    assert result["rank"] == 8
    assert result["base_verified"]
    assert made.provenance["made_by"]["settings"]["weights"] == [0.5, -2.0]
    assert [s["digest"] for s in made.provenance["made_by"]["from"]] == [
        read_adapter(place / n).digest for n in "ab"
    ]
    assert is_png(tmp_path / "sum.png")
    assert answer("check", tmp_path / "sum", "--base", place / "base")["base_match"] is True


@pytest.mark.parametrize("method", ["concat", "svd", "ties", "dare"])
def test_every_method_of_combine_says_its_error(place, tmp_path, method):
    result = answer("combine", place / "a", place / "b", "--method", method, "--out", tmp_path / "x")
    made = read_adapter(tmp_path / "x")
    assert result["rank"] == (8 if method == "concat" else 4)
    if method in ("concat", "svd"):
        total = {
            p: d + dense(read_adapter(place / "b")).get(p, 0)
            for p, d in dense(read_adapter(place / "a")).items()
        }
        lost = sum((total[p] - d).norm() ** 2 for p, d in dense(made).items()).sqrt()
        size = sum(d.norm() ** 2 for d in total.values()).sqrt()
        assert result["relative_error"] == pytest.approx((lost / size).item(), rel=1e-3, abs=1e-6)


def test_combine_says_what_it_cannot_verify(place, tmp_path):
    result = run("combine", place / "a", place / "d", "--out", tmp_path / "x", "--json")
    assert result.exit_code == 0
    assert "cannot be verified" in result.stderr
    assert json.loads(result.stdout)["base_verified"] is False
    # what was not verified may not look verified afterwards
    assert answer("check", tmp_path / "x", "--base", place / "base")["base_match"] is None
    assert answer(
        "combine", place / "a", place / "c", "--out", tmp_path / "y", "--allow-base-mismatch"
    )["base_verified"] is False  # fmt: skip


def test_extract(place, tuned, tmp_path):
    folder, added = tuned
    result = answer(
        "extract", "--base", place / "base", "--tuned", folder, "--rank", 4, "--out", tmp_path / "x"
    )
    made = read_adapter(tmp_path / "x")
    assert made.factors.keys() == added.keys()
    for path, delta in dense(made).items():
        close(delta, added[path], torch.float32)
    assert result["relative_error"] < 1e-5
    assert 0 < result["captured"] < 1
    assert list(result["not_captured"]) == ["model.norm.weight"]
    assert is_png(tmp_path / "x.png")
    assert answer("check", tmp_path / "x", "--base", place / "base")["base_match"] is True
    assert made.provenance["made_by"]["from"][0]["fingerprint"]["weights"]


def test_extract_knows_weights_that_are_stored_transposed(tmp_path):
    from tests.support.models import tiny_causal_lm

    model = tiny_causal_lm("gpt2")
    model.save_pretrained(tmp_path / "base")
    inject(model, LoRAConfig(rank=2, alpha=2))
    adapter = randomise(extract(model))
    eject(model)
    from lorasmith.inject import merge

    merge(model, adapter)
    model.save_pretrained(tmp_path / "tuned")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    result = answer("extract", "--base", base, "--tuned", tuned, "--rank", 2, "--out", tmp_path / "x")
    assert result["relative_error"] < 1e-4
    made = read_adapter(tmp_path / "x")
    for path, delta in dense(adapter).items():
        assert (dense(made)[path] - delta).norm() < 1e-4 * delta.norm()


def test_export_to_each_and_back_from_mlx(place, tmp_path):
    a = read_adapter(place / "a")
    wanted = {
        "peft": {"adapter_model.safetensors", "adapter_config.json", "lorasmith.json"},
        "portable": {"adapter_model.safetensors", "adapter_config.json", "lorasmith.json"},
        "mlx": {"adapters.safetensors", "adapter_config.json", "lorasmith.json"},
        "gguf": {"adapter.gguf", "lorasmith.json"},
    }
    for target, files in wanted.items():
        result = answer("export", place / "a", "--to", target, "--out", tmp_path / target)
        assert {f.rpartition("/")[2] for f in result["files"]} == files
        assert result["verdicts"].keys() == {"peft", "vllm", "sglang", "llama.cpp", "mlx"}
        assert all(v["reason"] for v in result["verdicts"].values())
        assert (result["launch"] is not None) == (target in ("peft", "portable"))
    assert read_adapter(tmp_path / "peft").digest == a.digest
    assert all(f.scaling == 1 for f in read_adapter(tmp_path / "portable").factors.values())
    answer("export", tmp_path / "mlx", "--to", "peft", "--out", tmp_path / "back", "--base", place / "base")
    back = read_adapter(tmp_path / "back")
    assert back.digest == a.digest
    assert answer("check", tmp_path / "back", "--base", place / "base")["base_match"] is True
    note = json.loads((tmp_path / "gguf" / "lorasmith.json").read_text())
    assert note["provenance"]["made_by"]["from"][0]["digest"] == a.digest
    text = run("export", place / "a", "--to", "portable", "--out", tmp_path / "said")
    assert "scaling folded into B exactly" in text.stdout
    launch = text.stdout.rstrip().rpartition("\n")[2].split()
    assert launch[:3] == ["vllm", "serve", str(place / "base")]
    assert f"said={tmp_path / 'said'}" in launch


def test_dora_is_exported_as_plain_lora_with_its_residual(place, tmp_path):
    base = load_base(str(place / "base"), dtype="fp32")
    plain = read_adapter(place / "a")
    norms = {p: base.model.get_parameter(f"{p}.weight").detach().norm(dim=1) for p in plain.factors}
    scale = torch.linspace(0.9, 1.1, 1000)
    magnitudes = {p: norm * scale[: len(norm)] for p, norm in norms.items()}
    write_adapter(replace(plain, extras=replace(plain.extras, magnitudes=magnitudes)), tmp_path / "dora")
    arguments = ("export", tmp_path / "dora", "--to", "portable", "--base", place / "base")
    default = answer(*arguments, "--out", tmp_path / "default")
    whole = answer(*arguments, "--rank", 1000, "--out", tmp_path / "whole")
    assert 0.01 < default["dora_residual"] < 1
    assert whole["dora_residual"] < 1e-5
    ids = torch.arange(8)[None]
    inject(base.model, read_adapter(tmp_path / "dora"))
    expected = base.model(ids).logits
    eject(base.model)
    inject(base.model, read_adapter(tmp_path / "whole"))
    close(base.model(ids).logits, expected, torch.float32)
    assert not read_adapter(tmp_path / "default").extras
    assert run("export", place / "a", "--to", "peft", "--rank", 3, "--out", tmp_path / "no").exit_code == 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_agrees_on_the_portable_export(place, tmp_path):
    peft = pytest.importorskip("peft")
    answer("export", place / "a", "--to", "portable", "--out", tmp_path / "p")
    base = load_base(str(place / "base"), dtype="fp32")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        inject(base.model, read_adapter(place / "a"))
        ours = base.model(ids).logits
        eject(base.model)
        theirs = peft.PeftModel.from_pretrained(base.model, tmp_path / "p")(ids).logits
    close(theirs, ours, torch.float32)


def spoiled(place, tmp_path, name):
    a, b, c, d, base = (place / n for n in ("a", "b", "c", "d", "base"))
    out = tmp_path / "out"
    if name in ("damaged", "not finite"):
        shutil.copytree(a, tmp_path / "copy")
        file = tmp_path / "copy" / "adapter_model.safetensors"
        with safe_open(file, "pt") as handle:
            tensors = {n: handle.get_tensor(n) for n in handle.keys()}  # noqa: SIM118
        if name == "not finite":
            next(iter(tensors.values()))[0, 0] = float("inf")
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            file.write_bytes(file.read_bytes()[:-7])
        return ["inspect", tmp_path / "copy"]
    if name in ("other shapes", "tuned of other shapes"):
        write_tiny_base(tmp_path / "wide", hidden_size=48, intermediate_size=64)
        model = load_base(str(tmp_path / "wide"), dtype="fp32").model
        inject(model, LoRAConfig(rank=4))
        write_adapter(randomise(extract(model)), tmp_path / "wide-adapter")
        if name == "other shapes":
            return ["combine", d, tmp_path / "wide-adapter", "--out", out]
        return ["extract", "--base", base, "--tuned", tmp_path / "wide", "--rank", 2, "--out", out]
    (tmp_path / "taken.png").touch()
    if name.startswith("broken config"):
        shutil.copytree(base, tmp_path / "broken")
        (tmp_path / "broken" / "config.json").write_text("[" if name.endswith("extract") else "[]")
        rest = ["--base", tmp_path / "broken", "--out", out, "--allow-base-mismatch"]
        if name.endswith("extract"):
            return ["extract", "--tuned", place / "other", "--rank", 2, *rest[:-1]]
        return ["export", d, "--to", "gguf", *rest]
    combined = ["combine", a, b, "--out", out]
    small = ["compress", a, "--out", out]
    pulled = ["extract", "--base", base, "--tuned", place / "other", "--out", out]
    return {
        "rank 0": [*small, "--rank", 0],
        "rank and energy": [*small, "--rank", 2, "--energy", 0.9],
        "neither": small,
        "energy": [*small, "--energy", 1.5],
        "out exists": ["compress", a, "--rank", 2, "--out", b],
        "unwritable": ["compress", a, "--rank", 2, "--out", "/proc/nowhere/out"],
        "plot exists": [*small, "--rank", 2, "--plot", a / "adapter_config.json"],
        "plot of another kind": [*small, "--rank", 2, "--plot", tmp_path / "x.svg"],
        "plot nowhere": [*small, "--rank", 2, "--plot", tmp_path / "gone" / "x.png"],
        "plot in the way": ["compress", a, "--rank", 2, "--out", tmp_path / "taken"],
        "one adapter": ["combine", a, "--out", out],
        "twice the same": ["combine", a, a, "--out", out],
        "no weights": [*combined, "--weights", ""],
        "few weights": [*combined, "--weights", "1"],
        "weights in words": [*combined, "--weights", "half,half"],
        "infinite weights": [*combined, "--weights", "inf,1"],
        "method": [*combined, "--method", "tie"],
        "rank of a sum": [*combined, "--rank", 3],
        "density": [*combined, "--method", "ties", "--density", 2],
        "density of a sum": [*combined, "--density", 0.5],
        "other base": ["combine", a, c, "--out", out],
        "format": ["export", a, "--to", "gguff", "--out", out],
        "export in the way": ["export", a, "--to", "mlx", "--out", b],
        "gguf without a base": ["export", d, "--to", "gguf", "--out", out],
        "export of another base": ["export", a, "--to", "gguf", "--out", out, "--base", place / "other"],
        "not an adapter": ["export", base, "--to", "peft", "--out", out],
        "no such adapter": ["inspect", tmp_path / "none"],
        "against nothing": ["inspect", a, "--against", tmp_path / "none"],
        "inspect over something": ["inspect", a, "--plot", place / "base" / "config.json"],
        "same model": ["extract", "--base", base, "--tuned", base, "--rank", 2, "--out", out],
        "tuned is an adapter": ["extract", "--base", base, "--tuned", a, "--rank", 2, "--out", out],
        "extract rank": [*pulled, "--rank", -1],
        "extract without rank": pulled,
        "no such tuned model": [
            "extract",
            "--base",
            base,
            "--tuned",
            tmp_path / "n",
            "--rank",
            1,
            "--out",
            out,
        ],
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rank 0", "rank=0: use a whole number of at least 1"),
        ("rank and energy", "give exactly one of the two"),
        ("neither", "give exactly one of the two"),
        ("energy", "use a share above 0 and up to 1"),
        ("out exists", "exists already. Choose another folder; nothing was written"),
        ("unwritable", "cannot be written"),
        ("plot exists", "ends in .png"),
        ("plot of another kind", "ends in .png"),
        ("plot nowhere", "its folder cannot be written"),
        ("plot in the way", "where the plot would go"),
        ("one adapter", "give at least two"),
        ("twice the same", "give at least two"),
        ("no weights", "0 given for 2 adapters"),
        ("few weights", "1 given for 2 adapters"),
        ("weights in words", "use numbers with commas between them"),
        ("infinite weights", "use finite numbers"),
        ("method", 'Did you mean "ties"'),
        ("rank of a sum", 'use method="svd" to limit the rank'),
        ("density", "use a share above 0 and up to 1"),
        ("density of a sum", "only ties and dare have one"),
        ("other base", "differs from"),
        ("other shapes", "differ in shape"),
        ("damaged", "adapter_model.safetensors"),
        ("not finite", "not finite"),
        ("format", 'Did you mean "gguf"'),
        ("export in the way", "exists already"),
        ("gguf without a base", "give it with --base"),
        ("export of another base", "trained on another base"),
        ("not an adapter", "adapter_model.safetensors"),
        ("no such adapter", "does not exist"),
        ("against nothing", "does not exist"),
        ("inspect over something", "ends in .png"),
        ("broken config, extract", "config.json cannot be read"),
        ("broken config, export", "config.json"),
        ("same model", "nothing to extract"),
        ("tuned is an adapter", "it holds an adapter, not a base"),
        ("extract rank", "use a whole number of at least 1"),
        ("extract without rank", "give exactly one of the two"),
        ("no such tuned model", "there is no directory"),
        ("tuned of other shapes", "its shape changed"),
    ],
)
def test_wrong_input(place, tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    result = run(*spoiled(place, tmp_path, name))
    assert result.exit_code == 2, result.output + result.stderr
    assert said.lower() in result.stderr.lower()
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.png").exists()
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
