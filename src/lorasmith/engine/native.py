"""The low-rank products of a decode step as one small C function, where a C compiler is there.

At one token per row these products only read factors from memory. Done by torch they are eleven calls per
layer on float32 stacks; here one call per group reads bfloat16 stacks. The source is compiled once with the
machine's own compiler (about a second) and kept in the cache folder. Without a compiler, with another
dtype or device, or with `LORASMITH_NATIVE=0`, `slots.add_lora` computes the same in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.bases.cache import home

COMPILE_TIMEOUT_S = 60
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11")

SOURCE = r"""
#include <stdint.h>
#include <string.h>
typedef uint16_t bf16;
enum { TILE = 128 };

static inline float wide(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 narrow(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

static void dots(const bf16 *x, const bf16 *A, long K, long rank, float *u) {
    long j = 0;
    for (; j + 4 <= rank; j += 4) {
        const bf16 *a = A + j * K, *b = a + K, *c = b + K, *d = c + K;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        #pragma omp simd reduction(+:s0,s1,s2,s3)
        for (long k = 0; k < K; k++) {
            float v = wide(x[k]);
            s0 += v * wide(a[k]); s1 += v * wide(b[k]); s2 += v * wide(c[k]); s3 += v * wide(d[k]);
        }
        u[j] = s0; u[j + 1] = s1; u[j + 2] = s2; u[j + 3] = s3;
    }
    for (; j < rank; j++) {
        float s = 0;
        #pragma omp simd reduction(+:s)
        for (long k = 0; k < K; k++) s += wide(x[k]) * wide(A[j * K + k]);
        u[j] = s;
    }
}

static void tile(const float *u, const bf16 *B, long N, long rank, bf16 *y, long n) {
    float sum[TILE];
    for (long i = 0; i < n; i++) sum[i] = 0;
    for (long j = 0; j < rank; j++) {
        const float v = u[j];
        const bf16 *b = B + j * N;
        if (n == TILE) {
            #pragma omp simd
            for (long i = 0; i < TILE; i++) sum[i] += v * wide(b[i]);
        } else {
            #pragma omp simd
            for (long i = 0; i < n; i++) sum[i] += v * wide(b[i]);
        }
    }
    #pragma omp simd
    for (long i = 0; i < n; i++) y[i] = narrow(wide(y[i]) + sum[i]);
}

typedef struct {
    long in, rank, members;     /* rank: of the stacks, padding included */
    const long *out;            /* of each member */
    const bf16 *A;              /* (slots, members, rank, in) */
    const bf16 *const *B;       /* of each member (slots, rank, out) */
    const int32_t *ranks;       /* (slots, members), without padding */
} group;

void add_lora(const group *g, long rows, const int32_t *slots, const bf16 *x, bf16 *y, long ldy,
              float *u, long threads) {
    long M = g->members, R = g->rank, tiles = 0;
    for (long m = 0; m < M; m++) tiles += (g->out[m] + TILE - 1) / TILE;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long t = 0; t < rows * M; t++) {
            long row = t / M, m = t % M, slot = slots[row];
            if (slot >= 0)
                dots(x + row * g->in, g->A + (slot * M + m) * R * g->in, g->in, g->ranks[slot * M + m], u + t * R);
        }
        #pragma omp for schedule(static)
        for (long t = 0; t < rows * tiles; t++) {
            long row = t / tiles, left = t % tiles, slot = slots[row], m = 0, start = 0;
            if (slot < 0) continue;
            for (long own; left >= (own = (g->out[m] + TILE - 1) / TILE); m++) { left -= own; start += g->out[m]; }
            long at = left * TILE, N = g->out[m], n = N - at < TILE ? N - at : TILE;
            tile(u + (row * M + m) * R, g->B[m] + slot * R * N + at, N, g->ranks[slot * M + m],
                 y + row * ldy + start + at, n);
        }
    }
}
"""


class _Group(ctypes.Structure):
    _fields_ = (
        ("inner", ctypes.c_long),
        ("rank", ctypes.c_long),
        ("members", ctypes.c_long),
        ("out", ctypes.c_void_p),
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
    )


class NativeGroup:
    """Pointers to the stacks of one group; made anew when they are reallocated."""

    def __init__(self, A: Tensor, B: Sequence[Tensor], rank: int, ranks: Tensor) -> None:
        self._kept = (A, list(B), ranks)  # what the pointers point to
        self._out = (ctypes.c_long * len(B))(*(b.shape[2] for b in B))
        self._B = (ctypes.c_void_p * len(B))(*(b.data_ptr() for b in B))
        self._scratch = torch.empty(0)
        self._numbers_per_row = len(B) * rank
        self._group = _Group(
            A.shape[2],
            rank,
            len(B),
            ctypes.addressof(self._out),
            A.data_ptr(),
            ctypes.addressof(self._B),
            ranks.data_ptr(),
        )
        self._address = ctypes.addressof(self._group)

    def add(self, y: Tensor, x: Tensor, slots: Tensor) -> None:
        """y[b] += (x[b] @ A[slots[b], i].T) @ B_i[slots[b]] for all members i side by side, in place.

        Args:
            y: (rows, Σ out), bfloat16.
            x: (rows, in), bfloat16.
            slots: (rows), int32; -1 leaves a row alone.
        """
        x = x.contiguous()
        if self._scratch.numel() < x.shape[0] * self._numbers_per_row:
            self._scratch = torch.empty(x.shape[0] * self._numbers_per_row)
        function = library()
        assert function is not None
        assert y.stride(1) == 1
        function(
            self._address,
            x.shape[0],
            slots.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            y.stride(0),
            self._scratch.data_ptr(),
            torch.get_num_threads(),
        )


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the C function serves stacks of this dtype on this device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and library() is not None


@functools.cache
def library() -> Any:
    """The compiled function, tried on a small example first; None where that cannot be had."""
    if os.environ.get("LORASMITH_NATIVE", "1") == "0":
        return None
    try:
        function = ctypes.CDLL(str(_compiled())).add_lora
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    function.argtypes = (pointer, number, pointer, pointer, pointer, number, pointer, number)
    function.restype = None
    return function


def _compiled() -> Path:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler")
    said = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
    cpu = [line for line in _cpu_lines() if line.startswith(("flags", "Features", "model name"))][:2]
    key = repr((SOURCE, FLAGS, said.stdout, platform.machine(), cpu))
    target = home() / "native" / f"lora-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            source, out = Path(scratch) / "lora.c", Path(scratch) / "lora.so"
            source.write_text(SOURCE)
            command = [compiler, *FLAGS, str(source), "-o", str(out)]
            subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
            os.replace(out, target)
    return target


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
