"""The `lorasmith` command: its sub-commands, and how errors leave it."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from lorasmith.cli import (
    advise,
    bench,
    check,
    claims,
    combine,
    compress,
    data,
    evaluate,
    export,
    extract,
    generate,
    inspect_adapter,
    merge,
    plan,
    quickstart,
    runs,
    serve,
    store,
    sweep,
    train,
    verify,
)
from lorasmith.errors import LoraSmithError

BAD_INPUT = 2


class _Group(TyperGroup):
    """Turns every error that lorasmith raises on purpose into its message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraSmithError as error:
            if _is_first_to_say(str(error)):
                print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None


def _is_first_to_say(text: str) -> bool:
    if "RANK" not in os.environ:
        return True
    from lorasmith.train import is_first_to_say

    return is_first_to_say(text)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LoRA adapters: train, check, move and serve them on one frozen base.",
)
app.command("quickstart")(quickstart.quickstart)
app.command("plan")(plan.plan)
app.command("advise")(advise.advise)
app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("check")(check.check)
app.command("merge")(merge.merge)
app.command("runs")(runs.runs)
app.command("bench")(bench.bench)
app.command("claims")(claims.claims)
app.command("inspect")(inspect_adapter.inspect)
app.command("compress")(compress.compress)
app.command("combine")(combine.combine)
app.command("extract")(extract.extract)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("key")(serve.key)
app.command("verify")(verify.verify)
app.add_typer(data.app, name="data")
app.add_typer(store.app, name="store")


def main() -> None:
    """Entry point of the console script."""
    app()
