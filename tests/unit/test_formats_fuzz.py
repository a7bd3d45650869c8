"""Adapter files from a generator that knows the format: each is read as safetensors reads it, or refused.

`test_formats_hostile` changes bytes of a sound adapter; here the parts are made, so that deeper checks are met.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load

from lorasmith.errors import AdapterFileError, LoraSmithError
from lorasmith.formats import check_values, read_adapter, read_header
from lorasmith.store.cards import read_card
from tests.golden import make

SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = st.sampled_from([make.Q, make.UP, "model.norm", "lm_head", "model.embed_tokens", ""])
SUFFIXES = st.sampled_from(
    [
        "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector", "lora_B.bias", "bias", "weight", "base_layer.lora_A.weight", "token_adapter.trainable_tokens_delta",
    ]
)  # fmt: skip
NAMES = st.builds("base_model.model.{}.{}".format, PATHS, SUFFIXES) | st.text(max_size=12)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "F8"]),
        "shape": st.lists(st.integers(0, 4), max_size=3),
    }
)
CONFIGS = st.fixed_dictionaries(
    {"r": st.integers(1, 4), "lora_alpha": st.integers(1, 8)},
    optional={
        "target_modules": st.sampled_from([["q_proj", "up_proj"], ["q_proj"], "all-linear", ".*_proj"]),
        "use_rslora": st.booleans(), "use_dora": st.booleans(), "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([None, ["lm_head"], ["norm"]]),
        "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "up_proj", ".*"]), st.integers(0, 4), max_size=2),
        "trainable_token_indices": JSON,
    },
)  # fmt: skip


def laid_out(entries: dict[str, dict]) -> tuple[dict, int]:
    """Offsets that tile, as a sound file's do."""
    sizes, end, header = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F8": 1}, 0, {}
    for name, entry in entries.items():
        begin, end = end, end + sizes[entry["dtype"]] * int(torch.Size(entry["shape"]).numel())
        header[name] = entry | {"data_offsets": [begin, end]}
    return header, end


def write(folder: Path, weights: bytes, config: object, sidecar: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "lorasmith.json").unlink(missing_ok=True)
    if sidecar is not None:
        (folder / "lorasmith.json").write_text(json.dumps(sidecar))
    return folder


def read_or_refuse(folder: Path, weights: bytes) -> None:
    """No error but ours; and what is read is what the safetensors library reads."""
    try:
        header, adapter = read_header(folder), read_adapter(folder)
    except LoraSmithError:
        return
    reference = safetensors_load(weights)
    assert sum(t.numel() for t in adapter.tensors().values()) == sum(t.numel() for t in reference.values())
    assert len(header.slots) == len(reference)
    check_values(adapter)
    assert read_card(folder)["params"] == adapter.num_params


@pytest.fixture(params=[150, pytest.param(2000, marks=pytest.mark.slow)])
def examples(request):
    return request.param


def test_made_containers(tmp_path, examples):
    @settings(max_examples=examples, **SETTINGS)
    @given(st.dictionaries(NAMES, ENTRIES, max_size=5), CONFIGS, st.randoms(use_true_random=False))
    def run(entries, config, random):
        header, size = laid_out(entries)
        weights = make.container(header, random.randbytes(size))
        read_or_refuse(write(tmp_path / "a", weights, config | {"peft_type": "LORA"}), weights)

    run()


def test_sound_pairs_under_any_settings(tmp_path, examples):
    @settings(max_examples=examples, **SETTINGS)
    @given(
        st.integers(1, 4),
        st.sampled_from(["F32", "F16", "BF16"]),
        CONFIGS,
        st.dictionaries(NAMES, ENTRIES, max_size=1),
    )
    def run(rank, dtype, config, more):
        pairs = {
            name: {"dtype": dtype, "shape": shape}
            for path in (make.Q, make.UP)
            for name, (_, shape) in make.pair(path, rank=rank).items()
        }
        header, size = laid_out(pairs | more)
        weights = make.container(header, b"\x01" * size)
        read_or_refuse(write(tmp_path / "a", weights, config | {"peft_type": "LORA", "r": rank}), weights)

    run()


def test_any_header_and_any_length_before_it(tmp_path, examples):
    @settings(max_examples=examples, **SETTINGS)
    @given(
        JSON | st.dictionaries(NAMES, JSON, max_size=3),
        st.integers(0, 2**64 - 1) | st.none(),
        st.binary(max_size=64),
    )
    def run(header, length, data):
        text = json.dumps(header).encode()
        weights = struct.pack("<Q", len(text) if length is None else length) + text + data
        read_or_refuse(write(tmp_path / "a", weights, make.CONFIG), weights)

    run()


def test_any_sidecar(tmp_path, examples):
    weights = make.safetensors(make.GOOD)
    digest = read_adapter(write(tmp_path / "a", weights, make.CONFIG)).digest

    @settings(max_examples=examples, **SETTINGS)
    @given(
        JSON
        | st.fixed_dictionaries({}, optional=dict.fromkeys(("base", "base_name", "run", "made_by"), JSON))
    )
    def run(provenance):
        sidecar = {"format_version": 1, "content_digest": digest, "provenance": provenance}
        read_or_refuse(write(tmp_path / "a", weights, make.CONFIG, sidecar), weights)

    run()


def test_no_expression_runs_before_it_is_judged(tmp_path):
    """Found by atheris: the reader hung, and Python's lock with it, on a file of 800 bytes."""
    config = make.CONFIG | {"target_modules": ".*" * 14 + "pro'"}
    began = time.monotonic()
    with pytest.raises(AdapterFileError, match="can take too long"):
        read_header(write(tmp_path / "a", make.safetensors(make.GOOD), config))
    assert time.monotonic() - began < 2
