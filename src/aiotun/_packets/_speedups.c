/* The optional C module: the same functions as in Python, but faster. `native.py` chooses.
 *
 * It is built against the limited API, so that one binary serves every CPython from 3.11 but the
 * free-threaded ones.
 *
 * Map: the sections in their order, and the Python twin of each function. Comments explain only
 * what the twin's comments and docstrings don't.
 *
 *   Constants
 *   Arguments            number
 *   Reading and writing  read               os.read
 *                        read_many          native._read_many
 *                        write_many         native._write_many
 *   Numbers and sums     sum_of             gso.checksum, without the complement; gso._summing
 *   Headers              find_layers        gso._layers, then gso._payload_start
 *                        pseudo_sum         gso._addresses, plus protocol and length
 *   Splitting            out_of_proportion  gso._out_of_proportion
 *                        routed             gso._routed
 *                        add_up, segment    gso._segments
 *                        finished           gso._finished
 *                        split_into, split  gso.split
 *                        read_split         native._read_split
 *   Merging              make_part          gso._part
 *                        alike              the comparison of `same` in gso._Run.take
 *                        verified           gso._verified
 *                        begin, take        gso._Run.__init__, gso._Run.take
 *                        put_headers, give  gso._Run.whole
 *                        merge_into, merge  gso.merge
 *                        write_merged       native._write_merged
 *   Checksum             checksum           gso.checksum
 *   The module
 *
 * What the code relies on:
 *
 * - The interpreter's lock is held throughout: no function here releases it. It guards the two
 *   objects that all calls share, `read_buffer` and `guesses`; where CPython has no lock
 *   (Py_GIL_DISABLED), each thread has its own. So no Python code may run between a read into
 *   `read_buffer` and the last use of the bytes: it could read into it, too.
 *   Only `again`, which runs signal handlers, the conversions of arguments and `list_of_packets`
 *   run Python code. They must be called before a read or after a failed one.
 * - `guesses` holds only guesses. A wrong one costs a copy, never a wrong result.
 * - The stack: at most 17 KiB, nearly all of it for `struct run` in `merge_into`. Threads may have
 *   stacks of 64 KiB (threading.stack_size, and musl's are not much larger).
 */
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED /* a free-threaded CPython has no limited API */
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* === Constants ================================================================================ */

/* As _kernel.abi.READ_SIZE: the longest packet there can be, with all its headers. */
#define READ_SIZE 65581

/* What all calls share, or the calls of one thread; see above. */
#ifdef Py_GIL_DISABLED
#define SHARED static _Thread_local
#else
#define SHARED static
#endif

/* The buffer of all functions that read: it is too large for the stack of a thread. */
SHARED char read_buffer[READ_SIZE];

/* virtio_net.h: the header's size, without num_buffers and with it. */
#define HEADER 10
#define LONG_HEADER 12
#define NEEDS_CSUM 1
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_UDP_L4 = 5, GSO_ECN = 0x80 };

enum { TCP = 6, UDP = 17 };
enum { LOOSE_ROUTE = 0x83, STRICT_ROUTE = 0x89 }; /* IPv4 options (RFC 791) */
enum { FIN = 0x01, PSH = 0x08, ACK = 0x10, CWR = 0x80 };

#define LONGEST 65535	   /* bytes of an IP packet */
#define MOST_DATAGRAMS 64  /* in one UDP super-packet */
#define MOST_PACKETS 1000  /* in any: writev takes 1,024 pieces */
#define MOST_LINK 22	   /* bytes before the IP header: Ethernet and two VLAN tags */
#define MOST_HEADERS (MOST_LINK + 40 + 60)

/* The limits of what a super-packet may be split into: see gso.py. */
#define MOST_SPLIT_HEADERS 512 /* bytes in front of the payload */
#define MOST_GROWTH 16	       /* times its own length */

/* === Arguments ================================================================================ */

/* Return an int argument from 0 to `most`. Otherwise return -1 and set an exception. */
static long number(PyObject *argument, const char *what, long most)
{
	long value = PyLong_AsLong(argument);

	if (value == -1 && PyErr_Occurred())
		return -1;
	if (value < 0 || value > most) {
		PyErr_Format(PyExc_ValueError, "%s must be 0 to %ld, got %ld", what, most, value);
		return -1;
	}
	return value;
}

/* Return the size of a virtio-net header, 10 where the argument is left out; or -1 with an exception. */
static long header_size(PyObject *const *args, Py_ssize_t nargs, Py_ssize_t place)
{
	long size = place < nargs ? number(args[place], "a header", LONG_MAX) : HEADER;

	if (size < 0 || size == HEADER || size == LONG_HEADER)
		return size;
	PyErr_Format(PyExc_ValueError, "a virtio-net header has %d or %d bytes, not %ld", HEADER,
		     LONG_HEADER, size);
	return -1;
}

/* === Reading and writing ======================================================================
 *
 * Packets are read from and written to a non-blocking fd. os.read releases the interpreter's lock
 * during the read, which costs a tenth of handling the packet. But a non-blocking read takes less
 * than a microsecond and a write little more, so these functions keep the lock.
 */

/* Run signal handlers after a failed read. Return whether to read again: the read was interrupted
 * by a signal, and the handlers raised nothing.
 *
 * A non-blocking read is never interrupted. But O_NONBLOCK belongs to the file description, and
 * another process that shares it may clear the flag. Then the read blocks, and Ctrl-C must still
 * work. */
