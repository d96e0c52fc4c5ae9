/* A step on the CPU, whole: from the rows' tokens to logits, in one call, without an allocation. Rows are the next token
   of a reply or those of a piece of a prompt: both are computed alike.

   Compiled for the machine that it runs on by native.py, which also fills the structs below; the same sums as
   persona/engine/decoder.py in another order. Threads work side by side on rows or on blocks of outputs, and wait for
   each other in between:

       rows     norm, sums of groups, A x of every row's adapter        | barrier
       blocks   int4 product of all rows, + B (A x), + residual         | barrier
       items    keys and values of all rows into the cache              | barrier
       items    attention                                               | barrier

   What is computed of a row never depends on the rows beside it, nor on the number of threads: the order of every sum is
   the same. Nothing of a page behind a row's own length is read.

   An int4 product takes a block of BLOCK outputs and a group of 32 inputs at a time: the codes are written out once, as
   small numbers that are exact in bf16 (or fp32), multiplied with all rows, and scaled once for the group:

       y += scale · Σ (code − 8) x + zero · Σ x

   Where the CPU multiplies pairs of bf16, that is one instruction for 32 products; elsewhere fp32 of the compiler's widest
   vectors. Layouts: codes as in weights.py, scales as in quantize.py, pages as in attention.py, adapters as in lora.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define GROUP 32
#define MOST_RANK 256
#define SPELT 8 /* words of the head at a time */
#if BLOCK == 64 && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1 /* rows are multiplied in bf16 */
#define TILE 6  /* rows at a time: 24 of 32 registers hold sums */
typedef uint16_t operand;
#else
#define PAIRS 0
#define TILE 3
typedef float operand;
#endif
#define LANES (BLOCK / 16)

#if CELL_BYTES == 2
typedef uint16_t cell; /* bf16: of the cache and of adapters */
#else
typedef float cell;
#endif

typedef struct {
    const uint8_t *codes;   /* [padded / BLOCK, in, BLOCK / 2] */
    const uint16_t *scales; /* bf16 [in / 32, padded, 2] */
    const float *bias;      /* [out] or null */
    int64_t out, in, padded;
} matrix;

typedef struct { /* the vocabulary's vectors */
    const uint16_t *numbers; /* bf16 [vocab, hidden], or null: then */
    const int8_t *codes;     /* [vocab, hidden], groups of 32 with */
    const float *scales;     /* [vocab, hidden / 32] */
} words;

typedef struct {
    const float *attn_norm, *mlp_norm, *q_norm, *k_norm; /* the last two may be null */
    matrix qkv, o, gate_up, down;
} layer;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, dim, intermediate, vocab;
    const layer *layer;
    words embed, head;
    const float *norm;                /* [hidden] */
    const float *cos, *sin;           /* [context, dim / 2], scaled */
    cell *cache;                      /* [pages, layers, 2, size, kv_heads, dim] */
    int64_t size;                     /* tokens a page */
    double eps;
} model;

typedef struct {
    int64_t rows, sequences, width, room, spoken; /* width: pages in use at most */
    const int64_t *tokens, *positions, *sequence; /* [rows]; the rows of a sequence are neighbours in their order */
    const int64_t *pages;                         /* [sequences, room], room ≥ width */
    const int64_t *const *tables;                 /* [sequences]: of its adapter, [layers · 4, 3], or null */
    const int64_t *speakers;                      /* [spoken]: rows whose logits are wanted */
    float *logits;                                /* [spoken, vocab] */
    uint8_t *scratch;                  /* of scratch_bytes */
    int64_t threads;
} step;

/* What a step keeps of its rows between phases, one behind another in the scratch memory. */
typedef struct {
    int64_t wide, outs; /* of x and y */
    float *h;           /* [rows, hidden] */
    float *x;           /* [rows, wide]: what goes into a product */
    operand *narrow;    /* [rows, wide]: the same as it is multiplied */
    float *sums;        /* [rows, wide / 32] of it */
    float *y;           /* [rows, outs]: what comes out */
    float *low;         /* [rows, MOST_RANK]: A x */
    float *own;         /* a piece for each thread, see own_floats */
} state;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static const int64_t *factor_of(const step *s, int64_t r, int64_t line) { /* address of A, of B, rank; or null */
    const int64_t *table = s->tables[s->sequence[r]];
    return table && table[line * 3 + 2] ? table + line * 3 : 0;
}
static int64_t stride_of(const model *m, const step *s) { return (s->width * m->size + 15) / 16 * 16; }

static int64_t own_floats(const model *m, const step *s) {
    int64_t attention = m->heads / m->kv_heads * (stride_of(m, s) + m->dim), spelt = SPELT * m->hidden / 2;
    return (most(most(attention, spelt), s->rows * BLOCK + GROUP * BLOCK) + 31) / 16 * 16;
}

