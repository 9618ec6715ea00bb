"""Lloom sidecar: drives a libp2p daemon and serves large language models over a peer-to-peer network."""

__version__ = "0.1.0"
