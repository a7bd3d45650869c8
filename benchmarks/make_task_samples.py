"""Make the CLINC150 and WikiSQL samples that ship with lorasmith from the published files.

    python benchmarks/make_task_samples.py SOURCE [TARGET]

SOURCE holds clinc150/ (data_full.json, domains.json, LICENCE.md) and wikisql/ (train, dev, test .jsonl,
LICENCE.md); the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEED = 0
TARGET = Path(__file__).parents[1] / "src/lorasmith/samples"
DOMAINS = ("banking", "credit_cards")
PER_INTENT = {"train": 20, "validation": 5, "test": 10}
OUT_OF_SCOPE = {"train": 40, "validation": 20, "test": 100}
SQL_ROWS = {"train": 1000, "validation": 100, "test": 200}
THEIRS = {"train": "train", "validation": "val", "test": "test"}
CLINC_SAID = """
What was selected here (benchmarks/make_task_samples.py, seed 0): the 30 intents of the domains banking and
credit_cards; of each 20 / 5 / 10 requests of the published train / val / test splits, and 40 / 20 / 100 of their
out-of-scope requests. Requests and labels are unchanged but for underscores, which became spaces. Each prompt is
the request after the words "Name the intent of this request: ".
"""
SQL_SAID = """
Selected again for this folder (benchmarks/make_task_samples.py, seed 0): 1,000 / 100 / 200 of those questions;
tables stay disjoint across the splits. Each prompt names the columns and asks the question.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=TARGET)
    args = parser.parse_args()
    write(args.target / "clinc150", clinc(args.source / "clinc150"), args.source / "clinc150", CLINC_SAID)
    write(args.target / "wikisql", wikisql(args.source / "wikisql"), args.source / "wikisql", SQL_SAID)


def clinc(source: Path) -> dict[str, list[dict[str, Any]]]:
    data = json.loads((source / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((source / "domains.json").read_text(encoding="utf-8"))
    intents = [intent for domain in DOMAINS for intent in domains[domain]]
    splits, seen = {}, set[str]()
    for name, theirs in THEIRS.items():
        rng, rows = random.Random(f"{SEED} {name}"), []
        for intent in intents:
            rows += rng.sample([row for row in data[theirs] if row[1] == intent], PER_INTENT[name])
        rows += rng.sample(data[f"oos_{theirs}"], OUT_OF_SCOPE[name])
        rng.shuffle(rows)
        refuse_shared(seen, [text for text, _ in rows])
        splits[name] = [request(text, label) for text, label in rows]
    return splits


def request(text: str, label: str) -> dict[str, Any]:
    named = "out of scope" if label == "oos" else label.replace("_", " ")
    return {"prompt": f"Name the intent of this request: {text}", "completion": named}


def wikisql(source: Path) -> dict[str, list[dict[str, Any]]]:
    files = {"train": "train", "validation": "dev", "test": "test"}
    splits, tables = {}, set[str]()
    for name, theirs in files.items():
        lines = (source / f"{theirs}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = random.Random(f"{SEED} {name}").sample([json.loads(line) for line in lines], SQL_ROWS[name])
        refuse_shared(tables, [row["table_id"] for row in rows])
        splits[name] = [question(row) for row in rows]
    return splits


def question(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = (
        f"Table t has the columns: {', '.join(row['columns'])}.\nWrite SQL that answers: {row['question']}"
    )
    kept = {key: row[key] for key in ("columns", "agg", "sel", "conds")}
    return {"prompt": prompt, "completion": row["sql"], **kept}


def refuse_shared(seen: set[str], these: Iterable[str]) -> None:
    """Stop where an earlier split has one of these already."""
    these = set(these)
    if shared := seen & these:
        raise SystemExit(f"{len(shared)} are in two splits, such as {min(shared)!r}: nothing is held out.")
    seen |= these


def write(target: Path, splits: Mapping[str, list[dict[str, Any]]], source: Path, said: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (target / f"{name}.jsonl").write_bytes("".join(lines).encode())
    licence = (source / "LICENCE.md").read_text(encoding="utf-8").rstrip()
    (target / "LICENCE.md").write_bytes((licence + "\n" + said).encode())


if __name__ == "__main__":
    main()
