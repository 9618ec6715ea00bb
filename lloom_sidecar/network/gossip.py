"""Listening on a topic. The subscription's queue in p2pd holds 32 messages, so a task only drains it and does the cheap
checks at once: who is banned, how long it is, how often its author speaks. Only then is anything parsed.

When to subscribe matters: who does it with neighbours in the topic is grafted into the mesh at once; who did it before
it had any waits for gossipsub's next heartbeat (10 s), and what it says until then is lost.
Source: go-libp2p-pubsub, GossipSubRouter.Join; measured in docs/simulation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon, TopicMessage
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS

from .intake import Intake

MAX_MESSAGE_BYTES: Final = 16 * 1024
RESUBSCRIBE_S: Final = 0.5
NEIGHBOUR_POLL_S: Final = 0.1
FIRST_AFTER_S: Final = 1.0
"""A node that has had connections for so long, none of them in the topic, is the first one there."""
ANCHOR_AFTER_S: Final = 2.0
"""A validator subscribes after so long in any case: others wait for it."""

log = structlog.get_logger("lloom.gossip")


async def run_topic(
    topic: str,
    *,
    me: PeerId,
    get_daemon: Callable[[], Daemon],
    rates: RateLimiter[PeerId],
    on_message: Callable[[], None],
    on_dropped: Callable[[str], None],
    handle: Callable[[TopicMessage], object],
    is_banned: Callable[[PeerId], bool] = lambda peer: False,
    on_offence: Callable[[PeerId, str], None] = lambda peer, reason: None,
    is_connected: Callable[[], bool] | None = None,
    is_anchor: bool = False,
    on_neighbours: Callable[[], None] = lambda: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stay subscribed to ``topic`` until cancelled, over every restart of p2pd. ``started`` at the first subscription,
    which waits for a neighbour.

    p2pd has verified that ``sender`` signed a message, whoever passed it on: an offence is its author's.

    Args:
        on_message: one came, believed or not.
        on_dropped: it was dropped here, with the reason (``banned``, ``size``, ``rate``).
        handle: it passed; checks the rest, quickly.
        is_banned: authors that are not listened to.
        on_offence: an author broke a limit that honest ones keep.
        is_connected: this node has a connection to anybody; None = subscribe without waiting for neighbours.
        is_anchor: others look for their neighbours here (a validator).
        on_neighbours: subscribed, with neighbours that know nothing of this node yet.
    """
    has_started = False
    while True:
        try:
            has_neighbours = False
            if is_connected is not None:
                has_neighbours = await _await_neighbour(topic, get_daemon, is_connected, is_anchor)
            async with get_daemon().subscribe(topic) as subscription:
                if has_neighbours:
                    on_neighbours()
                if not has_started:
                    has_started = True
                    task_status.started()
                while True:
                    message = await subscription.receive()
                    if message.sender == me:
                        continue
                    on_message()
                    if is_banned(message.sender):
                        on_dropped("banned")
                    elif len(message.data) > MAX_MESSAGE_BYTES:
                        on_dropped("size")
                        on_offence(message.sender, "size")
                    elif not rates.take(message.sender, trio.current_time()):
                        on_dropped("rate")
                        on_offence(message.sender, "rate")
                    else:
                        handle(message)
        except DaemonError as exc:
            log.info("subscription_lost", topic=topic, code=exc.code)
            await trio.sleep(RESUBSCRIBE_S)


async def _await_neighbour(
    topic: str, get_daemon: Callable[[], Daemon], is_connected: Callable[[], bool], is_anchor: bool
) -> bool:
    """Return True as soon as a connected peer is in the topic; False when this node has to be the first one."""
    began_at = trio.current_time()
    connected_at: float | None = None
    while True:
        now = trio.current_time()
        if not is_connected():
            connected_at = None
        else:
            if await get_daemon().topic_peers(topic):
                return True
            connected_at = now if connected_at is None else connected_at
        if connected_at is not None and now - connected_at >= FIRST_AFTER_S:
            return False
        if is_anchor and now - began_at >= ANCHOR_AFTER_S:
            return False
        await trio.sleep(NEIGHBOUR_POLL_S)


async def run_gossip(
    *,
    me: PeerId,
    get_daemon: Callable[[], Daemon],
    intake: Intake,
    rates: RateLimiter[PeerId],
    on_message: Callable[[], None],
    on_dropped: Callable[[str], None],
    is_banned: Callable[[PeerId], bool] = lambda peer: False,
    on_offence: Callable[[PeerId, str], None] = lambda peer, reason: None,
    is_connected: Callable[[], bool] | None = None,
    is_anchor: bool = False,
    on_neighbours: Callable[[], None] = lambda: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen for announcements until cancelled; the arguments are those of ``run_topic``."""

    def handle(message: TopicMessage) -> None:
        # The publisher is the signer: nobody speaks for somebody else on the topic.
        intake.take(message.data, found_by="gossip", source=None, expected_signer=message.sender)

    await run_topic(
        TOPIC_EXECUTORS,
        me=me,
        get_daemon=get_daemon,
        rates=rates,
        on_message=on_message,
        on_dropped=on_dropped,
        handle=handle,
        is_banned=is_banned,
        on_offence=on_offence,
        is_connected=is_connected,
        is_anchor=is_anchor,
        on_neighbours=on_neighbours,
        task_status=task_status,
    )
