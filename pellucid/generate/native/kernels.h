/* Products of a matrix with a few vectors, and nothing else: the part of decoding that takes the time.
 *
 * A vector `v` has LANES floats: 16 with AVX-512, 8 with AVX2, 4 with NEON or SSE. GCC's and Clang's
 * vector types compile for all of them; intrinsics appear only where one instruction does more:
 * vdpbf16ps (pairs of bfloat16) and vpdpbusd (fours of bytes).
 */
#ifndef PELLUCID_KERNELS_H
#define PELLUCID_KERNELS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define BATCH 8  /* vectors that share one pass over a row */
#define PAIR 2   /* vectors whose sums are in registers at a time */
#define ROWS (LANES == 8 ? 1 : 2) /* rows in flight, for several vectors: AVX2 has half the registers */
#define SUMS 4   /* sums of one row and one vector, however many there are: see DEFINE_TILE */
#define TILE 16  /* rows of a quantised matrix that lie side by side */

typedef float v __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT6, INT4 };

typedef struct {
    const void *weights;    /* (rows, columns); quantised: tiles, see quantised.py */
    const void *scales;     /* quantised only: bfloat16 (rows / TILE, groups, TILE), or codes */
    const uint16_t *row_scales; /* where scales are codes (rows / TILE, groups, 2, TILE); or NULL */
    const float *bias;      /* (rows) or NULL */
    int64_t rows, columns;
    int32_t kind, group;
    int32_t exact;          /* quantised: take the vector as it is, not in 15 bits */
} Matrix;

/* Bits of a quantised matrix' levels, else 0. */
INLINE int bits_of(const Matrix *m) {
    return m->kind == INT8 ? 8 : m->kind == INT6 ? 6 : m->kind == INT4 ? 4 : 0;
}

/* Bytes of a row; of a quantised matrix its part of a tile. */
INLINE int64_t row_bytes(const Matrix *m) {
    if (m->kind == FLOAT32) return m->columns * 4;
    if (m->kind == BFLOAT16 || m->kind == FLOAT16) return m->columns * 2;
    return (m->columns + m->group - 1) / m->group * m->group * bits_of(m) / 8;
}

/* One vector in the forms the kernels read it in; columns padded with zeros to a whole group. */
typedef struct {
    float *wide;     /* (padded) */
    uint16_t *half;  /* (padded) bfloat16 */
    int8_t *high, *low;  /* (padded): value = step * (128 * high + low), 15 bits of it */
    int16_t *pairs;  /* (padded) 128 * high + low of columns 0 and 2, 1 and 3 of each four */
    float *step;     /* (groups) */
    int32_t *sum;    /* (groups) of 128 * high + low */
    float *total;    /* (groups) sums of the values */
} Vector;

/* ── Numbers of 16 bits ───────────────────────────────────────────────────────────────────────── */

INLINE float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_float16(uint16_t x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return (float)half;
}

