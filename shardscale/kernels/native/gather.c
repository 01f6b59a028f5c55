/* The gradients of parameters: read, and taken only if nothing about any of them is unusual. */

#include "gather.h"

#include "overlap.h"
#include "tensors.h"

static PyObject *name_grad, *name_local_tensor, *name_spec;

int prepare_gather(void)
{
    name_grad = PyUnicode_InternFromString("grad");
    name_local_tensor = PyUnicode_InternFromString("_local_tensor");
    name_spec = PyUnicode_InternFromString("_spec");
    return name_grad != NULL && name_local_tensor != NULL && name_spec != NULL;
}

/* What is gathered so far: parameters on loan from the tuple, gradients owned. */
struct gathered {
    PyObject **params, **grads;
    struct span *spans;
    Py_ssize_t num, num_spans;
};

/* Whether both are laid out by the very same specification; a mere equal one is looked at with care
   elsewhere. */
static bool share_spec(PyObject *param, PyObject *grad)
{
    PyObject *ours = PyObject_GetAttr(param, name_spec);
    PyObject *theirs = ours != NULL ? PyObject_GetAttr(grad, name_spec) : NULL;
    bool same = theirs != NULL && ours == theirs;
    Py_XDECREF(ours);
    Py_XDECREF(theirs);
    return same;
}

/* The plain tensor behind a gradient, a new reference; NULL if it is unusual. Takes `grad`. */
static PyObject *local_part(PyObject *param, PyObject *grad)
{
    PyObject *param_type = (PyObject *)Py_TYPE(param);
    bool is_distributed = (PyObject *)Py_TYPE(grad) == dtensor_type;
    PyObject *local = NULL;
    if (is_distributed != (param_type == dtensor_type)) {
        /* One knows of the others' shards and one does not. */
    } else if (!is_distributed) {
        return grad;
    } else if (share_spec(param, grad)) {
        local = PyObject_GetAttr(grad, name_local_tensor);
    }
    Py_DECREF(grad);
    return local;
}

/* Whether a gradient may be taken; its memory joins the spans. */
static bool is_usual(PyObject *grad, struct gathered *to)
{
    struct dl_tensor tensor;
    if (!read_tensor(grad, &tensor) || dtype_of(&tensor) < 0 || !is_contiguous(&tensor)) {
        return false;
    }
    if (tensor.device_type != DEVICE_CPU && tensor.device_type != DEVICE_CUDA &&
        tensor.device_type != DEVICE_ROCM) {
        return false;
    }
    int64_t numel = count_elements(&tensor);
    uint64_t start = (uint64_t)(uintptr_t)address_of(&tensor);
    if (numel > 0) {
        if (start == 0) {
            return false;
        }
        to->spans[to->num_spans++] = (struct span){
            .start = start,
            .end = start + (uint64_t)numel * (tensor.dtype.bits / 8),
            .device = (uint64_t)tensor.device_type << 32 | (uint32_t)tensor.device_id,
        };
    }
    return true;
}

static bool take(PyObject *param, struct gathered *to)
{
    PyObject *type = (PyObject *)Py_TYPE(param);
    if (type != parameter_type && type != dtensor_type && type != tensor_type) {
        return false;
    }
    PyObject *grad = PyObject_GetAttr(param, name_grad);
    if (grad == NULL) {
        return false;
    }
    if (grad == Py_None) {
        Py_DECREF(grad);
        return true;
    }
    grad = local_part(param, grad);
    if (grad == NULL) {
        return false;
    }
    to->params[to->num] = param;
    to->grads[to->num++] = grad; /* owned from here on, whatever is found */
    return is_usual(grad, to);
}

static PyObject *list_of(PyObject *const *objects, Py_ssize_t num)
{
    PyObject *list = PyList_New(num);
    for (Py_ssize_t i = 0; list != NULL && i < num; i++) {
        Py_INCREF(objects[i]);
        PyList_SetItem(list, i, objects[i]);
    }
    return list;
}

/* The pair of lists, None if anything is unusual, or NULL with an exception set. */
static PyObject *gather_into(struct gathered *to, PyObject *params, Py_ssize_t num)
{
    bool usual = true;
    for (Py_ssize_t i = 0; usual && i < num; i++) {
        usual = take(PyTuple_GetItem(params, i), to);
    }
    if (!usual) {
        PyErr_Clear(); /* the caller meets it again on its own way, which explains */
        Py_RETURN_NONE;
    }
    int overlap = any_overlap(to->spans, (size_t)to->num_spans);
    if (overlap < 0) {
        return PyErr_NoMemory();
    }
    if (overlap) {
        Py_RETURN_NONE;
    }
    PyObject *taken = list_of(to->params, to->num), *grads = list_of(to->grads, to->num);
    PyObject *both = taken != NULL && grads != NULL ? PyTuple_Pack(2, taken, grads) : NULL;
    Py_XDECREF(taken);
    Py_XDECREF(grads);
    return both;
}

PyObject *gather(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    if (num_args != 1) {
        return PyErr_Format(PyExc_TypeError, "gather takes 1 argument, but got %zd.", num_args);
    }
    PyObject *params = PySequence_Tuple(args[0]);
    if (params == NULL) {
        return NULL;
    }
    Py_ssize_t num = PyTuple_Size(params);
    struct gathered to = {
        .params = PyMem_Malloc((size_t)num * sizeof(PyObject *)),
        .grads = PyMem_Malloc((size_t)num * sizeof(PyObject *)),
        .spans = PyMem_Malloc((size_t)num * sizeof(struct span)),
    };
    PyObject *result = NULL;
    if (to.params == NULL || to.grads == NULL || to.spans == NULL) {
        PyErr_NoMemory();
    } else {
        result = gather_into(&to, params, num);
    }
    for (Py_ssize_t i = 0; i < to.num; i++) {
        Py_DECREF(to.grads[i]);
    }
    PyMem_Free(to.params);
    PyMem_Free(to.grads);
    PyMem_Free(to.spans);
    Py_DECREF(params);
    return result;
}
