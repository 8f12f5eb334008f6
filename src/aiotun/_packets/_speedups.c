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
 *                        send_run           none; see native._send_run
 *   Numbers and sums     sum_of             gso.checksum, without the complement; gso._summing
 *   Headers              find_layers        gso._layers, then gso._payload_start
 *                        pseudo_sum         gso._addresses, plus protocol and length
 *   Splitting            out_of_proportion  gso._out_of_proportion
 *                        routed             gso._routed
 *                        add_up, write_segment, segment  gso._segments
 *                        finish, finished   gso._finished
 *                        examine, split_into, split  gso.split
 *                        read_split         native._read_split
 *   Merging              make_part          gso._part
 *                        alike              the comparison of `same` in gso._Run.take
 *                        verified           gso._verified
 *                        open_run, open_new, close_run   flowtable.FlowTable
 *                        make_way           gso._make_way
 *                        begin, take        gso._Run.__init__, gso._Run.take
 *                        sort_into_runs     gso._runs
 *                        put_headers, give  gso._Run.whole
 *                        merge              gso.merge
 *                        write_merged, left_over         native._write_merged
 *   Runs                 fill               runs.place
 *                        follow             runs.follows
 *                        read_run           native._read_run
 *                        write_run          native._write_run
 *   Checksum             checksum           gso.checksum
 *   The module
 *
 * What the code relies on:
 *
 * - The interpreter's lock is held throughout: no function here releases it. It guards the two
 *   objects that all calls share, `read_buffer` and `guesses`; where CPython has no lock
 *   (Py_GIL_DISABLED), each thread has its own. So no Python code may run between a read into
 *   `read_buffer` and the last use of the bytes: it could read into it, too.
 *   Only `again`, which runs signal handlers, the conversions of arguments and `all_bytes` run
 *   Python code. They must be called before a read or after a failed one.
 * - `guesses` holds only guesses. A wrong one costs a copy, never a wrong result.
 * - The stack: at most 17 KiB, nearly all of it for the pieces in `give`. Threads may have
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
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
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
#define SYN_OR_RST 0x06
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

/* As _packets.runs: what one run of datagrams has at most. And linux/udp.h, which may be older. */
#define MOST_RUN_BYTES 65487
#define MOST_RUN_DATAGRAMS 64
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

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

/* Return a reference to an item of a list that other code may change; NULL, without an exception, if
 * it has been taken out meanwhile. */