INLINE uint16_t to_float16(float x) {
    _Float16 half = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

/* ── Vectors ──────────────────────────────────────────────────────────────────────────────────── */

INLINE v load_float32(const float *p) {
    v x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE v load_bfloat16(const uint16_t *p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return (v)(__builtin_convertvector(x, vu) << 16);
}

INLINE v load_float16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    v x;
    for (int i = 0; i < LANES; i++) x[i] = from_float16(p[i]);
    return x;
#endif
}

/* e to the power x, to two units in the last place; 0 below -87. */
INLINE v exponential(v x) {
    v low = (v){0} - 87.0f, high = (v){0} + 88.0f;
    vi under = x < low;
    x = (v)(((vi)x & ~under) | ((vi)low & under));
    vi over = x > high;
    x = (v)(((vi)x & ~over) | ((vi)high & over));
    vi n = __builtin_convertvector(x * 1.44269504f + (v)(((vi)x & (int32_t)0x80000000) | 0x3f000000), vi);
    v whole = __builtin_convertvector(n, v);
    v r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    v p = 1.9875691500e-4f * r + 1.3981999507e-3f; /* Cephes' polynomial for |r| < ln 2 / 2 */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v scaled = (v)((vi)p + (n << 23));
    return (v)((vi)scaled & ~under);
}

/* f of n numbers, a vector at a time; the rest padded with zeros. */
#define EACH_VECTOR(X, N, F)                                                   \
    for (int64_t at_ = 0; at_ < (N); at_ += LANES) {                           \
        int64_t left_ = (N) - at_ < LANES ? (N) - at_ : LANES;                 \
        v x_ = {0};                                                            \
        memcpy(&x_, (X) + at_, left_ * sizeof(float));                         \
        x_ = F(x_);                                                            \
        memcpy((X) + at_, &x_, left_ * sizeof(float));                         \
    }

INLINE float add_up(v x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

/* ── Matrices as they are stored: rows ────────────────────────────────────────────────────────── */

/* `rows` rows of `k` numbers with `batch` vectors, out (rows, BATCH); both are constants when inlined.
 * Each product is added up in the same order, into SUMS sums and then into one, whatever else is computed
 * beside it: a token's bits do not depend on the tokens that share its step. */
#define DEFINE_TILE(NAME, WEIGHT, LOAD, ONE)                                                         \
    INLINE void NAME(const WEIGHT *w, int64_t k, const float *const *x, int rows, int batch,         \
                     float out[ROWS][BATCH]) {                                                       \
        const int some = batch < PAIR ? batch : PAIR;                                                \
        for (int first = 0; first < batch; first += some) {                                          \
            v sums[ROWS][PAIR][SUMS] = {{{{0}}}}, rest[ROWS][PAIR] = {{{0}}};                        \
            int64_t i = 0;                                                                           \
            for (; i + SUMS * LANES <= k; i += SUMS * LANES)                                         \
                for (int p = 0; p < SUMS; p++)                                                       \
                    for (int r = 0; r < rows; r++) {                                                 \
                        v row = LOAD(w + r * k + i + p * LANES);                                     \
                        for (int b = 0; b < some; b++)                                               \
                            sums[r][b][p] += row * load_float32(x[first + b] + i + p * LANES);       \
                    }                                                                                \
            for (; i + LANES <= k; i += LANES)                                                       \
                for (int r = 0; r < rows; r++) {                                                     \
                    v row = LOAD(w + r * k + i);                                                     \
                    for (int b = 0; b < some; b++) rest[r][b] += row * load_float32(x[first + b] + i); \
                }                                                                                    \
            for (int r = 0; r < rows; r++)                                                           \
                for (int b = 0; b < some; b++) {                                                     \
                    for (int p = 0; p < SUMS; p++) rest[r][b] += sums[r][b][p];                      \
                    float sum = add_up(rest[r][b]);                                                  \
                    for (int64_t j = i; j < k; j++) sum += ONE(w[r * k + j]) * x[first + b][j];      \
                    out[r][first + b] = sum;                                                         \
                }                                                                                    \
        }                                                                                            \
    }

#define AS_IT_IS(x) (x)
DEFINE_TILE(tile_float32, float, load_float32, AS_IT_IS)
DEFINE_TILE(tile_float16, uint16_t, load_float16, from_float16)
#if !defined(__AVX512BF16__)
DEFINE_TILE(tile_bfloat16, uint16_t, load_bfloat16, from_bfloat16)
#else
#define PAIRS(SUM, W, X) _mm512_dpbf16_ps(SUM, (__m512bh)(W), (__m512bh)_mm512_loadu_si512(X))

INLINE void tile_pairs(const uint16_t *w, int64_t k, const uint16_t *const *x, int rows, int batch,
                       float out[ROWS][BATCH]) {
    const int some = batch < PAIR ? batch : PAIR;
    for (int first = 0; first < batch; first += some) {
        __m512 sums[ROWS][PAIR][SUMS], rest[ROWS][PAIR];
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < some; b++) {
                rest[r][b] = _mm512_setzero_ps();
                for (int p = 0; p < SUMS; p++) sums[r][b][p] = _mm512_setzero_ps();
            }
        int64_t i = 0;
        for (; i + SUMS * 32 <= k; i += SUMS * 32)
            for (int p = 0; p < SUMS; p++)
                for (int r = 0; r < rows; r++) {
                    __m512i row = _mm512_loadu_si512(w + r * k + i + p * 32);
                    for (int b = 0; b < some; b++)
                        sums[r][b][p] = PAIRS(sums[r][b][p], row, x[first + b] + i + p * 32);
                }
        for (; i < k; i += 32) {
            __mmask32 there = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1; /* x is padded */
            for (int r = 0; r < rows; r++) {
                __m512i row = _mm512_maskz_loadu_epi16(there, w + r * k + i);
                for (int b = 0; b < some; b++) rest[r][b] = PAIRS(rest[r][b], row, x[first + b] + i);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < some; b++) {
                for (int p = 0; p < SUMS; p++) rest[r][b] = _mm512_add_ps(rest[r][b], sums[r][b][p]);
                out[r][first + b] = _mm512_reduce_add_ps(rest[r][b]);
            }
    }
}
#endif

/* ── Quantised matrices: tiles of 16 rows ─────────────────────────────────────────────────────── */

/* A tile's groups follow one another. A group of INT8 lies as (group / 4, TILE, 4) bytes, value + 128.
 * A group of INT4 lies as (group / 8, TILE, 4) bytes that hold a weight of the group's first half in
 * their low bits and one of its second half in their high bits, each value + 8. A group of INT6, value
 * + 32, lies as INT4 for the low 4 bits of each weight, and behind them as (group / 16, TILE, 4) bytes
 * that hold the high 2 bits of four weights, one from each quarter of the group.
 *
 *     4 columns of 16 rows in 64 bytes        step 0  1  2  3 │ 4  5  6  7 │ …      group / 4 of them
 *                                                  first half │ second half        two to a byte
 */
typedef struct {
    int bits, offset, steps, loads, quarter; /* loads: 64-byte loads of whole bytes or low 4 bits */
} Levels;

INLINE Levels levels_of(int bits, int group) {
    return (Levels){bits, 1 << (bits - 1), group / 4, bits == 8 ? group / 4 : group / 8, group / 16};
}

INLINE int64_t group_bytes(Levels l) { return (l.loads + (l.bits == 6 ? l.quarter : 0)) * 4 * TILE; }

/* One level of a group that begins at w. */
INLINE int level_at(const uint8_t *w, Levels l, int row, int inside) {
    int step = inside / 4, place = row * 4 + inside % 4;
    int stored = w[step % l.loads * 4 * TILE + place];
    if (l.bits < 8) stored = step < l.loads ? stored & 15 : stored >> 4;
    if (l.bits == 6) {
        int high = w[(l.loads + step % l.quarter) * 4 * TILE + place];
        stored |= (high >> (2 * (step / l.quarter)) & 3) << 4;
    }
    return stored - l.offset;
}

/* Scales of a group for the rows of a tile from `part` · LANES on; `coded`: of its row's worth. */
INLINE v scales_at(const void *scales, int64_t g, int part, int coded) {
    if (!coded) return load_bfloat16((const uint16_t *)scales + g * TILE + part * LANES);
    vb codes;
    memcpy(&codes, (const uint8_t *)scales + 2 * g * TILE + part * LANES, sizeof codes);
    return __builtin_convertvector(__builtin_convertvector(codes, vi), v);
}

INLINE v offsets_at(const void *scales, int64_t g, int part) {
    vb codes;
    memcpy(&codes, (const uint8_t *)scales + (2 * g + 1) * TILE + part * LANES, sizeof codes);
    return __builtin_convertvector(__builtin_convertvector(codes, vi) - 128, v);
}

/* What sums over groups come to, for the rows of a tile from `part` · LANES on. */
INLINE void finish_rows(const uint16_t *row_scales, v sum, v shift, int part, int b, int coded,
                        float out[TILE][BATCH]) {
    if (coded)
        sum = sum * load_bfloat16(row_scales + part * LANES) + shift * load_bfloat16(row_scales + TILE + part * LANES);
    for (int r = 0; r < LANES; r++) out[part * LANES + r][b] = sum[r];
}

/* A tile of a quantised matrix, and how many groups it has. */
typedef struct {
    const uint8_t *levels;
    const void *scales;
    const uint16_t *row_scales; /* NULL where scales are not coded */
    int64_t groups;
    int group;
} Tile;

/* One tile with one to BATCH vectors, out (TILE, BATCH); `bits` is a constant when inlined. */
#if defined(__AVX512VNNI__)
#define BYTES_MULTIPLY
INLINE void tile_bytes(const Tile *t, const Vector *x, int batch, int bits, float out[TILE][BATCH]) {
    const Levels l = levels_of(bits, t->group);
    const int coded = t->row_scales != NULL;
    const uint8_t *w = t->levels;
    const __m512i low_bits = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8(48);
    v sums[BATCH] = {{0}}, shifts[BATCH] = {{0}};
    for (int64_t g = 0; g < t->groups; g++, w += group_bytes(l)) {
        __m512i high[BATCH], low[BATCH];
        for (int b = 0; b < batch; b++) {
            high[b] = _mm512_setzero_si512();
            low[b] = _mm512_set1_epi32(-l.offset * x[b].sum[g]);
        }
        for (int s = 0; s < l.loads; s++) {
            __m512i packed = _mm512_loadu_si512(w + s * 64);
            if (bits < 8) _mm_prefetch((const char *)w + s * 64 + 2048, _MM_HINT_T0); /* much work per byte */
            __m512i first = bits == 8 ? packed : _mm512_and_si512(packed, low_bits);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_bits);
            if (bits == 6) {
                int late = s >= l.quarter; /* quarters 1 and 3, else 0 and 2 */
                __m512i top = _mm512_loadu_si512(w + (l.loads + s - late * l.quarter) * 64);
                __m512i one = late ? _mm512_slli_epi16(top, 2) : _mm512_slli_epi16(top, 4);
                __m512i other = late ? _mm512_srli_epi16(top, 2) : top;
                first = _mm512_or_si512(first, _mm512_and_si512(one, high_bits));
                second = _mm512_or_si512(second, _mm512_and_si512(other, high_bits));
            }
            for (int b = 0; b < batch; b++) {
                const int32_t *h = (const int32_t *)(x[b].high + g * t->group);
                const int32_t *r = (const int32_t *)(x[b].low + g * t->group);
                high[b] = _mm512_dpbusd_epi32(high[b], first, _mm512_set1_epi32(h[s]));
                low[b] = _mm512_dpbusd_epi32(low[b], first, _mm512_set1_epi32(r[s]));
                if (bits < 8) {
                    high[b] = _mm512_dpbusd_epi32(high[b], second, _mm512_set1_epi32(h[s + l.loads]));
                    low[b] = _mm512_dpbusd_epi32(low[b], second, _mm512_set1_epi32(r[s + l.loads]));
                }
            }
        }
        v scale = scales_at(t->scales, g, 0, coded);
        for (int b = 0; b < batch; b++) {
            __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[b], 7), low[b]);
            sums[b] += (v)_mm512_cvtepi32_ps(whole) * (scale * x[b].step[g]);
            if (coded) shifts[b] += offsets_at(t->scales, g, 0) * (x[b].step[g] * (float)x[b].sum[g]);
        }
    }
    for (int b = 0; b < batch; b++) finish_rows(t->row_scales, sums[b], shifts[b], 0, b, coded, out);
}
#elif defined(__AVX2__) && LANES == 8
#define BYTES_MULTIPLY
/* Pairs of 16 bits: all of 15 bits of the vector in one product. More vectors than two take half of a
 * tile's rows at a time, or the sums would not stay in registers. */
