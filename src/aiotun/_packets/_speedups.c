/* The optional C half of aiotun: the same functions as in Python, faster. `native.py` chooses.
 *
 * Built against the limited API, so that one binary serves every CPython from 3.11. What is not
 * explained here is explained beside the Python twins, in `native.py` and `gso.py`.
 */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* As _kernel.abi.READ_SIZE: the longest packet there can be, with all its headers. */
#define READ_SIZE 65581

/* What each function that reads reads into: one buffer for all, as threads may have stacks of 64 KiB
 * (threading.stack_size, and musl's are not much larger). The interpreter's lock guards it: it is
 * held from a read until the packet is copied, and no Python code runs in between. */
#ifdef Py_GIL_DISABLED
#error "this module relies on the interpreter's lock"
#endif
static char read_buffer[READ_SIZE];

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

/* What a super-packet may become: see gso.py. */
#define MOST_SPLIT_HEADERS 512 /* bytes in front of the payload */
#define MOST_GROWTH 16	       /* times its own length */

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

/* The size of a virtio-net header, which need not be given; else -1 and an exception. */
static long header_size(PyObject *const *args, Py_ssize_t nargs, Py_ssize_t place)
{
	long size = place < nargs ? number(args[place], "a header", LONG_MAX) : HEADER;

	if (size < 0 || size == HEADER || size == LONG_HEADER)
		return size;
	PyErr_Format(PyExc_ValueError, "a virtio-net header has %d or %d bytes, not %ld", HEADER,
		     LONG_HEADER, size);
	return -1;
}

/* Reading and writing packets, by a non-blocking fd.
 *
 * os.read lets other threads run meanwhile, which costs a tenth of the packet; but a read that never
 * waits takes less than a microsecond, so here nobody else runs. Likewise a write, which takes
 * little more.
 */


/* Whether to read again: a signal came, and its handler in Python raised nothing.
 *
 * A non-blocking call is never interrupted. But O_NONBLOCK belongs to the file description, which
 * another process may share and change; then a read waits here, and Ctrl-C must still get through.
 */
static int again(void)
{
	return !PyErr_Occurred() && errno == EINTR && PyErr_CheckSignals() == 0;
}

/* write(2). Sets no exception, nor tries again: Python meets the error when it writes the packet by
 * itself, and takes care of signals then. */
static int write_packet(long fd, const char *packet, size_t length)
{
	return write((int)fd, packet, length) < 0 ? -1 : 0;
}

/* How long the next long packet of an fd may be: as the last one was, as in a stream of super-packets
 * it nearly always is. Known by the fd's last bits, so that it may be another's; it is a guess. */
#define LONG_PACKET 8192
#define FORGOTTEN 16 /* short packets in a row */
static struct guess {
	size_t length;
	unsigned others;
} guesses[64];

static void learn(struct guess *guess, size_t length)
{
	if (length >= LONG_PACKET)
		*guess = (struct guess){length, 0};
	else if (guess->length && ++guess->others == FORGOTTEN)
		guess->length = 0;
}

/* Read a long packet into an object made for it, which is as long as the guess; the buffer takes what
 * is longer. What was guessed wrong is copied. As read_object. */
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

/* Read a packet. NULL is an exception, or an error of the read itself: then there is none, but errno.
 *
 * os.read makes an object of 64 KiB for each packet and shrinks it afterwards. Here a short packet is
 * read into the buffer, and an object made once its length is known. A long one would be copied that
 * way for longer than it took to read. */
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

/* read(fd, size): as os.read. */
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
				break; /* what there is goes first; the next call meets the error again */
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
		PyObject *packet = PyList_GetItem(args[1], written);

		if (!PyBytes_CheckExact(packet) ||
		    write_packet(fd, PyBytes_AsString(packet), (size_t)PyBytes_Size(packet)) < 0)
			break;
	}
	return PyLong_FromSsize_t(written);
}

/* Numbers in a packet: big-endian, and anywhere. */

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

/* Sums of 16-bit words with the end-around carry (RFC 1071). 0 comes of zeroes only. */

static unsigned fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (unsigned)sum;
}