static int again(void)
{
	return !PyErr_Occurred() && errno == EINTR && PyErr_CheckSignals() == 0;
}

/* Write one packet. Return 0, or -1 without setting an exception. The caller stops then. Python
 * writes that packet again by itself, and raises the error there, or retries after a signal. */
static int write_packet(long fd, const char *packet, size_t length)
{
	return write((int)fd, packet, length) < 0 ? -1 : 0;
}

/* Guesses of the length of an fd's next packet: in a stream of super-packets it is nearly always
 * the length of the last one. The index is the fd modulo 64, so fds may share a guess. */
#define LONG_PACKET 8192
#define FORGOTTEN 16 /* short packets in a row */
struct guess {
	size_t length;
	unsigned others; /* short packets since the last long one */
};
SHARED struct guess guesses[64];

/* Update a guess with a packet's length. After FORGOTTEN short packets in a row the guess is 0,
 * which means: read the next packet into the buffer. */
static void learn(struct guess *guess, size_t length)
{
	if (length >= LONG_PACKET)
		*guess = (struct guess){length, 0};
	else if (guess->length && ++guess->others == FORGOTTEN)
		guess->length = 0;
}

/* Read a packet into a bytes object of the guessed length, and the rest into the buffer. If the
 * guess was wrong, copy the packet to an object of the right length. Return as read_object. */
static PyObject *read_guessed(long fd, size_t size, struct guess *guess)
{
	size_t guessed = guess->length;
	PyObject *object = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)guessed), *packet;
	struct iovec pieces[2];
	ssize_t length;
	size_t first;

	if (!object)
		return NULL;
	pieces[0] = (struct iovec){PyBytes_AsString(object), guessed};
	pieces[1] = (struct iovec){read_buffer, size - guessed};
	length = readv((int)fd, pieces, 2);
	if (length < 0) {
		int error = errno;

		Py_DECREF(object);
		errno = error;
		return NULL;
	}
	learn(guess, (size_t)length);
	if ((size_t)length == guessed)
		return object;
	first = (size_t)length < guessed ? (size_t)length : guessed;
	packet = PyBytes_FromStringAndSize(NULL, length);
	if (packet && length) {
		char *at = PyBytes_AsString(packet);

		memcpy(at, pieces[0].iov_base, first);
		memcpy(at + first, read_buffer, (size_t)length - first);
	}
	Py_DECREF(object);
	return packet;
}

/* Read a packet into a new bytes object. If the read fails, return NULL and set errno, but no
 * exception. If there is no memory, return NULL with an exception.
 *
 * os.read makes an object of 64 KiB for each packet and shrinks it afterwards. Here a short packet
 * is read into the buffer, and then copied to an object of the right length. Copying a super-packet
 * this way would take longer than reading it. */
static PyObject *read_object(long fd, size_t size)
{
	struct guess *guess = &guesses[fd % 64];
	ssize_t length;

	if (guess->length && guess->length < size)
		return read_guessed(fd, size, guess);
	length = read((int)fd, read_buffer, size);
	if (length < 0)
		return NULL;
	learn(guess, (size_t)length);
	return PyBytes_FromStringAndSize(read_buffer, length);
}

/* read(fd, size): like os.read. */
static PyObject *speedups_read(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	long fd, size;
	PyObject *packet;

	(void)module;
	if (nargs != 2)
		return PyErr_Format(PyExc_TypeError, "read takes 2 arguments, not %zd", nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (size = number(args[1], "a size", READ_SIZE)) < 0)
		return NULL;
	do
		packet = read_object(fd, (size_t)size);
	while (!packet && again());
	if (!packet && !PyErr_Occurred())
		PyErr_SetFromErrno(PyExc_OSError);
	return packet;
}

/* read_many(fd, size, limit): see native.py. */
static PyObject *speedups_read_many(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
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
		PyObject *packet = read_object(fd, (size_t)size);

		if (!packet && !PyErr_Occurred()) {
			if (count > 0)
				break; /* return the batch; the next call meets the error again */
			if (again()) {
				count--;
				continue;
			}
			if (!PyErr_Occurred())
				PyErr_SetFromErrno(PyExc_OSError);
		}
		if (!packet || PyList_Append(batch, packet) < 0)
			Py_CLEAR(batch);
		Py_XDECREF(packet);
	}
	return batch;
}

/* Return a reference to an item of a list that other threads may change; NULL, without an exception,
 * if it has been taken out meanwhile. */
static PyObject *item_of(PyObject *list, Py_ssize_t index)
{
#ifdef Py_GIL_DISABLED
	PyObject *item = PyList_GetItemRef(list, index);

	if (!item)
		PyErr_Clear();
	return item;
#else
	return Py_NewRef(PyList_GetItem(list, index));
#endif
}

/* write_many(fd, packets): see native.py. */
static PyObject *speedups_write_many(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	Py_ssize_t written = 0, count;
	long fd;

	(void)module;
	if (nargs != 2)
		return PyErr_Format(PyExc_TypeError, "write_many takes 2 arguments, not %zd", nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0)
		return NULL;
	if (!PyList_Check(args[1]))
		return PyErr_Format(PyExc_TypeError, "write_many takes a list");
	for (count = PyList_Size(args[1]); written < count; written++) {
		PyObject *packet = item_of(args[1], written);
		int failed = !packet || !PyBytes_CheckExact(packet) ||
			     write_packet(fd, PyBytes_AsString(packet),
					  (size_t)PyBytes_Size(packet)) < 0;

		Py_XDECREF(packet);
		if (failed)
			break;
	}
	return PyLong_FromSsize_t(written);
}

