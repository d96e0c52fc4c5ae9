/* Vectors of sixteen numbers, for step.c and draw.c: the compiler's own, as wide as the machine's. */

#include <stdint.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16x32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));

static inline v16 get(const float *p) { return *(const v16 *)p; }
static inline void put(float *p, v16 v) { *(v16 *)p = v; }
static inline v16 all(float value) { return value - (v16){0}; }

static inline v16 either(i16 which, v16 yes, v16 no) { return (v16)(((i16)yes & which) | ((i16)no & ~which)); }

static inline float total(v16 v) {
#ifdef __clang__
    float part[16];
    put(part, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
#else
    v += __builtin_shuffle(v, (i16){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, (i16){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, (i16){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, (i16){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
#endif
}

/* e^x for x ≤ 0, within 3e-7 of it (Cephes' polynomial) */
static inline v16 power(v16 x) {
    x = either(x < -87.0f, all(-87.0f), x);
    v16 n = x * 1.44269504f - 0.5f;
    i16 whole = __builtin_convertvector(n, i16); /* towards zero: n ≤ 0 */
    n = __builtin_convertvector(whole, v16);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 y = all(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return y * (v16)((whole + 127) << 23);
}