/* Add the last bytes, fewer than four, and fold. */
static unsigned finish_sum(uint64_t sum, const uint8_t *data, size_t length)
{
	uint32_t word = 0;

	memcpy(&word, data, length);
	return ntohs((uint16_t)fold(sum + word));
}

/* Nearly all the time goes into these two loops, and AVX2 halves it where the processor has that.
 * (The sanitizers are not there yet when the loader chooses.) They add in the machine's byte order,
 * which comes out the same when folded, and each half of 32 bits by itself: a compiler makes the
 * fewest instructions of that, and none of the sums overflows within a block. */
#define BLOCK ((size_t)1 << 17) /* bytes */
#if !defined(FUZZING) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define VECTORS
#endif

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

/* The same while copying, for no more than a block: 64 KiB are too much to go through twice. */
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

/* Where the headers of a packet or frame stand. */
struct layers {
	int version, protocol;
	size_t ip, transport, payload;
};

/* Find the headers, up to TCP's or UDP's end; NULL, or what is wrong. */
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
		return "neither IPv4 nor IPv6";
	l->ip = ip;
	size = length - ip;
	if (l->version == 4) {
		size_t header = (size_t)(packet[ip] & 0xf) * 4;
		if (header < 20 || size < header || get16(packet + ip + 2) != size)
			return "an IPv4 header that does not fit the packet's length";
		if (get16(packet + ip + 6) & 0x3fff)
			return "a fragment";
		l->protocol = packet[ip + 9];
		l->transport = ip + header;
	} else {
		if (size < 40 || (size_t)get16(packet + ip + 4) + 40 != size)
			return "an IPv6 header that does not fit the packet's length";
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
		return "neither TCP nor UDP";
	l->payload = l->transport + 8;
	if (l->protocol == TCP) {
		l->payload = l->transport + 20;
		if (l->payload <= length) {
			unsigned words = packet[l->transport + 12] >> 4;
			l->payload = words >= 5 ? l->transport + words * 4 : length + 1;
		}
	}
	if (l->payload > length)
		return "a TCP or UDP header that does not fit the packet's length";
	return NULL;
}

/* The sum of the pseudo-header: protocol, length, addresses. */
static uint64_t pseudo_sum(const uint8_t *packet, const struct layers *l, size_t length)
{
	size_t start = l->version == 4 ? 12 : 8, end = l->version == 4 ? 20 : 40;

	return (uint64_t)l->protocol + length + sum_of(packet + l->ip + start, end - start);
}

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

/* Cutting up */

static int append(PyObject *list, PyObject *item)
{
	int result = item ? PyList_Append(list, item) : -1;

	Py_XDECREF(item);
	return result;
}

/* Whether packets with these headers are too much to come of one super-packet of this length. */
static int out_of_proportion(size_t count, size_t headers, size_t length)
{
	size_t total = count * headers + length - headers;

	return total > LONGEST && total > MOST_GROWTH * length;
}

/* Whether the header has another destination than the packet, and so than the pseudo-header: an IPv6
 * routing header with segments left, or an IPv4 source route. */
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
		if (packet[at] != 1) /* no operation has no length */
			size = at + 1 < l->transport && packet[at + 1] > 2 ? packet[at + 1] : 2;
	}
	return 0;
}

/* What is cut up: a packet, and the sums of what is the same in each of its segments. */
struct whole {
	const uint8_t *packet;
	size_t length;
	struct layers l;
	int partial; /* the checksum field holds the pseudo-header's sum */
	uint64_t ip_sum; /* without length, identification and checksum */
	uint64_t sum;	 /* pseudo-header and header, without lengths, sequence, flags and checksum */
};

/* What a 16-bit word adds to a sum, taken back (RFC 1624). */
static unsigned without(const uint8_t *at)
{
	return 0xffff - get16(at);
}

