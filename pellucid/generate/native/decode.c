/* One step of a Llama or GPT-2: a few tokens per row in, logits out, the KV cache grown by them.
 *
 *   embed ─┬─ norm ─ q k v ─┃─ attention ─┃─ o ─ + ─┃─┬─ norm ─ gate up ─┃─ down ─ + ─┃─ … ─ norm ─ unembed
 *          └────────────────────────────────────────┘ └────────────────────────────────┘
 *
 * All threads run all of it; at each ┃ they wait for one another. Between two of them the rows of a
 * matrix, or the heads, are handed out in pieces. Weights and cache are the tensors PyTorch holds:
 * nothing is copied. Activations are float32 here, rounded to the model's dtype wherever the PyTorch
 * code rounds, so both paths differ only in the order of their sums.
 *
 * Plain C with pthreads; knows nothing of Python or PyTorch.
 */
#include "kernels.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { GELU_TANH, GELU_COMPOSED, GELU_ERF };
enum { MOST = 64, SPINS = 1 << 14 };
enum { CACHED = 1 << 18, AHEAD = 1 << 17 }; /* bytes: a piece that several vectors pass; read while waiting */

/* What a step records for whoever traces it, in the order of _LEAVES in recording.py. */
enum { RESID_PRE, ATTN_NORM, Q, K, V, Q_ROTATED, K_ROTATED, Z, ATTN_OUT, RESID_MID, MLP_NORM,
       GATE, UP, ACT, HIDDEN, MLP_OUT, RESID_POST, LEAVES };

typedef struct {
    Matrix q, k, v, o, gate, up, down; /* GPT-2 has no gate: `up` is its `mlp.up_proj` */
    const float *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias; /* (width) */
} Layer;

typedef struct {
    int32_t n_layers, width, n_heads, n_kv_heads, head_dim, hidden_width, vocab_size;
    int32_t is_llama, dtype, rope_in_x, gelu;
    float norm_eps;
    Matrix embed, unembed;
    const float *pos_embed;          /* (context, width), GPT-2 */
    const float *norm, *norm_bias;   /* (width) */
    const float *cos, *sin;          /* (context, head_dim / 2), Llama */
    const Layer *layers;
} Model;

typedef struct {
    int32_t batch, length;    /* tokens in all, at most MOST, and of one row: batch / length rows */
    const int64_t *tokens;    /* (rows, length) */
    const int32_t *starts;    /* (rows) padding before each row */
    int64_t seen, capacity;   /* tokens in the cache before this step, and its room */
    void *const *keys, *const *values; /* per layer (rows, n_kv_heads, capacity, head_dim), model's dtype */
    float *logits;            /* (rows, vocab_size) after each row's last token, or NULL */
    float *const *recorded;   /* LEAVES pointers to (n_layers, batch, that leaf's width), or NULL */
    float *embedded, *final;  /* (batch, width), if recorded */
} Step;

typedef struct {
    Vector *x;       /* (MOST) this thread's own inputs of a product */
    float *scores;   /* (score_room) */
    int64_t score_room;
    int64_t phase, from, to; /* the piece of a phase this thread is at */
} Scratch;

typedef struct Decoder {
    const Model *model; /* the caller's: its pointers may move between two steps */
    int n_threads;
    pthread_t *threads;
    Scratch *scratch;                 /* per thread */
    float *stream, *q, *z, *out, *hidden, *gate, *kv; /* (MOST, …) shared */
    const Step *step;
    atomic_int arrived, generation, begun, ended;
    atomic_llong *handed;             /* per phase: units handed out */
    int n_phases;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} Decoder;

/* ── Threads ──────────────────────────────────────────────────────────────────────────────────── */

