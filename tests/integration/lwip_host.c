/* A host on lwIP and its own tapif.c: gets an address by DHCP, pings the targets one after the
 * other, and answers pings until it is killed. Usage: PRECONFIGURED_TAPIF=TAP lwip_host TARGET...
 *
 * Debian's library (2.1.3) is built without lwIP's DHCP client, so this file has a small one on
 * lwIP's UDP. Frames must be short, because tapif.c's buffers have only 590 bytes in that build.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lwip/icmp.h"
#include "lwip/inet_chksum.h"
#include "lwip/ip.h"
#include "lwip/netif.h"
#include "lwip/prot/icmp.h"
#include "lwip/raw.h"
#include "lwip/tcpip.h"
#include "lwip/timeouts.h"
#include "lwip/udp.h"
#include "netif/tapif.h"

enum { DISCOVER = 1, OFFER, REQUEST, DECLINE, ACK }; /* RFC 2132, section 9.6 */
enum { FIXED = 240, AGAIN_MS = 1000, IDENT = 0x4C57 };

static struct netif netif;
static struct udp_pcb *dhcp;
static struct raw_pcb *icmp;
static ip_addr_t target, offered, server;
static char **targets; /* not yet pinged */
static unsigned char asking = DISCOVER;
static unsigned short sequence;

static void say(const char *what, const ip_addr_t *address)
{
  printf("%s %s\n", what, ipaddr_ntoa(address));
  fflush(stdout);
}

/* A message of 300 bytes: RFC 2131, figure 1. */
static void ask(void *unused)
{
  static const unsigned char cookie[] = {99, 130, 83, 99};
  struct pbuf *p = pbuf_alloc(PBUF_TRANSPORT, 300, PBUF_RAM);
  unsigned char *m = p->payload, *option = m + FIXED;
  ip_addr_t everybody = IPADDR4_INIT(IPADDR_BROADCAST), nobody = IPADDR4_INIT(IPADDR_ANY);

  LWIP_UNUSED_ARG(unused);
  memset(m, 0, 300);
  m[0] = m[1] = 1;
  m[2] = 6;
  memcpy(m + 4, "lwip", 4);
  m[10] = 0x80; /* ask for broadcast answers: without an address lwIP accepts nothing else */
  memcpy(m + 28, netif.hwaddr, 6);
  memcpy(m + FIXED - 4, cookie, 4);
  *option++ = 53, *option++ = 1, *option++ = asking;
  if (asking == REQUEST) {
    *option++ = 50, *option++ = 4;
    memcpy(option, &ip_2_ip4(&offered)->addr, 4), option += 4;
    *option++ = 54, *option++ = 4;
    memcpy(option, &ip_2_ip4(&server)->addr, 4), option += 4;
  }
  *option = 255;
  udp_sendto_if_src(dhcp, p, &everybody, 67, &netif, &nobody);
  pbuf_free(p);
  sys_timeout(AGAIN_MS, ask, NULL);
}

static void ping(void *unused)
{
  struct pbuf *p = pbuf_alloc(PBUF_IP, sizeof(struct icmp_echo_hdr), PBUF_RAM);
  struct icmp_echo_hdr *echo = p->payload;

  LWIP_UNUSED_ARG(unused);
  memset(echo, 0, sizeof *echo);
  echo->type = ICMP_ECHO;
  echo->id = lwip_htons(IDENT);
  echo->seqno = lwip_htons(++sequence);
  echo->chksum = inet_chksum(echo, sizeof *echo);
  raw_sendto(icmp, p, &target);
  pbuf_free(p);
  sys_timeout(AGAIN_MS, ping, NULL);
}

static void next(void)
{
  if (*targets != NULL && ipaddr_aton(*targets, &target)) {
    targets++;
    ping(NULL);
  }
}

static u8_t on_icmp(void *arg, struct raw_pcb *pcb, struct pbuf *p, const ip_addr_t *from)
{
  unsigned char m[28];

  LWIP_UNUSED_ARG(arg);
  LWIP_UNUSED_ARG(pcb);
  if (pbuf_copy_partial(p, m, sizeof m, 0) == sizeof m && m[20] == ICMP_ER &&
      (m[24] << 8 | m[25]) == IDENT && (m[26] << 8 | m[27]) == sequence) {
    sys_untimeout(ping, NULL);
    say("pong", from);
    pbuf_free(p);
    next();
    return 1;
  }
  return 0; /* lwIP itself answers requests */
}

static void on_dhcp(void *arg, struct udp_pcb *pcb, struct pbuf *p, const ip_addr_t *from, u16_t port)
{
  unsigned char m[576];
  int length = pbuf_copy_partial(p, m, sizeof m, 0), type = 0, at = FIXED;
  ip4_addr_t mask, none = {0};

  LWIP_UNUSED_ARG(arg);
  LWIP_UNUSED_ARG(pcb);
  LWIP_UNUSED_ARG(port);
  pbuf_free(p);
  if (length < FIXED || memcmp(m + 4, "lwip", 4) != 0 || memcmp(m + 28, netif.hwaddr, 6) != 0)
    return;
  IP4_ADDR(&mask, 255, 255, 255, 0);
  while (at + 1 < length && m[at] != 255 && at + 2 + m[at + 1] <= length) {
    if (m[at] == 53)
      type = m[at + 2];
    if (m[at] == 1)
      memcpy(&mask.addr, m + at + 2, 4);
    at += 2 + m[at + 1];
  }
  sys_untimeout(ask, NULL);
  if (type == OFFER && asking == DISCOVER) {
    memcpy(&ip_2_ip4(&offered)->addr, m + 16, 4);
    server = *from;
    asking = REQUEST;
    ask(NULL);
  } else if (type == ACK && asking == REQUEST) {
    asking = 0;
    netif_set_addr(&netif, ip_2_ip4(&offered), &mask, &none);
    say("lease", &offered);
    next();
  } else if (asking) {
    asking = DISCOVER;
    ask(NULL);
  }
}

static void start(void *unused)
{
  ip4_addr_t address, mask, none = {0};

  LWIP_UNUSED_ARG(unused);
  /* Without any address lwIP accepts no packet, not even a broadcast, so set an unused one. */
  IP4_ADDR(&address, 169, 254, 76, 87);
  IP4_ADDR(&mask, 255, 255, 0, 0);
  netif_add(&netif, &address, &mask, &none, NULL, tapif_init, tcpip_input);
  netif_set_default(&netif);
  netif_set_link_up(&netif);
  netif_set_up(&netif);
  dhcp = udp_new();
  ip_set_option(dhcp, SOF_BROADCAST);
  udp_bind(dhcp, IP_ANY_TYPE, 68);
  udp_recv(dhcp, on_dhcp, NULL);
  icmp = raw_new(IP_PROTO_ICMP);
  raw_recv(icmp, on_icmp, NULL);
  ask(NULL);
}

int main(int argc, char **argv)
{
  if (argc < 2)
    return 2;
  targets = argv + 1;
  tcpip_init(start, NULL); /* all of the above runs in lwIP's own thread */
  for (;;)
    pause();
}
