/* One step of a decoder (models/decoder.py): a few tokens per row in, logits out, the KV cache grown by them.
 *
 *   embed ─┬─ norm ─ q k v ─┃─ attention ─┃─ o ─ + ─┃─┬─ norm ─ gate up ─┃─ down ─ + ─┃─ … ─ norm ─ unembed
 *          └────────────────────────────────────────┘ └────────────────────────────────┘
 *
 * All threads run all of it; at each ┃ they wait for one another. Between two of them the rows of a
 * matrix, or the heads, are handed out in pieces. Weights and cache are the tensors PyTorch holds:
 * nothing is copied. Activations are float32 here, rounded to the model's dtype wherever the PyTorch
 * code rounds, so both paths differ only in the order of their sums.
 *
 * In what models differ stands in `Model` and `Layer`: a NULL pointer is a part that a model has not.
 * What is decided by them is decided once per layer, head or piece, never within a loop over numbers.
 *
 * Plain C with pthreads; knows nothing of Python or PyTorch.
 */
#include "kernels.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SILU, GELU_TANH, GELU_COMPOSED, GELU_ERF, RELU_SQUARED };
enum { RMS, RMS_WIDE, LAYER }; /* WIDE: times the weight before the result is rounded */
enum { QUERIES, KEYS, VALUES };
enum { PROJECT, NORM_WHOLE, ATTEND, ADD_ATTENTION, GATE_AND_UP, ADD_MLP, PHASES }; /* of a layer */
enum { MOST = 64, SPINS = 1 << 14, BLOCK = 64 }; /* BLOCK: tokens of a piece of a cache, see paged.py */
enum { CACHED = 1 << 18, AHEAD = 1 << 17 }; /* bytes: a piece that several vectors pass; read while waiting */

/* What a step records for a trace, in the order of LEAVES in recording.py. */
enum { EMBED, EMBED_NORMED, EMBED_SCALED, RESID_PRE, ATTN_NORM, Q, K, V, Q_NORMED, K_NORMED, Q_ROTATED,
       K_ROTATED, Q_SCALED, Z, ATTN_PRODUCT, ATTN_OUT, RESID_MID, MLP_NORM, PRE, GATE, UP, ACT, HIDDEN, MLP_PRODUCT,
       MLP_OUT, RESID_POST, FINAL_NORM, RAW_LOGITS, LEAVES };

typedef struct {
    const float *weight, *bias; /* ones and zeros where the model has none */
    int32_t kind;
} Norm;

typedef struct {
    const float *cos, *sin;           /* (positions, width / 2) */
    const float *long_cos, *long_sin; /* of texts of more tokens than `original`, or NULL */
    int64_t original;
    int32_t width; /* how many components of a head are turned, the first ones */
} Rope;

typedef struct {
    Matrix q, k, v, o, gate, up, down;            /* without weights in `gate`: down(act(up)) */
    const Norm *attn_norm, *attn_out_norm, *mlp_norm, *mlp_out_norm; /* before and after, or NULL */
    const Norm *q_norm, *k_norm;                  /* one, or one for each head, or NULL */
    const Rope *rope;                             /* NULL: queries and keys are not turned */
    const float *sinks;                           /* (n_heads) or NULL */
    int64_t window;                               /* tokens in view, itself included; 0: all */
} Layer;

typedef struct {
    int32_t n_layers, width, n_heads, n_kv_heads, head_dim, hidden_width, vocab_size;
    int32_t dtype, activation;
    int32_t rope_in_x;                   /* RoPE rounds each product to dtype */
    int32_t qk_norm_whole, qk_norm_last; /* all heads together; after RoPE */
    int32_t qk_norm_each;                /* a Norm for each head, in their order */
    int32_t parallel;                    /* attention and MLP read the same normed stream */
    float norm_eps, qkv_clip, score_scale, score_cap;              /* clip, caps: 0 for none */
    float embed_scale, residual_scale, logit_scale, logit_cap;     /* scales: 1 for none */
    Matrix embed, unembed;
    const float *pos_embed;        /* (context, width) or NULL */
    const float *query_growth;     /* (positions) factors on queries, or NULL */
    const Norm *embed_norm, *norm; /* the first one or NULL */
    const Layer *layers;
} Model;

typedef struct {
    int32_t first, length;    /* its tokens in this step: from `first` on, so many */
    int64_t start;            /* padding before it in its cache */
    int64_t seen, capacity;   /* tokens in its cache before this step, and the cache's room */
    int64_t end;              /* tokens in its cache after the pass of which this step is a part */
    char *const *blocks;      /* each (layers, 2, n_kv_heads, BLOCK, head_dim), or NULL: keys and values lie in one piece */
} Row; /* a text that this step makes longer; each has a cache of its own length */

