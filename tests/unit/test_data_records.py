from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lorasmith.data import Record, read_records, references
from lorasmith.errors import DataError

GOOD = {"prompt": "p", "completion": "c"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def problems(rows: list[object]) -> list[tuple[int, str]]:
    return [(p.line, p.kind) for p in read_records([*rows, GOOD]).problems]


def test_the_three_kinds_and_their_extra_columns() -> None:
    rows = [{"messages": CHAT, "prompt": "x", "id": 7}, {**GOOD, "text": "t"}, {"text": "t", "prompt": None}]
    chat, pair, text = read_records(rows).records
    assert (chat.kind, chat.messages, chat.context, chat.fields) == (
        "messages",
        tuple(CHAT),
        0,
        {"prompt": "x", "id": 7},
    )
    assert (pair.kind, pair.prompt, pair.completion, pair.fields) == ("completion", "p", "c", {"text": "t"})
    assert (text.kind, text.text, text.line, text.fields) == ("text", "t", 3, {})


def test_prompt_and_completion_as_messages_supervise_only_the_completion() -> None:
    record = read_records([{"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}]).records[0]
    assert (record.kind, len(record.messages), record.context) == ("messages", 4, 3)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("a string", "type"),
        ({"messages": "not json"}, "type"),
        ({"messages": {"role": "user"}}, "type"),
        ({"messages": ["hi"]}, "type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "type"),
        ({"messages": [{"role": "user"}]}, "columns"),
        ({"messages": [{"role": "user", "content": None}]}, "columns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": CHAT[:1]}, "no-assistant-turn"),
        ({"messages": []}, "no-assistant-turn"),
        ({"messages": [*CHAT, {"role": "assistant", "content": " \n"}]}, "empty-turn"),
        ({"prompt": "p", "completion": ""}, "empty-turn"),
        ({"prompt": "p", "completion": CHAT}, "type"),
        ({"prompt": 1, "completion": "c"}, "type"),
        ({"prompt": CHAT, "completion": CHAT[:1]}, "no-assistant-turn"),
        ({"prompt": "p"}, "columns"),
        ({"completion": "c"}, "columns"),
        ({}, "columns"),
        ({"text": 3}, "type"),
        ({"text": "  "}, "empty-turn"),
        ({"text": "\ud800"}, "encoding"),
    ],
)
def test_each_problem_of_a_record(row: object, kind: str) -> None:
    assert problems([GOOD, row]) == [(2, kind)]


def test_a_misspelt_column_is_guessed() -> None:
    found = read_records([GOOD, {"prompt": "p", "completions": "c"}, {"txt": "t"}]).problems
    assert (
        '`prompt` needs `completion` beside it; found: completions, prompt. Did you mean "completion"?'
        in str(found[0])
    )
    assert 'Did you mean "text"?' in str(found[1])


def test_jsonl_keeps_line_numbers_through_bad_and_blank_lines(tmp_path: Path) -> None:
    good = json.dumps(GOOD)
    deep = "[" * 100_000
    path = write(tmp_path / "a.jsonl", "\ufeff" + good, "", "{", b'{"text": "\xff"}', "9" * 5000, deep, good)
    found = read_records(path)
    assert [r.line for r in found] == [1, 7]
    assert len(found) == 2
    assert [(p.line, p.kind, p.is_dropped) for p in found.problems] == [
        (3, "json", True),
        (4, "encoding", True),
        (5, "json", True),
        (6, "json", True),
    ]
    assert "byte 0xff at column 11" in found.problems[1].message


def test_json_list_keeps_the_line_of_each_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", "[", ' {"text":', '  "a"},', ' {"text": 1}, {"text": "b"}', "]")
    found = read_records(path)
    assert [(r.line, r.text) for r in found] == [(2, "a"), (4, "b")]
    assert [(p.line, p.kind) for p in found.problems] == [(4, "type")]


def test_json_lines_under_the_extension_json(tmp_path: Path) -> None:
    assert len(read_records(write(tmp_path / "a.json", json.dumps(GOOD), json.dumps(GOOD)))) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"text": "a"},\n{"text" "b"}]', "starts on line 2"),
        ('[{"text": "a"} {"text": "b"}]', "lacks a comma"),
        ('[{"text": "a"}', "ends in the middle"),
        ('[{"text": "a"}] x', "after the closing bracket"),
        (b'[{"text": "a"},\n "\xff"]', "byte 0xff on line 2"),
    ],
)
def test_a_broken_json_list_is_refused_whole(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_records(write(tmp_path / "a.json", text))


def test_csv_cells_with_newlines_keep_their_first_line(tmp_path: Path) -> None:
    long = "x" * 200_000  # over the csv module's own limit
    path = write(
        tmp_path / "a.csv",
        "\ufeffprompt, completion,id",
        '"a\nb",c,1',
        "only,two",
        "",
        b"\xff,c,2",
        f"p,{long},3",
        '"a"b,c,4',
        "p,c,5",
        '"never closed,c,6',
        "p,c,7",
    )
    found = read_records(path)
    assert [(r.line, r.prompt, r.fields["id"]) for r in found] == [
        (2, "a\nb", "1"),
        (7, "p", "3"),
        (9, "p", "5"),
    ]
    kinds = [(p.line, p.kind) for p in found.problems]
    assert kinds == [(4, "columns"), (6, "encoding"), (8, "csv"), (10, "csv")]


def test_csv_messages_are_json_and_tsv_splits_at_tabs(tmp_path: Path) -> None:
    cell = json.dumps(CHAT).replace('"', '""')
    assert read_records(write(tmp_path / "a.csv", "messages", f'"{cell}"')).records[0].messages == tuple(CHAT)
    assert read_records(write(tmp_path / "a.TSV", "prompt\tcompletion", "a,b\tc")).records[0].prompt == "a,b"


def test_csv_with_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names 'prompt' twice"):
        read_records(write(tmp_path / "a.csv", "prompt,prompt,completion", "a,b,c"))


def test_parquet(tmp_path: Path) -> None:
    rows = [
        {"messages": CHAT, "text": None},
        {"messages": None, "text": "t"},
        {"messages": None, "text": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_records(tmp_path / "a.parquet")
    assert [(r.line, r.kind) for r in found] == [(1, "messages"), (2, "text")]
    assert [(p.line, p.kind) for p in found.problems] == [(3, "columns")]
    with pytest.raises(DataError, match="not a readable Parquet"):
        read_records(write(tmp_path / "b.parquet", "PAR1 not really"))


def test_sources_that_are_refused_say_why(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json.dumps(GOOD))
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "blank.jsonl", "", "")
    write(tmp_path / "train.jsonk", "x")
    for name, says in {
        "trian.jsonl": 'does not exist. Did you mean "train.jsonl"',
        "x" * 300: "does not exist",
        ".": "is not a file",
        "train.jsonk": "known: .jsonl .json .csv .tsv .parquet. Did you mean",
        "empty.jsonl": "is empty",
        "blank.jsonl": "holds no records. Each record needs `messages`, or",
    }.items():
        with pytest.raises(DataError) as caught:
            read_records(tmp_path / name)
        assert says in str(caught.value)


def test_a_source_with_nothing_usable_shows_its_first_problems() -> None:
    with pytest.raises(DataError) as caught:
        read_records([{"text": ""}] * 7)
    text = str(caught.value)
    assert "none of its 7 records" in text
    assert text.count("\n  line ") == 5
    assert "and 2 more" in text


@pytest.mark.parametrize("source", [{"train": [GOOD]}, 3, b"x"])
def test_things_that_are_no_records(source: object) -> None:
    with pytest.raises(DataError):
        read_records(source)  # type: ignore[arg-type]


def test_references() -> None:
    rows = [
        {**GOOD, "references": ["c", "d"]},
        {**GOOD, "references": "c"},
        {"messages": CHAT},
        {"text": "t"},
    ]
    assert [references(r) for r in read_records(rows)] == [["c", "d"], ["c"], ["yo"], []]
    assert references(Record("completion", 1, completion="z")) == ["z"]
