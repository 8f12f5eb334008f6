/* The C counterparts of recv, send and datagrams, and functions that fill and drain the ring.
 *
 * Built as a shared library, which the benchmark's own process calls: see recv.py. The functions
 * return counts and nanoseconds, or -errno if a system call failed. */
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define UDP_SEGMENT 103 /* linux/udp.h */
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

/* Send `count` runs of `datagrams` datagrams each, of `size` bytes, through a connected UDP socket
 * with UDP_SEGMENT; return the time. */
int64_t send_runs(int sock, int64_t size, int64_t datagrams, int64_t count)
{
	static char data[65536];
	char control[CMSG_SPACE(sizeof(uint16_t))] = {0};
	struct iovec part = {data, size * datagrams};
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof control,
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	uint16_t segment = size;
	header->cmsg_level = IPPROTO_UDP;
	header->cmsg_type = UDP_SEGMENT;
	header->cmsg_len = CMSG_LEN(sizeof segment);
	memcpy(CMSG_DATA(header), &segment, sizeof segment);
	int64_t start = now();
	for (int64_t i = 0; i < count; i++)
		if (sendmsg(sock, &message, 0) != size * datagrams)
			return errno ? -errno : -EIO;
	return now() - start;
}

/* Receive what waits in a UDP socket with UDP_GRO, and its segment sizes; return the time, and the
 * bytes in `bytes`. */
int64_t recv_runs(int sock, int64_t *bytes)
{
	static char data[65536];
	char control[64];
	int64_t start = now();
	*bytes = 0;
	for (;;) {
		struct iovec part = {data, sizeof data};
		struct msghdr message = {
			.msg_iov = &part,
			.msg_iovlen = 1,
			.msg_control = control,
			.msg_controllen = sizeof control,
		};
		ssize_t got = recvmsg(sock, &message, MSG_DONTWAIT);
		if (got < 0)
			return errno == EAGAIN ? now() - start : -errno;
		*bytes += got;
	}
}
