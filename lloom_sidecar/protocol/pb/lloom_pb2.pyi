from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_IDENTITY: _ClassVar[Encoding]
    ENCODING_ZSTD: _ClassVar[Encoding]
    ENCODING_GZIP: _ClassVar[Encoding]

class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_UNSPECIFIED: _ClassVar[Operation]
    OPERATION_CHAT: _ClassVar[Operation]
    OPERATION_COMPLETIONS: _ClassVar[Operation]
    OPERATION_EMBEDDINGS: _ClassVar[Operation]
    OPERATION_RESPONSES: _ClassVar[Operation]
    OPERATION_MESSAGES: _ClassVar[Operation]
    OPERATION_MODELS: _ClassVar[Operation]
    OPERATION_QUOTE: _ClassVar[Operation]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_CLIENT: _ClassVar[Role]
    ROLE_EXECUTOR: _ClassVar[Role]
    ROLE_VALIDATOR: _ClassVar[Role]

class UsageSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    USAGE_SOURCE_UNSPECIFIED: _ClassVar[UsageSource]
    USAGE_SOURCE_BACKEND: _ClassVar[UsageSource]
    USAGE_SOURCE_CHUNKS: _ClassVar[UsageSource]
    USAGE_SOURCE_UNKNOWN: _ClassVar[UsageSource]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_COMPLETE: _ClassVar[Outcome]
    OUTCOME_STOPPED: _ClassVar[Outcome]
    OUTCOME_PARTIAL: _ClassVar[Outcome]

class AnnouncementKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANNOUNCEMENT_KIND_UNSPECIFIED: _ClassVar[AnnouncementKind]
    ANNOUNCEMENT_KIND_INITIAL: _ClassVar[AnnouncementKind]
    ANNOUNCEMENT_KIND_UPDATE: _ClassVar[AnnouncementKind]
    ANNOUNCEMENT_KIND_HEARTBEAT: _ClassVar[AnnouncementKind]
    ANNOUNCEMENT_KIND_REMOVAL: _ClassVar[AnnouncementKind]
ENCODING_IDENTITY: Encoding
ENCODING_ZSTD: Encoding
ENCODING_GZIP: Encoding
OPERATION_UNSPECIFIED: Operation
OPERATION_CHAT: Operation
OPERATION_COMPLETIONS: Operation
OPERATION_EMBEDDINGS: Operation
OPERATION_RESPONSES: Operation
OPERATION_MESSAGES: Operation
OPERATION_MODELS: Operation
OPERATION_QUOTE: Operation
ROLE_UNSPECIFIED: Role
ROLE_CLIENT: Role
ROLE_EXECUTOR: Role
ROLE_VALIDATOR: Role
USAGE_SOURCE_UNSPECIFIED: UsageSource
USAGE_SOURCE_BACKEND: UsageSource
USAGE_SOURCE_CHUNKS: UsageSource
USAGE_SOURCE_UNKNOWN: UsageSource
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_COMPLETE: Outcome
OUTCOME_STOPPED: Outcome
OUTCOME_PARTIAL: Outcome
ANNOUNCEMENT_KIND_UNSPECIFIED: AnnouncementKind
ANNOUNCEMENT_KIND_INITIAL: AnnouncementKind
ANNOUNCEMENT_KIND_UPDATE: AnnouncementKind
ANNOUNCEMENT_KIND_HEARTBEAT: AnnouncementKind
ANNOUNCEMENT_KIND_REMOVAL: AnnouncementKind

