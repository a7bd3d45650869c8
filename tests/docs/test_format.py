"""The digest by the steps of docs/format.md, written again from its text, against the library's."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import lorasmith as ls

NAMES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
WHOLE = "2"  # the module that trains whole in these examples


def read_entries(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    data = (directory / "adapter_model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name.removeprefix("base_model.model."): (
            NAMES[e["dtype"]],
            e["shape"],
            data[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
        )
        for name, e in header.items()
    }


def digest_by_the_text(directory: Path, scalings: dict[str, str], layouts: dict[str, str]) -> str:
    """`scalings`: path → hexadecimal number. `layouts`: path → text, for layers that are not linear."""
    rows = json.loads((directory / "adapter_config.json").read_text()).get("trainable_token_indices") or {}
    endings = {
        ".lora_A.weight": ".A", ".lora_B.weight": ".B", ".lora_embedding_A": ".A", ".lora_embedding_B": ".B",
        ".lora_B.bias": ".shift", ".base_layer.bias": ".bias", ".lora_magnitude_vector": ".magnitude",
        ".token_adapter.trainable_tokens_delta": ".rows",
    }  # fmt: skip
    listed = {}
    for name, (dtype, shape, raw) in read_entries(directory).items():
        ending = next((e for e in endings if name.endswith(e)), "")
        listed[name.removesuffix(ending) + endings.get(ending, "")] = (dtype, shape, raw)
    text = [
        f"{path} {scalings[path]}\n" + (f"{layouts[path]}\n" if path in layouts else "")
        for path in sorted(scalings)
    ]
    text += [f"{path} {tuple(rows[path])}\n" for path in sorted(rows)]
    parts = ["".join(text).encode()]
    for name in sorted(listed):
        dtype, shape, raw = listed[name]
        if name.endswith((".A", ".B")):
            rest = 1
            for size in shape[1:]:
                rest *= size
            shape = [shape[0], rest]
        parts += [f"{name} {dtype} {tuple(shape)}\n".encode(), raw]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def write(model: nn.Module, directory: Path, **settings: object) -> None:
    ls.inject(model, ls.LoRAConfig(**settings), seed=3)
    adapter = ls.extract(model)
    for f in adapter.factors.values():
        torch.manual_seed(1)
        f.B.normal_()
    ls.write_adapter(adapter, directory)


CASES = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
        {"rank": 2, "alpha": 4, "targets": ["0", "1"]},
        {"0": "0x1.0000000000000p+1", "1": "0x1.0000000000000p+1"},
        {},
    ),
    "patterns and rsLoRA": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
        {"rank": 4, "alpha": 3, "targets": ["0", "1"], "rslora": True, "rank_pattern": {"1": 1}},
        {"0": (3 / 2).hex(), "1": (3.0).hex()},
        {},
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)),
        {"rank": 2, "alpha": 1, "targets": ["0"]},
        {"0": (0.5).hex()},
        {"0": "Layout(kind='conv', kernel=(3, 3), groups=1)"},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)),
        {"rank": 2, "alpha": 2, "targets": ["0", "1"]},
        {"0": (1.0).hex(), "1": (1.0).hex()},
        {"0": "Layout(kind='embedding', kernel=(), groups=1)"},
    ),
    "biases, shifts and a whole module": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2)),
        {"rank": 2, "alpha": 2, "targets": ["0"], "bias": "lora_only", "lora_bias": True, "modules_to_save": [WHOLE]},
        {"0": (1.0).hex()},
        {},
    ),
    "token rows": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)),
        {"rank": 2, "alpha": 2, "targets": ["1"], "trainable_tokens": {"0": (5, 2)}},
        {"1": (1.0).hex()},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_digest_by_the_text_is_the_library_s(tmp_path, case):
    make, settings, scalings, layouts = CASES[case]
    torch.manual_seed(0)
    write(make(), tmp_path / "a", **settings)
    found = digest_by_the_text(tmp_path / "a", scalings, layouts)
    assert found == json.loads((tmp_path / "a/lorasmith.json").read_text())["content_digest"]
    assert found == ls.read_adapter(tmp_path / "a").digest


def test_another_scaling_is_another_digest(tmp_path):
    make, settings, scalings, layouts = CASES["linear"]
    write(make(), tmp_path / "a", **settings)
    other = digest_by_the_text(tmp_path / "a", scalings | {"0": (2.5).hex()}, layouts)
    assert other != ls.read_adapter(tmp_path / "a").digest


def test_a_digest_that_does_not_fit_is_refused(tmp_path):
    make, settings, _, _ = CASES["linear"]
    write(make(), tmp_path / "a", **settings)
    note = tmp_path / "a/lorasmith.json"
    values = json.loads(note.read_text())
    note.write_text(json.dumps(values | {"content_digest": "0" * 64}))
    with pytest.raises(ls.LoraSmithError, match="changed after they were written"):
        ls.read_adapter(tmp_path / "a")
