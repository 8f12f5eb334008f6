/* flooder INTERFACE SECONDS: sends 84-byte UDP packets as fast as it can, then prints how many.
 *
 * A UDP socket is no faster than a good reader, so it would not flood the reader. A packet socket
 * gives the same packets directly to the driver. */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#ifndef SOL_PACKET
#define SOL_PACKET 263
#endif

struct packet {
	struct iphdr ip;
	struct udphdr udp;
	char data[56];
};

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static struct packet make(void)
{
	struct packet packet = {
		.ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP,
		       .tot_len = htons(sizeof packet), .saddr = inet_addr("10.77.0.1"),
		       .daddr = inet_addr("10.77.0.2")},
		.udp = {.uh_sport = htons(9), .uh_dport = htons(9),
			.uh_ulen = htons(sizeof packet - sizeof packet.ip)}, /* no checksum: allowed */
	};
	const unsigned char *byte = (const unsigned char *)&packet;
	unsigned sum = 0;
	for (size_t i = 0; i < sizeof packet.ip; i += 2)
		sum += byte[i] << 8 | byte[i + 1];
	sum = (sum & 0xffff) + (sum >> 16);
	packet.ip.check = htons(~(sum + (sum >> 16)));
	return packet;
}

int main(int argc, char **argv)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)};
	struct packet packet = make();
	int yes = 1, sock = socket(AF_PACKET, SOCK_DGRAM, 0);
	long sent = 0;
	if (argc != 3)
		return 2;
	to.sll_ifindex = if_nametoindex(argv[1]);
	if (sock < 0 || setsockopt(sock, SOL_PACKET, PACKET_QDISC_BYPASS, &yes, sizeof yes) < 0 ||
	    bind(sock, (struct sockaddr *)&to, sizeof to) < 0) {
		perror("flooder");
		return 1;
	}
	for (double end = now() + atof(argv[2]); now() < end;)
		for (int i = 0; i < 64; i++) {
			/* ENOBUFS: the ring was full, and the driver has counted the packet */
			if (send(sock, &packet, sizeof packet, 0) < 0 && errno != ENOBUFS) {
				perror("flooder: send");
				return 1;
			}
			sent++;
		}
	printf("%ld\n", sent);
	return 0;
}
