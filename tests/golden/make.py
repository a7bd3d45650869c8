"""Makes the golden adapter of a release, and the hostile files with the refusal each must meet.

    python tests/golden/make.py bad          # rewrites tests/golden/bad/
    python tests/golden/make.py 0.1.0        # once per release; a golden adapter is never rewritten

The hostile files are built byte by byte, not with the code under test.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "up_proj"],
    "bias": "none",
}
Tensors = dict[str, tuple[str, list[int]]]


def golden_value(i: int, j: int, seed: int) -> float:
    """Sixteenths, so that they are exact in every dtype."""
    return ((7 * i + 3 * j + seed) % 17 - 8) / 16


def pair(path: str, *, rank: int = 2, width: int = 4, out: int = 6) -> Tensors:
    name = f"base_model.model.{path}.lora_"
    return {f"{name}A.weight": ("F32", [rank, width]), f"{name}B.weight": ("F32", [out, rank])}


GOOD: Tensors = pair(Q) | pair(UP)


def header_of(tensors: Tensors) -> tuple[dict[str, Any], int]:
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + sizes[dtype] * _product(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, end


def container(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def safetensors(tensors: Tensors, value: float = 0.5) -> bytes:
    header, size = header_of(tensors)
    return container(header, struct.pack("<f", value) * (size // 4) + b"\0" * (size % 4))


def _product(shape: list[int]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def case(
    name: str, expected: str, *, weights: bytes | None = None, config: Any = None, **files: bytes
) -> None:
    folder = HERE / "bad" / name
    folder.mkdir(parents=True)
    (folder / "expected.txt").write_text(expected + "\n", encoding="utf-8")
    weights = safetensors(GOOD) if weights is None else weights
    text = (
        config
        if isinstance(config, bytes)
        else json.dumps(CONFIG if config is None else config, indent=2).encode()
    )
    files = {"adapter_model.safetensors": weights, "adapter_config.json": text} | files
    for file, content in files.items():
        if content:
            (folder / file).write_bytes(content)


def without(*names: str) -> Tensors:
    return {n: t for n, t in GOOD.items() if not n.endswith(names)}


def bad_containers() -> None:
    header, size = header_of(GOOD)
    good, data = safetensors(GOOD), b"\0" * size
    first, second = list(GOOD)[:2]
    case(
        "pickle-bin",
        "holds adapter_model.bin but no",
        weights=b"",
        **{"adapter_model.bin": pickle.dumps({"a": 1})},
    )
    case("pickle-renamed", "a pickle under another name", weights=pickle.dumps({"a": 1}, protocol=4))
    case("zip-renamed", "a pickle under another name", weights=b"PK\x03\x04" + b"\0" * 60)
    case("no-weights", "has no adapter_model.safetensors", weights=b"")
    case("tiny-file", "too short for a safetensors file", weights=b"\x01\x02")
    case("truncated-header", "truncated: the header claims", weights=good[:40])
    case("truncated-data", "truncated: the tensors end", weights=good[:-5])
    case("trailing-bytes", "4 bytes after the last tensor", weights=good + b"evil")
    case("header-bomb", "at most 100,000,000 are allowed", weights=struct.pack("<Q", 2**62) + b"{}")
    case("header-not-json", "the header cannot be parsed", weights=container(b"{'a'}", b""))
    case("header-nested", "nested too deeply", weights=container(b'{"a":' + b"[" * 100_000, b""))
    case("header-list", "holds a JSON list", weights=container(b"[]", b""))
    text = json.dumps(header).replace(second, first)
    case("duplicate-key", "is there more than once", weights=container(text.encode(), data))
    huge = header | {first: {"dtype": "F32", "shape": [2**39, 2**39], "data_offsets": [0, 32]}}
    case("shape-bomb", "needs 1208925819614629174706176 bytes and has 32", weights=container(huge, data))
    negative = header | {first: {"dtype": "F32", "shape": [-2, -4], "data_offsets": [0, 32]}}
    case("negative-shape", "whole numbers are needed", weights=container(negative, data))
    overlap = header | {second: header[second] | {"data_offsets": [16, 64]}}
    case("overlap", "overlaps the tensor before it", weights=container(overlap, data))
    gap = {n: e for n, e in header.items() if n != second}
    case("gap", "leaves a gap before it", weights=container(gap, data))
    extra = header | {first: header[first] | {"code": "x"}}
    case("extra-entry-key", "needs exactly dtype, shape and data_offsets", weights=container(extra, data))


def bad_tensors() -> None:
    prefix = "base_model.model."
    case("empty", "holds no tensors", weights=safetensors({}))
    case("missing-half", f"{UP} has no lora_B", weights=safetensors(without("up_proj.lora_B.weight")))
    wrong = GOOD | {f"{prefix}{Q}.lora_B.weight": ("F32", [6, 3])}
    case("ranks-disagree", "A (2, 4) and B (6, 3) disagree on the rank", weights=safetensors(wrong))
    case(
        "rank-not-as-config",
        "A (2, 4) and B (6, 2) have rank 2, adapter_config.json says 3",
        config=CONFIG | {"r": 3},
    )
    case(
        "integers",
        "has dtype 'I64'; factors are one of",
        weights=safetensors(GOOD | {f"{prefix}{Q}.lora_A.weight": ("I64", [2, 4])}),
    )
    case(
        "dtypes-differ",
        "they must agree",
        weights=safetensors(GOOD | {f"{prefix}{Q}.lora_A.weight": ("BF16", [2, 4])}),
    )
    case("nan", "holds numbers that are not finite", weights=safetensors(GOOD, float("nan")))
    case("infinite", "holds numbers that are not finite", weights=safetensors(GOOD, float("inf")))
    case("zero-sized", "sharded training must gather", weights=safetensors(GOOD | pair(Q, width=0)))
    case(
        "flat",
        "must be (rank, in_features)",
        weights=safetensors(GOOD | {f"{prefix}{Q}.lora_A.weight": ("F32", [8])}),
    )
    conv = GOOD | {f"{prefix}{Q}.lora_A.weight": ("F32", [2, 4, 3, 3])}
    case("convolution", "or those of a convolution", weights=safetensors(conv))
    high = pair(Q, rank=65_537, width=1, out=1)
    high = {n: ("BF16", s) for n, (_, s) in high.items()}
    case("rank-bomb", "at most 65,536 is allowed", weights=safetensors(high))
    others = {
        "embedding": (f"{Q}.lora_embedding_A", "is the second A of"),
        "dora": (f"{Q}.lora_magnitude_vector", "does not set use_dora"),
        "modules-to-save": (
            "model.norm.weight",
            "modules_to_save in adapter_config.json does not name its module",
        ),
        "lora-bias": (f"{Q}.lora_B.bias", "does not set lora_bias"),
        "base-copy": ("lm_head.base_layer.weight", "is a copy of the base's own weight"),
        "bare-parameter": (
            "model.layers.0.experts.base_layer.lora_A.weight",
            "factors of 2 bare parameters, target_parameters names none",
        ),
        "trained-tokens": (
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            "trained rows of shape (2,) for 0 tokens",
        ),
        "adapter-name": (f"{Q}.lora_A.other.weight", "carries an adapter name"),
        "unexpected": (f"{Q}.surprise", "is unexpected"),
        "empty-component": ("model..q_proj.lora_A.weight", "empty parts, spaces, slashes"),
        "path-traversal": ("../../etc/passwd.lora_A.weight", "empty parts, spaces, slashes"),
        "control-character": ("model.q\n_proj.lora_A.weight", "empty parts, spaces, slashes"),
        "unselected-bias": (
            f"{Q}.base_layer.bias",
            'has a trained bias, but adapter_config.json says bias="none"',
        ),
    }
    for name, (tensor, expected) in others.items():
        case(f"tensor-{name}", expected, weights=safetensors(GOOD | {prefix + tensor: ("F32", [2])}))
    case("tensor-no-prefix", "does not start with", weights=safetensors({n[11:]: t for n, t in GOOD.items()}))
    twice = GOOD | {f"{prefix}{Q}.lora_A.default.weight": ("F32", [2, 4])}
    case("tensor-twice", f"is the second A of {Q}", weights=safetensors(twice))


def bad_configs() -> None:
    def changed(name: str, expected: str, **values: Any) -> None:
        case(f"config-{name}", expected, config=CONFIG | values)

    case("config-missing", "adapter_config.json is missing", config=b"")
    case("config-not-json", "adapter_config.json: ", config=b"r: 2\n")
    case("config-not-utf8", "it is not UTF-8 text", config=b'{"r": "\xff\xfe"}')
    case("config-list", "holds a JSON list", config=b"[]")
    case("config-nan", "NaN is not a JSON number", config=b'{"lora_alpha": NaN}')
    case("config-nested", "nested too deeply", config=b'{"a":' + b"[" * 100_000)
    case("config-duplicate", "'r' is there more than once", config=b'{"r": 2, "r": 4}')
    case("config-no-rank", "r is missing", config={k: v for k, v in CONFIG.items() if k != "r"})
    case(
        "config-no-alpha",
        "lora_alpha is missing",
        config={k: v for k, v in CONFIG.items() if k != "lora_alpha"},
    )
    changed("not-lora", "peft_type is 'LOHA'", peft_type="LOHA")
    changed("rank-text", "r is '2'", r="2")
    changed("rank-huge", "a whole number from 1 to 65,536", r=10**30)
    changed("alpha-zero", "lora_alpha is 0", lora_alpha=0)
    changed("alpha-huge", "lora_alpha is 1000", lora_alpha=10**400)
    changed("pattern-text", "rank_pattern is", rank_pattern={"q_proj": "2"})
    changed("targets-null", "target_modules is None", target_modules=None)
    changed("targets-elsewhere", "does not select it", target_modules=["v_proj"])
    changed("targets-not-regex", "is refused", target_modules="(q_proj")
    changed("regex-bomb", "a repetition inside a repetition", target_modules=r"(.*.*)*q_proj")
    changed("regex-alternatives", "a repetition inside a repetition", rank_pattern={"(a|a)*$": 2})
    changed("regex-polynomial", "open repetitions can take too long", target_modules=".*" * 12 + "proj")
    changed("regex-deep", "is refused", target_modules="(" * 2000 + ")" * 2000)
    changed("dora", "lacks a DoRA magnitude, which use_dora means", use_dora=True)
    changed("pissa", 'init_lora_weights="pissa_niter_4" changed the base', init_lora_weights="pissa_niter_4")
    changed("olora", 'init_lora_weights="olora" changed the base', init_lora_weights="olora")
    changed("corda", 'init_lora_weights="corda" changed the base', init_lora_weights="corda")
    changed("lora-ga", 'init_lora_weights="lora_ga" changed the base', init_lora_weights="lora_ga")
    changed("init-unknown", "init_lora_weights='magic' is unknown", init_lora_weights="magic")
    changed("layer-replication", "layer_replication=[[0, 1]]", layer_replication=[[0, 1]])
    changed(
        "target-parameters",
        "target_parameters names w, but the file holds no factors",
        target_parameters=["w"],
    )
    changed("alora", "activated LoRA (aLoRA)", alora_invocation_tokens=[1, 2])
    changed("megatron", "Megatron parallel layers", megatron_config={"a": 1})
    changed(
        "modules-to-save",
        "names lm_head, but the file holds none of its weights",
        modules_to_save=["lm_head"],
    )
    changed("unknown-key", "'new_scaling'=3 is unknown", new_scaling=3)


def bad_sidecars() -> None:
    def changed(name: str, expected: str, content: bytes) -> None:
        case(f"sidecar-{name}", expected, **{"lorasmith.json": content})

    def sidecar(**values: Any) -> bytes:
        base = {"format_version": 1, "content_digest": "0" * 64, "provenance": {}}
        return json.dumps(base | values).encode()

    changed("digest", "changed after they were written", sidecar())
    changed("newer", "format_version is 2", sidecar(format_version=2))
    changed("not-json", "lorasmith.json: ", b"digest")
    changed(
        "no-digest", "content_digest or provenance is missing", b'{"format_version": 1, "provenance": {}}'
    )


def make_bad() -> None:
    shutil.rmtree(HERE / "bad", ignore_errors=True)
    for make in (bad_containers, bad_tensors, bad_configs, bad_sidecars):
        make()


def make_release(version: str) -> None:
    import torch

    from lorasmith.formats import write_adapter
    from lorasmith.lora import Adapter, Factors, LoRAConfig

    def filled(rows: int, cols: int, seed: int) -> torch.Tensor:
        return torch.tensor([[golden_value(i, j, seed) for j in range(cols)] for i in range(rows)])

    folder = HERE / f"adapter_{version}"
    if folder.exists():
        raise SystemExit(f"{folder} exists; a golden adapter is read for ever and never rewritten")
    config = LoRAConfig(
        rank=2, alpha=4, targets=("q_proj", "up_proj"), alpha_pattern={"up_proj": 1.0}, bias="all"
    )
    factors = {
        Q: Factors(filled(2, 4, 1), filled(6, 2, 2), 2.0),
        UP: Factors(filled(2, 4, 3), filled(8, 2, 4), 0.5),
    }
    biases = {Q: filled(1, 6, 5)[0], "model.norm": filled(1, 4, 6)[0]}
    adapter = Adapter(config, factors, biases, {"lorasmith": version})
    write_adapter(adapter, folder, base_name="golden-base")


if __name__ == "__main__":
    make_bad() if sys.argv[1] == "bad" else make_release(sys.argv[1])
