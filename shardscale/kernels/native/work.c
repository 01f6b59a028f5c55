/* Tensors are cut into units by their sizes alone, and what units come to is added in their order,
   so the same bits come whoever does which. */

#include "work.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "instruction_set.h"
#include "pool.h"

enum { UNIT_BYTES = 1 << 18, WORTH_SHARING = 1 << 19, SHARES_EACH = 16 };

static const int itemsize[NUM_DTYPES] = {2, 2, 4, 8};
static const uint64_t infinity[NUM_DTYPES] = {0x7c00, 0x7f80, 0x7f800000, 0x7ff0000000000000};

/* What one unit comes to. */
struct result {
    double sum_squares;
    uint64_t largest;
    int64_t num_inf, num_nan;
};

struct pass {
    const struct memory *tensors;
    int64_t num_tensors;
    int64_t *first_unit; /* of each tensor, and the number of all units */
    float factor;
    int duties;
    bool counts;
    const struct bodies *bodies;
    struct result *results; /* one for each unit */
    int64_t share;          /* how many units a thread takes at a time */
    atomic_llong next;
};

/* In a fixed order. */
static double sum_lanes(double *lanes)
{
    for (int width = BLOCK / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            lanes[i] += lanes[i + width];
        }
    }
    return lanes[0];
}

/* What is left after the last whole block, brought to the body in a block that is our own. */
static uint64_t do_rest(const struct pass *pass, body body, char *rest, int num, int size,
                        double *lanes)
{
    double own_lanes[BLOCK];
    char own[BLOCK * sizeof(double)] = {0};
    memcpy(own, rest, (size_t)(num * size));
    uint64_t largest = body(own, 1, pass->factor, own_lanes);
    if (pass->duties & WRITES) {
        memcpy(rest, own, (size_t)(num * size));
    }
    if (pass->duties & SUMS) {
        /* Those beyond would be NaN if the factor is not finite. */
        for (int i = 0; i < num; i++) {
            lanes[i] += own_lanes[i];
        }
    }
    return largest;
}

static void count(const char *data, int64_t numel, enum dtype dtype, struct result *result)
{
    int size = itemsize[dtype];
    uint64_t magnitude = UINT64_MAX >> (65 - 8 * size);
    for (int64_t i = 0; i < numel; i++) {
        uint16_t word;
        uint32_t single;
        uint64_t bits;
        if (size == 2) {
            memcpy(&word, data + 2 * i, 2);
            bits = word;
        } else if (size == 4) {
            memcpy(&single, data + 4 * i, 4);
            bits = single;
        } else {
            memcpy(&bits, data + 8 * i, 8);
        }
        bits &= magnitude;
        result->num_inf += bits == infinity[dtype];
        result->num_nan += bits > infinity[dtype];
    }
}

static void do_unit(const struct pass *pass, const struct memory *tensor, int64_t place,
                    struct result *result)
{
    int size = itemsize[tensor->dtype];
    int64_t first = place * (UNIT_BYTES / size);
    int64_t numel = tensor->numel - first;
    if (numel > UNIT_BYTES / size) {
        numel = UNIT_BYTES / size;
    }
    char *data = tensor->data + first * size;
    int rest = (int)(numel % BLOCK);
    body body = pass->bodies->of[tensor->dtype][pass->duties];
    double lanes[BLOCK] = {0};

    uint64_t largest = 0;
    if (numel >= BLOCK) {
        largest = body(data, numel / BLOCK, pass->factor, lanes);
    }
    if (rest > 0) {
        uint64_t other = do_rest(pass, body, data + (numel - rest) * size, rest, size, lanes);
        largest = other > largest ? other : largest;
    }
    *result = (struct result){.largest = largest};
    if (pass->duties & SUMS) {
        result->sum_squares = sum_lanes(lanes);
    }
    if (pass->counts && largest >= infinity[tensor->dtype]) {
        count(data, numel, tensor->dtype, result);
    }
}

