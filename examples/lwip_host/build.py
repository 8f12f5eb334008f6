#!/usr/bin/env python3
"""Builds `_lwip`, the module for calling lwIP from Python. Run it once; FOLDER is optional.

Needs cffi (`pip install cffi`), a C compiler, Python's headers, and Debian's liblwip-dev.
"""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped]

HEADERS = "/usr/include/lwip"

# The parts of lwIP's headers that are used; the compiler fills in each "...".
DECLARATIONS = """
typedef int... err_t;
typedef struct { uint32_t addr; } ip4_addr_t;
typedef ... ip_addr_t;
typedef enum { PBUF_RAW, ... } pbuf_layer;
typedef enum { PBUF_RAM, ... } pbuf_type;
struct pbuf { struct pbuf *next; uint16_t tot_len; ...; };
struct tcp_pcb { ...; };
struct netif {
    void *state;
    uint8_t hwaddr_len, hwaddr[...], flags;
    char name[2];
    uint16_t mtu;
    err_t (*output)(struct netif *, struct pbuf *, const ip4_addr_t *);
    err_t (*linkoutput)(struct netif *, struct pbuf *);
    ...;
};

#define ERR_OK ...
#define ERR_MEM ...
#define ERR_IF ...
#define TCP_WRITE_FLAG_COPY ...
#define NETIF_FLAG_BROADCAST ...
#define NETIF_FLAG_ETHARP ...
#define NETIF_FLAG_LINK_UP ...

void lwip_init(void);
void sys_check_timeouts(void);
uint32_t sys_timeouts_sleeptime(void);

struct pbuf *pbuf_alloc(pbuf_layer, uint16_t, pbuf_type);
err_t pbuf_take(struct pbuf *, const void *, uint16_t);
uint16_t pbuf_copy_partial(const struct pbuf *, void *, uint16_t, uint16_t);
uint8_t pbuf_free(struct pbuf *);

struct netif *netif_add(struct netif *, const ip4_addr_t *, const ip4_addr_t *, const ip4_addr_t *,
    void *, err_t (*)(struct netif *), err_t (*)(struct pbuf *, struct netif *));
void netif_set_default(struct netif *);
void netif_set_up(struct netif *);
void netif_remove(struct netif *);
err_t etharp_output(struct netif *, struct pbuf *, const ip4_addr_t *);
err_t ethernet_input(struct pbuf *, struct netif *);

struct tcp_pcb *tcp_new(void);
err_t tcp_bind(struct tcp_pcb *, const ip_addr_t *, uint16_t);
struct tcp_pcb *tcp_listen(struct tcp_pcb *);
void tcp_arg(struct tcp_pcb *, void *);
void tcp_accept(struct tcp_pcb *, err_t (*)(void *, struct tcp_pcb *, err_t));
void tcp_recv(struct tcp_pcb *, err_t (*)(void *, struct tcp_pcb *, struct pbuf *, err_t));
void tcp_sent(struct tcp_pcb *, err_t (*)(void *, struct tcp_pcb *, uint16_t));
void tcp_err(struct tcp_pcb *, void (*)(void *, err_t));
void tcp_recved(struct tcp_pcb *, uint16_t);
uint16_t tcp_sndbuf(struct tcp_pcb *);
err_t tcp_write(struct tcp_pcb *, const void *, uint16_t, uint8_t);
err_t tcp_output(struct tcp_pcb *);
err_t tcp_close(struct tcp_pcb *);
void tcp_abort(struct tcp_pcb *);

extern "Python" err_t on_init(struct netif *);
extern "Python" err_t on_output(struct netif *, struct pbuf *);
extern "Python" err_t on_accept(void *, struct tcp_pcb *, err_t);
extern "Python" err_t on_received(void *, struct tcp_pcb *, struct pbuf *, err_t);
extern "Python" err_t on_sent(void *, struct tcp_pcb *, uint16_t);
extern "Python" void on_error(void *, err_t);
"""

SOURCE = """
#include "lwip/etharp.h"
#include "lwip/init.h"
#include "lwip/netif.h"
#include "lwip/tcp.h"
#include "lwip/timeouts.h"
#include "netif/ethernet.h"
"""


def build(folder: Path) -> None:
    """Write the module and compile it."""
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    ffi.set_source("_lwip", SOURCE)
    module = folder / f"_lwip{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "_lwip.c")
        ffi.emit_c_code(str(source))
        # Call the compiler directly: cffi's own way needs setuptools, which may not be installed.
        headers = [f"-I{HEADERS}", f"-I{sysconfig.get_path('include')}"]
        words = ["-O2", "-shared", "-fPIC", *headers, "-o", str(module), str(source), "-llwip"]
        subprocess.run(["cc", *words], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
