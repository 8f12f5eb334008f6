/* pinger ADDRESS COUNT: sends pings, each as soon as the answer to the one before arrives.
 *
 * Prints "mean p99 lost": nanoseconds, nanoseconds, packets. An answer that takes longer than a
 * second, or that is not what was sent, counts as lost. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define ICMP_FILTER 1 /* linux/icmp.h, which can't be included together with netinet's */
#define HEADER 20     /* the answers have no IP options */

struct echo {
	uint8_t type, code;
	uint16_t checksum, id, sequence;
	uint32_t number;
	char rest[52]; /* 56 bytes of data, as ping sends: 84 with the headers */
};

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static uint16_t checksum(const void *data, size_t length)
{
	const uint16_t *word = data;
	uint32_t sum = 0;
	for (size_t i = 0; i < length / 2; i++)
		sum += word[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static int compare(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

/* Wait for the answer to `sent`; return 0 if none came. */
static int answered(int sock, const struct echo *sent)
{
	char packet[HEADER + sizeof *sent];
	const struct echo *got = (const struct echo *)(packet + HEADER);
	for (;;) {
		ssize_t length = recv(sock, packet, sizeof packet, 0);
		if (length < 0) {
			if (errno == EAGAIN || errno == EINTR)
				return 0;
			perror("pinger: recv");
			exit(1);
		}
		if (length == sizeof packet && got->id == sent->id &&
		    !memcmp(&got->number, &sent->number, sizeof *sent - 8))
			return 1;
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	struct timeval timeout = {.tv_sec = 1};
	uint32_t filter = ~(1U << 0); /* nothing but echo replies */
	long count = argc == 3 ? atol(argv[2]) : 0, good = 0;
	int64_t *times = calloc(count + 1, sizeof *times), sum = 0;
	int sock = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	if (count <= 0 || !times || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		return 2;
	if (sock < 0 || setsockopt(sock, SOL_RAW, ICMP_FILTER, &filter, sizeof filter) < 0 ||
	    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0 ||
	    connect(sock, (struct sockaddr *)&to, sizeof to) < 0) {
		perror("pinger");
		return 1;
	}
	for (long i = 0; i < count; i++) {
		struct echo echo = {.type = 8, .id = htons(getpid()), .sequence = htons(i), .number = i};
		int64_t start;
		echo.checksum = checksum(&echo, sizeof echo);
		start = now();
		if (send(sock, &echo, sizeof echo, 0) < 0) {
			perror("pinger: send");
			return 1;
		}
		if (answered(sock, &echo)) {
			times[good] = now() - start;
			sum += times[good++];
		} else if (i + 1 - good >= 10)
			break; /* nobody answers: do not wait a second for each ping */
	}
	qsort(times, good, sizeof *times, compare);
	printf("%ld %ld %ld\n", good ? (long)(sum / good) : 0, (long)times[good * 99 / 100], count - good);
	return 0;
}