static void add_up(struct whole *w)
{
	const uint8_t *ip = w->packet + w->l.ip, *transport = w->packet + w->l.transport;
	size_t head = w->l.payload - w->l.transport;

	if (w->l.version == 4)
		w->ip_sum = (uint64_t)sum_of(ip, w->l.transport - w->l.ip) + without(ip + 2) +
			    without(ip + 4) + without(ip + 10);
	/* A partial sum is the sender's, who knows the final destination; it has the whole's length. */
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

/* One segment: all headers, and so much of the payload. */
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
		/* FIN and PSH belong to the last byte, CWR to the first. */
		if (at > head)
			transport[13] &= (uint8_t)~CWR;
		if (at + size < w->length)
			transport[13] &= (uint8_t) ~(FIN | PSH);
		sum += (sequence >> 16) + (sequence & 0xffff) + get16(transport + 12);
		put16(transport + 16, 0xffff - fold(sum));
	} else {
		put16(transport + 4, (unsigned)length);
		sum = fold(sum + length);
		/* 0 would mean that there is none. */
		put16(transport + 6, sum == 0xffff ? 0xffff : 0xffff - (unsigned)sum);
	}
	return made;
}

/* Finish the checksum that the sender left to the network card. */
static PyObject *finished(const uint8_t *packet, size_t length, size_t start, size_t offset)
{
	PyObject *made;
	uint8_t *out;
	unsigned sum;

	if (start + offset + 2 > length)
		return PyErr_Format(PyExc_ValueError, "a checksum at %zu in a packet of %zu bytes",
				    start + offset, length);
	made = PyBytes_FromStringAndSize((const char *)packet, (Py_ssize_t)length);
	if (!made)
		return NULL;
	out = (uint8_t *)PyBytes_AsString(made);
	sum = sum_of(out + start, length - start);
	put16(out + start + offset, sum == 0xffff ? 0xffff : 0xffff - sum);
	return made;
}

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
		PyErr_Format(PyExc_ValueError, "a gso_type of %d on another kind of packet", data[1]);
		return -1;
	}
	if (fields[1] == 0) {
		PyErr_SetString(PyExc_ValueError, "a gso_size of 0");
		return -1;
	}
	at = w.l.payload;
	count = (length - at + fields[1] - 1) / fields[1];
	if (at > MOST_SPLIT_HEADERS || out_of_proportion(count, at, length)) {
		PyErr_Format(PyExc_ValueError,
			     "%zu bytes that would become %zu packets with headers of %zu bytes",
			     length, count, at);
		return -1;
	}
	w.length = length;
	w.partial = data[0] & NEEDS_CSUM && fields[2] == w.l.transport &&
		    fields[3] == (w.l.protocol == TCP ? 16 : 6);
	if (!w.partial && routed(packet, &w.l)) {
		PyErr_SetString(PyExc_ValueError,
				"a source route, and no partial checksum for its destination");
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

/* split(super_packet, frame) */
static PyObject *speedups_split(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	Py_buffer data;
	PyObject *list;
	int frame = 0;

	(void)module;
	if (nargs < 1 || nargs > 2)
		return PyErr_Format(PyExc_TypeError, "split takes 1 or 2 arguments, not %zd", nargs);
	if (nargs == 2 && (frame = PyObject_IsTrue(args[1])) < 0)
		return NULL;
	if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) < 0)
		return NULL;
	list = PyList_New(0);
	if (list && split_into(list, data.buf, (size_t)data.len, frame, HEADER) < 0)
		Py_CLEAR(list);
	PyBuffer_Release(&data);
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

/* Putting together */

/* A packet that may be merged with the next. */
struct part {
	const uint8_t *packet;
	size_t length;
	struct layers l;
	int last; /* nothing may follow */
};

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

static int verified(const struct part *p)
{
	const struct layers *l = &p->l;
	size_t length = p->length - l->transport;

	if (l->version == 4 && sum_of(p->packet + l->ip, 20) != 0xffff)
		return 0;
	return fold(pseudo_sum(p->packet, l, length) + sum_of(p->packet + l->transport, length)) ==
	       0xffff;
}

static int same(const struct part *a, const struct part *b, size_t start, size_t end)
{
	return memcmp(a->packet + start, b->packet + start, end - start) == 0;
}

/* Whether all that has to be equal is. */
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

/* Packets of one flow, each adjoining the one before. */
struct run {
	struct part first, latest;
	int count;
	size_t head, size, length; /* of headers and one payload; of the super-packet so far */
	int open;
	struct iovec parts[1 + MOST_PACKETS]; /* the headers, and every payload */
};

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

