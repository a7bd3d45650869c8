"""The data doctor's page: one self-contained HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lorasmith.cli.report import STYLE

if TYPE_CHECKING:
    from lorasmith.data import Problem, Report, View

SHOWN_PER_KIND = 20
SHOWN_TOKENS = 700
BARS = 30
OWN_STYLE = """
.tokens { font: 13.5px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; max-height: 22rem; overflow-y: auto }
.tokens i { font-style: normal; color: var(--soft); box-shadow: inset -1px 0 var(--line) }
.tokens b { font-weight: 500; background: color-mix(in srgb, var(--accent) 22%, transparent);
box-shadow: inset -1px 0 var(--line) }
.key b { background: color-mix(in srgb, var(--accent) 22%, transparent); font-weight: 500; padding: 0 .4em }
.bar { height: .7rem; border-radius: .35rem; background: var(--line); overflow: hidden }
.bar div { height: 100%; background: var(--accent) }
.cards { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }
details td.n { width: 5rem; white-space: nowrap; text-align: left; color: var(--soft) }
details tr:last-child td { border-bottom: 0 }
details { border-bottom: 1px solid var(--line); padding: .45rem 0 } summary { cursor: pointer }
summary b { color: #b3432b } .dropped { color: #b3432b } svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) } small { color: var(--soft) }
"""


def data_page(report: Report, *, source: str, base: str, max_length: int) -> str:
    """Numbers, lengths, problems and token views as one HTML text."""
    s, share = report.stats, report.supervised_tokens / max(1, report.stats.tokens)
    cards = [
        (f"{report.records:,}", "records that can be used"),
        (f"{s.tokens:,}", "tokens"),
        (f"{share:.1%}", f"carry loss: {report.supervised_tokens:,} tokens"),
        (f"{s.truncated_examples:,}", f"prompts cut to {max_length} tokens"),
        (f"{len(report.problems):,}", "problems"),
    ]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data check: {escape(source)}</title><style>{STYLE}{OWN_STYLE}</style>
<h1>What will really be trained on</h1><p class="lead">{escape(source)}, as {escape(base)} reads it</p>
<div class="cards">{"".join(f"<div class=card><b>{a}</b><span>{escape(b)}</span></div>" for a, b in cards)}</div>
<h2>Share that carries loss</h2><div class="bar"><div style="width:{share:.2%}"></div></div>
<h2>Lengths</h2>{_histogram(report.lengths)}
<p><small>longest {s.longest}, mean {s.mean_length:.0f}, of which {s.mean_supervised:.0f} carry loss</small></p>
{_labels(report)}
<h2>Problems</h2>{_problems(report.problems)}
<h2>Token by token</h2><p class="key"><b>carries loss</b> &nbsp; context only &nbsp;
<small>a thin line ends each token</small></p>{"".join(_view(view) for view in report.views)}
</html>
"""


def _histogram(lengths: Sequence[tuple[int, int]]) -> str:
    """Examples by length; the darker part of a bar is the share of its tokens that carry loss."""
    longest = max(tokens for tokens, _ in lengths)
    width = max(1, -(-longest // BARS))
    counts, supervised, tokens = Counter[int](), Counter[int](), Counter[int]()
    for length, loss in lengths:
        counts[k := (length - 1) // width] += 1
        supervised[k] += loss
        tokens[k] += length
    bars, top, bar = [], max(counts.values()), 800 / BARS
    for k in range(BARS):
        high = 120 * counts[k] / top
        dark = high * supervised[k] / max(1, tokens[k])
        title = f"{k * width + 1} to {(k + 1) * width} tokens: {counts[k]} examples"
        bars.append(
            f'<g><title>{title}</title><rect x="{k * bar:.1f}" y="{130 - high:.1f}" width="{bar - 2:.1f}" '
            f'height="{high:.1f}" fill="var(--line)"/><rect x="{k * bar:.1f}" y="{130 - dark:.1f}" '
            f'width="{bar - 2:.1f}" height="{dark:.1f}" fill="var(--accent)"/></g>'
        )
    marks = "".join(
        f'<text x="{share * 790:.0f}" y="146" text-anchor="{"start" if not share else "end" if share == 1 else "middle"}">'
        f"{share * BARS * width:.0f}</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    label = "Number of examples by length in tokens"
    return f'<svg viewBox="0 0 800 150" role="img" aria-label="{label}">{"".join(bars)}{marks}</svg>'


def _labels(report: Report) -> str:
    if report.labels is None:
        return ""
    top = max(report.labels.values())
    shown = list(report.labels.items())[:12]
    rows = "".join(
        f'<tr><td>{escape(name)}<td style="width:60%"><div class="bar"><div style="width:{count / top:.1%}"></div></div>'
        f"<td class=n>{count:,}</tr>"
        for name, count in shown
    )
    more = (
        f"<p><small>and {len(report.labels) - len(shown)} more</small></p>"
        if len(report.labels) > len(shown)
        else ""
    )
    return f"<h2>Answers</h2><p><small>{len(report.labels)} different ones: this looks like classification</small></p><table>{rows}</table>{more}"


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return "<p>None found.</p>"
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    return "".join(
        f"<details{' open' if len(kinds) < 4 else ''}><summary><b>{len(found):,}</b> {escape(kind)}</summary><table>"
        + "".join(
            f"<tr><td class=n>line {p.line}<td>{escape(p.message)}{' <span class=dropped>left out</span>' if p.is_dropped else ''}</tr>"
            for p in found[:SHOWN_PER_KIND]
        )
        + (
            f"<tr><td><td>and {len(found) - SHOWN_PER_KIND:,} more</tr>"
            if len(found) > SHOWN_PER_KIND
            else ""
        )
        + "</table></details>"
        for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1]))
    )


def _view(view: View) -> str:
    pieces = "".join(
        f"<{'b' if loss else 'i'}>{escape(text).replace(chr(10), '↵' + chr(10))}</{'b' if loss else 'i'}>"
        for text, loss in view.pieces[:SHOWN_TOKENS]
    )
    more = (
        f"<p><small>and {len(view.pieces) - SHOWN_TOKENS} more tokens</small></p>"
        if len(view.pieces) > SHOWN_TOKENS
        else ""
    )
    return f"<p><small>{escape(view.why)}: line {view.line}, {len(view.pieces)} tokens</small></p><div class=tokens>{pieces}</div>{more}"
