//! tun-rs on tokio: [offload] MODE NAME...; see ../../_contract.py.

use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use tun_rs::{AsyncDevice, DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, VIRTIO_NET_HDR_LEN};

fn builder(name: &str, offload: bool) -> DeviceBuilder {
    DeviceBuilder::new().name(name).with(|b| {
        b.offload(offload);
    })
}

fn open(name: &str, offload: bool) -> io::Result<Arc<AsyncDevice>> {
    // The program that started this one configures the device.
    Ok(Arc::new(builder(name, offload).enable(false).build_async()?))
}

fn say(line: String) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
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

async fn pump(from: Arc<AsyncDevice>, to: Arc<AsyncDevice>) -> io::Result<()> {
    let mut packet = vec![0; 65536];
    loop {
        let length = from.recv(&mut packet).await?;
        if let Err(error) = to.send(&packet[..length]).await {
            eprintln!("peer: {error}"); // the device is down until it is set up
        }
    }
}

/// As in tun-rs's own benchmark: super-packets are split, and merged again.
async fn pump_offload(from: Arc<AsyncDevice>, to: Arc<AsyncDevice>) -> io::Result<()> {
    let mut original = vec![0; VIRTIO_NET_HDR_LEN + 65535];
    let mut packets = vec![BytesMut::zeroed(VIRTIO_NET_HDR_LEN + 65535); IDEAL_BATCH_SIZE];
    let mut sizes = vec![0; IDEAL_BATCH_SIZE];
    let mut table = GROTable::default();
    loop {
        for packet in packets.iter_mut() {
            packet.resize(VIRTIO_NET_HDR_LEN + 1500, 0);
        }
        let count = from
            .recv_multiple(&mut original, &mut packets, &mut sizes, VIRTIO_NET_HDR_LEN)
            .await?;
        for i in 0..count {
            packets[i].truncate(VIRTIO_NET_HDR_LEN + sizes[i]);
        }
        if let Err(error) =
            to.send_multiple(&mut table, &mut packets[..count], VIRTIO_NET_HDR_LEN).await
        {
            eprintln!("peer: {error}");
        }
    }
}

async fn order(mode: &str, name: &str, tun: Option<&AsyncDevice>, line: &str) -> io::Result<String> {
    let mut words = line.split_whitespace();
    let count: usize = words.next().unwrap_or("0").parse().map_err(io::Error::other)?;
    let text = words.next().unwrap_or("");
    let packet: Vec<u8> = (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap_or(0))
        .collect();
    let mut buffer = vec![0; 65536];
    if mode == "open" {
        let (mut opening, mut closing) = (0, 0);
        for _ in 0..count {
            let start = Instant::now();
            let tun = builder(name, false).ipv4("10.79.0.1", 24, None).mtu(1400).build_async()?;
            opening += start.elapsed().as_nanos();
            let start = Instant::now();
            drop(tun);
            closing += start.elapsed().as_nanos();
        }
        return Ok(format!("{} {}", opening / count as u128, closing / count as u128));
    }
    let tun = tun.expect("a device");
    let start = Instant::now();
    for _ in 0..count {
        if packet.is_empty() {
            tun.recv(&mut buffer).await?;
        } else {
            tun.send(&packet).await?;
        }
    }
    Ok(start.elapsed().as_nanos().to_string())
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let offload = words[0] == "offload";
    if offload {
        words.remove(0);
    }
    let (mode, names) = (words[0].as_str(), &words[1..]);
    if mode == "forward" {
        let (near, far) = (open(&names[0], offload)?, open(&names[1], offload)?);
        say(format!("ready {}", names[0]))?;
        let (a, b) = if offload {
            (
                tokio::spawn(pump_offload(near.clone(), far.clone())),
                tokio::spawn(pump_offload(far, near)),
            )
        } else {
            (tokio::spawn(pump(near.clone(), far.clone())), tokio::spawn(pump(far, near)))
        };
        a.await??;
        return b.await?;
    }
    let tun = if mode == "open" { None } else { Some(open(&names[0], false)?) };
    say(format!("ready {}", names[0]))?;
    if mode == "echo" {
        let tun = tun.expect("a device");
        let mut packet = vec![0; 65536];
        loop {
            let length = tun.recv(&mut packet).await?;
            if answer(&mut packet[..length]) {
                tun.send(&packet[..length]).await?;
            }
        }
    }
    for line in io::stdin().lock().lines() {
        say(order(mode, &names[0], tun.as_deref(), &line?).await?)?;
    }
    Ok(())
}
