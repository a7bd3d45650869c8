"""`lorasmith export`: an adapter for other runtimes, and what each of them will make of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.derive import (
    AdapterArgument,
    OutOption,
    derived_from,
    described,
    read_any,
    read_base_config,
)
from lorasmith.cli.extract import conv1d_paths
from lorasmith.cli.options import JsonOption, MismatchOption, print_json, say
from lorasmith.errors import BaseMismatchError, BaseNotFoundError, ConfigError, OutputError, did_you_mean

if TYPE_CHECKING:
    from lorasmith.formats import Verdict
    from lorasmith.lora import Adapter

TARGETS = ("peft", "portable", "mlx", "gguf")


def export(
    adapter: AdapterArgument,
    to: Annotated[str, typer.Option(help="peft, portable, mlx or gguf.")],
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(help="Base to check against; gguf needs its config. Default: the one it names."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="DoRA only: of the plain LoRA that is made of it. Default: twice its own."),
    ] = None,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter for other runtimes, with a verdict for each of them and its reason."""
    if to not in TARGETS:
        raise ConfigError(f"--to {to} is unknown: use {', '.join(TARGETS)}.{did_you_mean(to, TARGETS)}")
    if out.exists():
        raise OutputError(f"{out} exists already. Choose another folder; nothing was written.")
    source = read_any(adapter)
    is_dora = bool(source.extras.magnitudes) and to != "peft"
    if rank is not None and not is_dora:
        raise ConfigError("--rank is for DoRA adapters that another format cannot carry; see `compress`.")
    directory = _base_directory(source, base, is_needed=is_dora or to == "gguf")
    if directory is not None:
        _check_base(source, directory, base or str(directory), allow_base_mismatch=allow_base_mismatch)
    plain, residual = _as_plain(source, directory, rank) if is_dora else (source, None)
    ready = replace(
        plain, provenance=source.provenance | derived_from("export", {str(adapter): source}, {"to": to})
    )
    verdicts, note = _write(ready, to, out, directory)
    launch = _launch(source, out, base or directory, verdicts) if to in ("peft", "portable") else None
    files = sorted(str(file) for file in out.iterdir())
    result = {
        "files": files,
        "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "scaling": note, "dora_residual": residual, "launch": launch, "out": str(out),
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    if residual is not None:
        print(
            f"DoRA as plain LoRA: {residual:.2%} of what it adds to the weights is left out; --rank takes more"
        )
    print(f"{out}: {', '.join(Path(file).name for file in files)}; {note}")
    print(described((name, ("yes  " if v.ok else "no   ") + v.reason) for name, v in verdicts.items()))
    if launch is not None:
        print(f"vLLM serves it as {out.resolve().name}:\n  {launch}")


def _as_plain(adapter: Adapter, directory: Path | None, rank: int | None) -> tuple[Adapter, float]:
    """The closest plain LoRA of the given rank, and the share of DoRA's update that it leaves out."""
    from lorasmith.analysis import dora_to_lora, open_tensors

    assert directory is not None
    tensors = open_tensors(directory)
    transposed = conv1d_paths(directory, tensors)
    made = dora_to_lora(adapter, lambda path: tensors[f"{path}.weight"](), rank=rank, transposed=transposed)
    return made.adapter, made.relative_error


def _write(adapter: Adapter, to: str, out: Path, directory: Path | None) -> tuple[dict[str, Verdict], str]:
    """Write the files; return the verdicts, and what became of the scaling."""
    from lorasmith import formats

    if to == "mlx":
        made = formats.write_mlx(adapter, out)
        return formats.judge_mlx(), f"scale {next(iter(made.factors.values())).scaling:g}"
    if to == "gguf":
        assert directory is not None
        config = read_base_config(directory)
        return formats.judge_gguf(), _folding(formats.write_gguf(adapter, out, config))
    if to == "peft":
        formats.write_adapter(adapter, out)
        return formats.judge_peft(formats.read_header(out)), "scaling as it was"
    folded = formats.make_portable(adapter)
    formats.write_adapter(folded.adapter, out)
    return formats.judge_peft(formats.read_header(out)), _folding(folded)


def _launch(adapter: Adapter, out: Path, base: str | Path | None, verdicts: dict[str, Verdict]) -> str | None:
    """The command for vLLM; None where it would not apply the adapter as trained."""
    from lorasmith.bases import BUILTINS, builtin_directory
    from lorasmith.formats import read_header, vllm_launch

    if not verdicts["vllm"].ok:
        return None
    place = str(base or _named_base(adapter) or "BASE")
    if place in BUILTINS:
        with suppress(BaseNotFoundError, OutputError):  # its name tells as much where it cannot be had now
            place = str(builtin_directory(place))
    elif Path(place).is_dir():
        place = str(Path(place).resolve())
    path = out.resolve()
    return vllm_launch(read_header(out), base=place, name=path.name, path=str(path))


def _named_base(adapter: Adapter) -> str | None:
    named = adapter.provenance.get("base_name") or adapter.provenance.get("base", {}).get("name")
    return named if isinstance(named, str) else None


def _folding(folded: Any) -> str:
    rank = next(iter(folded.adapter.factors.values())).rank
    how = (
        "exactly" if folded.is_exact else f"in float32 (relative rounding {folded.largest_error:.1e} at most)"
    )
    return f"scaling folded into B {how}, rank {rank} everywhere"


def _base_directory(adapter: Adapter, base: str | None, *, is_needed: bool) -> Path | None:
    """Where the base lies: the one given, else, where its config is needed, the one that the adapter names."""
    from lorasmith.bases import base_directory

    if base is not None:
        return base_directory(base)
    if not is_needed:
        return None
    named = _named_base(adapter)
    if named is None:
        raise ConfigError("This needs the base (gguf its config, DoRA its weights): give it with --base.")
    try:
        return base_directory(named)
    except BaseNotFoundError as error:
        raise BaseNotFoundError(f"{error}\n  The adapter names it; give its place with --base.") from error


def _check_base(adapter: Adapter, directory: Path, name: str, *, allow_base_mismatch: bool) -> None:
    from lorasmith.bases import fingerprint_directory, match_base, read_headers

    shapes = {tensor: header.shape for tensor, header in read_headers(directory).items()}
    faults = []
    for path, f in adapter.factors.items():
        if f.layout.kind != "linear":
            continue  # the formats say themselves whether they can carry it
        wanted, found = (f.out_features, f.in_features), shapes.get(f"{path}.weight")
        if found not in (wanted, wanted[::-1]):  # GPT-2 stores its weights (in, out)
            faults.append(f"{path} needs a weight of {wanted}, the base has {found or 'none'}")
    if faults:
        raise BaseMismatchError(f"The adapter does not fit {name}:\n  " + "\n  ".join(faults[:10]))
    matches = match_base(adapter.provenance, fingerprint_directory(directory))
    if matches is None:
        say(f"the adapter carries no lorasmith sidecar: that it was trained on {name} cannot be verified")
    elif matches is False and not allow_base_mismatch:
        raise BaseMismatchError(
            f"The adapter was trained on another base than {name}. Give that one, or pass --allow-base-mismatch."
        )