typedef struct {
    int32_t batch, rows;      /* tokens in all, at most MOST, of so many rows */
    const int64_t *tokens;    /* (batch): those of row 0, of row 1, … */
    const int32_t *row_of;    /* (batch) */
    const Row *row;           /* (rows) */
    void *const *keys, *const *values;  /* (layers, rows) each (n_kv_heads, capacity, head_dim), of rows without blocks */
    float *logits;            /* (rows, vocab_size) after each row's last token, or NULL */
    float *const *recorded;   /* LEAVES pointers to (layers, batch, that leaf's width) or NULL; or NULL */
} Step;

typedef struct {
    Vector *x;       /* (MOST) this thread's own inputs of a product */
    float *stream;   /* (MOST, width) the shared one; a copy of its own where a norm comes before + */
    float *scores;   /* (score_room): of each head that attends at a time */
    v *sums;         /* (BATCH, head_dim / LANES, 4) of values */
    int64_t score_room;
    int64_t phase, from, to; /* the piece of a phase this thread is at */
} Scratch;

typedef struct Decoder {
    const Model *model; /* the caller's: its pointers may move between two steps */
    int n_threads;
    pthread_t *threads;
    Scratch *scratch;                 /* per thread */
    float *stream, *q, *k, *v, *z, *out, *hidden, *gate; /* (MOST, …) shared */
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

static void rms_norm(const Model *m, const Norm *norm, int n, const float *x, float *out) {
    const float *weight = norm->weight;
    double squares = 0;
    for (int i = 0; i < n; i++) squares += (double)x[i] * x[i];
    float scale = 1.0f / sqrtf((float)(squares / n) + m->norm_eps);
    if (norm->kind == RMS_WIDE)
        for (int i = 0; i < n; i++) out[i] = rounded(m->dtype, x[i] * scale * weight[i]);
    else
        for (int i = 0; i < n; i++)
            out[i] = rounded(m->dtype, rounded(m->dtype, x[i] * scale) * weight[i]);
}

static void layer_norm(const Model *m, const Norm *norm, int n, const float *x, float *out) {
    const float *weight = norm->weight, *bias = norm->bias;
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    float mean = (float)(sum / n);
    for (int i = 0; i < n; i++) squares += (double)(x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf((float)(squares / n) + m->norm_eps);
    for (int i = 0; i < n; i++)
        out[i] = rounded(m->dtype, (x[i] - mean) * scale * weight[i] + bias[i]);
}

/* n numbers, normalised; `out` may be `x`. */
static void normalise(const Model *m, const Norm *norm, int n, const float *x, float *out) {
    if (norm->kind == LAYER) layer_norm(m, norm, n, x, out);
    else rms_norm(m, norm, n, x, out);
}

static void scale_by(const Model *m, float factor, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = rounded(m->dtype, x[i] * factor);
}

INLINE v silu(v x) { return x / (1.0f + exponential(-x)); }

/* 0.5 x (1 + tanh(u)) is x / (1 + e^-2u); the second form has nothing to cancel. */
INLINE v gelu_tanh(v x) {
    v u = 0.79788456080286536f * (x + 0.044715f * x * x * x); /* sqrt(2 / π) */
    return x / (1.0f + exponential(-2.0f * u));
}

INLINE v relu_squared(v x) {
    v cut = (v)((vi)x & (x > 0));
    return cut * cut;
}

/* The other forms: exact, and composed of operations that each round to the model's dtype. */
static float gelu(const Model *m, float x) {
    int t = m->dtype;
    if (m->activation == GELU_ERF) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    float cube = rounded(t, x * x * x);
    float inner = rounded(t, 0.79788456080286536f * rounded(t, x + rounded(t, 0.044715f * cube)));
    return rounded(t, 0.5f * x) * rounded(t, 1.0f + rounded(t, tanhf(inner)));
}

static void activate(const Model *m, float *x, int64_t n) {
    if (m->activation == SILU) EACH_VECTOR(x, n, silu)
    else if (m->activation == GELU_TANH) EACH_VECTOR(x, n, gelu_tanh)
    else if (m->activation == RELU_SQUARED) EACH_VECTOR(x, n, relu_squared)
    else for (int64_t i = 0; i < n; i++) x[i] = gelu(m, x[i]);
    for (int64_t i = 0; i < n; i++) x[i] = rounded(m->dtype, x[i]);
}

/* Cephes' polynomial near 0, where the other form would cancel. */
INLINE v hyperbolic_tangent(v x) {
    vi sign = (vi)x & (int32_t)0x80000000;
    v size = (v)((vi)x ^ sign), square = x * x;
    v p = -5.70498872745e-3f * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    v near = p * square * x + x, far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    vi is_near = size < (v){0} + 0.625f;
    return (v)(((vi)near & is_near) | (((vi)far | sign) & ~is_near));
}

/* c · tanh(x / c), each operation rounded. */
static void cut_softly(const Model *m, float cap, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = rounded(m->dtype, x[i] / cap);
    EACH_VECTOR(x, n, hyperbolic_tangent)
    for (int64_t i = 0; i < n; i++) x[i] = rounded(m->dtype, rounded(m->dtype, x[i]) * cap);
}

/* Turn the pairs (i, i + width / 2) of one head by the angles of a position in a text of `length` tokens. */
static void rotate(const Model *m, const Rope *rope, float *x, int64_t position, int64_t length) {
    int half = rope->width / 2, t = m->dtype, longer = rope->long_cos && length > rope->original;
    const float *cos = (longer ? rope->long_cos : rope->cos) + position * half;
    const float *sin = (longer ? rope->long_sin : rope->sin) + position * half;
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
        if (!m->row_scales) {
            out[k] = level * from_bfloat16(((const uint16_t *)m->scales)[g * TILE + r]);
            continue;
        }
        const uint8_t *codes = (const uint8_t *)m->scales + 2 * g * TILE;
        const uint16_t *worth = m->row_scales + 2 * tile * TILE;
        out[k] = level * (codes[r] * from_bfloat16(worth[r])) + (codes[TILE + r] - 128) * from_bfloat16(worth[TILE + r]);
    }
}

/* ── One step, as each thread runs it ─────────────────────────────────────────────────────────── */

static void record(Decoder *d, int leaf, int layer, int64_t width, int row, int64_t place,
                   const float *x, int64_t n) {
    const Step *s = d->step;
    if (s->recorded && s->recorded[leaf])
        memcpy(s->recorded[leaf] + (layer * s->batch + row) * width + place, x, n * sizeof *x);
}

static const Row *row_of(const Step *s, int b) { return &s->row[s->row_of[b]]; }

/* Column of the cache that token b of the step goes to, and its position in its own text. */
static int64_t column_of(const Step *s, int b) { return row_of(s, b)->seen + b - row_of(s, b)->first; }

static int64_t position_of(const Step *s, int b) {
    int64_t position = column_of(s, b) - row_of(s, b)->start;
    return position > 0 ? position : 0; /* padding, which no token looks at */
}

static void add_bias(const Model *m, const Matrix *w, int64_t first, int64_t last, float *out) {
    for (int64_t r = first; r < last; r++) out[r] = rounded(m->dtype, out[r] + (w->bias ? w->bias[r] : 0));
}

static void clip(const Model *m, float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] > m->qkv_clip ? m->qkv_clip : x[i] < -m->qkv_clip ? -m->qkv_clip : x[i];
}