static uint8_t *laid_out(const model *m, const step *s, state *a) {
    uint8_t *at = (uint8_t *)(((uintptr_t)s->scratch + 63) & ~(uintptr_t)63);
    a->wide = most(most(m->hidden, m->heads * m->dim), m->intermediate);
    a->outs = most((m->heads + 2 * m->kv_heads) * m->dim, 2 * m->intermediate);
#define PLACE(name, count) a->name = (void *)at, at += ((count) * sizeof *a->name + 63) / 64 * 64
    PLACE(h, s->rows * m->hidden);
    PLACE(x, s->rows * a->wide);
    PLACE(narrow, s->rows * a->wide);
    PLACE(sums, s->rows * (a->wide / GROUP));
    PLACE(y, s->rows * a->outs);
    PLACE(low, s->rows * MOST_RANK);
    PLACE(own, s->threads * own_floats(m, s));
#undef PLACE
    return at;
}

int64_t scratch_bytes(const model *m, const step *s) {
    state a;
    return laid_out(m, s, &a) - s->scratch + 64;
}

/* — vectors — */

static inline v16 half(const uint16_t *p) { /* bf16 */
    u16x32 bits = __builtin_convertvector(*(const h16 *)p, u16x32) << 16;
    return (v16)bits;
}

static inline v16 wide(const cell *p) {
#if CELL_BYTES == 2
    return half(p);
#else
    return get(p);
#endif
}

static inline float bf16(uint16_t bits) {
    union { uint32_t u; float f; } both = {.u = (uint32_t)bits << 16};
    return both.f;
}

static inline uint16_t rounded(float value) { /* to the nearest bf16, ties to even */
    union { float f; uint32_t u; } both = {.f = value};
    if (value != value) return 0x7fc0;
    return (both.u + 0x7fff + ((both.u >> 16) & 1)) >> 16;
}

/* The vectors of `count` words from `word` on, in bf16: where they stand, or written out into `room`. */
static const uint16_t *vectors(const words *w, int64_t hidden, int64_t word, int64_t count, uint16_t *room) {
    if (w->numbers) return w->numbers + word * hidden;
    const int8_t *codes = w->codes + word * hidden;
    const float *scales = w->scales + word * hidden / GROUP;
    for (int64_t g = 0; g < count * hidden / GROUP; g++) {
        const int8_t *from = codes + g * GROUP;
        uint16_t *to = room + g * GROUP;
#if PAIRS
        __m512 scale = _mm512_set1_ps(scales[g]);
        __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
        __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + 16)));
        __m512bh both = _mm512_cvtne2ps_pbh(
            _mm512_mul_ps(_mm512_cvtepi32_ps(high), scale), _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale));
        _mm512_storeu_si512(to, (__m512i)both);
#else
        for (int i = 0; i < GROUP; i++) to[i] = rounded(from[i] * scales[g]);
#endif
    }
    return room;
}

static inline float read_cell(cell value) {
#if CELL_BYTES == 2
    return bf16(value);
#else
    return value;
#endif
}

static void write_cells(cell *to, const float *from, int64_t count) {
#if CELL_BYTES == 2
    for (int64_t i = 0; i < count; i++) to[i] = rounded(from[i]);
#else
    memcpy(to, from, count * sizeof *to);
#endif
}

/* Cells on their way from memory: what is read in short pieces, here and there, is waited for. */
static inline void awaited(const cell *at, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof *at) __builtin_prefetch(at + i);
}

/* — rows: what goes into a product — */

static void normed(const float *h, const float *weight, int64_t count, double eps, float *to) {
    v16 squares = all(0);
    for (int64_t i = 0; i < count; i += 16) squares += get(h + i) * get(h + i);
    v16 scale = all(1 / sqrtf(total(squares) / count + (float)eps));
    for (int64_t i = 0; i < count; i += 16) put(to + i, get(h + i) * scale * get(weight + i));
}

static void narrowed(const float *x, int64_t count, operand *to, float *sums) {
    for (int64_t g = 0; g < count / GROUP; g++) {
        const float *from = x + g * GROUP;
#if PAIRS
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)get(from + 16), (__m512)get(from));
        _mm512_storeu_si512(to + g * GROUP, both);
        __m512i even = _mm512_slli_epi32(both, 16), odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
        sums[g] = total((v16)(_mm512_castsi512_ps(even) + _mm512_castsi512_ps(odd)));
#else
        memcpy(to + g * GROUP, from, GROUP * sizeof *to);
        sums[g] = total(get(from) + get(from + 16));
#endif
    }
}

