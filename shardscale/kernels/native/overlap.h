/* Whether pieces of memory overlap. */

#ifndef SHARDSCALE_OVERLAP_H
#define SHARDSCALE_OVERLAP_H

#include <stddef.h>
#include <stdint.h>

/* The bytes from `start` up to `end`, which is beyond the last, in the memory of one device. */
struct span {
    uint64_t start, end;
    uint64_t device;
};

/* 1 if two of `num` spans on the same device share a byte, 0 if none do, -1 without memory.
   The spans are brought into another order. */
int any_overlap(struct span *spans, size_t num);

#endif
