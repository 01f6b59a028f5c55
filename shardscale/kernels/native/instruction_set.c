/* The bodies in use, chosen by what the processor and its operating system offer. */

#include "instruction_set.h"

#include <stdbool.h>
#include <stddef.h>

#if defined(__x86_64__)
#include <cpuid.h>

static bool has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}

/* The builtin asks the operating system too, which has to save the wider registers. */
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static const struct bodies *_Atomic chosen; /* read by callers that do not hold the GIL */

const struct bodies *available_bodies(int i)
{
#if defined(__x86_64__)
    if (has_avx512() && i-- == 0) {
        return &shardscale_avx512;
    }
    if (has_avx2() && i-- == 0) {
        return &shardscale_avx2;
    }
#endif
    return i == 0 ? &shardscale_portable : NULL;
}

const struct bodies *bodies_in_use(void)
{
    const struct bodies *bodies = chosen;
    if (bodies == NULL) {
        chosen = bodies = available_bodies(0);
    }
    return bodies;
}

void use_bodies(const struct bodies *bodies)
{
    chosen = bodies;
}
