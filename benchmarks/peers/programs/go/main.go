// Package main: water|wireguard MODE NAME...; see ../_contract.py.
package main

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/songgao/water"
	"golang.zx2c4.com/wireguard/tun"
)

// A packet starts after this many bytes, because wireguard-go writes its header there.
const offset = 10

// device is the interface to both libraries: packets in batches, of one packet with water.
type device interface {
	read(packets [][]byte, sizes []int) (int, error)
	write(packets [][]byte) error
	batch() int
}

type waterDevice struct{ *water.Interface }

func (d waterDevice) read(packets [][]byte, sizes []int) (int, error) {
	n, err := d.Read(packets[0][offset:])
	sizes[0] = n
	return 1, err
}

func (d waterDevice) write(packets [][]byte) error {
	for _, packet := range packets {
		if _, err := d.Write(packet[offset:]); err != nil {
			return err
		}
	}
	return nil
}

func (d waterDevice) batch() int { return 1 }

type wireguardDevice struct{ tun.Device }

func (d wireguardDevice) read(packets [][]byte, sizes []int) (int, error) {
	return d.Read(packets, sizes, offset)
}

func (d wireguardDevice) write(packets [][]byte) error {
	_, err := d.Write(packets, offset)
	return err
}

func (d wireguardDevice) batch() int { return d.BatchSize() }

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func open(library, name string) device {
	if library == "water" {
		config := water.Config{DeviceType: water.TUN}
		config.Name = name
		ifce, err := water.New(config)
		must(err)
		return waterDevice{ifce}
	}
	dev, err := tun.CreateTUN(name, 1500)
	must(err)
	go func() {
		for range dev.Events() {
		}
	}()
	return wireguardDevice{dev}
}

func buffers(count int) ([][]byte, []int) {
	packets := make([][]byte, count)
	for i := range packets {
		packets[i] = make([]byte, offset+65535)
	}
	return packets, make([]int, count)
}

func pump(from, to device) {
	packets, sizes := buffers(from.batch())
	out := make([][]byte, len(packets))
	for {
		n, err := from.read(packets, sizes)
		must(err)
		for i := 0; i < n; i++ {
			out[i] = packets[i][:offset+sizes[i]]
		}
		if err := to.write(out[:n]); err != nil {
			fmt.Fprintln(os.Stderr, "peer:", err) // the device is down until it is set up
		}
	}
}

func answer(p []byte) bool {
	header := int(p[0]&15) * 4
	if p[0]>>4 != 4 || len(p) < header+8 || p[9] != 1 || p[header] != 8 {
		return false
	}
	for i := 12; i < 16; i++ {
		p[i], p[i+4] = p[i+4], p[i]
	}
	p[header] = 0 // from 8 to 0: the checksum grows by 0x0800
	sum := (uint32(p[header+2])<<8 | uint32(p[header+3])) + 0x0800
	sum = sum&0xffff + sum>>16
	p[header+2], p[header+3] = byte(sum>>8), byte(sum)
	return true
}

func echo(d device) {
	packets, sizes := buffers(d.batch())
	for {
		n, err := d.read(packets, sizes)
		must(err)
		for i := 0; i < n; i++ {
			if packet := packets[i][:offset+sizes[i]]; answer(packet[offset:]) {
				must(d.write([][]byte{packet}))
			}
		}
	}
}

func readAll(d device, count int) time.Duration {
	packets, sizes := buffers(d.batch())
	start := time.Now()
	for count > 0 {
		n, err := d.read(packets, sizes)
		must(err)
		count -= n
	}
	return time.Since(start)
}

func writeAll(d device, packet []byte, count int) time.Duration {
	batch := make([][]byte, min(64, d.batch()))
	padded := make([][]byte, len(batch))
	for i := range padded {
		// Leave room to merge other packets into it.
		padded[i] = append(make([]byte, offset, offset+65535), packet...)
	}
	var elapsed time.Duration
	for count > 0 {
		n := min(count, len(batch))
		for i := range padded { // merging rewrites the first packet
			copy(padded[i][offset:], packet)
			batch[i] = padded[i]
		}
		start := time.Now()
		must(d.write(batch[:n]))
		elapsed += time.Since(start)
		count -= n
	}
	return elapsed
}

func main() {
	library, mode, names := os.Args[1], os.Args[2], os.Args[3:]
	var devices []device
	for _, name := range names {
		devices = append(devices, open(library, name))
	}
	fmt.Println("ready", names[0])
	switch mode {
	case "echo":
		echo(devices[0])
	case "forward":
		go pump(devices[1], devices[0])
		pump(devices[0], devices[1])
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		count, err := strconv.Atoi(words[0])
		must(err)
		if mode == "read" {
			fmt.Println(readAll(devices[0], count).Nanoseconds())
		} else {
			packet, err := hex.DecodeString(words[1])
			must(err)
			fmt.Println(writeAll(devices[0], packet, count).Nanoseconds())
		}
	}
}