static void pause_briefly(int spins) {
    if (spins % 1024 == 1023) sched_yield(); /* more threads than free cores */
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait for the other threads; until they come, this thread's first rows of the next product, which
 * lie from `next` on, are on their way from memory. */
static void meet(Decoder *d, const char *next) {
    int now = atomic_load(&d->generation);
    if (atomic_fetch_add(&d->arrived, 1) == d->n_threads - 1) {
        atomic_store(&d->arrived, 0);
        atomic_store(&d->generation, now + 1);
        return;
    }
    int64_t read = 0;
    for (int i = 0; atomic_load_explicit(&d->generation, memory_order_acquire) == now; i++)
        if (next && read < AHEAD) __builtin_prefetch(next + read, 0, 2), read += 64;
        else pause_briefly(i);
}

/* Every thread begins a phase of `count` units with a share of its own, half of what would be fair: it
 * lies in one place, and the thread knows it before the phase begins. */
static int64_t own_share(const Decoder *d, int64_t count, int64_t least) {
    return count / (2 * d->n_threads) / least * least;
}

/* This thread's next piece [first, last) of a phase, in whole `least`s; false when all are handed out.
 * After its own share come pieces of what is left, large ones first, so that the threads are done
 * together; none larger than `most`. */
static int next_piece(Decoder *d, int phase, int thread, int64_t count, int64_t least, int64_t most,
                      int64_t *first, int64_t *last) {
    Scratch *mine = &d->scratch[thread];
    int64_t own = own_share(d, count, least), shared = own * d->n_threads;
    if (mine->phase != phase) mine->phase = phase, mine->from = own * thread, mine->to = own * (thread + 1);
    while (mine->from == mine->to) { /* the share is done: take from what is left */
        int64_t begin = atomic_load(&d->handed[phase]), left = count - shared - begin;
        if (left <= 0) return 0;
        int64_t piece = left / (2 * d->n_threads) / least * least;
        piece = piece < least ? least : piece;
        piece = piece < left ? piece : left;
        if (!atomic_compare_exchange_weak(&d->handed[phase], &begin, begin + piece)) continue;
        mine->from = shared + begin, mine->to = shared + begin + piece;
    }
    *first = mine->from;
    *last = mine->from = *first + most < mine->to ? *first + most : mine->to;
    return 1;
}

/* Rows of a matrix in pieces. One batch of vectors passes a piece once; more pass it again and again, so
 * it must stay in the core's cache. */
static int next_rows(Decoder *d, int phase, int thread, const Matrix *m, int64_t count, int64_t *first,
                     int64_t *last) {
    int64_t most = CACHED / (m->columns * 2) / TILE * TILE;
    if (d->step->batch <= BATCH) most = count;
    return next_piece(d, phase, thread, count, TILE, most < TILE ? TILE : most, first, last);
}

/* Where this thread's share of a product over `count` rows begins in memory; NULL beyond the matrix. */
static const char *share_of(const Decoder *d, int thread, const Matrix *m, int64_t count, int64_t least) {
    int64_t row = own_share(d, count, least) * thread;
    return row < m->rows ? (const char *)m->weights + row_bytes(m) * row : NULL;
}

/* ── Arithmetic that is not a product ─────────────────────────────────────────────────────────── */

INLINE float rounded(int dtype, float x) {
    return dtype == FLOAT32 ? x : dtype == BFLOAT16 ? from_bfloat16(to_bfloat16(x))
                                                    : from_float16(to_float16(x));
}

static void rms_norm(const Model *m, const float *x, const float *weight, float *out) {
    double squares = 0;
    for (int i = 0; i < m->width; i++) squares += (double)x[i] * x[i];
    float scale = 1.0f / sqrtf((float)(squares / m->width) + m->norm_eps);
    for (int i = 0; i < m->width; i++)
        out[i] = rounded(m->dtype, rounded(m->dtype, x[i] * scale) * weight[i]);
}

static void layer_norm(const Model *m, const float *x, const float *weight, const float *bias, float *out) {
    double sum = 0, squares = 0;
    for (int i = 0; i < m->width; i++) sum += x[i];
    float mean = (float)(sum / m->width);
    for (int i = 0; i < m->width; i++) squares += (double)(x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf((float)(squares / m->width) + m->norm_eps);
    for (int i = 0; i < m->width; i++)
        out[i] = rounded(m->dtype, (x[i] - mean) * scale * weight[i] + bias[i]);
}

static void normalise(const Model *m, const float *x, const float *weight, const float *bias, float *out) {
    if (m->is_llama) rms_norm(m, x, weight, out);
    else layer_norm(m, x, weight, bias, out);
}

INLINE v silu(v x) { return x / (1.0f + exponential(-x)); }

/* 0.5 x (1 + tanh(u)) is x / (1 + e^-2u); the second form has nothing to cancel. */
INLINE v gelu_tanh(v x) {
    v u = 0.79788456080286536f * (x + 0.044715f * x * x * x); /* sqrt(2 / π) */
    return x / (1.0f + exponential(-2.0f * u));
}

/* The other forms: exact, and composed of operations that each round to the model's dtype. */
static float gelu(const Model *m, float x) {
    int t = m->dtype;
    if (m->gelu == GELU_ERF) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    float cube = rounded(t, x * x * x);
    float inner = rounded(t, 0.79788456080286536f * rounded(t, x + rounded(t, 0.044715f * cube)));
    return rounded(t, 0.5f * x) * rounded(t, 1.0f + rounded(t, tanhf(inner)));
}

/* Turn the pairs (i, i + head_dim / 2) of one head by the angles of a position. */
static void rotate(const Model *m, float *x, int64_t position) {
    int half = m->head_dim / 2, t = m->dtype;
    const float *cos = m->cos + position * half, *sin = m->sin + position * half;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        if (m->rope_in_x) {
            x[i] = rounded(t, rounded(t, a * cos[i]) - rounded(t, b * sin[i]));
            x[i + half] = rounded(t, rounded(t, b * cos[i]) + rounded(t, a * sin[i]));
        } else {
            x[i] = rounded(t, a * cos[i] - b * sin[i]);
            x[i + half] = rounded(t, b * cos[i] + a * sin[i]);
        }
    }
}

static void store(int dtype, void *to, int64_t at, const float *x, int n) {
    if (dtype == FLOAT32) memcpy((float *)to + at, x, n * sizeof *x);
    else
        for (int i = 0; i < n; i++)
            ((uint16_t *)to)[at + i] = dtype == BFLOAT16 ? to_bfloat16(x[i]) : to_float16(x[i]);
}

static float at(int dtype, const void *from, int64_t i) {
    return dtype == FLOAT32 ? ((const float *)from)[i]
         : dtype == BFLOAT16 ? from_bfloat16(((const uint16_t *)from)[i])
                             : from_float16(((const uint16_t *)from)[i]);
}

/* Row `row` of a matrix of any kind. */
static void look_up(const Matrix *m, int64_t row, float *out) {
    if (!bits_of(m)) {
        for (int64_t i = 0; i < m->columns; i++) out[i] = at(m->kind, m->weights, row * m->columns + i);
        return;
    }
    int64_t groups = (m->columns + m->group - 1) / m->group, tile = row / TILE, r = row % TILE;
    Levels l = levels_of(bits_of(m), m->group);
    for (int64_t k = 0; k < m->columns; k++) {
        int64_t g = tile * groups + k / m->group;
        int level = level_at((const uint8_t *)m->weights + g * group_bytes(l), l, (int)r, (int)(k % m->group));
        out[k] = level * from_bfloat16(m->scales[g * TILE + r]);
    }
}

/* ── One step, as each thread runs it ─────────────────────────────────────────────────────────── */

static void record(Decoder *d, int leaf, int layer, int64_t width, int row, int64_t place,
                   const float *x, int64_t n) {
    const Step *s = d->step;
    if (s->recorded)
        memcpy(s->recorded[leaf] + (layer * s->batch + row) * width + place, x, n * sizeof *x);
}

static int row_of(const Step *s, int b) { return b / s->length; }

/* Column of the cache that token b of the step goes to, and its position in its own text. */
static int64_t column_of(const Step *s, int b) { return s->seen + b % s->length; }

static int64_t position_of(const Step *s, int b) {
    int64_t position = column_of(s, b) - s->starts[row_of(s, b)];
    return position > 0 ? position : 0; /* padding, which nobody looks at */
}

static void add_bias(const Model *m, const Matrix *w, int64_t first, int64_t last, float *out) {
    for (int64_t r = first; r < last; r++) out[r] = rounded(m->dtype, out[r] + (w->bias ? w->bias[r] : 0));
}

/* Head `unit` of q, k and v side by side: project, rotate, and put k and v into the cache. */
static void project_head(Decoder *d, int layer, int unit, const Vector *x) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    int D = m->head_dim, kind = unit < m->n_heads ? 0 : unit < m->n_heads + m->n_kv_heads ? 1 : 2;
    int head = unit - (kind > 0) * m->n_heads - (kind > 1) * m->n_kv_heads;
    const Matrix *w = kind == 0 ? &l->q : kind == 1 ? &l->k : &l->v;
    int64_t width = (int64_t)(kind ? m->n_kv_heads : m->n_heads) * D;
    float *to = kind == 0 ? d->q : d->kv + (kind - 1) * MOST * (int64_t)m->n_kv_heads * D;
    multiply(w, (int64_t)head * D, (int64_t)(head + 1) * D, x, s->batch, to, width);
    for (int b = 0; b < s->batch; b++) {
        float *mine = to + b * width + (int64_t)head * D;
        add_bias(m, w, (int64_t)head * D, (int64_t)(head + 1) * D, to + b * width);
        record(d, kind == 0 ? Q : kind == 1 ? K : V, layer, width, b, (int64_t)head * D, mine, D);
        if (kind < 2 && m->is_llama) {
            rotate(m, mine, position_of(s, b));
            record(d, kind ? K_ROTATED : Q_ROTATED, layer, width, b, (int64_t)head * D, mine, D);
        }
        if (kind)
            store(m->dtype, kind == 1 ? s->keys[layer] : s->values[layer],
                  (((int64_t)row_of(s, b) * m->n_kv_heads + head) * s->capacity + column_of(s, b)) * D,
                  mine, D);
    }
}