/* The tensor in which a unit lies. */
static int64_t tensor_of(const struct pass *pass, int64_t unit)
{
    int64_t low = 0, high = pass->num_tensors;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (pass->first_unit[middle] <= unit) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

static void do_shares(void *argument)
{
    struct pass *pass = argument;
    int64_t num_units = pass->first_unit[pass->num_tensors];
    for (;;) {
        int64_t unit = atomic_fetch_add(&pass->next, pass->share);
        if (unit >= num_units) {
            return;
        }
        int64_t end = num_units - unit < pass->share ? num_units : unit + pass->share;
        int64_t t = tensor_of(pass, unit);
        for (; unit < end; unit++) {
            while (pass->first_unit[t + 1] <= unit) {
                t++;
            }
            do_unit(pass, &pass->tensors[t], unit - pass->first_unit[t], &pass->results[unit]);
        }
    }
}

bool worth_sharing(const struct memory *tensors, int64_t num)
{
    int64_t bytes = 0;
    for (int64_t t = 0; t < num; t++) {
        bytes += tensors[t].numel * itemsize[tensors[t].dtype];
    }
    return bytes >= WORTH_SHARING;
}

/* Results of all units, which the caller frees with pass->first_unit; false without memory. */
static bool run(struct pass *pass, int num_threads)
{
    int64_t num_units = 0;
    pass->first_unit = malloc((size_t)(pass->num_tensors + 1) * sizeof *pass->first_unit);
    if (pass->first_unit == NULL) {
        return false;
    }
    for (int64_t t = 0; t < pass->num_tensors; t++) {
        int64_t bytes = pass->tensors[t].numel * itemsize[pass->tensors[t].dtype];
        pass->first_unit[t] = num_units;
        num_units += (bytes + UNIT_BYTES - 1) / UNIT_BYTES;
    }
    pass->first_unit[pass->num_tensors] = num_units;
    pass->results = malloc((size_t)(num_units + 1) * sizeof *pass->results);
    if (pass->results == NULL) {
        free(pass->first_unit);
        return false;
    }
    pass->bodies = bodies_in_use();
    if (num_threads < 2 || !worth_sharing(pass->tensors, pass->num_tensors)) {
        pass->share = num_units;
        do_shares(pass);
    } else {
        pass->share = num_units / num_threads / SHARES_EACH + 1;
        work_together(do_shares, pass, num_threads);
    }
    return true;
}

static void discard(struct pass *pass)
{
    free(pass->results);
    free(pass->first_unit);
}

bool judge(const struct memory *tensors, int64_t num, float factor, bool writes, bool *found,
           double *sum_squares, int num_threads)
{
    struct pass pass = {.tensors = tensors, .num_tensors = num, .factor = factor};
    pass.duties = (writes && factor != 1 ? WRITES : 0) | (factor > 1 ? JUDGES_PRODUCT : 0) |
                  (sum_squares != NULL ? SUMS : 0);
    if (!run(&pass, num_threads)) {
        return false;
    }
    double sum = 0;
    for (int64_t t = 0; t < num; t++) {
        for (int64_t unit = pass.first_unit[t]; unit < pass.first_unit[t + 1]; unit++) {
            *found |= pass.results[unit].largest >= infinity[tensors[t].dtype];
            sum += pass.results[unit].sum_squares;
        }
    }
    if (sum_squares != NULL) {
        *sum_squares += sum;
    }
    discard(&pass);
    return true;
}

/* A magnitude that is an integer, as the number that it is. */
static double value_of(uint64_t bits, enum dtype dtype)
{
    double value;
    uint64_t fraction_bits = dtype == F16 ? 10 : dtype == BF16 ? 7 : 23;
    int bias = dtype == F16 ? 15 : 127;
    if (bits > infinity[dtype]) {
        return NAN;
    }
    if (bits == infinity[dtype]) {
        return INFINITY;
    }
    if (dtype == F64) {
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    int exponent = (int)(bits >> fraction_bits);
    uint64_t fraction = bits & ((1u << fraction_bits) - 1);
    fraction |= exponent > 0 ? 1u << fraction_bits : 0;
    /* By integers: a conversion could flush a denormal. */
    return ldexp((double)fraction, (exponent > 0 ? exponent : 1) - bias - (int)fraction_bits);
}

bool tally_up(const struct memory *tensors, int64_t num, struct tally *tallies, int num_threads)
{
    struct pass pass = {.tensors = tensors, .num_tensors = num, .factor = 1, .counts = true};
    if (!run(&pass, num_threads)) {
        return false;
    }
    for (int64_t t = 0; t < num; t++) {
        uint64_t largest = 0;
        tallies[t] = (struct tally){0};
        for (int64_t unit = pass.first_unit[t]; unit < pass.first_unit[t + 1]; unit++) {
            struct result *result = &pass.results[unit];
            largest = result->largest > largest ? result->largest : largest;
            tallies[t].num_inf += result->num_inf;
            tallies[t].num_nan += result->num_nan;
        }
        tallies[t].amax = value_of(largest, tensors[t].dtype);
    }
    discard(&pass);
    return true;
}