/* Where token b's row keeps the key (kind KEYS) or value of a head at `column` of its cache; up to `*run`
 * columns from there on lie side by side. */
static char *cached(const Decoder *d, int kind, int layer, int b, int head, int64_t column, int64_t *run) {
    const Model *m = d->model;
    const Step *s = d->step;
    const Row *row = row_of(s, b);
    int64_t bytes = (int64_t)m->head_dim * (m->dtype == FLOAT32 ? 4 : 2);
    if (row->blocks) {
        int64_t inside = column % BLOCK, heads = ((int64_t)layer * 2 + (kind == VALUES)) * m->n_kv_heads + head;
        *run = BLOCK - inside;
        return row->blocks[column / BLOCK] + (heads * BLOCK + inside) * bytes;
    }
    *run = row->capacity - column;
    char *from = (kind == KEYS ? s->keys : s->values)[layer * s->rows + s->row_of[b]];
    return from + (head * row->capacity + column) * bytes;
}

/* One token's key or value of a head, into its row's cache. */
static void cache_head(Decoder *d, int kind, int layer, int b, int head, const float *x) {
    int64_t run;
    char *to = cached(d, kind, layer, b, head, column_of(d->step, b), &run);
    store(d->model->dtype, to, 0, x, d->model->head_dim);
}

/* One token's queries or keys of `count` heads from `head` on, x (count, head_dim), as attention reads them:
 * normalised and turned, in the model's order; keys go into the cache. */
static void finish_heads(Decoder *d, int layer, int kind, int b, int head, int count, float *x) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    const Norm *norm = kind == QUERIES ? l->q_norm : l->k_norm;
    int D = m->head_dim, n = count * D, normed = m->qk_norm_whole ? n : D;
    int64_t width = (int64_t)(kind == QUERIES ? m->n_heads : m->n_kv_heads) * D, place = (int64_t)head * D;
    for (int last = 0; last < 2; last++) { /* the norm before RoPE, or after it */
        if (norm && m->qk_norm_last == last) {
            for (int i = 0; i < n; i += normed)
                normalise(m, norm + (m->qk_norm_each ? head + i / D : 0), normed, x + i, x + i);
            record(d, kind == QUERIES ? Q_NORMED : K_NORMED, layer, width, b, place, x, n);
        }
        if (l->rope && last == 0) {
            for (int i = 0; i < n; i += D) rotate(m, l->rope, x + i, position_of(s, b), row_of(s, b)->end - row_of(s, b)->start);
            record(d, kind == QUERIES ? Q_ROTATED : K_ROTATED, layer, width, b, place, x, n);
        }
    }
    if (kind == QUERIES && m->query_growth) {
        scale_by(m, m->query_growth[position_of(s, b)], x, n);
        record(d, Q_SCALED, layer, width, b, place, x, n);
    }
    if (kind == KEYS)
        for (int i = 0; i < count; i++) cache_head(d, KEYS, layer, b, head + i, x + i * D);
}

