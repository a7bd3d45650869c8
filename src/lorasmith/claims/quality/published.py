"""Published numbers that stand beside ours, each with what makes it another experiment."""

from __future__ import annotations

from typing import Any

GPT2 = "GPT-2 M (355 M), 42,061 training pairs, official test of 630; paper, Table 3"
GPT3 = "GPT-3 175 B, full WikiSQL, its validation set, with real tables; paper, Table 4"
TGEN = "E2E challenge baseline, 630 test meanings; BLEU recomputed with our metric, the others as recalled"
BERT = "BERT, all 150 intents, 100 examples each; Larson et al. 2019, as quoted by others"


def published(task: str) -> list[dict[str, Any]]:
    """Rows for the report, with the keys of our own."""
    return [row(task, *entry) for entry in _NUMBERS.get(task, ())]


def row(task: str, method: str, params: str, score: str, others: str, said: str) -> dict[str, Any]:
    """One row; columns that are not published stay empty."""
    return {
        "task": task, "method": f"{method} (published)", "trained": params, "rate": "", "score": score,
        "against full": "", "other scores": others, "time": "", "peak memory": "", "note": said,
    }  # fmt: skip


_NUMBERS: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "e2e": (
        ("LoRA", "0.35 M", "BLEU 70.4 ± 0.1", "NIST 8.85, ROUGE-L 71.8, CIDEr 2.53", GPT2),
        ("full fine-tuning", "354.92 M", "BLEU 68.2", "NIST 8.62, ROUGE-L 71.0, CIDEr 2.47", GPT2),
        ("AdapterH", "11.09 M", "BLEU 67.3 ± 0.6", "NIST 8.50, ROUGE-L 70.7, CIDEr 2.44", GPT2),
        ("PreLayer", "0.35 M", "BLEU 69.7", "NIST 8.81, ROUGE-L 71.4, CIDEr 2.49", GPT2),
        ("TGen", "", "BLEU 65.93", "NIST 8.61, ROUGE-L 68.5, CIDEr 2.23", TGEN),
    ),
    "clinc150": (
        ("BERT, out-of-scope class", "", "in-scope accuracy % 96.7", "out-of-scope recall % 59.2", BERT),
    ),
    "wikisql": (
        ("LoRA", "4.7 M", "logical form % 73.4 ± 0.5", "", GPT3),
        ("LoRA", "37.7 M", "logical form % 74.0 ± 0.5", "", GPT3),
        ("full fine-tuning", "175,255.8 M", "logical form % 73.8 ± 0.5", "", GPT3),
        ("BitFit", "14.2 M", "logical form % 71.3 ± 0.5", "", GPT3),
        ("AdapterH", "40.1 M", "logical form % 73.2 ± 0.5", "", GPT3),
    ),
}
