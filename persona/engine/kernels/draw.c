/* The next token of every row of a step, in one call, without an allocation: what sampler.py says in torch.

   A row is read once for its highest logit. If it wants no more, that is its token; else its logits become

       e = e^((logit − highest) / temperature), 0 where that is less than 1e-38

   and its chance falls on a token in the sum of all e, or in that of the likeliest, if top-k, min-p or the nucleus leave
   no more. For these the row is cut at ever smaller e, until what they leave is surely behind the cut; only that is put
   in order. Sums are of fp64 over blocks of fp32, so that the same row gives the same token whoever stands beside it. */

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define BLOCKED 128 /* values that are added up in fp32 */

typedef struct { /* what a row asks for, in the order of sampler.Wish */
    double temperature, top_k, top_p, min_p; /* temperature 0: the likeliest; top_k 0: no limit */
    double chance;                           /* in [0, 1) */
} wish;

/* A vector of a row from `at` on; `rest` behind its end. */
static inline v16 some(const float *row, int64_t at, int64_t count, float rest) {
    if (at + 16 <= count) return get(row + at);
    float part[16];
    for (int i = 0; i < 16; i++) part[i] = at + i < count ? row[at + i] : rest;
    return get(part);
}

static inline int any(i16 which) {
    int64_t parts[8], found = 0;
    memcpy(parts, &which, sizeof which);
    for (int i = 0; i < 8; i++) found |= parts[i];
    return found != 0;
}

/* The highest of a row; NaN if there is one in it. */
static float highest(const float *row, int64_t count) {
    v16 most = all(-INFINITY);
    i16 broken = {0};
    for (int64_t at = 0; at < count; at += 16) {
        v16 here = some(row, at, count, -INFINITY);
        most = either(here > most, here, most);
        broken |= here != here;
    }
    float part[16], found = -INFINITY;
    put(part, most);
    for (int i = 0; i < 16; i++) found = part[i] > found ? part[i] : found;
    return any(broken) ? NAN : found;
}

static int64_t first(const float *row, int64_t count, float value) {
    for (int64_t at = 0; at < count; at += 16)
        if (any(some(row, at, count, -INFINITY) == value))
            for (int64_t i = at; i < count && i < at + 16; i++)
                if (row[i] == value) return i;
    return -1;
}

/* Logits become e. */
static void powers(float *row, int64_t count, float high, double temperature) {
    float by = 1 / temperature;
    for (int64_t at = 0; at < count; at += 16) {
        v16 x = (some(row, at, count, -INFINITY) - high) * by;
        v16 e = either(x < -87.0f, all(0), power(x));
        if (at + 16 <= count) put(row + at, e);
        else memcpy(row + at, &e, (count - at) * sizeof *row);
    }
}

/* The sum of what is at least `least`, in [at, at + BLOCKED) of a row; how many are is added to *number. */
static inline float block(const float *row, int64_t at, int64_t count, float least, int64_t *number) {
    v16 sum = all(0);
    i16 kept = {0};
    for (int64_t end = at + BLOCKED; at < end && at < count; at += 16) {
        v16 e = some(row, at, count, 0);
        sum += either(e >= least, e, all(0));
        kept -= e >= least;
    }
    for (int i = 0; i < 16; i++) *number += kept[i];
    return total(sum);
}

static double mass_of(const float *row, int64_t count, float least, int64_t *number) {
    double mass = 0;
    for (int64_t at = 0; at < count; at += BLOCKED) mass += block(row, at, count, least, number);
    return mass;
}

/* Where a chance falls in a mass: never behind the last that has some. */
static double fallen(double chance, double mass) { return fmin(chance * mass, nextafter(mass, 0)); }