static int take(struct run *r, const struct part *p)
{
	const struct layers *l = &r->first.l;
	size_t size = p->length - p->l.payload;
	const uint8_t *ip = p->packet + l->ip, *before = r->latest.packet + l->ip;

	if (!r->open || size > r->size || r->length + size - l->ip > LONGEST ||
	    !alike(&r->first, p))
		return 0;
	/* What may not be fragmented needs no identification (RFC 6864, section 4). */
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
		return; /* there may be no layers */
	transport = packet + l->transport;
	header[0] = NEEDS_CSUM;
	header[1] = l->protocol == UDP ? GSO_UDP_L4 : l->version == 4 ? GSO_TCPV4 : GSO_TCPV6;
	memcpy(header + 2, fields, sizeof fields);
	seal_ip(packet, l, r->length);
	if (l->protocol == TCP)
		transport[13] |= r->latest.packet[l->transport + 13];
	else
		put16(transport + 4, (unsigned)length);
	/* The uninverted sum of the pseudo-header: the kernel adds the rest. */
	put16(transport + offset, fold(pseudo_sum(packet, l, length)));
}

/* Where super-packets go: into a list, or else to an fd. */
struct sink {
	PyObject *list;
	int fd;
	int no_udp; /* datagrams are not merged */
	size_t header; /* bytes of a virtio-net header */
	unsigned long written; /* packets */
};

/* Write one in pieces; as write_packet. */
static int write_pieces(int fd, const struct run *r, size_t length)
{
	ssize_t result = writev(fd, r->parts, 1 + r->count);

	return result >= 0 && (size_t)result == length ? 0 : -1;
}

/* Give the super-packet away, or the only packet with an empty header. 0, or -1 to stop. */
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

/* Make every item of a list bytes. */
static int all_bytes(PyObject *list)
{
	for (Py_ssize_t index = 0, end = PyList_Size(list); index < end; index++) {
		PyObject *item = PyList_GetItem(list, index), *made;
		Py_buffer data;

		if (PyBytes_CheckExact(item))
			continue;
		if (PyObject_GetBuffer(item, &data, PyBUF_SIMPLE) < 0)
			return -1;
		made = PyBytes_FromStringAndSize(data.buf, data.len);
		PyBuffer_Release(&data);
		if (!made || PyList_SetItem(list, index, made) < 0)
			return -1;
	}
	return 0;
}

/* Put together what can be, in order. 0, or -1 where the sink stopped. */
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

/* The packets of any iterable as a list of bytes, which is the caller's alone. */
static PyObject *list_of_packets(PyObject *iterable)
{
	PyObject *packets = PySequence_List(iterable);

	if (packets && all_bytes(packets) < 0)
		Py_CLEAR(packets);
	return packets;
}

/* merge(packets, frame, udp) */
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

/* write_merged(fd, packets, frame, header): see native.py. */
static PyObject *speedups_write_merged(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct sink sink = {0};
	PyObject *packets;
	long fd, header;
	int frame;

	(void)module;
	if (nargs < 3 || nargs > 4)
		return PyErr_Format(PyExc_TypeError, "write_merged takes 3 or 4 arguments, not %zd",
				    nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (frame = PyObject_IsTrue(args[2])) < 0 ||
	    (header = header_size(args, nargs, 3)) < 0 || !(packets = list_of_packets(args[1])))
		return NULL;
	sink.fd = (int)fd;
	sink.header = (size_t)header;
	merge_into(&sink, packets, frame);
	Py_DECREF(packets);
	return PyLong_FromUnsignedLong(sink.written);
}

/* A sum of any size, folded. A subclass of int may compute anything: what counts is its value. */
static int initial_sum(PyObject *argument, unsigned *sum)
{
	PyObject *initial = PyNumber_Index(argument), *modulus, *rest = NULL;
	long long value;
	int overflow;

	if (!initial)
		return -1;
	value = PyLong_AsLongLongAndOverflow(initial, &overflow);
	if (overflow < 0 || (overflow == 0 && value < 0)) {
		PyErr_SetString(PyExc_ValueError, "initial is negative, which no sum is");
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

/* checksum(data, initial) */
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