/* One query head of one token looks at all tokens from its row's start to itself. */
static void attend(Decoder *d, int layer, int b, int head, Scratch *mine) {
    const Model *m = d->model;
    const Step *s = d->step;
    int D = m->head_dim, kv_head = head / (m->n_heads / m->n_kv_heads), row = row_of(s, b);
    int64_t start = s->starts[row], width = (int64_t)m->n_heads * D;
    if (start > column_of(s, b)) start = column_of(s, b); /* padding looks at itself */
    int64_t n = column_of(s, b) + 1 - start;
    int64_t base = (((int64_t)row * m->n_kv_heads + kv_head) * s->capacity + start) * D;
    int size = m->dtype == FLOAT32 ? 4 : 2;
    const char *values = (const char *)s->values[layer] + base * size;
    Matrix keys = {.weights = (const char *)s->keys[layer] + base * size, .rows = n, .columns = D, .kind = m->dtype};
    Vector *q = &mine->x[0];
    memcpy(q->wide, d->q + b * width + (int64_t)head * D, D * sizeof(float));
    prepare(&keys, q);
    multiply(&keys, 0, n, q, 1, mine->scores, n);
    float most = -INFINITY, scale = 1.0f / sqrtf((float)D);
    double total = 0;
    for (int64_t i = 0; i < n; i++) most = mine->scores[i] > most ? mine->scores[i] : most;
    for (int64_t i = 0; i < n; i++) mine->scores[i] = (mine->scores[i] - most) * scale;
    EACH_VECTOR(mine->scores, n, exponential)
    for (int64_t i = 0; i < n; i++) total += mine->scores[i];
    for (int64_t i = 0; i < n; i++) mine->scores[i] = (float)(mine->scores[i] / total);
    float *z = d->z + b * width + (int64_t)head * D;
    int whole = D / LANES * LANES;
    for (int j = 0; j < whole; j += LANES) {
        v sums[4] = {{0}}; /* short sums round less than one long one, and need not wait in line */
        for (int64_t i = 0; i < n; i++) {
            int64_t place = i * D + j;
            v value = m->dtype == FLOAT32 ? load_float32((const float *)values + place)
                    : m->dtype == BFLOAT16 ? load_bfloat16((const uint16_t *)values + place)
                                           : load_float16((const uint16_t *)values + place);
            sums[i % 4] += value * mine->scores[i];
        }
        v sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        memcpy(z + j, &sum, sizeof sum);
    }
    for (int j = whole; j < D; j++) { /* the end of a head that LANES does not divide */
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += mine->scores[i] * at(m->dtype, values, i * D + j);
        z[j] = (float)sum;
    }
    for (int j = 0; j < D; j++) z[j] = rounded(m->dtype, z[j]);
    record(d, Z, layer, width, b, (int64_t)head * D, z, D);
}

