/* The loop of a body: included once for each dtype D of an instruction set, which has the steps. */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define OF(name) JOIN(name, D)

/* `duties` is a constant wherever this is inlined, so each body keeps only what it does. */
INLINE uint64_t OF(loop)(char *memory, int64_t num_blocks, float factor, double *lanes, int duties)
{
    OF(largest) largest = OF(no_largest)();
    OF(sums) sums = OF(no_sums)();
    for (; num_blocks > 0; num_blocks--, memory += BLOCK * BYTES) {
        PREFETCH(memory);
        OF(block) block = OF(load)(memory);
        largest = OF(larger)(largest, block);
        if (duties) {
            OF(wide) product = OF(multiply)(OF(widen)(block), factor);
            if (duties & (WRITES | JUDGES_PRODUCT)) {
                block = OF(narrow)(product);
            }
            if (duties & JUDGES_PRODUCT) {
                largest = OF(larger)(largest, block);
            }
            if (duties & WRITES) {
                OF(store)(memory, block);
                product = OF(widen)(block);
            }
            if (duties & SUMS) {
                sums = OF(add_squares)(sums, product);
            }
        }
    }
    if (duties & SUMS) {
        OF(put_sums)(sums, lanes);
    }
    return OF(reduce)(largest);
}

#define BODY(duties) \
    BODY_TARGET static uint64_t JOIN(OF(body), duties)( \
        char *memory, int64_t num_blocks, float factor, double *lanes) \
    { \
        return OF(loop)(memory, num_blocks, factor, lanes, duties); \
    }

BODY(0) BODY(1) BODY(2) BODY(3) BODY(4) BODY(5) BODY(6) BODY(7)

#undef BODY
#undef D
#undef BYTES
