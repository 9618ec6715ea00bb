"""A node's settings: one table, read from a TOML file, the environment and flags.

``Config`` IS the table: each field carries its flag, its kind and its description. The file's keys are the field names,
the environment's are ``LLOOM_`` and the name in capitals, and a flag is named in the field. Flags win over the
environment, the environment over the file, the file over defaults. Every fault is found before one is reported.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from .errors import ConfigError
from .identity import DEFAULT_HOME, load_network_keys, resolve_home
from .ids import Multiaddr, PeerId, check_model_id
from .protocol.offers import Price

__all__ = [
    "Config",
    "DayCap",
    "HostPort",
    "SettingDoc",
    "admin_socket_path",
    "describe_settings",
    "env_name",
    "load_config",
    "parse_bootstrap",
    "read_bootstrap_file",
    "read_secret_lines",
    "resolve_home",
]

CLIENT: Final = "client"
EXECUTOR: Final = "executor"
VALIDATOR: Final = "validator"
ROLES: Final = (CLIENT, EXECUTOR, VALIDATOR)
BUILTIN_MODEL: Final = "builtin"
"""The value of ``model`` that means the embedded one."""

CONFIG_FILE_NAME: Final = "config.toml"
"""Read from the home when no other file is named."""
BOOTSTRAP_FILE_NAME: Final = "bootstrap"
"""One validator's multiaddr a line; ``lloomctl network join`` writes it."""
NETWORK_KEY_NAME: Final = "network.key"
MAX_CONFIG_BYTES: Final = 1 << 20
MIN_RATE: Final = 0.001
MAX_RATE: Final = 1e6
"""Requests a second."""
MAX_SOCKET_PATH_BYTES: Final = 107
"""Longest path of a unix socket, without its NUL. Source: unix(7), sun_path."""

_CONFIG_VARIABLE: Final = "LLOOM_CONFIG"
_OTHER_VARIABLES: Final = frozenset(
    {_CONFIG_VARIABLE, "LLOOM_CACHE", "LLOOM_NODE", "LLOOM_TOKEN_FILE", "LLOOM_P2PD_PREBUILT"}
)
"""Variables of this project that are no settings of a node."""
_SERVICE_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_\d+_(TCP|UDP|SCTP)(_|$)|$)")
"""What Kubernetes puts into a pod for every Service, also for one that is called lloom-something."""


@dataclass(frozen=True, slots=True)
class HostPort:
    """An address to listen on. ``str()`` gives HOST:PORT, an IPv6 host in brackets."""

    host: str
    """An IP address or a name, without brackets."""
    port: int
    """0 to 65535; 0 lets the system choose."""

    @classmethod
    def parse(cls, text: str) -> HostPort:
        """From ``127.0.0.1:4880``, ``[::1]:4880`` or ``localhost:4880``. Raises ValueError with a sentence."""
        found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([\w.-]+)):(\d{1,5})", text)
        if found is None or int(found[3]) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT such as 127.0.0.1:4880 or [::1]:4880")
        return cls(found[1] or found[2], int(found[3]))

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach it."""
        return self.host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", self.host) is not None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DayCap:
    """The most that is spent in a day in one currency."""

    amount: int
    """Minor units."""
    currency: str

    @classmethod
    def parse(cls, value: Any) -> DayCap:
        """From ``500 EUR``. Raises ValueError with a phrase."""
        found = re.fullmatch(r"(\d{1,15})\s+([A-Za-z0-9]{1,8})", _text(value), re.ASCII)
        if found is None:
            raise ValueError(f"{value!r} is not an amount such as 500 EUR (whole minor units, currency)")
        return cls(int(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.amount} {self.currency}"


# --- kinds of value -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one value is read. ``read`` gets text, or from the file a TOML value, and raises ValueError with a phrase."""

    name: str
    """For people: ``whole number``, ``path``, ..."""
    metavar: str
    read: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text in quotes")
    if not value or value != value.strip() or not value.isprintable():
        raise ValueError(f"{value!r} is empty, or has control characters or a space at an end")
    return value


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("1", "true", "yes", "on"):
        return True
    if isinstance(value, str) and value.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{value!r} is neither true nor false")


def _whole(least: int, most: int) -> _Kind:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return value

    return _Kind("whole number", "N", read)


def _seconds(least: float, most: float) -> _Kind:
    def read(value: Any) -> float:
        try:
            number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise ValueError(f"{value!r} is not a number of seconds from {least:g} to {most:g}")
        return number

    return _Kind("seconds", "SECONDS", read)


