/* The bodies of one instruction set, made of its steps: the loop for each dtype, and their table. */

#define D f16
#define BYTES 2
#include "loop.h"
#define D bf16
#define BYTES 2
#include "loop.h"
#define D f32
#define BYTES 4
#include "loop.h"
#define D f64
#define BYTES 8
#include "loop.h"

#define BODIES(D) \
    {body_##D##_0, body_##D##_1, body_##D##_2, body_##D##_3, \
     body_##D##_4, body_##D##_5, body_##D##_6, body_##D##_7}
#define ALL_BODIES {BODIES(f16), BODIES(bf16), BODIES(f32), BODIES(f64)}