/* Head `unit` of q, k and v side by side: project, normalise and turn; k and v go into the cache. */
static void project_head(Decoder *d, int layer, int unit, const Vector *x) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    int D = m->head_dim, kind = unit < m->n_heads ? QUERIES : unit < m->n_heads + m->n_kv_heads ? KEYS : VALUES;
    int head = unit - (kind > QUERIES) * m->n_heads - (kind > KEYS) * m->n_kv_heads;
    const Matrix *w = kind == QUERIES ? &l->q : kind == KEYS ? &l->k : &l->v;
    int64_t width = (int64_t)(kind == QUERIES ? m->n_heads : m->n_kv_heads) * D, place = (int64_t)head * D;
    float *to = kind == QUERIES ? d->q : kind == KEYS ? d->k : d->v;
    multiply(w, place, place + D, x, s->batch, to, width);
    for (int b = 0; b < s->batch; b++) {
        float *mine = to + b * width + place;
        add_bias(m, w, place, place + D, to + b * width);
        if (m->qkv_clip > 0) clip(m, mine, D);
        record(d, Q + kind, layer, width, b, place, mine, D);
        if (kind == VALUES) cache_head(d, VALUES, layer, b, head, mine);
        else if (!m->qk_norm_whole) finish_heads(d, layer, kind, b, head, 1, mine);
    }
}

/* Where scores have a cap or sinks, PyTorch has no fused attention for them: each step rounds. */
static int rounds_scores(const Model *m, const Layer *l) { return m->score_cap > 0 || l->sinks; }

/* n products q · k of a head -> their softmax; a sink takes a share of it too. */
static void softmax(const Model *m, const Layer *l, int head, float *scores, int64_t n) {
    float most = -INFINITY, scale = m->score_scale;
    double total = 0;
    if (rounds_scores(m, l)) {
        for (int64_t i = 0; i < n; i++) scores[i] = rounded(m->dtype, rounded(m->dtype, scores[i]) * scale);
        if (m->score_cap > 0) cut_softly(m, m->score_cap, scores, n);
        scale = 1; /* is in them already */
    }
    for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    if (l->sinks && l->sinks[head] > most) most = l->sinks[head];
    for (int64_t i = 0; i < n; i++) scores[i] = (scores[i] - most) * scale;
    EACH_VECTOR(scores, n, exponential)
    for (int64_t i = 0; i < n; i++) total += scores[i];
    if (l->sinks) total += expf(l->sinks[head] - most);
    for (int64_t i = 0; i < n; i++) scores[i] = (float)(scores[i] / total);
    if (rounds_scores(m, l))
        for (int64_t i = 0; i < n; i++) scores[i] = rounded(m->dtype, scores[i]);
}

/* Values of `run` tokens, the first of them token `i` of those looked at, times the weights of several heads:
 * sums (heads, D / LANES, 4). Short sums round less than one long one, and need not wait in line; token i adds to
 * the sum i % 4, however the tokens are cut into runs. */
#define DEFINE_WEIGH(NAME, TYPE, LOAD)                                                                          \
    static void NAME(const TYPE *values, int D, int64_t i, int64_t run, const float *weights, int64_t stride,    \
                     int heads, v *sums) {                                                                       \
        for (int j = 0; j < D / LANES; j++)                                                                      \
            for (int head = 0; head < heads; head++) {                                                           \
                const TYPE *from = values + j * LANES;                                                           \
                const float *weight = weights + head * stride;                                                   \
                v *to = sums + (head * (D / LANES) + j) * 4;                                                     \
                int64_t t = 0;                                                                                   \
                for (; t < run && (i + t) % 4; t++) to[(i + t) % 4] += LOAD(from + t * D) * weight[t];           \
                v a = to[0], b = to[1], c = to[2], e = to[3];                                                    \
                for (; t + 4 <= run; t += 4) {                                                                   \
                    a += LOAD(from + t * D) * weight[t];                                                         \
                    b += LOAD(from + (t + 1) * D) * weight[t + 1];                                               \
                    c += LOAD(from + (t + 2) * D) * weight[t + 2];                                               \
                    e += LOAD(from + (t + 3) * D) * weight[t + 3];                                               \
                }                                                                                                \
                to[0] = a, to[1] = b, to[2] = c, to[3] = e;                                                      \
                for (; t < run; t++) to[(i + t) % 4] += LOAD(from + t * D) * weight[t];                          \
            }                                                                                                    \
    }
DEFINE_WEIGH(weigh_float32, float, load_float32)
DEFINE_WEIGH(weigh_bfloat16, uint16_t, load_bfloat16)
DEFINE_WEIGH(weigh_float16, uint16_t, load_float16)

