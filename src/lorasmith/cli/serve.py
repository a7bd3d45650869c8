"""`lorasmith serve`: hundreds of adapters on one base, behind OpenAI's API. `lorasmith key`: a key for it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import (
    BaseOption,
    DtypeOption,
    JsonOption,
    MismatchOption,
    QuantizeOption,
    parse_bytes,
    print_json,
    say,
)
from lorasmith.errors import ConfigError, LoraSmithError, did_you_mean

if TYPE_CHECKING:
    from lorasmith.bases import Base
    from lorasmith.engine import Engine
    from lorasmith.server import Gateway, WorkerSpec
    from lorasmith.store import Store

PAIR = "name=DIR"
ENGINES = ("local", "ray")


def serve(
    base: BaseOption,
    store: Annotated[Path, typer.Option("--store", help="Registry of adapters; made if it is not there.")],
    more: Annotated[list[str] | None, typer.Argument(metavar=f"[{PAIR}]...", help="As --adapters.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", metavar=PAIR, help="Add these to the store first.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(help="Keys file: tenants, admin, monitor.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow other machines without keys.")] = False,
    workers: Annotated[
        int, typer.Option(help="Processes, each with the base, that share the cores.", min=1)
    ] = 1,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the workers are replicas of Ray Serve (extra [ray]).")
    ] = "local",
    max_workers: Annotated[
        int | None, typer.Option(help="With ray: so many as the queue grows.", min=1)
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Requests that run at once, of each worker.", min=1)] = 16,
    max_context: Annotated[int | None, typer.Option(help="Tokens per request at most.")] = None,
    adapter_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Adapters beyond, such as 4GiB, wait on disk.")
    ] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Same bits in any company.")] = False,
    shadow_share: Annotated[
        float, typer.Option(help="Compute this share again alone and compare; deterministic.", min=0, max=1)
    ] = 0.0,
    drain_s: Annotated[float, typer.Option(help="How long answers may finish after SIGTERM.", min=0)] = 30.0,
    playground: Annotated[bool, typer.Option(help="Serve the page at /playground.")] = True,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    allow_base_mismatch: MismatchOption = False,
) -> None:
    """Serve a base and every adapter in a store. A request's `model` is an alias, alias@version or a digest."""
    from lorasmith.bases import load_base
    from lorasmith.server import Keys, check_address, check_exposure, read_keys, run
    from lorasmith.store import Store

    _check_engine(engine, workers, max_workers)
    held = None if adapter_memory is None else parse_bytes(adapter_memory)
    known = Keys() if keys is None else read_keys(keys)
    check_exposure(host, known, insecure=insecure)
    check_address(host, port)
    _check_base(base, quantize)
    opened = Store(store, actor="serve")
    _add(opened, base, [*(adapters or []), *(more or [])], quantize, allow_base_mismatch)
    is_exact = deterministic or shadow_share > 0
    options = {
        "max_rows": max_rows, "max_context": max_context, "deterministic": is_exact, "adapter_bytes": held,
    }  # fmt: skip
    limits = {
        "drain_s": drain_s, "shadow_share": shadow_share, "allow_base_mismatch": allow_base_mismatch,
        "playground": playground,
    }  # fmt: skip
    if workers > 1 or engine == "ray":
        where = {"host": host, "port": port, "insecure": insecure}
        most = (max_workers or workers) if engine == "ray" else None
        spec = _spec(base, dtype, quantize, store, options, limits)
        return _serve_fleet(spec, workers, most, keys=known, **where)
    loaded = load_base(base, dtype=dtype, quantize=quantize)
    gateway = _gateway(loaded, opened, known, options, limits)
    say(
        f"base {gateway.config.base_id} ({loaded.dtype_reason}), {len(gateway.adapters.loaded)} adapters loaded"
    )
    run(gateway, host=host, port=port, insecure=insecure, on_start=lambda url: _say_where(url, playground))


def _check_base(base: str, quantize: str | None) -> None:
    """Before a store is made."""
    from lorasmith.bases import base_directory
    from lorasmith.quantised import require_kind

    base_directory(base)
    if quantize is not None:
        require_kind(quantize)


def _check_engine(engine: str, workers: int, max_workers: int | None) -> None:
    """Before anything is loaded.

    Raises:
        ConfigError: there is no such engine, or Ray is not installed.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f'--engine "{engine}" is unknown: {" or ".join(ENGINES)}.{did_you_mean(engine, ENGINES)}'
        )
    if engine == "local" and max_workers is not None:
        raise ConfigError("--max-workers is for --engine ray; local workers are as many as --workers says.")
    if max_workers is not None and max_workers < workers:
        raise ConfigError(f"--max-workers {max_workers} is less than --workers {workers}.")
    if engine == "ray" and find_spec("ray") is None:
        raise ConfigError(
            '--engine ray needs Ray Serve, which is not installed: pip install "lorasmith[ray]"'
        )


def key(as_json: JsonOption = False) -> None:
    """Make an API key: give the key to who asks, put its hash in the keys file."""
    from lorasmith.server import hash_key, new_key

    made = new_key()
    if as_json:
        print_json({"key": made, "hash": hash_key(made)})
    else:
        print(f"key:           {made}\nin keys file:  {hash_key(made)}")


def _say_where(url: str, playground: bool) -> None:
    if playground:
        say(f"playground: {url}/playground")
    say(f"serving on {url}/v1")


def _gateway(base: Base, store: Store, keys: Any, options: dict[str, Any], limits: dict[str, Any]) -> Gateway:
    from lorasmith.engine import Engine
    from lorasmith.server import Gateway, ServerConfig

    reference: Engine | None = None
    if limits["shadow_share"]:
        say("shadow runs need deterministic mode, which is slower, and a second cache")
        reference = Engine(base, **options, prefix_cache_bytes=0)
    config = ServerConfig(Path(base.name).name, **limits)
    gateway = Gateway(base, Engine(base, **options), store, config, keys=keys, reference=reference)
    gateway.adapters.preload(_report)
    return gateway


def _spec(
    base: str, dtype: str, quantize: str | None, store: Path, options: dict[str, Any], limits: dict[str, Any]
) -> WorkerSpec:
    from lorasmith.server import ServerConfig, WorkerSpec

    if limits["playground"]:
        say("several workers serve no playground yet; one does")
    config = ServerConfig(Path(base).name, **limits | {"playground": False})
    return WorkerSpec(base, dtype, str(store), config, options, quantize)


def _serve_fleet(spec: WorkerSpec, workers: int, most: int | None, **where: Any) -> None:
    """On Ray, where `most` says how many workers there may be."""
    from lorasmith.server import run_fleet

    say(f"starting {workers} workers")
    run_fleet(spec, workers, on_ray=most, on_start=lambda url: _say_where(url, False), **where)


def _add(store: Store, base: str, pairs: list[str], quantize: str | None, allow_base_mismatch: bool) -> None:
    if not pairs:
        return
    from lorasmith.bases import base_directory
    from lorasmith.store import base_facts

    facts = base_facts(base_directory(base), base, quantize=quantize, allow_mismatch=allow_base_mismatch)
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (equals and path):
            raise ConfigError(f'--adapters "{pair}": write {PAIR}, such as support=runs/support/adapter')
        version = store.add(name, path, base=facts)
        say(f"{version.model}  {version.digest[:16]}")


def _report(alias: str, error: LoraSmithError | None) -> None:
    if error is not None:
        say(f"{alias} is not served: {error}")