/* === Numbers and sums ========================================================================= */

/* Read and write big-endian numbers at any address. */

static uint16_t get16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t get32(const uint8_t *at)
{
	return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static void put16(uint8_t *at, unsigned value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
	put16(at, value >> 16);
	put16(at + 2, value & 0xffff);
}

/* Fold a sum of 16-bit words to 16 bits, with the end-around carry (RFC 1071). The result is 0 only
 * if the sum is 0. */
static unsigned fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (unsigned)sum;
}

/* Add the last bytes, fewer than four, to a sum in the machine's byte order. Return the folded sum
 * of the big-endian words. */
static unsigned finish_sum(uint64_t sum, const uint8_t *data, size_t length)
{
	uint32_t word = 0;

	memcpy(&word, data, length);
	return ntohs((uint16_t)fold(sum + word));
}

/* The loops of sum_of and copy_and_sum take nearly all of the time. They add in the machine's byte
 * order, which gives the same result when folded (RFC 1071, section 2). They add the two halves of
 * 32-bit words separately: compilers vectorize this best, and no sum overflows within a block. AVX2
 * halves the time on processors that have it. The loader chooses the version before the sanitizers
 * are initialized, so the fuzz targets use only one version. */
#define BLOCK ((size_t)1 << 17) /* bytes */
#if !defined(FUZZING) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define VECTORS
#endif

/* Return the folded sum of data of any length. */
VECTORS static unsigned sum_of(const uint8_t *data, size_t length)
{
	uint64_t sum = 0;

	while (length >= 4) {
		size_t bytes = (length < BLOCK ? length : BLOCK) & ~(size_t)3;
		uint32_t low = 0, high = 0, word;

		for (size_t at = 0; at < bytes; at += 4) {
			memcpy(&word, data + at, 4);
			low += word & 0xffff;
			high += word >> 16;
		}
		sum += (uint64_t)low + high;
		data += bytes;
		length -= bytes;
	}
	return finish_sum(sum, data, length);
}

/* Copy data of at most BLOCK bytes and return its folded sum: one pass is faster than two. */
VECTORS static unsigned copy_and_sum(uint8_t *restrict to, const uint8_t *restrict from,
				     size_t length)
{
	size_t bytes = length & ~(size_t)3;
	uint32_t low = 0, high = 0, word;

	for (size_t at = 0; at < bytes; at += 4) {
		memcpy(&word, from + at, 4);
		memcpy(to + at, &word, 4);
		low += word & 0xffff;
		high += word >> 16;
	}
	memcpy(to + bytes, from + bytes, length - bytes);
	return finish_sum((uint64_t)low + high, from + bytes, length - bytes);
}

/* === Headers ================================================================================== */

/* The offsets of a packet's or frame's headers and payload. */
struct layers {
	int version, protocol;
	size_t ip, transport, payload;
};

/* Find the headers, up to the end of TCP or UDP. Return NULL, or an error text. */
static const char *find_layers(const uint8_t *packet, size_t length, int frame, struct layers *l)
{
	size_t ip = 0, size;

	if (frame) {
		for (ip = 14; ip <= length; ip += 4) {
			unsigned tag = get16(packet + ip - 2);
			if (tag != 0x8100 && tag != 0x88a8)
				break;
		}
	}
	l->version = ip < length ? packet[ip] >> 4 : 0;
	if ((l->version != 4 && l->version != 6) ||
	    (frame && get16(packet + ip - 2) != (l->version == 4 ? 0x0800 : 0x86dd)))
		return "the packet is neither IPv4 nor IPv6";
	l->ip = ip;
	size = length - ip;
	if (l->version == 4) {
		size_t header = (size_t)(packet[ip] & 0xf) * 4;
		if (header < 20 || size < header || get16(packet + ip + 2) != size)
			return "the IPv4 header does not match the packet's length";
		if (get16(packet + ip + 6) & 0x3fff)
			return "the packet is a fragment";
		l->protocol = packet[ip + 9];
		l->transport = ip + header;
	} else {
		if (size < 40 || (size_t)get16(packet + ip + 4) + 40 != size)
			return "the IPv6 header does not match the packet's length";
		l->protocol = packet[ip + 6];
		l->transport = ip + 40;
		/* Hop-by-hop, routing and destination options. */
		while ((l->protocol == 0 || l->protocol == 43 || l->protocol == 60) &&
		       length >= l->transport + 8) {
			l->protocol = packet[l->transport];
			l->transport += ((size_t)packet[l->transport + 1] + 1) * 8;
		}
	}
	if (l->protocol != TCP && l->protocol != UDP)
		return "the packet is neither TCP nor UDP";
	l->payload = l->transport + 8;
	if (l->protocol == TCP) {
		l->payload = l->transport + 20;
		if (l->payload <= length) {
			unsigned words = packet[l->transport + 12] >> 4;
			l->payload = words >= 5 ? l->transport + words * 4 : length + 1;
		}
	}
	if (l->payload > length)
		return "the TCP or UDP header does not match the packet's length";
	return NULL;
}

