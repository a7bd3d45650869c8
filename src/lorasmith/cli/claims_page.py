"""The claims' page: one self-contained HTML file, a verdict, a plot and the numbers for each."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lorasmith.cli.report import STYLE

VERDICTS = {  # verdict → (mark, class)
    "holds": ("✓", "yes"),
    "does not hold": ("✗", "no"),
    "not at this scale": ("≈", "scale"),
    "error": ("!", "error"),
}
OWN_STYLE = """
:root { --yes: #1f6f5c; --no: #b3432b; --scale: #5b6b8c; --error: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --yes: #5fc9ad; --no: #f0937c; --scale: #a9b8d8; --error: #e6b450 }
img.plot { filter: invert(.92) hue-rotate(180deg) } }
.yes { --hue: var(--yes) } .no { --hue: var(--no) } .scale { --hue: var(--scale) } .error { --hue: var(--error) }
.badge { color: var(--hue); border: 1px solid var(--hue); border-radius: 1rem; padding: .1rem .7rem; font-size: .82rem;
font-weight: 600; white-space: nowrap }
.card b { color: var(--hue) } td .badge { border: 0; padding: 0 }
.summary a { color: inherit; text-decoration: none } .summary a:hover { text-decoration: underline }
.summary td.short { color: var(--soft); font-size: .9em } .summary { margin-top: 1.4rem }
section { border-top: 1px solid var(--line); margin-top: 2.8rem; padding-top: .4rem }
section header { display: flex; gap: .8rem; align-items: baseline; flex-wrap: wrap; margin-top: 1rem }
section h2 { margin: 0 } blockquote { margin: .6rem 0 1rem; padding-left: 1rem; border-left: 3px solid var(--line) }
blockquote cite { display: block; color: var(--soft); font-style: normal; font-size: .9em }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .4rem 2rem; margin-bottom: 1rem }
.pair h3, details h3 { font-size: .82rem; margin: .4rem 0 .1rem; color: var(--soft); font-weight: 600 } .pair p { margin: 0 }
img.plot { width: 100%; height: auto; display: block; margin: 1rem 0 }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) } .scroll { overflow-x: auto }
details table { font-size: .85em; font-variant-numeric: tabular-nums } th.n, td.n { text-align: right }
details td, details th { padding: .3rem .9rem .3rem 0 } pre { overflow-x: auto; font-size: .8em }
footer { margin-top: 3rem; color: var(--soft); font-size: .9em }
"""


def write_page(out: Path, document: Mapping[str, Any]) -> None:
    """Write `report.html` beside the plots that it embeds, whole or not at all."""
    from lorasmith.train import write_atomically

    write_atomically(out / "report.html", claims_page(document, out))


def claims_page(document: Mapping[str, Any], folder: Path) -> str:
    """Verdicts first, then each claim.

    Args:
        folder: where the plots that `document` names lie.
    """
    entries = document["claims"]
    counts = Counter(_verdict(entry) for entry in entries)
    cards = "".join(
        f'<div class="card {css}"><b>{mark} {counts[name]}</b><span>{escape(name)}</span></div>'
        for name, (mark, css) in VERDICTS.items()
        if counts[name] or name != "error"
    )
    size = "quick" if document["quick"] else "full"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>LoRA's claims, measured again</title><style>{STYLE}{OWN_STYLE}</style>
<h1>LoRA's claims, measured again</h1>
<p class="lead">What Hu et al. (2021) say of LoRA, on {escape(str(document["base"]))}, {size} designs, on this machine</p>
<div class="cards">{cards}</div>
<div class="scroll"><table class="summary">{"".join(map(_line, entries))}</table></div>
{"".join(_section(entry, folder) for entry in entries)}
<footer><p>{escape(document["device"])} · {escape(versions)} · commit {escape(str(document["commit"]))}</p></footer>
</html>
"""


def _verdict(entry: Mapping[str, Any]) -> str:
    return "error" if entry["error"] else str(entry["holds"])


def _badge(entry: Mapping[str, Any]) -> str:
    name = _verdict(entry)
    mark, css = VERDICTS[name]
    return f'<span class="badge {css}">{mark} {escape(name)}</span>'


def _line(entry: Mapping[str, Any]) -> str:
    link = f'<a href="#{escape(entry["id"])}">{escape(entry["title"])}</a>'
    return f'<tr><td>{link}<td class="short">{escape(entry["source"])}<td>{_badge(entry)}</tr>'


def _section(entry: Mapping[str, Any], folder: Path) -> str:
    measured = entry["measured"] or "It was not measured: see the error below."
    return f"""<section id="{escape(entry["id"])}"><header><h2>{escape(entry["title"])}</h2>{_badge(entry)}</header>
<blockquote>{escape(entry["claim"])}<cite>{escape(entry["source"])}</cite></blockquote>
<div class="pair"><div><h3>Expected</h3><p>{escape(entry["expected"])}</p></div>
<div><h3>Measured</h3><p>{escape(measured)}</p></div></div>
{_plot(entry, folder)}{_error(entry)}
<details><summary>How it is measured, and every number</summary><h3>Design</h3><p>{escape(entry["design"])}</p>
{_figures(entry["figures"])}{_table(entry["rows"])}
<p><small>took {entry["measured_s"]:g} s, less what was in the cache; {escape(entry["measured_at"])}</small></p></details></section>
"""


def _plot(entry: Mapping[str, Any], folder: Path) -> str:
    if not entry["plot"] or not (folder / entry["plot"]).is_file():
        return ""
    image = base64.b64encode((folder / entry["plot"]).read_bytes()).decode()
    alt = f"Plot: {entry['title']}. {entry['measured']}"
    return f'<img class="plot" alt="{escape(alt)}" src="data:image/png;base64,{image}">'


def _error(entry: Mapping[str, Any]) -> str:
    if not entry["error"]:
        return ""
    return f'<p class="error"><b>{escape(entry["error"])}</b></p><details><summary>Traceback</summary><pre>{escape(entry["traceback"] or "")}</pre></details>'


def _figures(figures: Mapping[str, Any]) -> str:
    plain = [{"figure": name, "value": value} for name, value in figures.items() if _is_plain(value)]
    return f"<h3>Figures</h3>{_table(plain)}" if plain else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if _is_shown(name, rows)]
    numeric = {name for name in names if all(isinstance(row.get(name, 0), int | float) for row in rows)}
    kind = {name: " class=n" if name in numeric else "" for name in names}
    head = "".join(f"<th{kind[name]}>{escape(name)}" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[n]}>{escape(_text(row.get(n)))}" for n in names) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _is_shown(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column holds what fits a cell; raw series stay in claims.json."""
    return all(_is_plain(row.get(name)) for row in rows)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict) or len(str(value)) <= 40


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