INLINE void tile_bytes(const Tile *t, const Vector *x, int batch, int bits, float out[TILE][BATCH]) {
    const Levels l = levels_of(bits, t->group);
    const int coded = t->row_scales != NULL;
    const __m256i low_bits = _mm256_set1_epi8(15), high_bits = _mm256_set1_epi8(48);
    const __m256i even = _mm256_set1_epi16(255);
    enum { PARTS = TILE / LANES };
    const int at_once = batch <= 2 ? PARTS : 1;
    for (int begin = 0; begin < PARTS; begin += at_once) {
        v sums[BATCH][PARTS] = {{{0}}}, shifts[BATCH][PARTS] = {{{0}}};
        const uint8_t *w = t->levels + begin * 32;
        for (int64_t g = 0; g < t->groups; g++, w += group_bytes(l)) {
            __m256i whole[BATCH][PARTS];
            for (int b = 0; b < batch; b++)
                for (int p = 0; p < at_once; p++) whole[b][p] = _mm256_set1_epi32(-l.offset * x[b].sum[g]);
            for (int s = 0; s < l.loads; s++)
                for (int p = 0; p < at_once; p++) {
                    __m256i packed = _mm256_loadu_si256((const __m256i *)(w + s * 64 + p * 32));
                    __m256i first = bits == 8 ? packed : _mm256_and_si256(packed, low_bits);
                    __m256i second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits);
                    if (bits == 6) {
                        int late = s >= l.quarter; /* quarters 1 and 3, else 0 and 2 */
                        const uint8_t *at = w + (l.loads + s - late * l.quarter) * 64 + p * 32;
                        __m256i top = _mm256_loadu_si256((const __m256i *)at);
                        __m256i one = late ? _mm256_slli_epi16(top, 2) : _mm256_slli_epi16(top, 4);
                        __m256i other = late ? _mm256_srli_epi16(top, 2) : top;
                        first = _mm256_or_si256(first, _mm256_and_si256(one, high_bits));
                        second = _mm256_or_si256(second, _mm256_and_si256(other, high_bits));
                    }
                    __m256i level[4] = {_mm256_and_si256(first, even), _mm256_srli_epi16(first, 8),
                                        _mm256_and_si256(second, even), _mm256_srli_epi16(second, 8)};
                    for (int b = 0; b < batch; b++) {
                        const int32_t *pair = (const int32_t *)(x[b].pairs + g * t->group);
#define ADD_PAIRS(I, AT) \
    whole[b][p] = _mm256_add_epi32(whole[b][p], _mm256_madd_epi16(level[I], _mm256_set1_epi32(pair[AT])))
                        ADD_PAIRS(0, 2 * s);
                        ADD_PAIRS(1, 2 * s + 1);
                        if (bits == 8) continue;
                        ADD_PAIRS(2, 2 * (s + l.loads));
                        ADD_PAIRS(3, 2 * (s + l.loads) + 1);
                    }
                }
            for (int p = 0; p < at_once; p++) {
                v scale = scales_at(t->scales, g, begin + p, coded);
                for (int b = 0; b < batch; b++) {
                    sums[b][p] += (v)_mm256_cvtepi32_ps(whole[b][p]) * (scale * x[b].step[g]);
                    if (coded)
                        shifts[b][p] += offsets_at(t->scales, g, begin + p) * (x[b].step[g] * (float)x[b].sum[g]);
                }
            }
        }
        for (int b = 0; b < batch; b++)
            for (int p = 0; p < at_once; p++)
                finish_rows(t->row_scales, sums[b][p], shifts[b][p], begin + p, b, coded, out);
    }
}
#endif

