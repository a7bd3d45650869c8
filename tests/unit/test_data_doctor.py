from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.data import check, encode, read_records, references, sample_path
from lorasmith.errors import DataError
from tests.support.tokenizer import EOS, ByteTokenizer


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_the_doctor_finds_each_fault_on_its_line() -> None:
    rows: list[dict[str, object]] = [
        dict(pair("a", "b")),
        dict(pair("a", "c")),
        dict(pair("a", "b")),
        dict(pair("", "b")),
        dict(pair("a<|im_end|>", "b")),
        dict(pair("a", "")),
        {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "b"}]},
    ]
    report = check(rows, ByteTokenizer(), max_length=1000)
    assert [(p.line, p.kind, p.is_dropped) for p in report.problems] == [
        (3, "duplicate", False),
        (4, "empty-turn", False),
        (5, "special-token", False),
        (5, "doubled-token", False),
        (6, "empty-turn", True),
        (7, "empty-turn", False),
    ]
    assert report.records == 6
    assert report.supervised_tokens == report.stats.supervised_tokens == 6 * len("b<")


def test_the_preview_shows_each_token_of_the_first_example() -> None:
    tokenizer = ByteTokenizer(chat=False)
    assert check([pair("ab", "c")], tokenizer, max_length=10).preview == [
        ("a", False),
        ("b", False),
        ("c", True),
        ("<|endoftext|>", True),
    ]


def test_a_missing_end_of_turn_is_found_and_chunks_of_a_text_are_no_fault() -> None:
    tokenizer = ByteTokenizer(chat=False)
    assert check([{"text": "abcdefgh"}], tokenizer, max_length=4).problems == []
    tokenizer.eos_token_id = None
    report = check([{"text": "abcdefgh"}, pair("a", "b")], tokenizer, max_length=4)
    assert [(p.line, p.kind) for p in report.problems] == [(1, "end-of-turn"), (2, "end-of-turn")]


def test_a_doubled_token_in_a_text() -> None:
    report = check([{"text": "a<|endoftext|><|endoftext|>"}], ByteTokenizer(chat=False), max_length=9)
    assert [p.kind for p in report.problems] == ["doubled-token"]
    assert report.preview[-1] == (ByteTokenizer().decode([EOS]), True)


def test_the_shipped_sample_is_clean_and_its_parts_share_no_prompt() -> None:
    parts = {name: read_records(sample_path(f"e2e/{name}")) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 2000, "validation": 64, "test": 64}
    prompts = {name: {r.prompt for r in part} for name, part in parts.items()}
    assert len(prompts["validation"]) == len(prompts["test"]) == 64
    assert not prompts["train"] & prompts["validation"]
    assert not (prompts["train"] | prompts["validation"]) & prompts["test"]
    for name in parts:
        assert check(sample_path(f"e2e/{name}"), ByteTokenizer(), max_length=1000).problems == []
    assert all(references(r)[0] == r.completion for r in parts["test"])
    assert max(len(references(r)) for r in parts["test"]) > 1


def test_the_sample_is_small_and_carries_its_licence() -> None:
    folder = sample_path("e2e/train").parent
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1_000_000
    assert "CC BY-SA 4.0" in (folder / "LICENCE.md").read_text(encoding="utf-8")
    with pytest.raises(DataError, match='Did you mean "e2e/train"'):
        sample_path("e2e/trian")


def test_training_sees_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(pair("a", "b")) + "\n{\n", encoding="utf-8")
    report = check(path, ByteTokenizer(), max_length=1000)
    assert [(p.line, p.kind) for p in report.problems] == [(2, "json")]
    made = encode(read_records(path), ByteTokenizer(), max_length=1000)
    assert report.stats == made.stats