static int64_t from_all(const float *row, int64_t count, double chance) {
    int64_t number = 0, last = 0;
    double wanted = fallen(chance, mass_of(row, count, 0, &number)), before = 0;
    for (int64_t at = 0; at < count; at += BLOCKED) {
        float here = block(row, at, count, 0, &number);
        if (here > 0 && before + here > wanted) {
            for (int64_t i = at; i < count && i < at + BLOCKED; i++) {
                if (row[i] > 0) last = i;
                if (row[i] > 0 && (before += row[i]) > wanted) break;
            }
            return last; /* the block's last, where its own sum was rounded up */
        }
        before += here;
    }
    return first(row, count, 1); /* not reached: the mass is the sum of the blocks */
}

static int falling(const void *a, const void *b) {
    uint64_t one = *(const uint64_t *)a, two = *(const uint64_t *)b;
    return (one < two) - (one > two);
}

static float e_of(uint64_t item) {
    uint32_t bits = item >> 32;
    float e;
    memcpy(&e, &bits, sizeof e);
    return e;
}

/* What is at least `least`, the likeliest first, of equals the first: e above, the place's complement below. */
static int64_t ordered(const float *row, int64_t count, float least, uint64_t *room) {
    int64_t found = 0;
    for (int64_t at = 0; at < count; at += 16) {
        if (!any(some(row, at, count, 0) >= least)) continue;
        for (int64_t i = at; i < count && i < at + 16; i++) {
            uint32_t bits;
            memcpy(&bits, row + i, sizeof bits);
            if (row[i] >= least) room[found++] = (uint64_t)bits << 32 | (uint32_t)~i;
        }
    }
    qsort(room, found, sizeof *room, falling);
    return found;
}

static int64_t from_the_likeliest(const float *row, int64_t count, const wish *asked, uint64_t *room) {
    static const float cuts[] = {0.5f, 0.25f, 1.0f / 16, 1.0f / 256, 1.0f / 65536, FLT_MIN};
    int64_t number = 0, by_nucleus = asked->top_k <= 0 && asked->min_p <= 0;
    double whole = mass_of(row, count, 0, &number);
    float least = 0;
    for (int c = 0; c < 6; c++) {
        least = cuts[c], number = 0;
        double mass = mass_of(row, count, least, &number);
        if (least <= asked->min_p || (asked->top_k > 0 && number >= asked->top_k)) break;
        if (by_nucleus && mass >= whole * asked->top_p) break;
    }
    int64_t kept = ordered(row, count, least, room);
    if (asked->top_k > 0 && asked->top_k < kept) kept = asked->top_k;
    while (kept > 1 && e_of(room[kept - 1]) < asked->min_p) kept--;
    double left = 0, mass = 0, before = 0;
    for (int64_t i = 0; i < kept; i++) left += e_of(room[i]);
    if (by_nucleus) left = whole;
    int64_t inside = 0;
    while (inside < kept && (inside == 0 || mass < left * asked->top_p)) mass += e_of(room[inside++]);
    double wanted = fallen(asked->chance, mass);
    for (int64_t i = 0; i < inside; i++)
        if ((before += e_of(room[i])) > wanted) return (uint32_t)~room[i];
    return (uint32_t)~room[inside - 1];
}

/* logits: [rows, vocab], which rows that draw change · room: [threads, vocab] · tokens: [rows], −1 for a row whose
   logits are not finite. */
void draw(float *logits, int64_t rows, int64_t vocab, const wish *asked, uint64_t *room, int64_t *tokens, int64_t threads) {
#pragma omp parallel for num_threads(threads < rows ? threads : rows) schedule(static, 1)
    for (int64_t r = 0; r < rows; r++) {
        float *row = logits + r * vocab, high = highest(row, vocab);
        const wish *mine = asked + r;
        if (!isfinite(high)) tokens[r] = -1;
        else if (mine->temperature <= 0) tokens[r] = first(row, vocab, high);
        else {
            powers(row, vocab, high, mine->temperature);
            if (mine->top_k > 0 || mine->top_p < 1 || mine->min_p > 0) {
#ifdef _OPENMP
                uint64_t *own = room + omp_get_thread_num() * vocab;
#else
                uint64_t *own = room;
#endif
                tokens[r] = from_the_likeliest(row, vocab, mine, own);
            } else tokens[r] = from_all(row, vocab, mine->chance);
        }
    }
}
