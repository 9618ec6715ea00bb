"""The one client that talks to a running node: httpx over its admin socket. Synchronous, for ``lloomctl``."""

from __future__ import annotations

import base64
import json
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, urlencode

from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    import httpx

    from .books import ExchangeInfo, UsageInfo
    from .doctor import Finding
    from .explaining import Explanation, RequestInfo
    from .operations import (
        BootstrapChange,
        BootstrapInfo,
        ClosestInfo,
        DhtPeer,
        DisconnectInfo,
        EffectiveInfo,
        ExecutorState,
        PingInfo,
        PriceChange,
        ProvidedInfo,
        ProvidersInfo,
        QueriedModels,
        QuoteInfo,
        RecordInfo,
        TopicInfo,
    )
    from .view import ExecutorInfo, ModelInfo, PeerInfo, ReceiptInfo, SettingInfo, Status

CONNECT_TIMEOUT_S: Final = 3.0
READ_TIMEOUT_S: Final = 10.0
ACTION_TIMEOUT_S: Final = 60.0
"""For what the node does with other peers, such as a dial."""
DHT_MARGIN_S: Final = 5.0
"""How much longer than the DHT the node itself may take."""
EVENTS_TIMEOUT_S: Final = 45.0
"""Three of the API's keep-alive lines."""


def _query(fields: dict[str, str | int | None]) -> str:
    return urlencode({name: value for name, value in fields.items() if value is not None})


class NodeUnreachableError(LloomError):
    """No node answers where one was expected; the message says what to do next. Exit code 3 of ``lloomctl``."""

    code = "node_unreachable"
    http_status = 503
    retryable = True


class NodeRefusedError(LloomError):
    """The node answered with an error: ``code``, ``http_status`` and the message are the node's."""

    code = "node_refused"