/* Rows of gate and up, and what becomes of them. */
static void mlp_rows(Decoder *d, int layer, int64_t first, int64_t last, const Vector *x) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    int64_t F = m->hidden_width, n = last - first;
    if (m->is_llama) multiply(&l->gate, first, last, x, s->batch, d->gate, F);
    multiply(&l->up, first, last, x, s->batch, d->hidden, F);
    for (int b = 0; b < s->batch; b++) {
        float *gate = d->gate + b * F, *up = d->hidden + b * F;
        add_bias(m, &l->up, first, last, up);
        record(d, UP, layer, F, b, first, up + first, n);
        if (m->is_llama) add_bias(m, &l->gate, first, last, gate);
        else memcpy(gate + first, up + first, n * sizeof *up);
        record(d, GATE, layer, F, b, first, gate + first, n);
        if (m->is_llama) EACH_VECTOR(gate + first, n, silu)
        else if (m->gelu == GELU_TANH) EACH_VECTOR(gate + first, n, gelu_tanh)
        else for (int64_t i = first; i < last; i++) gate[i] = gelu(m, gate[i]);
        for (int64_t i = first; i < last; i++) gate[i] = rounded(m->dtype, gate[i]);
        record(d, ACT, layer, F, b, first, gate + first, n);
        for (int64_t i = first; i < last; i++)
            up[i] = m->is_llama ? rounded(m->dtype, gate[i] * up[i]) : gate[i];
        record(d, HIDDEN, layer, F, b, first, up + first, n);
    }
}

