"""Codes into numbers in one pass through memory, by C; the caller has the same in plain torch."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from typing import Any

import torch
from torch import Tensor

from lorasmith.native import home, is_enabled, load

_COMMON = r"""
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
typedef uint16_t bf16;
static inline bf16 narrow_bf16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}
static inline float narrow_f32(float v) { return v; }

/* 64 numbers from 32 bytes, each looked up among 16: an index per number, the upper half of a byte first. */
static inline void spread_bf16(const uint8_t *codes, const bf16 *values, bf16 *out) {
#ifdef __AVX512BW__
    const __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)values));
    for (int i = 0; i < 2; i++) {
        __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * i)));
        __m512i low = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(15)), 16);
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(c, 4), low);
        _mm512_storeu_si512(out + 32 * i, _mm512_permutexvar_epi16(index, table));
    }
#else
    for (int i = 0; i < 32; i++) { out[2 * i] = values[codes[i] >> 4]; out[2 * i + 1] = values[codes[i] & 15]; }
#endif
}
static inline void spread_f32(const uint8_t *codes, const float *values, float *out) {
#ifdef __AVX512BW__
    const __m512 table = _mm512_loadu_ps(values);
    for (int i = 0; i < 4; i++) {
        __m512i c = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + 8 * i)));
        __m512i low = _mm512_slli_epi64(_mm512_and_si512(c, _mm512_set1_epi64(15)), 32);
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(c, 4), low);
        _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(index, table));
    }
#else
    for (int i = 0; i < 32; i++) { out[2 * i] = values[codes[i] >> 4]; out[2 * i + 1] = values[codes[i] & 15]; }
#endif
}
"""

_BY_TYPE = r"""
void nf4_SUFFIX(long blocks, const uint8_t *codes, const float *absmax, const float *table, T *out, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long b = 0; b < blocks; b++) {
        T values[16];
        for (int k = 0; k < 16; k++) values[k] = narrow_SUFFIX(table[k] * absmax[b]);
        spread_SUFFIX(codes + 32 * b, values, out + 64 * b);
    }
}

void int8_SUFFIX(long rows, long width, const int8_t *codes, const float *scale, T *out, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const int8_t *in = codes + r * width; T *to = out + r * width; const float s = scale[r];
        #pragma omp simd
        for (long i = 0; i < width; i++) to[i] = narrow_SUFFIX((float)in[i] * s);
    }
}
"""
_TYPES = {torch.bfloat16: ("bf16", "bf16"), torch.float32: ("f32", "float")}
SOURCE = _COMMON + "".join(
    _BY_TYPE.replace("SUFFIX", suffix).replace("T *", f"{name} *").replace("T values", f"{name} values")
    for suffix, name in _TYPES.values()
)
_P, _N = ctypes.c_void_p, ctypes.c_long
_SIGNATURES = {"nf4": (_N, _P, _P, _P, _P, _N), "int8": (_N, _N, _P, _P, _P, _N)}


def unpack_nf4(codes: Tensor, absmax: Tensor, values: Tensor, out: Tensor) -> bool:
    """Fill `out` (blocks, 64) from codes (blocks · 32,); False, and nothing done, where C cannot.

    Semantics:
        both = torch.stack([codes >> 4, codes & 15], 1).view(-1, 64)
        out.copy_(values[both] * absmax[:, None])
    """
    function = _function("nf4", codes, out)
    if function is not None:
        pointers = (t.contiguous().data_ptr() for t in (codes, absmax, values, out))
        function(len(absmax), *pointers, torch.get_num_threads())
    return function is not None


def unpack_int8(codes: Tensor, scale: Tensor, out: Tensor) -> bool:
    """Fill `out` (rows, width) from codes of that shape; False, and nothing done, where C cannot.

    Semantics:
        out.copy_(codes * scale[:, None])
    """
    function = _function("int8", codes, out)
    if function is not None:
        function(*codes.shape, *(t.data_ptr() for t in (codes, scale, out)), torch.get_num_threads())
    return function is not None


def _function(name: str, codes: Tensor, out: Tensor) -> Any:
    usable = codes.device.type == "cpu" and codes.is_contiguous() and out.dtype in _TYPES and is_enabled()
    library = _library() if usable else None
    return None if library is None else getattr(library, f"{name}_{_TYPES[out.dtype][0]}")


@functools.cache
def _library() -> Any:
    signatures = {
        f"{name}_{suffix}": args for name, args in _SIGNATURES.items() for suffix, _ in _TYPES.values()
    }
    try:
        return load(SOURCE, signatures, folder=home() / "native", flags=("-ffp-contract=off",))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
