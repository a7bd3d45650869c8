"""`sweep`: from a base, data and the points of a grid to as many adapters, ranked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.bases import Base, load_base
from lorasmith.data import read_records
from lorasmith.errors import ConfigError, DataError, TargetError, TrainingError
from lorasmith.inject import Bank
from lorasmith.sweep.apart import rows_stay_apart
from lorasmith.sweep.grid import Point
from lorasmith.sweep.halving import Halving
from lorasmith.sweep.held_out import hold_out
from lorasmith.sweep.member import Member
from lorasmith.sweep.outputs import plot_sweep, ranked
from lorasmith.sweep.passes import joint_passes
from lorasmith.sweep.places import finished, latest_round, prepare, write_plan, write_result
from lorasmith.sweep.result import SweepResult
from lorasmith.sweep.show import Table
from lorasmith.sweep.spread import Rungs, names_of
from lorasmith.train import (
    ALONE,
    Forward,
    Sets,
    Signals,
    World,
    collate,
    computing,
    partners,
    peak_rss_bytes,
    world,
)


def sweep(
    base: Base | str,
    data: Any,
    points: Sequence[Point],
    *,
    out: str | Path,
    eval_data: Any = None,
    halving: Halving | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_round: Callable[[int], None] | None = None,
) -> SweepResult:
    """Train one adapter for each point, all on one base, and rank them by their loss on held-out records.

    Each run has the data order, schedule, clipping, optimizer and files (in `out/NAME`) that `train` would
    give it alone; what they share is the passes through the base, where their rows are of one length: always,
    if they have the same data, batch size and seed. Where a product's rows do not depend on how many there are
    (so on the CPUs that were tried, in bfloat16 and float32), results equal those of `train` to the bit. Under
    `torchrun` the runs are spread over its processes, and each shares the passes of its own.

    Args:
        data: as in `train`; a point that names `data` of its own has that.
        eval_data: held-out records, one set for all. Without it a tenth of the data is held out.
        halving: stop the worse runs early; None trains all to their end.
        resume: go on from the newest round that every run has a checkpoint of.
        on_round: called after each round with its number: every run has then taken that many steps.

    Raises:
        ConfigError, TargetError, DataError: a run that cannot be; nothing was started or written.
        OutputError: `out` holds another run, or cannot be written.
    """
    started = time.monotonic()
    with world() as here, partners():
        loaded = (
            load_base(base, device=here.device if here.size > 1 else "cpu") if isinstance(base, str) else base
        )
        job = Sweep(loaded, data, points, Path(out), eval_data, halving, quiet=quiet, world=here)
        goes_on = resume or here.has_begun(job.folder)
        prepare(job.folder, job.plan, resume=goes_on)
        here.require_same({"sweep": job.plan, "base": loaded.fingerprint.digest})
        if here.is_first:
            write_plan(job.folder, job.plan)
        here.note_begun(job.folder)
        with job.computing():
            return job.go(resume=goes_on, started=started, on_round=on_round)


class Sweep:
    """Runs on one model, round by round: in each, every run that is left takes one optimizer step."""

    def __init__(
        self,
        base: Base,
        data: Any,
        points: Sequence[Point],
        folder: Path,
        eval_data: Any,
        halving: Halving | None,
        *,
        quiet: bool,
        world: World = ALONE,
    ) -> None:
        self.base, self.folder, self.halving, self.quiet = base, folder, halving, quiet or not world.is_first
        self.world, self.points = world, points
        self.model: nn.Module = base.model
        self.forward = Forward(self.model)
        self._sets: dict[Any, Sets] = {}
        self.held_out_lines: list[int] | None = None
        self.totals: dict[str, int] = {}
        self.members = self._members(data, points, eval_data)
        self.total = max(self.totals.values())
        self.rungs, self.comparison = self._rungs(), Rungs(world)
        self.bank = Bank({m.name: m.tenant for m in self.members})
        for member in self.members:
            member.bank = self.bank

    def _members(self, data: Any, points: Sequence[Point], eval_data: Any) -> list[Member]:
        made, faults = [], []
        if not points:
            raise ConfigError("A sweep needs at least one run.")
        own = names_of(points, self.world)
        for point in points:
            try:
                sets = self._read(point.varied.get("data", data), point, eval_data)
                member = Member(point, self.base, sets, self.folder / point.name)
                member.start(self.forward)
                self.totals[point.name] = member.total
                if point.name in own:
                    made.append(member)
            except (ConfigError, TargetError, DataError) as error:
                faults.append((error, f"{point.name}: {error}"))
        if faults:
            said = "\n".join(text for _, text in faults)
            raise type(faults[0][0])(
                f"{len(faults)} of {len(points)} runs cannot be; nothing was started.\n{said}"
            )
        return made

    def _read(self, data: Any, point: Point, eval_data: Any) -> Sets:
        """Encoded data, read once for all runs that use the same."""
        if eval_data is None and "data" in point.varied:
            raise ConfigError(
                "data in the grid needs --eval-data, so that all runs are ranked on the same records."
            )
        key = (point.varied.get("data"), point.train.max_length)
        if key not in self._sets:
            records, held = read_records(data), eval_data
            if held is None:
                records, held = hold_out(records)
                self.held_out_lines = [record.line for record in held]
            self._sets[key] = Sets.read(self.base, records, held, point.train)
        return self._sets[key]

    def _rungs(self) -> list[int]:
        if self.halving is None:
            return []
        totals = sorted(set(self.totals.values()))
        if len(totals) > 1:
            raise ConfigError(
                f"Halving compares runs after equal steps, and these have {totals[0]} to {totals[-1]} steps. "
                "Give them the same --max-steps, or leave --halving out."
            )
        return self.halving.rungs(len(self.points), self.total)

    @property
    def plan(self) -> dict[str, Any]:
        """What must be the same for a sweep to be resumed."""
        return {
            "base": self.base.name,
            "runs": {p.name: {k: v for k, v in p.config.items() if k != "save_every"} for p in self.points},
            "halving": self.halving.keep_one_in if self.halving else None,
            "held_out_lines": self.held_out_lines,
        }

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The model serves the bank inside; the base is as it was outside."""
        modes = {module: module.training for module in self.model.modules()}
        settings = self.members[0].settings
        with ExitStack() as stack:
            self.model.eval()
            stack.callback(_set_modes, modes)
            stack.enter_context(self.bank.attached(self.model))
            self.is_joint = rows_stay_apart(self.forward, self.bank, self.members[0].tenant)
            self.policy = stack.enter_context(
                computing(
                    self.model,
                    kernels="plain" if settings.kernels == "plain" else "block",
                    recompute=settings.recompute,
                    flops=0,
                    warm_up=lambda: None,
                )
            )
            yield

    def go(self, *, resume: bool, started: float, on_round: Callable[[int], None] | None) -> SweepResult:
        """From the first round, or the newest that all have a checkpoint of, to the ranking."""
        outcomes = {m.name: finished(m.folder) for m in self.members} if resume else {}
        self.outcomes = {name: outcome for name, outcome in outcomes.items() if outcome}
        self.alive = [m for m in self.members if m.name not in self.outcomes]
        self.round = latest_round([m.folder for m in self.alive]) if resume and self.alive else 0
        resumed = self.round or None
        for member in self.alive:
            member.open(self.policy, self.round)
        for rung in (r for r in self.rungs if r < self.round):  # for a process that is not so far
            self.comparison.publish(rung, self._losses_at(rung))
        with Table(self, quiet=self.quiet) as table, Signals() as self.signals:
            self._announce(table)
            try:
                self._rounds(table, on_round)
            finally:
                for member in self.alive:
                    member.metrics.close()
        return self._result(started, resumed)

    def _rounds(self, table: Table, on_round: Callable[[int], None] | None) -> None:
        if self.round == 0:
            self._evaluate_base()
        self._end_complete()  # a kill may have come between the checkpoints of a round and what follows them
        self._halve(table)
        while (self.alive or self._is_waited_for()) and not self.signals.received:
            self._step(table)
            self.round += 1
            table.update()
            self._evaluate_and_save(table)
            self._halve(table)
            if on_round is not None:
                on_round(self.round)
        if self.alive:
            self._save()
            table.say(f"stopped after round {self.round}; the checkpoints are saved, go on with --resume")

    def _evaluate_base(self) -> None:
        """The loss before training, once for all runs that are ranked on the same rows: B is zero."""
        known: dict[Any, float] = {}
        for member in self.alive:
            key = (id(member.sets), member.layout)
            if key not in known:
                known[key] = member._evaluate()
            member.metrics.add(step=0, eval_loss=known[key])

    def _is_waited_for(self) -> bool:
        """Whether other processes will ask at a later rung, though all runs of this one have ended."""
        return self.world.size > 1 and any(rung > self.round for rung in self.rungs)

    def _step(self, table: Table) -> None:
        if not self.alive:
            return
        started = time.monotonic()
        units = [unit for member in self.alive for unit in member.units()]
        by_name = {m.name: m for m in self.alive}
        supervised = {name: sum(u.targets for u in units if u.run == name) for name in by_name}
        sums = {name: torch.zeros((), dtype=torch.float64) for name in by_name}
        limit = self.members[0].settings.batch_tokens if self.is_joint else 1
        for joint in joint_passes(units, batch_tokens=limit):
            batch = collate([row for unit in joint for row in unit.rows])
            shares = [(u.targets, by_name[u.run].settings.label_smoothing) for u in joint]
            with self.bank.rows(*((u.run, len(u.rows)) for u in joint)):
                losses = self.forward.loss_sums(batch, shares)
                means: list[Tensor] = [
                    loss / supervised[u.run] for loss, u in zip(losses, joint, strict=True)
                ]
                torch.autograd.backward(means)
            for unit, loss in zip(joint, losses, strict=True):
                sums[unit.run] += loss.detach().double().cpu()
        per_slot = (time.monotonic() - started) / sum(u.slots for u in units)
        for member in list(self.alive):
            seconds = per_slot * sum(u.slots for u in units if u.run == member.name)
            try:
                member.apply(sums[member.name].item() / supervised[member.name], seconds)
            except TrainingError as error:
                self._end(member, "diverged")
                table.say(f"{member.name} diverged and was left out: {error}")

    def _evaluate_and_save(self, table: Table) -> None:
        is_rung = self.round in self.rungs
        due = [m for m in self.alive if is_rung or m.is_due()]
        is_better = [member.judge() for member in due]
        if due:
            table.update()
            table.say_evaluation(due)
        if any(is_better) or is_rung or any(m.must_save() for m in self.alive):
            self._save()
        self._end_complete()

    def _end_complete(self) -> None:
        for member in [m for m in self.alive if m.progress.step == m.total]:
            self._end(member, "done")

    def _halve(self, table: Table) -> None:
        if self.round not in self.rungs:
            return
        losses = self.comparison.everyone(
            self.round, self._losses_at(self.round), lambda: self.signals.received
        )
        if losses is None:
            return
        losses = {p.name: losses[p.name] for p in self.points if p.name in losses}
        kept = self.halving.survivors(losses) if self.halving else set(losses)
        gone = [m for m in self.alive if m.name not in kept]
        for member in gone:
            self._end(member, "stopped")
        if len(kept) < len(losses):
            stops = len(losses) - len(kept)
            table.say(f"round {self.round}: {stops} of {len(losses)} runs stop here, the best go on")

    def _losses_at(self, rung: int) -> dict[str, float]:
        return {m.name: m.loss_at(rung) for m in self.members if self._was_alive_at(m, rung)}

    def _was_alive_at(self, member: Member, step: int) -> bool:
        outcome = self.outcomes.get(member.name)
        if outcome is None:
            return True
        return bool(outcome["steps"] >= step and outcome["status"] != "diverged")

    def _save(self) -> None:
        for member in self.alive:  # all at the same rounds, so that a kill in between leaves the one before
            member._save()

    def _end(self, member: Member, status: str) -> None:
        member.end(status)
        self.outcomes[member.name] = member.outcome()
        self.alive.remove(member)

    def _announce(self, table: Table) -> None:
        first = self.members[0]
        stats = first.sets.train.stats
        evaluation = first.sets.evaluation.stats if first.sets.evaluation else stats
        table.say(
            f"{len(self.points)} runs of up to {self.total} steps on {self.base.name}; {self.base.dtype_reason}"
        )
        table.say(f"data: {stats.examples} examples, {stats.supervised_tokens:,} tokens carry loss; "
                  f"ranked on {evaluation.examples} others"
                  + (" held out of the same file" if self.held_out_lines is not None else ""))  # fmt: skip
        for problem in first.sets.problems[:5]:
            table.say(f"  left out or odd – {problem}")
        table.say(f"packing: {first.layout.packing} ({first.layout.reason})")
        for line in (*self.world.lines, *self.policy.lines):
            table.say(line)
        if self.world.size > 1:
            table.say(
                f"each process trains its own runs, this one {len(self.members)}; what follows is about those"
            )
        if not self.is_joint:
            table.say("passes: one run each, since this model does not keep the rows of a batch apart")
        if self.rungs:
            table.say(
                f"halving: at rounds {', '.join(map(str, self.rungs))} one in {self.plan['halving']} goes on"
            )
        if self.round or len(self.alive) < len(self.members):
            table.say(f"resuming after round {self.round}; {len(self.outcomes)} runs have ended")

    def _result(self, started: float, resumed: int | None) -> SweepResult:
        own = {m.name: self.outcomes.get(m.name) or m.outcome() for m in self.members}
        outcomes = {name: outcome for found in self.world.gather(own) for name, outcome in found.items()}
        interrupted = self.world.any(bool(self.alive))
        runs = ranked([outcomes[point.name] for point in self.points])
        plot = None
        if not interrupted and self.world.is_first:
            varied = {point.name: point.varied for point in self.points}
            plot = plot_sweep(runs, varied, self.folder / "sweep.png")
        best = runs[0]["name"] if runs[0]["eval_loss"] is not None else None
        result = SweepResult(
            runs,
            best,
            plot,
            time.monotonic() - started,
            self.world.most(peak_rss_bytes()),
            resumed,
            interrupted,
            self.world.size,
        )
        if self.world.is_first:
            write_result(self.folder, self.plan, result.to_dict())
        return result


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
