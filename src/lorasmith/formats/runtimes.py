"""What each runtime would make of an adapter's files, by the rule that it applies.

The rules were read from the runtimes' sources in 2026-11: PEFT 0.21.2 (`LoraLayer.update_layer`), vLLM
(`lora/peft_helper.py`), SGLang (`lora/lora_config.py`, `lora/lora.py`), llama.cpp (`convert_lora_to_gguf.py`,
`llama-adapter.h`), MLX-LM (`tuner/utils.py`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorasmith.formats.header import AdapterHeader

RUNTIMES = ("peft", "vllm", "sglang", "llama.cpp", "mlx")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
_VLLM_DEFAULT_RANK = 16
_CONV1D = {"c_attn", "c_fc", "c_proj"}  # GPT-2's layers, stored (in, out)
_OTHER_FORMAT = "reads PEFT directories, not this format: export with --to portable"
_MLX_ONLY = "MLX-LM reads its own format only: export with --to mlx"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a runtime applies the adapter as it was trained, and why or why not."""

    ok: bool
    reason: str


def judge_peft(header: AdapterHeader) -> dict[str, Verdict]:
    """Verdict by runtime on a PEFT directory."""
    reads_all = Verdict(True, "reads every field that is written here")
    if beyond := header.beyond_linear:
        reason = f"applies factors of linear layers only, as far as is known here; this holds {beyond}"
        others = {name: Verdict(False, reason) for name in ("vllm", "sglang", "llama.cpp")}
        return {"peft": reads_all} | others | {"mlx": Verdict(False, _MLX_ONLY)}
    return {
        "peft": reads_all,
        "vllm": _vllm(header),
        "sglang": _sglang(header),
        "llama.cpp": _llama_cpp(header),
        "mlx": Verdict(False, _MLX_ONLY),
    }


def vllm_launch(header: AdapterHeader, *, base: str, name: str, path: str) -> str:
    """The command that lets vLLM serve a PEFT directory that its verdict accepts, for a shell.

    Args:
        base: a hub id or a directory. name: what requests will give as `model`.
    """
    rank = _vllm_rank(max(m.rank for m in header.modules.values()))
    options = {"--max-loras": "1", "--max-lora-rank": f"{rank}", "--lora-modules": f"{name}={path}"}
    words = ["vllm", "serve", base, "--enable-lora", *(word for pair in options.items() for word in pair)]
    return shlex.join(words)


def judge_mlx() -> dict[str, Verdict]:
    """Verdict by runtime on an MLX directory."""
    reason = "one scale for all layers, factors transposed, as mlx_lm's load_adapters wants them"
    return {name: Verdict(False, _OTHER_FORMAT) for name in RUNTIMES} | {"mlx": Verdict(True, reason)}


def judge_gguf() -> dict[str, Verdict]:
    """Verdict by runtime on a GGUF LoRA file."""
    reason = "alpha equals the rank of every tensor, so its scale alpha/rank is 1; pass it with --lora"
    others = {name: Verdict(False, _OTHER_FORMAT) for name in RUNTIMES}
    return others | {"llama.cpp": Verdict(True, reason), "mlx": Verdict(False, _MLX_ONLY)}


def _vllm(header: AdapterHeader) -> Verdict:
    rank = max(m.rank for m in header.modules.values())
    if header.biases or header.config.bias != "none":
        return Verdict(False, f'accepts only bias="none"; this is "{header.config.bias}"')
    if rank > _VLLM_RANKS[-1]:
        return Verdict(False, f"refuses rank {rank}: at most {_VLLM_RANKS[-1]}")
    divisor = math.sqrt(header.config.rank) if header.config.rslora else header.config.rank
    scalings = dict.fromkeys(header.modules, header.config.alpha / divisor)
    if wrong := _wrong(header, scalings):
        return Verdict(False, f"ignores rank_pattern and alpha_pattern, {wrong}")
    needed = _vllm_rank(rank)
    hint = f"; start it with --max-lora-rank {needed}" if needed > _VLLM_DEFAULT_RANK else ""
    return Verdict(True, f"computes the scaling from r and lora_alpha, as trained{hint}")


def _vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM takes and that holds the adapter."""
    return next(r for r in _VLLM_RANKS if r >= rank)


def _sglang(header: AdapterHeader) -> Verdict:
    if header.biases:
        return Verdict(False, "has no place for trained biases")
    if isinstance(header.config.targets, str) and header.config.targets != "all-linear":
        return Verdict(False, "wants target_modules as a list, not as a regular expression")
    scalings = dict.fromkeys(header.modules, header.config.alpha / header.config.rank)
    if wrong := _wrong(header, scalings):
        return Verdict(
            False, f"takes lora_alpha / r for every module (newer versions refuse patterns), {wrong}"
        )
    if any(m.rank != header.config.rank for m in header.modules.values()):
        return Verdict(False, "expects every module to have rank r; newer versions refuse rank_pattern")
    return Verdict(True, "computes the scaling as lora_alpha / r, as trained")


def _llama_cpp(header: AdapterHeader) -> Verdict:
    if header.biases:
        return Verdict(False, "its converter stops at trained biases")
    if header.fan_in_fan_out or any(path.rpartition(".")[2] in _CONV1D for path in header.modules):
        return Verdict(False, "its converter transposes the factors of GPT-2's layers: export with --to gguf")
    scalings = {path: header.config.alpha / m.rank for path, m in header.modules.items()}
    if wrong := _wrong(header, scalings):
        return Verdict(False, f"its converter keeps lora_alpha alone, {wrong}")
    return Verdict(True, "through its convert_lora_to_gguf.py, or directly with --to gguf")


def _wrong(header: AdapterHeader, scalings: Mapping[str, float]) -> str:
    """Say how far off `scalings` are; empty where they are as trained."""
    ratios = [scalings[path] / m.scaling for path, m in header.modules.items()]
    off = [r for r in ratios if not math.isclose(r, 1.0, rel_tol=1e-6)]
    if not off:
        return ""
    return (
        f"so {len(off)} of {len(ratios)} modules would be scaled {_span(off)} of what was trained: "
        "export with --to portable"
    )


def _span(ratios: Iterable[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.3g}x" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g}x to {high:.3g}x"
