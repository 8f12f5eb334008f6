/* forwarder MODE NETNS NEAR FAR SUBNET: forwards packets between two TUN devices, both ways.
 *
 * NEAR is in this namespace and has the address SUBNET.1, FAR is in NETNS and has SUBNET.2. MODE is
 * "off", or "raw" for super-packets with a virtio-net header. It prints "ready NEAR" once both are
 * up. It makes one read and one write for each packet, and polls if no packet
 * waits, as forward.py does. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define BUDGET 128 /* packets in one direction before the other direction gets its turn */

static void must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

static void set_address(int sock, struct ifreq *ifr, int request, const char *text)
{
	struct sockaddr_in *address = (struct sockaddr_in *)&ifr->ifr_addr;
	memset(address, 0, sizeof *address);
	address->sin_family = AF_INET;
	must(inet_pton(AF_INET, text, &address->sin_addr) - 1, "forwarder: address");
	must(ioctl(sock, request, ifr), "forwarder: setting the address");
}

static int open_tun(const char *name, const char *subnet, int host, int raw)
{
	struct ifreq ifr = {.ifr_flags = IFF_TUN | IFF_NO_PI | (raw ? IFF_VNET_HDR : 0)};
	char address[32];
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	must(fd, "forwarder: /dev/net/tun");
	must(sock, "forwarder: socket");
	strncpy(ifr.ifr_name, name, IFNAMSIZ - 1);
	must(ioctl(fd, TUNSETIFF, &ifr), "forwarder: TUNSETIFF");
	if (raw)
		must(ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN),
		     "forwarder: TUNSETOFFLOAD");
	snprintf(address, sizeof address, "%s.%d", subnet, host);
	set_address(sock, &ifr, SIOCSIFADDR, address);
	set_address(sock, &ifr, SIOCSIFNETMASK, "255.255.255.0");
	ifr.ifr_qlen = 1000;
	must(ioctl(sock, SIOCSIFTXQLEN, &ifr), "forwarder: txqueuelen");
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	must(ioctl(sock, SIOCSIFFLAGS, &ifr), "forwarder: up");
	close(sock);
	return fd;
}

static void pass(int from, int to)
{
	static unsigned char packet[65581];
	for (int i = 0; i < BUDGET; i++) {
		ssize_t length = read(from, packet, sizeof packet);
		if (length < 0 && errno == EAGAIN)
			return;
		must(length, "forwarder: read");
		must(write(to, packet, length), "forwarder: write");
	}
}

int main(int argc, char **argv)
{
	struct pollfd fds[2] = {{.events = POLLIN}, {.events = POLLIN}};
	int raw, netns;
	if (argc != 6)
		return 2;
	raw = !strcmp(argv[1], "raw");
	fds[0].fd = open_tun(argv[3], argv[5], 1, raw);
	netns = open(argv[2], O_RDONLY | O_CLOEXEC);
	must(netns, "forwarder: the namespace");
	must(setns(netns, CLONE_NEWNET), "forwarder: setns");
	fds[1].fd = open_tun(argv[4], argv[5], 2, raw);
	printf("ready %s\n", argv[3]);
	fflush(stdout);
	for (;;) {
		must(poll(fds, 2, -1), "forwarder: poll");
		if (fds[0].revents)
			pass(fds[0].fd, fds[1].fd);
		if (fds[1].revents)
			pass(fds[1].fd, fds[0].fd);
	}
}
