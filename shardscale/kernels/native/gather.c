/* The gradients of parameters: read, and taken only if nothing about any of them is unusual. */

#include "gather.h"

#include "overlap.h"
#include "tensors.h"

static PyObject *name_grad, *name_local_tensor, *name_mesh, *name_requires_grad, *name_spec;

int prepare_gather(void)
{
    name_grad = PyUnicode_InternFromString("grad");
    name_local_tensor = PyUnicode_InternFromString("_local_tensor");
    name_mesh = PyUnicode_InternFromString("mesh");
    name_requires_grad = PyUnicode_InternFromString("requires_grad");
    name_spec = PyUnicode_InternFromString("_spec");
    return name_grad != NULL && name_local_tensor != NULL && name_mesh != NULL &&
           name_requires_grad != NULL && name_spec != NULL;
}

/* What is gathered so far: parameters on loan from the tuple, gradients owned. */
struct gathered {
    PyObject **params, **grads;
    struct span *spans;
    Py_ssize_t num, num_spans;
    PyObject *firsts; /* a list: of the parameters on each mesh the first */
    PyObject *meshes; /* a list, beside it */
    PyObject *newest_mesh; /* on loan from that list */
};

/* Whether a list holds the very object. */
static bool holds(PyObject *list, PyObject *object)
{
    for (Py_ssize_t i = PyList_Size(list); i > 0; i--) {
        if (PyList_GetItem(list, i - 1) == object) {
            return true;
        }
    }
    return false;
}

/* Remember a distributed parameter if it is the first on its mesh that is trained. */
static bool note_mesh(PyObject *param, PyObject *spec, struct gathered *to)
{
    PyObject *mesh = PyObject_GetAttr(spec, name_mesh);
    if (mesh == NULL) {
        return false;
    }
    bool noted = true;
    if (mesh != to->newest_mesh && !holds(to->meshes, mesh)) {
        PyObject *is_trained = PyObject_GetAttr(param, name_requires_grad);
        noted = is_trained != NULL;
        if (is_trained == Py_True) {
            noted = PyList_Append(to->meshes, mesh) == 0 && PyList_Append(to->firsts, param) == 0;
            to->newest_mesh = mesh;
        }
        Py_XDECREF(is_trained);
    }
    Py_DECREF(mesh);
    return noted;
}

/* The plain tensor behind a gradient, a new reference; NULL if it is unusual.

   `spec` is that of the parameter, NULL if it is not distributed. The gradient's must be the very
   same: a mere equal one is looked at with care elsewhere. */
static PyObject *local_part(PyObject *spec, PyObject *grad)
{
    bool is_distributed = (PyObject *)Py_TYPE(grad) == dtensor_type;
    if (is_distributed != (spec != NULL)) {
        return NULL; /* one knows of the others' shards and one does not */
    }
    if (!is_distributed) {
        Py_INCREF(grad);
        return grad;
    }
    PyObject *theirs = PyObject_GetAttr(grad, name_spec);
    Py_XDECREF(theirs);
    return theirs == spec ? PyObject_GetAttr(grad, name_local_tensor) : NULL;
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
    PyObject *type = (PyObject *)Py_TYPE(param), *spec = NULL;
    if (type == dtensor_type) {
        spec = PyObject_GetAttr(param, name_spec);
        if (spec == NULL || !note_mesh(param, spec, to)) {
            Py_XDECREF(spec);
            return false;
        }
    } else if (type != parameter_type && type != tensor_type) {
        return false;
    }
    PyObject *grad = PyObject_GetAttr(param, name_grad);
    bool is_none = grad == Py_None;
    PyObject *local = grad == NULL || is_none ? NULL : local_part(spec, grad);
    Py_XDECREF(grad);
    Py_XDECREF(spec);
    if (local == NULL) {
        return is_none;
    }
    to->params[to->num] = param;
    to->grads[to->num++] = local; /* owned from here on, whatever is found */
    return is_usual(local, to);
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

/* The three lists, None if anything is unusual, or NULL with an exception set. */
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
    PyObject *all = taken != NULL && grads != NULL ? PyTuple_Pack(3, taken, grads, to->firsts) : NULL;
    Py_XDECREF(taken);
    Py_XDECREF(grads);
    return all;
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
        .firsts = PyList_New(0),
        .meshes = PyList_New(0),
    };
    PyObject *result = NULL;
    if (to.params == NULL || to.grads == NULL || to.spans == NULL) {
        PyErr_NoMemory();
    } else if (to.firsts != NULL && to.meshes != NULL) {
        result = gather_into(&to, params, num);
    }
    for (Py_ssize_t i = 0; i < to.num; i++) {
        Py_DECREF(to.grads[i]);
    }
    PyMem_Free(to.params);
    PyMem_Free(to.grads);
    PyMem_Free(to.spans);
    Py_XDECREF(to.firsts);
    Py_XDECREF(to.meshes);
    Py_DECREF(params);
    return result;
}
