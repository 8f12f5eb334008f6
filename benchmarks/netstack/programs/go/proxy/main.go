// A proxy (SOCKS5 and HTTP, CONNECT only) on the kernel's network, or into a WireGuard tunnel on
// wireguard-go's own netstack.
// Usage: proxy LISTEN [ADDRESS MTU <CONFIGURATION]; the configuration is that of WireGuard's
// cross-platform interface, on stdin.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"
)

type dialer func(network, address string) (net.Conn, error)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "proxy:", err)
		os.Exit(1)
	}
}

// Returns a function that connects through the tunnel.
func tunnel(address, mtu string) dialer {
	size, err := strconv.Atoi(mtu)
	check(err)
	own, err := netip.ParseAddr(address)
	check(err)
	tun, stack, err := netstack.CreateNetTUN([]netip.Addr{own}, nil, size)
	check(err)
	wireguard := device.NewDevice(tun, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	configuration, err := io.ReadAll(os.Stdin)
	check(err)
	check(wireguard.IpcSet(string(configuration)))
	check(wireguard.Up())
	return stack.Dial
}

// Reads what a SOCKS5 client wants (RFC 1928, without authentication), after its version.
func socks(client net.Conn) (string, error) {
	buffer := make([]byte, 256)
	if _, err := io.ReadFull(client, buffer[:1]); err != nil {
		return "", err
	}
	if _, err := io.ReadFull(client, buffer[:buffer[0]]); err != nil {
		return "", err
	}
	client.Write([]byte{5, 0})
	if _, err := io.ReadFull(client, buffer[:5]); err != nil {
		return "", err
	}
	length := map[byte]int{1: 4, 3: 1 + int(buffer[4]), 4: 16}[buffer[3]]
	if buffer[1] != 1 || length == 0 {
		return "", fmt.Errorf("not a CONNECT to an address or a name")
	}
	kind, host := buffer[3], buffer[4:4+length]
	if _, err := io.ReadFull(client, buffer[5:4+length+2]); err != nil {
		return "", err
	}
	port := strconv.Itoa(int(binary.BigEndian.Uint16(buffer[4+length:])))
	if kind == 3 {
		return net.JoinHostPort(string(host[1:]), port), nil
	}
	return net.JoinHostPort(net.IP(host).String(), port), nil
}

func serve(client net.Conn, dial dialer) {
	defer client.Close()
	first, accepted, refused := make([]byte, 1), "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00", "\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00"
	if _, err := io.ReadFull(client, first); err != nil {
		return
	}
	var target string
	var err error
	if first[0] == 5 {
		target, err = socks(client)
	} else {
		accepted, refused = "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 502 Bad Gateway\r\n\r\n"
		var request *http.Request
		request, err = http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(first), client)))
		if err == nil {
			target = request.Host
		}
	}
	if err != nil {
		return
	}
	upstream, err := dial("tcp", target)
	if err != nil {
		client.Write([]byte(refused))
		return
	}
	defer upstream.Close()
	client.Write([]byte(accepted))
	go func() {
		io.Copy(upstream, client)
		if half, ok := upstream.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
	}()
	io.Copy(client, upstream)
}

func main() {
	if len(os.Args) != 2 && len(os.Args) != 4 {
		check(fmt.Errorf("usage: proxy LISTEN [ADDRESS MTU <CONFIGURATION]"))
	}
	var dial dialer = net.Dial
	if len(os.Args) == 4 {
		dial = tunnel(os.Args[2], os.Args[3])
	}
	listener, err := net.Listen("tcp", os.Args[1])
	check(err)
	fmt.Println("ready", listener.Addr())
	for {
		client, err := listener.Accept()
		check(err)
		go serve(client, dial)
	}
}
