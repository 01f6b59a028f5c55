/* One pass over the memory of many tensors, in pieces that threads share. */

#ifndef SHARDSCALE_WORK_H
#define SHARDSCALE_WORK_H

#include <stdbool.h>
#include <stdint.h>

#include "bodies.h"

/* The memory of a dense tensor: a sum and a maximum know no order, so its strides do not matter. */
struct memory {
    char *data;
    int64_t numel;
    enum dtype dtype;
};

/* What is found in one gradient. */
struct tally {
    int64_t num_inf, num_nan;
    double amax; /* Inf if there is one, NaN if there is one */
};

/* Whether there is enough to do for more than one thread. */
bool worth_sharing(const struct memory *tensors, int64_t num);

/* Judge `num` tensors and multiply them by `factor`, in place if `writes`.

   Sets `*found` if an element, or where `factor` exceeds 1 its product, is not finite; adds the sum
   of the squares of the products to `*sum_squares` unless that is NULL. The sum has the same bits
   for every instruction set and number of threads. False if there is no memory to work with; then
   nothing was touched. */
bool judge(const struct memory *tensors, int64_t num, float factor, bool writes, bool *found,
           double *sum_squares, int num_threads);

/* Count what is in each of `num` tensors. False as in judge(). */
bool tally_up(const struct memory *tensors, int64_t num, struct tally *tallies, int num_threads);

#endif
