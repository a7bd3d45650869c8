"""`lorasmith inspect`: what an adapter is made of, module by module, and how it differs from another."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.derive import AdapterArgument, check_plot, described, read_any
from lorasmith.cli.options import JsonOption, print_json, say

if TYPE_CHECKING:
    from lorasmith.analysis import Spectrum


def inspect(
    adapter: AdapterArgument,
    against: Annotated[Path | None, typer.Option(help="Another adapter to compare with.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Spectrum, effective rank and size of every module; with --against, how alike two adapters are."""
    from lorasmith.analysis import compare, cosine, relative_error, spectra
    from lorasmith.cli import plots
    from lorasmith.lora import Adapter, compute_dtype

    if plot is not None:
        check_plot(plot)
    first = read_any(adapter)
    # in float32 at least: the shares of a bf16 adapter would come back with three digits
    wide = Adapter(first.config, {p: f.to(dtype=compute_dtype(f.A.dtype)) for p, f in first.factors.items()})
    found = spectra(wide)
    result: dict[str, Any] = {
        "modules": [_row(path, s, first.factors[path].scaling) for path, s in found.items()],
        "params": first.num_params, "bytes": first.num_bytes, "digest": first.digest,
        "base": first.provenance.get("base", {}).get("name"), "made_by": first.provenance.get("made_by"),
    }  # fmt: skip
    if against is not None:
        second = read_any(against)
        compared = compare(first, second)
        result["comparison"] = {
            "cosine": cosine(first, second),
            "relative_difference": _finite(relative_error(first, second).overall),
            "modules": [
                {"path": p} | {key: _finite(v) for key, v in asdict(c).items()} for p, c in compared.items()
            ],
        }
        if plot is not None:
            plots.draw_comparison(first, second, compared, (str(adapter), str(against)), plot)
    elif plot is not None:
        plots.draw_spectra(found, f"{adapter}: {first.num_params:,} parameters", plot)
    result["plot"] = None if plot is None else str(plot)
    if as_json:
        print_json(result)
    else:
        _print(result, found)


def _row(path: str, s: Spectrum, scaling: float) -> dict[str, Any]:
    return {
        "path": path, "rank": s.rank, "numerical_rank": s.numerical_rank, "effective_rank": s.effective_rank,
        "energy": s.energy.tolist(), "singular_values": s.singular_values.tolist(),
        "frobenius_norm": s.frobenius_norm, "scaling": scaling,
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: the difference from nothing has no relative size."""
    return value if value is None or math.isfinite(value) else None


def _print(result: dict[str, Any], found: dict[str, Spectrum]) -> None:
    print(
        f"{'module':<14}{'modules':>8}{'rank':>6}{'used':>6}{'effective':>11}{'‖delta‖':>10}   energy in 1, 2, 4, 8 directions"
    )
    for name, group in _by_name(found).items():
        count = len(group)
        energies = [
            sum(float(s.energy[min(k, len(s.energy)) - 1]) for s in group) / count for k in (1, 2, 4, 8)
        ]
        print(
            f"{name[:14]:<14}{count:>8}{max(s.rank for s in group):>6}{max(s.numerical_rank for s in group):>6}"
            f"{sum(s.effective_rank for s in group) / count:>11.1f}"
            f"{sum(s.frobenius_norm**2 for s in group) ** 0.5:>10.3g}   "
            + " ".join(f"{e:>4.0%}" for e in energies)
        )
    rows = [
        ("size", f"{result['params']:,} parameters, {result['bytes'] / 1e6:.1f} MB"),
        ("digest", result["digest"][:16]),
    ]
    rows.append(("base", result["base"] or "unknown: no lorasmith sidecar"))
    if "comparison" in result:
        rows.append(("against", _sentence(result["comparison"])))
    print(described(rows))
    say("a picture: --plot FILE.png") if result["plot"] is None else say(f"plot: {result['plot']}")


def _sentence(c: dict[str, Any]) -> str:
    if c["cosine"] is None:
        return "one of the two has no effect"
    return f"cosine {c['cosine']:.3f}, relative difference {c['relative_difference']:.1%}"


def _by_name(found: dict[str, Spectrum]) -> dict[str, list[Spectrum]]:
    groups: dict[str, list[Spectrum]] = {}
    for path, s in found.items():
        groups.setdefault(path.rpartition(".")[2], []).append(s)
    return groups