/* `lowered` for few ranks: lane l of a vector holds rank l % rank of input l / rank, and `in` is a multiple of 16. */
static inline __attribute__((always_inline)) void lowered_few(
    const int rank, const float *x, const cell *a, int64_t in, float *low) {
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16 sum[8];
    for (int j = 0; j < rank; j++) sum[j] = all(0);
    for (int64_t i = 0; i < in; i += 16) {
        v16 some = get(x + i);
        for (int j = 0; j < rank; j++)
            sum[j] += wide(a + i * rank + 16 * j) * __builtin_shuffle(some, lane / rank + j * (16 / rank));
    }
    for (int j = 1; j < rank; j++) sum[0] += sum[j];
    float part[16];
    put(part, sum[0]);
    for (int r = 0; r < rank; r++) {
        low[r] = 0;
        for (int l = r; l < 16; l += rank) low[r] += part[l];
    }
}

/* `lowered` for `lanes` · 16 neighbouring ranks: A is read once, and so many sums go on side by side that none waits. */
static inline __attribute__((always_inline)) void lowered_many(
    const int lanes, const int turns, const float *x, const cell *a, int64_t in, int64_t rank, float *low) {
    v16 sum[4][4];
    for (int t = 0; t < turns; t++)
        for (int c = 0; c < lanes; c++) sum[t][c] = all(0);
    int64_t i = 0;
    for (; i + turns <= in; i += turns)
        for (int t = 0; t < turns; t++)
            for (int c = 0; c < lanes; c++) sum[t][c] += wide(a + (i + t) * rank + 16 * c) * x[i + t];
    for (; i < in; i++)
        for (int c = 0; c < lanes; c++) sum[0][c] += wide(a + i * rank + 16 * c) * x[i];
    for (int c = 0; c < lanes; c++) {
        for (int t = 1; t < turns; t++) sum[0][c] += sum[t][c];
        put(low + 16 * c, sum[0][c]);
    }
}

/* x [in] · A [in, rank] → low [rank] */
static void lowered(const float *x, const cell *a, int64_t in, int64_t rank, float *low) {
    if (rank % 16 == 0) {
        for (int64_t r = 0; r < rank; r += 64) switch ((rank - r) / 16) {
            case 1: lowered_many(1, 4, x, a + r, in, rank, low + r); break;
            case 2: lowered_many(2, 4, x, a + r, in, rank, low + r); break;
            case 3: lowered_many(3, 2, x, a + r, in, rank, low + r); break;
            default: lowered_many(4, 2, x, a + r, in, rank, low + r);
        }
    } else if (in % 16 == 0 && 16 % rank == 0) {
        switch (rank) {
            case 1: lowered_few(1, x, a, in, low); break;
            case 2: lowered_few(2, x, a, in, low); break;
            case 4: lowered_few(4, x, a, in, low); break;
            default: lowered_few(8, x, a, in, low);
        }
    } else {
        for (int64_t r = 0; r < rank; r++) low[r] = 0;
        for (int64_t i = 0; i < in; i++)
            for (int64_t r = 0; r < rank; r++) low[r] += x[i] * read_cell(a[i * rank + r]);
    }
}

/* — blocks: the product of all rows — */

static void written_out(const uint8_t *codes, operand *to) { /* a group of a block: codes − 8 */
#if PAIRS
    const __m256i low = _mm256_set1_epi8(15);
    static const uint16_t values[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
    for (int k = 0; k < GROUP; k += 2, to += 2 * BLOCK) {
        __m256i one = _mm256_loadu_si256((const __m256i *)(codes + k * 32));
        __m256i two = _mm256_loadu_si256((const __m256i *)(codes + k * 32 + 32));
        __m256i one_low = _mm256_and_si256(one, low), two_low = _mm256_and_si256(two, low);
        __m256i one_high = _mm256_and_si256(_mm256_srli_epi16(one, 4), low);
        __m256i two_high = _mm256_and_si256(_mm256_srli_epi16(two, 4), low);
        __m256i mixed[4] = {
            _mm256_unpacklo_epi8(one_low, two_low), _mm256_unpackhi_epi8(one_low, two_low),
            _mm256_unpacklo_epi8(one_high, two_high), _mm256_unpackhi_epi8(one_high, two_high)};
        for (int c = 0; c < 4; c++) {
            __m512i pairs = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(mixed[c]), table);
            _mm512_store_si512(to + c * 32, pairs);
        }
    }
#else
    for (int k = 0; k < GROUP; k++, to += BLOCK, codes += BLOCK / 2)
        for (int j = 0; j < BLOCK / 2; j++) {
            to[j] = (float)((int)(codes[j] & 15) - 8);
            to[j + BLOCK / 2] = (float)((int)(codes[j] >> 4) - 8);
        }
#endif
}

