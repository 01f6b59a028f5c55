/* Threads that help the one that brings the work. */

#ifndef SHARDSCALE_POOL_H
#define SHARDSCALE_POOL_H

/* Run `work(argument)` here and, if the pool is free, on up to `num_threads - 1` workers at once.

   `work` takes pieces until none is left, so it is right whoever else runs it, and whether anyone
   does. Workers run with the caller's floating-point environment. */
void work_together(void (*work)(void *), void *argument, int num_threads);

#endif
