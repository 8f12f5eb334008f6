/* The C counterparts of recv and send, and functions that fill and drain the ring.
 *
 * Built as a shared library, which the benchmark's own process calls: see recv.py. The functions
 * return counts and nanoseconds, or -errno if a system call failed. */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAYLOAD 56 /* 84 bytes with the headers of IPv4 and UDP */

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Send `count` numbered datagrams through a connected UDP socket. */
int64_t fill(int sock, int64_t count)
{
	unsigned char payload[PAYLOAD] = {0};
	for (uint32_t i = 0; i < count; i++) {
		memcpy(payload, &i, sizeof i);
		if (send(sock, payload, sizeof payload, 0) < 0)
			return -errno;
	}
	return count;
}

/* Drop what waits in a socket; return how many datagrams that were. */
int64_t drain(int sock)
{
	char buffer[2048];
	int64_t count = 0;
	while (recv(sock, buffer, sizeof buffer, MSG_DONTWAIT) >= 0)
		count++;
	return errno == EAGAIN ? count : -errno;
}

/* Read `count` packets, which must be queued; return the time, and their bytes in `bytes`. */
int64_t read_all(int fd, int64_t count, int64_t *bytes)
{
	static char buffer[65581];
	int64_t start = now(), total = 0;
	for (int64_t i = 0; i < count; i++) {
		ssize_t got = read(fd, buffer, sizeof buffer);
		if (got < 0)
			return -errno;
		total += got;
	}
	*bytes = total;
	return now() - start;
}

/* Write the same packet `count` times; return the time. */
int64_t write_all(int fd, const char *packet, int64_t length, int64_t count)
{
	int64_t start = now();
	for (int64_t i = 0; i < count; i++)
		if (write(fd, packet, length) != length)
			return errno ? -errno : -EIO;
	return now() - start;
}
