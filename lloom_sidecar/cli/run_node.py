"""Running a node as a process: its log, its signals, its end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

import structlog
import trio

from lloom_sidecar.config import Config
from lloom_sidecar.errors import LloomError
from lloom_sidecar.node import Node, run_node


def configure_log(config: Config) -> None:
    """Events with fields on standard error: for a person on a terminal, else JSON lines."""
    is_console = config.log_format == "console" or (config.log_format == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if is_console else structlog.processors.JSONRenderer()
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not is_console:
        processors.append(structlog.processors.dict_tracebacks)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.log_level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def run_until_signal(config: Config, *, exit_on_stdin_eof: bool = False) -> None:
    """Run the node until SIGTERM or SIGINT; a second one ends it at once.

    ``exit_on_stdin_eof``: end (without grace) when whoever started us is gone.
    Raises ConfigError, StartError, and any other LloomError that ended the node.
    """
    configure_log(config)
    try:
        trio.run(_main, config, exit_on_stdin_eof)
    except* LloomError as group:
        raise _first(group) from group
    except* KeyboardInterrupt:
        pass


def _first(group: BaseExceptionGroup[LloomError]) -> LloomError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, LloomError)
    return found


async def _main(config: Config, exit_on_stdin_eof: bool) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            if exit_on_stdin_eof:
                nursery.start_soon(_cancel_at_eof, nursery.cancel_scope)

            async def serve() -> None:
                await run_node(config, task_status=started)
                nursery.cancel_scope.cancel()

            started = _Started()
            nursery.start_soon(serve)
            count = 0
            async for _ in signals:
                count += 1
                if started.node is None or count > 1:
                    nursery.cancel_scope.cancel()
                    return
                await started.node.drain()


class _Started:
    """Takes the node when it serves; before that a signal ends the start."""

    node: Node | None = None

    def started(self, value: Node | None = None) -> None:
        self.node = value


async def _cancel_at_eof(scope: trio.CancelScope) -> None:
    token = trio.lowlevel.current_trio_token()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        try:
            token.run_sync_soon(scope.cancel)
        except trio.RunFinishedError:
            return

    # A daemon thread: a read of standard input cannot be cancelled, and must not hold up the end.
    threading.Thread(target=watch, name="stdin", daemon=True).start()
    await trio.sleep_forever()