/* Return the sum of the pseudo-header: protocol, length, addresses. Not folded. */
static uint64_t pseudo_sum(const uint8_t *packet, const struct layers *l, size_t length)
{
	size_t start = l->version == 4 ? 12 : 8, end = l->version == 4 ? 20 : 40;

	return (uint64_t)l->protocol + length + sum_of(packet + l->ip + start, end - start);
}

/* Write the length and IPv4's checksum into the IP header. `length` is that of the whole packet or
 * frame. */
static void seal_ip(uint8_t *packet, const struct layers *l, size_t length)
{
	uint8_t *ip = packet + l->ip;

	if (l->version == 6) {
		put16(ip + 4, (unsigned)(length - l->ip - 40));
		return;
	}
	put16(ip + 2, (unsigned)(length - l->ip));
	put16(ip + 10, 0);
	put16(ip + 10, 0xffff - sum_of(ip, l->transport - l->ip));
}

/* === Splitting ================================================================================ */

/* Append an item to a list and release it. Return 0, or -1 with an exception; also for NULL. */
static int append(PyObject *list, PyObject *item)
{
	int result = item ? PyList_Append(list, item) : -1;

	Py_XDECREF(item);
	return result;
}

/* Return whether `count` packets with these headers are too long together to come from one
 * super-packet of this length. */
static int out_of_proportion(size_t count, size_t headers, size_t length)
{
	size_t total = count * headers + length - headers;

	return total > LONGEST && total > MOST_GROWTH * length;
}

/* Return whether the packet has a source route, so that the pseudo-header has another destination
 * than the IP header: an IPv6 routing header with segments left, or an IPv4 source route. */
static int routed(const uint8_t *packet, const struct layers *l)
{
	size_t at = l->ip + (l->version == 4 ? 20 : 40), size;
	int kind = packet[l->ip + 6];

	for (; l->version == 6 && at < l->transport; at += size) {
		if (kind == 43 && packet[at + 3] > 0)
			return 1;
		kind = packet[at];
		size = ((size_t)packet[at + 1] + 1) * 8;
	}
	for (; l->version == 4 && at < l->transport && packet[at] != 0; at += size) {
		if (packet[at] == LOOSE_ROUTE || packet[at] == STRICT_ROUTE)
			return 1;
		size = 1;
		if (packet[at] != 1) /* "no operation" has no length */
			size = at + 1 < l->transport && packet[at + 1] > 2 ? packet[at + 1] : 2;
	}
	return 0;
}

/* A super-packet to split, and the sums of the bytes that are the same in each of its segments. */
struct whole {
	const uint8_t *packet;
	size_t length;
	struct layers l;
	int partial; /* the checksum field holds the pseudo-header's sum */
	uint64_t ip_sum; /* without length, identification and checksum */
	uint64_t sum;	 /* pseudo-header and header, without lengths, sequence, flags and checksum */
};

/* Return what to add to a sum to take a 16-bit word out of it (RFC 1624). */
static unsigned without(const uint8_t *at)
{
	return 0xffff - get16(at);
}

/* Compute the sums of a super-packet. The other fields must be set. */
static void add_up(struct whole *w)
{
	const uint8_t *ip = w->packet + w->l.ip, *transport = w->packet + w->l.transport;
	size_t head = w->l.payload - w->l.transport;

	if (w->l.version == 4)
		w->ip_sum = (uint64_t)sum_of(ip, w->l.transport - w->l.ip) + without(ip + 2) +
			    without(ip + 4) + without(ip + 10);
	/* The sender computed the partial sum with the final destination and the whole length. */
	if (!w->partial)
		w->sum = pseudo_sum(w->packet, &w->l, 0);
	else if (w->l.protocol == TCP)
		w->sum = (uint64_t)get16(transport + 16) + 0xffff - (w->length - w->l.transport);
	else
		w->sum = (uint64_t)get16(transport + 6) + without(transport + 4);
	w->sum += sum_of(transport, head);
	if (w->l.protocol == TCP)
		w->sum += (uint64_t)without(transport + 4) + without(transport + 6) +
			  without(transport + 12) + without(transport + 16);
	else
		w->sum += (uint64_t)without(transport + 4) + without(transport + 6);
}

/* Return a segment as a new bytes object, or NULL with an exception: all headers, and at most
 * `size` bytes of the payload from `at` on. `number` counts the segments from 0. */
static PyObject *segment(const struct whole *w, size_t at, size_t size, unsigned number)
{
	const struct layers *l = &w->l;
	size_t head = l->payload, length = at + size < w->length ? size : w->length - at;
	PyObject *made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(head + length));
	uint8_t *out, *ip, *transport;
	uint64_t sum;
	unsigned total;

	if (!made)
		return NULL;
	out = (uint8_t *)PyBytes_AsString(made);
	memcpy(out, w->packet, head);
	sum = w->sum + copy_and_sum(out + head, w->packet + at, length);
	ip = out + l->ip;
	total = (unsigned)(head + length - l->ip);
	if (l->version == 4) {
		unsigned identification = (get16(ip + 4) + number) & 0xffff;

		put16(ip + 2, total);
		put16(ip + 4, identification);
		put16(ip + 10, 0xffff - fold(w->ip_sum + total + identification));
	} else {
		put16(ip + 4, total - 40);
	}
	transport = out + l->transport;
	length += head - l->transport;
	sum += length;
	if (l->protocol == TCP) {
		uint32_t sequence = get32(transport + 4) + (uint32_t)(at - head);

		put32(transport + 4, sequence);
		/* FIN and PSH stay on the last segment, CWR on the first. */
		if (at > head)
			transport[13] &= (uint8_t)~CWR;
		if (at + size < w->length)
			transport[13] &= (uint8_t) ~(FIN | PSH);
		sum += (sequence >> 16) + (sequence & 0xffff) + get16(transport + 12);
		put16(transport + 16, 0xffff - fold(sum));
	} else {
		put16(transport + 4, (unsigned)length);
		sum = fold(sum + length);
		/* 0 would mean that there is no checksum. */
		put16(transport + 6, sum == 0xffff ? 0xffff : 0xffff - (unsigned)sum);
	}
	return made;
}

