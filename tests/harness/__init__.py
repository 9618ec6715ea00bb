"""What integration and system tests are written with: a network of real processes that reads like a sentence.

with Network(validators=1, executors=2, clients=1) as network:
    answer = network.client.chat("Hello")
"""

from .backend import ScriptedBackend
from .network import Network
from .node import Node

__all__ = ["Network", "Node", "ScriptedBackend"]