class NodeClient:
    """A connection to the admin API of one node. A context manager.

    Every method raises NodeUnreachableError when nothing answers in time, and NodeRefusedError when the node answers
    with an error.
    """

    def __init__(
        self,
        *,
        socket_path: Path | None = None,
        url: str | None = None,
        home: Path | None = None,
        token: str | None = None,
    ) -> None:
        """Exactly one of ``socket_path`` and ``url`` (http://HOST:PORT); ``home`` is for messages only. ``token``: of
        ``--admin-token-file``, sent to a URL only.
        """
        if (socket_path is None) == (url is None):
            raise ValueError("give either a socket or a URL")
        self._socket_path = socket_path
        self._url = url
        self._home = home
        self._token = token
        self._opened: httpx.Client | None = None

    @property
    def _client(self) -> httpx.Client:
        if self._opened is not None:
            return self._opened
        self._check_socket()  # before the import, which takes longer than everything else
        import httpx

        # A fresh context without certificates: loading the system's costs 30 ms and the socket speaks no TLS.
        verify: ssl.SSLContext | bool = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self._url is not None and self._url.startswith("https:"):
            verify = True
        uds = str(self._socket_path) if self._socket_path is not None else None
        self._opened = httpx.Client(
            transport=httpx.HTTPTransport(verify=verify, uds=uds),
            base_url=self._url or "http://localhost",
            headers={} if self._token is None or self._url is None else {"authorization": f"Bearer {self._token}"},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )
        return self._opened

    @classmethod
    def for_home(cls, home: Path) -> NodeClient:
        """The node that runs in ``home``."""
        return cls(socket_path=home / "run" / "admin.sock", home=home)

    @classmethod
    def for_node(cls, node: str, token: str | None = None) -> NodeClient:
        """The node at ``unix:PATH`` or ``http(s)://HOST:PORT``, which want a ``token``.

        Raises ValueError for another form.
        """
        if node.startswith("unix:"):
            return cls(socket_path=Path(node.removeprefix("unix:").removeprefix("//")))
        if node.startswith(("http://", "https://")):
            return cls(url=node.rstrip("/"), token=token)
        raise ValueError(f"{node!r} is not a node's address: expected unix:PATH or http://HOST:PORT")

    # --- reading

    def status(self) -> Status:
        """The node at a glance."""
        return cast("Status", self._get("/v1/status"))

    def peers(self) -> list[PeerInfo]:
        """The peers that it knows."""
        return cast("list[PeerInfo]", self._get_list("/v1/peers", "peers"))

    def models(self) -> list[ModelInfo]:
        """The models that are offered to it."""
        return cast("list[ModelInfo]", self._get_list("/v1/models", "models"))

    def executors(self) -> list[ExecutorInfo]:
        """The executors that it knows."""
        return cast("list[ExecutorInfo]", self._get_list("/v1/executors", "executors"))

    def config(self) -> list[SettingInfo]:
        """Its settings, each with its source."""
        return cast("list[SettingInfo]", self._get_list("/v1/config", "settings"))

    def p2pd_effective(self) -> list[EffectiveInfo]:
        """What its p2pd works with."""
        return cast("list[EffectiveInfo]", self._get_list("/v1/config", "p2pd"))

    def receipt(self, request_id: str) -> ReceiptInfo:
        """The verified receipt of one of its recent requests."""
        return cast("ReceiptInfo", self._get(f"/v1/receipts/{quote(request_id, safe='')}"))

    def exchanges(
        self,
        *,
        role: str | None = None,
        peer: str | None = None,
        model: str | None = None,
        request: str | None = None,
        owed: bool | None = None,
        doubtful: bool = False,
        before: int | None = None,
        limit: int = 100,
    ) -> list[ExchangeInfo]:
        """What its ledger has of exchanges, the newest first."""
        query = {"role": role, "peer": peer, "model": model, "request": request, "before": before, "limit": limit}
        query |= {"owed": None if owed is None else int(owed), "doubtful": int(doubtful)}
        return cast("list[ExchangeInfo]", self._get_list(f"/v1/receipts?{_query(query)}", "receipts"))

    def export_receipts(self, request: str, *, role: str | None = None, with_salt: bool = False) -> list[Any]:
        """The signed receipts of one request, objects of PROTOCOL.md's exported form."""
        query = _query({"role": role, "salt": int(with_salt)})
        return self._get_list(f"/v1/receipts/{quote(request, safe='')}/export?{query}", "receipts")

    def usage(
        self, by: str, *, role: str | None = None, since_ms: int | None = None, until_ms: int | None = None
    ) -> list[UsageInfo]:
        """Sums over its ledger by model, peer or day."""
        query = _query({"by": by, "role": role, "since_ms": since_ms, "until_ms": until_ms})
        return cast("list[UsageInfo]", self._get_list(f"/v1/usage?{query}", "usage"))

    def metrics(self) -> str:
        """Its metrics as Prometheus text."""
        with self._translated() as client:
            return self._checked(client.get("/v1/metrics")).text

    def events(
        self, *, follow: bool = True, history: bool = True, kinds: Sequence[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Its events; with ``follow`` until the node ends the stream."""
        params: list[tuple[str, str | int | float | bool | None]] = [("kind", kind) for kind in kinds]
        params += [("follow", int(follow)), ("history", int(history))]
        with (
            self._translated() as client,
            client.stream("GET", "/v1/events", params=params, timeout=EVENTS_TIMEOUT_S) as response,
        ):
            if response.is_error:
                response.read()
            for line in self._checked(response).iter_lines():
                if line:
                    yield self._parsed(line)

    # --- acting

    def connect(self, addr: str) -> PeerInfo:
        """Let the node connect to the peer at ``addr``."""
        return cast("PeerInfo", self._post("/v1/peers/connect", {"addr": addr}))

    def drain(self) -> None:
        """Let the node refuse new work and end when the running work has ended."""
        self._post("/v1/drain", None)

    def ping(self, peer: str) -> PingInfo:
        """One round trip from the node to a peer."""
        return cast("PingInfo", self._post("/v1/peers/ping", {"peer": peer}))

    def disconnect(self, peer: str) -> DisconnectInfo:
        """Let the node close its connections to a peer."""
        return cast("DisconnectInfo", self._post("/v1/peers/disconnect", {"peer": peer}))

    def bootstrap(self) -> BootstrapInfo:
        """Its configured validators."""
        return cast("BootstrapInfo", self._get("/v1/bootstrap"))

    def bootstrap_add(self, addr: str) -> BootstrapChange:
        """Let it trust one more validator."""
        return cast("BootstrapChange", self._post("/v1/bootstrap/add", {"addr": addr}))

    def bootstrap_remove(self, which: str) -> BootstrapChange:
        """Let it trust a validator, or one address of it, no more."""
        return cast("BootstrapChange", self._post("/v1/bootstrap/rm", {"which": which}))

    def find_providers(self, key: str, *, count: int, timeout_s: float, at: str | None = None) -> ProvidersInfo:
        """Who provides a key."""
        return cast("ProvidersInfo", self._dht("findprovs", timeout_s, key=key, count=count, at=at))

    def provide(self, key: str, *, timeout_s: float) -> ProvidedInfo:
        """Let it put a provider record."""
        return cast("ProvidedInfo", self._dht("provide", timeout_s, key=key))

    def closest(self, key: str, *, timeout_s: float) -> ClosestInfo:
        """The peers nearest to a key."""
        return cast("ClosestInfo", self._dht("closest", timeout_s, key=key))

    def find_peer(self, peer: str, *, timeout_s: float) -> DhtPeer:
        """Where the DHT says that a peer is."""
        return cast("DhtPeer", self._dht("findpeer", timeout_s, peer=peer))

    def get_record(self, key: str, *, timeout_s: float) -> tuple[str, bytes]:
        """(full key, value) of a record."""
        return self._record(self._dht("get", timeout_s, key=key))

    def put_record(self, key: str | None, value: bytes, *, timeout_s: float) -> tuple[str, bytes]:
        """Put a record; ``key`` None = the node's own public key. Returns what was put."""
        text = base64.b64encode(value).decode()
        return self._record(self._dht("put", timeout_s, key=key, value=text))

    def topics(self) -> list[TopicInfo]:
        """Its gossip topics."""
        return cast("list[TopicInfo]", self._get_list("/v1/gossip/topics", "topics"))

    def topic_peers(self, topic: str) -> TopicInfo:
        """Who else is subscribed to a topic."""
        return cast("TopicInfo", self._get(f"/v1/gossip/peers?topic={quote(topic, safe='')}"))

    def query_models(self, peer: str) -> QueriedModels:
        """What an executor offers now, in its own words."""
        return cast("QueriedModels", self._post("/v1/models/query", {"peer": peer}))

    def requests(self) -> list[RequestInfo]:
        """The last requests of the node's applications, newest first."""
        return cast("list[RequestInfo]", self._get("/v1/requests")["requests"])

    def explain(self, what: str, *, policy: str | None = None) -> Explanation:
        """Why a request went where it went, or where one for a model would go now."""
        body = {"what": what} if policy is None else {"what": what, "policy": policy}
        return cast("Explanation", self._post("/v1/explain", body))

    def ask_quote(self, peer: str, model: str) -> QuoteInfo:
        """A signed price."""
        return cast("QuoteInfo", self._post("/v1/models/quote", {"peer": peer, "model": model}))

    def set_price(self, model: str, price: str) -> PriceChange:
        """Let the executor ask another price for a model: ``PROMPT/COMPLETION CURRENCY`` or ``free``."""
        return cast("PriceChange", self._post("/v1/executor/price", {"model": model, "price": price}))

    def pause_executor(self) -> ExecutorState:
        """Let the executor take no further work while its node goes on."""
        return cast("ExecutorState", self._post("/v1/executor/pause", {}))

    def resume_executor(self) -> ExecutorState:
        """Let the executor take work again."""
        return cast("ExecutorState", self._post("/v1/executor/resume", {}))

    def examine(self) -> list[Finding]:
        """What it finds when it examines itself."""
        found = self._post("/v1/doctor", {}).get("findings")
        if not isinstance(found, list):
            raise NodeRefusedError(f"{self._where} answered without findings: is it a Lloom node?")
        return cast("list[Finding]", found)

    # --- beneath

    def _dht(self, verb: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        body = {**fields, "timeout_s": timeout_s}
        return self._post(f"/v1/dht/{verb}", body, timeout_s=timeout_s + DHT_MARGIN_S)

    def _record(self, found: dict[str, Any]) -> tuple[str, bytes]:
        record = cast("RecordInfo", found)
        return record["key"], base64.b64decode(record["value"])

    def close(self) -> None:
        """Close the connection."""
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> NodeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, path: str) -> dict[str, Any]:
        with self._translated() as client:
            return self._parsed(self._checked(client.get(path)).text)

    def _get_list(self, path: str, key: str) -> list[Any]:
        found = self._get(path).get(key)
        if not isinstance(found, list):
            raise NodeRefusedError(f"{self._where} answered {path} without {key!r}: is it a Lloom node?")
        return found

    def _post(self, path: str, body: dict[str, Any] | None, *, timeout_s: float = ACTION_TIMEOUT_S) -> dict[str, Any]:
        with self._translated() as client:
            return self._parsed(self._checked(client.post(path, json=body, timeout=timeout_s)).text)

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if not response.is_error:
            return response
        try:
            error = json.loads(response.text)["error"]
            code, message = str(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            code, message = "node_refused", f"{self._where} answered with status {response.status_code}"
        raise NodeRefusedError(message, code=code, http_status=response.status_code)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as exc:
            raise NodeRefusedError(f"{self._where} answered something that is no JSON: is it a Lloom node?") from exc
        if not isinstance(value, dict):
            raise NodeRefusedError(f"{self._where} answered no JSON object: is it a Lloom node?")
        return value

    @property
    def _where(self) -> str:
        return self._url or str(self._socket_path)

    @contextmanager
    def _translated(self) -> Iterator[httpx.Client]:
        client = self._client
        import httpx

        try:
            yield client
        except httpx.TimeoutException as exc:
            raise NodeUnreachableError(self._too_slow()) from exc
        except httpx.TransportError as exc:
            raise NodeUnreachableError(self._explain(exc)) from exc

    def _explain(self, exc: httpx.TransportError) -> str:
        import httpx

        if isinstance(exc, httpx.ConnectError):
            return f"no node answers at {self._where}: check the address, and that the node runs"
        return f"the node at {self._where} ended before it had answered: see its log, and start it again"

    def _check_socket(self) -> None:
        """Open and close the socket once: its error says more than httpx's, which leaks a descriptor besides."""
        if self._socket_path is None:
            return
        path, home = self._socket_path, self._home
        start = "`lloom-sidecar run`" if home is None else f"`lloom-sidecar run --home {home} --role client`"
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(CONNECT_TIMEOUT_S)
                probe.connect(str(path))
        except (FileNotFoundError, NotADirectoryError) as exc:
            where = f"in {home}" if home is not None else f"at {path}"
            raise NodeUnreachableError(
                f"no node runs {where}: start one with {start}, or name another with --home or --node"
            ) from exc
        except ConnectionRefusedError as exc:
            raise NodeUnreachableError(f"the node that made {path} has ended: start it again with {start}") from exc
        except PermissionError as exc:
            raise NodeUnreachableError(
                f"the node's socket {path} belongs to another user: run lloomctl as the user that runs the node"
            ) from exc
        except TimeoutError as exc:
            raise NodeUnreachableError(self._too_slow()) from exc
        except OSError as exc:
            raise NodeUnreachableError(f"the node's socket {path} cannot be used: {exc}") from exc

    def _too_slow(self) -> str:
        return f"the node at {self._where} does not answer in time: see its log, and whether its machine is overloaded"
