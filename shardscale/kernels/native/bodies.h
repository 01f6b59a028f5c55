/* What a body is: the loop over the memory of one dtype, written once for each instruction set.

   A body judges, multiplies and squares whole blocks of 32 elements and nothing else; what is left
   of a tensor is brought to it in a block of its own (work.c). It returns the largest magnitude of
   what it judged, as an integer: without their sign, floating-point numbers are ordered as integers
   are, Inf is above every number and NaN above Inf. No floating-point comparison takes part, so
   denormals are judged alike whether or not the processor flushes them.

   All instruction sets give the same bits, sums included: lane i sums the squares of the elements
   whose index is i modulo 32, in order and in float64, which holds the square of a float32. */

#ifndef SHARDSCALE_BODIES_H
#define SHARDSCALE_BODIES_H

#include <stdint.h>

enum dtype { F16, BF16, F32, F64, NUM_DTYPES };

enum { BLOCK = 32 };

/* What a body does besides judging the elements; a body for each combination. */
enum { WRITES = 1, JUDGES_PRODUCT = 2, SUMS = 4, NUM_DUTIES = 8 };

/* `lanes` is written if the body sums: with the squares of the products as stored if it writes,
   unrounded if it does not. JUDGES_PRODUCT judges the products as they are or would be stored. */
typedef uint64_t (*body)(char *memory, int64_t num_blocks, float factor, double lanes[BLOCK]);

struct bodies {
    const char *name;
    body of[NUM_DTYPES][NUM_DUTIES];
};

extern const struct bodies shardscale_portable;
#if defined(__x86_64__)
extern const struct bodies shardscale_avx2, shardscale_avx512;
#endif

#endif