/* Rows of a product that is added to the residual stream. */
static void add_rows(Decoder *d, int layer, const Matrix *w, int64_t first, int64_t last, const Vector *x,
                     int leaf, int after) {
    const Model *m = d->model;
    const Step *s = d->step;
    multiply(w, first, last, x, s->batch, d->out, m->width);
    for (int b = 0; b < s->batch; b++) {
        float *out = d->out + (int64_t)b * m->width, *stream = d->stream + (int64_t)b * m->width;
        add_bias(m, w, first, last, out);
        record(d, leaf, layer, m->width, b, first, out + first, last - first);
        for (int64_t r = first; r < last; r++) stream[r] = rounded(m->dtype, stream[r] + out[r]);
        record(d, after, layer, m->width, b, first, stream + first, last - first);
    }
}

static void inputs_from(Decoder *d, const Matrix *w, const float *from, Vector *x) {
    for (int b = 0; b < d->step->batch; b++) {
        memcpy(x[b].wide, from + b * w->columns, w->columns * sizeof(float));
        prepare(w, &x[b]);
    }
}

static void normalised(Decoder *d, const Matrix *w, const float *weight, const float *bias, Vector *x,
                       int leaf, int layer, int thread) {
    const Model *m = d->model;
    for (int b = 0; b < d->step->batch; b++) {
        normalise(m, d->stream + (int64_t)b * m->width, weight, bias, x[b].wide);
        if (thread == 0 && leaf >= 0) record(d, leaf, layer, m->width, b, 0, x[b].wide, m->width);
        prepare(w, &x[b]);
    }
}