/* The scales of a group of a block, lane by lane as the sums stand. */
static void scales_of(const uint16_t *pairs, v16 *scale, v16 *zero) {
    v16 natural[2][LANES];
    for (int c = 0; c < LANES; c++) {
        u16x32 both = *(const u16x32 *)(pairs + 32 * c);
        natural[0][c] = (v16)(both << 16);
        natural[1][c] = (v16)(both & 0xffff0000u);
    }
#if PAIRS
    /* A lane holds outputs 0…7 and 16…23, the next 8…15 and 24…31: so bytes interleave. */
    for (int c = 0; c < LANES; c += 2)
        for (int kind = 0; kind < 2; kind++) {
            v16 *to = kind ? zero : scale;
            __m512 one = (__m512)natural[kind][c], two = (__m512)natural[kind][c + 1];
            to[c] = (v16)_mm512_shuffle_f32x4(one, two, 0x44);
            to[c + 1] = (v16)_mm512_shuffle_f32x4(one, two, 0xee);
        }
#else
    for (int c = 0; c < LANES; c++) scale[c] = natural[0][c], zero[c] = natural[1][c];
#endif
}

static inline __attribute__((always_inline)) void tile(
    const int rows, const operand *codes, const operand *x, int64_t stride, const float *sums, int64_t groups,
    const v16 *scale, const v16 *zero, float *totals) {
    v16 sum[TILE][LANES];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < LANES; c++) sum[r][c] = all(0);
#if PAIRS
    for (int p = 0; p < GROUP / 2; p++, codes += 2 * BLOCK)
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * stride + 2 * p, sizeof pair);
            __m512bh with = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < LANES; c++)
                sum[r][c] = (v16)_mm512_dpbf16_ps(
                    (__m512)sum[r][c], (__m512bh)_mm512_load_si512(codes + 32 * c), with);
        }
#else
    for (int k = 0; k < GROUP; k++, codes += BLOCK)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < LANES; c++) sum[r][c] += get(codes + 16 * c) * x[r * stride + k];
#endif
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < LANES; c++) {
            float *at = totals + r * BLOCK + 16 * c;
            put(at, get(at) + sum[r][c] * scale[c] + zero[c] * sums[r * groups]);
        }
}

/* y [count] += low [rank] · B [rank, out], of which these are `count` columns. A whole block stays in registers. */
static void add_low(float *y, const float *low, const cell *b, int64_t rank, int64_t out, int64_t count) {
    if (count == BLOCK) {
        v16 sum[2][LANES];
        for (int c = 0; c < LANES; c++) sum[0][c] = get(y + 16 * c), sum[1][c] = all(0);
        int64_t r = 0;
        for (; r + 2 <= rank; r += 2, b += 2 * out)
            for (int c = 0; c < LANES; c++) {
                sum[0][c] += wide(b + 16 * c) * low[r];
                sum[1][c] += wide(b + out + 16 * c) * low[r + 1];
            }
        for (int c = 0; c < LANES; c++) {
            if (r < rank) sum[0][c] += wide(b + 16 * c) * low[r];
            put(y + 16 * c, sum[0][c] + sum[1][c]);
        }
        return;
    }
    for (int64_t r = 0; r < rank; r++, b += out) {
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) put(y + i, get(y + i) + wide(b + i) * low[r]);
        for (; i < count; i++) y[i] += low[r] * read_cell(b[i]);
    }
}

/* Outputs of one thread's blocks for all rows: into y [rows, outs], or added to h. line: of the adapters' tables. */
static void multiplied(
    const model *m, const step *s, const state *a, const matrix *w, int64_t line, float *h, int thread, int threads) {
    int64_t blocks = w->padded / BLOCK, groups = w->in / GROUP, spread = a->wide / GROUP;
    float *totals = a->own + thread * own_floats(m, s);
    operand *codes = (operand *)(totals + s->rows * BLOCK);
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
        memset(totals, 0, s->rows * BLOCK * sizeof *totals);
        int64_t first = block * BLOCK, count = w->out - first < BLOCK ? w->out - first : BLOCK;
        for (int64_t r = 0; r < s->rows; r++) { /* of B, which every row reads in pieces of its own adapter */
            const int64_t *factor = factor_of(s, r, line);
            if (!factor || (r && s->sequence[r] == s->sequence[r - 1])) continue;
            for (int64_t i = 0; i < factor[2]; i++) awaited((const cell *)factor[1] + i * w->out + first, count);
        }
        for (int64_t g = 0; g < groups; g++) {
            v16 scale[LANES], zero[LANES];
            scales_of(w->scales + (g * w->padded + block * BLOCK) * 2, scale, zero);
            written_out(w->codes + (block * w->in + g * GROUP) * (BLOCK / 2), codes);
            for (int64_t r = 0; r < s->rows; r += TILE) {
                const operand *x = a->narrow + r * a->wide + g * GROUP;
                const float *sums = a->sums + r * spread + g;
                float *at = totals + r * BLOCK;
#define ROWS(n) case n: tile(n, codes, x, a->wide, sums, spread, scale, zero, at); break
                switch (s->rows - r < TILE ? s->rows - r : TILE) {
                    ROWS(1); ROWS(2); ROWS(3);
#if TILE == 6
                    ROWS(4); ROWS(5); ROWS(6);
#endif
                }
#undef ROWS
            }
        }
        for (int64_t r = 0; r < s->rows; r++) {
            float *y = totals + r * BLOCK;
#if PAIRS
            for (int c = 0; c < LANES; c += 2) {
                __m512 one = (__m512)get(y + 16 * c), two = (__m512)get(y + 16 * c + 16);
                put(y + 16 * c, (v16)_mm512_shuffle_f32x4(one, two, 0x44));
                put(y + 16 * c + 16, (v16)_mm512_shuffle_f32x4(one, two, 0xee));
            }
#endif
            if (w->bias)
                for (int64_t i = 0; i < count; i++) y[i] += w->bias[first + i];
            const int64_t *factor = factor_of(s, r, line);
            if (factor)
                add_low(y, a->low + r * MOST_RANK, (const cell *)factor[1] + first, factor[2], w->out, count);
            if (h)
                for (int64_t i = 0; i < count; i++) h[r * m->hidden + first + i] += y[i];
            else
                memcpy(a->y + r * a->outs + first, y, count * sizeof *y);
        }
    }
}

