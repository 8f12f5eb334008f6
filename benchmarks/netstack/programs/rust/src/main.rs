//! smoltcp on a TUN device: serves the ports of ../_contract.py at one address.
//! Usage: stack TUN ADDRESS
//!
//! smoltcp has no listener: a port accepts as many connections at once as sockets listen on it.

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{wait, Device, Medium, TunTapInterface};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Address};
use std::os::fd::AsRawFd;

const SINK: u16 = 7001;
const SOURCE: u16 = 7002;
const SHORT: u16 = 7003;
const ECHO: u16 = 7004;
const LARGE: usize = 1 << 20;

struct Connection {
    handle: SocketHandle,
    port: u16,
    count: u64,
    answered: bool,
}

fn add(sockets: &mut SocketSet<'static>, port: u16, size: usize) -> Connection {
    let buffer = || tcp::SocketBuffer::new(vec![0; size]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    // Not for throughput: a request must not wait for the answer to the one before.
    socket.set_nagle_enabled(false);
    Connection { handle: sockets.add(socket), port, count: 0, answered: false }
}

fn serve(socket: &mut tcp::Socket, connection: &mut Connection, block: &[u8]) {
    if !socket.is_open() {
        (connection.count, connection.answered) = (0, false);
        socket.listen(connection.port).expect("listen");
        return;
    }
    match connection.port {
        SINK => {
            while socket.can_recv() {
                connection.count += socket.recv(|data| (data.len(), data.len())).unwrap_or(0) as u64;
            }
            if !socket.may_recv() && socket.state() == tcp::State::CloseWait {
                if !connection.answered && socket.send_slice(&connection.count.to_be_bytes()).is_ok() {
                    connection.answered = true;
                }
                socket.close();
            }
        }
        SOURCE => {
            while socket.can_send() && socket.send_slice(block).unwrap_or(0) > 0 {}
            if socket.state() == tcp::State::CloseWait {
                socket.close();
            }
        }
        _ => {
            let mut byte = [0];
            if !connection.answered && socket.can_recv() && socket.recv_slice(&mut byte) == Ok(1) {
                let _ = socket.send_slice(&byte);
                connection.answered = true;
            }
            if socket.state() == tcp::State::CloseWait {
                socket.close();
            }
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, name, address] = &arguments[..] else {
        eprintln!("usage: stack TUN ADDRESS");
        std::process::exit(1);
    };
    let address: Ipv4Address = address.parse().expect("an IPv4 address");
    let mut device = TunTapInterface::new(name, Medium::Ip).expect("open the TUN device");
    let fd = device.as_raw_fd();
    assert_eq!(device.capabilities().max_transmission_unit, 1500);
    let config = Config::new(HardwareAddress::Ip);
    let mut interface = Interface::new(config, &mut device, Instant::now());
    interface.update_ip_addrs(|all| all.push(IpCidr::new(address.into(), 24)).expect("room"));

    let mut sockets = SocketSet::new(vec![]);
    let mut connections = vec![];
    for (port, number, size) in [(SINK, 20, LARGE), (SOURCE, 20, LARGE), (SHORT, 256, 2048)] {
        for _ in 0..number {
            connections.push(add(&mut sockets, port, size));
        }
    }
    let room = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 1 << 17]);
    let echo = sockets.add(udp::Socket::new(room(), room()));
    sockets.get_mut::<udp::Socket>(echo).bind(ECHO).expect("bind");

    let block = vec![0; 1 << 18];
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        drop(sender);
    });
    println!("ready {name}");
    while receiver.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
        interface.poll(Instant::now(), &mut device, &mut sockets);
        for connection in &mut connections {
            serve(sockets.get_mut(connection.handle), connection, &block);
        }
        let socket = sockets.get_mut::<udp::Socket>(echo);
        while socket.can_send() {
            let Ok((data, from)) = socket.recv() else { break };
            let data = data.to_vec();
            let _ = socket.send_slice(&data, from);
        }
        // Send what was just written, and wait for a packet or a timer.
        interface.poll(Instant::now(), &mut device, &mut sockets);
        let delay = interface.poll_delay(Instant::now(), &sockets);
        let most = Duration::from_millis(100);
        wait(fd, Some(delay.map_or(most, |delay| delay.min(most)))).expect("wait");
    }
}