/* The same with the vector in float32: for models in float32, and where bytes cannot be multiplied. */
INLINE void tile_widened(const Tile *t, const Vector *x, int batch, int bits, float out[TILE][BATCH]) {
    const Levels l = levels_of(bits, t->group);
    const int coded = t->row_scales != NULL;
    const uint8_t *w = t->levels;
    v sums[BATCH][TILE / LANES] = {{{0}}}, shifts[BATCH][TILE / LANES] = {{{0}}};
    for (int64_t g = 0; g < t->groups; g++, w += group_bytes(l)) {
        v inside[BATCH][TILE / LANES] = {{{0}}};
        for (int s = 0; s < l.steps; s++)
            for (int part = 0; part < TILE / LANES; part++) {
                vu packed, top = {0};
                memcpy(&packed, w + s % l.loads * 4 * TILE + 4 * LANES * part, sizeof packed);
                if (bits < 8) packed = packed >> (s < l.loads ? 0 : 4) & 0x0f0f0f0f;
                if (bits == 6) {
                    memcpy(&top, w + (l.loads + s % l.quarter) * 4 * TILE + 4 * LANES * part, sizeof top);
                    packed |= (top >> 2 * (s / l.quarter) & 0x03030303) << 4;
                }
                for (int j = 0; j < 4; j++) {
                    vi level = (vi)(packed >> 8 * j & 255) - l.offset;
                    v row = __builtin_convertvector(level, v);
                    for (int b = 0; b < batch; b++)
                        inside[b][part] += row * x[b].wide[g * t->group + 4 * s + j];
                }
            }
        for (int part = 0; part < TILE / LANES; part++) {
            v scale = scales_at(t->scales, g, part, coded);
            for (int b = 0; b < batch; b++) {
                sums[b][part] += inside[b][part] * scale;
                if (coded) shifts[b][part] += offsets_at(t->scales, g, part) * x[b].total[g];
            }
        }
    }
    for (int b = 0; b < batch; b++)
        for (int part = 0; part < TILE / LANES; part++)
            finish_rows(t->row_scales, sums[b][part], shifts[b][part], part, b, coded, out);
}

