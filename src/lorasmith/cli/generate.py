"""`lorasmith generate`: one prompt for one adapter or several, or a file of prompts, all in one batch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.methods import load_tuned, method_engine, the_method
from lorasmith.cli.options import (
    BaseOption,
    DtypeOption,
    JsonOption,
    MismatchOption,
    QuantizeOption,
    load_adapter,
    print_json,
    say,
)
from lorasmith.errors import BudgetError, ConfigError, DataError

if TYPE_CHECKING:
    from lorasmith.bases import Base
    from lorasmith.cli.prompts import Question
    from lorasmith.engine import Engine, Handle, OnToken, Result

PROGRESS_EVERY_S = 5.0
FAILED = 1


def generate(
    base: BaseOption,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask; the chat template is applied. Every adapter answers.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL: `prompt` or `messages` a line, and if wanted `adapter`, `max_tokens`, …"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter directory, or name=directory; may be repeated. Without it, the plain base."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the answers to --prompts go, as JSONL; stdout by default.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(help="Answers that are written at once.")] = 16,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt, or a file of prompts; different adapters share each step."""
    folders = _named(adapter or [])
    method, digest = the_method(folders), ""
    if method is not None:
        folders = {}
    if (prompt is None) == (prompts is None):
        raise ConfigError("generate: give either --prompt (one question) or --prompts (a JSONL file).")
    if prompt is not None and not prompt.strip():
        raise ConfigError("generate: --prompt is empty. Give it a question.")
    if out is not None and prompts is None:
        raise ConfigError("generate: --out is for the answers to --prompts; one answer goes to stdout.")
    from lorasmith.bases import load_base
    from lorasmith.cli.prompts import Question, read_questions
    from lorasmith.engine import Request

    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
                                "top_k": top_k, "seed": seed, "stop": tuple(stop or ())}  # fmt: skip
    if prompts is not None:
        questions = read_questions(prompts, settings, folders)
    else:
        asked = [Request(prompt or "", adapter=name, **settings) for name in folders or [None]]
        questions = [Question(i, request) for i, request in enumerate(asked, 1)]
    width = min(rows, len(questions))
    loaded = load_base(base, dtype=dtype, quantize=quantize)
    if method is None:
        engine = _engine(loaded, folders, width, allow_base_mismatch)
    else:
        engine, digest = _method_engine(loaded, method, width, allow_base_mismatch)
    streams = prompts is None and len(questions) == 1 and not as_json and sys.stdout.isatty()
    results = _answer(engine, questions, streams=streams)
    engine.close()
    answers = [_to_dict(q, r, numbered=prompts is not None) for q, r in zip(questions, results, strict=True)]
    answers = [a | {"adapter": str(method), "adapter_digest": digest} for a in answers] if method else answers
    _show(answers, out=out, as_json=as_json, as_lines=prompts is not None, is_shown=streams)
    failed = [a for a in answers if a["finish_reason"] == "error"]
    if failed:
        say(f"{len(failed)} of {len(answers)} answers failed; the first: {failed[0]['error']}")
        raise typer.Exit(FAILED)


def _named(given: Sequence[str]) -> dict[str, Path]:
    """Name → directory, in the order given. A directory without a name is called by its path."""
    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = text, text
        if not name or not folder:
            raise ConfigError(f"--adapter {text}: give a directory, or name=directory.")
        if name in named:
            raise ConfigError(f'--adapter: "{name}" is given twice. Give each adapter a name of its own.')
        named[name] = Path(folder)
    return named


def _engine(loaded: Base, folders: dict[str, Path], rows: int, allow_base_mismatch: bool) -> Engine:
    from lorasmith.engine import Engine

    engine = Engine(loaded, max_rows=rows)
    engine.add_adapters(
        {
            name: load_adapter(folder, loaded, allow_base_mismatch=allow_base_mismatch)
            for name, folder in folders.items()
        }
    )
    if engine.runner.is_solo:
        say(f"{loaded.name} is answered one row at a time: {engine.why_not_fast}")
    else:
        for name, reason in engine.served_alone.items():
            say(f'adapter "{name}" shares no batch and is slower: {reason}')
    return engine


def _method_engine(loaded: Base, folder: Path, rows: int, allow_base_mismatch: bool) -> tuple[Engine, str]:
    """An engine whose model computes as the method in `folder` tuned it, for every request; and its digest."""
    from lorasmith.baselines import Tuned, apply_method

    tuned = load_tuned(folder, loaded, allow_base_mismatch=allow_base_mismatch)
    assert isinstance(tuned, Tuned)
    apply_method(loaded.model, tuned)
    say(f'{folder}: method "{tuned.method}", on the model itself, so it answers everything here')
    return method_engine(loaded, tuned, rows=rows), tuned.digest


def _answer(engine: Engine, questions: Sequence[Question], *, streams: bool) -> list[Result]:
    """Every answer, in order; on a terminal a single one appears as it is written."""
    handles = _submitted(
        engine, questions, (lambda event: print(event.text, end="", flush=True)) if streams else None
    )
    start = shown = time.monotonic()
    while engine.step():
        if time.monotonic() - shown > PROGRESS_EVERY_S and not streams:
            shown = time.monotonic()
            done = sum(handle.done() for handle in handles)
            say(f"{done} of {len(handles)} answers after {shown - start:.0f} s")
    if streams:
        print()
    return [handle.result() for handle in handles]


def _submitted(engine: Engine, questions: Sequence[Question], on_token: OnToken | None) -> list[Handle]:
    """Queue every question; if any is refused, say of all of them why, and answer none."""
    handles, faults = [], []
    for question in questions:
        try:
            handles.append(engine.submit(question.request, on_token))
        except (BudgetError, DataError) as error:
            faults.append((question.line, error))
    if len(questions) == 1 and faults:
        raise faults[0][1]
    if faults:
        raise DataError("nothing was answered:\n" + "\n".join(f"  line {n}: {e}" for n, e in faults[:10]))
    return handles


def _to_dict(question: Question, result: Result, *, numbered: bool) -> dict[str, Any]:
    place = {"line": question.line, "id": question.id} if numbered else {}
    return {
        **place,
        "text": result.text,
        "tokens": len(result.token_ids),
        "adapter": question.request.adapter,
        "adapter_digest": result.adapter_digest,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "error": result.error,
    }


def _show(
    answers: list[dict[str, Any]], *, out: Path | None, as_json: bool, as_lines: bool, is_shown: bool
) -> None:
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is not None:
        from lorasmith.train import write_atomically

        write_atomically(out, lines)
        say(f"{len(answers)} answers in {out}")
    if as_json:
        print_json({**answers[0], "results": answers, "out": out})
    elif as_lines and out is None:
        print(lines, end="")
    elif not as_lines and not is_shown:
        for answer in answers:
            print(answer["text"] if len(answers) == 1 else f"[{answer['adapter']}]\n{answer['text']}\n")
