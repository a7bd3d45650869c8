"""The quickstart's page: one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --accent: #1f6f5c; }
@media (prefers-color-scheme: dark) { :root { --accent: #5fc9ad; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 58rem; margin: 3rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.4rem }
p.lead { color: var(--soft); margin-top: 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem }
.card b { display: block; font-size: 1.45rem; color: var(--accent) } .card span { color: var(--soft) }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top;
padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line) } td.n { text-align: right }
img { max-width: 100%; background: #fff; border-radius: .6rem } code { font-size: .9em }
"""


def page(
    s: dict[str, Any],
    plan: dict[str, Any],
    samples: Sequence[tuple[str, str, str, str]],
    loss_plot: Path,
    disk: dict[str, int],
) -> str:
    """Numbers, loss curve and sample answers as one HTML text.

    Args:
        samples: (prompt, reference, answer before, answer after).
    """
    image = base64.b64encode(loss_plot.read_bytes()).decode()
    cards = [
        (f"{s['base_bleu']:.1f} → {s['tuned_bleu']:.1f}", "BLEU on held-out descriptions"),
        (f"{s['base_loss']:.3f} → {s['tuned_loss']:.3f}", "loss, nats per answer token"),
        (f"{s['trainable_params'] / s['total_params']:.1%}", f"of {s['total_params']:,} parameters trained"),
        (f"{s['adapter_bytes'] / 1e6:.1f} MB", f"adapter, beside a base of {s['base_bytes'] / 1e6:.0f} MB"),
    ]
    proofs = [
        ("Merged against unmerged logits, fp32, largest difference", f"{s['merged_max_abs_logit_diff']:.2e}"),
        ("Weights that merging changed", str(s["merged_tensors"])),
        ("Base bit-identical after unmerge", "yes" if s["unmerge_bit_identical"] else "NO"),
        ("A hundred tasks on disk: one base and a hundred adapters", f"{disk['adapters'] / 1e9:.2f} GB"),
        ("A hundred tasks on disk: a hundred models", f"{disk['models'] / 1e9:.2f} GB"),
        ("Gradients and optimizer in memory, LoRA", _bytes(plan["lora"])),
        ("Gradients and optimizer in memory, full fine-tuning", _bytes(plan["full"])),
        ("Training", f"{s['train_steps']} steps, {s['train_tokens_per_s']:,.0f} tokens/s"),
    ]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lorasmith quickstart</title><style>{STYLE}</style>
<h1>One frozen base, one small task</h1>
<p class="lead">SmolLM2-135M learned to describe restaurants (E2E NLG) through LoRA, on this machine.</p>
<div class="cards">{"".join(f"<div class=card><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in cards)}</div>
<h2>How it learned</h2><img alt="Training and evaluation loss over the steps" src="data:image/png;base64,{image}">
<h2>Before and after</h2><table><tr><th>asked<th>a person wrote<th>before<th>after</tr>
{"".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) + "</tr>" for row in samples)}</table>
<h2>What was proved</h2><table>
{"".join(f"<tr><td>{escape(a)}<td class=n>{escape(b)}</tr>" for a, b in proofs)}</table>
</html>
"""


def _bytes(memory: dict[str, Any]) -> str:
    return f"{(memory['gradient_bytes'] + memory['optimizer_bytes']) / 1e6:,.0f} MB"
