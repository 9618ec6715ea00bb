"""The only room that talks to p2pd: its process, its control socket, its streams and topics."""