/* The weights of several heads times the values of n tokens from `start` on: what the heads read, z. */
static void weigh(Decoder *d, int layer, int b, int head, int heads, int64_t start, int64_t n, Scratch *mine) {
    const Model *m = d->model;
    int D = m->head_dim, kv_head = head / (m->n_heads / m->n_kv_heads), whole = D / LANES * LANES;
    int64_t run;
    memset(mine->sums, 0, (int64_t)heads * whole * 4 * sizeof(float));
    for (int64_t i = 0; i < n; i += run) { /* a run stays in the core's cache while each head reads it */
        const char *values = cached(d, VALUES, layer, b, kv_head, start + i, &run);
        run = run < BLOCK ? run : BLOCK;
        run = run < n - i ? run : n - i;
        const float *weights = mine->scores + i;
        if (m->dtype == FLOAT32) weigh_float32((const float *)values, D, i, run, weights, n, heads, mine->sums);
        else if (m->dtype == BFLOAT16)
            weigh_bfloat16((const uint16_t *)values, D, i, run, weights, n, heads, mine->sums);
        else weigh_float16((const uint16_t *)values, D, i, run, weights, n, heads, mine->sums);
    }
    for (int h = 0; h < heads; h++) {
        float *z = d->z + ((int64_t)b * m->n_heads + head + h) * D;
        for (int j = 0; j < D / LANES; j++) {
            const v *sums = mine->sums + (h * (D / LANES) + j) * 4;
            v sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            memcpy(z + j * LANES, &sum, sizeof sum);
        }
        for (int j = whole; j < D; j++) { /* the end of a head that LANES does not divide */
            double sum = 0;
            for (int64_t i = 0; i < n;) {
                const char *values = cached(d, VALUES, layer, b, kv_head, start + i, &run);
                int64_t last = i + run < n ? i + run : n;
                for (int64_t place = j; i < last; i++, place += D)
                    sum += mine->scores[h * n + i] * at(m->dtype, values, place);
            }
            z[j] = (float)sum;
        }
        for (int j = 0; j < D; j++) z[j] = rounded(m->dtype, z[j]);
        record(d, Z, layer, (int64_t)m->n_heads * D, b, (int64_t)(head + h) * D, z, D);
    }
}

/* Query heads of one token, which share a head of keys and values and so one reading of it, look at the tokens
 * from their row's or their window's start to themselves. */
static void attend(Decoder *d, int layer, int b, int head, int heads, Scratch *mine) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    int D = m->head_dim, kv_head = head / (m->n_heads / m->n_kv_heads);
    int64_t start = row_of(s, b)->start, end = column_of(s, b) + 1, run;
    if (l->window && start < end - l->window) start = end - l->window;
    if (start >= end) start = end - 1; /* padding looks at itself */
    int64_t n = end - start;
    Matrix keys = {.columns = D, .kind = m->dtype};
    Vector *q = mine->x;
    for (int h = 0; h < heads; h++) {
        memcpy(q[h].wide, d->q + ((int64_t)b * m->n_heads + head + h) * D, D * sizeof(float));
        prepare(&keys, &q[h]);
    }
    for (int64_t i = 0; i < n; i += run) {
        keys.weights = cached(d, KEYS, layer, b, kv_head, start + i, &run);
        keys.rows = run = run < n - i ? run : n - i;
        multiply(&keys, 0, run, q, heads, mine->scores + i, n);
    }
    for (int h = 0; h < heads; h++) softmax(m, l, head + h, mine->scores + h * n, n);
    weigh(d, layer, b, head, heads, start, n, mine);
}

/* How many query heads attend together: all that share keys, but fewer where threads would be without work. */
static int heads_at_once(const Decoder *d) {
    const Model *m = d->model;
    int group = m->n_heads / m->n_kv_heads, some = group < BATCH ? group : BATCH;
    while (some > 1 && (int64_t)d->step->batch * m->n_heads < 2LL * d->n_threads * some) some = (some + 1) / 2;
    return some;
}

/* Rows of gate and up, and of the hidden layer made of them. */
static void hidden_rows(Decoder *d, int layer, int64_t first, int64_t last, const Vector *x) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    int64_t F = m->hidden_width, n = last - first;
    int gated = l->gate.weights != NULL;
    if (gated) multiply(&l->gate, first, last, x, s->batch, d->gate, F);
    multiply(&l->up, first, last, x, s->batch, d->hidden, F);
    for (int b = 0; b < s->batch; b++) {
        float *gate = d->gate + b * F, *up = d->hidden + b * F, *act = (gated ? gate : up) + first;
        add_bias(m, &l->up, first, last, up);
        record(d, gated ? UP : PRE, layer, F, b, first, up + first, n);
        if (gated) add_bias(m, &l->gate, first, last, gate);
        if (gated) record(d, GATE, layer, F, b, first, gate + first, n);
        activate(m, act, n);
        record(d, ACT, layer, F, b, first, act, n);
        if (!gated) continue;
        for (int64_t i = first; i < last; i++) up[i] = rounded(m->dtype, gate[i] * up[i]);
        record(d, HIDDEN, layer, F, b, first, up + first, n);
    }
}