/* What a product needs of row r, whose x is there. */
static void ready(const step *s, const state *a, int64_t r, int64_t line, int64_t in) {
    float *x = a->x + r * a->wide;
    narrowed(x, in, a->narrow + r * a->wide, a->sums + r * (a->wide / GROUP));
    const int64_t *factor = factor_of(s, r, line);
    if (factor) lowered(x, (const cell *)factor[0], in, factor[2], a->low + r * MOST_RANK);
}

/* — items: attention of one row and one key head — */

static void turned(float *x, const float *cos, const float *sin, int64_t half) { /* RoFormer, in halves */
    if (half % 16)
        for (int64_t i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = first * cos[i] - second * sin[i];
            x[i + half] = second * cos[i] + first * sin[i];
        }
    else for (int64_t i = 0; i < half; i += 16) {
        v16 first = get(x + i), second = get(x + i + half), c = get(cos + i), w = get(sin + i);
        put(x + i, first * c - second * w);
        put(x + i + half, second * c + first * w);
    }
}

/* The totals of four vectors, scaled. */
static inline void totals(const v16 *sum, float *to, float scale) {
#ifdef __clang__
    for (int i = 0; i < 4; i++) to[i] = total(sum[i]) * scale;
#else
    const i16 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high = low + 8;
    v16 one = __builtin_shuffle(sum[0], sum[1], low) + __builtin_shuffle(sum[0], sum[1], high);
    v16 two = __builtin_shuffle(sum[2], sum[3], low) + __builtin_shuffle(sum[2], sum[3], high);
    const i16 even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, odd = even + 4;
    v16 all4 = __builtin_shuffle(one, two, even) + __builtin_shuffle(one, two, odd);
    all4 += __builtin_shuffle(all4, (i16){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    all4 += __builtin_shuffle(all4, (i16){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    for (int i = 0; i < 4; i++) to[i] = all4[4 * i] * scale;
#endif
}

/* Scores [heads, stride] of `heads` queries [heads, dim] with keys in `count` places of one page; next: read after. */
static inline __attribute__((always_inline)) void scored(
    const int heads, const float *q, int64_t dim, const cell *key, const cell *next, int64_t token, int64_t count,
    float scale, float *scores, int64_t stride) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4, key += 4 * token, next += 4 * token) {
        for (int n = 0; n < 4; n++) awaited(next + n * token, dim);
        v16 sum[4][4];
        for (int g = 0; g < heads; g++)
            for (int n = 0; n < 4; n++) sum[g][n] = all(0);
        for (int64_t i = 0; i < dim; i += 16)
            for (int n = 0; n < 4; n++) {
                v16 part = wide(key + n * token + i);
                for (int g = 0; g < heads; g++) sum[g][n] += part * get(q + g * dim + i);
            }
        for (int g = 0; g < heads; g++) totals(sum[g], scores + g * stride + t, scale);
    }
    for (; t < count; t++, key += token) {
        v16 sum[4];
        for (int g = 0; g < heads; g++) sum[g] = all(0);
        for (int64_t i = 0; i < dim; i += 16) {
            v16 part = wide(key + i);
            for (int g = 0; g < heads; g++) sum[g] += part * get(q + g * dim + i);
        }
        for (int g = 0; g < heads; g++) scores[g * stride + t] = total(sum[g]) * scale;
    }
}

/* sums [heads, 4] += shares [heads, stride] · `lanes` · 16 dimensions of the values in `count` places of one page. */
static inline __attribute__((always_inline)) void mixed(
    const int heads, const int lanes, const float *shares, int64_t stride, const cell *value, const cell *next,
    int64_t token, int64_t count, v16 *sums) {
    v16 sum[4][4];
    for (int g = 0; g < heads; g++)
        for (int c = 0; c < lanes; c++) sum[g][c] = sums[4 * g + c];
    for (int64_t t = 0; t < count; t++, value += token, next += token) {
        awaited(next, 16 * lanes);
        for (int c = 0; c < lanes; c++) {
            v16 part = wide(value + 16 * c);
            for (int g = 0; g < heads; g++) sum[g][c] += part * shares[g * stride + t];
        }
    }
    for (int g = 0; g < heads; g++)
        for (int c = 0; c < lanes; c++) sums[4 * g + c] = sum[g][c];
}

#define HEADS(n, call) case n: call; break;
#define UP_TO_4(count, CALL) switch (count) { HEADS(1, CALL(1)) HEADS(2, CALL(2)) HEADS(3, CALL(3)) HEADS(4, CALL(4)) }

static inline __attribute__((always_inline)) void mixed_of(
    int64_t heads, const int lanes, const float *shares, int64_t stride, const cell *value, const cell *next,
    int64_t token, int64_t count, v16 *sums) {
#define MIXED(n) mixed(n, lanes, shares, stride, value, next, token, count, sums)
    UP_TO_4(heads, MIXED)
}

/* Scores become e^(score − highest), with zeros up to a whole vector; returns their sum. */
static float shares_of(float *scores, int64_t length) {
    float highest = -INFINITY;
    for (int64_t t = 0; t < length; t++) highest = scores[t] > highest ? scores[t] : highest;
    v16 sum = all(0);
    for (int64_t t = 0; t < length; t += 16) {
        put(scores + t, power(get(scores + t) - highest));
        for (int64_t spare = length; spare < t + 16; spare++) scores[spare] = 0;
        sum += get(scores + t);
    }
    return total(sum);
}

static cell *place_of(const model *m, const step *s, int64_t index, int64_t r, int64_t head, int64_t t) {
    int64_t page = s->pages[s->sequence[r] * s->room + t / m->size];
    return m->cache + (((page * m->layers + index) * 2 * m->size + t % m->size) * m->kv_heads + head) * m->dim;
}

/* Keys and values of row r into the cache. */
static void stored(const model *m, const step *s, const state *a, int64_t index, int64_t r, int64_t head, float *own) {
    int64_t dim = m->dim, at = s->positions[r];
    const float *y = a->y + r * a->outs + (m->heads + head) * dim, *norm = m->layer[index].k_norm;
    cell *to = place_of(m, s, index, r, head, at);
    memcpy(own, y, dim * sizeof *own);
    if (norm) normed(own, norm, dim, m->eps, own);
    turned(own, m->cos + at * (dim / 2), m->sin + at * (dim / 2), dim / 2);
    write_cells(to, own, dim);
    write_cells(to + m->size * m->kv_heads * dim, y + m->kv_heads * dim, dim);
}

/* What row r reads of its sequence, for the query heads of one key head, into x. */
static void attended(const model *m, const step *s, const state *a, int64_t index, int64_t r, int64_t head, float *own) {
    int64_t group = m->heads / m->kv_heads, dim = m->dim, length = s->positions[r] + 1, stride = stride_of(m, s);
    int64_t token = m->kv_heads * dim, half = m->size * token; /* cells from token to token, from keys to values */
    const float *norm = m->layer[index].q_norm, *cos = m->cos + (length - 1) * (dim / 2);
    const float *sin = m->sin + (length - 1) * (dim / 2);
    float *scores = own, *q = own + group * stride;
#define PAGE(n) place_of(m, s, index, r, head, (n) * m->size)
    for (int64_t t = 0; t < length && t < m->size; t++) awaited(PAGE(0) + t * token, dim);
    memcpy(q, a->y + r * a->outs + head * group * dim, group * dim * sizeof *q);
    for (int64_t g = 0; g < group; g++) {
        if (norm) normed(q + g * dim, norm, dim, m->eps, q + g * dim);
        turned(q + g * dim, cos, sin, dim / 2);
    }
    float scale = 1 / sqrtf(dim), *to = a->x + r * a->wide + head * group * dim;
    for (int64_t g = 0; g < group; g += 4) {
        int64_t heads = group - g < 4 ? group - g : 4;
        for (int64_t t = 0; t < length; t += m->size) {
            const cell *key = PAGE(t / m->size);
            int64_t count = length - t < m->size ? length - t : m->size;
            const cell *next = t + m->size < length ? PAGE(t / m->size + 1) : PAGE(0) + half;
#define SCORED(n) scored(n, q + g * dim, dim, key, next, token, count, scale, scores + g * stride + t, stride)
            UP_TO_4(heads, SCORED)
        }
        float sum[4];
        for (int64_t i = 0; i < heads; i++) sum[i] = shares_of(scores + (g + i) * stride, length);
        for (int64_t d = 0; d < dim; d += 64) {
            v16 sums[16] = {0};
            int64_t lanes = dim - d < 64 ? (dim - d) / 16 : 4;
            for (int64_t t = 0; t < length; t += m->size) {
                const cell *value = PAGE(t / m->size) + half + d;
                int64_t count = length - t < m->size ? length - t : m->size;
                const cell *next = t + m->size < length ? PAGE(t / m->size + 1) + half + d : value;
                const float *shares = scores + g * stride + t;
                switch (lanes) {
                    case 1: mixed_of(heads, 1, shares, stride, value, next, token, count, sums); break;
                    case 2: mixed_of(heads, 2, shares, stride, value, next, token, count, sums); break;
                    case 3: mixed_of(heads, 3, shares, stride, value, next, token, count, sums); break;
                    case 4: mixed_of(heads, 4, shares, stride, value, next, token, count, sums); break;
                }
            }
            for (int64_t i = 0; i < heads; i++)
                for (int64_t c = 0; c < lanes; c++) put(to + (g + i) * dim + d + 16 * c, sums[4 * i + c] / sum[i]);
        }
    }
#undef PAGE
}

/* — the head — */

static inline __attribute__((always_inline)) void voiced(
    const int rows, const int words, const uint16_t *head, const model *m, const step *s, const state *a, int64_t row,
    int64_t word) {
    v16 sum[4][SPELT]; /* of rows row… of those that speak, which stand first now · head: of `words` words from word on */
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < words; w++) sum[r][w] = all(0);
#if PAIRS
    const operand *x = a->narrow + row * a->wide;
    for (int64_t i = 0; i < m->hidden; i += 32)
        for (int w = 0; w < words; w++) {
            __m512bh part = (__m512bh)_mm512_loadu_si512(head + w * m->hidden + i);
            for (int r = 0; r < rows; r++)
                sum[r][w] = (v16)_mm512_dpbf16_ps(
                    (__m512)sum[r][w], part, (__m512bh)_mm512_loadu_si512(x + r * a->wide + i));
        }
#else
    const float *x = a->x + row * a->wide;
    for (int64_t i = 0; i < m->hidden; i += 16)
        for (int w = 0; w < words; w++) {
            v16 part = half(head + w * m->hidden + i);
            for (int r = 0; r < rows; r++) sum[r][w] += part * get(x + r * a->wide + i);
        }
#endif
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < words; w++) s->logits[(row + r) * m->vocab + word + w] = total(sum[r][w]);
}

