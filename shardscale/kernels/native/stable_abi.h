/* Python's stable interface, so that one build serves Python 3.10 and all that follow. */

#ifndef SHARDSCALE_STABLE_ABI_H
#define SHARDSCALE_STABLE_ABI_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#endif
