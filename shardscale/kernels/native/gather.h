/* The gradients of parameters, read and examined in one go. */

#ifndef SHARDSCALE_GATHER_H
#define SHARDSCALE_GATHER_H

#include "stable_abi.h"

/* Intern the names that are read; false with an exception set. */
int prepare_gather(void);

PyObject *gather(PyObject *module, PyObject *const *args, Py_ssize_t num_args);

#endif
