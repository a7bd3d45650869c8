"""Stacked factors of the adapters that are active now, and the products of a mixed batch.

Modules that share one input form a group; a slot holds one adapter's factors of every group, padded
with zeros to the largest rank among the resident ones (zeros change no sum). The slots that a batch
needs are kept in front, so that every product reads a prefix of the stacks and gathers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine import native
from lorasmith.engine.registry import Generation
from lorasmith.lora import Adapter, Factors, compute_dtype

MAX_ROUTINGS = 64
MANY_TOKENS = 8
BASE = Generation("", None, None, 0)  # the owner of the slot of zeros, for rows without an adapter


@dataclass(frozen=True)
class GroupSpec:
    """Modules with one input: their paths, that input's width and each output's width."""

    paths: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    def parts(self, y: Tensor) -> Sequence[Tensor]:
        """Views of each member's columns."""
        return torch.split_with_sizes(y, self.out_features, dim=-1)


class FactorStack:
    """A (slots, members · rank, in) and B of each member (slots, rank, out), scaling folded into B.

    Kept in the base's dtype where the C function computes decode steps, which reads it at memory speed, and
    on accelerators; elsewhere in float32, in which torch's small products on a CPU are faster than in bfloat16.
    """

    def __init__(self, spec: GroupSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.rank = 0
        self.is_native = native.is_available(dtype, device)
        dtype = dtype if self.is_native or device.type != "cpu" else compute_dtype(dtype)
        self.A = torch.zeros(0, 0, spec.in_features, dtype=dtype, device=device)
        self.B = [torch.zeros(0, 0, n, dtype=dtype, device=device) for n in spec.out_features]
        self.ranks = torch.zeros(0, len(spec.paths), dtype=torch.int32)
        self._native: native.NativeGroup | None = None

    @property
    def native(self) -> native.NativeGroup:
        """The stacks as the C function takes them."""
        if self._native is None:
            self._native = native.NativeGroup(self.A, self.B, self.rank, self.ranks)
        return self._native

    def fit(self, slots: int, rank: int) -> None:
        """Grow to `slots` and `rank`; what is there stays."""
        if rank <= self.rank and slots <= self.A.shape[0]:
            return
        members, old_slots, old_rank = len(self.spec.paths), self.A.shape[0], self.rank
        slots, self.rank = max(slots, old_slots), max(rank, old_rank)
        A = self.A.new_zeros(slots, members, self.rank, self.spec.in_features)
        A[:old_slots, :, :old_rank] = self.A.view(old_slots, members, old_rank, self.spec.in_features)
        self.A = A.view(slots, members * self.rank, self.spec.in_features)
        for i, old in enumerate(self.B):
            grown = old.new_zeros(slots, self.rank, old.shape[2])
            grown[:old_slots, :old_rank] = old
            self.B[i] = grown
        self.ranks = torch.cat((self.ranks, self.ranks.new_zeros(slots - old_slots, members)))
        self._native = None

    def write(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Replace what `slot` holds."""
        self.ranks[slot] = torch.tensor([0 if f is None else f.rank for f in factors])
        if self.rank == 0:
            return
        A = self.A[slot].view(len(factors), self.rank, -1)
        for i, f in enumerate(factors):
            rank = 0 if f is None else f.rank
            A[i, rank:].zero_()
            self.B[i][slot, rank:].zero_()
            if f is not None:
                A[i, :rank].copy_(f.A)
                self.B[i][slot, :rank].copy_(f.B.T.to(compute_dtype(self.A.dtype)) * f.scaling)


@dataclass(frozen=True)
class Routing:
    """Which row uses which slot, in the shape that a batched product wants.

    Attributes:
        slots: of each row; -1 for the plain base in deterministic mode.
        first: slots first … first + count - 1 are read.
        gather: (count · width) row numbers, each slot's rows padded with row 0; None if rows lie so.
        scatter: (rows) where each row's result is found after the product; None with `gather`.
        width: rows per slot, padding included.
        active: for each group, whether any slot that is read adapts it.
        index: `slots` as int32, for the C function.
        exact: row by row, for deterministic mode.
    """

    slots: tuple[int, ...]
    first: int
    count: int
    width: int
    gather: Tensor | None
    scatter: Tensor | None
    active: tuple[bool, ...]
    index: Tensor
    exact: bool = False


class Slots:
    """The active adapters. Only the loop thread calls it, between steps."""

    def __init__(self, groups: Sequence[GroupSpec], dtype: torch.dtype, device: torch.device) -> None:
        self.groups = tuple(groups)
        self._dtype, self._device = dtype, device
        self.stacks = [FactorStack(g, dtype, device) for g in groups]
        self._group_of = {p: (g, i) for g, spec in enumerate(groups) for i, p in enumerate(spec.paths)}
        self._held: list[Generation | None] = []
        self._ranks: list[list[tuple[int, ...]]] = []
        self._empty: list[tuple[int, ...]] = [(0,) * len(g.paths) for g in groups]
        self._routings: dict[tuple[object, ...], Routing] = {}
        self.writes = 0
        self.writes_by_digest: dict[str, int] = {}

    def renewed(self) -> Slots:
        """Empty slots for the same groups."""
        return Slots(self.groups, self._dtype, self._device)

    def why_not(self, adapter: Adapter) -> str | None:
        """What of `adapter` the stacks cannot hold; None if they hold all of it."""
        held = {f"{path}.{part}" for path in adapter.factors if path in self._group_of for part in "AB"}
        rest = sorted(adapter.tensors().keys() - held)
        if not rest:
            return None
        return (
            f"it holds {len(rest)} tensors that are not factors of the layers which share a batch: {rest[0]}"
            + (", …" if len(rest) > 1 else "")
        )

    @property
    def num_bytes(self) -> int:
        """Of the stacks."""
        return sum(t.numel() * t.element_size() for s in self.stacks for t in (s.A, *s.B))

    def ranks(self, slot: int, group: int) -> tuple[int, ...]:
        """Rank of each member of `group` in `slot`; 0 where the adapter leaves it alone."""
        return self._ranks[slot][group]

    def hold(self, owners: Sequence[Generation | None]) -> None:
        """Bring the adapters of all running rows into the front slots; the others may be overwritten."""
        needed = list(dict.fromkeys(_owner(o) for o in owners)) if any(owners) else []
        places = {owner: slot for slot, owner in reversed(list(enumerate(self._held)))}
        if all(places.get(owner, self.limit(len(needed))) < self.limit(len(needed)) for owner in needed):
            return
        staying = {o: places[o] for o in needed if places.get(o, len(needed)) < len(needed)}
        free = [slot for slot in range(len(needed)) if slot not in staying.values()]
        for owner in needed:
            if owner not in staying:
                self._place(owner, free.pop(0))

    @staticmethod
    def limit(count: int) -> int:
        """Slots that may be read for `count` adapters before they are moved closer together."""
        return count if count == 1 else 2 * count

    def route(self, owners: Sequence[Generation | None], *, exact: bool = False) -> Routing | None:
        """The products that these rows need; None if no row has an adapter. `hold` came first."""
        if not any(owners):
            return None
        key = (exact, *map(id, owners))
        if key not in self._routings:
            if len(self._routings) >= MAX_ROUTINGS:
                self._routings.clear()
            self._routings[key] = self._route(owners, exact)
        return self._routings[key]

    def _route(self, owners: Sequence[Generation | None], exact: bool) -> Routing:
        at = {owner: slot for slot, owner in reversed(list(enumerate(self._held)))}
        slots = tuple(-1 if exact and owner is None else at[_owner(owner)] for owner in owners)
        used = {slot for slot in slots if slot >= 0}
        active = tuple(any(any(self._ranks[s][g]) for s in used) for g in range(len(self.groups)))
        if exact:
            return Routing(slots, 0, 0, 0, None, None, active, _index(slots), True)
        return _arranged(slots, active, self.stacks[0].A.device)

    def drop(self, generation: Generation) -> None:
        """Forget an adapter that nobody will ask for again."""
        self._held = [None if held is generation else held for held in self._held]
        self._routings.clear()

    def _place(self, owner: Generation, slot: int) -> None:
        """Write `owner` into `slot`; a copy of it that lies further back stays there, unused."""
        while len(self._held) <= slot:
            self._held.append(None)
            self._ranks.append(self._empty)
        assert owner is BASE or owner.adapter is not None
        self._routings.clear()
        self._held[slot] = None  # if the write fails, the slot holds nothing
        by_group = self._factors_by_group(owner.adapter)
        self._ranks[slot] = [tuple(0 if f is None else f.rank for f in fs) for fs in by_group]
        rows = max(slot + 1, len(self._held))
        for stack, factors in zip(self.stacks, by_group, strict=True):
            rank = max((f.rank for f in factors if f is not None), default=0)
            if rank > stack.rank or rows > stack.A.shape[0]:
                stack.fit(_rounded_up(rows), rank)
            stack.write(slot, factors)
        self._held[slot] = owner
        self.writes += 1
        self.writes_by_digest[owner.digest] = self.writes_by_digest.get(owner.digest, 0) + 1

    def _factors_by_group(self, adapter: Adapter | None) -> list[list[Factors | None]]:
        found: list[list[Factors | None]] = [[None] * len(g.paths) for g in self.groups]
        for path, factors in (adapter.factors if adapter is not None else {}).items():
            group, member = self._group_of[path]
            found[group][member] = factors
        return found


def _owner(generation: Generation | None) -> Generation:
    return BASE if generation is None else generation


def _index(slots: tuple[int, ...]) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32)


def _rounded_up(slots: int) -> int:
    return 1 << (slots - 1).bit_length()


def _arranged(slots: tuple[int, ...], active: tuple[bool, ...], device: torch.device) -> Routing:
    first = min(slots)
    members: list[list[int]] = [[] for _ in range(max(slots) - first + 1)]
    for row, slot in enumerate(slots):
        members[slot - first].append(row)
    count, width = len(members), max(map(len, members))
    order = [row for rows in members for row in (rows + [0] * (width - len(rows)))]
    if order == list(range(len(slots))):
        return Routing(slots, first, count, width, None, None, active, _index(slots))
    place = {row: s * width + i for s, rows in enumerate(members) for i, row in enumerate(rows)}
    scatter = torch.tensor([place[row] for row in range(len(slots))], device=device)
    gather = torch.tensor(order, device=device)
    return Routing(slots, first, count, width, gather, scatter, active, _index(slots))


def add_lora(y: Tensor, x: Tensor, slots: Slots, group: int, routing: Routing) -> None:
    """Add each row's low-rank product to the outputs of one group, in place.

    Semantics, for row b with slot s and member i, whose part of y starts at column c_i:
        y[b, c_i : c_i + out_i] += (x[b] @ A[s, i].T) @ B_i[s]

    Args:
        y: the members' outputs side by side, (rows · tokens, Σ out).
        x: (rows · tokens, in).
    """
    stack, tokens = slots.stacks[group], x.shape[0] // len(routing.slots)
    if stack.is_native and tokens < MANY_TOKENS:
        index = routing.index if tokens == 1 else routing.index.repeat_interleave(tokens)
        stack.native.add(y, x, index)
    elif routing.exact:
        _add_row_by_row(y, x, slots, group, routing, tokens)
    else:
        _add_batched(y, x, stack, routing, tokens)


def _add_batched(y: Tensor, x: Tensor, stack: FactorStack, routing: Routing, tokens: int) -> None:
    rows = len(routing.slots)
    read = slice(routing.first, routing.first + routing.count)
    # Long inputs are bound by arithmetic, which is fast in the base's dtype.
    dtype = x.dtype if tokens >= MANY_TOKENS else stack.A.dtype
    wide = x.to(dtype).view(rows, tokens, -1)
    if routing.gather is not None:
        wide = wide.index_select(0, routing.gather)
    wide = wide.reshape(routing.count, routing.width * tokens, -1)
    u = torch.bmm(wide, stack.A[read].to(dtype).transpose(1, 2))
    for part, ui, B in zip(stack.spec.parts(y), torch.split(u, stack.rank, dim=-1), stack.B, strict=True):
        _add_product(part, ui, B[read].to(dtype), routing, tokens)


def _add_product(y: Tensor, u: Tensor, B: Tensor, routing: Routing, tokens: int) -> None:
    """y is one member's columns of a wider tensor, so that its rows lie apart."""
    if routing.scatter is None and y.dtype == u.dtype:
        by_slot = y.view(routing.count, routing.width * tokens, -1)
        by_slot.baddbmm_(u, B)  # in place and rounded once; a third faster than a product that is added
        return
    part = torch.bmm(u, B).view(routing.count * routing.width, tokens, -1)
    if routing.scatter is not None:
        part = part.index_select(0, routing.scatter)
    y.view(-1, tokens, y.shape[-1]).add_(part)


def _add_row_by_row(y: Tensor, x: Tensor, slots: Slots, group: int, routing: Routing, tokens: int) -> None:
    """With each adapter's own rank, so that no bit depends on the neighbours."""
    stack = slots.stacks[group]
    for row, slot in enumerate(routing.slots):
        ranks = slots.ranks(slot, group) if slot >= 0 else ()
        if not any(ranks):
            continue
        own = slice(row * tokens, (row + 1) * tokens)
        wide = x[own].to(stack.A.dtype, copy=True)
        for i, (part, rank) in enumerate(zip(stack.spec.parts(y), ranks, strict=True)):
            if rank:
                A = stack.A[slot, i * stack.rank : i * stack.rank + rank].clone()
                part[own] += (wide @ A.T) @ stack.B[i][slot, :rank].clone()
