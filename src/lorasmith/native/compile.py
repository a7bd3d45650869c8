"""From C source to a loaded library: about a second the first time, nothing after that."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMPILE_TIMEOUT_S = 60
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11")


def is_enabled() -> bool:
    """Whether the environment allows compiled functions (`LORASMITH_NATIVE=0` forbids them)."""
    return os.environ.get("LORASMITH_NATIVE", "1") != "0"


def load(
    source: str, signatures: Mapping[str, Sequence[Any]], *, folder: Path, flags: Sequence[str] = ()
) -> Any:
    """The library of `source`, compiled if `folder` does not hold it for this compiler and processor.

    Args:
        signatures: ctypes of the arguments of each function; all return nothing.
        flags: of the compiler, besides `FLAGS`.

    Raises:
        OSError: no compiler, or the folder cannot be written. subprocess.SubprocessError: it failed.
    """
    library = ctypes.CDLL(str(_compiled(source, folder, tuple(flags))))
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(arguments), None
    return library


def _compiled(source: str, folder: Path, flags: tuple[str, ...]) -> Path:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or clang) on the path")
    said = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
    cpu = [line for line in _cpu_lines() if line.startswith(("flags", "Features", "model name"))][:2]
    flags = FLAGS + flags
    if "avx512f" in " ".join(cpu):  # GCC prefers half the width on most x86, twice the time of these loops
        flags += ("-mprefer-vector-width=512",)
    key = repr((source, flags, said.stdout, platform.machine(), cpu))
    target = folder / f"lora-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            written, out = Path(scratch) / "lora.c", Path(scratch) / "lora.so"
            written.write_text(source)
            command = [compiler, *flags, str(written), "-o", str(out)]
            subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
            os.replace(out, target)
    return target


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
