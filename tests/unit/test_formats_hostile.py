"""Hostile, damaged and unsupported files: one refusal that names every fault, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.errors import AdapterFileError
from lorasmith.formats import read_adapter, read_header
from tests.golden import make

GOLDEN = Path(make.__file__).parent
BAD = sorted((GOLDEN / "bad").iterdir())
RELEASES = sorted(GOLDEN.glob("adapter_*"))


@pytest.mark.parametrize("folder", BAD, ids=lambda p: p.name)
def test_bad_directory_is_refused_with_its_reason(folder):
    expected = (folder / "expected.txt").read_text(encoding="utf-8").strip()
    with pytest.raises(AdapterFileError) as refusal:
        read_adapter(folder)
    assert expected in str(refusal.value)


def test_bad_directories_differ_from_a_good_one_only_in_the_fault(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(make.safetensors(make.GOOD))
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.CONFIG))
    adapter = read_adapter(tmp_path)
    assert sorted(adapter.factors) == [make.Q, make.UP]
    assert adapter.provenance == {}
    assert adapter.factors[make.Q].scaling == make.CONFIG["lora_alpha"] / make.CONFIG["r"]


@pytest.mark.parametrize("folder", RELEASES, ids=lambda p: p.name)
def test_golden_adapters_are_read_for_ever(folder):
    adapter = read_adapter(folder)

    def value(rows, cols, seed):
        return torch.tensor([[make.golden_value(i, j, seed) for j in range(cols)] for i in range(rows)])

    q, up = adapter.factors[make.Q], adapter.factors[make.UP]
    assert torch.equal(q.A, value(2, 4, 1))
    assert torch.equal(q.B, value(6, 2, 2))
    assert torch.equal(up.A, value(2, 4, 3))
    assert torch.equal(up.B, value(8, 2, 4))
    assert (q.scaling, up.scaling) == (2.0, 0.5)
    assert torch.equal(adapter.biases[make.Q], value(1, 6, 5)[0])
    assert torch.equal(adapter.biases["model.norm"], value(1, 4, 6)[0])
    assert adapter.provenance["base_name"] == "golden-base"


def test_all_faults_are_in_one_message(tmp_path):
    tensors = make.without("up_proj.lora_A.weight") | {"stray": ("F32", [1]), "lora_embedding": ("I32", [1])}
    (tmp_path / "adapter_model.safetensors").write_bytes(make.safetensors(tensors))
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.CONFIG | {"use_qalora": True, "r": 0}))
    with pytest.raises(AdapterFileError) as refusal:
        read_adapter(tmp_path)
    for fragment in ("use_qalora", "r is 0", "has no lora_A", "'stray'", "dtype 'I32'"):
        assert fragment in str(refusal.value)


def test_many_faults_are_counted_not_listed(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(
        make.safetensors({f"stray.{i}": ("F32", [1]) for i in range(500)})
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.CONFIG))
    with pytest.raises(AdapterFileError, match="more"):
        read_header(tmp_path)


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_wrong_places_are_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="An adapter is a directory"):
        read_adapter(tmp_path / place)


def test_the_directory_of_a_named_adapter_is_suggested(tmp_path):
    shutil.copytree(RELEASES[0], tmp_path / "mine")
    with pytest.raises(AdapterFileError, match=r"Did you mean .*mine"):
        read_adapter(tmp_path)


def test_infix_default_is_accepted(tmp_path):
    named = {n.replace(".weight", ".default.weight"): t for n, t in make.GOOD.items()}
    (tmp_path / "adapter_model.safetensors").write_bytes(make.safetensors(named))
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.CONFIG))
    assert sorted(read_adapter(tmp_path).factors) == [make.Q, make.UP]


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    header, size = make.header_of(make.GOOD)
    text = json.dumps(header).encode().ljust(0x0480)  # first bytes 80 04, as protocol 4 starts
    (tmp_path / "adapter_model.safetensors").write_bytes(make.container(text, b"\0" * size))
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.CONFIG))
    assert sorted(read_adapter(tmp_path).factors) == [make.Q, make.UP]


def test_a_matching_pickle_beside_the_weights_is_never_opened(tmp_path):
    shutil.copytree(RELEASES[0], tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"\x80\x04cos\nabort\n.")
    assert read_adapter(tmp_path / "a").digest == read_adapter(RELEASES[0]).digest


FILES = ("adapter_model.safetensors", "adapter_config.json", "lorasmith.json")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_read_equal_or_are_refused(tmp_path, data):
    folder = tmp_path / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(RELEASES[0], folder)
    file = folder / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "cut"])):
            case "replace":
                content[place] = data.draw(st.integers(0, 255))
            case "insert":
                content.insert(place, data.draw(st.integers(0, 255)))
            case "delete" if len(content) > 1:
                del content[place]
            case _:
                del content[max(place, 1) :]
    file.write_bytes(content)
    try:
        adapter = read_adapter(folder)
    except AdapterFileError:
        return
    assert adapter.digest == read_adapter(RELEASES[0]).digest


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(
        st.sampled_from(
            [*make.CONFIG, "rank_pattern", "use_rslora", "layers_to_transform", "layers_pattern"]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=4,
        ),
    )
)
def test_any_config_value_is_read_or_refused(tmp_path, values):
    (tmp_path / "adapter_model.safetensors").write_bytes(make.safetensors(make.GOOD))
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.CONFIG | values))
    try:
        read_adapter(tmp_path)
    except AdapterFileError:
        return
