"""Make the E2E NLG sample that ships with lorasmith from the published dev and test files.

    python benchmarks/make_e2e_sample.py SOURCE [TARGET]

SOURCE holds devset.csv, testset_w_refs.csv and LICENCE.md; the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

SEED = 0
TRAIN_PAIRS, VALIDATION_MRS, TEST_MRS = 2000, 64, 64
TARGET = Path(__file__).parents[1] / "src/lorasmith/samples/e2e"
SELECTED = """
What was selected here (benchmarks/make_e2e_sample.py, seed 0), repeated pairs and stray space removed:
train.jsonl holds 2,000 pairs of devset.csv; validation.jsonl holds one pair each of 64 other meaning
representations of devset.csv; test.jsonl holds 64 meaning representations of testset_w_refs.csv with all
their references. Each prompt is the meaning representation after the words "Describe the restaurant: ".
These files are offered under the same licence, CC BY-SA 4.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=TARGET)
    args = parser.parse_args()
    dev, test = grouped(args.source / "devset.csv"), grouped(args.source / "testset_w_refs.csv")
    shared = dev.keys() & test.keys()
    if shared:
        raise SystemExit(f"{len(shared)} meaning representations are in both files: nothing is held out.")
    args.target.mkdir(parents=True, exist_ok=True)
    for name, rows in (*dev_splits(dev).items(), ("test", test_split(test))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (args.target / f"{name}.jsonl").write_bytes("".join(lines).encode())
    licence = (args.source / "LICENCE.md").read_text(encoding="utf-8")
    (args.target / "LICENCE.md").write_bytes((licence.rstrip() + "\n" + SELECTED).encode())


def grouped(path: Path) -> dict[str, list[str]]:
    """Distinct references by meaning representation, both in file order."""
    groups: dict[str, list[str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            mr, ref = " ".join(row["mr"].split()), " ".join(row["ref"].split())
            refs = groups.setdefault(mr, [])
            if ref not in refs:
                refs.append(ref)
    return groups


def dev_splits(dev: dict[str, list[str]]) -> dict[str, list[dict[str, object]]]:
    rng = random.Random(SEED)
    held = set(rng.sample(list(dev), VALIDATION_MRS))
    validation = [pair(mr, rng.choice(refs)) for mr, refs in dev.items() if mr in held]
    pairs = [pair(mr, ref) for mr, refs in dev.items() if mr not in held for ref in refs]
    chosen = sorted(rng.sample(range(len(pairs)), TRAIN_PAIRS))
    return {"train": [pairs[i] for i in chosen], "validation": validation}


def test_split(test: dict[str, list[str]]) -> list[dict[str, object]]:
    chosen = set(random.Random(SEED).sample(list(test), TEST_MRS))
    return [pair(mr, refs[0]) | {"references": refs} for mr, refs in test.items() if mr in chosen]


def pair(mr: str, ref: str) -> dict[str, object]:
    return {"prompt": f"Describe the restaurant: {mr}", "completion": ref}


if __name__ == "__main__":
    main()
