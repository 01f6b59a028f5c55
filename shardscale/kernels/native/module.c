/* The functions as Python calls them: arguments are read, memory is worked on without the GIL. */

#include "gather.h"
#include "instruction_set.h"
#include "stable_abi.h"
#include "tensors.h"
#include "work.h"

static bool takes(const char *name, Py_ssize_t expected, Py_ssize_t num_args)
{
    if (num_args != expected) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, but got %zd.", name, expected,
                     num_args);
    }
    return num_args == expected;
}

/* The gradients of one call. `owner` keeps them alive though the caller's list may change. */
struct gradients {
    PyObject *owner;
    struct memory *memory;
    Py_ssize_t num;
};

enum outcome { FAILED, NOT_OURS, READ };

static void let_go(struct gradients *grads)
{
    PyMem_Free(grads->memory);
    Py_XDECREF(grads->owner);
}

static enum outcome read_gradients(PyObject *sequence, struct gradients *out)
{
    *out = (struct gradients){.owner = PySequence_Tuple(sequence)};
    if (out->owner == NULL) {
        return FAILED;
    }
    out->num = PyTuple_Size(out->owner);
    out->memory = PyMem_Malloc((size_t)out->num * sizeof *out->memory);
    if (out->memory == NULL) {
        let_go(out);
        PyErr_NoMemory();
        return FAILED;
    }
    for (Py_ssize_t i = 0; i < out->num; i++) {
        if (!read_memory(PyTuple_GetItem(out->owner, i), &out->memory[i])) {
            let_go(out);
            return NOT_OURS;
        }
    }
    return READ;
}

/* `given` is a number, or a function that returns it and is asked only where it matters. */
static bool read_num_threads(PyObject *given, const struct gradients *grads, int *out)
{
    *out = 1;
    PyObject *number = given;
    if (PyCallable_Check(given)) {
        if (!worth_sharing(grads->memory, grads->num)) {
            return true;
        }
        number = PyObject_CallNoArgs(given);
    } else {
        Py_INCREF(given);
    }
    long num = number != NULL ? PyLong_AsLong(number) : -1;
    Py_XDECREF(number);
    *out = num > 1 << 20 ? 1 << 20 : (int)num;
    return !(num == -1 && PyErr_Occurred());
}

static bool is_useful(float factor)
{
    return factor > 0 && factor <= 3.40282346638528859812e38f;
}

static PyObject *judge_gradients(const char *name, bool writes, PyObject *const *args,
                                 Py_ssize_t num_args)
{
    int num_threads;
    struct gradients grads;
    if (!takes(name, 5, num_args)) {
        return NULL;
    }
    float *inv_scale = read_scalar(args[1], F32), *found_inf = read_scalar(args[2], F32);
    double *sum_squares = args[3] == Py_None ? NULL : read_scalar(args[3], F64);
    if (inv_scale == NULL || found_inf == NULL || (sum_squares == NULL && args[3] != Py_None)) {
        Py_RETURN_FALSE;
    }
    enum outcome outcome = read_gradients(args[0], &grads);
    if (outcome != READ) {
        return outcome == FAILED ? NULL : PyBool_FromLong(0);
    }
    if (!read_num_threads(args[4], &grads, &num_threads)) {
        let_go(&grads);
        return NULL;
    }
    bool found = !is_useful(*inv_scale), done;
    Py_BEGIN_ALLOW_THREADS
    done = judge(grads.memory, grads.num, *inv_scale, writes, &found, sum_squares, num_threads);
    Py_END_ALLOW_THREADS
    let_go(&grads);
    if (!done) {
        return PyErr_NoMemory();
    }
    if (found) {
        *found_inf = 1;
    }
    Py_RETURN_TRUE;
}

static PyObject *unscale(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    return judge_gradients("unscale_", true, args, num_args);
}

static PyObject *check(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    return judge_gradients("check_", false, args, num_args);
}

static PyObject *scale(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    int num_threads;
    struct gradients grads;
    if (!takes("scale_", 3, num_args)) {
        return NULL;
    }
    float *factor = read_scalar(args[1], F32);
    if (factor == NULL) {
        Py_RETURN_FALSE;
    }
    if (*factor == 1) {
        Py_RETURN_TRUE;
    }
    enum outcome outcome = read_gradients(args[0], &grads);
    if (outcome != READ) {
        return outcome == FAILED ? NULL : PyBool_FromLong(0);
    }
    if (!read_num_threads(args[2], &grads, &num_threads)) {
        let_go(&grads);
        return NULL;
    }
    bool found = false, done;
    Py_BEGIN_ALLOW_THREADS
    done = judge(grads.memory, grads.num, *factor, true, &found, NULL, num_threads);
    Py_END_ALLOW_THREADS
    let_go(&grads);
    return done ? PyBool_FromLong(1) : PyErr_NoMemory();
}

static PyObject *list_tallies(const struct tally *tallies, Py_ssize_t num)
{
    PyObject *list = PyList_New(num);
    for (Py_ssize_t i = 0; list != NULL && i < num; i++) {
        const struct tally *it = &tallies[i];
        PyObject *item = Py_BuildValue("LLd", (long long)it->num_inf, (long long)it->num_nan,
                                       it->amax);
        if (item == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, i, item);
        }
    }
    return list;
}

