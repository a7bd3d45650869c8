"""`lorasmith bench`: side by side with the peers, in one run.

A benchmark is one file `benchmarks/bench_<name>.py` of the source checkout, with
`run(peers: bool, quick: bool) -> rows`, each row `{what, ours, peer, ratio}`, and `ABOUT`, what its
record says besides. They use public names only and are not installed, so the checkout is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.options import JsonOption, print_json, say
from lorasmith.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parents[3] / "benchmarks"


def bench(
    name: Annotated[str, typer.Argument(help="Which one; see the folder benchmarks/.")],
    peers: Annotated[bool, typer.Option("--peers", help="Also run the other libraries.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, for a first look.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a benchmark, print its rows, append them to benchmarks/records/."""
    module, record = _load(name)
    if peers and not importlib.util.find_spec("peft"):
        raise ConfigError("--peers needs PEFT: pip install 'lorasmith[dev]'")
    say(f"{name}: takes some minutes; let the machine do nothing else meanwhile")
    rows = module.run(peers=peers, quick=quick)
    path = record.append(name, rows, {**getattr(module, "ABOUT", {}), "quick": quick, "peers": peers})
    say(f"recorded in {path}")
    if as_json:
        print_json({"rows": rows})
        return
    width = max(len(row["what"]) for row in rows)
    print(f"{'':<{width}}  {'ours':>9}  {'peer':>9}  ratio")
    for row in rows:
        print(
            f"{row['what']:<{width}}  {_short(row['ours'], 9)}  {_short(row['peer'], 9)}  {_short(row['ratio'], 5)}"
        )


def _load(name: str) -> tuple[Any, Any]:
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    if not known:
        raise ConfigError(
            f"bench needs the source checkout, and this lorasmith was installed without its benchmarks "
            f"({FOLDER} is not there).\n  Get the source, then: pip install -e ."
        )
    if name not in known:
        raise ConfigError(f'no benchmark "{name}".{did_you_mean(name, known)} There are: {", ".join(known)}.')
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    module = importlib.import_module(f"bench_{name}")
    if not hasattr(module, "run"):
        raise ConfigError(f"{FOLDER / f'bench_{name}.py'} has no run(peers, quick); start it as a script.")
    return module, importlib.import_module("record")


def _short(value: float | None, width: int) -> str:
    return f"{'–' if value is None else format(value, '.3g'):>{width}}"
