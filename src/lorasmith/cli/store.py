"""`lorasmith store`: the durable registry of adapters that `serve` reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import JsonOption, QuantizeOption, print_json, say

if TYPE_CHECKING:
    from lorasmith.store import Alias, Store, Version

app = typer.Typer(no_args_is_help=True, help="A durable registry of adapters: versions, aliases, rollback.")
StoreOption = Annotated[Path, typer.Option("--store", help="Directory of the registry.")]


def _open(path: Path, *, create: bool = False) -> Store:
    from lorasmith.store import Store

    return Store(path, create=create)


def _show_version(version: Version, canaries: Sequence[str] = ()) -> str:
    pointing = ", ".join([*version.aliases, *canaries])
    return f"{version.model:<28} {version.digest[:16]}" + (f"  ← {pointing}" if pointing else "")


def _canaries(aliases: list[Alias], version: Version) -> list[str]:
    own = [(a.alias, a.canary) for a in aliases if a.name == version.name]
    return [f"{alias} ({c.share:.0%} canary)" for alias, c in own if c and c.version == version.version]


def _show_alias(store: Store, alias: Alias, as_json: bool) -> None:
    if as_json:
        version = next(v for v in store.versions(alias.name) if v.version == alias.version)
        print_json(alias.to_dict() | {"aliases": list(version.aliases)})
    else:
        canary = f", {alias.canary.share:.0%} to version {alias.canary.version}" if alias.canary else ""
        print(f"{alias.alias} → {alias.name}@{alias.version}  {alias.digest[:16]}{canary}")


@app.command()
def add(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory; it is copied in.")],
    store: StoreOption,
    name: Annotated[str, typer.Option(help="What it is called; the next version of that name.")],
    base: Annotated[str | None, typer.Option(help="Check it against this base, as `check` does.")] = None,
    quantize: QuantizeOption = None,
    promote: Annotated[bool, typer.Option(help="Let the name point to it at once.")] = True,
    canary: Annotated[float, typer.Option(help="Give it this share of the name's requests instead.")] = 0.0,
    allow: Annotated[list[str] | None, typer.Option(help="zero-factors or extreme-scaling.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter, copy it in, and make it the next version of a name."""
    from lorasmith.bases import base_directory
    from lorasmith.store import base_facts

    facts = None if base is None else base_facts(base_directory(base), base, quantize=quantize)
    if facts is None:
        say("not compared with a base (give --base): only the adapter itself is checked")
    opened = _open(store, create=True)
    version = opened.add(name, adapter, base=facts, allow=allow or (), promote=promote and not canary)
    if canary:
        opened.set_canary(name, version.version, canary)
    print_json(version.to_dict() | {"checked_against": base}) if as_json else print(_show_version(version))


@app.command("list")
def list_(store: StoreOption, as_json: JsonOption = False) -> None:
    """Every version, with the aliases that point to it."""
    opened = _open(store)
    versions, aliases = opened.versions(), opened.aliases()
    if as_json:
        listed = [v.to_dict() | {"canary_of": _canaries(aliases, v)} for v in versions]
        print_json({"adapters": listed})
    else:
        lines = [_show_version(v, _canaries(aliases, v)) for v in versions]
        print("\n".join(lines) or "no adapters yet")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Alias, alias@version or digest.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """One version: what it is, and whether its files are sound."""
    opened = _open(store)
    found = opened.resolve(model)
    version = next(v for v in opened.versions(found.name) if v.version == found.version)
    adapter = opened.read(version.digest)
    values: dict[str, Any] = version.to_dict() | {
        "rank": adapter.config.rank, "params": adapter.num_params, "bytes": adapter.num_bytes,
        "modules": len(adapter.factors), "path": str(opened.path(version.digest)),
    }  # fmt: skip
    if as_json:
        print_json(values)
        return
    values |= {
        "aliases": ", ".join(version.aliases) or "none",
        "base": version.to_dict()["base"] or "not said",
        "added_at": _clock(version.added_at),
    }
    print("\n".join(f"{key:<10} {value}" for key, value in values.items()))


@app.command()
def alias(
    alias: Annotated[str, typer.Argument(help="A new or present alias.")],
    model: Annotated[str, typer.Argument(help="What it points to: name, name@version or digest.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Point an alias to a version."""
    opened = _open(store)
    _show_alias(opened, opened.set_alias(alias, model), as_json)


@app.command()
def canary(
    alias: Annotated[str, typer.Argument()],
    version: Annotated[int, typer.Argument(help="Gets the share.")],
    share: Annotated[float, typer.Argument(help="From 0 (ends the canary) to 1.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Give a version a share of an alias's requests."""
    opened = _open(store)
    _show_alias(opened, opened.set_canary(alias, version, share), as_json)


@app.command()
def rollback(
    alias: Annotated[str, typer.Argument()],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Point an alias to where it pointed before."""
    opened = _open(store)
    _show_alias(opened, opened.rollback(alias), as_json)


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="name (all versions) or name@version.")],
    store: StoreOption,
    drop_aliases: Annotated[bool, typer.Option("--drop-aliases", help="And what points to it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove versions. Files that a server still uses stay until it lets go."""
    opened = _open(store)
    gone = opened.remove(model, drop_aliases=drop_aliases)
    still = [v.digest for v in gone if opened.path(v.digest).is_dir()]
    if as_json:
        last = gone[-1].to_dict()
        print_json(last | {"removed": [v.to_dict() for v in gone], "files_still_held": still})
    else:
        print("\n".join(f"removed {v.model}  {v.digest[:16]}" for v in gone))
        if still:
            say(f"{len(still)} are still in use elsewhere; `lorasmith store gc` deletes their files later")


@app.command()
def gc(store: StoreOption, as_json: JsonOption = False) -> None:
    """Delete files that no version and no running server needs."""
    freed = _open(store).collect()
    print_json({"freed": freed}) if as_json else print(f"{len(freed)} adapters deleted")


@app.command()
def audit(
    store: StoreOption,
    limit: Annotated[int, typer.Option(help="Newest entries at most.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Who changed what, newest first."""
    entries = _open(store).audit(limit)
    if as_json:
        print_json({"entries": [vars(e) for e in entries]})
        return
    for e in entries:
        what = e.name + (f"@{e.version}" if e.version else "")
        print(f"{e.number:>5}  {_clock(e.at)}  {e.action:<10} {what:<28} {e.detail}  ({e.actor})")


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
