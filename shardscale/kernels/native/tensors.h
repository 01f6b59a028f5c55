/* What is known of a tensor without torch's headers, by way of DLPack. */

#ifndef SHARDSCALE_TENSORS_H
#define SHARDSCALE_TENSORS_H

#include "stable_abi.h"

#include <stdbool.h>
#include <stdint.h>

#include "work.h"

/* The tensor of DLPack 1: this layout is fixed for all of its versions 1.x. */
struct dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

enum { DEVICE_CPU = 1, DEVICE_CUDA = 2, DEVICE_ROCM = 10 };

/* The types that are known; NULL before set_types(). They are compared, subclasses are not them. */
extern PyObject *tensor_type, *parameter_type, *dtensor_type;

/* Learn the types and how to read them from torch's capsule; false with an exception set. */
bool set_types(PyObject *tensor, PyObject *parameter, PyObject *dtensor, PyObject *capsule);

/* Read a tensor, which keeps owning all that `out` points to; false, and no exception, if its type
   is not exactly torch.Tensor or it has no memory of its own kind. */
bool read_tensor(PyObject *object, struct dl_tensor *out);

int64_t count_elements(const struct dl_tensor *tensor);
bool is_contiguous(const struct dl_tensor *tensor);

/* Whether the elements fill their memory without gaps, each once, in any order of dimensions. */
bool is_dense(const struct dl_tensor *tensor);

/* Which of our dtypes it has, or -1. */
int dtype_of(const struct dl_tensor *tensor);

char *address_of(const struct dl_tensor *tensor);

/* Read a dense gradient that lies on the host; false as in read_tensor(), and if it is not one. */
bool read_memory(PyObject *object, struct memory *out);

/* The memory of a 0-dim tensor on the host, or NULL. */
void *read_scalar(PyObject *object, enum dtype dtype);

#endif