INLINE void tile_quantised(const Tile *t, const Matrix *m, const Vector *x, int batch, int bits,
                           float out[TILE][BATCH]) {
#if defined(BYTES_MULTIPLY)
    if (!m->exact) {
        tile_bytes(t, x, batch, bits, out);
        return;
    }
#endif
    tile_widened(t, x, batch, bits, out);
}

/* ── Any matrix ───────────────────────────────────────────────────────────────────────────────── */

#if defined(BYTES_MULTIPLY)
/* A group of a vector in 15 bits of its largest value. */
INLINE void as_whole_numbers(Vector *x, int64_t g, int group) {
    const float *in = x->wide + g * group;
    float most = 0, none = 0;  // a comparison passes over NaN; its product with 0 does not
    for (int i = 0; i < group; i++) most = in[i] > most ? in[i] : -in[i] > most ? -in[i] : most;
    for (int i = 0; i < group; i++) none += in[i] * 0.0f;
    float step = most / 16319.0f + none, per = most > 0 ? 16319.0f / most : 0;
    int32_t sum = 0;
    for (int i = 0; i < group; i++) {
        int32_t level = (int32_t)__builtin_rintf(in[i] * per);
#if defined(__AVX512VNNI__)
        int32_t top = (level + 64) >> 7;
        x->high[g * group + i] = (int8_t)top;
        x->low[g * group + i] = (int8_t)(level - 128 * top);
#else
        x->pairs[g * group + i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = (int16_t)level;
#endif
        sum += level;
    }
    x->step[g] = step;
    x->sum[g] = sum;
}
#endif

/* Forms of a vector that this matrix's kernel reads; `wide` (padded with zeros) is there already. */
static void prepare(const Matrix *m, Vector *x) {
    int64_t k = m->columns;
    if (m->kind == BFLOAT16) {
#if defined(__AVX512BF16__)
        for (int64_t i = 0; i < k; i++) x->half[i] = to_bfloat16(x->wide[i]);
        for (int64_t i = k; i < (k + 31) / 32 * 32; i++) x->half[i] = 0;
#endif
        return;
    }
    if (!bits_of(m)) return;
    int64_t padded = (k + m->group - 1) / m->group * m->group;
    for (int64_t i = k; i < padded; i++) x->wide[i] = 0;
#if defined(BYTES_MULTIPLY)
    if (!m->exact) {
        for (int64_t g = 0; g < padded / m->group; g++) as_whole_numbers(x, g, m->group);
        return;
    }
#endif
    for (int64_t g = 0; m->row_scales && g < padded / m->group; g++) {
        float sum = 0;
        for (int i = 0; i < m->group; i++) sum += x->wide[g * m->group + i];
        x->total[g] = sum;
    }
}

INLINE void rows_of(const Matrix *m, int64_t row, int rows, const Vector *x, int batch,
                    float out[ROWS][BATCH]) {
    const float *wide[BATCH];
    for (int b = 0; b < batch; b++) wide[b] = x[b].wide;
    if (m->kind == FLOAT32)
        tile_float32((const float *)m->weights + row * m->columns, m->columns, wide, rows, batch, out);
    else if (m->kind == FLOAT16)
        tile_float16((const uint16_t *)m->weights + row * m->columns, m->columns, wide, rows, batch,
                     out);
    else {
        const uint16_t *w = (const uint16_t *)m->weights + row * m->columns;
#if defined(__AVX512BF16__)
        const uint16_t *half[BATCH];
        for (int b = 0; b < batch; b++) half[b] = x[b].half;
        tile_pairs(w, m->columns, half, rows, batch, out);
#else
        tile_bfloat16(w, m->columns, wide, rows, batch, out);
#endif
    }
}

/* Rows first … last - 1 times `batch` prepared vectors: out[b * stride + row]. Kernels exist for 1, 2,
 * 4 and BATCH vectors; of a number between, those that are too many are computed and dropped, so `x`
 * has room for whole BATCHes. */
static void multiply(const Matrix *m, int64_t first, int64_t last, const Vector *x, int batch,
                     float *out, int64_t stride) {
    for (int done = 0; done < batch; done += BATCH) {
        int some = batch - done < BATCH ? batch - done : BATCH;
        const Vector *here = x + done;
        float *to = out + done * stride;
#define FOR_EACH_NUMBER(DO)        \
    if (some == 1) { DO(1); }      \
    else if (some == 2) { DO(2); } \
    else if (some <= 4) { DO(4); } \
    else { DO(BATCH); }
        if (bits_of(m)) {
            int64_t groups = (m->columns + m->group - 1) / m->group;
            for (int64_t row = first / TILE * TILE; row < last; row += TILE) {
                float tile[TILE][BATCH];
                Tile t = {(const uint8_t *)m->weights + row * row_bytes(m),
                          (const uint8_t *)m->scales + row * groups * 2, m->row_scales, groups, m->group};
                if (m->row_scales) t.row_scales += row * 2;
#define QUANTISED(B)                                                     \
    if (m->kind == INT8) tile_quantised(&t, m, here, B, 8, tile);         \
    else if (m->kind == INT6) tile_quantised(&t, m, here, B, 6, tile);    \
    else tile_quantised(&t, m, here, B, 4, tile)
                FOR_EACH_NUMBER(QUANTISED)
                for (int64_t r = row < first ? first : row; r < row + TILE && r < last; r++)
                    for (int b = 0; b < some; b++) to[b * stride + r] = tile[r - row][b];
            }
            continue;
        }
        int at_once = some == 1 ? 1 : ROWS;
        for (int64_t row = first; row < last; row += at_once) {
            int rows = last - row < at_once ? (int)(last - row) : at_once;
            float tile[ROWS][BATCH];
#define STORED(B)                                                                \
    if (B > 1 && rows == ROWS) rows_of(m, row, ROWS, here, B, tile);             \
    else rows_of(m, row, 1, here, B, tile)
            FOR_EACH_NUMBER(STORED)
            for (int r = 0; r < rows; r++)
                for (int b = 0; b < some; b++) to[b * stride + row + r] = tile[r][b];
        }
    }
}

#endif
