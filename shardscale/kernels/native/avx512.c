/* The bodies for AVX-512: a block is two registers of float32, or four of float64. */

#include "bodies.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define BODY_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE BODY_TARGET static inline __attribute__((always_inline))

/* A page ahead, where the processor's own prefetching ends. Of 1 GiB of bfloat16 with the sum, one
   thread did 3.4 GB/s without, 8.9 a quarter of a page ahead, 11.9 a page ahead, and no more beyond
   (Xeon with AVX-512, shared with others, 2026-11-26); within the caches it made no difference. */
#define PREFETCH(memory) _mm_prefetch((memory) + 4096, _MM_HINT_T0)

typedef struct { __m512 low, high; } floats;
typedef struct { __m512d at[4]; } doubles;

/* Sums of squares: in the order of the elements, except for bfloat16. */

INLINE doubles no_sums(void)
{
    __m512d zero = _mm512_setzero_pd();
    return (doubles){{zero, zero, zero, zero}};
}

INLINE __m512d add_exact_square(__m512d sum, __m256 value)
{
    /* The square of a float32 is exact in float64, so fused or not are the same bits. */
    __m512d wide = _mm512_cvtps_pd(value);
    return _mm512_fmadd_pd(wide, wide, sum);
}

INLINE doubles add_exact_squares(doubles sums, floats values)
{
    sums.at[0] = add_exact_square(sums.at[0], _mm512_castps512_ps256(values.low));
    sums.at[1] = add_exact_square(sums.at[1], _mm512_extractf32x8_ps(values.low, 1));
    sums.at[2] = add_exact_square(sums.at[2], _mm512_castps512_ps256(values.high));
    sums.at[3] = add_exact_square(sums.at[3], _mm512_extractf32x8_ps(values.high, 1));
    return sums;
}

INLINE void put_sums(doubles sums, double *lanes)
{
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_pd(lanes + 8 * i, sums.at[i]);
    }
}

INLINE floats multiply(floats values, float factor)
{
    __m512 factors = _mm512_set1_ps(factor);
    return (floats){_mm512_mul_ps(values.low, factors), _mm512_mul_ps(values.high, factors)};
}

/* float16 and bfloat16 */

INLINE uint64_t reduce_words(__m512i largest)
{
    uint16_t at[BLOCK], most = 0;
    _mm512_storeu_si512(at, largest);
    for (int i = 0; i < BLOCK; i++) {
        most = at[i] > most ? at[i] : most;
    }
    return most;
}

INLINE __m512i larger_words(__m512i largest, __m512i words)
{
    return _mm512_max_epu16(largest, _mm512_and_si512(words, _mm512_set1_epi16(0x7fff)));
}

typedef __m512i block_f16, largest_f16, block_bf16, largest_bf16;
typedef floats wide_f16, wide_bf16;
typedef doubles sums_f16, sums_bf16;

INLINE __m512i load_f16(const char *memory) { return _mm512_loadu_si512(memory); }
INLINE void store_f16(char *memory, __m512i block) { _mm512_storeu_si512(memory, block); }
INLINE __m512i no_largest_f16(void) { return _mm512_setzero_si512(); }
INLINE __m512i larger_f16(__m512i largest, __m512i block) { return larger_words(largest, block); }
INLINE uint64_t reduce_f16(__m512i largest) { return reduce_words(largest); }
INLINE doubles no_sums_f16(void) { return no_sums(); }
INLINE doubles add_squares_f16(doubles sums, floats product)
{
    return add_exact_squares(sums, product);
}
INLINE void put_sums_f16(doubles sums, double *lanes) { put_sums(sums, lanes); }
INLINE floats multiply_f16(floats values, float factor) { return multiply(values, factor); }

INLINE floats widen_f16(__m512i block)
{
    return (floats){_mm512_cvtph_ps(_mm512_castsi512_si256(block)),
                    _mm512_cvtph_ps(_mm512_extracti64x4_epi64(block, 1))};
}

