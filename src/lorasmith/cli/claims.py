"""`lorasmith claims`: the paper's claims, measured again on a base of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.options import BaseOption, JsonOption, print_json, say
from lorasmith.cli.train import INTERRUPTED


def claims(
    out: Annotated[Path, typer.Option(help="Folder of claims.json, report.html, plots and cache.")],
    base: BaseOption = "smollm2-135m",
    quick: Annotated[bool, typer.Option("--quick", help="Small designs: ten minutes on two cores.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these claims; repeat it, or use commas.")
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Only score the answers kept in --out again, and compare.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the LoRA paper's claims again; asked again, it goes on where it stopped."""
    if rescore:
        _rescore(out, as_json=as_json)
        return
    from lorasmith.bases import base_directory
    from lorasmith.claims import CLAIMS, Setting, choose, run_claims
    from lorasmith.cli.claims_page import write_page

    wanted = choose([name.strip() for text in only or () for name in text.split(",") if name.strip()])
    base_directory(base)  # refused before anything is written
    setting = Setting(base, quick, out, say)
    try:
        document = run_claims(
            wanted, setting, order=[c.id for c in CLAIMS], on_done=lambda d: write_page(out, d)
        )
    except KeyboardInterrupt:
        say(f"stopped; what was measured is in {out}, and the same command goes on")
        raise typer.Exit(INTERRUPTED) from None
    document |= {"report_html": str(out / "report.html")}
    if as_json:
        print_json(document)
    else:
        _print(document)
    names = {claim.id for claim in wanted}
    if any(entry["error"] for entry in document["claims"] if entry["id"] in names):
        raise typer.Exit(1)


def _print(document: dict[str, Any]) -> None:
    for entry in document["claims"]:
        print(f"{entry['holds'] or 'error':18} {entry['id']:22} {entry['title']}")
    print(document["report_html"])


def _rescore(record: Path, *, as_json: bool) -> None:
    """Every stored score beside what the kept answers score now; exit code 1 where they differ."""
    from dataclasses import asdict

    from lorasmith.claims import rescore

    found = rescore(record)
    wrong = [each for each in found if not each.agrees]
    files = len({each.file for each in found})
    if as_json:
        scores = [asdict(each) | {"agrees": each.agrees} for each in found]
        print_json({"files": files, "scores": scores, "differ": len(wrong)})
    else:
        for each in wrong:
            print(f"{each.file}: {each.metric} was stored as {each.stored} and is {each.now}")
        print(f"{len(found) - len(wrong)} of {len(found)} scores of {files} files of answers agree")
    if wrong:
        raise typer.Exit(1)
