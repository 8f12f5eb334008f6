// gVisor's netstack on a TUN device: accepts every connection and datagram, as ../../_contract.py says.
// Usage: stack TUN
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	// Its go.mod names the version of gVisor that it is known to work with.
	_ "golang.zx2c4.com/wireguard/tun/netstack"
)

const (
	nic    = 1
	mtu    = 1500
	sink   = 7001
	source = 7002
	short  = 7003
	block  = 256 << 10
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "stack:", err)
		os.Exit(1)
	}
}

func checkTCPIP(err tcpip.Error) {
	if err != nil {
		check(fmt.Errorf("%s", err))
	}
}

func openTUN(name string) int {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	check(err)
	request, err := unix.NewIfreq(name)
	check(err)
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	check(unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	return fd
}

func serve(conn net.Conn, port uint16) {
	defer conn.Close()
	buffer := make([]byte, block)
	switch port {
	case sink:
		var count uint64
		for {
			n, err := conn.Read(buffer)
			count += uint64(n)
			if err != nil {
				break
			}
		}
		conn.Write(binary.BigEndian.AppendUint64(nil, count))
	case source:
		for {
			if _, err := conn.Write(buffer); err != nil {
				return
			}
		}
	case short:
		if n, err := conn.Read(buffer[:1]); err == nil {
			conn.Write(buffer[:n])
			conn.Read(buffer)
		}
	}
}

func main() {
	if len(os.Args) != 2 {
		check(fmt.Errorf("usage: stack TUN"))
	}
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	// What programs that intercept with gVisor set: tun2socks, for example.
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	checkTCPIP(s.SetTransportProtocolOption(tcp.ProtocolNumber, &sack))
	checkTCPIP(s.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate))
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 8 << 20}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 8 << 20}
	checkTCPIP(s.SetTransportProtocolOption(tcp.ProtocolNumber, &receive))
	checkTCPIP(s.SetTransportProtocolOption(tcp.ProtocolNumber, &send))

	link, err := fdbased.New(&fdbased.Options{
		FDs:                []int{openTUN(os.Args[1])},
		MTU:                mtu,
		PacketDispatchMode: fdbased.Readv,
	})
	check(err)
	checkTCPIP(s.CreateNIC(nic, link))
	checkTCPIP(s.SetPromiscuousMode(nic, true))
	checkTCPIP(s.SetSpoofing(nic, true))
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})

	connections := tcp.NewForwarder(s, 0, 4096, func(request *tcp.ForwarderRequest) {
		var queue waiter.Queue
		endpoint, err := request.CreateEndpoint(&queue)
		if err != nil {
			request.Complete(true)
			return
		}
		port := request.ID().LocalPort
		request.Complete(false)
		go serve(gonet.NewTCPConn(&queue, endpoint), port)
	})
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, connections.HandlePacket)
	datagrams := udp.NewForwarder(s, func(request *udp.ForwarderRequest) {
		var queue waiter.Queue
		endpoint, err := request.CreateEndpoint(&queue)
		if err != nil {
			return
		}
		conn := gonet.NewUDPConn(&queue, endpoint)
		go func() {
			buffer := make([]byte, 65535)
			for {
				n, err := conn.Read(buffer)
				if err != nil {
					return
				}
				conn.Write(buffer[:n])
			}
		}()
	})
	s.SetTransportProtocolHandler(udp.ProtocolNumber, datagrams.HandlePacket)

	fmt.Println("ready", os.Args[1])
	io.Copy(io.Discard, os.Stdin)
}