def _rate(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not (number == 0 or MIN_RATE <= number <= MAX_RATE):
        raise ValueError(f"{value!r} is neither 0 (no limit) nor a number from {MIN_RATE:g} to {MAX_RATE:g}")
    return number


def _one_of(*words: str) -> _Kind:
    def read(value: Any) -> str:
        if value not in words:
            near = difflib.get_close_matches(str(value), words, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{value!r} is none of {', '.join(words)}{hint}")
        return str(value)

    return _Kind(" | ".join(words), "|".join(words), read)


def _path(value: Any) -> Path:
    path = Path(_text(value)).expanduser()
    return path if path.is_absolute() else Path.cwd() / path


def _model(value: Any) -> str:
    return BUILTIN_MODEL if _text(value) == BUILTIN_MODEL else str(_path(value))


def _model_id(value: Any) -> str:
    return check_model_id(_text(value))


def _model_digest(value: Any) -> str:
    text = _text(value)
    model, _, digest = text.rpartition("=")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError(f"{text[:300]!r} does not end with a SHA-256, 64 hexadecimal digits")
    return f"{check_model_id(model)}={digest.lower()}" if model else digest.lower()


def _http_url(value: Any) -> str:
    text = _text(value)
    parts = urlsplit(text)
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds a password: put it into a file and name that with backend_key_file")
    try:
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is not a URL such as http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def _origin(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", text):
        raise ValueError(f"{text!r} is not an origin such as https://app.example.org (no path)")
    return text


def _host_name(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"(\*\.)?[\w.-]+|\[[0-9A-Fa-f:.]+\]", text):
        raise ValueError(f"{text!r} is not a host name such as lloom.example.org (no port, no scheme)")
    return text.lower()


def _host_port(value: Any) -> HostPort:
    return HostPort.parse(_text(value))


def _host_port_or_off(value: Any) -> HostPort | None:
    return None if value in ("off", False) else HostPort.parse(_text(value))


def _multiaddr(value: Any) -> Multiaddr:
    return Multiaddr.parse(_text(value))


def parse_bootstrap(value: Any) -> Multiaddr:
    """A validator's address with its ``/p2p``. Raises ValueError with a phrase."""
    addr = _multiaddr(value)
    if addr.peer_id is None:
        raise ValueError(f"'{addr}' does not name its node: add /p2p/<peer id> at its end")
    if addr.unix_path is not None or not re.match(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr)/", str(addr)):
        raise ValueError(f"'{addr}' does not begin with /ip4, /ip6, /dns, /dns4, /dns6 or /dnsaddr")
    return addr


def _listen(value: Any) -> Multiaddr:
    addr = _multiaddr(value)
    if not re.fullmatch(r"/ip[46]/[^/]+/(tcp/\d+(/ws)?|udp/\d+/(quic-v1(/webtransport)?|webrtc-direct))", str(addr)):
        raise ValueError(f"'{addr}' is not an address to listen on such as /ip4/0.0.0.0/tcp/4001")
    return addr


def _announce(value: Any) -> Multiaddr:
    addr = _multiaddr(value)
    if addr.unix_path is not None or addr.is_relayed or addr.peer_id is not None:
        raise ValueError(f"'{addr}' is not an address of this node such as /dns4/node.example.org/tcp/4001")
    return addr


def _control(value: Any) -> Multiaddr:
    addr = _multiaddr(value)
    if addr.unix_path is None and (addr.tcp_host_port is None or addr.peer_id is not None):
        raise ValueError(f"'{addr}' is not p2pd's control address such as /unix/run/lloom/control.sock")
    return addr


def _currency(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9]{1,8}", text):
        raise ValueError(f"{text!r} is not a currency such as EUR (1 to 8 letters and digits)")
    return text


def _price(value: Any) -> Price:
    return Price.parse(_text(value))


def _peer(value: Any) -> PeerId:
    return PeerId.parse(_text(value))


_RATE: Final = _Kind("number", "N", _rate)
_TEXT_MODEL: Final = _Kind("'builtin' or a path", "builtin|PATH.gguf", _model)
_PATH: Final = _Kind("path", "PATH", _path)
_SWITCH: Final = _Kind("true or false", "", _switch)


def _about(kind: _Kind, flag: str, group: str, doc: str, *, many: bool = False, hint: str = "") -> dict[str, Any]:
    """The metadata of a field of ``Config``; ``hint`` describes a default that depends on other settings."""
    return {"kind": kind, "flag": flag, "group": group, "doc": doc, "many": many, "hint": hint}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The checked settings of one node, made by ``load_config``. Each field's metadata holds its documentation."""

    # --- node
    home: Path = field(
        default=DEFAULT_HOME,
        metadata=_about(
            _PATH, "--home", "node", "Folder of the node's state: identity, network key, sockets, database."
        ),
    )
    roles: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _one_of(*ROLES),
            "--role",
            "node",
            "What the node does: client (offers the OpenAI API to applications), executor (serves a model), validator "
            "(stable public node: bootstrap, relay, catalogue). At least one.",
            many=True,
        ),
    )
    grace_s: float = field(
        default=30.0,
        metadata=_about(
            _seconds(0, 3600),
            "--grace",
            "node",
            "How long running requests may go on after SIGTERM or a drain before they are cut.",
        ),
    )
    log_level: str = field(
        default="info",
        metadata=_about(
            _one_of("debug", "info", "warning", "error"), "--log-level", "node", "Least severity that is logged."
        ),
    )
    log_format: str = field(
        default="auto",
        metadata=_about(
            _one_of("auto", "console", "json"),
            "--log-format",
            "node",
            "Form of the log on standard error; auto = console on a terminal, else JSON lines.",
        ),
    )
    receipts_days: int = field(
        default=400,
        metadata=_about(
            _whole(1, 36_500), "--receipts-days", "node", "Days for which receipts are kept in the ledger (lloom.db)."
        ),
    )
    receipts_max_mib: int = field(
        default=2048,
        metadata=_about(
            _whole(1, 1_000_000),
            "--receipts-max-mib",
            "node",
            "Size of the ledger, in MiB, above which the oldest receipts are dropped; one takes about 1.5 KiB.",
        ),
    )
    probe: HostPort | None = field(
        default=HostPort("127.0.0.1", 4881),
        metadata=_about(
            _Kind("HOST:PORT or 'off'", "HOST:PORT|off", _host_port_or_off),
            "--probe",
            "node",
            "Where /startupz, /livez, /readyz and /metrics are served, or 'off'. They hold no secrets.",
        ),
    )

    page: HostPort | None = field(
        default=HostPort("127.0.0.1", 4882),
        metadata=_about(
            _Kind("HOST:PORT or 'off'", "HOST:PORT|off", _host_port_or_off),
            "--page",
            "node",
            "Where the status page is served, or 'off'. Another than a loopback address needs api_key_file (browsers "
            "ask for a key as the password) or api_open.",
        ),
    )
    admin: HostPort | None = field(
        default=None,
        metadata=_about(
            _Kind("HOST:PORT or 'off'", "HOST:PORT|off", _host_port_or_off),
            "--admin",
            "node",
            "A loopback address where the admin API is served besides its unix socket, for the other containers of a "
            "pod; needs admin_token_file.",
        ),
    )
    admin_token_file: Path | None = field(
        default=None,
        metadata=_about(
            _PATH,
            "--admin-token-file",
            "node",
            "File with the tokens for the admin API at `--admin`, one a line; whoever has one may do everything.",
        ),
    )
    otlp_endpoint: str | None = field(
        default=None,
        metadata=_about(
            _Kind("URL", "URL", _http_url),
            "--otlp-endpoint",
            "node",
            "Receiver of traces by OTLP over HTTP, for instance http://127.0.0.1:4318. Needs the extra otel; "
            "OpenTelemetry's own OTEL_EXPORTER_OTLP_ENDPOINT works too. Spans hold no prompts and no answers.",
        ),
    )

    # --- executor
    backend: str | None = field(
        default=None,
        metadata=_about(
            _Kind("URL", "URL", _http_url),
            "--backend",
            "executor",
            "Base URL of an OpenAI-compatible server that does the work, for instance http://127.0.0.1:8000/v1.",
        ),
    )
    backend_key_file: Path | None = field(
        default=None,
        metadata=_about(
            _PATH, "--backend-key-file", "executor", "File with the key that the backend wants as its bearer token."
        ),
    )
    model: str | None = field(
        default=None,
        metadata=_about(
            _TEXT_MODEL,
            "--model",
            "executor",
            "Model that the node serves itself, instead of a backend: 'builtin' or a GGUF file.",
        ),
    )
    model_alias: str | None = field(
        default=None,
        metadata=_about(
            _Kind("model id", "ID", _model_id),
            "--model-alias",
            "executor",
            "Name under which the one model is offered, instead of its own.",
        ),
    )
    model_digests: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _Kind("digest", "[MODEL=]SHA256", _model_digest),
            "--model-digest",
            "executor",
            "SHA-256 of the weights that the backend serves, MODEL=SHA256 where it serves several. An answer cut "
            "elsewhere goes on only where the weights are known to be the same. With model it is computed.",
            many=True,
        ),
    )
    slots: int | None = field(
        default=None,
        metadata=_about(
            _whole(1, 4096),
            "--slots",
            "executor",
            "Requests that the backend works on at once.",
            hint="what the backend says",
        ),
    )
    queue_limit: int = field(
        default=64,
        metadata=_about(
            _whole(0, 65536),
            "--queue-limit",
            "executor",
            "Requests that may wait for a slot; further ones are refused.",
        ),
    )
    peer_limit: int = field(
        default=0,
        metadata=_about(
            _whole(0, 65536),
            "--peer-limit",
            "executor",
            "Requests of one peer that may work and wait here at once; 0 = as many as others leave room for.",
        ),
    )
    priority_peers: tuple[PeerId, ...] = field(
        default=(),
        metadata=_about(
            _Kind("peer id", "PEER", _peer),
            "--priority-peer",
            "executor",
            "Peers whose requests go before those of all others, in a queue of their own.",
            many=True,
        ),
    )
    priority_slots: int = field(
        default=1,
        metadata=_about(
            _whole(0, 4096),
            "--priority-slots",
            "executor",
            "Slots that are kept for priority_peers while they ask, and five minutes after; one is always left to "
            "others. With 0 they wait for a slot as others do, in front of them.",
        ),
    )
    peer_rate: float = field(
        default=0.0,
        metadata=_about(
            _RATE,
            "--peer-rate",
            "executor",
            "Requests a second of one member, averaged over a second or more; 0 = no limit.",
        ),
    )
    subnet_rate: float = field(
        default=20.0,
        metadata=_about(
            _RATE,
            "--subnet-rate",
            "executor",
            "Requests a second of all peers outside the network that come from one /24 (IPv6: /48), or through the "
            "relays in one; only an open executor serves such. 0 = no limit.",
        ),
    )
    global_rate: float = field(
        default=5000.0,
        metadata=_about(
            _RATE,
            "--global-rate",
            "executor",
            "Requests a second of all peers together; above it they are refused before their signature is checked. "
            "0 = no limit.",
        ),
    )
    max_tokens_default: int = field(
        default=2048,
        metadata=_about(
            _whole(1, 10_000_000),
            "--max-tokens-default",
            "executor",
            "Cap on the tokens of an answer when the request gives none.",
        ),
    )
    max_tokens_limit: int = field(
        default=32_768,
        metadata=_about(
            _whole(1, 10_000_000),
            "--max-tokens-limit",
            "executor",
            "Largest number of tokens that a request may ask for; above it the request is refused.",
        ),
    )
    max_choices: int = field(
        default=8,
        metadata=_about(
            _whole(1, 1024), "--max-choices", "executor", "Largest n and best_of that a request may ask for."
        ),
    )
    allow_remote_media: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--allow-remote-media",
            "executor",
            "Accept requests whose images or files are URLs, which the backend then fetches from inside your network.",
        ),
    )
    max_unacked: int = field(
        default=16,
        metadata=_about(
            _whole(0, 10_000),
            "--max-unacked",
            "executor",
            "Receipts of priced answers that one client may leave without its countersignature within an hour before "
            "it gets no further priced answer; 0 = any number.",
        ),
    )
    price_prompt: int = field(
        default=0,
        metadata=_about(
            _whole(0, 10**12),
            "--price-prompt",
            "executor",
            "Price of a million prompt tokens in minor units (cents) of price_currency.",
        ),
    )
    price_completion: int = field(
        default=0,
        metadata=_about(
            _whole(0, 10**12),
            "--price-completion",
            "executor",
            "Price of a million completion tokens in minor units (cents) of price_currency.",
        ),
    )
    price_currency: str | None = field(
        default=None,
        metadata=_about(
            _Kind("currency", "CODE", _currency),
            "--price-currency",
            "executor",
            "ISO 4217 code, or your network's own word, of the prices.",
        ),
    )

    # --- api
    api: HostPort = field(
        default=HostPort("127.0.0.1", 4880),
        metadata=_about(
            _Kind("HOST:PORT", "HOST:PORT", _host_port),
            "--api",
            "api",
            "Where a client's OpenAI API listens. Another than a loopback address needs api_key_file or api_open.",
        ),
    )
    api_key_file: Path | None = field(
        default=None,
        metadata=_about(_PATH, "--api-key-file", "api", "File with the keys that applications must send, one a line."),
    )
    api_tls_cert_file: Path | None = field(
        default=None,
        metadata=_about(
            _PATH,
            "--api-tls-cert-file",
            "api",
            "Serve the API by https with this certificate and chain (PEM). Read again when the file changes.",
        ),
    )
    api_tls_key_file: Path | None = field(
        default=None,
        metadata=_about(
            _PATH, "--api-tls-key-file", "api", "Unencrypted key (PEM) of that certificate; not readable by others."
        ),
    )
    api_open: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--api-open",
            "api",
            "Serve the API and the status page without a key on addresses that others can reach; shown as a health "
            "condition.",
        ),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _Kind("host name", "HOST", _host_name),
            "--allowed-host",
            "api",
            "Further names by which applications may address the API (the Host header), besides loopback ones.",
            many=True,
        ),
    )
    allowed_origins: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _Kind("origin", "ORIGIN", _origin),
            "--allowed-origin",
            "api",
            "Web origins whose pages may use the API.",
            many=True,
        ),
    )
    max_price: Price | None = field(
        default=None,
        metadata=_about(
            _Kind("price", "PROMPT/COMPLETION CURRENCY", _price),
            "--max-price",
            "api",
            "Ceiling per million tokens in minor units, for instance '15/60 EUR', or 'free'; a request's own header "
            "x-lloom-max-price goes before it. Nobody under it: 402. Not set = whatever is announced.",
        ),
    )
    max_cost_per_day: tuple[DayCap, ...] = field(
        default=(),
        metadata=_about(
            _Kind("amount and currency", "AMOUNT CURRENCY", DayCap.parse),
            "--max-cost-per-day",
            "api",
            "Most that the node's applications spend in a day (UTC), in minor units, for instance '500 EUR'; one for "
            "each currency. With any of them a currency that has none is not paid in. Over it: 402, and running "
            "answers are cut.",
            many=True,
        ),
    )
    policy: str = field(
        default="adaptive",
        metadata=_about(
            _one_of("adaptive", "cheapest", "fastest", "round-robin", "race"),
            "--policy",
            "api",
            "How an executor is chosen among those that can have a request; its own header x-lloom-policy goes before.",
        ),
    )
    hedge: str = field(
        default="off",
        metadata=_about(
            _one_of("off", "free", "on"),
            "--hedge",
            "api",
            "Ask a second executor when the first is slower than 95 % of the model's first tokens, for at most 2 % of "
            "the requests: among those that charge nothing (free), or all (on). Both see the prompt. A request's "
            "own header x-lloom-hedge goes before it.",
        ),
    )
    resume: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--resume",
            "api",
            "Let an executor of the same weights go on with a streamed answer that was cut, where that is possible; a "
            "request's own header x-lloom-resume (on or off) goes before it. Then more than one executor sees it.",
        ),
    )
    max_body_bytes: int = field(
        default=32 << 20,
        metadata=_about(
            _whole(1024, 1 << 30),
            "--max-body-bytes",
            "api",
            "Largest body of a request, from an application and from a peer.",
        ),
    )

    compression: str = field(
        default="documents",
        metadata=_about(
            _one_of("off", "documents", "all"),
            "--compression",
            "network",
            "What goes compressed (zstd) to peers that take it: off, documents (request bodies and unstreamed answers "
            "from 1 KiB on), or all (streamed answers too, in a tenth of the bytes: for slow or metered paths). With "
            "off, this node asks others for nothing compressed either.",
        ),
    )

    # --- trust
    audit: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--audit",
            "network",
            "On a validator: now and then ask executors of one model the same question, and publish evidence against "
            "those that answer unlike the others. Priced ones are asked only up to --max-price.",
        ),
    )
    audit_interval_s: float = field(
        default=600.0,
        metadata=_about(_seconds(1, 86400), "--audit-interval", "network", "Mean time between two audits; at random."),
    )
    avoid_doubted: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--avoid-doubted",
            "network",
            "Send nothing to executors that a configured validator's evidence, or their own receipts, speak against. "
            "Without it they only cost more in a choice.",
        ),
    )

    # --- network
    bootstrap: tuple[Multiaddr, ...] = field(
        default=(),
        metadata=_about(
            _Kind("multiaddr", "MULTIADDR", parse_bootstrap),
            "--bootstrap",
            "network",
            "Validators that this node trusts and stays connected to, each with /p2p/<peer id>.",
            many=True,
            hint="the validators in HOME/bootstrap, which `lloomctl network join` writes",
        ),
    )
    listen: tuple[Multiaddr, ...] = field(
        default=(Multiaddr.parse("/ip4/0.0.0.0/tcp/4001"), Multiaddr.parse("/ip4/0.0.0.0/udp/4001/quic-v1")),
        metadata=_about(
            _Kind("multiaddr", "MULTIADDR", _listen),
            "--listen",
            "network",
            "Addresses on which other peers reach this node.",
            many=True,
        ),
    )
    announce_addrs: tuple[Multiaddr, ...] = field(
        default=(),
        metadata=_about(
            _Kind("multiaddr", "MULTIADDR", _announce),
            "--announce-addr",
            "network",
            "Addresses to tell others instead of those that the node finds out itself.",
            many=True,
        ),
    )
    network_key_file: Path = field(
        default=Path(NETWORK_KEY_NAME),
        metadata=_about(
            _PATH,
            "--network-key-file",
            "network",
            "File with the key of the network that this node belongs to.",
            hint="HOME/network.key",
        ),
    )
    open: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--open",
            "network",
            "Deal with nodes of any network: a client sends prompts to them, an executor serves them.",
        ),
    )
    allow_peers: tuple[PeerId, ...] = field(
        default=(),
        metadata=_about(
            _Kind("peer id", "PEER", _peer),
            "--allow-peer",
            "network",
            "Peers outside the network that are dealt with as if they were members.",
            many=True,
        ),
    )
    min_peers: int = field(
        default=1,
        metadata=_about(
            _whole(0, 1000),
            "--min-peers",
            "network",
            "With fewer connected peers the node dials validators again and shows a health condition.",
        ),
    )
    mdns: bool = field(
        default=False,
        metadata=_about(
            _SWITCH,
            "--mdns",
            "network",
            "Find other nodes on the local link by multicast DNS; whoever is found still has to prove the network.",
        ),
    )
    rebootstrap_s: float = field(
        default=300.0,
        metadata=_about(
            _seconds(1, 86_400),
            "--rebootstrap",
            "network",
            "Interval at which validators that are not connected are dialled anew, and without any of them the peers "
            "of earlier; with fewer than min_peers at once.",
        ),
    )
    refresh_s: float = field(
        default=600.0,
        metadata=_about(
            _seconds(1, 86_400),
            "--refresh",
            "network",
            "Interval at which the DHT's routing table is refreshed by a walk to this node's id and to a random key.",
        ),
    )
    connections_low: int = field(
        default=400,
        metadata=_about(
            _whole(1, 100_000),
            "--connections-low",
            "network",
            "Connections that p2pd keeps when it closes some; validators and peers in use stay first of all.",
        ),
    )
    connections_high: int = field(
        default=600,
        metadata=_about(
            _whole(1, 100_000),
            "--connections-high",
            "network",
            "Connections above which p2pd closes those that matter least, down to connections_low.",
        ),
    )
    heartbeat_s: float = field(
        default=10.0,
        metadata=_about(
            _seconds(0.1, 120),
            "--heartbeat",
            "network",
            "Interval of gossipsub's heartbeat, which mends the mesh; announcements come each 10 s or more.",
        ),
    )
    gossip: str = field(
        default="on",
        metadata=_about(
            _one_of("on", "off"),
            "--gossip",
            "network",
            "off: this node neither listens nor speaks on the topics, and finds executors by hello, catalogues and the "
            "DHT. For links where every byte counts: changes are then seen late.",
        ),
    )

    # --- p2pd
    p2pd: Path | None = field(
        default=None,
        metadata=_about(_PATH, "--p2pd", "p2pd", "The p2pd program to start.", hint="the one inside this package"),
    )
    p2pd_control: Multiaddr | None = field(
        default=None,
        metadata=_about(
            _Kind("multiaddr", "MULTIADDR", _control),
            "--p2pd-control",
            "p2pd",
            "Control address of a p2pd that runs already and is not started or ended by this node (attached mode).",
        ),
    )
    handler_socket: Path | None = field(
        default=None,
        metadata=_about(
            _PATH,
            "--handler-socket",
            "p2pd",
            "Unix socket on which p2pd hands incoming streams over; p2pd must see it under the same path.",
            hint="HOME/run/handler.sock; with p2pd_control beside p2pd's socket",
        ),
    )
    dht: str = field(
        default="auto",
        metadata=_about(
            _one_of("auto", "server", "client"),
            "--dht",
            "p2pd",
            "DHT mode of the p2pd that is started; auto = server for validators and executors, else client.",
        ),
    )

    # --- not settings
    config_file: Path | None = None
    """The file that was read, or None."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Setting -> where its value came from: ``flag``, ``env``, ``file``, ``joined`` (HOME/bootstrap) or ``default``."""
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Sentences to log at the start: nothing that stops it."""

    # --- places in the home
    @property
    def run_dir(self) -> Path:
        """Folder of the sockets, 0700."""
        return self.home / "run"

    @property
    def admin_socket(self) -> Path:
        """Unix socket of the admin API."""
        return admin_socket_path(self.home)

    @property
    def control_address(self) -> Multiaddr:
        """Where p2pd's control socket is, in either mode."""
        return self.p2pd_control or Multiaddr.parse(f"/unix{self.run_dir / 'control.sock'}")

    @property
    def handler_path(self) -> Path:
        """Where p2pd hands incoming streams over, in either mode."""
        if self.handler_socket is not None:
            return self.handler_socket
        control = self.p2pd_control.unix_path if self.p2pd_control is not None else None
        return (Path(control).parent if control else self.run_dir) / "handler.sock"

    @property
    def identity_file(self) -> Path:
        """The node's private key."""
        return self.home / "identity.key"

    @property
    def database_file(self) -> Path:
        """Receipts and known peers."""
        return self.home / "lloom.db"

    # --- consequences
    @property
    def is_client(self) -> bool:
        """True when the OpenAI API is served."""
        return CLIENT in self.roles

    @property
    def is_executor(self) -> bool:
        """True when a model is served."""
        return EXECUTOR in self.roles

    @property
    def is_validator(self) -> bool:
        """True when others may rely on this node for bootstrap, relaying and the catalogue."""
        return VALIDATOR in self.roles

    @property
    def is_attached(self) -> bool:
        """True when p2pd is run by somebody else."""
        return self.p2pd_control is not None

    @property
    def is_dht_server(self) -> bool:
        """True when p2pd is started as a DHT server."""
        return self.dht == "server" or (self.dht == "auto" and (self.is_executor or self.is_validator))

    @property
    def audits(self) -> bool:
        """True when this validator audits executors."""
        return self.audit and self.is_validator

    @property
    def has_gossip(self) -> bool:
        """False when the topics are not used."""
        return self.gossip == "on"

    @property
    def price(self) -> Price:
        """What an executor charges."""
        return Price(self.price_prompt, self.price_completion, self.price_currency or "")

    @property
    def has_network_key(self) -> bool:
        """False only for an open node without a network of its own."""
        return self.network_key_file.exists()

    def effective(self) -> list[dict[str, Any]]:
        """Every setting as ``{"name", "value", "source", "env", "flag"}``, JSON types only, in the table's order.

        ``source`` is one of ``flag``, ``env``, ``file``, ``joined``, ``default``. Secrets are in it as paths only.
        """
        return [
            {
                "name": doc.name,
                "value": _plain(getattr(self, doc.name)),
                "source": self.sources.get(doc.name, "default"),
                "env": doc.env,
                "flag": doc.flag,
            }
            for doc in describe_settings()
        ]