static void spoken(const model *m, const step *s, const state *a, int64_t n) { /* what the head multiplies, n-th of all */
    float *x = a->x + n * a->wide;
    normed(a->h + s->speakers[n] * m->hidden, m->norm, m->hidden, m->eps, x);
    narrowed(x, m->hidden, a->narrow + n * a->wide, a->sums + n * (a->wide / GROUP));
}

static void voice(const model *m, const step *s, const state *a, int64_t word, int64_t last, float *own) {
    for (; s->spoken && word < last; word += SPELT) {
        int64_t row = 0, words = last - word < SPELT ? last - word : SPELT;
        const uint16_t *head = vectors(&m->head, m->hidden, word, words, (uint16_t *)own), *half = head + SPELT / 2 * m->hidden;
        for (; words == SPELT && row + 4 <= s->spoken; row += 4) {
            voiced(4, SPELT / 2, head, m, s, a, row, word);
            voiced(4, SPELT / 2, half, m, s, a, row, word + SPELT / 2);
        }
        for (; row < s->spoken; row++)
            if (words == SPELT) voiced(1, SPELT, head, m, s, a, row, word);
            else for (int64_t w = 0; w < words; w++) voiced(1, 1, head + w * m->hidden, m, s, a, row, word + w);
    }
}

/* A matrix as numbers, for wide products: to [in, out]. */
void write_out(const matrix *w, cell *to, int64_t threads) {
    int64_t blocks = w->padded / BLOCK, pieces = w->in / GROUP * blocks;
#pragma omp parallel for num_threads(threads)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t g = piece / blocks, b = piece % blocks;
        const uint8_t *codes = w->codes + (b * w->in + g * GROUP) * (BLOCK / 2);
        const uint16_t *pairs = w->scales + (g * w->padded + b * BLOCK) * 2;
        float scale[BLOCK], zero[BLOCK], row[BLOCK];
        for (int64_t j = 0; j < BLOCK; j++) {
            scale[j] = bf16(pairs[2 * j]);
            zero[j] = bf16(pairs[2 * j + 1]) - 8 * scale[j];
        }
        cell *here = to + g * GROUP * w->out + b * BLOCK;
        for (int64_t k = 0; k < GROUP; k++, codes += BLOCK / 2, here += w->out) {
            for (int64_t j = 0; j < BLOCK / 2; j++) {
                row[j] = zero[j] + (float)(codes[j] & 15) * scale[j];
                row[j + BLOCK / 2] = zero[j + BLOCK / 2] + (float)(codes[j] >> 4) * scale[j + BLOCK / 2];
            }
            if ((b + 1) * BLOCK <= w->out) write_cells(here, row, BLOCK);
            else write_cells(here, row, w->out - b * BLOCK);
        }
    }
}