static PyObject *item_of(PyObject *list, Py_ssize_t index)
{
#ifdef Py_GIL_DISABLED
	PyObject *item = PyList_GetItemRef(list, index);
#else
	PyObject *item = Py_XNewRef(PyList_GetItem(list, index));
#endif

	if (!item)
		PyErr_Clear();
	return item;
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

/* send_run(fd, datagrams, address, largest): see native.py.
 *
 * The datagrams are copied into one piece first: the kernel takes longer for 45 pieces. */
static PyObject *speedups_send_run(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	char control[CMSG_SPACE(sizeof(uint16_t))] = {0};
	struct iovec whole = {read_buffer, 0};
	struct msghdr message = {
		.msg_iov = &whole,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof control,
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	Py_ssize_t count, size = 0;
	uint16_t segment;
	long fd, largest;

	(void)module;
	if (nargs != 4)
		return PyErr_Format(PyExc_TypeError, "send_run takes 4 arguments, not %zd", nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (largest = number(args[3], "largest", UINT16_MAX)) < 0)
		return NULL;
	if (!PyList_Check(args[1]) || (args[2] != Py_None && !PyBytes_Check(args[2])))
		return PyErr_Format(PyExc_TypeError, "send_run takes a list, and bytes or None");
	count = PyList_Size(args[1]);
	if (count < 2 || count > MOST_RUN_DATAGRAMS)
		return PyLong_FromLong(0);
	for (Py_ssize_t i = 0; i < count; i++) {
		PyObject *datagram = item_of(args[1], i);
		Py_ssize_t length = 0;

		if (datagram && PyBytes_CheckExact(datagram))
			length = PyBytes_Size(datagram);
		if (i == 0)
			size = length;
		if (length == 0 || length > largest || length > size ||
		    (length < size && i < count - 1) ||
		    whole.iov_len + (size_t)length > MOST_RUN_BYTES) {
			Py_XDECREF(datagram);
			return PyLong_FromLong(0);
		}
		memcpy(read_buffer + whole.iov_len, PyBytes_AsString(datagram), (size_t)length);
		whole.iov_len += (size_t)length;
		Py_DECREF(datagram);
	}
	if (args[2] != Py_None) {
		message.msg_name = PyBytes_AsString(args[2]);
		message.msg_namelen = (socklen_t)PyBytes_Size(args[2]);
	}
	segment = (uint16_t)size;
	header->cmsg_level = IPPROTO_UDP;
	header->cmsg_type = UDP_SEGMENT;
	header->cmsg_len = CMSG_LEN(sizeof segment);
	memcpy(CMSG_DATA(header), &segment, sizeof segment);
	if (sendmsg((int)fd, &message, 0) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromSsize_t(count);
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

#pragma GCC unroll 4
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

#pragma GCC unroll 4
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

/* Find the headers, up to the end of TCP or UDP. Return NULL, or an error text. `version` is always
 * set, and is 0 if there is no IP header; `ip` is set if there is one. */
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
	    (frame && get16(packet + ip - 2) != (l->version == 4 ? 0x0800 : 0x86dd))) {
		l->version = 0;
		return "the packet is neither IPv4 nor IPv6";
	}
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

/* Write a segment: all headers, and at most `size` bytes of the payload from `at` on. `number`
 * counts the segments from 0. */
static void write_segment(const struct whole *w, size_t at, size_t size, unsigned number,
			  uint8_t *out)
{
	const struct layers *l = &w->l;
	size_t head = l->payload, length = at + size < w->length ? size : w->length - at;
	uint8_t *ip, *transport;
	uint64_t sum;
	unsigned total;

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
}

/* Return a segment as a new bytes object, or NULL with an exception: see write_segment. */
static PyObject *segment(const struct whole *w, size_t at, size_t size, unsigned number)
{
	size_t length = at + size < w->length ? size : w->length - at;
	PyObject *made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(w->l.payload + length));

	if (made)
		write_segment(w, at, size, number, (uint8_t *)PyBytes_AsString(made));
	return made;
}

/* Write the checksum that the sender left to the network card. Return 0, or -1 with an exception. */
static int finish(uint8_t *packet, size_t length, size_t start, size_t offset)
{
	unsigned sum;

	if (start + offset + 2 > length) {
		PyErr_Format(PyExc_ValueError,
			     "the checksum at %zu is outside the packet of %zu bytes",
			     start + offset, length);
		return -1;
	}
	sum = sum_of(packet + start, length - start);
	put16(packet + start + offset, sum == 0xffff ? 0xffff : 0xffff - sum);
	return 0;
}

/* Return the packet as a new bytes object, with the checksum that the sender left to the network
 * card; or NULL with an exception. */
static PyObject *finished(const uint8_t *packet, size_t length, size_t start, size_t offset)
{
	PyObject *made = PyBytes_FromStringAndSize((const char *)packet, (Py_ssize_t)length);

	if (made && finish((uint8_t *)PyBytes_AsString(made), length, start, offset) < 0)
		Py_CLEAR(made);
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

/* The fields of a virtio-net header after the first two, in native byte order. */
enum { HDR_LEN, GSO_SIZE, CSUM_START, CSUM_OFFSET };

/* Read the header of a super-packet, and make everything ready for its segments. Return how many,
 * 0 for an ordinary packet, or -1 with ValueError if it can't be split. */
static long examine(struct whole *w, uint16_t fields[4], const uint8_t *data, size_t length,
		    int frame, size_t header)
{
	const uint8_t *packet = data + header;
	const char *wrong;
	size_t at, count;

	if (length < header) {
		PyErr_Format(PyExc_ValueError, "a super-packet begins with a header of %zu bytes",
			     header);
		return -1;
	}
	memcpy(fields, data + 2, 4 * sizeof *fields);
	length -= header;
	w->packet = packet;
	w->length = length;
	if ((data[1] & ~GSO_ECN) == GSO_NONE)
		return 0;
	wrong = find_layers(packet, length, frame, &w->l);
	if (wrong) {
		PyErr_SetString(PyExc_ValueError, wrong);
		return -1;
	}
	if (!fits(data[1] & ~GSO_ECN, &w->l)) {
		PyErr_Format(PyExc_ValueError, "gso_type %d does not match the packet's headers",
			     data[1]);
		return -1;
	}
	if (fields[GSO_SIZE] == 0) {
		PyErr_SetString(PyExc_ValueError, "gso_size must not be 0");
		return -1;
	}
	at = w->l.payload;
	count = (length - at + fields[GSO_SIZE] - 1) / fields[GSO_SIZE];
	if (at > MOST_SPLIT_HEADERS || out_of_proportion(count, at, length)) {
		PyErr_Format(PyExc_ValueError,
			     "%zu bytes would become %zu packets with headers of %zu bytes, "
			     "which is too much",
			     length, count, at);
		return -1;
	}
	w->partial = data[0] & NEEDS_CSUM && fields[CSUM_START] == w->l.transport &&
		     fields[CSUM_OFFSET] == (w->l.protocol == TCP ? 16 : 6);
	if (!w->partial && routed(packet, &w->l)) {
		PyErr_SetString(PyExc_ValueError,
				"the packet has a source route, but no partial checksum");
		return -1;
	}
	add_up(w);
	return count ? (long)count : 1;
}

/* Split a super-packet and append the packets to a list. Return 0, or -1 with an exception. With
 * ValueError, which means that the super-packet can't be split, nothing was appended. */
static int split_into(PyObject *list, const uint8_t *data, size_t length, int frame, size_t header)
{
	uint16_t fields[4];
	struct whole w = {0};
	long count = examine(&w, fields, data, length, frame, header);
	size_t at = w.l.payload;

	if (count < 0)
		return -1;
	if (count == 0)
		return append(list, data[0] & NEEDS_CSUM
					    ? finished(w.packet, w.length, fields[CSUM_START],
						       fields[CSUM_OFFSET])
					    : PyBytes_FromStringAndSize((const char *)w.packet,
									(Py_ssize_t)w.length));
	for (long number = 0; number < count; number++, at += fields[GSO_SIZE])
		if (append(list, segment(&w, at, fields[GSO_SIZE], (unsigned)number)) < 0)
			return -1;
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
	int known;  /* all headers are */
	int usable; /* the packet may be merged */
	int last;   /* no packet may follow in the same super-packet */
};

/* Fill in a part. */
static void make_part(struct part *p, const uint8_t *packet, size_t length, int frame)
{
	const uint8_t *transport;

	*p = (struct part){.packet = packet, .length = length};
	p->known = !find_layers(packet, length, frame, &p->l);
	if (!p->known || p->l.payload == length || p->l.ip > MOST_LINK ||
	    p->l.transport != p->l.ip + (p->l.version == 4 ? 20 : 40))
		return;
	transport = packet + p->l.transport;
	if (p->l.protocol == UDP) {
		p->usable = get16(transport + 4) == length - p->l.transport &&
			    get16(transport + 6) != 0;
		return;
	}
	p->usable = (transport[12] & 0xf) == 0 && (transport[13] & ~PSH) == ACK;
	p->last = (transport[13] & PSH) != 0;
}

/* Return whether the packet's checksums are valid. */
static int verified(const struct part *p)
{
	const struct layers *l = &p->l;
	/* There are no headers between the IP header and the transport header: see make_part. So one
	 * sum has the addresses of the pseudo-header, too. */
	size_t start = l->ip + (l->version == 4 ? 12 : 8), length = p->length - l->transport;

	if (l->version == 4 && sum_of(p->packet + l->ip, 20) != 0xffff)
		return 0;
	return fold((uint64_t)l->protocol + length +
		    sum_of(p->packet + start, p->length - start)) == 0xffff;
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

#define NONE (-1)
#define MOST_OPEN 128 /* runs */
#define BUCKETS 256   /* of the flow table */

/* A packet of a batch: in which run it is, and the run itself if it is the first one. A run is
 * packets of one flow, each of which continues the one before; or a packet that can't be merged.
 * Indexes are those of packets in the batch. */
struct member {
	struct part part;
	int next; /* the next packet of the same run, or NONE */
	int left; /* it was not written: see left_over */
	/* The run that begins with this packet. */
	int count;  /* of its packets; 0 if this packet is not the first one */
	int latest; /* its last packet */
	size_t head, size, length; /* of headers, of each payload but the last, of all so far */
	/* Its place in the flow table. */
	uint32_t hash;
	int other;	  /* another one in the same bucket, or NONE */
	int older, newer; /* the ones opened before and after it, or NONE */
};

/* The open runs by flow: see flowtable.py. */
struct flows {
	struct member *batch;
	struct member *recent; /* the run that was opened or taken last, or NULL: the likeliest */
	int count, oldest, newest;
	int buckets[BUCKETS]; /* set once the first run is opened */
};

/* Return a packet's addresses. */
static const uint8_t *addresses(const struct part *p)
{
	return p->packet + p->l.ip + (p->l.version == 4 ? 12 : 8);
}

/* Return whether two packets with IP headers have the same addresses. */
static int same_addresses(const struct part *a, const struct part *b)
{
	if (a->l.version != b->l.version)
		return 0;
	/* memcmp is faster with a length that the compiler knows. */
	return a->l.version == 4 ? memcmp(addresses(a), addresses(b), 8) == 0
				 : memcmp(addresses(a), addresses(b), 32) == 0;
}

/* Return whether two packets belong to the same flow. */
static int same_flow(const struct part *a, const struct part *b)
{
	return memcmp(a->packet + a->l.transport, b->packet + b->l.transport, 4) == 0 &&
	       a->l.protocol == b->l.protocol && same_addresses(a, b);
}

/* Return a hash of a packet's flow. If many flows have the same, a batch takes longer. */
static uint32_t hash_of(const struct part *p)
{
	uint64_t words[4] = {0}, hash = get32(p->packet + p->l.transport); /* the ports */

	memcpy(words, addresses(p), p->l.version == 4 ? 8 : 32);
	for (int at = 0; at < (p->l.version == 4 ? 1 : 4); at++) {
		hash = (hash ^ words[at]) * 0x9e3779b97f4a7c15u;
		hash ^= hash >> 32;
	}
	return (uint32_t)hash;
}

/* Return the open run of a packet's flow, or NULL. Set the packet's hash. */
static struct member *open_run(const struct flows *f, struct member *m)
{
	if (f->recent && same_flow(&f->recent->part, &m->part)) {
		m->hash = f->recent->hash;
		return f->recent;
	}
	m->hash = hash_of(&m->part);
	for (int at = f->count ? f->buckets[m->hash % BUCKETS] : NONE; at != NONE;
	     at = f->batch[at].other) {
		struct member *run = &f->batch[at];

		if (run->hash == m->hash && same_flow(&run->part, &m->part))
			return run;
	}
	return NULL;
}

static void close_run(struct flows *f, struct member *run)
{
	int index = (int)(run - f->batch), *link = &f->buckets[run->hash % BUCKETS];

	while (*link != index)
		link = &f->batch[*link].other;
	*link = run->other;
	*(run->older == NONE ? &f->oldest : &f->batch[run->older].newer) = run->newer;
	*(run->newer == NONE ? &f->newest : &f->batch[run->newer].older) = run->older;
	f->count--;
	if (f->recent == run)
		f->recent = NULL;
}

/* Open a run whose flow has none. `hash` must be set. */
static void open_new(struct flows *f, struct member *run)
{
	int index = (int)(run - f->batch), *bucket = &f->buckets[run->hash % BUCKETS];

	if (f->count == 0)
		memset(f->buckets, 0xff, sizeof f->buckets); /* NONE */
	if (f->count == MOST_OPEN)
		close_run(f, &f->batch[f->oldest]);
	run->other = *bucket;
	*bucket = index;
	run->older = f->newest;
	run->newer = NONE;
	*(f->newest == NONE ? &f->oldest : &f->batch[f->newest].newer) = index;
	f->newest = index;
	f->recent = run;
	f->count++;
}

/* Close the runs that must stay before a packet whose headers are not all known: see gso.py. */
static void make_way(struct flows *f, const struct part *p)
{
	size_t room = p->length - p->l.ip;
	int all = p->l.version == 0 || room < (p->l.version == 4 ? 20 : 40) || room > LONGEST;

	for (int at = f->oldest, newer; at != NONE; at = newer) {
		newer = f->batch[at].newer;
		if (all || same_addresses(&f->batch[at].part, p))
			close_run(f, &f->batch[at]);
	}
}

/* Begin a run with a packet. */
static void begin(struct member *run, int index)
{
	run->count = 1;
	run->latest = index;
	run->length = run->part.length;
	run->head = run->part.usable ? run->part.l.payload : 0;
	run->size = run->length - run->head;
}

/* Add a packet to an open run if it continues the run and its checksums are valid. Return whether. */
static int take(struct flows *f, struct member *run, int index)
{
	struct part *first = &run->part, *latest = &f->batch[run->latest].part;
	const struct part *p = &f->batch[index].part;
	const struct layers *l = &first->l;
	size_t size = p->length - p->l.payload;
	const uint8_t *ip = p->packet + l->ip, *before = latest->packet + l->ip;

	if (size > run->size || run->length + size - l->ip > LONGEST)
		return 0;
	if (l->protocol == TCP &&
	    get32(p->packet + p->l.transport + 4) !=
		    (uint32_t)(get32(first->packet + l->transport + 4) + run->length - l->payload))
		return 0;
	if (!alike(first, p))
		return 0;
	/* A packet that must not be fragmented needs no identification (RFC 6864, section 4). */
	if (l->version == 4 && !(get16(ip + 6) & 0x4000) &&
	    get16(ip + 4) != (uint16_t)(get16(before + 4) + 1))
		return 0;
	if (run->count >= (l->protocol == UDP ? MOST_DATAGRAMS : MOST_PACKETS) ||
	    out_of_proportion((size_t)run->count + 1, l->payload, run->length + size))
		return 0;
	if (!verified(p) || (run->count == 1 && !verified(first)))
		return 0;
	f->batch[run->latest].next = index;
	run->latest = index;
	run->count++;
	run->length += size;
	f->recent = run;
	if (size < run->size || p->last)
		close_run(f, run);
	return 1;
}

/* Make room for `end` packets. Return 0, or -1 with an exception. */
static int new_flows(struct flows *f, Py_ssize_t end)
{
	f->count = 0;
	f->oldest = f->newest = NONE;
	f->recent = NULL;
	f->batch = end > INT_MAX ? NULL : PyMem_Malloc((size_t)(end + 1) * sizeof *f->batch);
	if (!f->batch)
		PyErr_NoMemory();
	return f->batch ? 0 : -1;
}

/* Sort a packet whose part is made into a run: `more` packets follow. */
static void sort_packet(struct flows *f, int index, int udp, int more)
{
	struct member *m = &f->batch[index], *run;
	struct part *p = &m->part;

	m->next = NONE;
	m->count = m->left = 0;
	if (!p->known) {
		make_way(f, p);
		begin(m, index);
		return;
	}
	p->usable = p->usable && (udp || p->l.protocol == TCP);
	run = open_run(f, m);
	if (run && p->usable && take(f, run, index))
		return;
	if (run)
		close_run(f, run);
	begin(m, index);
	if (p->usable && !p->last && more)
		open_new(f, m);
}

/* Sort the first `end` packets of a list of bytes into runs, each at the place of its first packet:
 * see flowtable.py. Return a new array with all packets, or NULL with an exception. */
static struct member *sort_into_runs(PyObject *packets, Py_ssize_t end, int frame, int udp)
{
	struct flows f;

	if (new_flows(&f, end) < 0)
		return NULL;
	for (int index = 0; index < end; index++) {
		PyObject *packet = PyList_GetItem(packets, index);

		make_part(&f.batch[index].part, (const uint8_t *)PyBytes_AsString(packet),
			  (size_t)PyBytes_Size(packet), frame);
		sort_packet(&f, index, udp, index + 1 < end);
	}
	return f.batch;
}

/* Write the headers of a run's super-packet, the virtio-net header of `size` bytes first. */
static void put_headers(const struct member *batch, const struct member *run, uint8_t *header,
			size_t size)
{
	const struct layers *l = &run->part.l;
	uint8_t *packet = header + size, *transport;
	size_t length = run->length - l->transport, offset = l->protocol == TCP ? 16 : 6;
	uint16_t fields[4] = {(uint16_t)l->payload, (uint16_t)run->size, (uint16_t)l->transport,
			      (uint16_t)offset};

	memset(header, 0, size);
	memcpy(packet, run->part.packet, run->head);
	if (run->count == 1)
		return; /* the packet may have no layers */
	transport = packet + l->transport;
	header[0] = NEEDS_CSUM;
	header[1] = l->protocol == UDP ? GSO_UDP_L4 : l->version == 4 ? GSO_TCPV4 : GSO_TCPV6;
	memcpy(header + 2, fields, sizeof fields);
	seal_ip(packet, l, run->length);
	if (l->protocol == TCP)
		transport[13] |= batch[run->latest].part.packet[l->transport + 13];
	else
		put16(transport + 4, (unsigned)length);
	/* The uncomplemented sum of the pseudo-header: the kernel adds the rest. */
	put16(transport + offset, fold(pseudo_sum(packet, l, length)));
}

/* Where super-packets go: into a list, or to an fd if the list is NULL. */
struct sink {
	PyObject *list;
	PyObject *places; /* a list of the packets' indexes as they go, or NULL */
	int fd;
	size_t header; /* bytes of a virtio-net header */
};

/* Give a run to the sink: a super-packet, or its only packet with an empty header. Return 0, or -1
 * if the sink takes no more: with an exception for a list, without one for an fd. */
static int give(const struct member *batch, const struct member *run, const struct sink *sink)
{
	uint8_t headers[LONG_HEADER + MOST_HEADERS], *out;
	struct iovec parts[1 + MOST_PACKETS]; /* the headers, and every payload */
	size_t length = sink->header + run->length;
	int count = 0;
	PyObject *made;

	put_headers(batch, run, headers, sink->header);
	parts[count++] = (struct iovec){headers, sink->header + run->head};
	for (int at = (int)(run - batch); at != NONE; at = batch[at].next) {
		const struct part *p = &batch[at].part;

		parts[count++] = (struct iovec){(void *)(p->packet + run->head),
						p->length - run->head};
		if (sink->places && append(sink->places, PyLong_FromLong(at)) < 0)
			return -1;
	}
	if (!sink->list) {
		ssize_t written = writev(sink->fd, parts, count);

		return written >= 0 && (size_t)written == length ? 0 : -1;
	}
	made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
	out = made ? (uint8_t *)PyBytes_AsString(made) : NULL;
	for (int part = 0; made && part < count; part++) {
		memcpy(out, parts[part].iov_base, parts[part].iov_len);
		out += parts[part].iov_len;
	}
	return append(sink->list, made);
}

/* Replace the items of a list that are not bytes by bytes. Return how many are bytes from the
 * beginning: fewer than all with an exception. */
static Py_ssize_t all_bytes(PyObject *list)
{
	Py_ssize_t index = 0;

	for (Py_ssize_t end = PyList_Size(list); index < end; index++) {
		PyObject *item = PyList_GetItem(list, index), *made;

		if (PyBytes_CheckExact(item))
			continue;
		if (!(made = bytes_of(item)) || PyList_SetItem(list, index, made) < 0)
			break;
	}
	return index;
}

/* Give runs to the sink, in order. Return where this ended: after the last packet, or at the first
 * packet of the run that the sink did not take. */
static int give_all(const struct member *batch, int end, const struct sink *sink)
{
	int index = 0;

	while (index < end && (!batch[index].count || give(batch, &batch[index], sink) == 0))
		index++;
	return index;
}

/* Return the indexes of the packets of all runs from the one at `from` on, in order, and those from
 * `end` to `total`; as a list, or NULL with an exception. */
static PyObject *left_over(struct member *batch, int from, int end, Py_ssize_t total)
{
	PyObject *left = PyList_New(0);

	for (int index = from; left && index < end; index++) {
		struct member *m = &batch[index];

		m->left = m->left || m->count;
		if (!m->left)
			continue; /* its run began before */
		if (m->next != NONE)
			batch[m->next].left = 1;
		if (append(left, PyLong_FromLong(index)) < 0)
			Py_CLEAR(left);
	}
	for (Py_ssize_t index = end; left && index < total; index++)
		if (append(left, PyLong_FromSsize_t(index)) < 0)
			Py_CLEAR(left);
	return left;
}

/* merge(packets, frame, udp, places): see gso.py. */
static PyObject *speedups_merge(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct sink sink = {.header = HEADER};
	struct member *batch = NULL;
	PyObject *packets;
	int frame = 0, udp = 1, end;

	(void)module;
	if (nargs < 1 || nargs > 4)
		return PyErr_Format(PyExc_TypeError, "merge takes 1 to 4 arguments, not %zd", nargs);
	if ((nargs >= 2 && (frame = PyObject_IsTrue(args[1])) < 0) ||
	    (nargs >= 3 && (udp = PyObject_IsTrue(args[2])) < 0))
		return NULL;
	if (nargs == 4 && args[3] != Py_None) {
		if (!PyList_Check(args[3]))
			return PyErr_Format(PyExc_TypeError, "merge's places must be a list");
		sink.places = args[3];
	}
	/* A new list, which Python code can't change: the conversion may run some. */
	packets = PySequence_List(args[0]);
	if (packets && all_bytes(packets) == PyList_Size(packets) &&
	    (batch = sort_into_runs(packets, PyList_Size(packets), frame, udp)) &&
	    (sink.list = PyList_New(0))) {
		end = (int)PyList_Size(packets);
		if (give_all(batch, end, &sink) < end)
			Py_CLEAR(sink.list);
	}
	PyMem_Free(batch);
	Py_XDECREF(packets);
	return sink.list;
}

/* write_merged(fd, packets, frame, header, udp): see native.py. */
static PyObject *speedups_write_merged(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct sink sink = {0};
	struct member *batch = NULL;
	PyObject *packets, *left = NULL;
	Py_ssize_t count;
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
	    !(packets = PySequence_List(args[1])))
		return NULL;
	sink.fd = (int)fd;
	sink.header = (size_t)header;
	count = all_bytes(packets);
	if (PyErr_Occurred() &&
	    (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError) ||
	     PyErr_ExceptionMatches(PyExc_BufferError)))
		PyErr_Clear(); /* the object is not a packet: it is the first one left over */
	if (!PyErr_Occurred() && (batch = sort_into_runs(packets, count, frame, udp)))
		left = left_over(batch, give_all(batch, (int)count, &sink), (int)count,
				 PyList_Size(packets));
	PyMem_Free(batch);
	Py_DECREF(packets);
	return left;
}

/* === Runs =====================================================================================
 *
 * Many packets in one buffer, `stride` bytes apart: without an object for each. */

/* The room around each packet of a run, and its limits: see runs.Layout. */
struct layout {
	long before, after, align, most, limit;
};

/* A run that is being filled: `stride` is 0 before the first packet is known. */
struct filling {
	uint8_t *out;
	size_t room, count, size, last, stride;
};

/* Return the length of a packet with its padding. */
static size_t padded(size_t length, const struct layout *l)
{
	size_t up = (length + (size_t)l->align - 1) / (size_t)l->align * (size_t)l->align;

	return up < (size_t)l->most ? up : length < (size_t)l->most ? (size_t)l->most : length;
}

/* Zero the padding of packet `index`, which has `length` bytes. */
static void pad(struct filling *f, const struct layout *l, size_t index, size_t length)
{
	uint8_t *end = f->out + index * f->stride + l->before + length;

	memset(end, 0, padded(length, l) - length);
}

/* Set the run's measures. Return whether it fits into the buffer. */
static int measure(struct filling *f, const struct layout *l, size_t count, size_t size, size_t last)
{
	f->count = count;
	f->size = size;
	f->last = last;
	f->stride = (size_t)l->before + padded(size, l) + (size_t)l->after;
	return count <= (size_t)l->limit && count * f->stride <= f->room;
}

/* Put the packets of one read into the buffer. Return 1, 0 if they are too many for a run or for
 * the buffer, or -1 with ValueError if they can't be split. */
static int fill(struct filling *f, const struct layout *l, const uint8_t *data, size_t length,
		int frame, size_t header)
{
	uint16_t fields[4] = {0};
	struct whole w = {0};
	long count = 0;
	size_t at, each;

	if (header)
		count = examine(&w, fields, data, length, frame, header);
	else
		w.packet = data, w.length = length;
	if (count < 0)
		return -1;
	if (count == 0) {
		if (!measure(f, l, 1, w.length, w.length))
			return 0;
		memcpy(f->out + l->before, w.packet, w.length);
		if (header && data[0] & NEEDS_CSUM &&
		    finish(f->out + l->before, w.length, fields[CSUM_START], fields[CSUM_OFFSET]) < 0)
			return -1;
		pad(f, l, 0, w.length);
		return 1;
	}
	at = w.l.payload;
	each = count > 1 ? at + fields[GSO_SIZE] : w.length;
	if (!measure(f, l, (size_t)count, each, w.length - (size_t)(count - 1) * fields[GSO_SIZE]))
		return 0;
	for (size_t number = 0; number < f->count; number++, at += fields[GSO_SIZE]) {
		write_segment(&w, at, fields[GSO_SIZE], (unsigned)number,
			      f->out + number * f->stride + l->before);
		pad(f, l, number, number + 1 < f->count ? f->size : f->last);
	}
	return 1;
}

/* Return where a packet's addresses end, or 0 if it has none, and where they begin. */
static size_t find_addresses(const uint8_t *packet, size_t length, int frame, size_t *start)
{
	size_t ip = frame ? 14 : 0, end;
	int version = length > ip ? packet[ip] >> 4 : 0;

	if (frame && length > ip && get16(packet + 12) != (version == 4 ? 0x0800 : 0x86dd))
		return 0;
	*start = ip + (version == 4 ? 12 : 8);
	end = ip + (version == 4 ? 20 : 40);
	return (version == 4 || version == 6) && length >= end ? end : 0;
}

/* Add a packet that was read by itself, if it may follow the packets in the buffer. Return whether.
 */
static int follow(struct filling *f, const struct layout *l, const uint8_t *data, size_t length,
		  int frame, size_t header)
{
	const uint8_t *first = f->out + l->before, *packet = data + header;
	uint8_t *place = f->out + f->count * f->stride + l->before;
	uint16_t fields[4];
	size_t start = 0, end;

	if (length < header || (header && (data[1] & ~GSO_ECN) != GSO_NONE))
		return 0;
	length -= header;
	end = find_addresses(packet, length, frame, &start);
	if (!end || length > f->size || end != find_addresses(first, f->size, frame, &start) ||
	    memcmp(packet, first, frame ? 14 : 0) ||
	    packet[frame ? 14 : 0] != first[frame ? 14 : 0] ||
	    memcmp(packet + start, first + start, end - start))
		return 0;
	if (header && data[0] & NEEDS_CSUM) {
		memcpy(fields, data + 2, sizeof fields);
		if ((size_t)fields[CSUM_START] + fields[CSUM_OFFSET] + 2 > length)
			return 0; /* the next call counts it as invalid */
	}
	memcpy(place, packet, length);
	if (header && data[0] & NEEDS_CSUM)
		finish(place, length, fields[CSUM_START], fields[CSUM_OFFSET]);
	pad(f, l, f->count, length);
	f->count++;
	f->last = length;
	return 1;
}

/* Read a packet into read_buffer. Return as read(2); an empty one is ENODATA. */
static ssize_t read_some(long fd)
{
	ssize_t length = read((int)fd, read_buffer, READ_SIZE);

	if (length == 0) {
		errno = ENODATA;
		return -1;
	}
	return length;
}

/* Return the result of read_run. `rest` is NULL where there is none. */
static PyObject *result(const struct filling *f, const uint8_t *rest, ssize_t length, int drained)
{
	PyObject *kept = rest ? PyBytes_FromStringAndSize((const char *)rest, length) : NULL;

	if (rest && !kept)
		return NULL;
	if (!kept) {
		kept = Py_None;
		Py_INCREF(kept);
	}
	return Py_BuildValue("(nnnnNO)", (Py_ssize_t)f->count, (Py_ssize_t)f->size,
			     (Py_ssize_t)f->last, (Py_ssize_t)f->stride, kept,
			     drained ? Py_True : Py_False);
}

/* Read or take the first packet, put it into the buffer, and add those that may follow. Return
 * what read_run returns. */
static PyObject *run_of(struct filling *f, const struct layout *l, long fd, const Py_buffer *given,
			int frame, size_t header)
{
	const uint8_t *data = given->obj ? given->buf : (const uint8_t *)read_buffer;
	ssize_t length = given->obj ? given->len : -1;
	int fitted;

	if (given->obj && !length)
		errno = ENODATA, length = -1;
	else if (!given->obj)
		do
			length = read_some(fd);
		while (length < 0 && again());
	if (length < 0)
		return PyErr_Occurred() ? NULL : PyErr_SetFromErrno(PyExc_OSError);
	fitted = fill(f, l, data, (size_t)length, frame, header);
	if (fitted < 0)
		return NULL;
	if (!fitted) {
		*f = (struct filling){0};
		return result(f, data, length, 0);
	}
	if (header && (data[1] & ~GSO_ECN) != GSO_NONE)
		return result(f, NULL, 0, 0);
	while (f->last == f->size && f->count < (size_t)l->limit &&
	       (f->count + 1) * f->stride <= f->room) {
		length = read((int)fd, read_buffer, READ_SIZE);
		if (length < 0)
			return result(f, NULL, 0, 1); /* the next call meets any error again */
		if (!follow(f, l, (const uint8_t *)read_buffer, (size_t)length, frame, header))
			return result(f, (const uint8_t *)read_buffer, length, 0);
	}
	return result(f, NULL, 0, 0);
}

/* read_run(fd, first, buffer, layout, frame, header): see native.py. */
static PyObject *speedups_read_run(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct layout l;
	struct filling f = {0};
	Py_buffer out, given = {0};
	PyObject *made;
	long fd, header;
	int frame;

	(void)module;
	if (nargs != 6 || !PyTuple_Check(args[3]))
		return PyErr_Format(PyExc_TypeError, "read_run takes 6 arguments, the fourth a tuple");
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    !PyArg_ParseTuple(args[3], "lllll", &l.before, &l.after, &l.align, &l.most, &l.limit) ||
	    (frame = PyObject_IsTrue(args[4])) < 0 ||
	    (header = number(args[5], "a header", LONG_HEADER)) < 0)
		return NULL;
	if (l.before < 0 || l.after < 0 || l.align < 1 || l.most < 0 || l.limit < 1 ||
	    l.before > READ_SIZE || l.after > READ_SIZE || l.align > READ_SIZE ||
	    (header && header != HEADER && header != LONG_HEADER)) {
		PyErr_SetString(PyExc_ValueError, "no such layout or header");
		return NULL;
	}
	if (args[1] != Py_None && PyObject_GetBuffer(args[1], &given, PyBUF_SIMPLE) < 0)
		return NULL;
	if (PyObject_GetBuffer(args[2], &out, PyBUF_WRITABLE) < 0) {
		PyBuffer_Release(&given);
		return NULL;
	}
	f.out = out.buf;
	f.room = (size_t)out.len;
	made = run_of(&f, &l, fd, &given, frame, (size_t)header);
	PyBuffer_Release(&out);
	PyBuffer_Release(&given);
	return made;
}

#define MOST_IN_RUN 256

/* Merge and write the packets of a run; without a header, write each. Return the indexes of those
 * left over, as a list, or NULL with an exception. */
static PyObject *write_packets(const struct sink *sink, const uint8_t *packet, size_t stride,
			       const long *lengths, int count, int frame, int udp)
{
	struct flows f;
	PyObject *left;
	int done = 0;

	if (new_flows(&f, count) < 0)
		return NULL;
	if (!sink->header) {
		while (done < count && write_packet(sink->fd, (const char *)packet + done * stride,
						    (size_t)lengths[done]) == 0)
			done++;
		left = left_over(f.batch, done, done, count);
	} else {
		for (int index = 0; index < count; index++) {
			make_part(&f.batch[index].part, packet + index * stride,
				  (size_t)lengths[index], frame);
			sort_packet(&f, index, udp, index + 1 < count);
		}
		left = left_over(f.batch, give_all(f.batch, count, sink), count, count);
	}
	PyMem_Free(f.batch);
	return left;
}

/* write_run(fd, buffer, start, stride, lengths, frame, header, udp): see native.py. */
static PyObject *speedups_write_run(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	struct sink sink = {0};
	long fd, start, stride, header, count, lengths[MOST_IN_RUN];
	PyObject *left;
	Py_buffer data;
	int frame, udp = 1;

	(void)module;
	if (nargs < 7 || nargs > 8)
		return PyErr_Format(PyExc_TypeError, "write_run takes 7 or 8 arguments, not %zd",
				    nargs);
	if ((fd = number(args[0], "an fd", INT_MAX)) < 0 ||
	    (start = number(args[2], "a start", INT_MAX)) < 0 ||
	    (stride = number(args[3], "a stride", INT_MAX)) < 0 ||
	    (frame = PyObject_IsTrue(args[5])) < 0 ||
	    (header = number(args[6], "a header", LONG_HEADER)) < 0 ||
	    (nargs == 8 && (udp = PyObject_IsTrue(args[7])) < 0))
		return NULL;
	if (!PyList_Check(args[4]) || (count = (long)PyList_Size(args[4])) > MOST_IN_RUN)
		return PyErr_Format(PyExc_TypeError, "write_run takes a list of at most %d lengths",
				    MOST_IN_RUN);
	for (long index = 0; index < count; index++) {
		PyObject *length = item_of(args[4], index);

		lengths[index] = length ? number(length, "a length", READ_SIZE) : 0;
		Py_XDECREF(length);
		if (lengths[index] < 0)
			return NULL;
	}
	if (header && header != HEADER && header != LONG_HEADER)
		return PyErr_Format(PyExc_ValueError, "a header has 0, 10 or 12 bytes");
	if (PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE) < 0)
		return NULL;
	for (long index = 0; index < count; index++)
		if ((long long)start + (long long)index * stride + lengths[index] > data.len) {
			PyBuffer_Release(&data);
			return PyErr_Format(PyExc_ValueError,
					    "packet %ld does not end inside the buffer", index);
		}
	sink.fd = (int)fd;
	sink.header = (size_t)header;
	left = write_packets(&sink, (const uint8_t *)data.buf + start, (size_t)stride, lengths,
			     (int)count, frame, udp);
	PyBuffer_Release(&data);
	return left;
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

/* === Finding packets for a program ============================================================ */

/* Whether a netstack's program is asked about a packet; `_find_other` in native.py says when. */
static int is_other(const uint8_t *packet, Py_ssize_t size, int tcp)
{
	if (size < 7 || (packet[0] >> 4 == 4 && size < 10))
		return 0;
	if (packet[0] >> 4 != 4) {
		if (packet[6] != TCP)
			return 1;
		return tcp && size > 53 && packet[53] & SYN_OR_RST;
	}
	if (packet[9] != TCP)
		return 1;
	if (!tcp)
		return 0;
	if (packet[0] != 0x45 || packet[6] & 0x3f || packet[7])
		return 1;
	return size > 33 && packet[33] & SYN_OR_RST;
}

/* find_other(packets, start, header, tcp): see native.py. */
static PyObject *speedups_find_other(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
	Py_ssize_t count;
	long at, header;
	int tcp;

	(void)module;
	if (nargs != 4)
		return PyErr_Format(PyExc_TypeError, "find_other takes 4 arguments, not %zd",
				    nargs);
	if (!PyList_Check(args[0]))
		return PyErr_Format(PyExc_TypeError, "find_other takes a list");
	if ((at = number(args[1], "a start", INT_MAX)) < 0 ||
	    (header = number(args[2], "a header's size", INT_MAX)) < 0 ||
	    (tcp = PyObject_IsTrue(args[3])) < 0)
		return NULL;
	for (count = PyList_Size(args[0]); at < count; at++) {
		PyObject *packet = PyList_GetItem(args[0], at);
		Py_ssize_t size;

		if (!PyBytes_CheckExact(packet))
			break;
		size = PyBytes_Size(packet) - header;
		if (size > 0 &&
		    is_other((const uint8_t *)PyBytes_AsString(packet) + header, size, tcp))
			break;
	}
	return PyLong_FromLong(at);
}

/* === The module =============================================================================== */

static PyMethodDef methods[] = {
	{"read", (PyCFunction)(void (*)(void))speedups_read, METH_FASTCALL, NULL},
	{"read_many", (PyCFunction)(void (*)(void))speedups_read_many, METH_FASTCALL, NULL},
	{"write_many", (PyCFunction)(void (*)(void))speedups_write_many, METH_FASTCALL, NULL},
	{"send_run", (PyCFunction)(void (*)(void))speedups_send_run, METH_FASTCALL, NULL},
	{"read_split", (PyCFunction)(void (*)(void))speedups_read_split, METH_FASTCALL, NULL},
	{"split", (PyCFunction)(void (*)(void))speedups_split, METH_FASTCALL, NULL},
	{"merge", (PyCFunction)(void (*)(void))speedups_merge, METH_FASTCALL, NULL},
	{"write_merged", (PyCFunction)(void (*)(void))speedups_write_merged, METH_FASTCALL, NULL},
	{"read_run", (PyCFunction)(void (*)(void))speedups_read_run, METH_FASTCALL, NULL},
	{"write_run", (PyCFunction)(void (*)(void))speedups_write_run, METH_FASTCALL, NULL},
	{"checksum", (PyCFunction)(void (*)(void))speedups_checksum, METH_FASTCALL, NULL},
	{"find_other", (PyCFunction)(void (*)(void))speedups_find_other, METH_FASTCALL, NULL},
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
