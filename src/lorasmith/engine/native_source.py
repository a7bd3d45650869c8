"""The C source of `native`: decode steps in bfloat16, each row computed alone and in a fixed order.

So the bits of a row depend on no neighbour and on no number of threads.
"""

SOURCE = r"""
#include <stdint.h>
#include <string.h>
typedef uint16_t bf16;
enum { TILE = 1024 };  /* columns at once: long runs of each row of B are read, and their sums stay in L1 */

static inline float wide(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 narrow(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

/* Four rows of A at once; the next four are fetched meanwhile, since each run is short for the hardware to guess. */
static void dots(const bf16 *x, const bf16 *A, long K, long rank, float *u) {
    long j = 0;
    for (; j + 4 <= rank; j += 4) {
        const bf16 *a = A + j * K, *b = a + K, *c = b + K, *d = c + K;
        float p[16] = {0}, q[16] = {0}, r[16] = {0}, s[16] = {0};
        long k = 0;
        for (; k + 32 <= K; k += 32) {
            __builtin_prefetch(a + k + 4 * K); __builtin_prefetch(b + k + 4 * K);
            __builtin_prefetch(c + k + 4 * K); __builtin_prefetch(d + k + 4 * K);
            for (long h = k; h < k + 32; h += 16)
            for (long i = 0; i < 16; i++) {
                float v = wide(x[h + i]);
                p[i] += v * wide(a[h + i]); q[i] += v * wide(b[h + i]); r[i] += v * wide(c[h + i]); s[i] += v * wide(d[h + i]);
            }
        }
        for (; k < K; k++) { float v = wide(x[k]); p[0] += v * wide(a[k]); q[0] += v * wide(b[k]); r[0] += v * wide(c[k]); s[0] += v * wide(d[k]); }
        for (long w = 8; w; w /= 2) for (long i = 0; i < w; i++) { p[i] += p[i + w]; q[i] += q[i + w]; r[i] += r[i + w]; s[i] += s[i + w]; }
        u[j] = p[0]; u[j + 1] = q[0]; u[j + 2] = r[0]; u[j + 3] = s[0];
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
    long j = 0;
    for (long i = 0; i < n; i++) sum[i] = 0;
    for (; j + 4 <= rank; j += 4) {
        const bf16 *a = B + j * N, *b = a + N, *c = b + N, *d = c + N;
        const float p = u[j], q = u[j + 1], r = u[j + 2], s = u[j + 3];
        long i = 0;
        for (; i + 32 <= n; i += 32) {
            __builtin_prefetch(a + i + 4 * N); __builtin_prefetch(b + i + 4 * N);
            __builtin_prefetch(c + i + 4 * N); __builtin_prefetch(d + i + 4 * N);
            #pragma omp simd
            for (long h = i; h < i + 32; h++)
                sum[h] = (((sum[h] + p * wide(a[h])) + q * wide(b[h])) + r * wide(c[h])) + s * wide(d[h]);
        }
        for (; i < n; i++) sum[i] = (((sum[i] + p * wide(a[i])) + q * wide(b[i])) + r * wide(c[i])) + s * wide(d[i]);
    }
    for (; j < rank; j++) {
        const bf16 *b = B + j * N;
        #pragma omp simd
        for (long i = 0; i < n; i++) sum[i] += u[j] * wide(b[i]);
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
    if (rows >= threads * 2) {  /* each thread has rows of its own and waits for nobody */
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (long row = 0; row < rows; row++) {
            long slot = slots[row], start = 0;
            if (slot < 0) continue;
            float *own = u + row * M * R;
            for (long m = 0; m < M; start += g->out[m], m++) {
                long N = g->out[m], rank = g->ranks[slot * M + m];
                dots(x + row * g->in, g->A + (slot * M + m) * R * g->in, g->in, rank, own);
                for (long at = 0; at < N; at += TILE)
                    tile(own, g->B[m] + slot * R * N + at, N, rank, y + row * ldy + start + at, N - at < TILE ? N - at : TILE);
            }
        }
        return;
    }
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

/* exp(x) for x <= 88 within 2 ulp: 2^n times a polynomial on the rest. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale; memcpy(&scale, &bits, 4);
    return p * scale;
}

static void rms(const bf16 *x, const bf16 *w, long K, float eps, bf16 *out) {
    float sum = 0;
    #pragma omp simd reduction(+:sum)
    for (long k = 0; k < K; k++) { float v = wide(x[k]); sum += v * v; }
    float inverse = 1.0f / __builtin_sqrtf(sum / K + eps);
    #pragma omp simd
    for (long k = 0; k < K; k++) out[k] = narrow(wide(w[k]) * wide(narrow(wide(x[k]) * inverse)));
}

/* x += more (where there is more); out = rms_norm(x) * w */
void add_norm(long rows, long K, bf16 *x, const bf16 *more, const bf16 *w, float eps, bf16 *out, long threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (rows > 3)
    for (long row = 0; row < rows; row++) {
        bf16 *own = x + row * K;
        if (more) {
            #pragma omp simd
            for (long k = 0; k < K; k++) own[k] = narrow(wide(own[k]) + wide(more[row * K + k]));
        }
        rms(own, w, K, eps, out + row * K);
    }
}

/* out = silu(both[:, :K]) * both[:, K:] */
void silu_mul(long rows, long K, const bf16 *both, bf16 *out, long threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (rows > 3)
    for (long row = 0; row < rows; row++) {
        const bf16 *gate = both + row * 2 * K, *up = gate + K;
        #pragma omp simd
        for (long k = 0; k < K; k++) {
            float g = wide(gate[k]);
            float e = exponential(g < 0 ? g : -g);  /* of -|g|, so that nothing overflows */
            float sigmoid = g < 0 ? e / (1.0f + e) : 1.0f / (1.0f + e);
            out[row * K + k] = narrow(wide(narrow(g * sigmoid)) * wide(up[k]));
        }
    }
}

static void turn(const bf16 *x, const bf16 *cos, const bf16 *sin, long D, bf16 *out) {
    long half = D / 2;
    #pragma omp simd
    for (long d = 0; d < half; d++) {
        float a = wide(x[d]), b = wide(x[d + half]);
        out[d] = narrow(a * wide(cos[d]) - b * wide(sin[d]));
        out[d + half] = narrow(b * wide(cos[d + half]) + a * wide(sin[d + half]));
    }
}

typedef struct {
    long heads, kv_heads, width;
    float scaling, eps;
    const bf16 *q_norm, *k_norm;   /* or NULL */
} attention;

/* Turn q and k of one row and one kv head, write k and v to the cache; q comes out wide and scaled. */
static void place(const attention *s, const bf16 *mine, const bf16 *cos, const bf16 *sin, long h, bf16 *K, bf16 *V,
                  float *q, bf16 *room) {
    long D = s->width, G = s->heads / s->kv_heads;
    const bf16 *k = mine + (s->heads + h) * D;
    if (s->k_norm) { rms(k, s->k_norm, D, s->eps, room); k = room; }
    turn(k, cos, sin, D, K);
    memcpy(V, mine + (s->heads + s->kv_heads + h) * D, D * sizeof(bf16));
    for (long g = 0; g < G; g++) {
        const bf16 *own = mine + (h * G + g) * D;
        if (s->q_norm) { rms(own, s->q_norm, D, s->eps, room); own = room; }
        turn(own, cos, sin, D, room + D);
        for (long d = 0; d < D; d++) q[g * D + d] = wide(room[D + d]) * s->scaling;
    }
}

/* out = softmax(q @ K.T) @ V for the G heads that share K and V. Inlined for the usual widths. */
static inline __attribute__((always_inline)) void weigh(const float *q, const bf16 *K, const bf16 *V, long span,
        long step, long G, long D, float *line, float *sum, float *score, bf16 *out) {
    for (long i = 0; i < span; i++) {
        const bf16 *k = K + i * step;
        for (long d = 0; d < D; d++) line[d] = wide(k[d]);
        for (long g = 0; g < G; g++) {
            float part[16] = {0}, dot = 0;
            long d = 0;
            for (; d + 16 <= D; d += 16)
                for (long j = 0; j < 16; j++) part[j] += q[g * D + d + j] * line[d + j];
            for (; d < D; d++) dot += q[g * D + d] * line[d];
            for (long w = 8; w; w /= 2)
                for (long j = 0; j < w; j++) part[j] += part[j + w];
            score[g * span + i] = dot + part[0];
        }
    }
    for (long g = 0; g < G; g++) {
        float *own = score + g * span, top = own[0], total = 0;
        #pragma omp simd reduction(max:top)
        for (long i = 0; i < span; i++) top = own[i] > top ? own[i] : top;
        #pragma omp simd reduction(+:total)
        for (long i = 0; i < span; i++) { own[i] = exponential(own[i] - top); total += own[i]; }
        #pragma omp simd
        for (long i = 0; i < span; i++) own[i] /= total;
    }
    for (long d = 0; d < G * D; d++) sum[d] = 0;
    for (long i = 0; i < span; i++) {
        const bf16 *v = V + i * step;
        for (long d = 0; d < D; d++) line[d] = wide(v[d]);
        for (long g = 0; g < G; g++) {
            const float p = score[g * span + i];
            for (long d = 0; d < D; d++) sum[g * D + d] += p * line[d];
        }
    }
    for (long d = 0; d < G * D; d++) out[d] = narrow(sum[d]);
}

/* One new token per row, over the row's own span. scratch: for each (row, kv head) 2·G·D + 2·D + G·span floats. */
void attend(const attention *s, long rows, const int64_t *row_of, const int64_t *start_of, const bf16 *qkv,
            const bf16 *cos, const bf16 *sin, bf16 *keys, bf16 *values, long capacity, bf16 *out,
            float *scratch, long scratch_each, long threads) {
    long D = s->width, KV = s->kv_heads, G = s->heads / KV, step = KV * D;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < rows * KV; t++) {
        long row = t / KV, h = t % KV, start = start_of[row];
        float *q = scratch + t * scratch_each, *sum = q + G * D, *line = sum + G * D, *score = line + 2 * D;
        bf16 *K = keys + (row_of[row] * capacity * KV + h) * D, *V = values + (row_of[row] * capacity * KV + h) * D;
        bf16 *o = out + (row * s->heads + h * G) * D;
        place(s, qkv + row * (s->heads + 2 * KV) * D, cos + row * D, sin + row * D, h, K + start * step,
              V + start * step, q, (bf16 *)line);
        if (D == 64 && G == 3) weigh(q, K, V, start + 1, step, 3, 64, line, sum, score, o);
        else if (D == 64) weigh(q, K, V, start + 1, step, G, 64, line, sum, score, o);
        else if (D == 128) weigh(q, K, V, start + 1, step, G, 128, line, sum, score, o);
        else weigh(q, K, V, start + 1, step, G, D, line, sum, score, o);
    }
}
"""
