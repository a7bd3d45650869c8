"""The run viewer's page: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lorasmith.cli.report import STYLE
from lorasmith.cli.run_folder import RunFolder

COLOURS = ("#1f6f5c", "#c2410c", "#1f4e9c", "#9333ea", "#b45309", "#0e7490", "#be185d", "#4d7c0f")
WIDTH, HEIGHT, LEFT, BOTTOM = 880, 340, 52, 28
POINTS = 400
OWN_STYLE = """
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.scroll { overflow-x: auto } .dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem }
th.n { text-align: right } td.diff { font-family: ui-monospace, monospace; font-size: .9em } small { color: var(--soft) }
table.samples td { white-space: pre-wrap; width: 25%; font-size: .9em }
"""


def runs_page(found: Sequence[RunFolder], different: dict[str, list[Any]], *, title: str) -> str:
    """Loss curves, results, differing settings and samples as one HTML text."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs: {escape(title)}</title><style>{STYLE}{OWN_STYLE}</style>
<h1>{len(found)} run{"s" if len(found) != 1 else ""}</h1><p class="lead">{escape(title)}</p>
{_curves(found)}
<h2>Results</h2><div class="scroll"><table><tr><th>run<th class=n>steps<th class=n>loss<th class=n>eval loss<th class=n>tokens/s<th class=n>memory</tr>
{"".join(_row(run, i) for i, run in enumerate(found))}</table></div>
{_differences(found, different)}{"".join(_samples(run) for run in found)}
</html>
"""


def _dot(i: int) -> str:
    return f'<span class="dot" style="background:{COLOURS[i % len(COLOURS)]}"></span>'


def _row(run: RunFolder, i: int) -> str:
    cells = (run.progress, *(run.shown[k] for k in ("loss", "eval_loss", "rate", "memory")))
    return (
        f"<tr><td>{_dot(i)}{escape(run.name)}" + "".join(f"<td class=n>{escape(c)}" for c in cells) + "</tr>"
    )


def _curves(found: Sequence[RunFolder]) -> str:
    """Smoothed training loss as lines, evaluation loss as dots."""
    lines = [_thinned(_smooth(run.losses)) for run in found]
    points = [p for line in lines for p in line] + [p for run in found for p in run.eval_losses]
    if not points:
        return "<p>No step was done yet.</p>"
    last = max(step for step, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0

    def place(step: int, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 10) * step / last
        y = 10 + (HEIGHT - BOTTOM - 20) * (1 - (loss - low) / span)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * span
        y = place(0, value).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.0f}" text-anchor="end">{value:.2f}</text>')
        x = place(int(share * last), low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{int(share * last)}</text>')
    for i, (run, line) in enumerate(zip(found, lines, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(place(*p) for p in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"><title>{escape(run.name)}</title></polyline>'
        )
        for step, loss in run.eval_losses:
            x, y = place(step, loss).split(",")
            label = f"{escape(run.name)}, step {step}: evaluation loss {loss:.4f}"
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"><title>{label}</title></circle>')
    legend = " &nbsp; ".join(f"{_dot(i)}{escape(run.name)}" for i, run in enumerate(found))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss over the optimizer steps">{"".join(parts)}</svg>'
        f"<p>{legend}</p><p><small>nats per supervised token over optimizer steps; lines: training, smoothed; dots: evaluation</small></p>"
    )


def _smooth(points: Sequence[tuple[int, float]], keep: float = 0.8) -> list[tuple[int, float]]:
    mean, out = 0.0, []
    for i, (step, loss) in enumerate(points, 1):
        mean = keep * mean + (1 - keep) * loss
        out.append((step, mean / (1 - keep**i)))
    return out


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = max(1, len(points) // POINTS)
    return points[::every] + (points[-1:] if len(points) % every != 1 else [])


def _differences(found: Sequence[RunFolder], different: dict[str, list[Any]]) -> str:
    if not different:
        return "<h2>Settings</h2><p>The same in all.</p>" if len(found) > 1 else ""
    head = "".join(f"<th>{_dot(i)}{escape(run.name)}" for i, run in enumerate(found))
    rows = "".join(
        f"<tr><td class=diff>{escape(key)}"
        + "".join(f"<td class=diff>{escape(str(v))}" for v in values)
        + "</tr>"
        for key, values in different.items()
    )
    return f'<h2>What differs</h2><div class="scroll"><table><tr><th>setting{head}</tr>{rows}</table></div>'


def _samples(run: RunFolder) -> str:
    if not run.samples:
        return ""
    names = list(dict.fromkeys(key for row in run.samples for key in row))
    head = "".join(f"<th>{escape(name)}" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(str(row.get(n, '')).strip())}" for n in names) + "</tr>"
        for row in run.samples[:20]
    )
    return f'<h2>Samples: {escape(run.name)}</h2><div class="scroll"><table class="samples"><tr>{head}</tr>{rows}</table></div>'
