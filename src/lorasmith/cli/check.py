"""`lorasmith check`: does an adapter fit a base, fully, and does it do anything?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.methods import check_method, put_on, read_tuned
from lorasmith.cli.options import BaseOption, JsonOption, QuantizeOption, print_json, probe_ids
from lorasmith.errors import AdapterFileError

if TYPE_CHECKING:
    from lorasmith.formats import Coverage, Problem

BASES = {True: "the one it was trained on", False: "another one", None: "unverified: no lorasmith sidecar"}
MAX_SHOWN = 40


def check(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory.")],
    base: BaseOption,
    quantize: QuantizeOption = None,
    effect: Annotated[bool, typer.Option("--effect", help="Also load the base and compare logits.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check coverage, values and base without loading the base's weights; exits with 1 on any problem."""
    from lorasmith.baselines import is_method
    from lorasmith.bases import base_directory
    from lorasmith.quantised import require_kind

    if not adapter.is_dir():
        raise AdapterFileError(f"there is no directory {adapter}. An adapter is a directory.")
    directory = base_directory(base)
    if quantize is not None:
        require_kind(quantize)
    coverage: Coverage | None = None
    if is_method(adapter):
        matches, problems = check_method(adapter, directory, quantize)
    else:
        coverage, matches, problems = _inspect(adapter, directory, quantize)
    moved = _effect(base, adapter, quantize) if effect and not problems else None
    if moved == 0.0:
        problems.append({"kind": "no-effect", "module": "", "message": "the logits of a probe do not change"})
    result: dict[str, Any] = {
        "ok": not problems, "problems": problems, "effect": moved, "base_match": matches,
        "coverage": coverage.to_dict()["table"] if coverage else {},
    }  # fmt: skip
    if as_json:
        print_json(result)
    else:
        _show(coverage, result)
    if problems:
        raise typer.Exit(1)


def _inspect(
    adapter: Path, base: Path, quantize: str | None
) -> tuple[Coverage | None, bool | None, list[dict[str, str]]]:
    """Every problem at once. A file that cannot be read is one too, and hides no other that can be seen."""
    from lorasmith.bases import fingerprint_directory, match_base, read_headers
    from lorasmith.formats import Problem, check_coverage, check_values, read_adapter, read_header

    coverage, matches, problems = None, None, list[Problem]()
    try:
        header = read_header(adapter)
        shapes = {name: tensor.shape for name, tensor in read_headers(base).items()}
        coverage = check_coverage(header, shapes)
        problems += coverage.problems
        fingerprint = fingerprint_directory(base, quantised=quantize)
        matches = match_base(header.provenance, fingerprint)
        if matches is False:
            problems.append(_mismatch(header.provenance, fingerprint))
        problems += check_values(read_adapter(adapter))
    except AdapterFileError as error:
        lines = str(error).splitlines()
        problems += [Problem("unreadable", "", line.strip()) for line in lines[1:] or lines]
    return coverage, matches, [asdict(problem) for problem in problems]


def _mismatch(provenance: Any, fingerprint: Any) -> Problem:
    from lorasmith.bases import Fingerprint
    from lorasmith.formats import Problem

    noted = provenance["base"]
    differences = ", ".join(Fingerprint.from_dict(noted["fingerprint"]).differences(fingerprint))
    name = noted.get("name", "another base")
    return Problem("base-mismatch", "", f'trained on "{name}"; this base differs in: {differences}')


def _show(coverage: Coverage | None, result: dict[str, Any]) -> None:
    moved, problems = result["effect"], result["problems"]
    if coverage:
        print(coverage.table_text())
        effect = f"; largest change of a logit {moved:.3g}" if moved is not None else ""
        print(f"base: {BASES[result['base_match']]}{effect}")
    for problem in problems[:MAX_SHOWN]:
        print(f"{problem['kind']}: {problem['message']}")
    if len(problems) > MAX_SHOWN:
        print(f"… and {len(problems) - MAX_SHOWN} more; --json lists them all")
    print({0: "no problems", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems"))


def _effect(base: str, path: Path, quantize: str | None) -> float:
    """Largest change of a logit on one prompt."""
    import torch

    from lorasmith.bases import load_base

    loaded = load_base(base, quantize=quantize)
    ids = probe_ids(loaded)
    with torch.no_grad():
        before = loaded.model(ids).logits.float()
        with put_on(loaded.model, read_tuned(path)):
            return float((loaded.model(ids).logits.float() - before).abs().max())