class SettingDoc(NamedTuple):
    """One setting as documentation and the command line need it."""

    name: str
    """Key in the file and field of ``Config``."""
    env: str
    flag: str
    type: str
    """For people; of one value when ``is_multiple``."""
    default: str
    """As one would write it, or a phrase; empty = none."""
    doc: str
    group: str
    """Of: node, executor, api, network, p2pd."""
    metavar: str
    is_multiple: bool
    """A list in the file, comma separated in the environment, a repeated flag."""
    is_switch: bool
    """A flag without a value; its opposite is ``--no-...``."""


def describe_settings() -> list[SettingDoc]:
    """Every setting, in the table's order: what documentation, ``--help`` and tests are made from."""
    return list(_DOCS)


def admin_socket_path(home: Path) -> Path:
    """Where the node that lives in ``home`` serves its admin API."""
    return home / "run" / "admin.sock"


def read_bootstrap_file(path: Path) -> tuple[Multiaddr, ...]:
    """The validators in a bootstrap file: one multiaddr a line, ``#`` begins a comment; no file = none.

    Raises ConfigError, which lists each bad line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {_reason(exc)}") from exc
    addrs: dict[Multiaddr, None] = {}
    faults: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if line:
            try:
                addrs[parse_bootstrap(line)] = None
            except ValueError as exc:
                faults.append(f"{path}, line {number}: {exc}")
    if faults:
        raise ConfigError(faults)
    return tuple(addrs)


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    config_file: str | os.PathLike[str] | None = None,
    for_p2pd: bool = False,
) -> Config:
    """Read and check the settings of a node.

    Args:
        flags: setting -> text, or a sequence of texts for a multiple one, or a bool for a switch. None, and an empty
            sequence, mean that the flag was not given.
        env: the environment; None = this process's. An empty variable counts as not set.
        config_file: ``--config``. Without it LLOOM_CONFIG, else HOME/config.toml if that exists.
        for_p2pd: only what p2pd alone needs is checked: its container has no backend, network key or API.

    Raises:
        ConfigError: lists every fault, each with the source that it came from.
    """
    return _Loader(flags or {}, os.environ if env is None else env, config_file).load(for_p2pd=for_p2pd)


# --- the table, seen as fields --------------------------------------------------------------------------------------


def _fields() -> list[dataclasses.Field[Any]]:
    return [one for one in dataclasses.fields(Config) if one.metadata]


def env_name(name: str) -> str:
    """The environment variable of a setting."""
    return "LLOOM_" + name.upper()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _describe(one: dataclasses.Field[Any]) -> SettingDoc:
    meta = one.metadata
    kind: _Kind = meta["kind"]
    if meta["hint"]:
        default = str(meta["hint"])
    elif isinstance(one.default, bool):
        default = str(one.default).lower()
    elif one.default is None:
        default = ""
    elif isinstance(one.default, tuple):
        default = ",".join(str(part) for part in one.default)
    else:
        default = f"{one.default:g}" if isinstance(one.default, float) else str(one.default)
    return SettingDoc(
        one.name,
        env_name(one.name),
        meta["flag"],
        kind.name,
        default,
        meta["doc"],
        meta["group"],
        kind.metavar,
        meta["many"],
        kind is _SWITCH,
    )


_DOCS: Final = tuple(_describe(one) for one in _fields())
_NAMES: Final = tuple(doc.name for doc in _DOCS)


def _reason(exc: Exception) -> str:
    return (exc.strerror or type(exc).__name__).lower() if isinstance(exc, OSError) else "it is not UTF-8 text"


class _Loader:
    """One reading of all sources; collects faults instead of stopping at the first."""

    def __init__(
        self, flags: Mapping[str, Any], env: Mapping[str, str], config_file: str | os.PathLike[str] | None
    ) -> None:
        self._flags = flags
        self._env = env
        self._explicit_file = config_file
        self._faults: list[str] = []
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._faulty: set[str] = set()

    def load(self, *, for_p2pd: bool) -> Config:
        unknown = set(self._flags) - set(_NAMES)
        if unknown:
            raise TypeError(f"not a setting: {', '.join(sorted(unknown))}")
        path, document = self._read_file()
        for one in _fields():
            self._read_setting(one, document)
        self._values["home"] = self._values.get("home") or DEFAULT_HOME.expanduser()
        home: Path = self._values["home"]
        self._values.setdefault("network_key_file", home / NETWORK_KEY_NAME)
        self._read_joined(home)
        config = Config(
            **self._values,
            config_file=path,
            sources=self._sources,
            warnings=tuple(_unknown_variables(self._env)),
        )
        self._check(config, for_p2pd=for_p2pd)
        if self._faults:
            raise ConfigError(self._faults)
        return config

    # --- sources

    def _read_file(self) -> tuple[Path | None, dict[str, Any]]:
        named = self._explicit_file or self._env.get(_CONFIG_VARIABLE) or None
        if named is not None:
            path = Path(named).expanduser()
        else:
            try:
                path = resolve_home(self._flags.get("home"), self._env) / CONFIG_FILE_NAME
            except ConfigError:
                return None, {}  # reported when the setting itself is read
            if not path.is_file():
                return None, {}
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_CONFIG_BYTES + 1)
            if len(raw) > MAX_CONFIG_BYTES:
                raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
            document = tomllib.loads(raw.decode("utf-8"))
        except OSError as exc:
            self._faults.append(f"the config file {path} cannot be read: {_reason(exc)}")
            return path, {}
        except ValueError as exc:
            self._faults.append(f"the config file {path} is not TOML: {exc}")
            return path, {}
        except RecursionError:  # of tomllib, on thousands of brackets
            self._faults.append(f"the config file {path} is nested too deeply for what it can say")
            return path, {}
        if named is None and "home" in document:
            self._faults.append(f"home in {path} has no effect, since that file was found through the home: remove it")
            del document["home"]
        self._check_keys(path, document)
        return path, document

    def _check_keys(self, path: Path, document: Mapping[str, Any]) -> None:
        for key in document:
            if key in _NAMES:
                continue
            if f"{key}_file" in _NAMES:
                self._faults.append(
                    f"{key} in {path}: secrets are given as files only; put it into one and name that with {key}_file"
                )
                continue
            near = difflib.get_close_matches(key.lower().replace("-", "_"), _NAMES, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            self._faults.append(f"{key} in {path} is not a setting{hint}")

    def _read_setting(self, one: dataclasses.Field[Any], document: Mapping[str, Any]) -> None:
        name, meta = one.name, one.metadata
        flag = self._flags.get(name)
        variable = env_name(name)
        value: Any
        if flag is not None and flag != ():
            source, label = "flag", meta["flag"]
            value = flag
        elif self._env.get(variable):
            source, label = "env", variable
            value = self._env[variable]
            if meta["many"]:
                value = [part.strip() for part in value.split(",") if part.strip()]
        elif name in document:
            source, label = "file", f"{name} in the config file"
            value = document[name]
            if not _suits_file(meta["kind"], value, meta["many"]):
                self._faults.append(
                    f"{label}: {value!r} is of the wrong type (expected: {_expected(meta['kind'], meta['many'])})"
                )
                self._faulty.add(name)
                return
        else:
            return
        self._labels[name] = label
        self._sources[name] = source
        kind: _Kind = meta["kind"]
        if not meta["many"]:
            try:
                self._values[name] = kind.read(os.fspath(value) if isinstance(value, os.PathLike) else value)
            except (ValueError, RuntimeError) as exc:
                self._faults.append(f"{label}: {exc}")
                self._faulty.add(name)
            return
        parts: dict[Any, None] = {}
        for part in [value] if isinstance(value, str) else value:
            try:
                parts[kind.read(part)] = None
            except ValueError as exc:
                self._faults.append(f"{label}: {exc}")
                self._faulty.add(name)
        self._values[name] = tuple(parts)

    def _read_joined(self, home: Path) -> None:
        if "bootstrap" in self._sources:
            return
        try:
            joined = read_bootstrap_file(home / BOOTSTRAP_FILE_NAME)
        except ConfigError as exc:
            self._faults.extend(exc.faults)
            return
        if joined:
            self._values["bootstrap"] = joined
            self._sources["bootstrap"] = "joined"

    # --- checks that involve more than one setting, or the disk

    def _label(self, name: str) -> str:
        return self._labels.get(name, name)

    def _is_given(self, name: str) -> bool:
        return name in self._sources or name in self._faulty

    def _check(self, config: Config, *, for_p2pd: bool) -> None:
        self._check_roles(config)
        self._check_program(config)
        if for_p2pd:
            return
        self._check_executor(config)
        self._check_api(config)
        self._check_network(config)
        self._check_p2pd(config)

    def _check_roles(self, config: Config) -> None:
        if not config.roles and "roles" not in self._faulty:
            self._faults.append("no role is given: add --role client, --role executor or --role validator")

        if config.roles and config.audit and not config.is_validator and self._sources.get("audit") == "flag":
            self._faults.append(f"{self._label('audit')} is for validators only: add --role validator, or leave it out")

    def _check_executor(self, config: Config) -> None:
        chosen = [name for name in ("backend", "model") if self._is_given(name)]
        if config.is_executor and not chosen:
            self._faults.append("an executor needs what it serves: add --backend URL, or --model builtin or PATH.gguf")
        if len(chosen) == 2:
            self._faults.append(
                f"{self._label('backend')} and {self._label('model')} exclude each other: a node serves one of the two"
            )
        if config.roles and not config.is_executor and chosen and self._sources.get(chosen[0]) == "flag":
            self._faults.append(f"{self._label(chosen[0])} is for executors only: add --role executor, or leave it out")
        if config.model is not None and config.model != BUILTIN_MODEL:
            self._check_file("model", Path(config.model), "a GGUF file")
        if config.backend_key_file is not None:
            self._check_secret("backend_key_file", config.backend_key_file)
            if config.backend is None and not self._is_given("backend"):
                self._faults.append(f"{self._label('backend_key_file')} has no effect without a backend")
        if config.model_digests and config.model is not None:
            self._faults.append(
                f"{self._label('model_digests')} is for a backend: of {self._label('model')} the digest is computed"
            )
        if config.max_tokens_default > config.max_tokens_limit:
            self._faults.append(
                f"max_tokens_default ({config.max_tokens_default}) is over max_tokens_limit ({config.max_tokens_limit})"
            )
        if not config.price.is_free and config.price_currency is None and not self._is_given("price_currency"):
            self._faults.append("a price needs its currency: add --price-currency, for instance EUR")

    def _check_api(self, config: Config) -> None:
        if config.api_key_file is not None:
            self._check_secret("api_key_file", config.api_key_file)
        pair = ("api_tls_cert_file", "api_tls_key_file")
        given = [name for name in pair if self._is_given(name)]
        if len(given) == 1:
            lacking = pair[1] if given == [pair[0]] else pair[0]
            self._faults.append(
                f"{self._label(given[0])} needs its counterpart: add --{lacking.replace('_', '-')} FILE"
            )
        is_kept = self._is_given("api_key_file") or config.api_open
        if config.is_client and not config.api.is_loopback and not is_kept:
            self._faults.append(
                f"{self._label('api')}: {config.api} can be reached by others: "
                "add --api-key-file FILE, or --api-open to serve it without a key"
            )

        if config.page is not None and not config.page.is_loopback and not is_kept:
            self._faults.append(
                f"{self._label('page')}: {config.page} can be reached by others: add --api-key-file FILE or "
                "--api-open, or keep it on 127.0.0.1 and forward a port to it"
            )

        if config.admin_token_file is not None:
            self._check_secret("admin_token_file", config.admin_token_file)
            if not self._is_given("admin"):
                self._faults.append(f"{self._label('admin_token_file')} has no effect without --admin HOST:PORT")
        if config.admin is not None:
            if not config.admin.is_loopback:
                self._faults.append(
                    f"{self._label('admin')}: {config.admin} can be reached by others and is not encrypted: "
                    "choose a port of 127.0.0.1"
                )
            if not self._is_given("admin_token_file"):
                self._faults.append(f"{self._label('admin')} needs its token: add --admin-token-file FILE")

        currencies = [cap.currency for cap in config.max_cost_per_day]
        for currency in sorted({one for one in currencies if currencies.count(one) > 1}):
            self._faults.append(f"{self._label('max_cost_per_day')}: {currency} is given more than once")

    def _check_network(self, config: Config) -> None:
        path = config.network_key_file
        if self._is_given("network_key_file") or path.exists():
            try:
                load_network_keys(path)
            except ConfigError as exc:
                self._faults.append(f"{self._label('network_key_file')}: {exc.message}")
        elif not config.open:
            self._faults.append(
                f"this node belongs to no network ({path} does not exist): run `lloomctl network create` for a new "
                "one, or `lloomctl network join FILE` with an invite; --open deals with any network"
            )

    def _check_p2pd(self, config: Config) -> None:
        if self._is_given("p2pd") and self._is_given("p2pd_control"):
            self._faults.append(
                f"{self._label('p2pd')} and {self._label('p2pd_control')} exclude each other: "
                "p2pd is either started by this node or runs already"
            )
        for path in {config.admin_socket, config.handler_path}:
            if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
                self._faults.append(
                    f"the path of the socket {path} is too long ({MAX_SOCKET_PATH_BYTES} bytes at most): "
                    "choose a shorter --home"
                )
                break

    def _check_program(self, config: Config) -> None:
        if config.connections_low > config.connections_high:
            self._faults.append(
                f"connections_low ({config.connections_low}) is over connections_high ({config.connections_high})"
            )
        if config.p2pd is not None:
            self._check_file("p2pd", config.p2pd, "a program")
            if config.p2pd.is_file() and not os.access(config.p2pd, os.X_OK):
                self._faults.append(f"{self._label('p2pd')}: {config.p2pd} is not executable: chmod +x it")

    def _check_file(self, name: str, path: Path, what: str) -> None:
        if not path.exists():
            self._faults.append(f"{self._label(name)}: {path} does not exist")
        elif not path.is_file():
            self._faults.append(f"{self._label(name)}: {path} is not {what}")

    def _check_secret(self, name: str, path: Path) -> None:
        try:
            read_secret_lines(path)
        except ConfigError as exc:
            self._faults.append(f"{self._label(name)}: {exc.message}")


def read_secret_lines(path: Path) -> tuple[str, ...]:
    """The keys in a secret file: one a line, empty lines and those that begin with ``#`` left out.

    Raises ConfigError, one sentence, when it cannot be read or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {_reason(exc)}") from exc
    stripped = (line.strip() for line in text.splitlines())
    lines = tuple(line for line in stripped if line and not line.startswith("#"))
    if not lines:
        raise ConfigError(f"{path} is empty: put the key into it")
    return lines


def _expected(kind: _Kind, many: bool) -> str:
    return f"a list of {kind.name}" if many else kind.name


def _suits_file(kind: _Kind, value: Any, many: bool) -> bool:
    """True when TOML's type is the setting's: ``"5"`` is not a number in a file, though it is in the environment."""
    if many:
        return isinstance(value, list)
    if isinstance(value, str):
        return kind is not _SWITCH and kind.name not in ("whole number", "number", "seconds")
    return isinstance(value, (bool, int, float))


def _unknown_variables(env: Mapping[str, str]) -> Sequence[str]:
    # Not a fault: Kubernetes adds variables of its own for every Service whose name begins with lloom.
    known = {doc.env for doc in _DOCS} | _OTHER_VARIABLES
    found = []
    for name in sorted(env):
        if not name.startswith("LLOOM_") or name in known or name.startswith("LLOOM_TEST_"):
            continue
        if _SERVICE_LINK.search(name):
            continue
        near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
        found.append(f"{name} is not a setting and has no effect" + (f"; did you mean {near[0]}?" if near else ""))
    return found