/* A matrix of another kind than the one the inputs were prepared for, when only some are quantised. */
static void prepare_again(Decoder *d, const Matrix *before, const Matrix *now, Vector *x) {
    if (before->kind == now->kind && before->group == now->group && before->exact == now->exact) return;
    for (int b = 0; b < d->step->batch; b++) prepare(now, &x[b]);
}

static void attention(Decoder *d, int layer, int phase, int thread) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    Scratch *mine = &d->scratch[thread];
    Vector *x = mine->x;
    const char *next = share_of(d, thread, &l->o, m->width, TILE);
    int64_t first, last, all = m->n_heads + 2 * m->n_kv_heads;
    normalised(d, &l->q, l->attn_norm, l->attn_norm_bias, x, ATTN_NORM, layer, thread);
    if (thread == 0)
        for (int b = 0; b < s->batch; b++)
            record(d, RESID_PRE, layer, m->width, b, 0, d->stream + (int64_t)b * m->width, m->width);
    const Matrix *before = &l->q;
    while (next_piece(d, phase, thread, all, 1, all, &first, &last))
        for (int64_t unit = first; unit < last; unit++) {
            const Matrix *now = unit < m->n_heads ? &l->q : unit < m->n_heads + m->n_kv_heads ? &l->k : &l->v;
            prepare_again(d, before, now, x);
            before = now;
            project_head(d, layer, (int)unit, x);
        }
    meet(d, next);
    all = (int64_t)s->batch * m->n_heads;
    while (next_piece(d, phase + 1, thread, all, 1, all, &first, &last))
        for (int64_t unit = first; unit < last; unit++)
            attend(d, layer, (int)(unit / m->n_heads), (int)(unit % m->n_heads), mine);
    meet(d, next);
    inputs_from(d, &l->o, d->z, x);
    while (next_rows(d, phase + 2, thread, &l->o, m->width, &first, &last))
        add_rows(d, layer, &l->o, first, last, x, ATTN_OUT, RESID_MID);
    meet(d, share_of(d, thread, m->is_llama ? &l->gate : &l->up, m->hidden_width, TILE));
}

static void mlp(Decoder *d, int layer, int phase, int thread) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer], *after = layer + 1 < m->n_layers ? l + 1 : NULL;
    Vector *x = d->scratch[thread].x;
    int64_t first, last, heads = m->n_heads + 2 * m->n_kv_heads;
    normalised(d, &l->up, l->mlp_norm, l->mlp_norm_bias, x, MLP_NORM, layer, thread);
    while (next_rows(d, phase, thread, &l->up, m->hidden_width, &first, &last))
        mlp_rows(d, layer, first, last, x);
    meet(d, share_of(d, thread, &l->down, m->width, TILE));
    inputs_from(d, &l->down, d->hidden, x);
    while (next_rows(d, phase + 1, thread, &l->down, m->width, &first, &last))
        add_rows(d, layer, &l->down, first, last, x, MLP_OUT, RESID_POST);
    meet(d, after ? share_of(d, thread, &after->q, heads * m->head_dim, m->head_dim)
                  : share_of(d, thread, &m->unembed, m->vocab_size, TILE));
}