/* Return the packet as a new bytes object, with the checksum that the sender left to the network
 * card; or NULL with an exception. */
static PyObject *finished(const uint8_t *packet, size_t length, size_t start, size_t offset)
{
	PyObject *made;
	uint8_t *out;
	unsigned sum;

	if (start + offset + 2 > length)
		return PyErr_Format(PyExc_ValueError,
				    "the checksum at %zu is outside the packet of %zu bytes",
				    start + offset, length);
	made = PyBytes_FromStringAndSize((const char *)packet, (Py_ssize_t)length);
	if (!made)
		return NULL;
	out = (uint8_t *)PyBytes_AsString(made);
	sum = sum_of(out + start, length - start);
	put16(out + start + offset, sum == 0xffff ? 0xffff : 0xffff - sum);
	return made;
}

/* Return whether a gso_type without its ECN bit matches the packet's headers. */
static int fits(unsigned kind, const struct layers *l)
{
	switch (kind) {
	case GSO_TCPV4:
		return l->version == 4 && l->protocol == TCP;
	case GSO_TCPV6:
		return l->version == 6 && l->protocol == TCP;
	case GSO_UDP_L4:
		return l->protocol == UDP;
	}
	return 0;
}

/* Split a super-packet and append the packets to a list. Return 0, or -1 with an exception. With
 * ValueError, which means that the super-packet can't be split, nothing was appended. */
static int split_into(PyObject *list, const uint8_t *data, size_t length, int frame, size_t header)
{
	uint16_t fields[4]; /* hdr_len, gso_size, csum_start, csum_offset, in native byte order */
	const uint8_t *packet = data + header;
	struct whole w = {.packet = packet};
	const char *wrong;
	size_t at, count;
	unsigned number = 0;

	if (length < header) {
		PyErr_Format(PyExc_ValueError, "a super-packet begins with a header of %zu bytes",
			     header);
		return -1;
	}
	memcpy(fields, data + 2, sizeof fields);
	length -= header;
	if ((data[1] & ~GSO_ECN) == GSO_NONE)
		return append(list, data[0] & NEEDS_CSUM
					    ? finished(packet, length, fields[2], fields[3])
					    : PyBytes_FromStringAndSize((const char *)packet,
									(Py_ssize_t)length));
	wrong = find_layers(packet, length, frame, &w.l);
	if (wrong) {
		PyErr_SetString(PyExc_ValueError, wrong);
		return -1;
	}
	if (!fits(data[1] & ~GSO_ECN, &w.l)) {
		PyErr_Format(PyExc_ValueError, "gso_type %d does not match the packet's headers",
			     data[1]);
		return -1;
	}
	if (fields[1] == 0) {
		PyErr_SetString(PyExc_ValueError, "gso_size must not be 0");
		return -1;
	}
	at = w.l.payload;
	count = (length - at + fields[1] - 1) / fields[1];
	if (at > MOST_SPLIT_HEADERS || out_of_proportion(count, at, length)) {
		PyErr_Format(PyExc_ValueError,
			     "%zu bytes would become %zu packets with headers of %zu bytes, "
			     "which is too much",
			     length, count, at);
		return -1;
	}
	w.length = length;
	w.partial = data[0] & NEEDS_CSUM && fields[2] == w.l.transport &&
		    fields[3] == (w.l.protocol == TCP ? 16 : 6);
	if (!w.partial && routed(packet, &w.l)) {
		PyErr_SetString(PyExc_ValueError,
				"the packet has a source route, but no partial checksum");
		return -1;
	}
	add_up(&w);
	do {
		if (append(list, segment(&w, at, fields[1], number++)) < 0)
			return -1;
		at += fields[1];
	} while (at < length);
	return 0;
}

/* Return the bytes of a buffer: itself, if it is bytes. Another thread can't change them between a
 * check and their use. */
static PyObject *bytes_of(PyObject *buffer)
{
	PyObject *made;
	Py_buffer data;

	if (PyBytes_CheckExact(buffer))
		return Py_NewRef(buffer);
	if (PyObject_GetBuffer(buffer, &data, PyBUF_SIMPLE) < 0)
		return NULL;
	made = PyBytes_FromStringAndSize(data.buf, data.len);
	PyBuffer_Release(&data);
	return made;
}

/* split(super_packet, frame): see gso.py. */
static PyObject *speedups_split(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	PyObject *list, *packet;
	int frame = 0;

	(void)module;
	if (nargs < 1 || nargs > 2)
		return PyErr_Format(PyExc_TypeError, "split takes 1 or 2 arguments, not %zd", nargs);
	if (nargs == 2 && (frame = PyObject_IsTrue(args[1])) < 0)
		return NULL;
	if (!(packet = bytes_of(args[0])))
		return NULL;
	list = PyList_New(0);
	if (list && split_into(list, (const uint8_t *)PyBytes_AsString(packet),
			       (size_t)PyBytes_Size(packet), frame, HEADER) < 0)
		Py_CLEAR(list);
	Py_DECREF(packet);
	return list;
}