class PublicKey(_message.Message):
    __slots__ = ("type", "data")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    type: int
    data: bytes
    def __init__(self, type: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("public_key", "payload_type", "payload", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_TYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: PublicKey
    payload_type: bytes
    payload: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[_Union[PublicKey, _Mapping]] = ..., payload_type: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("prompt_per_million", "completion_per_million", "currency")
    PROMPT_PER_MILLION_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_PER_MILLION_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    prompt_per_million: int
    completion_per_million: int
    currency: str
    def __init__(self, prompt_per_million: _Optional[int] = ..., completion_per_million: _Optional[int] = ..., currency: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("open", "accept", "request", "body", "head", "data", "checkpoint", "end", "error", "ack", "go_away", "ping", "pong")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    GO_AWAY_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    open: Open
    accept: Accept
    request: Request
    body: bytes
    head: Head
    data: bytes
    checkpoint: Checkpoint
    end: End
    error: Error
    ack: Ack
    go_away: GoAway
    ping: Ping
    pong: Pong
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., request: _Optional[_Union[Request, _Mapping]] = ..., body: _Optional[bytes] = ..., head: _Optional[_Union[Head, _Mapping]] = ..., data: _Optional[bytes] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., go_away: _Optional[_Union[GoAway, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("version_major", "version_minor")
    VERSION_MAJOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_MINOR_FIELD_NUMBER: _ClassVar[int]
    version_major: int
    version_minor: int
    def __init__(self, version_major: _Optional[int] = ..., version_minor: _Optional[int] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("now_ms", "challenge", "max_streams", "max_body_bytes", "version_minor")
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_MINOR_FIELD_NUMBER: _ClassVar[int]
    now_ms: int
    challenge: bytes
    max_streams: int
    max_body_bytes: int
    version_minor: int
    def __init__(self, now_ms: _Optional[int] = ..., challenge: _Optional[bytes] = ..., max_streams: _Optional[int] = ..., max_body_bytes: _Optional[int] = ..., version_minor: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("envelope", "salt", "body_length", "encoding", "body_size")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    BODY_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BODY_SIZE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    salt: bytes
    body_length: int
    encoding: Encoding
    body_size: int
    def __init__(self, envelope: _Optional[bytes] = ..., salt: _Optional[bytes] = ..., body_length: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., body_size: _Optional[int] = ...) -> None: ...

class RequestClaims(_message.Message):
    __slots__ = ("request_id", "executor", "issued_at_ms", "challenge", "exchange", "deadline_ms", "operation", "model", "body_digest", "max_price", "quote_id", "max_cost", "max_cost_set", "priority", "idempotency_key", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BODY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_PRICE_FIELD_NUMBER: _ClassVar[int]
    QUOTE_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_SET_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    executor: bytes
    issued_at_ms: int
    challenge: bytes
    exchange: int
    deadline_ms: int
    operation: Operation
    model: str
    body_digest: bytes
    max_price: Price
    quote_id: bytes
    max_cost: int
    max_cost_set: bool
    priority: int
    idempotency_key: bytes
    traceparent: str
    def __init__(self, request_id: _Optional[bytes] = ..., executor: _Optional[bytes] = ..., issued_at_ms: _Optional[int] = ..., challenge: _Optional[bytes] = ..., exchange: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., operation: _Optional[_Union[Operation, str]] = ..., model: _Optional[str] = ..., body_digest: _Optional[bytes] = ..., max_price: _Optional[_Union[Price, _Mapping]] = ..., quote_id: _Optional[bytes] = ..., max_cost: _Optional[int] = ..., max_cost_set: bool = ..., priority: _Optional[int] = ..., idempotency_key: _Optional[bytes] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("content_type", "encoding", "backend_us")
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BACKEND_US_FIELD_NUMBER: _ClassVar[int]
    content_type: str
    encoding: Encoding
    backend_us: int
    def __init__(self, content_type: _Optional[str] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., backend_us: _Optional[int] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("envelope",)
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    def __init__(self, envelope: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    def __init__(self, receipt: _Optional[bytes] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "http_status", "retryable", "retry_after_ms", "body", "price")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HTTP_STATUS_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    http_status: int
    retryable: bool
    retry_after_ms: int
    body: bytes
    price: Price
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., http_status: _Optional[int] = ..., retryable: bool = ..., retry_after_ms: _Optional[int] = ..., body: _Optional[bytes] = ..., price: _Optional[_Union[Price, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("exchange", "envelope")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    envelope: bytes
    def __init__(self, exchange: _Optional[int] = ..., envelope: _Optional[bytes] = ...) -> None: ...

class AckClaims(_message.Message):
    __slots__ = ("receipt_digest",)
    RECEIPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    receipt_digest: bytes
    def __init__(self, receipt_digest: _Optional[bytes] = ...) -> None: ...

class GoAway(_message.Message):
    __slots__ = ("reason", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: int
    def __init__(self, payload: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: int
    def __init__(self, payload: _Optional[int] = ...) -> None: ...

class ReceiptClaims(_message.Message):
    __slots__ = ("client", "executor", "request_digest", "answer_digest", "answer_bytes", "model", "usage", "usage_source", "price", "cost", "accepted_at_ms", "first_at_ms", "ended_at_ms", "outcome")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    USAGE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_AT_MS_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    client: bytes
    executor: bytes
    request_digest: bytes
    answer_digest: bytes
    answer_bytes: int
    model: str
    usage: Usage
    usage_source: UsageSource
    price: Price
    cost: int
    accepted_at_ms: int
    first_at_ms: int
    ended_at_ms: int
    outcome: Outcome
    def __init__(self, client: _Optional[bytes] = ..., executor: _Optional[bytes] = ..., request_digest: _Optional[bytes] = ..., answer_digest: _Optional[bytes] = ..., answer_bytes: _Optional[int] = ..., model: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., usage_source: _Optional[_Union[UsageSource, str]] = ..., price: _Optional[_Union[Price, _Mapping]] = ..., cost: _Optional[int] = ..., accepted_at_ms: _Optional[int] = ..., first_at_ms: _Optional[int] = ..., ended_at_ms: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ...) -> None: ...

class QuoteClaims(_message.Message):
    __slots__ = ("quote_id", "client", "executor", "model", "price", "issued_at_ms", "valid_until_ms")
    QUOTE_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    VALID_UNTIL_MS_FIELD_NUMBER: _ClassVar[int]
    quote_id: bytes
    client: bytes
    executor: bytes
    model: str
    price: Price
    issued_at_ms: int
    valid_until_ms: int
    def __init__(self, quote_id: _Optional[bytes] = ..., client: _Optional[bytes] = ..., executor: _Optional[bytes] = ..., model: _Optional[str] = ..., price: _Optional[_Union[Price, _Mapping]] = ..., issued_at_ms: _Optional[int] = ..., valid_until_ms: _Optional[int] = ...) -> None: ...

class HelloFrame(_message.Message):
    __slots__ = ("hello", "reply", "prove", "welcome", "refuse", "catalogue_query", "catalogue_entry", "catalogue_end")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    PROVE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_QUERY_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_ENTRY_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_END_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    reply: Reply
    prove: Prove
    welcome: Welcome
    refuse: Refuse
    catalogue_query: CatalogueQuery
    catalogue_entry: CatalogueEntry
    catalogue_end: CatalogueEnd
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., prove: _Optional[_Union[Prove, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., catalogue_query: _Optional[_Union[CatalogueQuery, _Mapping]] = ..., catalogue_entry: _Optional[_Union[CatalogueEntry, _Mapping]] = ..., catalogue_end: _Optional[_Union[CatalogueEnd, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version_major", "version_minor", "nonce", "network_ids")
    VERSION_MAJOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_MINOR_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_IDS_FIELD_NUMBER: _ClassVar[int]
    version_major: int
    version_minor: int
    nonce: bytes
    network_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, version_major: _Optional[int] = ..., version_minor: _Optional[int] = ..., nonce: _Optional[bytes] = ..., network_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("version_major", "version_minor", "nonce", "network_id", "proof")
    VERSION_MAJOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_MINOR_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    version_major: int
    version_minor: int
    nonce: bytes
    network_id: bytes
    proof: bytes
    def __init__(self, version_major: _Optional[int] = ..., version_minor: _Optional[int] = ..., nonce: _Optional[bytes] = ..., network_id: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Prove(_message.Message):
    __slots__ = ("proof", "node")
    PROOF_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    node: NodeInfo
    def __init__(self, proof: _Optional[bytes] = ..., node: _Optional[_Union[NodeInfo, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: NodeInfo
    def __init__(self, node: _Optional[_Union[NodeInfo, _Mapping]] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("roles", "features", "max_streams", "announcement", "software", "now_ms")
    ROLES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    roles: _containers.RepeatedScalarFieldContainer[Role]
    features: _containers.RepeatedScalarFieldContainer[str]
    max_streams: int
    announcement: bytes
    software: str
    now_ms: int
    def __init__(self, roles: _Optional[_Iterable[_Union[Role, str]]] = ..., features: _Optional[_Iterable[str]] = ..., max_streams: _Optional[int] = ..., announcement: _Optional[bytes] = ..., software: _Optional[str] = ..., now_ms: _Optional[int] = ...) -> None: ...

class CatalogueQuery(_message.Message):
    __slots__ = ("model", "since")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    since: int
    def __init__(self, model: _Optional[str] = ..., since: _Optional[int] = ...) -> None: ...

class CatalogueEntry(_message.Message):
    __slots__ = ("announcement", "heartbeat", "age_ms")
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    announcement: bytes
    heartbeat: bytes
    age_ms: int
    def __init__(self, announcement: _Optional[bytes] = ..., heartbeat: _Optional[bytes] = ..., age_ms: _Optional[int] = ...) -> None: ...

class CatalogueEnd(_message.Message):
    __slots__ = ("cursor", "truncated")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    cursor: int
    truncated: bool
    def __init__(self, cursor: _Optional[int] = ..., truncated: bool = ...) -> None: ...

class AnnouncementClaims(_message.Message):
    __slots__ = ("peer", "sequence", "issued_at_ms", "ttl_ms", "kind", "network_id", "tag", "addrs", "models", "load", "software", "full_digest")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    ADDRS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    FULL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    sequence: int
    issued_at_ms: int
    ttl_ms: int
    kind: AnnouncementKind
    network_id: bytes
    tag: bytes
    addrs: _containers.RepeatedScalarFieldContainer[bytes]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    load: Load
    software: str
    full_digest: bytes
    def __init__(self, peer: _Optional[bytes] = ..., sequence: _Optional[int] = ..., issued_at_ms: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., kind: _Optional[_Union[AnnouncementKind, str]] = ..., network_id: _Optional[bytes] = ..., tag: _Optional[bytes] = ..., addrs: _Optional[_Iterable[bytes]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., software: _Optional[str] = ..., full_digest: _Optional[bytes] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "family", "context_length", "quantisation", "features", "price", "slots", "digest")
    ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    family: str
    context_length: int
    quantisation: str
    features: _containers.RepeatedScalarFieldContainer[str]
    price: Price
    slots: int
    digest: bytes
    def __init__(self, id: _Optional[str] = ..., family: _Optional[str] = ..., context_length: _Optional[int] = ..., quantisation: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., price: _Optional[_Union[Price, _Mapping]] = ..., slots: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("in_flight", "queued", "tokens_per_s", "ttft_s")
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    in_flight: int
    queued: int
    tokens_per_s: float
    ttft_s: float
    def __init__(self, in_flight: _Optional[int] = ..., queued: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., ttft_s: _Optional[float] = ...) -> None: ...

class NetworkStatusClaims(_message.Message):
    __slots__ = ("peer", "sequence", "issued_at_ms", "ttl_ms", "network_id", "tag", "executors", "members", "models_total", "models", "software", "load")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MODELS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    sequence: int
    issued_at_ms: int
    ttl_ms: int
    network_id: bytes
    tag: bytes
    executors: int
    members: int
    models_total: int
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    software: _containers.RepeatedCompositeFieldContainer[SoftwareCount]
    load: LoadSum
    def __init__(self, peer: _Optional[bytes] = ..., sequence: _Optional[int] = ..., issued_at_ms: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., network_id: _Optional[bytes] = ..., tag: _Optional[bytes] = ..., executors: _Optional[int] = ..., members: _Optional[int] = ..., models_total: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., software: _Optional[_Iterable[_Union[SoftwareCount, _Mapping]]] = ..., load: _Optional[_Union[LoadSum, _Mapping]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("id", "executors", "slots", "median_price", "priced_executors")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_PRICE_FIELD_NUMBER: _ClassVar[int]
    PRICED_EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    id: str
    executors: int
    slots: int
    median_price: Price
    priced_executors: int
    def __init__(self, id: _Optional[str] = ..., executors: _Optional[int] = ..., slots: _Optional[int] = ..., median_price: _Optional[_Union[Price, _Mapping]] = ..., priced_executors: _Optional[int] = ...) -> None: ...

class SoftwareCount(_message.Message):
    __slots__ = ("software", "nodes")
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    software: str
    nodes: int
    def __init__(self, software: _Optional[str] = ..., nodes: _Optional[int] = ...) -> None: ...

class LoadSum(_message.Message):
    __slots__ = ("in_flight", "queued", "slots")
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    in_flight: int
    queued: int
    slots: int
    def __init__(self, in_flight: _Optional[int] = ..., queued: _Optional[int] = ..., slots: _Optional[int] = ...) -> None: ...

class EvidenceClaims(_message.Message):
    __slots__ = ("peer", "sequence", "issued_at_ms", "ttl_ms", "network_id", "tag", "subject", "model", "model_digest", "rounds")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_ID_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    sequence: int
    issued_at_ms: int
    ttl_ms: int
    network_id: bytes
    tag: bytes
    subject: bytes
    model: str
    model_digest: bytes
    rounds: _containers.RepeatedCompositeFieldContainer[CanaryRound]
    def __init__(self, peer: _Optional[bytes] = ..., sequence: _Optional[int] = ..., issued_at_ms: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., network_id: _Optional[bytes] = ..., tag: _Optional[bytes] = ..., subject: _Optional[bytes] = ..., model: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., rounds: _Optional[_Iterable[_Union[CanaryRound, _Mapping]]] = ...) -> None: ...

class CanaryRound(_message.Message):
    __slots__ = ("prompt_digest", "answers")
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    prompt_digest: bytes
    answers: _containers.RepeatedCompositeFieldContainer[CanaryAnswer]
    def __init__(self, prompt_digest: _Optional[bytes] = ..., answers: _Optional[_Iterable[_Union[CanaryAnswer, _Mapping]]] = ...) -> None: ...

class CanaryAnswer(_message.Message):
    __slots__ = ("receipt", "text_digest", "agrees")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    TEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AGREES_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    text_digest: bytes
    agrees: bool
    def __init__(self, receipt: _Optional[bytes] = ..., text_digest: _Optional[bytes] = ..., agrees: bool = ...) -> None: ...
