/* The next token of every row of a step, in one call, without an allocation: what sampler.py says in torch.

   A row is read once for its highest logit. If it wants no more, that is its token; else its logits become

       e = e^((logit − highest) / temperature), 0 where that is less than 1e-38

   and its chance falls on a token in the sum of all e, or of the likeliest alone, if top-k, min-p or the nucleus leave no
   more. For these the row is cut at ever smaller e, until all that they leave is above the cut, and of that only as much
   is put in order as they leave. Sums are of fp64 over blocks of fp32, row by row: the same row gives the same token
   whoever stands beside it. */

#include <float.h>
#include <math.h>
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

/* — the likeliest first: a heap of items, e above, the place's complement below, so that of equals the first is higher — */

static uint64_t item_of(const float *row, int64_t at) {
    uint32_t bits;
    memcpy(&bits, row + at, sizeof bits);
    return (uint64_t)bits << 32 | (uint32_t)~at;
}

static int64_t place_of(uint64_t item) { return (uint32_t)~item; }

static float e_of(uint64_t item) {
    uint32_t bits = item >> 32;
    float e;
    memcpy(&e, &bits, sizeof e);
    return e;
}

static void sink(uint64_t *heap, int64_t at, int64_t count) {
    uint64_t item = heap[at];
    for (int64_t below; (below = 2 * at + 1) < count; at = below) {
        if (below + 1 < count && heap[below + 1] > heap[below]) below++;
        if (heap[below] <= item) break;
        heap[at] = heap[below];
    }
    heap[at] = item;
}

/* A heap of what is at least `least`; returns how many. */
static int64_t heaped(const float *row, int64_t count, float least, uint64_t *heap) {
    int64_t found = 0;
    for (int64_t at = 0; at < count; at += 16)
        if (any(some(row, at, count, 0) >= least))
            for (int64_t i = at; i < count && i < at + 16; i++)
                if (row[i] >= least) heap[found++] = item_of(row, i);
    for (int64_t at = found / 2 - 1; at >= 0; at--) sink(heap, at, found);
    return found;
}

/* Only as many are put in order as top-k, min-p or the nucleus leave. */
static int64_t from_the_likeliest(const float *row, int64_t count, const wish *asked, uint64_t *room) {
    static const float cuts[] = {0x1p-1, 0x1p-2, 0x1p-4, 0x1p-8, 0x1p-12, 0x1p-16, 0x1p-20, 0x1p-28, 0x1p-40, FLT_MIN};
    int64_t number = 0, by_nucleus = asked->top_k <= 0 && asked->min_p <= 0;
    double whole = mass_of(row, count, 0, &number);
    float least = 0;
    for (int c = 0; c < 10; c++) {
        least = cuts[c], number = 0;
        double mass = mass_of(row, count, least, &number);
        if (least <= asked->min_p || (asked->top_k > 0 && number >= asked->top_k)) break;
        if (by_nucleus && mass >= whole * asked->top_p) break;
    }
    /* Items leave the heap for the places that it no longer needs: the n-th stands n places before the end. */
    int64_t size = heaped(row, count, least, room), kept = 0;
    uint64_t *end = room + size;
    double left = 0, mass = 0, before = 0;
    while (size > 0) {
        uint64_t item = room[0];
        float e = e_of(item);
        if (kept && (e < asked->min_p || (asked->top_k > 0 && kept >= asked->top_k))) break;
        if (kept && by_nucleus && left >= whole * asked->top_p) break;
        room[0] = room[--size], sink(room, 0, size);
        *(end - ++kept) = item, left += e;
    }
    int64_t inside = 0;
    while (inside < kept && (by_nucleus || inside == 0 || mass < left * asked->top_p)) mass += e_of(*(end - ++inside));
    double wanted = fallen(asked->chance, mass);
    for (int64_t n = 1; n <= inside; n++)
        if ((before += e_of(*(end - n))) > wanted) return place_of(*(end - n));
    return place_of(*(end - inside));
}

/* logits: [rows, vocab], of which rows that draw by chance are overwritten · room: [threads, vocab] · tokens: [rows], −1
   for a row without a largest logit. Never a smaller team than a step's: threads that are left out end, and come anew. */
void draw(float *logits, int64_t rows, int64_t vocab, const wish *asked, uint64_t *room, int64_t *tokens, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1) schedule(static, 1)
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
