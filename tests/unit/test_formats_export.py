"""Exports read back by independent readers, each applying its runtime's rule: the same deltas."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorasmith.errors import AdapterFileError
from lorasmith.formats import (
    is_mlx,
    judge_peft,
    make_portable,
    read_adapter,
    read_header,
    read_mlx,
    vllm_launch,
    write_adapter,
    write_gguf,
    write_mlx,
)
from lorasmith.lora import Adapter, Factors, Layout, LoRAConfig, TokenRows
from tests.support.tolerance import close

SHAPES = {"self_attn.q_proj": (16, 12), "self_attn.k_proj": (8, 12), "mlp.down_proj": (12, 20)}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def make_adapter(config: LoRAConfig | None = None, *, dtype=torch.float32, shapes=SHAPES) -> Adapter:
    config = config or LoRAConfig(rank=4, alpha=8)
    g = torch.Generator().manual_seed(0)
    factors = {}
    for path in (f"model.layers.{n}.{name}" for n in (0, 1) for name in shapes):
        out, inn = shapes[path.split(".", 3)[3]]
        rank = config.rank_of(path)
        A = torch.randn(rank, inn, generator=g).to(dtype)
        factors[path] = Factors(A, torch.randn(out, rank, generator=g).to(dtype), config.scaling_of(path))
    return Adapter(config, factors, provenance={"note": "x"})


CONFIGS = {
    "plain": LoRAConfig(rank=4, alpha=8),
    "rslora": LoRAConfig(rank=4, alpha=6, rslora=True),
    "patterns": LoRAConfig(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3.0}),
    "awkward": LoRAConfig(rank=3, alpha=7, rank_pattern={"layers.1.mlp.down_proj": 5}),
}


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {p: f.scaling * (f.B.double() @ f.A.double()) for p, f in adapter.factors.items()}


# --- readers, written from the facts about each runtime and from nothing else ---------------------------


def peft_tensors(folder: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            path, part = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
            pairs.setdefault(path, {})[part] = file.get_tensor(name).double()
    return settings, pairs


def runtime_deltas(folder: Path, runtime: str) -> dict[str, torch.Tensor]:
    settings, pairs = peft_tensors(folder)

    def pattern(name: str, path: str, default: float) -> float:
        hits = [v for k, v in settings[name].items() if re.match(rf"(.*\.)?({k})$", path)]
        return hits[0] if hits else default

    def scaling(path: str, rank: int) -> float:
        r, alpha, rslora = settings["r"], settings["lora_alpha"], settings["use_rslora"]
        if runtime == "peft":
            r, alpha = pattern("rank_pattern", path, r), pattern("alpha_pattern", path, alpha)
            return alpha / (math.sqrt(r) if rslora else r)
        if runtime == "vllm":  # no patterns
            return alpha / (math.sqrt(r) if rslora else r)
        if runtime == "sglang":  # neither patterns nor use_rslora
            return alpha / r
        return (
            alpha / rank
        )  # llama.cpp's converter keeps lora_alpha; its runtime divides by the tensor's rank

    return {p: scaling(p, ab["A"].shape[0]) * (ab["B"] @ ab["A"]) for p, ab in pairs.items()}


RUNTIMES = ("peft", "vllm", "sglang", "llama.cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_portable_means_the_same_in_every_runtime(tmp_path, name, dtype):
    adapter = make_adapter(CONFIGS[name], dtype=dtype)
    folded = make_portable(adapter)
    write_adapter(folded.adapter, tmp_path / "out")
    for runtime in RUNTIMES:
        for path, delta in runtime_deltas(tmp_path / "out", runtime).items():
            close(delta, dense(adapter)[path], torch.float32)
    settings, pairs = peft_tensors(tmp_path / "out")
    assert settings["r"] == settings["lora_alpha"] == max(f.rank for f in adapter.factors.values())
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert not settings["use_rslora"]
    assert isinstance(settings["target_modules"], list)
    assert {ab["A"].shape[0] for ab in pairs.values()} == {settings["r"]}
    verdicts = judge_peft(read_header(tmp_path / "out"))
    assert all(verdicts[runtime].ok for runtime in RUNTIMES)
    if name == "plain" and dtype != torch.float64:
        assert folded.is_exact
        assert all(
            torch.equal(d, dense(adapter)[p]) for p, d in runtime_deltas(tmp_path / "out", "vllm").items()
        )
        assert next(iter(folded.adapter.factors.values())).A.dtype == dtype
    if name == "awkward":
        assert not folded.is_exact
        assert 0 < folded.largest_error < 2**-23
        assert next(iter(folded.adapter.factors.values())).A.dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_a_verdict_says_yes_exactly_where_the_runtime_is_right(tmp_path, name):
    adapter = make_adapter(CONFIGS[name])
    write_adapter(adapter, tmp_path / "out")
    verdicts = judge_peft(read_header(tmp_path / "out"))
    for runtime in RUNTIMES:
        deltas = runtime_deltas(tmp_path / "out", runtime)
        is_right = all(torch.allclose(d, dense(adapter)[p], rtol=1e-5) for p, d in deltas.items())
        assert verdicts[runtime].ok == is_right, verdicts[runtime]
        assert is_right or "export with --to portable" in verdicts[runtime].reason
    assert not verdicts["mlx"].ok
    assert name == "plain" or not all(verdicts[r].ok for r in RUNTIMES)


def test_verdicts_on_what_has_no_place_elsewhere(tmp_path):
    adapter = make_adapter(LoRAConfig(rank=600, alpha=600))
    write_adapter(adapter, tmp_path / "high")
    assert "at most 512" in judge_peft(read_header(tmp_path / "high"))["vllm"].reason
    adapter = make_adapter(LoRAConfig(rank=20, alpha=20))
    write_adapter(adapter, tmp_path / "odd")
    assert "--max-lora-rank 32" in judge_peft(read_header(tmp_path / "odd"))["vllm"].reason
    path = next(iter(adapter.factors))
    adapter.biases[path] = torch.ones(adapter.factors[path].out_features)
    write_adapter(adapter, tmp_path / "biased")
    verdicts = judge_peft(read_header(tmp_path / "biased"))
    assert verdicts["peft"].ok
    assert not any(verdicts[r].ok for r in ("vllm", "sglang", "llama.cpp"))
    for refused in (lambda: make_portable(adapter), lambda: write_mlx(adapter, tmp_path / "m")):
        with pytest.raises(AdapterFileError, match="trained biases"):
            refused()
    regex = make_adapter(LoRAConfig(rank=4, alpha=4, targets=r".*_proj"))
    write_adapter(regex, tmp_path / "regex")
    assert "regular expression" in judge_peft(read_header(tmp_path / "regex"))["sglang"].reason
    write_adapter(make_portable(regex).adapter, tmp_path / "listed")
    assert judge_peft(read_header(tmp_path / "listed"))["sglang"].ok


def beyond(kind: str) -> Adapter:
    """Factors of linear layers, and one thing more."""
    adapter = make_adapter(LoRAConfig(rank=2, alpha=3, targets=tuple(n.split(".")[1] for n in SHAPES)))
    ones = {path: torch.ones(f.out_features) for path, f in adapter.factors.items()}
    changes = {}
    if kind == "whole weight":
        changes = {"modules_to_save": ("norm",)}
        adapter.extras.weights["model.norm.weight"] = torch.ones(4)
    elif kind == "token rows":
        changes = {"trainable_tokens": {"model.embed_tokens": (1,)}}
        adapter.extras.rows["model.embed_tokens"] = TokenRows((1,), torch.ones(1, 4))
    elif kind == "lora_bias":
        changes = {"lora_bias": True}
        adapter.extras.shifts |= ones
    elif kind == "DoRA magnitude":
        adapter.extras.magnitudes |= ones
    else:
        changes = {"targets": (*adapter.config.targets, "embed_tokens")}
        adapter.factors["model.embed_tokens"] = Factors(
            torch.ones(2, 9), torch.ones(4, 2), 1.5, Layout("embedding")
        )
    return replace(adapter, config=replace(adapter.config, **changes))


@pytest.mark.parametrize("kind", ["whole weight", "token rows", "lora_bias", "DoRA magnitude", "embedding"])
def test_what_is_beyond_linear_factors_goes_to_peft_alone(kind, tmp_path):
    adapter = beyond(kind)
    write_adapter(adapter, tmp_path / "peft")
    verdicts = judge_peft(read_header(tmp_path / "peft"))
    assert [name for name, v in verdicts.items() if v.ok] == ["peft"]
    assert kind in verdicts["vllm"].reason
    for refused in (lambda: make_portable(adapter), lambda: write_mlx(adapter, tmp_path / "m")):
        with pytest.raises(AdapterFileError, match="which only PEFT's format can carry"):
            refused()
    assert not (tmp_path / "m").exists()


# --- MLX ------------------------------------------------------------------------------------------------


def mlx_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """What mlx_lm's LoRALinear adds: y + scale · (x @ lora_a) @ lora_b; one scale for all layers."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    inner = settings["lora_parameters"]
    assert inner.keys() >= {"rank", "scale", "dropout", "keys"}
    with safe_open(folder / "adapters.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
    paths = {name.rpartition(".")[0] for name in tensors}
    layers = range(2)[-max(settings["num_layers"], 0) :]  # mlx_lm's own slice of the layers
    converted = {f"model.layers.{n}.{key}" for n in layers for key in inner["keys"]}
    assert paths <= converted  # a layer that was not converted has no place for the tensors
    assert {t.shape[1] for n, t in tensors.items() if n.endswith("lora_a")} == {inner["rank"]}
    return {p: inner["scale"] * (tensors[f"{p}.lora_a"] @ tensors[f"{p}.lora_b"]).T for p in paths}


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_there_and_back(tmp_path, name):
    adapter = make_adapter(CONFIGS[name])
    write_mlx(adapter, tmp_path / "mlx")
    for path, delta in mlx_deltas(tmp_path / "mlx").items():
        close(delta, dense(adapter)[path], torch.float32)
    assert is_mlx(tmp_path / "mlx")
    with pytest.raises(AdapterFileError, match=r"export .*mlx --to peft"):
        read_adapter(tmp_path / "mlx")
    back = read_mlx(tmp_path / "mlx")
    assert back.provenance == adapter.provenance
    write_adapter(back, tmp_path / "back")
    again = read_adapter(tmp_path / "back")
    for path, delta in dense(again).items():
        close(delta, dense(adapter)[path], torch.float32)
    if name in ("plain", "rslora"):  # one scaling: nothing was computed, so nothing may change
        assert back.digest == again.digest == adapter.digest


def spoil_mlx(folder: Path, kind: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapters.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "model.layers.0.self_attn.q_proj.lora_a"
    if kind == "dora":
        tensors["model.layers.0.self_attn.q_proj.m"] = torch.ones(3)
    elif kind == "half":
        del tensors[name]
    elif kind == "rank":
        config["lora_parameters"]["rank"] = 5
    elif kind == "scale":
        config["lora_parameters"]["scale"] = "20"
    elif kind == "nan":
        tensors[name][0, 0] = math.nan
    elif kind == "edited":
        tensors[name][0, 0] += 1
    elif kind == "full":
        config["fine_tune_type"] = "full"
    elif kind == "three axes":
        tensors[name] = tensors[name][None].clone()
    elif kind == "dtypes":
        tensors[name] = tensors[name].half()
    elif kind == "no tensors":
        tensors = {}
    elif kind == "escape":
        tensors["../x.lora_a"] = tensors.pop(name)
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if kind == "no config":
        (folder / "adapter_config.json").unlink()
    if kind == "truncated":
        content = (folder / "adapters.safetensors").read_bytes()
        (folder / "adapters.safetensors").write_bytes(content[:-9])
    if kind == "not json":
        (folder / "adapter_config.json").write_text("{]")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dora", "neither lora_a nor lora_b"), ("half", "has no lora_a"), ("rank", "do not have the rank 5"),
        ("scale", "scale is '20'"), ("nan", "not finite"), ("edited", "changed after they were written"),
        ("full", 'only "lora" can be read'), ("three axes", "must be (in, rank)"), ("dtypes", "they must agree"),
        ("no tensors", "holds no factors"), ("escape", "neither lora_a nor lora_b"), ("no config", "is missing"),
        ("truncated", "truncated"), ("not json", "adapter_config.json"),
    ],
)  # fmt: skip
def test_a_bad_mlx_adapter_is_refused(tmp_path, kind, said):
    write_mlx(make_adapter(), tmp_path / "mlx")
    spoil_mlx(tmp_path / "mlx", kind)
    with pytest.raises(AdapterFileError, match=re.escape(said)):
        read_mlx(tmp_path / "mlx")