/* read_split(fd, frame, limit, header): see native.py. */
static PyObject *speedups_read_split(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	PyObject *list;
	long fd, limit, header, lost = 0;
	int frame;

	(void)module;
	if (nargs < 3 || nargs > 4)
		return PyErr_Format(PyExc_TypeError, "read_split takes 3 or 4 arguments, not %zd",
				    nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (frame = PyObject_IsTrue(args[1])) < 0 ||
	    (limit = number(args[2], "a limit", LONG_MAX)) < 0 ||
	    (header = header_size(args, nargs, 3)) < 0)
		return NULL;
	list = PyList_New(0);
	while (list && PyList_Size(list) + lost < limit) {
		ssize_t length = read((int)fd, read_buffer, READ_SIZE);

		if (length == 0) { /* a socket's end, or an empty datagram */
			length = -1;
			errno = ENODATA;
		}
		if (length < 0 && (lost || PyList_Size(list)))
			break; /* what there is goes first; the next call meets the error again */
		if (length < 0) {
			if (again())
				continue;
			if (!PyErr_Occurred())
				PyErr_SetFromErrno(PyExc_OSError);
			Py_CLEAR(list);
		} else if (split_into(list, (const uint8_t *)read_buffer, (size_t)length, frame,
				      (size_t)header) < 0) {
			if (!PyErr_ExceptionMatches(PyExc_ValueError)) {
				Py_CLEAR(list);
			} else {
				PyErr_Clear();
				lost++;
			}
		}
	}
	return list ? Py_BuildValue("(Nl)", list, lost) : NULL;
}

/* === Merging ================================================================================== */

/* A packet, and where its headers are. */
struct part {
	const uint8_t *packet;
	size_t length;
	struct layers l;
	int last; /* no packet may follow in the same super-packet */
};

/* Fill in a part. Return whether the packet may be merged; if not, the layers may be unset. */
static int make_part(struct part *p, const uint8_t *packet, size_t length, int frame)
{
	const uint8_t *transport;

	p->packet = packet;
	p->length = length;
	p->last = 0;
	if (find_layers(packet, length, frame, &p->l) || p->l.payload == length ||
	    p->l.ip > MOST_LINK || p->l.transport != p->l.ip + (p->l.version == 4 ? 20 : 40))
		return 0;
	transport = packet + p->l.transport;
	if (p->l.protocol == UDP)
		return get16(transport + 4) == length - p->l.transport && get16(transport + 6) != 0;
	p->last = (transport[13] & PSH) != 0;
	return (transport[12] & 0xf) == 0 && (transport[13] & ~PSH) == ACK;
}

/* Return whether the packet's checksums are valid. */
static int verified(const struct part *p)
{
	const struct layers *l = &p->l;
	size_t length = p->length - l->transport;

	if (l->version == 4 && sum_of(p->packet + l->ip, 20) != 0xffff)
		return 0;
	return fold(pseudo_sum(p->packet, l, length) + sum_of(p->packet + l->transport, length)) ==
	       0xffff;
}

/* Return whether two packets have the same bytes from `start` to `end`. */
static int same(const struct part *a, const struct part *b, size_t start, size_t end)
{
	return memcmp(a->packet + start, b->packet + start, end - start) == 0;
}

/* Return whether the headers are equal in all fields that must be equal in packets of a run. */
static int alike(const struct part *a, const struct part *b)
{
	size_t ip = a->l.ip, transport = a->l.transport;

	if (a->l.version != b->l.version || a->l.protocol != b->l.protocol || ip != b->l.ip ||
	    a->l.payload != b->l.payload)
		return 0;
	if (a->l.version == 4) {
		if (!same(a, b, 0, ip + 2) || !same(a, b, ip + 6, ip + 10) ||
		    !same(a, b, ip + 12, transport + 4))
			return 0;
	} else if (!same(a, b, 0, ip + 4) || !same(a, b, ip + 6, transport + 4)) {
		return 0;
	}
	return a->l.protocol == UDP ||
	       (same(a, b, transport + 8, transport + 13) &&
		same(a, b, transport + 14, transport + 16) &&
		same(a, b, transport + 18, a->l.payload));
}

/* Packets of one flow, each of which continues the one before. A run of one packet may be a packet
 * that can't be merged. */
struct run {
	struct part first, latest;
	int count;
	size_t head, size, length; /* of the headers, of each payload but the last, and of all so far */
	int open;		   /* another packet may follow */
	struct iovec parts[1 + MOST_PACKETS]; /* the headers, and every payload */
};

/* Begin a run with a packet; `usable` is what make_part returned. */
static void begin(struct run *r, const struct part *p, int usable)
{
	r->first = r->latest = *p;
	r->count = 1;
	r->length = p->length;
	r->head = usable ? p->l.payload : 0;
	r->size = p->length - r->head;
	r->open = usable && !p->last;
	r->parts[1] = (struct iovec){(void *)(p->packet + r->head), r->size};
}