static void run(Decoder *d, int thread) {
    const Model *m = d->model;
    const Step *s = d->step;
    Vector *x = d->scratch[thread].x;
    int phase = 0;
    int64_t first, last;
    d->scratch[thread].phase = -1;
    for (int layer = 0; layer < m->n_layers; layer++, phase += 5) {
        attention(d, layer, phase, thread);
        mlp(d, layer, phase + 3, thread);
    }
    if (s->logits == NULL) return;
    int rows = s->batch / s->length;
    for (int row = 0; row < rows; row++) {
        const float *stream = d->stream + ((int64_t)(row + 1) * s->length - 1) * m->width;
        normalise(m, stream, m->norm, m->norm_bias, x[row].wide);
        if (thread == 0 && s->final) memcpy(s->final + (int64_t)row * m->width, x[row].wide, m->width * sizeof(float));
        prepare(&m->unembed, &x[row]);
    }
    while (next_rows(d, phase, thread, &m->unembed, m->vocab_size, &first, &last)) {
        multiply(&m->unembed, first, last, x, rows, s->logits, m->vocab_size);
        for (int row = 0; row < rows; row++)
            add_bias(m, &m->unembed, first, last, s->logits + (int64_t)row * m->vocab_size);
    }
    meet(d, NULL);
}

static void embed(Decoder *d) {
    const Model *m = d->model;
    const Step *s = d->step;
    for (int b = 0; b < s->batch; b++) {
        float *x = d->stream + (int64_t)b * m->width;
        look_up(&m->embed, s->tokens[b], x);
        for (int i = 0; i < m->width; i++) x[i] = rounded(m->dtype, x[i]);
        if (s->embedded) memcpy(s->embedded + (int64_t)b * m->width, x, m->width * sizeof *x);
        if (m->is_llama) continue;
        const float *place = m->pos_embed + position_of(s, b) * m->width;
        for (int i = 0; i < m->width; i++) x[i] = rounded(m->dtype, x[i] + place[i]);
    }
}

/* ── The door ─────────────────────────────────────────────────────────────────────────────────── */

typedef struct {
    Decoder *decoder;
    int thread;
} Worker;

static void *work(void *given) {
    Worker worker = *(Worker *)given;
    Decoder *d = worker.decoder;
    free(given);
    for (int done = 0;;) {
        for (int i = 0; i < SPINS && atomic_load(&d->begun) == done && !atomic_load(&d->ended); i++)
            pause_briefly(i);
        pthread_mutex_lock(&d->lock); /* nothing to do for a while: sleep */
        while (atomic_load(&d->begun) == done && !atomic_load(&d->ended))
            pthread_cond_wait(&d->wake, &d->lock);
        pthread_mutex_unlock(&d->lock);
        if (atomic_load(&d->ended)) return NULL;
        done++;
        run(d, worker.thread);
    }
}

static void *zeroed(int64_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (memory) memset(memory, 0, (bytes + 127) / 64 * 64);
    return memory;
}

/* Memory that nobody touches before `prepare` writes it costs nothing. */
static void open_vectors(Vector *x, int count, int64_t wide) {
    wide = (wide + 63) / 64 * 64;
    for (int b = 0; b < count; b++) {
        x[b].wide = aligned_alloc(64, wide * 4), x[b].half = aligned_alloc(64, wide * 2);
        x[b].high = aligned_alloc(64, wide), x[b].low = aligned_alloc(64, wide);
        x[b].step = aligned_alloc(64, wide * 4), x[b].sum = aligned_alloc(64, wide * 4);
    }
}

static void close_vectors(Vector *x, int count) {
    for (int b = 0; b < count; b++) {
        free(x[b].wide), free(x[b].half), free(x[b].high);
        free(x[b].low), free(x[b].step), free(x[b].sum);
    }
}

static int64_t widest(const Model *m) {
    int64_t most = m->width, heads = (int64_t)m->n_heads * m->head_dim;
    most = heads > most ? heads : most;
    return (m->hidden_width > most ? m->hidden_width : most) + 1024; /* room for a padded group */
}

