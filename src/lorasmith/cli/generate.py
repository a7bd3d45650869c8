"""`lorasmith generate`: one answer, or one per adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import (
    BaseOption,
    DtypeOption,
    JsonOption,
    MismatchOption,
    load_adapter,
    print_json,
)
from lorasmith.errors import ConfigError


def generate(
    base: BaseOption,
    prompt: Annotated[str, typer.Option(help="What to ask; the chat template is applied.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter directory; without it, the plain base.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    dtype: DtypeOption = "auto",
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt."""
    if not prompt.strip():
        raise ConfigError("generate: --prompt is empty. Give it a question.")
    from lorasmith.bases import load_base
    from lorasmith.engine import Engine, Request

    loaded = load_base(base, dtype=dtype)
    engine = Engine(loaded, max_rows=1)
    name = None
    if adapter is not None:
        name = str(adapter)
        engine.add_adapter(name, load_adapter(adapter, loaded, allow_base_mismatch=allow_base_mismatch))
    request = Request(
        prompt, adapter=name, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    (result,) = engine.generate([request])
    engine.close()
    if as_json:
        print_json({"text": result.text, "tokens": len(result.token_ids), "adapter": name,
                    "adapter_digest": result.adapter_digest, "finish_reason": result.finish_reason})  # fmt: skip
    else:
        print(result.text)
