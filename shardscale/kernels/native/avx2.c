/* The bodies for AVX2 with F16C and FMA: a block is four registers of float32. */

#include "bodies.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define BODY_TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE BODY_TARGET static inline __attribute__((always_inline))

/* A page ahead, as measured for avx512.c. */
#define PREFETCH(memory) _mm_prefetch((memory) + 4096, _MM_HINT_T0)

typedef struct { __m256 at[4]; } floats;
typedef struct { __m256d at[8]; } doubles;
typedef struct { __m256i at[2]; } words;

/* Sums of squares: in the order of the elements, except for bfloat16. */

INLINE doubles no_sums(void)
{
    __m256d zero = _mm256_setzero_pd();
    return (doubles){{zero, zero, zero, zero, zero, zero, zero, zero}};
}

INLINE __m256d add_exact_square(__m256d sum, __m128 value)
{
    /* The square of a float32 is exact in float64, so fused or not are the same bits. */
    __m256d wide = _mm256_cvtps_pd(value);
    return _mm256_fmadd_pd(wide, wide, sum);
}

INLINE doubles add_exact_squares(doubles sums, floats values)
{
    for (int i = 0; i < 4; i++) {
        __m128 low = _mm256_castps256_ps128(values.at[i]);
        __m128 high = _mm256_extractf128_ps(values.at[i], 1);
        sums.at[2 * i] = add_exact_square(sums.at[2 * i], low);
        sums.at[2 * i + 1] = add_exact_square(sums.at[2 * i + 1], high);
    }
    return sums;
}

INLINE void put_sums(doubles sums, double *lanes)
{
    for (int i = 0; i < 8; i++) {
        _mm256_storeu_pd(lanes + 4 * i, sums.at[i]);
    }
}

INLINE floats multiply(floats values, float factor)
{
    for (int i = 0; i < 4; i++) {
        values.at[i] = _mm256_mul_ps(values.at[i], _mm256_set1_ps(factor));
    }
    return values;
}

/* float16 and bfloat16 */

INLINE words load_words(const char *memory)
{
    return (words){{_mm256_loadu_si256((const __m256i *)memory),
                    _mm256_loadu_si256((const __m256i *)(memory + 32))}};
}

INLINE void store_words(char *memory, words block)
{
    _mm256_storeu_si256((__m256i *)memory, block.at[0]);
    _mm256_storeu_si256((__m256i *)(memory + 32), block.at[1]);
}

INLINE __m256i larger_words(__m256i largest, words block)
{
    __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i low = _mm256_and_si256(block.at[0], magnitude);
    __m256i high = _mm256_and_si256(block.at[1], magnitude);
    return _mm256_max_epu16(largest, _mm256_max_epu16(low, high));
}

INLINE uint64_t reduce_words(__m256i largest)
{
    uint16_t at[16], most = 0;
    _mm256_storeu_si256((__m256i *)at, largest);
    for (int i = 0; i < 16; i++) {
        most = at[i] > most ? at[i] : most;
    }
    return most;
}

typedef words block_f16, block_bf16;
typedef __m256i largest_f16, largest_bf16;
typedef floats wide_f16, wide_bf16;
typedef doubles sums_f16, sums_bf16;

INLINE words load_f16(const char *memory) { return load_words(memory); }
INLINE void store_f16(char *memory, words block) { store_words(memory, block); }
INLINE __m256i no_largest_f16(void) { return _mm256_setzero_si256(); }
INLINE __m256i larger_f16(__m256i largest, words block) { return larger_words(largest, block); }
INLINE uint64_t reduce_f16(__m256i largest) { return reduce_words(largest); }
INLINE doubles no_sums_f16(void) { return no_sums(); }
INLINE doubles add_squares_f16(doubles sums, floats product)
{
    return add_exact_squares(sums, product);
}
INLINE void put_sums_f16(doubles sums, double *lanes) { put_sums(sums, lanes); }
INLINE floats multiply_f16(floats values, float factor) { return multiply(values, factor); }

INLINE floats widen_f16(words block)
{
    return (floats){{_mm256_cvtph_ps(_mm256_castsi256_si128(block.at[0])),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(block.at[0], 1)),
                     _mm256_cvtph_ps(_mm256_castsi256_si128(block.at[1])),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(block.at[1], 1))}};
}

INLINE __m128i round_to_f16(__m256 values)
{
    return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE words narrow_f16(floats values)
{
    return (words){{_mm256_set_m128i(round_to_f16(values.at[1]), round_to_f16(values.at[0])),
                    _mm256_set_m128i(round_to_f16(values.at[3]), round_to_f16(values.at[2]))}};
}

/* bfloat16 is widened without moving it: the even elements of both registers, then the odd. */

INLINE words load_bf16(const char *memory) { return load_words(memory); }
INLINE void store_bf16(char *memory, words block) { store_words(memory, block); }
INLINE __m256i no_largest_bf16(void) { return _mm256_setzero_si256(); }
INLINE __m256i larger_bf16(__m256i largest, words block) { return larger_words(largest, block); }
INLINE uint64_t reduce_bf16(__m256i largest) { return reduce_words(largest); }
INLINE doubles no_sums_bf16(void) { return no_sums(); }
INLINE doubles add_squares_bf16(doubles sums, floats product)
{
    return add_exact_squares(sums, product);
}
INLINE floats multiply_bf16(floats values, float factor) { return multiply(values, factor); }

INLINE void put_sums_bf16(doubles sums, double *lanes)
{
    double even_then_odd[BLOCK];
    put_sums(sums, even_then_odd);
    for (int i = 0; i < BLOCK; i++) {
        lanes[i] = even_then_odd[i % 2 * (BLOCK / 2) + i / 2];
    }
}

INLINE floats widen_bf16(words block)
{
    __m256i high_half = _mm256_set1_epi32((int)0xffff0000);
    return (floats){{_mm256_castsi256_ps(_mm256_slli_epi32(block.at[0], 16)),
                     _mm256_castsi256_ps(_mm256_slli_epi32(block.at[1], 16)),
                     _mm256_castsi256_ps(_mm256_and_si256(block.at[0], high_half)),
                     _mm256_castsi256_ps(_mm256_and_si256(block.at[1], high_half))}};
}

INLINE __m256i round_to_bf16(__m256 value)
{
    /* A product that is NaN is a quiet one, whose mark is in the half that stays: no rounding. */
    __m256i is_number = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
    __m256i bits = _mm256_castps_si256(value);
    __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i to_nearest = _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff));
    return _mm256_add_epi32(bits, _mm256_and_si256(to_nearest, is_number));
}

