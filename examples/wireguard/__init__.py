"""A WireGuard peer; see __main__.py for its use.

The protocol is sans-I/O: bytes and the time go in, bytes come out, nothing waits. Sections are
those of the paper: Jason A. Donenfeld, "WireGuard: Next Generation Kernel Network Tunnel",
https://www.wireguard.com/papers/wireguard.pdf

======================  =====================================================================
`crypto`                section 5.4: hash, MAC, KDF, AEAD, all composed of `cryptography`'s
`messages`              sections 5.4.2 to 5.4.7: the four messages' layouts
`handshake`             sections 5.4.2, 5.4.3, 5.4.5: Noise_IKpsk2, both sides of it
`cookies`               sections 5.3, 5.4.4, 5.4.7: mac1, mac2, cookies, load
`session`               section 5.4.6: data messages and the replay window
`allowedips`            section 2: cryptokey routing, by longest prefix
`peer`                  section 6: timers, and which session is used when
`interface`             all peers together: what comes in goes to the right one
`config`, `status`      wg-quick's configuration; what `wg show` shows
`service`, `control`    the device, the sockets, the clock: the only modules that wait
======================  =====================================================================
"""
