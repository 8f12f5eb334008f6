/* The client of benchmarks/netstack: what it asks is in netstack/programs/_contract.py. And a server
 * that serves the same.
 *
 *   netclient serve                                   prints "ready serve", and runs until it is killed
 *   netclient up ADDRESS STREAMS MILLISECONDS         prints bytes, nanoseconds
 *   netclient down ADDRESS STREAMS MILLISECONDS       prints bytes, nanoseconds
 *   netclient connections ADDRESS TASKS MILLISECONDS  prints connections, nanoseconds
 *   netclient echo ADDRESS 1 COUNT                    prints the nanoseconds of each, one a line
 *
 * "up" ends when the other side has counted all bytes, and fails if the count is wrong.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SINK = 7001, SOURCE = 7002, SHORT = 7003, ECHO = 7004, BLOCK = 256 * 1024, MOST = 64 };

static const char *address;
static int64_t until; /* when to stop, in nanoseconds */
static char zeroes[BLOCK];

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void fail(const char *what)
{
	fprintf(stderr, "netclient: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int connected(int kind, int port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	struct timeval patience = {.tv_sec = 20};
	int fd = socket(AF_INET, kind, 0);

	if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1)
		fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
		fail("connect");
	return fd;
}

static void *up(void *argument)
{
	uint64_t sent = 0, counted;
	int fd = connected(SOCK_STREAM, SINK);

	(void)argument;
	do { /* once at least, however long connecting took */
		ssize_t n = send(fd, zeroes, BLOCK, MSG_NOSIGNAL);

		if (n < 0)
			fail("send");
		sent += (uint64_t)n;
	} while (now() < until);
	shutdown(fd, SHUT_WR);
	if (recv(fd, &counted, sizeof counted, MSG_WAITALL) != sizeof counted)
		fail("recv the count");
	if (be64toh(counted) != sent) {
		fprintf(stderr, "netclient: sent %lu bytes, and %lu arrived\n", (unsigned long)sent,
			(unsigned long)be64toh(counted));
		exit(1);
	}
	close(fd);
	return (void *)(uintptr_t)sent;
}

static void *down(void *argument)
{
	uint64_t got = 0;
	int fd = connected(SOCK_STREAM, SOURCE);

	(void)argument;
	do {
		/* With MSG_TRUNC, TCP drops the bytes instead of copying them. */
		ssize_t n = recv(fd, zeroes, BLOCK, MSG_TRUNC);

		if (n <= 0)
			fail("recv");
		got += (uint64_t)n;
	} while (now() < until);
	close(fd); /* with data unread: a reset */
	return (void *)(uintptr_t)got;
}

static void *connections(void *argument)
{
	uint64_t count = 0;

	(void)argument;
	do {
		char byte = 'x';
		int fd = connected(SOCK_STREAM, SHORT);

		if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || recv(fd, &byte, 1, 0) != 1)
			fail("exchange");
		/* First by us, as most clients do. gVisor's and lwIP's hosts drop a SYN from a port whose
		 * connection they ended lately (TIME_WAIT). */
		close(fd);
		count++;
	} while (now() < until);
	return (void *)(uintptr_t)count;
}

static void *served(void *argument)
{
	int *given = argument, fd = given[0], port = given[1];
	uint64_t count = 0;
	char byte;
	ssize_t n;

	free(argument);
	if (port == SINK) {
		while ((n = recv(fd, zeroes, BLOCK, MSG_TRUNC)) > 0)
			count += (uint64_t)n;
		count = htobe64(count);
		send(fd, &count, sizeof count, MSG_NOSIGNAL);
	} else if (port == SOURCE) {
		while (send(fd, zeroes, BLOCK, MSG_NOSIGNAL) > 0)
			;
	} else if (recv(fd, &byte, 1, 0) == 1) {
		send(fd, &byte, 1, MSG_NOSIGNAL);
		while (recv(fd, &byte, 1, 0) > 0)
			;
	}
	close(fd);
	return NULL;
}

static void *listening(void *argument)
{
	int *at = argument, fd;
	pthread_t thread;

	while ((fd = accept(at[0], NULL, NULL)) >= 0) {
		int *given = malloc(2 * sizeof *given);

		given[0] = fd;
		given[1] = at[1];
		if ((errno = pthread_create(&thread, NULL, served, given)))
			fail("pthread_create");
		pthread_detach(thread);
	}
	fail("accept");
	return NULL;
}

static int bound(int kind, int port)
{
	struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(port)};
	int fd = socket(AF_INET, kind, 0), large = 4 << 20;

	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &large, sizeof large);
	if (bind(fd, (struct sockaddr *)&own, sizeof own) < 0)
		fail("bind");
	return fd;
}

static void serve(void)
{
	static int ports[][2] = {{0, SINK}, {0, SOURCE}, {0, SHORT}};
	int fd = bound(SOCK_DGRAM, ECHO);
	pthread_t thread;

	for (size_t each = 0; each < sizeof ports / sizeof *ports; each++) {
		ports[each][0] = bound(SOCK_STREAM, ports[each][1]);
		if (listen(ports[each][0], 128) < 0)
			fail("listen");
		if ((errno = pthread_create(&thread, NULL, listening, ports[each])))
			fail("pthread_create");
	}
	puts("ready serve");
	fflush(stdout);
	for (;;) {
		struct sockaddr_in from;
		socklen_t size = sizeof from;
		char data[2048];
		ssize_t n = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&from, &size);

		if (n >= 0)
			sendto(fd, data, (size_t)n, 0, (struct sockaddr *)&from, size);
	}
}

static int echo(int count)
{
	char data[64] = {0};
	int fd = connected(SOCK_DGRAM, ECHO);

	for (int round = -10; round < count; round++) {
		int64_t start = now();

		if (send(fd, data, sizeof data, 0) < 0 || recv(fd, data, sizeof data, 0) < 0)
			fail("datagram");
		if (round >= 0)
			printf("%ld\n", (long)(now() - start));
	}
	return 0;
}

int main(int argc, char **argv)
{
	pthread_t threads[MOST];
	void *(*work)(void *), *result;
	uint64_t total = 0;
	int64_t start = now();
	int number, length;

	if (argc == 2 && !strcmp(argv[1], "serve"))
		serve();
	if (argc != 5 || (number = atoi(argv[3])) < 1 || number > MOST) {
		fputs("usage: netclient serve; or netclient up|down|connections|echo ADDRESS NUMBER LENGTH\n", stderr);
		return 2;
	}
	address = argv[2];
	length = atoi(argv[4]);
	if (!strcmp(argv[1], "echo"))
		return echo(length);
	work = !strcmp(argv[1], "up") ? up : !strcmp(argv[1], "down") ? down : connections;
	until = start + length * 1000000LL;
	for (int each = 0; each < number; each++)
		if ((errno = pthread_create(&threads[each], NULL, work, NULL)))
			fail("pthread_create");
	for (int each = 0; each < number; each++) {
		pthread_join(threads[each], &result);
		total += (uint64_t)(uintptr_t)result;
	}
	printf("%lu %ld\n", (unsigned long)total, (long)(now() - start));
	return 0;
}
