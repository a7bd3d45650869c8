"""Exchanging a merged adapter: ours beside PEFT and beside a plain copy of the same weights.

    lorasmith bench switch [--quick] [--peers]

The built-in base, two adapters of rank 16 on all linear layers. PEFT's switch is unmerge, set_adapter,
merge. Each round runs every variant once; rows hold medians, in seconds, over the rounds after the first.
Drift is what repeated merging and unmerging leaves of the base: the share of weights that changed.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorasmith.bases import load_base
from lorasmith.formats import write_adapter
from lorasmith.inject import eject, extract, inject, merge, switch, unmerge
from lorasmith.lora import Adapter, Factors, LoRAConfig

BASE, RANK, SEED = "smollm2-135m", 16, 0
DTYPES = ("bf16", "fp32")
ABOUT = {
    "what": "exchanging a merged adapter, seconds",
    "base": BASE,
    "rank": RANK,
    "seed": SEED,
    "dtype": DTYPES,
}

Variants = dict[str, Callable[[], object]]


def make_adapters(model: Any) -> list[Adapter]:
    """Two adapters that differ, with updates of a usual size."""
    inject(model, LoRAConfig(rank=RANK, alpha=2 * RANK), seed=SEED)
    first = extract(model)
    eject(model)
    generator = torch.Generator().manual_seed(SEED)

    def factors() -> dict[str, Factors]:
        return {
            path: Factors(f.A.clone(), torch.randn(f.B.shape, generator=generator) * 0.005, f.scaling)
            for path, f in first.factors.items()
        }

    return [Adapter(first.config, factors()) for _ in range(2)]


def our_variants(model: Any, adapters: list[Adapter]) -> Variants:
    """Every call leaves adapter 0 or 1 merged; a restore is followed by an untimed merge."""
    turn = itertools.cycle((1, 0))
    names = [f"{path}.weight" for path in adapters[0].factors]
    copies = [model.get_parameter(name).detach().clone() for name in names]
    target = [model.get_parameter(name).detach().clone() for name in names]

    def copy() -> None:
        for to, source in zip(target, copies, strict=True):
            to.copy_(source)

    return {
        "copy": copy,
        "switch": lambda: switch(model, adapters[next(turn)]),
        "restore": lambda: unmerge(model),
        "merge": lambda: merge(model, adapters[0]),
    }


def load_peft(model: Any, adapters: list[Adapter]) -> Any:
    import peft

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(len(adapters))]
        for adapter, path in zip(adapters, paths, strict=True):
            write_adapter(adapter, path)
        wrapped = peft.PeftModel.from_pretrained(model, paths[0], adapter_name="a0")
        wrapped.load_adapter(paths[1], adapter_name="a1")
    return wrapped.eval()


def peft_variants(wrapped: Any) -> Variants:
    turn = itertools.cycle(("a1", "a0"))

    def exchange() -> None:
        wrapped.unmerge_adapter()
        wrapped.set_adapter(next(turn))
        wrapped.merge_adapter()

    return {
        "peft-merge": wrapped.merge_adapter,
        "peft-switch": exchange,
        "peft-restore": wrapped.unmerge_adapter,
    }


def changed_share(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    """Share of the elements that differ, and so are not the base's any more."""
    different = sum(int((now[name] != before[name]).sum()) for name in before)
    return different / sum(tensor.numel() for tensor in before.values())


def drift(dtype: str, times: int, peers: bool) -> dict[str, Any]:
    """`times` merges and unmerges, one adapter after the other."""
    ours, theirs = load_base(BASE, dtype=dtype).model, None
    adapters = make_adapters(ours)
    names = [f"{path}.weight" for path in adapters[0].factors]
    before = {name: ours.get_parameter(name).detach().clone() for name in names}
    for i in range(times):
        (switch if i else merge)(ours, adapters[i % 2])
    unmerge(ours)
    mine = changed_share({name: ours.get_parameter(name) for name in names}, before)
    if peers:
        wrapped = load_peft(ours, adapters)
        for i in range(times):
            wrapped.set_adapter(f"a{i % 2}")
            wrapped.merge_adapter()
            wrapped.unmerge_adapter()
        inner = wrapped.get_base_model()
        live = {name: inner.get_submodule(path).base_layer.weight for path, name in zip(adapters[0].factors, names, strict=True)}  # fmt: skip
        theirs = changed_share(live, before)
    return row(f"weights changed by {times} merges and unmerges, share, {dtype} / PEFT", mine, theirs)


def row(what: str, ours: float, peer: float | None) -> dict[str, Any]:
    return {"what": what, "ours": ours, "peer": peer, "ratio": ours / peer if peer else None}


def timings(dtype: str, rounds: int, peers: bool) -> list[dict[str, Any]]:
    from record import interleaved

    model = load_base(BASE, dtype=dtype).model
    adapters = make_adapters(model)
    variants = our_variants(model, adapters)
    if peers:
        variants |= peft_variants(load_peft(load_base(BASE, dtype=dtype).model, adapters))
    merge(model, adapters[0])
    times = interleaved(variants, rounds)
    get = times.get
    return [
        row(f"merged switch, {dtype} / PEFT", times["switch"], get("peft-switch")),
        row(f"merged switch, {dtype} / plain copy of the same weights", times["switch"], times["copy"]),
        row(f"restore, {dtype} / PEFT", times["restore"], get("peft-restore")),
        row(f"restore, {dtype} / plain copy of the same weights", times["restore"], times["copy"]),
        row(
            f"merge, base verified against its file or copied, {dtype} / PEFT",
            times["merge"],
            get("peft-merge"),
        ),
    ]


def run(peers: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    """All rows; without `peers` only those that need no other library have a ratio."""
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in DTYPES:
            rows += timings(dtype, 3 if quick else 9, peers)
            rows.append(drift(dtype, 10 if quick else 100, peers))
    return rows
