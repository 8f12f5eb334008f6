"""The parts of `aiotun.capture`: pcap and pcapng files."""
