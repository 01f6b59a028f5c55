/* Overlapping memory is found by sorting the spans by device and address, digit by digit. */

#include "overlap.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { DIGIT_BITS = 11, NUM_DIGITS = 1 << DIGIT_BITS };

/* Whether `b` may stand after `a`. */
static bool in_order(const struct span *a, const struct span *b)
{
    return a->device < b->device || (a->device == b->device && a->start <= b->start);
}

static bool all_in_order(const struct span *spans, size_t num)
{
    for (size_t i = 1; i < num; i++) {
        if (!in_order(&spans[i - 1], &spans[i])) {
            return false;
        }
    }
    return true;
}

/* Bits in which the keys differ: digits that are the same everywhere need no pass. */
static uint64_t differing(const struct span *spans, size_t num, bool by_device)
{
    uint64_t bits = 0;
    for (size_t i = 1; i < num; i++) {
        bits |= by_device ? spans[i].device ^ spans[0].device : spans[i].start ^ spans[0].start;
    }
    return bits;
}

/* Stable, so that passes over ever higher digits, and then over the device, sort by all. */
static void sort_by_digit(const struct span *from, struct span *to, size_t num, bool by_device,
                          int shift)
{
    uint32_t place[NUM_DIGITS + 1] = {0};
    for (size_t i = 0; i < num; i++) {
        uint64_t key = by_device ? from[i].device : from[i].start;
        place[(key >> shift & (NUM_DIGITS - 1)) + 1]++;
    }
    for (int digit = 1; digit < NUM_DIGITS; digit++) {
        place[digit] += place[digit - 1];
    }
    for (size_t i = 0; i < num; i++) {
        uint64_t key = by_device ? from[i].device : from[i].start;
        to[place[key >> shift & (NUM_DIGITS - 1)]++] = from[i];
    }
}

static bool sort(struct span *spans, size_t num)
{
    struct span *other = malloc(num * sizeof *other);
    if (other == NULL) {
        return false;
    }
    struct span *from = spans, *to = other;
    for (int by_device = 0; by_device < 2; by_device++) {
        uint64_t bits = differing(spans, num, by_device);
        int shift = 0;
        while (bits >> shift) {
            if ((bits >> shift & 1) == 0) {
                shift++;
                continue;
            }
            sort_by_digit(from, to, num, by_device, shift);
            struct span *swap = from;
            from = to;
            to = swap;
            if ((shift += DIGIT_BITS) >= 64) {
                break;
            }
        }
    }
    if (from != spans) {
        memcpy(spans, from, num * sizeof *spans);
    }
    free(other);
    return true;
}

int any_overlap(struct span *spans, size_t num)
{
    if (!all_in_order(spans, num) && !sort(spans, num)) {
        return -1;
    }
    for (size_t i = 1; i < num; i++) {
        /* Were an earlier span longer than the one before, those two would overlap already. */
        if (spans[i].device == spans[i - 1].device && spans[i].start < spans[i - 1].end) {
            return 1;
        }
    }
    return 0;
}
