"""Links between network namespaces, for what loopback cannot show. Needs root."""

from .lan import Host, Lan
from .nodes import add_on, address_of, backend_on, chat_on

__all__ = ["Host", "Lan", "add_on", "address_of", "backend_on", "chat_on"]
