"""`lorasmith verify`: a black-box conformance test of any OpenAI-compatible LoRA server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import DtypeOption, JsonOption, print_json, say
from lorasmith.errors import AdapterFileError, ConfigError

if TYPE_CHECKING:
    from lorasmith.verify import Prepared, Verdict

COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def verify(
    url: Annotated[str | None, typer.Argument(metavar="URL", help="Such as http://127.0.0.1:8000")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The served base: to make adapters for it.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters", metavar="name=DIR", help="Prepared ones that the server was started with."
        ),
    ] = None,
    prepare: Annotated[
        Path | None, typer.Option(help="Only write adapters there, and say how to start servers with them.")
    ] = None,
    api: Annotated[str, typer.Option(help="auto, lorasmith, vllm, llama-server, openai.")] = "auto",
    model: Annotated[str | None, typer.Option("--model", help="What the server calls the base.")] = None,
    key: Annotated[str | None, typer.Option(envvar="LORASMITH_KEY", show_envvar=True)] = None,
    admin_key: Annotated[str | None, typer.Option(envvar="LORASMITH_ADMIN_KEY", show_envvar=True)] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for one answer.", min=1)] = 120.0,
    burst: Annotated[int, typer.Option(help="Requests at once in the overload test.", min=2)] = 128,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Test that a server never answers with another adapter, the base or a stale cache; exits with 1 if it does."""
    from lorasmith.bases import load_base
    from lorasmith.verify import read_prepared

    if base is None:
        raise ConfigError(
            "give --base: the base that the server serves (a directory, a built-in name or hub id)"
        )
    if prepare is not None:
        return _prepare(prepare, load_base(base, dtype=dtype), as_json)
    if url is None:
        raise ConfigError("give the server's URL, or --prepare DIR to write adapters for one")
    given = read_prepared(adapters) if adapters else None
    options = {"api": api, "base_model": model, "burst": burst}
    verdict = _verify(
        url, base, given, options, {"key": key, "admin_key": admin_key, "timeout_s": timeout_s}, dtype
    )
    print_json(verdict.to_dict()) if as_json else _show(verdict)
    if verdict.count("failed"):
        raise typer.Exit(1)


def _verify(
    url: str, base: str, given: Prepared | None, options: dict[str, Any], access: dict[str, Any], dtype: str
) -> Verdict:
    import asyncio

    from lorasmith.bases import load_base, load_tokenizer
    from lorasmith.verify import Client, Options, verify

    loaded = None if given else load_base(base, dtype=dtype)
    tokenizer = load_tokenizer(base) if loaded is None else loaded.tokenizer

    async def run() -> Verdict:
        async with Client(url, **access) as client:
            return await verify(client, loaded, tokenizer, Options(**options), given, say)

    return asyncio.run(run())


def _prepare(folder: Path, base: Any, as_json: bool) -> None:
    """Write PEFT directories and, where llama.cpp can read such adapters, GGUF files."""
    from lorasmith.verify import SERVED, Prompts, make_prepared

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--prepare {folder}: it is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    made = make_prepared(base, Prompts(base.tokenizer), folder, list(SERVED), [])
    made.write_note(folder)
    ggufs = _write_ggufs(made, base, folder)
    pairs = [f"--adapters {name}={path}" for name, path in made.directories.items()]
    commands = _commands(made, ggufs, base.name)
    if as_json:
        print_json({"directories": made.directories, "markers": made.markers, "commands": commands})
        return
    print("Start the server with them, one of:")
    for kind, command in commands.items():
        print(f"\n  {kind}:\n    {command}")
    print(f"\nThen:\n    lorasmith verify URL --base {base.name} {' '.join(pairs)}")


def _write_ggufs(made: Prepared, base: Any, folder: Path) -> dict[str, Path]:
    from lorasmith.formats import read_adapter, write_gguf

    ggufs = {}
    try:
        for name, directory in made.directories.items():
            write_gguf(read_adapter(directory), folder / "gguf" / name, base.model.config.to_dict())
            ggufs[name] = folder / "gguf" / name / "adapter.gguf"
    except AdapterFileError as error:
        say(f"no GGUF: {error}")
        return {}
    return ggufs


def _commands(made: Prepared, ggufs: dict[str, Path], base: str) -> dict[str, str]:
    pairs = [f"{name}={path}" for name, path in made.directories.items()]
    commands = {
        "lorasmith": f"lorasmith serve --base {base} --store NEW_DIR "
        + " ".join(f"--adapters {p}" for p in pairs),
        "vllm": f"vllm serve {base} --enable-lora --max-loras {len(pairs)} --lora-modules {' '.join(pairs)}",
    }
    if ggufs:
        files = ",".join(map(str, ggufs.values()))
        commands["llama-server"] = f"llama-server -m BASE.gguf --lora {files}"
    return commands


def _show(verdict: Verdict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{verdict.url} ({verdict.api}, base {verdict.base_model})", title_justify="left")
    for title in ("test", "outcome", "what was found"):
        table.add_column(title, overflow="fold")
    for test in verdict.tests:
        said = [*test.found, *test.notes] or [test.reason or test.what]
        colour = COLOURS[test.outcome]
        table.add_row(test.id, f"[{colour}]{test.outcome}[/]", escape("\n".join(said)))
    console.print(table)
    counts = ", ".join(f"{verdict.count(o)} {o}" for o in COLOURS)  # type: ignore[arg-type]
    console.print(f"{counts}. Proven on the local base: {verdict.proof}")
