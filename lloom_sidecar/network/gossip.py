"""Listening on a topic. The subscription's queue in p2pd holds 32 messages, so a task only drains it and does the cheap
checks at once: who is banned, how long it is, how often its author speaks. Only then is anything parsed."""

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
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stay subscribed to ``topic`` until cancelled, over every restart of p2pd. ``started`` at the first subscription.

    p2pd has verified that ``sender`` signed a message, whoever passed it on: an offence is its author's.

    Args:
        on_message: one came, believed or not.
        on_dropped: it was dropped here, with the reason (``banned``, ``size``, ``rate``).
        handle: it passed; checks the rest, quickly.
        is_banned: authors that are not listened to.
        on_offence: an author broke a limit that honest ones keep.
    """
    has_started = False
    while True:
        try:
            async with get_daemon().subscribe(topic) as subscription:
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
        task_status=task_status,
    )
