/* The bodies in plain C, for every processor; the compiler may vectorise them. */

#include <string.h>

#include "bodies.h"

#define INLINE static inline __attribute__((always_inline))
#define BODY_TARGET
#define PREFETCH(memory) ((void)0)
#define EACH for (int i = 0; i < BLOCK; i++)

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* By integers, so that a processor that flushes denormals changes nothing. */
INLINE float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) {
        return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    if (magnitude < 0x400) {
        return float_of(bits_of((float)magnitude * 0x1p-24f) | sign);
    }
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

/* Rounded to nearest, ties to even. */
INLINE uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (magnitude >= 0x47800000) { /* 65536 */
        return sign | 0x7c00;
    }
    uint32_t shift = 13;
    if (magnitude < 0x38800000) { /* 2^-14, the smallest normal half */
        if (magnitude < 0x33000000) { /* 2^-25, half of the smallest */
            return sign;
        }
        shift = 126 - (magnitude >> 23);
        magnitude = (magnitude & 0x7fffff) | 0x800000;
    } else {
        magnitude -= 112u << 23;
    }
    uint32_t kept = magnitude >> shift;
    uint32_t lost = magnitude & ((1u << shift) - 1), tie = 1u << (shift - 1);
    return sign | (uint16_t)(kept + (lost > tie || (lost == tie && (kept & 1))));
}

INLINE float float_of_bfloat(uint16_t bfloat)
{
    return float_of((uint32_t)bfloat << 16);
}

INLINE uint16_t bfloat_of_float(float value)
{
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(bits >> 16 | 0x40);
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef struct { float at[BLOCK]; } floats;
typedef struct { double at[BLOCK]; } doubles;
typedef struct { uint16_t at[BLOCK]; } words;

/* Copied, because the memory of a tensor may lie at any address. */
#define MEMORY(D, type) \
    typedef type block_##D; \
    INLINE type load_##D(const char *memory) \
    { \
        type block; \
        memcpy(&block, memory, sizeof block); \
        return block; \
    } \
    INLINE void store_##D(char *memory, type block) \
    { \
        memcpy(memory, &block, sizeof block); \
    }

#define JUDGING(D, type, integer, magnitude) \
    typedef struct { integer at[BLOCK]; } largest_##D; \
    INLINE largest_##D no_largest_##D(void) \
    { \
        return (largest_##D){{0}}; \
    } \
    INLINE largest_##D larger_##D(largest_##D largest, type block) \
    { \
        integer bits[BLOCK]; \
        memcpy(bits, &block, sizeof bits); \
        EACH { \
            integer it = bits[i] & magnitude; \
            largest.at[i] = it > largest.at[i] ? it : largest.at[i]; \
        } \
        return largest; \
    } \
    INLINE uint64_t reduce_##D(largest_##D largest) \
    { \
        integer most = 0; \
        EACH most = largest.at[i] > most ? largest.at[i] : most; \
        return most; \
    }

#define SQUARES(D, type) \
    typedef type wide_##D; \
    typedef doubles sums_##D; \
    INLINE doubles no_sums_##D(void) \
    { \
        return (doubles){{0}}; \
    } \
    INLINE doubles add_squares_##D(doubles sums, type product) \
    { \
        EACH { \
            double it = product.at[i]; \
            sums.at[i] += it * it; \
        } \
        return sums; \
    } \
    INLINE void put_sums_##D(doubles sums, double *lanes) \
    { \
        memcpy(lanes, &sums, sizeof sums); \
    } \
    INLINE type multiply_##D(type block, float factor) \
    { \
        EACH block.at[i] *= factor; \
        return block; \
    }

#define WIDTH(D, to_float, from_float) \
    INLINE floats widen_##D(words block) \
    { \
        floats wide; \
        EACH wide.at[i] = to_float(block.at[i]); \
        return wide; \
    } \
    INLINE words narrow_##D(floats wide) \
    { \
        words block; \
        EACH block.at[i] = from_float(wide.at[i]); \
        return block; \
    }

#define NO_WIDTH(D, type) \
    INLINE type widen_##D(type block) { return block; } \
    INLINE type narrow_##D(type wide) { return wide; }

MEMORY(f16, words) JUDGING(f16, words, uint16_t, 0x7fff) SQUARES(f16, floats)
WIDTH(f16, float_of_half, half_of_float)

MEMORY(bf16, words) JUDGING(bf16, words, uint16_t, 0x7fff) SQUARES(bf16, floats)
WIDTH(bf16, float_of_bfloat, bfloat_of_float)

MEMORY(f32, floats) JUDGING(f32, floats, uint32_t, 0x7fffffff) SQUARES(f32, floats)
NO_WIDTH(f32, floats)

MEMORY(f64, doubles) JUDGING(f64, doubles, uint64_t, 0x7fffffffffffffff) SQUARES(f64, doubles)
NO_WIDTH(f64, doubles)

#include "all_loops.h"

const struct bodies shardscale_portable = {"portable", ALL_BODIES};
