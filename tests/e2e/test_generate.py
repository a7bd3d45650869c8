"""`lorasmith generate` as a user runs it: several adapters, batch files, a terminal, wrong lines."""

from __future__ import annotations

import json
import sys

import pytest

from lorasmith.bases import load_base
from lorasmith.formats import write_adapter
from tests.support.base import write_tiny_base
from tests.support.cli import answer, run
from tests.support.engines import make_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_tiny_base(folder / "base")
    model = load_base(folder / "base").model
    for seed, name in enumerate("ab"):
        write_adapter(make_adapter(model, seed, rank=2), folder / name)
    return folder


@pytest.fixture
def common(place):
    return (
        "--base",
        place / "base",
        "--adapter",
        f"x={place / 'a'}",
        "--adapter",
        place / "b",
        "--max-tokens",
        6,
    )


def test_every_adapter_answers_one_prompt_as_it_does_alone(place, common):
    said = answer("generate", *common, "--prompt", "say ab")
    names = ["x", str(place / "b")]
    assert [r["adapter"] for r in said["results"]] == names
    assert {k: said[k] for k in said["results"][0]} == said["results"][0]
    for result, folder in zip(said["results"], "ab", strict=True):
        alone = answer(
            "generate",
            "--base",
            place / "base",
            "--adapter",
            place / folder,
            "--max-tokens",
            6,
            "--prompt",
            "say ab",
        )
        assert (alone["text"], alone["tokens"]) == (result["text"], result["tokens"])
        assert alone["adapter_digest"] == result["adapter_digest"]
    shown = run("generate", *common, "--prompt", "say ab").stdout
    assert all(f"[{name}]" in shown for name in names)


def test_a_batch_file_is_answered_line_by_line(place, common, tmp_path):
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"prompt": "say ab", "adapter": "x", "id": "first"},
        {"messages": [{"role": "user", "content": "say ab"}], "adapter": str(place / "b"), "max_tokens": 2},
        {"prompt": "say ab", "adapter": None, "temperature": 1.0, "seed": 3},
    ]
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    said = answer("generate", *common, "--prompts", file, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == said["results"]
    assert [(r["line"], r["id"], r["adapter"]) for r in found] == [
        (1, "first", "x"),
        (3, None, str(place / "b")),
        (5, None, None),
    ]
    assert found[1]["tokens"] <= 2
    assert found[0]["text"] == answer("generate", *common, "--prompt", "say ab")["text"]
    printed = run("generate", *common, "--prompts", file)
    assert [json.loads(line) for line in printed.stdout.splitlines()] == found
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"}', "names no adapter"),
        ('{"prompt": "x", "adapter": "y"}', "no adapter 'y'"),
        ('{"promt": "x", "adapter": "x"}', "Did you mean"),
        ('{"prompt": " ", "adapter": "x"}', "not empty"),
        ('{"prompt": "x", "adapter": "x", "max_tokens": 0}', "max_tokens=0"),
        ('{"prompt": "x", "adapter": "x", "max_tokens": 100000}', "one request may hold"),
        ('{"prompt": "x", "messages": [], "adapter": "x"}', "either"),
        ('{"messages": ["x"], "adapter": "x"}', "role"),
        ("[1]", "object"),
        ("{", "line 2"),
        ("", ""),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(common, tmp_path, line, said):
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    good = '{"prompt": "x", "adapter": "x"}' if line else ""
    file.write_text(f"{good}\n{line}\n")
    result = run("generate", *common, "--prompts", file, "--out", out)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not out.exists()
    assert "Traceback" not in result.output + result.stderr


def test_contradictions_are_refused(place, common, tmp_path):
    for wrong in (
        ("--base", place / "base"),
        (*common, "--prompt", "x", "--prompts", tmp_path / "f"),
        (*common, "--prompt", "x", "--out", tmp_path / "o"),
        (*common, "--adapter", f"x={place / 'b'}", "--prompt", "x"),
        (*common, "--adapter", "=y", "--prompt", "x"),
        (*common, "--prompts", tmp_path / "nowhere.jsonl"),
    ):
        assert run("generate", *wrong).exit_code == 2, wrong


def test_a_terminal_sees_the_answer_while_it_is_written(place, capsys, monkeypatch):
    from lorasmith.cli.generate import generate

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    pieces = []
    real = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (pieces.append(text), real(text))[1])
    generate(base=str(place / "base"), prompt="say ab", max_tokens=6)
    expected = answer("generate", "--base", place / "base", "--max-tokens", 6, "--prompt", "say ab")["text"]
    assert "".join(pieces) == expected + "\n"
    assert sum(bool(piece.strip()) for piece in pieces) > 1
