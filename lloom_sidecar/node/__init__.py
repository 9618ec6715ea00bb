"""One node: every room composed, started in order, and ended in order."""

from .node import Node, run_node

__all__ = ["Node", "run_node"]