/* Add a packet if it continues the run and its checksums are valid. Return whether. */
static int take(struct run *r, const struct part *p)
{
	const struct layers *l = &r->first.l;
	size_t size = p->length - p->l.payload;
	const uint8_t *ip = p->packet + l->ip, *before = r->latest.packet + l->ip;

	if (!r->open || size > r->size || r->length + size - l->ip > LONGEST ||
	    !alike(&r->first, p))
		return 0;
	/* A packet that must not be fragmented needs no identification (RFC 6864, section 4). */
	if (l->version == 4 && !(get16(ip + 6) & 0x4000) &&
	    get16(ip + 4) != (uint16_t)(get16(before + 4) + 1))
		return 0;
	if (r->count >= (l->protocol == UDP ? MOST_DATAGRAMS : MOST_PACKETS) ||
	    out_of_proportion((size_t)r->count + 1, l->payload, r->length + size))
		return 0;
	if (l->protocol == TCP &&
	    get32(p->packet + l->transport + 4) !=
		    (uint32_t)(get32(r->first.packet + l->transport + 4) + r->length - l->payload))
		return 0;
	if (!verified(p) || (r->count == 1 && !verified(&r->first)))
		return 0;
	r->latest = *p;
	r->parts[++r->count] = (struct iovec){(void *)(p->packet + l->payload), size};
	r->length += size;
	r->open = size == r->size && !p->last;
	return 1;
}

/* Write the headers of a super-packet that is complete, the virtio-net header of `size` bytes first. */
static void put_headers(const struct run *r, uint8_t *header, size_t size)
{
	const struct layers *l = &r->first.l;
	uint8_t *packet = header + size, *transport;
	size_t length = r->length - l->transport, offset = l->protocol == TCP ? 16 : 6;
	uint16_t fields[4] = {(uint16_t)l->payload, (uint16_t)r->size, (uint16_t)l->transport,
			      (uint16_t)offset};

	memset(header, 0, size);
	memcpy(packet, r->first.packet, r->head);
	if (r->count == 1)
		return; /* the packet may have no layers */
	transport = packet + l->transport;
	header[0] = NEEDS_CSUM;
	header[1] = l->protocol == UDP ? GSO_UDP_L4 : l->version == 4 ? GSO_TCPV4 : GSO_TCPV6;
	memcpy(header + 2, fields, sizeof fields);
	seal_ip(packet, l, r->length);
	if (l->protocol == TCP)
		transport[13] |= r->latest.packet[l->transport + 13];
	else
		put16(transport + 4, (unsigned)length);
	/* The uncomplemented sum of the pseudo-header: the kernel adds the rest. */
	put16(transport + offset, fold(pseudo_sum(packet, l, length)));
}

/* Where super-packets go: into a list, or to an fd if the list is NULL. */
struct sink {
	PyObject *list;
	int fd;
	int no_udp; /* datagrams are not merged */
	size_t header; /* bytes of a virtio-net header */
	unsigned long written; /* packets */
};

/* Write a super-packet in pieces. Return as write_packet. */
static int write_pieces(int fd, const struct run *r, size_t length)
{
	ssize_t result = writev(fd, r->parts, 1 + r->count);

	return result >= 0 && (size_t)result == length ? 0 : -1;
}

/* Give the run to the sink: a super-packet, or its only packet with an empty header. Return 0, or
 * -1 if the sink takes no more: with an exception for a list, without one for an fd. */
static int give(struct run *r, struct sink *sink)
{
	uint8_t headers[LONG_HEADER + MOST_HEADERS], *out;
	size_t length = sink->header + r->length;
	PyObject *made;

	put_headers(r, headers, sink->header);
	r->parts[0] = (struct iovec){headers, sink->header + r->head};
	if (!sink->list) {
		if (write_pieces(sink->fd, r, length) < 0)
			return -1;
		sink->written += (unsigned long)r->count;
		return 0;
	}
	made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
	out = made ? (uint8_t *)PyBytes_AsString(made) : NULL;
	for (int part = 0; made && part <= r->count; part++) {
		memcpy(out, r->parts[part].iov_base, r->parts[part].iov_len);
		out += r->parts[part].iov_len;
	}
	return append(sink->list, made);
}

/* Replace the items of a list that are not bytes by bytes. Return 0, or -1 with an exception. */
static int all_bytes(PyObject *list)
{
	for (Py_ssize_t index = 0, end = PyList_Size(list); index < end; index++) {
		PyObject *item = PyList_GetItem(list, index), *made;

		if (PyBytes_CheckExact(item))
			continue;
		if (!(made = bytes_of(item)) || PyList_SetItem(list, index, made) < 0)
			return -1;
	}
	return 0;
}

/* Merge a list of bytes, in order, and give the results to the sink. Return as `give`. */
static int merge_into(struct sink *sink, PyObject *packets, int frame)
{
	struct run run;

	run.count = 0;
	for (Py_ssize_t index = 0, end = PyList_Size(packets); index < end; index++) {
		PyObject *packet = PyList_GetItem(packets, index);
		struct part part = {0};
		int usable = make_part(&part, (const uint8_t *)PyBytes_AsString(packet),
				       (size_t)PyBytes_Size(packet), frame);

		if (sink->no_udp && part.l.protocol == UDP)
			usable = 0;
		if (run.count && usable && take(&run, &part))
			continue;
		if (run.count && give(&run, sink) < 0)
			return -1;
		begin(&run, &part, usable);
	}
	return run.count ? give(&run, sink) : 0;
}

/* Return the packets of an iterable as a new list of bytes, or NULL with an exception. The list is
 * new so that Python code, which the conversion may run, can't change it. */
