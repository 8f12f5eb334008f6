//! smoltcp's `phy` alone, its interface for TUN devices, for `benchmarks.peers`.
//! Usage: phy MODE NAME...; see peers/programs/_contract.py.

use smoltcp::phy::{wait, Device, Medium, RxToken, TunTapInterface, TxToken};
use smoltcp::time::Instant;
use std::io::{self, BufRead};
use std::os::fd::AsRawFd;

fn open(name: &str) -> TunTapInterface {
    TunTapInterface::new(name, Medium::Ip).expect("open the TUN device")
}

/// Reads a packet, and gives it to a function. Returns whether there was one.
fn receive(tun: &mut TunTapInterface, take: impl FnOnce(&[u8])) -> bool {
    match tun.receive(Instant::ZERO) {
        Some((token, _)) => {
            token.consume(|packet| take(packet));
            true
        }
        None => false,
    }
}

fn send(tun: &mut TunTapInterface, packet: &[u8]) {
    let token = tun.transmit(Instant::ZERO).expect("room");
    token.consume(packet.len(), |buffer| buffer.copy_from_slice(packet));
}

fn answer(packet: &mut [u8]) -> bool {
    let header = (packet[0] & 15) as usize * 4;
    if packet[0] >> 4 != 4 || packet.len() < header + 8 || packet[9] != 1 || packet[header] != 8 {
        return false;
    }
    for i in 12..16 {
        packet.swap(i, i + 4);
    }
    packet[header] = 0; // from 8 to 0: the checksum grows by 0x0800
    let sum = u16::from_be_bytes([packet[header + 2], packet[header + 3]]) as u32 + 0x0800;
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[header + 2..header + 4].copy_from_slice(&(sum as u16).to_be_bytes());
    true
}

fn echo(tun: &mut TunTapInterface) {
    let fd = tun.as_raw_fd();
    let mut copy = vec![];
    loop {
        if !receive(tun, |packet| copy = packet.to_vec()) {
            wait(fd, None).expect("wait");
        } else if answer(&mut copy) {
            send(tun, &copy);
        }
    }
}

fn forward(near: &mut TunTapInterface, far: &mut TunTapInterface) {
    let poll = |tun: &TunTapInterface| libc::pollfd { fd: tun.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(near), poll(far)];
    loop {
        let passed = receive(near, |packet| send(far, packet)) | receive(far, |packet| send(near, packet));
        if !passed {
            unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        }
    }
}

fn obey(tun: &mut TunTapInterface, line: &str) {
    let mut words = line.split_whitespace();
    let count: usize = words.next().and_then(|word| word.parse().ok()).expect("a count");
    let text = words.next().unwrap_or("");
    let packet: Vec<u8> = (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("a packet"))
        .collect();
    let start = std::time::Instant::now();
    for _ in 0..count {
        if packet.is_empty() {
            assert!(receive(tun, |_| ()), "no packet waits");
        } else {
            send(tun, &packet);
        }
    }
    println!("{}", start.elapsed().as_nanos());
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut devices: Vec<TunTapInterface> = words[1..].iter().map(|name| open(name)).collect();
    println!("ready {}", words[1]);
    match (words[0].as_str(), &mut devices[..]) {
        ("echo", [tun]) => echo(tun),
        ("forward", [near, far]) => forward(near, far),
        (_, [tun, ..]) => io::stdin().lock().lines().for_each(|line| obey(tun, &line.expect("a line"))),
        _ => panic!("usage: phy MODE NAME..."),
    }
}
