"""The child program that runs the embedded LLM: llama.cpp's server, in a process of its own, on a unix socket.

``python _llama_child.py --model FILE --socket PATH --alias NAME --parallel N --ctx-per-slot N``

A process of its own, because llama.cpp's crashes, memory and threads must not become the sidecar's. The contract:

- stdout: one JSON line, ``{"ready": true, "pid": ...}`` once the model is loaded and the socket listens, or
  ``{"error": <sentence>, "kind": <missing_package | missing_library | load_failed>}`` and exit 1. Everything that
  llama.cpp prints goes to stderr.
- stdin: nothing is read from it. Its end is the order to stop: the kernel closes the parent's end however the parent
  dies, so this process never outlives it. (A parent-death signal would not do: it fires when the *thread* that started
  the child ends.)
- SIGINT and SIGTERM are ignored: Ctrl-C and service managers send them to the whole group, while the sidecar still
  lets running answers finish.

This file imports nothing of the package, so that the child starts quickly and also runs as a plain file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="_llama_child", description="Run one GGUF model on a unix socket.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--ctx-per-slot", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def keep_stdout() -> int:
    """Point stdout at stderr and return a descriptor of the real one, which only this file writes to."""
    report = os.dup(1)
    os.dup2(2, 1)
    return report


def arm_end_of_stdin_signal(armed: bool) -> None:
    """Let the kernel end this process when stdin ends, even while no Python code can run.

    llama.cpp's loading keeps the interpreter lock, for minutes with a large model, so a thread that waits for stdin
    would come too late. The signal is SIGIO, whose default action ends the process. Source: fcntl(2), F_SETOWN.
    """
    with contextlib.suppress(OSError):  # stdin is something without this feature, such as a file: then only the thread
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(0, fcntl.F_GETFL)
        fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC if armed else flags & ~os.O_ASYNC)


def watch_stdin(socket_path: str, leave: Callable[[int], Any] = os._exit) -> None:
    """Wait for the end of stdin, remove the socket, leave at once: llama.cpp's own clean-up may wait for answers."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(OSError):
        os.unlink(socket_path)
    leave(0)


def load(options: argparse.Namespace) -> Any:
    """Load the model and start its server; returns when it listens.

    Raises:
        ImportError: xllamacpp or a library that it needs is missing.
        RuntimeError: llama.cpp refused the file or the settings; it has said why on stderr.

    """
    os.environ["OMP_WAIT_POLICY"] = "passive"  # read at import: spinning threads collapse on a busy machine
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias}
    params.n_parallel = options.parallel
    params.n_ctx = options.parallel * options.ctx_per_slot
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.hostnames = [options.socket]
    params.port = 0
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.endpoint_metrics = True
    params.ui = False
    params.offline = True
    params.cors_origins = ""
    params.cache_ram_mib = 0
    params.fit_params = False
    params.sse_ping_interval = 1
    return xllamacpp.Server(params)


def report_line(descriptor: int, fields: dict[str, object]) -> None:
    """Write one JSON line to the parent."""
    with contextlib.suppress(OSError):  # a parent that has gone: stdin's end follows
        os.write(descriptor, json.dumps(fields).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Run until stdin ends."""
    options = parse_arguments(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.umask(0o177)  # the socket is for this user only
    report = keep_stdout()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(options.socket)
    arm_end_of_stdin_signal(True)
    try:
        server = load(options)
    except ImportError as exc:
        missing = "missing_package" if exc.name == "xllamacpp" else "missing_library"
        report_line(report, {"error": str(exc), "kind": missing})
        return 1
    except RuntimeError as exc:
        report_line(report, {"error": str(exc), "kind": "load_failed"})
        return 1
    threading.Thread(target=watch_stdin, args=(options.socket,), daemon=True).start()
    arm_end_of_stdin_signal(False)  # from here on the thread removes the socket first; it also sees an end before this
    report_line(report, {"ready": True, "pid": os.getpid()})
    threading.Event().wait()
    del server  # keeps it referenced until here, which is never
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
