/* Which bodies this process uses. */

#ifndef SHARDSCALE_INSTRUCTION_SET_H
#define SHARDSCALE_INSTRUCTION_SET_H

#include "bodies.h"

/* The bodies that this processor can run, the fastest first; NULL beyond the last. */
const struct bodies *available_bodies(int i);

/* The bodies in use: the fastest, unless use_bodies() chose others. */
const struct bodies *bodies_in_use(void);

void use_bodies(const struct bodies *bodies);

#endif