static PyObject *count(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    int num_threads;
    struct gradients grads;
    if (!takes("count", 2, num_args)) {
        return NULL;
    }
    enum outcome outcome = read_gradients(args[0], &grads);
    if (outcome != READ) {
        return outcome == FAILED ? NULL : Py_BuildValue("");
    }
    if (!read_num_threads(args[1], &grads, &num_threads)) {
        let_go(&grads);
        return NULL;
    }
    struct tally *tallies = PyMem_Malloc((size_t)grads.num * sizeof *tallies);
    bool done = tallies != NULL;
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        done = tally_up(grads.memory, grads.num, tallies, num_threads);
        Py_END_ALLOW_THREADS
    }
    PyObject *list = done ? list_tallies(tallies, grads.num) : PyErr_NoMemory();
    PyMem_Free(tallies);
    let_go(&grads);
    return list;
}

/* What is known of the gradients of one device, as they stand in three arrays. */
struct survey {
    int64_t *addresses, *numels;
    char *dtypes;
    int32_t device_type, device_id;
};

static bool look_at(PyObject *grad, Py_ssize_t at, struct survey *out)
{
    struct dl_tensor tensor;
    if (!read_tensor(grad, &tensor) || dtype_of(&tensor) < 0 || !is_dense(&tensor)) {
        return false;
    }
    if (at == 0) {
        out->device_type = tensor.device_type;
        out->device_id = tensor.device_id;
    }
    out->addresses[at] = (int64_t)(intptr_t)address_of(&tensor);
    out->numels[at] = count_elements(&tensor);
    out->dtypes[at] = (char)dtype_of(&tensor);
    bool has_memory = out->addresses[at] != 0 || out->numels[at] == 0;
    return has_memory && tensor.device_type == out->device_type &&
           tensor.device_id == out->device_id;
}

static PyObject *survey(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    PyObject *grads = takes("survey", 1, num_args) ? PySequence_Tuple(args[0]) : NULL;
    if (grads == NULL) {
        return NULL;
    }
    Py_ssize_t num = PyTuple_Size(grads), words = num * (Py_ssize_t)sizeof(int64_t);
    PyObject *addresses = PyBytes_FromStringAndSize(NULL, words);
    PyObject *numels = PyBytes_FromStringAndSize(NULL, words);
    PyObject *dtypes = PyBytes_FromStringAndSize(NULL, num), *all = NULL;
    if (addresses != NULL && numels != NULL && dtypes != NULL) {
        struct survey out = {
            .addresses = (int64_t *)PyBytes_AsString(addresses),
            .numels = (int64_t *)PyBytes_AsString(numels),
            .dtypes = PyBytes_AsString(dtypes),
        };
        bool known = true;
        for (Py_ssize_t i = 0; known && i < num; i++) {
            known = look_at(PyTuple_GetItem(grads, i), i, &out);
        }
        all = known ? PyTuple_Pack(3, addresses, numels, dtypes) : Py_BuildValue("");
    }
    Py_XDECREF(addresses);
    Py_XDECREF(numels);
    Py_XDECREF(dtypes);
    Py_DECREF(grads);
    return all;
}

static PyObject *init(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    if (!takes("init", 4, num_args) || !set_types(args[0], args[1], args[2], args[3])) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *instruction_set(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    (void)args;
    return takes("instruction_set", 0, num_args) ? PyUnicode_FromString(bodies_in_use()->name)
                                                 : NULL;
}

static PyObject *instruction_sets(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    (void)args;
    PyObject *names = takes("instruction_sets", 0, num_args) ? PyList_New(0) : NULL;
    for (int i = 0; names != NULL && available_bodies(i) != NULL; i++) {
        PyObject *name = PyUnicode_FromString(available_bodies(i)->name);
        if (name == NULL || PyList_Append(names, name) != 0) {
            Py_CLEAR(names);
        }
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *use_instruction_set(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    if (!takes("use_instruction_set", 1, num_args)) {
        return NULL;
    }
    for (int i = 0; PyUnicode_Check(args[0]) && available_bodies(i) != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(args[0], available_bodies(i)->name) == 0) {
            use_bodies(available_bodies(i));
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError,
                        "The instruction set is %R, which this processor does not have. "
                        "Use one of instruction_sets().",
                        args[0]);
}

#define FUNCTION(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL}

/* Described in _native.pyi. */
static PyMethodDef functions[] = {
    FUNCTION("check_", check),
    FUNCTION("count", count),
    FUNCTION("gather", gather),
    FUNCTION("init", init),
    FUNCTION("instruction_set", instruction_set),
    FUNCTION("instruction_sets", instruction_sets),
    FUNCTION("scale_", scale),
    FUNCTION("survey", survey),
    FUNCTION("unscale_", unscale),
    FUNCTION("use_instruction_set", use_instruction_set),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_size = -1, /* torch, too, is there once in a process */
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return prepare_gather() ? PyModule_Create(&definition) : NULL;
}
