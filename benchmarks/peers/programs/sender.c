/* sender ADDRESS RATE SECONDS: sends RATE 64-byte UDP packets a second to port 9; 0 means no limit.
 *
 * Ten times a millisecond it sends the packets that are due. No program could send more evenly
 * without spinning, and this one leaves the core to others. It prints how many packets it sent, and
 * in how many nanoseconds. */
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

#define TICK 100000 /* nanoseconds */

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
	char payload[36] = {0}; /* 64 with the headers of IPv4 and UDP */
	int sock = socket(AF_INET, SOCK_DGRAM, 0);
	if (argc != 4 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		return 2;
	if (sock < 0 || connect(sock, (struct sockaddr *)&to, sizeof to) < 0) {
		perror("sender");
		return 1;
	}
	double rate = atof(argv[2]);
	int64_t start = now(), length = atof(argv[3]) * 1e9, elapsed, sent = 0;
	prctl(PR_SET_TIMERSLACK, 1000);
	while ((elapsed = now() - start) < length) {
		struct timespec tick = {.tv_nsec = TICK};
		int64_t due = rate ? rate * elapsed / 1e9 : sent + 64;
		for (; sent < due; sent++)
			if (send(sock, payload, sizeof payload, 0) < 0 && errno != ENOBUFS) {
				perror("sender: send");
				return 1;
			}
		if (rate)
			nanosleep(&tick, NULL);
	}
	printf("%" PRId64 " %" PRId64 "\n", sent, elapsed);
	return 0;
}
