"""The C source of `elementwise`: each function once for bfloat16 and once for float32.

Roundings are those of the model's own operations in its dtype, step by step; sums are in float32,
each row by one thread in a fixed order, so the bits do not depend on the number of threads.
"""

_COMMON = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef uint16_t bf16;
enum { PIECE = 512 };

static inline float wide_bf16(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 narrow_bf16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}
/* To bfloat16 and back without leaving 32 bits, which keeps a loop vectorisable. */
static inline float round_bf16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    u = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc00000u : rounded;
    memcpy(&f, &u, 4);
    return f;
}
static inline float wide_f32(float v) { return v; }
static inline float round_f32(float v) { return v; }
static inline float narrow_f32(float v) { return v; }

/* e^x to 1.2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  /* to the nearest whole number */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23; float scale; memcpy(&scale, &bits, 4);
    return p * scale;
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
"""

_BY_TYPE = r"""

static float NAME(inverse_rms)(const T *x, long width, float eps) {
    float s = 0;
    #pragma omp simd reduction(+:s)
    for (long i = 0; i < width; i++) { float v = WIDE(x[i]); s += v * v; }
    return 1.0f / sqrtf(s / width + eps);
}

void NAME(norm)(long rows, long width, const T *x, const T *w, float eps, T *h, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long t = 0; t < rows; t++) {
        const T *a = x + t * width; T *out = h + t * width;
        const float r = NAME(inverse_rms)(a, width, eps);
        #pragma omp simd
        for (long i = 0; i < width; i++) out[i] = NARROW(WIDE(w[i]) * ROUND(WIDE(a[i]) * r));
    }
}

/* out = residual + d norm(x) / dx applied to dh */
void NAME(norm_backward)(long rows, long width, const T *dh, const T *x, const T *w, float eps,
                         const T *residual, T *out, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long t = 0; t < rows; t++) {
        const T *a = x + t * width, *d = dh + t * width, *s = residual + t * width; T *o = out + t * width;
        const float r = NAME(inverse_rms)(a, width, eps);
        float dot = 0;
        #pragma omp simd reduction(+:dot)
        for (long i = 0; i < width; i++) dot += WIDE(d[i]) * WIDE(w[i]) * WIDE(a[i]);
        const float c = dot * r * r / width;
        #pragma omp simd
        for (long i = 0; i < width; i++)
            o[i] = NARROW(WIDE(s[i]) + r * (WIDE(d[i]) * WIDE(w[i]) - WIDE(a[i]) * c));
    }
}

/* x (tokens, heads, d) turned in place by the angles of its slot; sign -1 turns back. */
void NAME(rotate)(long tokens, long heads, long d, T *x, const T *cosine, const T *sine,
                  long slots, long repeats, float sign, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long t = 0; t < tokens; t++) {
        const long at = (repeats ? t % slots : t) * d, half = d / 2;
        const T *c = cosine + at, *s = sine + at;
        for (long h = 0; h < heads; h++) {
            T *a = x + (t * heads + h) * d, *b = a + half;
            #pragma omp simd
            for (long i = 0; i < half; i++) {
                const float u = WIDE(a[i]), v = WIDE(b[i]);
                const float su = sign > 0 ? WIDE(s[i]) : WIDE(s[i + half]);
                const float sv = sign > 0 ? WIDE(s[i + half]) : WIDE(s[i]);
                a[i] = NARROW(ROUND(u * WIDE(c[i])) - sign * ROUND(v * su));
                b[i] = NARROW(ROUND(v * WIDE(c[i + half])) + sign * ROUND(u * sv));
            }
        }
    }
}

void NAME(silu_mul)(long n, const T *g, const T *p, T *m, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long start = 0; start < n; start += PIECE) {
        const long count = n - start < PIECE ? n - start : PIECE;
        const T *a = g + start, *b = p + start; T *out = m + start;
        float silu[PIECE];  /* in one loop with the rounding, GCC 12 makes code three times as slow */
        #pragma omp simd
        for (long i = 0; i < count; i++) { float v = WIDE(a[i]); silu[i] = v * sigmoid(v); }
        #pragma omp simd
        for (long i = 0; i < count; i++) out[i] = NARROW(ROUND(silu[i]) * WIDE(b[i]));
    }
}

void NAME(silu_mul_backward)(long n, const T *dm, const T *g, const T *p, T *dg, T *dp, long threads) {
    #pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        const float v = WIDE(g[i]), s = sigmoid(v), d = WIDE(dm[i]);
        dp[i] = NARROW(d * v * s);
        dg[i] = NARROW(d * WIDE(p[i]) * s * (1.0f + v * (1.0f - s)));
    }
}

/* z (rows, width) of logits becomes d loss / d z; losses[t] that of row t. */
void NAME(cross_entropy)(long rows, long width, T *z, const int64_t *targets, float smoothing,
                         float *losses, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long t = 0; t < rows; t++) {
        T *a = z + t * width;
        float top = -INFINITY, total = 0, sum = 0;
        #pragma omp simd reduction(max:top)
        for (long i = 0; i < width; i++) { float v = WIDE(a[i]); top = v > top ? v : top; }
        if (smoothing != 0) {
            #pragma omp simd reduction(+:sum)
            for (long i = 0; i < width; i++) sum += WIDE(a[i]) - top;
        }
        #pragma omp simd reduction(+:total)
        for (long i = 0; i < width; i++) total += exponential(WIDE(a[i]) - top);
        const float log_total = logf(total), target = WIDE(a[targets[t]]) - top;
        losses[t] = log_total - (1 - smoothing) * target - smoothing * sum / width;
        const float even = smoothing / width, at_target = exponential(target - log_total) - even - (1 - smoothing);
        #pragma omp simd
        for (long i = 0; i < width; i++) a[i] = NARROW(exponential(WIDE(a[i]) - top - log_total) - even);
        a[targets[t]] = NARROW(at_target);
    }
}
"""


def _of_type(suffix: str, c_type: str) -> str:
    macros = {"T": c_type, "WIDE": f"wide_{suffix}", "NARROW": f"narrow_{suffix}", "ROUND": f"round_{suffix}"}
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    lines.append(f"#define NAME(f) f##_{suffix}")
    lines.append(_BY_TYPE)
    lines += [f"#undef {name}" for name in (*macros, "NAME")]
    return "\n".join(lines)


SOURCE = "\n".join([_COMMON, _of_type("bf16", "bf16"), _of_type("f32", "float")])