INLINE __m512i narrow_f16(floats values)
{
    __m256i low = _mm512_cvtps_ph(values.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i high = _mm512_cvtps_ph(values.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* A block of bfloat16 is widened without moving it: `low` has its even elements, `high` its odd. */

INLINE __m512i load_bf16(const char *memory) { return _mm512_loadu_si512(memory); }
INLINE void store_bf16(char *memory, __m512i block) { _mm512_storeu_si512(memory, block); }
INLINE __m512i no_largest_bf16(void) { return _mm512_setzero_si512(); }
INLINE __m512i larger_bf16(__m512i largest, __m512i block) { return larger_words(largest, block); }
INLINE uint64_t reduce_bf16(__m512i largest) { return reduce_words(largest); }
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

INLINE floats widen_bf16(__m512i block)
{
    __m512i odd = _mm512_and_si512(block, _mm512_set1_epi32((int)0xffff0000));
    return (floats){_mm512_castsi512_ps(_mm512_slli_epi32(block, 16)), _mm512_castsi512_ps(odd)};
}

INLINE __m512i round_to_bf16(__m512 value)
{
    /* A product that is NaN is a quiet one, whose mark is in the half that stays: no rounding. */
    __mmask16 is_number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    __m512i bits = _mm512_castps_si512(value);
    __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i to_nearest = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(bits, is_number, bits, to_nearest);
}

INLINE __m512i narrow_bf16(floats values)
{
    __m512i even = _mm512_srli_epi32(round_to_bf16(values.low), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_to_bf16(values.high));
}

/* float32 */

typedef floats block_f32, wide_f32;
typedef __m512i largest_f32;
typedef doubles sums_f32;

INLINE floats load_f32(const char *memory)
{
    return (floats){_mm512_loadu_ps(memory), _mm512_loadu_ps(memory + 64)};
}
INLINE void store_f32(char *memory, floats block)
{
    _mm512_storeu_ps(memory, block.low);
    _mm512_storeu_ps(memory + 64, block.high);
}
INLINE __m512i no_largest_f32(void) { return _mm512_setzero_si512(); }
INLINE __m512i larger_f32(__m512i largest, floats block)
{
    __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i low = _mm512_and_si512(_mm512_castps_si512(block.low), magnitude);
    __m512i high = _mm512_and_si512(_mm512_castps_si512(block.high), magnitude);
    return _mm512_max_epu32(largest, _mm512_max_epu32(low, high));
}
INLINE uint64_t reduce_f32(__m512i largest) { return _mm512_reduce_max_epu32(largest); }
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
typedef __m512i largest_f64;

INLINE doubles load_f64(const char *memory)
{
    return (doubles){{_mm512_loadu_pd(memory), _mm512_loadu_pd(memory + 64),
                      _mm512_loadu_pd(memory + 128), _mm512_loadu_pd(memory + 192)}};
}
INLINE void store_f64(char *memory, doubles block)
{
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_pd(memory + 64 * i, block.at[i]);
    }
}
INLINE __m512i no_largest_f64(void) { return _mm512_setzero_si512(); }
INLINE __m512i larger_f64(__m512i largest, doubles block)
{
    __m512i magnitude = _mm512_set1_epi64(0x7fffffffffffffff);
    for (int i = 0; i < 4; i++) {
        __m512i bits = _mm512_castpd_si512(block.at[i]);
        largest = _mm512_max_epu64(largest, _mm512_and_si512(bits, magnitude));
    }
    return largest;
}
INLINE uint64_t reduce_f64(__m512i largest) { return _mm512_reduce_max_epu64(largest); }
INLINE doubles no_sums_f64(void) { return no_sums(); }
INLINE doubles add_squares_f64(doubles sums, doubles product)
{
    for (int i = 0; i < 4; i++) {
        __m512d square = _mm512_mul_pd(product.at[i], product.at[i]);
        sums.at[i] = _mm512_add_pd(sums.at[i], square);
    }
    return sums;
}
INLINE void put_sums_f64(doubles sums, double *lanes) { put_sums(sums, lanes); }
INLINE doubles multiply_f64(doubles values, float factor)
{
    for (int i = 0; i < 4; i++) {
        values.at[i] = _mm512_mul_pd(values.at[i], _mm512_set1_pd(factor));
    }
    return values;
}
INLINE doubles widen_f64(doubles block) { return block; }
INLINE doubles narrow_f64(doubles values) { return values; }

#include "all_loops.h"

const struct bodies shardscale_avx512 = {"avx512", ALL_BODIES};

#endif
