/* flooder ADDRESS SECONDS: sends 84-byte UDP packets as fast as it can, then prints how many. */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
	char payload[56] = {0};
	long sent = 0;
	int sock = socket(AF_INET, SOCK_DGRAM, 0);
	if (argc != 3 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		return 2;
	if (sock < 0 || connect(sock, (struct sockaddr *)&to, sizeof to) < 0) {
		perror("flooder");
		return 1;
	}
	for (double end = now() + atof(argv[2]); now() < end;)
		for (int i = 0; i < 64; i++) {
			if (send(sock, payload, sizeof payload, 0) < 0) {
				perror("flooder: send");
				return 1;
			}
			sent++;
		}
	printf("%ld\n", sent);
	return 0;
}