def test_mlx_refuses_models_whose_layers_it_names_otherwise(tmp_path):
    f = Factors(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    adapter = Adapter(LoRAConfig(rank=2, alpha=2, targets=["c_attn"]), {"transformer.h.0.attn.c_attn": f})
    with pytest.raises(AdapterFileError, match=r"model\.layers\.N"):
        write_mlx(adapter, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


# --- GGUF -----------------------------------------------------------------------------------------------


def rotary_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order back to Hugging Face's: within a head, (0, 1, 2, 3 …) are halves' elements in turn."""
    size = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + i] = rows[head * size + 2 * i]
            out[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return out


def gguf_deltas(file: Path, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """llama-adapter.h: scale = alpha / (second axis of lora_b), and no alpha at all where it is 0."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    tensors = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
    deltas = {}
    for name in {n.rpartition(".")[0] for n in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        alpha = fields["adapter.lora.alpha"]
        scale = alpha / B.shape[1] if alpha else 1.0
        rows = scale * B @ A
        kind = name.split(".")[2]
        deltas[name] = torch.from_numpy(rotary_pairs(rows, heads[kind]) if kind in heads else rows)
    return deltas


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}


def gguf_name(path: str) -> str:
    layer, name = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path).groups()
    return f"blk.{layer}.{NAMES[name]}.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_gguf_means_the_same_in_llama_cpp(tmp_path, name, dtype, architecture):
    adapter = make_adapter(CONFIGS[name], dtype=dtype)
    write_gguf(adapter, tmp_path / "out", LLAMA | {"architectures": [architecture]})
    heads = {"attn_q": 4, "attn_k": 2} if architecture == "LlamaForCausalLM" else {}
    found = gguf_deltas(tmp_path / "out" / "adapter.gguf", heads)
    assert found.keys() == {gguf_name(p) for p in adapter.factors}
    for path, delta in dense(adapter).items():
        close(found[gguf_name(path)], delta, torch.float32)
    note = json.loads((tmp_path / "out" / "lorasmith.json").read_text())
    assert note["provenance"]["note"] == "x"
    assert len(note["provenance"]["file_sha256"]) == 64


def test_gguf_of_gpt2_keeps_out_and_in(tmp_path):
    f = Factors(torch.randn(2, 4), torch.randn(12, 2), 1.0)
    adapter = Adapter(LoRAConfig(rank=2, alpha=2, targets=["c_attn"]), {"transformer.h.0.attn.c_attn": f})
    write_gguf(adapter, tmp_path / "out", {"architectures": ["GPT2LMHeadModel"], "n_layer": 1})
    found = gguf_deltas(tmp_path / "out" / "adapter.gguf", {})
    close(found["blk.0.attn_qkv.weight"], dense(adapter)["transformer.h.0.attn.c_attn"], torch.float32)
    write_adapter(adapter, tmp_path / "peft")
    assert "transposes" in judge_peft(read_header(tmp_path / "peft"))["llama.cpp"].reason


@pytest.mark.parametrize(
    ("change", "path", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, None, "convert_lora_to_gguf.py"),
        ({"architectures": None}, None, "known here are LlamaForCausalLM"),
        ({}, "model.layers.0.self_attn.w_qkv", "has no counterpart"),
        ({"num_hidden_layers": 1}, None, "model.layers.1.self_attn.q_proj has no counterpart"),
        ({}, "lm_head", "tied to the embeddings"),
        ({"num_attention_heads": 5}, None, "do not divide into 5 heads"),
        ({"num_attention_heads": "4"}, None, "no whole number as num_attention_heads"),
        ({"num_hidden_layers": None}, None, "no whole number as num_hidden_layers or n_layer"),
    ],
)
def test_gguf_refuses_what_llama_cpp_has_no_place_for(tmp_path, change, path, said):
    adapter = make_adapter()
    if path:
        adapter.factors[path] = Factors(torch.ones(4, 5), torch.ones(6, 4), 2.0)
    with pytest.raises(AdapterFileError, match=re.escape(said)):
        write_gguf(adapter, tmp_path / "out", LLAMA | change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (17, 32), (200, 256), (300, 320), (512, 512)],
)
def test_the_line_for_vllm_has_the_smallest_rank_that_it_takes(tmp_path, rank, allowed):
    """The ranks are the choices of --max-lora-rank in vLLM's own documentation (`MaxLoRARanks`)."""
    shapes = dict.fromkeys(SHAPES, (rank, rank))
    write_adapter(make_adapter(LoRAConfig(rank=rank, alpha=rank), shapes=shapes), tmp_path / "my out")
    header = read_header(tmp_path / "my out")
    line = vllm_launch(header, base="org/base", name="it", path=str(tmp_path / "my out"))
    words = shlex.split(line)
    assert words[:4] == ["vllm", "serve", "org/base", "--enable-lora"]
    assert dict(zip(words[4::2], words[5::2], strict=True)) == {
        "--max-loras": "1", "--max-lora-rank": f"{allowed}", "--lora-modules": f"it={tmp_path / 'my out'}",
    }  # fmt: skip
