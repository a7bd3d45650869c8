"""Faults planted in clean data: each is found on its line, and nothing else is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lorasmith.cli.data_page import data_page
from lorasmith.data import check, encode, read_records, refuse_systematic
from lorasmith.errors import DataError
from tests.support.tokenizer import ByteTokenizer

THINGS = ("river", "garden", "engine", "letter", "window", "bridge", "market", "forest", "kitchen", "harbour")
DEEDS = (
    "opens",
    "closes",
    "repairs",
    "paints",
    "measures",
    "visits",
    "describes",
    "cleans",
    "guards",
    "sells",
)


def clean(count: int = 60) -> list[dict[str, Any]]:
    """Questions and answers that differ from each other in most words."""
    chooser, rows = random.Random(0), []
    for i in range(count):
        words = [
            f"{chooser.choice(DEEDS)} the {chooser.choice(THINGS)} of {chooser.choice('abcdefgh')}{i}{k}"
            for k in range(8)
        ]
        rows.append({
            "prompt": f"What is it that {i} people and their friends see when somebody {' and '.join(words[:4])}?",
            "completion": f"They see that the one who {' or '.join(words[4:])} is number {i}.",
        })  # fmt: skip
    return rows


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


PROMPT = "Tell me about the harbour of Bremen, which I have never seen with my own eyes."
GERMAN = "Wie heißt der Fluss, an dem die Stadt liegt, und was ist es, das man dort nicht sehen kann?"
NEAR = (
    "When the morning train leaves the old station at the edge of town, the baker on the corner has long opened his "
    "shop, and people who live near the square come by for bread, coffee and the latest news of their neighbours, "
    "while the children wait under the trees for the bus that brings them to school on the other side of the hill."
)
FAULTS: dict[str, tuple[Any, str]] = {
    "exact duplicate": (clean()[3], "duplicate"),
    "near duplicate": (
        {"prompt": f"{NEAR} Why?", "completion": "Because they always did so."},
        "near-duplicate",
    ),
    "case and punctuation only": (
        {"prompt": clean()[5]["prompt"].upper(), "completion": clean()[5]["completion"] + "!"},
        "near-duplicate",
    ),
    "markup of another template": (
        {"prompt": f"[INST] {PROMPT} [/INST]", "completion": "Yes."},
        "template-mismatch",
    ),
    "roles written out": (
        {"prompt": f"User: {PROMPT}\nAssistant:", "completion": "Yes."},
        "template-mismatch",
    ),
    "rendered by hand, differently": (
        {"text": f"<|im_start|>user\n{PROMPT}<|im_end|>\nYes."},
        "template-mismatch",
    ),
    "control token in the text": ({"prompt": f"{PROMPT}<|im_end|>", "completion": "Yes."}, "special-token"),
    "doubled control token": (
        {"text": f"<|im_start|><|im_start|>assistant\n{PROMPT}<|im_end|><|im_end|>"},
        "doubled-token",
    ),
    "turn without an end": (
        {"text": f"<|im_start|>user\n{PROMPT}\n<|im_start|>assistant\nYes.<|im_end|>"},
        "end-of-turn",
    ),
    "empty question": (conversation(("user", " "), ("assistant", "Yes, of course.")), "empty-turn"),
    "empty answer": (conversation(("user", PROMPT), ("assistant", "")), "empty-turn"),
    "no answer at all": (conversation(("user", PROMPT)), "no-assistant-turn"),
    "unknown role": (conversation(("wizard", PROMPT), ("assistant", "Yes.")), "role"),
    "mojibake": ({"prompt": "Where is the cafÃ© of which they speak?", "completion": "Here."}, "mojibake"),
    "mojibake of a quote": (
        {"prompt": "Whatâ€™s the name of this place?", "completion": "None."},
        "mojibake",
    ),
    "lost characters": ({"prompt": "Where is the caf\ufffd that I mean?", "completion": "Here."}, "encoding"),
    "control character": (
        {"prompt": "Where is\x00 it, if I may ask?", "completion": "Here."},
        "control-character",
    ),
    "zero-width space": (
        {"prompt": "Where\u200b is the other one?", "completion": "Here."},
        "invisible-character",
    ),
    "another language": ({"prompt": GERMAN, "completion": "Die Weser."}, "language"),
    "another script": ({"prompt": "Где находится библиотека города", "completion": "Там."}, "language"),
    "prompt longer than a sequence": (
        {"prompt": f"{PROMPT} {'Really far. ' * 90}", "completion": "Yes."},
        "truncated",
    ),
    "answer longer than a sequence": ({"prompt": PROMPT, "completion": "Yes. " * 300}, "length"),
    "broken row": ({"prompt": PROMPT, "completion": 7}, "type"),
}


def test_clean_data_raises_no_alarm() -> None:
    assert (
        check(
            [*clean(), {"prompt": NEAR, "completion": "Because."}], ByteTokenizer(), max_length=1000
        ).problems
        == []
    )


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found_where_it_is(name: str) -> None:
    fault, kind = FAULTS[name]
    rows = [*clean(), {"prompt": NEAR, "completion": "Because they always did so."}]
    report = check([*rows[:40], *rows[40:], fault], ByteTokenizer(), max_length=1000)
    assert {p.line for p in report.problems} == {len(rows) + 1}
    assert kind in {p.kind for p in report.problems}


def test_all_faults_at_once() -> None:
    rows = [*clean(), {"prompt": NEAR, "completion": "Because they always did so."}]
    report = check([*rows, *(fault for fault, _ in FAULTS.values())], ByteTokenizer(), max_length=1000)
    found = {(p.line, p.kind) for p in report.problems}
    planted = {(len(rows) + 1 + i, kind) for i, (_, kind) in enumerate(FAULTS.values())}
    # Some planted rows resemble each other, so there may be more on those lines, but none on a clean one.
    assert planted <= found
    assert {line for line, _ in found} == {line for line, _ in planted}


def labelled(counts: dict[str, int]) -> list[dict[str, str]]:
    rows = [row["prompt"] for row in clean(sum(counts.values()))]
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [{"prompt": p, "completion": label} for p, label in zip(rows, labels, strict=True)]


def test_classification_is_recognised_and_weighed() -> None:
    even = check(labelled({"yes": 30, "no": 28}), ByteTokenizer(), max_length=1000)
    assert even.problems == []
    assert even.labels == {"yes": 30, "no": 28}
    uneven = check(labelled({"yes": 55, "no": 5}), ByteTokenizer(), max_length=1000)
    assert [p.kind for p in uneven.problems] == ["imbalance"]
    starved = check(labelled({"a": 40, "b": 40, "c": 1}), ByteTokenizer(), max_length=1000)
    assert [(p.line, p.kind) for p in starved.problems] == [(81, "imbalance")]
    rows = labelled({"yes": 20, "no": 20})
    torn = check([*rows, {**rows[0], "completion": "no"}], ByteTokenizer(), max_length=1000)
    assert [(p.line, p.kind) for p in torn.problems] == [(41, "conflict")]
    assert check(clean(), ByteTokenizer(), max_length=1000).labels is None


def test_overlap_with_held_out_data() -> None:
    rows = clean()
    held_out = [{"prompt": rows[7]["prompt"].lower(), "completion": "Something else."}, *clean(90)[70:]]
    report = check(rows, ByteTokenizer(), max_length=1000, against=held_out)
    assert [(p.line, p.kind) for p in report.problems] == [(8, "overlap")]
    assert "line 1" in report.problems[0].message
    assert check(rows, ByteTokenizer(), max_length=1000, against=clean(90)[60:]).problems == []


def test_several_answers_to_one_question_are_no_duplicates() -> None:
    rows = [
        {"prompt": NEAR, "completion": f"Because {reason} ones did."} for reason in ("the old", "the young")
    ]
    assert check(rows, ByteTokenizer(), max_length=1000).problems == []


def test_the_page_is_self_contained_and_escapes_what_it_shows() -> None:
    rows = [*clean(), {"prompt": "<script>alert(1)</script>\x07", "completion": "No."}]
    page = data_page(check(rows, ByteTokenizer(), max_length=1000), source="a<b", base="x", max_length=1000)
    assert "<script" not in page
    assert "http" not in page
    assert "&lt;script&gt;" in page.replace("</i><i>", "")
    assert "control-character" in page


def test_training_refuses_what_is_wrong_through_and_through() -> None:
    tokenizer = ByteTokenizer()

    def refuse(rows: list[dict[str, Any]]) -> None:
        found = read_records(rows)
        refuse_systematic(found, encode(found, tokenizer, max_length=1000), tokenizer)

    wrong, kind = FAULTS["turn without an end"]
    again = [{"text": wrong["text"].replace("Tell", f"{i} tell")} for i in range(30)]
    refuse(clean())
    refuse([*clean(), wrong])
    with pytest.raises(DataError, match=rf"(?s)30 of the first 50 records.*{kind}.*data check"):
        refuse([*clean(20), *again])


def test_a_title_in_another_language_is_no_alarm() -> None:
    named = {
        "prompt": 'Name who directed the episode "bro-lo el cuñado", directed by, title, no.',
        "completion": "Him.",
    }
    assert check([*clean(), named], ByteTokenizer(), max_length=1000).problems == []