/* Which of the kernels this library was compiled with. */
const char *pellucid_instructions(void) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    return "avx512-bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "baseline";
#endif
}

void pellucid_close(Decoder *d) {
    pthread_mutex_lock(&d->lock);
    atomic_store(&d->ended, 1);
    pthread_cond_broadcast(&d->wake);
    pthread_mutex_unlock(&d->lock);
    for (int t = 1; t < d->n_threads; t++) pthread_join(d->threads[t], NULL);
    for (int t = 0; t < d->n_threads; t++) {
        close_vectors(d->scratch[t].x, MOST);
        free(d->scratch[t].x), free(d->scratch[t].scores);
    }
    free(d->stream), free(d->q), free(d->z), free(d->out), free(d->hidden), free(d->gate), free(d->kv);
    free(d->scratch), free(d->threads), free(d->handed), free(d);
}

/* `model` and what it points to must stay until `pellucid_close`; between two steps its matrices may
 * be moved, and their pointers changed. */
Decoder *pellucid_open(const Model *model, int n_threads) {
    Decoder *d = zeroed(sizeof *d);
    d->model = model;
    d->n_threads = n_threads;
    d->n_phases = 5 * model->n_layers + 1;
    d->handed = zeroed(d->n_phases * sizeof *d->handed);
    d->threads = zeroed(n_threads * sizeof *d->threads);
    d->scratch = zeroed(n_threads * sizeof *d->scratch);
    int64_t wide = widest(model), head_rows = (int64_t)MOST * model->n_heads * model->head_dim;
    for (int t = 0; t < n_threads; t++) {
        Vector *x = d->scratch[t].x = zeroed(MOST * sizeof *x);
        open_vectors(x, MOST, wide);
    }
    d->stream = zeroed((int64_t)MOST * model->width * 4);
    d->out = zeroed((int64_t)MOST * model->width * 4);
    d->hidden = zeroed((int64_t)MOST * model->hidden_width * 4);
    d->gate = zeroed((int64_t)MOST * model->hidden_width * 4);
    d->q = zeroed(head_rows * 4), d->z = zeroed(head_rows * 4), d->kv = zeroed(2 * head_rows * 4);
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->wake, NULL);
    for (int t = 1; t < n_threads; t++) {
        Worker *worker = malloc(sizeof *worker);
        *worker = (Worker){d, t};
        pthread_create(&d->threads[t], NULL, work, worker);
    }
    return d;
}

/* One step. One call at a time. */
void pellucid_step(Decoder *d, const Step *step) {
    for (int t = 0; t < d->n_threads; t++) {
        Scratch *scratch = &d->scratch[t];
        int64_t needed = step->seen + step->length;
        if (scratch->score_room >= needed) continue;
        free(scratch->scores);
        scratch->score_room = 2 * needed + 256;
        scratch->scores = zeroed(scratch->score_room * 4);
    }
    for (int phase = 0; phase < d->n_phases; phase++) atomic_store(&d->handed[phase], 0);
    d->step = step;
    embed(d);
    pthread_mutex_lock(&d->lock);
    atomic_fetch_add(&d->begun, 1);
    pthread_cond_broadcast(&d->wake);
    pthread_mutex_unlock(&d->lock);
    run(d, 0);
}

/* One matrix times `batch` vectors (batch, columns) -> out (batch, rows), on this thread. */
void pellucid_multiply(const Matrix *m, const float *x, int batch, float *out) {
    Vector vectors[MOST] = {{0}};
    int room = (batch + BATCH - 1) / BATCH * BATCH;
    open_vectors(vectors, room, m->columns + 1024);
    for (int b = 0; b < batch; b++) {
        memcpy(vectors[b].wide, x + b * m->columns, m->columns * sizeof(float));
        prepare(m, &vectors[b]);
    }
    multiply(m, 0, m->rows, vectors, batch, out, m->rows);
    close_vectors(vectors, room);
}
