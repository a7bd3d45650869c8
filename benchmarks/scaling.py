"""The tables of docs/scaling.md: predicted memory and time of 7B, 70B and 405B bases on 1 to 1,024 devices.

    python benchmarks/scaling.py

Nothing is measured here. `planning.cluster` has the formulas; what peers published is compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorasmith.planning import (
    Computing,
    Decoder,
    Job,
    Machine,
    Network,
    Pass,
    Spread,
    Trained,
    everywhere,
    known_device,
    llama_like,
    smallest_shard,
    spread,
)

LLAMA_3 = {"vocabulary": 128_256, "kv_heads": 8}
BASES = {
    "7B": llama_like(width=4096, mlp_width=11_008, layers=32, heads=32, kv_heads=32, vocabulary=32_000),
    "8B": llama_like(width=4096, mlp_width=14_336, layers=32, heads=32, **LLAMA_3),
    "70B": llama_like(width=8192, mlp_width=28_672, layers=80, heads=64, **LLAMA_3),
    "405B": llama_like(width=16_384, mlp_width=53_248, layers=126, heads=128, **LLAMA_3),
}
RANK, ROWS, LENGTH = 16, 4, 2048
NF4_BITS = 4.127  # four bits, and a block's scale quantised twice
DEVICES = (1, 8, 64, 1024)
H100 = Network()
A100 = Network(node_bytes_per_s=300e9, net_bytes_per_s=25e9)
AGAIN = Computing(recompute="layers")


def job(base: Decoder, *, rows: int = ROWS, trained: Trained | None = None) -> Job:
    """One step: `rows` full rows on each device, every token with loss, layers computed again."""
    step = [Pass(rows, LENGTH, rows * LENGTH)]
    return Job(base, trained or everywhere(base, RANK), [step], steps=1, computing=AGAIN)


def predictions() -> Iterator[Sequence[object]]:
    """Base, method, devices, devices per copy, GB each, seconds a step, tokens/s, share of the step computing."""
    machine = known_device("H100")
    for name in ("7B", "70B", "405B"):
        base = BASES[name]
        for method, trained, bits in (
            ("LoRA", None, None),
            ("LoRA on NF4", None, NF4_BITS),
            ("full", Trained(None), None),
        ):
            for devices in DEVICES:
                found = smallest_shard(
                    job(base, trained=trained), machine, H100, devices=devices, base_bits=bits
                )
                yield (name, method, devices, *cells(found))


def cells(found: Spread) -> tuple[object, ...]:
    memory = f"{found.memory_bytes / 1e9:,.0f}"
    if not found.fits:
        return found.shard, f"{memory}, too much", "–", "–", "–"
    return found.shard, memory, f"{found.step_s:.2f}", f"{found.tokens_per_s:,.0f}", f"{found.efficiency:.0%}"


@dataclass(frozen=True)
class Published:
    """A row of torchtune's README (commit 0031bfb): two rows of 2,048 tokens on each of 8 A100 of 80 GB.

    Its adapters have rank 16 on all linear layers but k_proj, lie in bfloat16 and in shards too (recipes/configs).
    """

    base: str
    method: str
    bits: float | None
    gigabytes: float
    tokens_per_s: float


PUBLISHED = (
    Published("70B", "LoRA", None, 27.6 * 2**30 / 1e9, 3497),
    Published("405B", "LoRA on NF4", NF4_BITS, 44.8, 653),
)


def checks() -> Iterator[Sequence[object]]:
    """Base, method, GB each: ours and theirs, tokens/s: ours and theirs, share of the peak that theirs is."""
    machine = known_device("A100-80GB")
    for row in PUBLISHED:
        found, memory = published(row, machine)
        yield (
            row.base, row.method,
            f"{memory / 1e9:.1f}", f"{row.gigabytes:.1f}", f"{memory / 1e9 / row.gigabytes:.2f}",
            f"{found.tokens_per_s:,.0f}", f"{row.tokens_per_s:,.0f}", f"{found.tokens_per_s / row.tokens_per_s:.2f}",
        )  # fmt: skip


def published(row: Published, machine: Machine) -> tuple[Spread, int]:
    """Our prediction, and its memory with their adapters' state instead of ours: 8 bytes a number, in shards."""
    base = BASES[row.base]
    ranks = {path: RANK for path in base.linears if not path.endswith("k_proj")}
    theirs = job(base, rows=2, trained=Trained(ranks))
    found = spread(theirs, machine, A100, devices=8, shard=8, base_bits=row.bits)
    numbers = theirs.trained.params(base)
    return found, found.memory_bytes - 16 * numbers + numbers


def strong() -> Iterator[Sequence[object]]:
    """The same 65,536 tokens a step however many devices: what more devices give when the batch may not grow."""
    machine = known_device("H100")
    for devices in (8, 16, 32):
        rows = 32 // devices
        found = smallest_shard(job(BASES["70B"], rows=rows), machine, H100, devices=devices)
        yield (devices, rows, *cells(found))


def table(heads: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


SPREAD = ("devices per copy", "GB each", "s per step", "tokens/s", "of the step computing")
TABLES = {
    "predictions": lambda: table(("base", "method", "H100s", *SPREAD), predictions()),
    "checks": lambda: table(
        ("base", "method", "GB, ours", "GB, published", "ratio", "tokens/s, ours", "published", "ratio"), checks()
    ),
    "strong": lambda: table(("H100s", "rows each", *SPREAD), strong()),
}  # fmt: skip

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"## {name}\n{make()}\n")