static PyObject *list_of_packets(PyObject *iterable)
{
	PyObject *packets = PySequence_List(iterable);

	if (packets && all_bytes(packets) < 0)
		Py_CLEAR(packets);
	return packets;
}

/* merge(packets, frame, udp): see gso.py. */
static PyObject *speedups_merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct sink sink = {.header = HEADER};
	PyObject *packets;
	int frame = 0, udp = 1;

	(void)module;
	if (nargs < 1 || nargs > 3)
		return PyErr_Format(PyExc_TypeError, "merge takes 1 to 3 arguments, not %zd", nargs);
	if ((nargs >= 2 && (frame = PyObject_IsTrue(args[1])) < 0) ||
	    (nargs == 3 && (udp = PyObject_IsTrue(args[2])) < 0))
		return NULL;
	sink.no_udp = !udp;
	packets = list_of_packets(args[0]);
	if (packets && (sink.list = PyList_New(0)) && merge_into(&sink, packets, frame) < 0)
		Py_CLEAR(sink.list);
	Py_XDECREF(packets);
	return sink.list;
}

/* write_merged(fd, packets, frame, header, udp): see native.py. */
static PyObject *speedups_write_merged(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct sink sink = {0};
	PyObject *packets;
	long fd, header;
	int frame, udp = 1;

	(void)module;
	if (nargs < 3 || nargs > 5)
		return PyErr_Format(PyExc_TypeError, "write_merged takes 3 to 5 arguments, not %zd",
				    nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (frame = PyObject_IsTrue(args[2])) < 0 ||
	    (header = header_size(args, nargs, 3)) < 0 ||
	    (nargs == 5 && (udp = PyObject_IsTrue(args[4])) < 0) ||
	    !(packets = list_of_packets(args[1])))
		return NULL;
	sink.fd = (int)fd;
	sink.no_udp = !udp;
	sink.header = (size_t)header;
	merge_into(&sink, packets, frame);
	Py_DECREF(packets);
	return PyLong_FromUnsignedLong(sink.written);
}

/* === Checksum ================================================================================= */

/* Fold an int of any size to a sum. Return 0, or -1 with an exception. PyNumber_Index gives a plain
 * int: a subclass may override the arithmetic. */
static int initial_sum(PyObject *argument, unsigned *sum)
{
	PyObject *initial = PyNumber_Index(argument), *modulus, *rest = NULL;
	long long value;
	int overflow;

	if (!initial)
		return -1;
	value = PyLong_AsLongLongAndOverflow(initial, &overflow);
	if (overflow < 0 || (overflow == 0 && value < 0)) {
		PyErr_SetString(PyExc_ValueError, "initial must not be negative");
	} else if (overflow == 0) {
		*sum = fold((uint64_t)value);
		Py_DECREF(initial);
		return 0;
	} else if ((modulus = PyLong_FromLong(0xffff))) {
		rest = PyNumber_Remainder(initial, modulus);
		Py_DECREF(modulus);
	}
	Py_DECREF(initial);
	if (!rest)
		return -1;
	*sum = (unsigned)PyLong_AsLong(rest);
	*sum = *sum ? *sum : 0xffff;
	Py_DECREF(rest);
	return 0;
}

/* checksum(data, initial): see gso.py. */
static PyObject *speedups_checksum(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	Py_buffer data;
	unsigned initial = 0, sum;

	(void)module;
	if (nargs < 1 || nargs > 2)
		return PyErr_Format(PyExc_TypeError, "checksum takes 1 or 2 arguments, not %zd",
				    nargs);
	if (nargs == 2 && initial_sum(args[1], &initial) < 0)
		return NULL;
	if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) < 0)
		return NULL;
	sum = fold((uint64_t)sum_of(data.buf, (size_t)data.len) + initial);
	PyBuffer_Release(&data);
	return PyLong_FromLong((long)(0xffff - sum));
}

/* === The module =============================================================================== */

static PyMethodDef methods[] = {
	{"read", (PyCFunction)(void (*)(void))speedups_read, METH_FASTCALL, NULL},
	{"read_many", (PyCFunction)(void (*)(void))speedups_read_many, METH_FASTCALL, NULL},
	{"write_many", (PyCFunction)(void (*)(void))speedups_write_many, METH_FASTCALL, NULL},
	{"read_split", (PyCFunction)(void (*)(void))speedups_read_split, METH_FASTCALL, NULL},
	{"split", (PyCFunction)(void (*)(void))speedups_split, METH_FASTCALL, NULL},
	{"merge", (PyCFunction)(void (*)(void))speedups_merge, METH_FASTCALL, NULL},
	{"write_merged", (PyCFunction)(void (*)(void))speedups_write_merged, METH_FASTCALL, NULL},
	{"checksum", (PyCFunction)(void (*)(void))speedups_checksum, METH_FASTCALL, NULL},
	{NULL, NULL, 0, NULL},
};

static int speedups_exec(PyObject *module)
{
	return PyModule_AddIntConstant(module, "READ_SIZE", READ_SIZE);
}

static PyModuleDef_Slot slots[] = {
	{Py_mod_exec, (void *)speedups_exec},
#ifdef Py_GIL_DISABLED
	{Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
	{0, NULL},
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "aiotun._packets._speedups",
	.m_methods = methods,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__speedups(void)
{
	return PyModuleDef_Init(&definition);
}