/* Rows of a product that is added to the residual stream, here, or where a norm comes first by
 * `add_normed`. Product, addition and sum are recorded as `leaf` and the two after it. */
static void add_rows(Decoder *d, int layer, const Matrix *w, const Norm *norm, int64_t first, int64_t last,
                     const Vector *x, int leaf) {
    const Model *m = d->model;
    const Step *s = d->step;
    multiply(w, first, last, x, s->batch, d->out, m->width);
    for (int b = 0; b < s->batch; b++) {
        float *out = d->out + (int64_t)b * m->width, *stream = d->stream + (int64_t)b * m->width;
        add_bias(m, w, first, last, out);
        record(d, leaf, layer, m->width, b, first, out + first, last - first);
        if (norm) continue;
        if (m->residual_scale != 1) scale_by(m, m->residual_scale, out + first, last - first);
        record(d, leaf + 1, layer, m->width, b, first, out + first, last - first);
        for (int64_t r = first; r < last; r++) stream[r] = rounded(m->dtype, stream[r] + out[r]);
        record(d, leaf + 2, layer, m->width, b, first, stream + first, last - first);
    }
}

/* A whole product, normalised and added. Each thread does it for itself, to a stream of its own, as it
 * normalises its own inputs: that takes less time than to wait for one that does it for all. */
static void add_normed(Decoder *d, int layer, const Norm *norm, int thread, int leaf) {
    const Model *m = d->model;
    int W = m->width;
    for (int b = 0; b < d->step->batch; b++) {
        float *stream = d->scratch[thread].stream + (int64_t)b * W, *added = d->scratch[thread].x[b].wide;
        normalise(m, norm, W, d->out + (int64_t)b * W, added);
        if (m->residual_scale != 1) scale_by(m, m->residual_scale, added, W);
        for (int i = 0; i < W; i++) stream[i] = rounded(m->dtype, stream[i] + added[i]);
        if (thread) continue;
        record(d, leaf + 1, layer, W, b, 0, added, W);
        record(d, leaf + 2, layer, W, b, 0, stream, W);
    }
}

static void inputs_from(Decoder *d, const Matrix *w, const float *from, Vector *x) {
    for (int b = 0; b < d->step->batch; b++) {
        memcpy(x[b].wide, from + b * w->columns, w->columns * sizeof(float));
        prepare(w, &x[b]);
    }
}

/* The residual stream, normalised where a norm comes before, as inputs of `w`. */
static void inputs_from_stream(Decoder *d, const Matrix *w, const Norm *norm, int leaf, int layer, int thread) {
    const Model *m = d->model;
    Vector *x = d->scratch[thread].x;
    for (int b = 0; b < d->step->batch; b++) {
        const float *stream = d->scratch[thread].stream + (int64_t)b * m->width;
        if (norm) normalise(m, norm, m->width, stream, x[b].wide);
        else memcpy(x[b].wide, stream, m->width * sizeof(float));
        if (thread == 0) record(d, leaf, layer, m->width, b, 0, x[b].wide, m->width);
        prepare(w, &x[b]);
    }
}

/* A matrix of another kind than the one the inputs were prepared for, when only some are quantised. */
static void prepare_again(Decoder *d, const Matrix *before, const Matrix *now, Vector *x) {
    if (before->kind == now->kind && before->group == now->group && before->exact == now->exact &&
        !before->row_scales == !now->row_scales) return;
    for (int b = 0; b < d->step->batch; b++) prepare(now, &x[b]);
}

static void gate_and_up(Decoder *d, int layer, int phase, int thread) {
    const Matrix *up = &d->model->layers[layer].up;
    int64_t first, last;
    while (next_rows(d, phase + GATE_AND_UP, thread, up, d->model->hidden_width, &first, &last))
        hidden_rows(d, layer, first, last, d->scratch[thread].x);
}

