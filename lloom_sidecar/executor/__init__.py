"""Serving requests of other nodes from a backend beside this node."""
