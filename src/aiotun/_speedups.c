/* The optional C half of aiotun: the same functions as in Python, faster. `_native.py` chooses.
 *
 * Built against the limited API, so that one binary serves every CPython from 3.11.
 */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <errno.h>
#include <limits.h>
#include <unistd.h>

/* As _abi.READ_SIZE: the longest packet there can be, with all its headers. */
#define READ_SIZE 65581

/* An int argument between 0 and `most`; else -1 and an exception. */
static long number(PyObject *argument, const char *what, long most)
{
	long value = PyLong_AsLong(argument);

	if (value == -1 && PyErr_Occurred())
		return -1;
	if (value < 0 || value > most) {
		PyErr_Format(PyExc_ValueError, "%s of %ld is out of range; it may be 0 to %ld", what,
			     value, most);
		return -1;
	}
	return value;
}

/* Reading packets from a non-blocking fd.
 *
 * os.read takes a new 64 KiB object for each packet and shrinks it afterwards. Here the packet is
 * read into the stack, and an object made once its length is known. And os.read lets other threads
 * run meanwhile, which costs a tenth of the packet; but a read that never waits takes less than a
 * microsecond, so here nobody else runs.
 */
static ssize_t read_packet(long fd, char *buffer, long size)
{
	ssize_t length;

	do
		length = read((int)fd, buffer, (size_t)size);
	while (length < 0 && errno == EINTR);
	return length;
}

/* read(fd, size): as os.read. */
static PyObject *speedups_read(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	char buffer[READ_SIZE];
	long fd, size;
	ssize_t length;

	(void)module;
	if (nargs != 2)
		return PyErr_Format(PyExc_TypeError, "read takes 2 arguments, not %zd", nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (size = number(args[1], "a size", READ_SIZE)) < 0)
		return NULL;
	length = read_packet(fd, buffer, size);
	return length < 0 ? PyErr_SetFromErrno(PyExc_OSError)
			  : PyBytes_FromStringAndSize(buffer, length);
}

/* read_many(fd, size, limit): see _native.py. */
static PyObject *speedups_read_many(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	char buffer[READ_SIZE];
	long fd, size, limit;
	PyObject *batch;

	(void)module;
	if (nargs != 3)
		return PyErr_Format(PyExc_TypeError, "read_many takes 3 arguments, not %zd", nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (size = number(args[1], "a size", READ_SIZE)) < 0 ||
	    (limit = number(args[2], "a limit", LONG_MAX)) < 0)
		return NULL;
	batch = PyList_New(0);
	for (long count = 0; batch && count < limit; count++) {
		ssize_t length = read_packet(fd, buffer, size);
		PyObject *packet;

		if (length < 0 && count > 0)
			break; /* what there is goes first; the next call meets the error again */
		packet = length < 0 ? PyErr_SetFromErrno(PyExc_OSError)
				    : PyBytes_FromStringAndSize(buffer, length);
		if (!packet || PyList_Append(batch, packet) < 0)
			Py_CLEAR(batch);
		Py_XDECREF(packet);
	}
	return batch;
}

static PyMethodDef methods[] = {
	{"read", (PyCFunction)(void (*)(void))speedups_read, METH_FASTCALL, NULL},
	{"read_many", (PyCFunction)(void (*)(void))speedups_read_many, METH_FASTCALL, NULL},
	{NULL, NULL, 0, NULL},
};

static int speedups_exec(PyObject *module)
{
	return PyModule_AddIntConstant(module, "READ_SIZE", READ_SIZE);
}

static PyModuleDef_Slot slots[] = {
	{Py_mod_exec, (void *)speedups_exec},
	{0, NULL},
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "aiotun._speedups",
	.m_methods = methods,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__speedups(void)
{
	return PyModuleDef_Init(&definition);
}