static void attention(Decoder *d, int layer, int phase, int thread) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer];
    const Step *s = d->step;
    Scratch *mine = &d->scratch[thread];
    Vector *x = mine->x;
    const char *next = share_of(d, thread, &l->o, m->width, TILE);
    int64_t first, last, all = m->n_heads + 2 * m->n_kv_heads;
    inputs_from_stream(d, &l->q, l->attn_norm, ATTN_NORM, layer, thread);
    if (thread == 0)
        for (int b = 0; b < s->batch; b++)
            record(d, RESID_PRE, layer, m->width, b, 0, mine->stream + (int64_t)b * m->width, m->width);
    const Matrix *before = &l->q;
    while (next_piece(d, phase + PROJECT, thread, all, 1, all, &first, &last))
        for (int64_t unit = first; unit < last; unit++) {
            const Matrix *now = unit < m->n_heads ? &l->q : unit < m->n_heads + m->n_kv_heads ? &l->k : &l->v;
            prepare_again(d, before, now, x);
            before = now;
            project_head(d, layer, (int)unit, x);
        }
    if (m->parallel) { /* the MLP reads the same inputs */
        prepare_again(d, before, &l->up, x);
        gate_and_up(d, layer, phase, thread);
    }
    meet(d, next);
    if (m->qk_norm_whole) {
        all = 2 * (int64_t)s->batch; /* queries of each token, then keys */
        while (next_piece(d, phase + NORM_WHOLE, thread, all, 1, all, &first, &last))
            for (int64_t unit = first; unit < last; unit++) {
                int kind = unit < s->batch ? QUERIES : KEYS, b = (int)(unit % s->batch);
                int heads = kind == QUERIES ? m->n_heads : m->n_kv_heads;
                float *from = (kind == QUERIES ? d->q : d->k) + (int64_t)b * heads * m->head_dim;
                finish_heads(d, layer, kind, b, 0, heads, from);
            }
        meet(d, next);
    }
    int group = m->n_heads / m->n_kv_heads, some = heads_at_once(d), parts = (group + some - 1) / some;
    int64_t units = (int64_t)m->n_kv_heads * parts; /* of a token */
    all = s->batch * units;
    while (next_piece(d, phase + ATTEND, thread, all, 1, all, &first, &last))
        for (int64_t unit = first; unit < last; unit++) {
            int within = (int)(unit % parts) * some, left = group - within;
            int head = (int)(unit % units / parts) * group + within;
            attend(d, layer, (int)(unit / units), head, left < some ? left : some, mine);
        }
    meet(d, next);
    inputs_from(d, &l->o, d->z, x);
    while (next_rows(d, phase + ADD_ATTENTION, thread, &l->o, m->width, &first, &last))
        add_rows(d, layer, &l->o, l->attn_out_norm, first, last, x, ATTN_PRODUCT);
    meet(d, m->parallel ? share_of(d, thread, &l->down, m->width, TILE)
                        : share_of(d, thread, l->gate.weights ? &l->gate : &l->up, m->hidden_width, TILE));
    if (l->attn_out_norm) add_normed(d, layer, l->attn_out_norm, thread, ATTN_PRODUCT);
    if (l->attn_out_norm && m->parallel) meet(d, NULL); /* `out` is read until here, and written next */
}

static void mlp(Decoder *d, int layer, int phase, int thread) {
    const Model *m = d->model;
    const Layer *l = &m->layers[layer], *after = layer + 1 < m->n_layers ? l + 1 : NULL;
    Vector *x = d->scratch[thread].x;
    int64_t first, last, heads = m->n_heads + 2 * m->n_kv_heads;
    if (!m->parallel) {
        inputs_from_stream(d, &l->up, l->mlp_norm, MLP_NORM, layer, thread);
        gate_and_up(d, layer, phase, thread);
        meet(d, share_of(d, thread, &l->down, m->width, TILE));
    }
    inputs_from(d, &l->down, d->hidden, x);
    while (next_rows(d, phase + ADD_MLP, thread, &l->down, m->width, &first, &last))
        add_rows(d, layer, &l->down, l->mlp_out_norm, first, last, x, MLP_PRODUCT);
    meet(d, after ? share_of(d, thread, &after->q, heads * m->head_dim, m->head_dim)
                  : share_of(d, thread, &m->unembed, m->vocab_size, TILE));
    if (l->mlp_out_norm) add_normed(d, layer, l->mlp_out_norm, thread, MLP_PRODUCT);
}

/* Logits of each row's last token. */
static void unembed(Decoder *d, int phase, int thread) {
    const Model *m = d->model;
    const Step *s = d->step;
    Vector *x = d->scratch[thread].x;
    int64_t first, last;
    int rows = s->rows;
    for (int row = 0; row < rows; row++) {
        int64_t place = s->row[row].first + s->row[row].length - 1;
        const float *stream = d->scratch[thread].stream + place * m->width;
        normalise(m, m->norm, m->width, stream, x[row].wide);
        if (thread == 0) record(d, FINAL_NORM, 0, m->width, row, 0, x[row].wide, m->width);
        prepare(&m->unembed, &x[row]);
    }
    while (next_rows(d, phase, thread, &m->unembed, m->vocab_size, &first, &last)) {
        multiply(&m->unembed, first, last, x, rows, s->logits, m->vocab_size);
        for (int row = 0; row < rows; row++) {
            float *logits = s->logits + (int64_t)row * m->vocab_size;
            add_bias(m, &m->unembed, first, last, logits);
            record(d, RAW_LOGITS, 0, m->vocab_size, row, first, logits + first, last - first);
            if (m->logit_scale != 1) scale_by(m, m->logit_scale, logits + first, last - first);
            if (m->logit_cap > 0) cut_softly(m, m->logit_cap, logits + first, last - first);
        }
    }
}

