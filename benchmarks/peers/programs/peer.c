/* [raw] MODE NAME...: see _contract.py. "raw" is super-packets with a virtio-net header. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUDGET 128 /* packets in one direction before the other direction gets its turn */

static unsigned char packet[65581];

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static ssize_t must(ssize_t result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static int open_tun(const char *name, int raw, int nonblocking)
{
	struct ifreq ifr = {.ifr_flags = IFF_TUN | IFF_NO_PI | (raw ? IFF_VNET_HDR : 0)};
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | (nonblocking ? O_NONBLOCK : 0));
	must(fd, "peer: /dev/net/tun");
	strncpy(ifr.ifr_name, name, IFNAMSIZ - 1);
	must(ioctl(fd, TUNSETIFF, &ifr), "peer: TUNSETIFF");
	if (raw)
		must(ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN),
		     "peer: TUNSETOFFLOAD");
	return fd;
}

static void set_address(int sock, struct ifreq *ifr, unsigned long request, const char *text)
{
	struct sockaddr_in *address = (struct sockaddr_in *)&ifr->ifr_addr;
	memset(address, 0, sizeof *address);
	address->sin_family = AF_INET;
	inet_pton(AF_INET, text, &address->sin_addr);
	must(ioctl(sock, request, ifr), "peer: setting the address");
}

static void open_often(const char *name, int count)
{
	int64_t opening = 0, closing = 0;
	for (int i = 0; i < count; i++) {
		struct ifreq ifr = {0};
		int64_t start = now(), between;
		int fd = open_tun(name, 0, 0), sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		must(sock, "peer: socket");
		strncpy(ifr.ifr_name, name, IFNAMSIZ - 1);
		set_address(sock, &ifr, SIOCSIFADDR, "10.79.0.1");
		set_address(sock, &ifr, SIOCSIFNETMASK, "255.255.255.0");
		ifr.ifr_mtu = 1400;
		must(ioctl(sock, SIOCSIFMTU, &ifr), "peer: MTU");
		ifr.ifr_flags = IFF_UP | IFF_RUNNING;
		must(ioctl(sock, SIOCSIFFLAGS, &ifr), "peer: up");
		close(sock);
		between = now();
		close(fd);
		opening += between - start;
		closing += now() - between;
	}
	printf("%" PRId64 " %" PRId64 "\n", opening / count, closing / count);
}

/* Turn an echo request into its reply; return 0 if it is not one. */
static int answer(ssize_t length)
{
	size_t header = (packet[0] & 15) * 4;
	unsigned char *icmp = packet + header, source[4];
	uint32_t sum;
	if (length < (ssize_t)header + 8 || packet[0] >> 4 != 4 || packet[9] != IPPROTO_ICMP ||
	    icmp[0] != 8)
		return 0;
	memcpy(source, packet + 12, 4);
	memcpy(packet + 12, packet + 16, 4);
	memcpy(packet + 16, source, 4);
	icmp[0] = 0; /* from 8 to 0: the checksum grows by 0x0800 */
	sum = (icmp[2] << 8 | icmp[3]) + 0x0800;
	sum = (sum & 0xffff) + (sum >> 16);
	icmp[2] = sum >> 8;
	icmp[3] = sum;
	return 1;
}

static void pass(int from, int to)
{
	for (int i = 0; i < BUDGET; i++) {
		ssize_t length = read(from, packet, sizeof packet);
		if (length < 0 && errno == EAGAIN)
			return;
		must(length, "peer: read");
		must(write(to, packet, length), "peer: write");
	}
}

static void forward(int near, int far)
{
	struct pollfd fds[2] = {{.fd = near, .events = POLLIN}, {.fd = far, .events = POLLIN}};
	for (;;) {
		must(poll(fds, 2, -1), "peer: poll");
		if (fds[0].revents & POLLIN)
			pass(near, far);
		if (fds[1].revents & POLLIN)
			pass(far, near);
		if ((fds[0].revents | fds[1].revents) & POLLERR)
			usleep(1000); /* the device is down until it is set up */
	}
}

static size_t from_hex(const char *text)
{
	size_t length = strlen(text) / 2;
	for (size_t i = 0; i < length; i++)
		sscanf(text + 2 * i, "%2hhx", packet + i);
	return length;
}

static void obey(const char *mode, const char *name, int fd)
{
	static char line[8192], text[8192];
	while (fgets(line, sizeof line, stdin)) {
		int count = 0, words = sscanf(line, "%d %8191s", &count, text);
		size_t length = words == 2 ? from_hex(text) : 0;
		int64_t start = now();
		if (!strcmp(mode, "open")) {
			open_often(name, count);
		} else {
			for (int i = 0; i < count; i++)
				must(length ? write(fd, packet, length) : read(fd, packet, sizeof packet), mode);
			printf("%" PRId64 "\n", now() - start);
		}
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	int raw = argc > 1 && !strcmp(argv[1], "raw"), fd = -1, far = -1;
	const char *mode = argv[1 + raw];
	char **names = argv + 2 + raw;
	if (argc < 3 + raw)
		return 2;
	int forwards = !strcmp(mode, "forward");
	if (strcmp(mode, "open"))
		fd = open_tun(names[0], raw, forwards);
	if (forwards)
		far = open_tun(names[1], raw, 1);
	printf("ready %s\n", names[0]);
	fflush(stdout);
	if (forwards)
		forward(fd, far);
	if (strcmp(mode, "echo"))
		obey(mode, names[0], fd);
	else
		for (;;) {
			ssize_t length = must(read(fd, packet, sizeof packet), "peer: read");
			if (answer(length))
				must(write(fd, packet, length), "peer: write");
		}
	return 0;
}