INLINE __m256i join_bf16(__m256 even, __m256 odd)
{
    __m256i low = _mm256_srli_epi32(round_to_bf16(even), 16);
    return _mm256_blend_epi16(low, round_to_bf16(odd), 0xaa);
}

INLINE words narrow_bf16(floats values)
{
    return (words){{join_bf16(values.at[0], values.at[2]), join_bf16(values.at[1], values.at[3])}};
}

/* float32 */

typedef floats block_f32, wide_f32;
typedef __m256i largest_f32;
typedef doubles sums_f32;

INLINE floats load_f32(const char *memory)
{
    const float *at = (const float *)memory;
    return (floats){{_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8),
                     _mm256_loadu_ps(at + 16), _mm256_loadu_ps(at + 24)}};
}
INLINE void store_f32(char *memory, floats block)
{
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps((float *)memory + 8 * i, block.at[i]);
    }
}
INLINE __m256i no_largest_f32(void) { return _mm256_setzero_si256(); }
INLINE __m256i larger_f32(__m256i largest, floats block)
{
    for (int i = 0; i < 4; i++) {
        __m256i bits = _mm256_castps_si256(block.at[i]);
        __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
        largest = _mm256_max_epu32(largest, magnitude);
    }
    return largest;
}
INLINE uint64_t reduce_f32(__m256i largest)
{
    uint32_t at[8], most = 0;
    _mm256_storeu_si256((__m256i *)at, largest);
    for (int i = 0; i < 8; i++) {
        most = at[i] > most ? at[i] : most;
    }
    return most;
}
INLINE doubles no_sums_f32(void) { return no_sums(); }
INLINE doubles add_squares_f32(doubles sums, floats product)
{
    return add_exact_squares(sums, product);
}
INLINE void put_sums_f32(doubles sums, double *lanes) { put_sums(sums, lanes); }
INLINE floats multiply_f32(floats values, float factor) { return multiply(values, factor); }
INLINE floats widen_f32(floats block) { return block; }
INLINE floats narrow_f32(floats values) { return values; }

/* float64: a square is rounded before it is added, as in the other bodies. */

typedef doubles block_f64, wide_f64, sums_f64;
typedef __m256i largest_f64;

INLINE doubles load_f64(const char *memory)
{
    doubles block;
    for (int i = 0; i < 8; i++) {
        block.at[i] = _mm256_loadu_pd((const double *)memory + 4 * i);
    }
    return block;
}
INLINE void store_f64(char *memory, doubles block)
{
    for (int i = 0; i < 8; i++) {
        _mm256_storeu_pd((double *)memory + 4 * i, block.at[i]);
    }
}
INLINE __m256i no_largest_f64(void) { return _mm256_setzero_si256(); }
INLINE __m256i larger_f64(__m256i largest, doubles block)
{
    for (int i = 0; i < 8; i++) {
        __m256i bits = _mm256_castpd_si256(block.at[i]);
        __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi64x(0x7fffffffffffffff));
        __m256i is_larger = _mm256_cmpgt_epi64(magnitude, largest);
        largest = _mm256_blendv_epi8(largest, magnitude, is_larger);
    }
    return largest;
}
INLINE uint64_t reduce_f64(__m256i largest)
{
    uint64_t at[4], most = 0;
    _mm256_storeu_si256((__m256i *)at, largest);
    for (int i = 0; i < 4; i++) {
        most = at[i] > most ? at[i] : most;
    }
    return most;
}
INLINE doubles no_sums_f64(void) { return no_sums(); }
INLINE doubles add_squares_f64(doubles sums, doubles product)
{
    for (int i = 0; i < 8; i++) {
        __m256d square = _mm256_mul_pd(product.at[i], product.at[i]);
        sums.at[i] = _mm256_add_pd(sums.at[i], square);
    }
    return sums;
}
INLINE void put_sums_f64(doubles sums, double *lanes) { put_sums(sums, lanes); }
INLINE doubles multiply_f64(doubles values, float factor)
{
    for (int i = 0; i < 8; i++) {
        values.at[i] = _mm256_mul_pd(values.at[i], _mm256_set1_pd(factor));
    }
    return values;
}
INLINE doubles widen_f64(doubles block) { return block; }
INLINE doubles narrow_f64(doubles values) { return values; }

#include "all_loops.h"

const struct bodies shardscale_avx2 = {"avx2", ALL_BODIES};

#endif