static void run(Decoder *d, int thread) {
    const Model *m = d->model;
    Scratch *mine = &d->scratch[thread];
    int phase = 0;
    mine->phase = -1;
    if (mine->stream != d->stream)
        memcpy(mine->stream, d->stream, (int64_t)d->step->batch * m->width * sizeof(float));
    for (int layer = 0; layer < m->n_layers; layer++, phase += PHASES) {
        attention(d, layer, phase, thread);
        mlp(d, layer, phase, thread);
    }
    if (d->step->logits) unembed(d, phase, thread);
    meet(d, NULL); /* the step is the caller's again */
}

static void embed(Decoder *d) {
    const Model *m = d->model;
    const Step *s = d->step;
    for (int b = 0; b < s->batch; b++) {
        float *x = d->stream + (int64_t)b * m->width;
        look_up(&m->embed, s->tokens[b], x);
        for (int i = 0; i < m->width; i++) x[i] = rounded(m->dtype, x[i]);
        record(d, EMBED, 0, m->width, b, 0, x, m->width);
        if (m->pos_embed) {
            const float *place = m->pos_embed + position_of(s, b) * m->width;
            for (int i = 0; i < m->width; i++) x[i] = rounded(m->dtype, x[i] + place[i]);
        }
        if (m->embed_norm) normalise(m, m->embed_norm, m->width, x, x);
        record(d, EMBED_NORMED, 0, m->width, b, 0, x, m->width);
        if (m->embed_scale != 1) scale_by(m, m->embed_scale, x, m->width);
        record(d, EMBED_SCALED, 0, m->width, b, 0, x, m->width);
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

/* Memory costs nothing before `prepare` writes it. */
static void open_vectors(Vector *x, int count, int64_t wide) {
    wide = (wide + 63) / 64 * 64;
    for (int b = 0; b < count; b++) {
        x[b].wide = aligned_alloc(64, wide * 4), x[b].half = aligned_alloc(64, wide * 2);
        x[b].high = aligned_alloc(64, wide), x[b].low = aligned_alloc(64, wide);
        x[b].pairs = aligned_alloc(64, wide * 2), x[b].total = aligned_alloc(64, wide * 4);
        x[b].step = aligned_alloc(64, wide * 4), x[b].sum = aligned_alloc(64, wide * 4);
    }
}

static void close_vectors(Vector *x, int count) {
    for (int b = 0; b < count; b++) {
        free(x[b].wide), free(x[b].half), free(x[b].high);
        free(x[b].low), free(x[b].pairs), free(x[b].total), free(x[b].step), free(x[b].sum);
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
        free(d->scratch[t].x), free(d->scratch[t].scores), free(d->scratch[t].sums);
        if (d->scratch[t].stream != d->stream) free(d->scratch[t].stream);
    }
    free(d->stream), free(d->q), free(d->k), free(d->v), free(d->z), free(d->out), free(d->hidden), free(d->gate);
    free(d->scratch), free(d->threads), free(d->handed), free(d);
}

/* `model` and what it points to must stay until `pellucid_close`; between two steps its matrices may
 * be moved, and their pointers changed. */
Decoder *pellucid_open(const Model *model, int n_threads) {
    Decoder *d = zeroed(sizeof *d);
    d->model = model;
    d->n_threads = n_threads;
    d->n_phases = PHASES * model->n_layers + 1;
    d->handed = zeroed(d->n_phases * sizeof *d->handed);
    d->threads = zeroed(n_threads * sizeof *d->threads);
    d->scratch = zeroed(n_threads * sizeof *d->scratch);
    int64_t wide = widest(model), stream = (int64_t)MOST * model->width * 4;
    int64_t q_rows = (int64_t)MOST * model->n_heads * model->head_dim * 4;
    int64_t kv_rows = (int64_t)MOST * model->n_kv_heads * model->head_dim * 4;
    d->stream = zeroed(stream), d->out = zeroed(stream);
    d->hidden = zeroed((int64_t)MOST * model->hidden_width * 4);
    d->gate = zeroed((int64_t)MOST * model->hidden_width * 4);
    d->q = zeroed(q_rows), d->z = zeroed(q_rows), d->k = zeroed(kv_rows), d->v = zeroed(kv_rows);
    for (int t = 0; t < n_threads; t++) {
        Vector *x = d->scratch[t].x = zeroed(MOST * sizeof *x);
        open_vectors(x, MOST, wide);
        d->scratch[t].sums = zeroed((int64_t)BATCH * 4 * model->head_dim * sizeof(float));
        d->scratch[t].stream = model->layers[0].attn_out_norm ? zeroed(stream) : d->stream;
    }
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
        int64_t needed = 0;
        for (int r = 0; r < step->rows; r++) {
            int64_t all = step->row[r].seen + step->row[r].length;
            needed = all > needed ? all : needed;
        }
        needed *= BATCH;
        if (scratch->score_room >= needed) continue;
        free(scratch->scores);
        scratch->score_room = 2 * needed + 256 * BATCH;
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
