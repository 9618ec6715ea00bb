"""Listening on the executors topic. The subscription's queue in p2pd holds 32 messages, so this task only drains it and
does the cheap checks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS

from .intake import Intake

MAX_MESSAGE_BYTES: Final = 16 * 1024
RESUBSCRIBE_S: Final = 0.5

log = structlog.get_logger("lloom.gossip")


async def run_gossip(
    *,
    me: PeerId,
    get_daemon: Callable[[], Daemon],
    intake: Intake,
    rates: RateLimiter[PeerId],
    on_message: Callable[[], None],
    on_dropped: Callable[[str], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stay subscribed until cancelled, over every restart of p2pd. ``started`` at the first subscription."""
    has_started = False
    while True:
        try:
            async with get_daemon().subscribe(TOPIC_EXECUTORS) as subscription:
                if not has_started:
                    has_started = True
                    task_status.started()
                while True:
                    message = await subscription.receive()
                    if message.sender == me:
                        continue
                    on_message()
                    if len(message.data) > MAX_MESSAGE_BYTES:
                        on_dropped("size")
                    elif not rates.take(message.sender, trio.current_time()):
                        on_dropped("rate")
                    else:
                        # The publisher is the signer: nobody speaks for somebody else on the topic.
                        intake.take(
                            message.data,
                            found_by="gossip",
                            source=None,
                            expected_signer=message.sender,
                        )
        except DaemonError as exc:
            log.info("subscription_lost", code=exc.code)
            await trio.sleep(RESUBSCRIBE_S)
