/* echo NAME: lwIP answers pings by its own interface for TAP devices; see _contract.py.
 *
 * It answers for one address only, and for ARP: on the device tunN for 10.82.N.2. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lwip/netif.h"
#include "lwip/tcpip.h"
#include "netif/tapif.h"

int main(int argc, char **argv)
{
	static struct netif netif;
	ip4_addr_t own, mask, none = {0};
	int number;

	if (argc != 3 || strcmp(argv[1], "echo") || sscanf(argv[2], "tun%d", &number) != 1)
		return 2;
	IP4_ADDR(&own, 10, 82, number, 2);
	IP4_ADDR(&mask, 255, 255, 255, 0);
	setenv("PRECONFIGURED_TAPIF", argv[2], 1);
	tcpip_init(NULL, NULL);
	LOCK_TCPIP_CORE();
	if (!netif_add(&netif, &own, &mask, &none, NULL, tapif_init, tcpip_input))
		return 1;
	netif_set_up(&netif);
	UNLOCK_TCPIP_CORE();
	printf("ready %s\n", argv[2]);
	fflush(stdout);
	for (;;)
		pause();
}