/* Words as numbers, for wide products: to [count, hidden]. */
void write_words(const words *w, int64_t hidden, int64_t first, int64_t count, float *to, int64_t threads) {
    int64_t begin = first * hidden / GROUP, end = (first + count) * hidden / GROUP;
#pragma omp parallel for num_threads(threads)
    for (int64_t g = begin; g < end; g++) {
        uint16_t room[GROUP];
        const uint16_t *numbers = vectors(w, GROUP, g, 1, room);
        for (int i = 0; i < GROUP; i += 16) put(to + (g - begin) * GROUP + i, half(numbers + i));
    }
}

/* Returns 0, or 1 without having done anything if an adapter's rank is too large. */
int run(const model *m, const step *s) {
    for (int64_t n = 0; n < s->sequences; n++)
        for (int64_t line = 0; s->tables[n] && line < m->layers * 4; line++)
            if (s->tables[n][line * 3 + 2] > MOST_RANK) return 1;
    state a;
    laid_out(m, s, &a);
#pragma omp parallel num_threads(s->threads)
    {
#ifdef _OPENMP
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        int thread = 0, threads = 1;
#endif
        int64_t from = s->rows * thread / threads, to = s->rows * (thread + 1) / threads;
        int64_t items = s->rows * m->kv_heads;
        float *own = a.own + thread * own_floats(m, s);
        for (int64_t r = from; r < to; r++) {
            const uint16_t *embedded = vectors(&m->embed, m->hidden, s->tokens[r], 1, (uint16_t *)own);
            for (int64_t i = 0; i < m->hidden; i += 16) put(a.h + r * m->hidden + i, half(embedded + i));
        }
        for (int64_t index = 0; index < m->layers; index++) {
            const layer *l = m->layer + index;
            for (int64_t r = from; r < to; r++) {
                normed(a.h + r * m->hidden, l->attn_norm, m->hidden, m->eps, a.x + r * a.wide);
                ready(s, &a, r, 4 * index, m->hidden);
            }
#pragma omp barrier
            multiplied(m, s, &a, &l->qkv, 4 * index, 0, thread, threads);
#pragma omp barrier
            for (int64_t i = items * thread / threads; i < items * (thread + 1) / threads; i++)
                stored(m, s, &a, index, i / m->kv_heads, i % m->kv_heads, own);
#pragma omp barrier
            for (int64_t i = items * thread / threads; i < items * (thread + 1) / threads; i++)
                attended(m, s, &a, index, i / m->kv_heads, i % m->kv_heads, own);
#pragma omp barrier
            for (int64_t r = from; r < to; r++) ready(s, &a, r, 4 * index + 1, m->heads * m->dim);
#pragma omp barrier
            multiplied(m, s, &a, &l->o, 4 * index + 1, a.h, thread, threads);
#pragma omp barrier
            for (int64_t r = from; r < to; r++) {
                normed(a.h + r * m->hidden, l->mlp_norm, m->hidden, m->eps, a.x + r * a.wide);
                ready(s, &a, r, 4 * index + 2, m->hidden);
            }
#pragma omp barrier
            multiplied(m, s, &a, &l->gate_up, 4 * index + 2, 0, thread, threads);
#pragma omp barrier
            for (int64_t r = from; r < to; r++) {
                float *gate = a.y + r * a.outs, *up = gate + m->intermediate, *x = a.x + r * a.wide;
                for (int64_t i = 0; i < m->intermediate; i += 16) {
                    v16 g = get(gate + i), e = power(either(g < 0, g, -g));
                    v16 sigmoid = either(g < 0, e, all(1)) / (1 + e);
                    put(x + i, g * sigmoid * get(up + i));
                }
                ready(s, &a, r, 4 * index + 3, m->intermediate);
            }
#pragma omp barrier
            multiplied(m, s, &a, &l->down, 4 * index + 3, a.h, thread, threads);
#pragma omp barrier
        }
        for (int64_t n = s->spoken * thread / threads; n < s->spoken * (thread + 1) / threads; n++) spoken(m, s, &a, n);
#pragma omp barrier
        voice(m, s, &a, m->vocab * thread / threads, m->vocab * (thread + 1) / threads, own);
    }
    return 0;
}
