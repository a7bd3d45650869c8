"""`lorasmith check`: does an adapter fit a base, fully, and does it do anything?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.options import BaseOption, JsonOption, print_json, probe_ids


def check(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory.")],
    base: BaseOption,
    effect: Annotated[bool, typer.Option("--effect", help="Also load the base and compare logits.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check coverage, values and base without loading the base's weights; exits with 1 on any problem."""
    from lorasmith.bases import base_directory, fingerprint_directory, match_base, read_headers
    from lorasmith.formats import check_coverage, check_values, read_adapter, read_header

    directory = base_directory(base)
    header = read_header(adapter)
    shapes = {name: tensor.shape for name, tensor in read_headers(directory).items()}
    coverage = check_coverage(header, shapes)
    problems = [asdict(p) for p in (*coverage.problems, *check_values(read_adapter(adapter)))]
    matches = match_base(header.provenance, fingerprint_directory(directory))
    if matches is False:
        message = "the adapter was trained on another base than this one"
        problems.append({"kind": "base-mismatch", "module": "", "message": message})
    moved = _effect(base, adapter) if effect and not problems else None
    if moved == 0.0:
        problems.append({"kind": "no-effect", "module": "", "message": "the logits of a probe do not change"})
    result: dict[str, Any] = {
        "ok": not problems, "problems": problems, "coverage": coverage.to_dict()["table"],
        "effect": moved, "base_match": matches,
    }  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print(coverage)
        known = {
            True: "the one it was trained on",
            False: "another one",
            None: "unverified: no lorasmith sidecar",
        }
        print(
            f"base: {known[matches]}"
            + (f"; largest change of a logit {moved:.3g}" if moved is not None else "")
        )
        print("\n".join(f"{p['kind']}: {p['message']}" for p in problems) if problems else "no problems")
    if problems:
        raise typer.Exit(1)


def _effect(base: str, path: Path) -> float:
    """Largest change of a logit on one prompt."""
    import torch

    from lorasmith.bases import load_base
    from lorasmith.formats import read_adapter
    from lorasmith.inject import inject

    loaded = load_base(base)
    ids = probe_ids(loaded)
    with torch.no_grad():
        before = loaded.model(ids).logits.float()
        inject(loaded.model, read_adapter(path))
        return float((loaded.model(ids).logits.float() - before).abs().max())
