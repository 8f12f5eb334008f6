/* responder NAME ADDRESS NETMASK: opens a TUN device and answers pings on it, with blocking calls.
 *
 * It prints "ready NAME" once the device is up, like its counterpart examples/ping_responder.py. It
 * makes one read and one write for each packet, and nothing else. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

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
	must(inet_pton(AF_INET, text, &address->sin_addr) - 1, "responder: address");
	must(ioctl(sock, request, ifr), "responder: setting the address");
}

static int open_tun(const char *name, const char *address, const char *netmask)
{
	struct ifreq ifr = {.ifr_flags = IFF_TUN | IFF_NO_PI};
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	must(fd, "responder: /dev/net/tun");
	must(sock, "responder: socket");
	strncpy(ifr.ifr_name, name, IFNAMSIZ - 1);
	must(ioctl(fd, TUNSETIFF, &ifr), "responder: TUNSETIFF");
	set_address(sock, &ifr, SIOCSIFADDR, address);
	set_address(sock, &ifr, SIOCSIFNETMASK, netmask);
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	must(ioctl(sock, SIOCSIFFLAGS, &ifr), "responder: up");
	close(sock);
	return fd;
}

int main(int argc, char **argv)
{
	static unsigned char packet[65581];
	int fd;
	if (argc != 4)
		return 2;
	fd = open_tun(argv[1], argv[2], argv[3]);
	printf("ready %s\n", argv[1]);
	fflush(stdout);
	for (;;) {
		ssize_t length = read(fd, packet, sizeof packet);
		size_t header = (packet[0] & 15) * 4;
		unsigned char *icmp = packet + header;
		unsigned char source[4];
		uint32_t sum;
		must(length, "responder: read");
		if (length < (ssize_t)header + 8 || packet[0] >> 4 != 4 || packet[9] != IPPROTO_ICMP ||
		    icmp[0] != 8)
			continue;
		memcpy(source, packet + 12, 4);
		memcpy(packet + 12, packet + 16, 4);
		memcpy(packet + 16, source, 4);
		icmp[0] = 0; /* from 8 to 0: the checksum grows by 0x0800 */
		sum = (icmp[2] << 8 | icmp[3]) + 0x0800;
		sum = (sum & 0xffff) + (sum >> 16);
		icmp[2] = sum >> 8;
		icmp[3] = sum;
		must(write(fd, packet, length), "responder: write");
	}
}
