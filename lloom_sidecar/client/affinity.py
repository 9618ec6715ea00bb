"""Which executor has a conversation's beginning in its cache: digests of what was said so far, kept on this node only.

A conversation is a chain of digests, one for each message (or 1,024 bytes of a plain prompt): each covers everything
before it. Whoever answered the chain's longest known beginning is asked again; of a conversation that is new, its
system prompt and first message decide, so that another client of the same conversation comes to the same executor.

Source: vLLM's automatic prefix caching, whose blocks are hashed the same way.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from typing import Final

import msgspec

from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call
from lloom_sidecar.peers.selection import Wanted

DIGEST_BYTES: Final = 16
BLOCK_BYTES: Final = 1024
"""Of a plain prompt. A shorter one is not worth a cache."""
MAX_LINKS: Final = 1024
MAX_HASHED_BYTES: Final = 512 * 1024
"""What comes behind is not looked at: hashing must stay far below a millisecond."""
MAX_CONVERSATIONS: Final = 10_000

_OPENERS: Final = frozenset({"system", "developer"})


class _Body(msgspec.Struct):
    messages: list[msgspec.Raw] | None = None
    prompt: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    role: str = ""


class Conversation:
    """The beginning of one request, as digests."""

    __slots__ = ("chain", "key")

    def __init__(self, chain: list[bytes], key: bytes | None) -> None:
        self.chain = chain
        """The longest beginning last."""
        self.key = key
        """Of its system prompt and first message; None when there is nothing to go by."""


def conversation_of(call: Call) -> Conversation:
    """The chain of ``call``'s body; empty when it is no conversation or cannot be read."""
    try:
        body = msgspec.json.decode(call.body, type=_Body)
        pieces, opening = _pieces(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return Conversation([], None)
    digest = hashlib.blake2b(f"{call.operation} {call.model}".encode(), digest_size=DIGEST_BYTES).digest()
    chain: list[bytes] = []
    room = MAX_HASHED_BYTES
    for piece in pieces[:MAX_LINKS]:
        room -= len(piece)
        if room < 0:
            break
        digest = hashlib.blake2b(digest + piece, digest_size=DIGEST_BYTES).digest()
        chain.append(digest)
    return Conversation(chain, chain[min(opening, len(chain)) - 1] if chain else None)


def _pieces(body: _Body) -> tuple[list[bytes], int]:
    """(what each link of the chain covers, how many of them open the conversation)."""
    if body.messages:
        pieces = [bytes(message) for message in body.messages]
        is_opener = msgspec.json.decode(pieces[0], type=_Message).role in _OPENERS
        return pieces, 2 if is_opener else 1
    prompt = bytes(body.prompt)
    whole = len(prompt) // BLOCK_BYTES
    return [prompt[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(whole)], 1


class Conversations:
    """Who answered which beginning last; the 10,000 that were used last."""

    def __init__(self, limit: int = MAX_CONVERSATIONS) -> None:
        self._limit = limit
        self._served: OrderedDict[bytes, PeerId] = OrderedDict()

    def __len__(self) -> int:
        return len(self._served)

    def prefer(self, conversation: Conversation, wanted: Wanted) -> Wanted:
        """``wanted``, with whom the conversation makes preferable."""
        if conversation.key is None:
            return wanted
        known = (self._served[digest] for digest in reversed(conversation.chain) if digest in self._served)
        return replace(wanted, affinity_key=conversation.key, warm=next(known, None))

    def answered(self, conversation: Conversation, peer: PeerId) -> None:
        """``peer`` has answered it, so it has it in its cache. A follow-up moves its conversation on."""
        if not conversation.chain:
            return
        last = conversation.chain[-1]
        self._served[last] = peer
        self._served.move_to_end(last)
        if len(self._served) > self._limit:
            self._served.popitem(last=False)
