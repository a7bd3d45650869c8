"""`python -m lorasmith.recipes.pixels`: run the experiment, or go on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorasmith.errors import ConfigError, LoraSmithError
from lorasmith.recipes.pixels.settings import Settings

NEEDED = ("stable_baselines3", "gymnasium", "minatar", "ale_py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; 0 when the LoRA arms are above frozen and random, 1 when not, 2 on bad input."""
    options = _parser().parse_args(arguments)
    values = vars(options)
    out, jobs, as_json = (values.pop(name) for name in ("out", "jobs", "json"))
    try:
        _require_extra()
        settings = Settings(**values)
        from lorasmith.recipes.pixels.experiment import run_experiment

        summary = run_experiment(settings, out, jobs=jobs, say=_say)
    except LoraSmithError as error:
        _say(f"{type(error).__name__}: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"stopped; the same command goes on from what is whole in {out}")
        return 130
    print(json.dumps(summary) if as_json else _table(summary, out))
    return 0 if summary["lora_above_frozen"] and summary["lora_above_random"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorasmith.recipes.pixels",
        description="A policy from raw pixels: an autoencoder learns to see, then PPO learns to play with the "
        "encoder frozen, adapted through LoRA at several ranks, fully fine-tuned, or learned from scratch.",
    )
    parser.add_argument("--out", type=Path, default=Path("pixels"), help="folder for everything (pixels)")
    parser.add_argument("--jobs", type=_positive, default=min(2, os.cpu_count() or 1), help="processes (2)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    for field in fields(Settings):
        shown: Any = field.default
        several = isinstance(shown, tuple)
        kind = int if several else type(shown)
        default = " ".join(map(str, shown)) if several else str(shown)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=kind, nargs="+" if several else None, default=shown, help=f"({default})"
        )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f'this recipe also needs {", ".join(missing)}: pip install "lorasmith[rl]"')


def _table(summary: dict[str, Any], out: Path) -> str:
    lines = [f"{'encoder':<18}{'trained':>9}{'return':>9}{'  each seed':<24}{'above frozen':>14}"]
    for row in summary["arms"]:
        each = " ".join(f"{x:.2f}" for x in row["last_returns"])
        above = row["above_frozen"]
        error = above["standard_error"]
        shown = f"{above['difference']:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        lines.append(
            f"{row['label']:<18}{row['encoder_params_trained']:>9,}{row['mean']:>9.2f}  {each:<22}{shown:>14}"
        )
    lines.append(f"{'random play':<18}{'':>9}{summary['random']['mean']:>9.2f}")
    for other in ("frozen", "random"):
        verdict = "yes" if summary[f"lora_above_{other}"] else "not shown"
        lines.append(
            f"every LoRA arm above {other}, by over two standard errors and in every seed: {verdict}"
        )
    return "\n".join([*lines, f"numbers, figure, reconstructions and film: {out}"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
