/* Tensors are read through DLPack's table of functions, which torch offers as a capsule. */

#include "tensors.h"

/* DLPack's exchange table, as far as it is read here. */
struct exchange {
    uint32_t major, minor;
    struct exchange *previous; /* of an older major version */
    void *managed_tensor_allocator;
    void *managed_tensor_from_py_object_no_sync;
    void *managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void *object, struct dl_tensor *out);
};

enum { DLPACK_MAJOR = 1, CODE_FLOAT = 2, CODE_BFLOAT = 4, MOST_DIMS = 64 };

PyObject *tensor_type, *parameter_type, *dtensor_type;
static int (*export)(void *object, struct dl_tensor *out);

bool set_types(PyObject *tensor, PyObject *parameter, PyObject *dtensor, PyObject *capsule)
{
    struct exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (exchange == NULL) {
        return false;
    }
    while (exchange != NULL && exchange->major != DLPACK_MAJOR) {
        exchange = exchange->previous;
    }
    if (exchange == NULL || exchange->dltensor_from_py_object_no_sync == NULL) {
        PyErr_SetString(PyExc_ValueError,
                        "The capsule has no DLPack 1 with dltensor_from_py_object_no_sync, which "
                        "is needed to read tensors. Use the kernels in Python instead.");
        return false;
    }
    export = exchange->dltensor_from_py_object_no_sync;
    /* Kept for good: a type that went away could leave its address to another. */
    Py_IncRef(tensor);
    Py_IncRef(parameter);
    Py_IncRef(dtensor);
    tensor_type = tensor;
    parameter_type = parameter;
    dtensor_type = dtensor;
    return true;
}

bool read_tensor(PyObject *object, struct dl_tensor *out)
{
    if ((PyObject *)Py_TYPE(object) != tensor_type) {
        return false;
    }
    if (export(object, out) != 0) {
        PyErr_Clear(); /* sparse, meta, or inside a transform: not ours */
        return false;
    }
    return true;
}

int64_t count_elements(const struct dl_tensor *tensor)
{
    int64_t numel = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        numel *= tensor->shape[i];
    }
    return numel;
}

bool is_contiguous(const struct dl_tensor *tensor)
{
    int64_t expected = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != expected) {
            return count_elements(tensor) == 0;
        }
        expected *= tensor->shape[i];
    }
    return true;
}

bool is_dense(const struct dl_tensor *tensor)
{
    if (is_contiguous(tensor)) {
        return true;
    }
    if (tensor->ndim > MOST_DIMS) {
        return false;
    }
    /* Dimensions from the smallest stride to the largest, without those of one element. */
    int order[MOST_DIMS], num = 0;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] == 1) {
            continue;
        }
        int place = num++;
        for (; place > 0 && tensor->strides[order[place - 1]] > tensor->strides[i]; place--) {
            order[place] = order[place - 1];
        }
        order[place] = i;
    }
    int64_t expected = 1;
    for (int i = 0; i < num; i++) {
        if (tensor->strides[order[i]] != expected) {
            return false;
        }
        expected *= tensor->shape[order[i]];
    }
    return true;
}

int dtype_of(const struct dl_tensor *tensor)
{
    if (tensor->dtype.lanes != 1) {
        return -1;
    }
    switch (tensor->dtype.code << 8 | tensor->dtype.bits) {
    case CODE_FLOAT << 8 | 16:
        return F16;
    case CODE_BFLOAT << 8 | 16:
        return BF16;
    case CODE_FLOAT << 8 | 32:
        return F32;
    case CODE_FLOAT << 8 | 64:
        return F64;
    default:
        return -1;
    }
}

char *address_of(const struct dl_tensor *tensor)
{
    return tensor->data == NULL ? NULL : (char *)tensor->data + tensor->byte_offset;
}

bool read_memory(PyObject *object, struct memory *out)
{
    struct dl_tensor tensor;
    if (!read_tensor(object, &tensor) || tensor.device_type != DEVICE_CPU) {
        return false;
    }
    int dtype = dtype_of(&tensor);
    if (dtype < 0 || !is_dense(&tensor)) {
        return false;
    }
    out->data = address_of(&tensor);
    out->numel = count_elements(&tensor);
    out->dtype = (enum dtype)dtype;
    return out->data != NULL || out->numel == 0;
}

void *read_scalar(PyObject *object, enum dtype dtype)
{
    struct dl_tensor tensor;
    if (!read_tensor(object, &tensor) || tensor.device_type != DEVICE_CPU ||
        count_elements(&tensor) != 1 || dtype_of(&tensor) != (int)dtype) {
        return NULL;
    }
    return address_of(&tensor);
}
