"""What ``lloomctl doctor`` finds: the checks, and how facts are judged. Pure; others gather the facts.

Some facts come from files (``cli/local_checks.py``, no node needed), the others from the running node
(``node/doctor.py``). Every finding that is not ok names a cause and the next step.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypedDict

FindingSeverity = Literal["ok", "skipped", "info", "warning", "error"]
"""``skipped``: it could not be looked at, for the reason in the text."""


class Finding(TypedDict):
    """The outcome of one check."""

    check: str
    """Its stable name, of ``CHECKS``."""
    severity: str
    """ok, skipped, info, warning or error."""
    text: str
    """What was found, with the cause."""
    remedy: str
    """What to do; empty when there is nothing to do."""


class CheckKind(NamedTuple):
    """One check."""

    name: str
    """Stable."""
    title: str
    """A few words."""
    is_local: bool
    """True when it needs no node."""


CHECKS: Final = (
    CheckKind("home", "folder of the node's state is private and writable", True),
    CheckKind("identity", "identity.key is there, private, and the running node's", True),
    CheckKind("network_key", "network.key is there, private, and the running node's", True),
    CheckKind("settings", "config file and environment can be used", True),
    CheckKind("binary", "the p2pd program is there and runs", True),
    CheckKind("ports", "ports are free (no node running)", True),
    CheckKind("node", "a node runs in the home and is of this version", True),
    CheckKind("p2pd", "p2pd answers and does not keep ending", False),
    CheckKind("features", "p2pd has Lloom's additions", False),
    CheckKind("stale_binary", "the p2pd that runs is the one on disk", False),
    CheckKind("listening", "p2pd accepts connections at its own address", False),
    CheckKind("plaintext", "unencrypted connections are refused", False),
    CheckKind("reachability", "addresses that others can dial", False),
    CheckKind("validators", "configured validators answer hello and are of this network", False),
    CheckKind("clock", "clock agrees with the validators'", False),
    CheckKind("provider_record", "other peers hold this node's provider records", False),
    CheckKind("gossip", "topics are shared with other peers", False),
    CheckKind("public_network", "the public IPFS network is not joined", False),
    CheckKind("open_settings", "no setting opens the node to strangers", False),
    CheckKind("ledger", "the database can be written", False),
    CheckKind("disk", "disk space in the home", False),
    CheckKind("descriptors", "limit of open files", False),
    CheckKind("conditions", "health conditions of the node", False),
)
"""Every check, in the order of a report."""

WELL_KNOWN_BOOTSTRAP: Final = frozenset(
    {
        "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",
        "QmQCU2EcMqAqQPR2i9bChDtGNJchTbq5TbXJJ16u19uLTa",
        "QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb",
        "QmcZf59bWwK5XFi76CZX8cbJ4BhTzzA3gU1ZjYZcYW3dwt",
        "QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ",
        "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8",
    }
)
"""The public IPFS network's bootstrap nodes. Source: kubo's and kad-dht's default bootstrap peers."""

CLOCK_WARNING_MS: Final = 5_000
CLOCK_ERROR_MS: Final = 15 * 60_000
"""Announcements of such a clock are dropped. Source: PROTOCOL.md, announcements."""
DISK_WARNING_BYTES: Final = 1 << 30
DISK_ERROR_BYTES: Final = 64 << 20
FILES_WARNING: Final = 1024
"""Each stream of a peer and each connection of an application takes a descriptor."""
FILES_GOOD: Final = 4096
FILES_USED_WARNING: Final = 0.8
FILES_USED_ERROR: Final = 0.95
COVERED_CONDITIONS: Final = frozenset(
    {
        "p2pd_down",
        "p2pd_restarting",
        "p2pd_stock",
        "no_validator",
        "no_bootstrap",
        "clock_skew",
        "open_network",
        "api_open",
    }
)
"""Health conditions that a check of its own looks at."""

_ORDER: Final = {kind.name: index for index, kind in enumerate(CHECKS)}
_STOCK_LACKS: Final = {
    "mdns": "mDNS",
    "holePunch": "hole punching",
    "staticRelays": "relays for nodes behind NAT",
    "psk": "private transports",
    "streamsPerProtocolPeer": "raised limits of streams and connections",
}
"""Flag of our own p2pd -> what a binary without it lacks."""


def finding(check: str, severity: FindingSeverity, text: str, remedy: str = "") -> Finding:
    """A finding of a check of the table. Raises KeyError for another name."""
    _ORDER[check]
    return Finding(check=check, severity=severity, text=text, remedy=remedy)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The findings in the order of a report."""
    return sorted(findings, key=lambda one: _ORDER[one["check"]])


def count_severities(findings: Iterable[Finding]) -> dict[str, int]:
    """How many there are of each severity."""
    counts = dict.fromkeys(("error", "warning", "info", "ok", "skipped"), 0)
    for one in findings:
        counts[one["severity"]] += 1
    return counts


# --- p2pd -----------------------------------------------------------------------------------------------------------


def judge_p2pd(*, is_up: bool, is_attached: bool, restarts: int, last_error: str, version: str | None) -> Finding:
    """Does it answer; ``last_error`` is why it went away, or empty."""
    if is_up:
        text = f"answers: {version or 'version unknown'}"
        if restarts:
            return finding(
                "p2pd", "info", f"{text}; restarted {restarts} times", "See run/p2pd.log and run/p2pd.log.1."
            )
        return finding("p2pd", "ok", text)
    cause = f" ({last_error})" if last_error else ""
    if is_attached:
        remedy = "Start the p2pd that --p2pd-control names, with the home's identity.key as its -id; this node waits."
        return finding("p2pd", "error", f"the attached p2pd does not answer{cause}", remedy)
    remedy = "HOME/run/p2pd.log holds its last words; a busy port (--listen) and a removed program (--p2pd) are usual."
    return finding("p2pd", "error", f"p2pd does not run{cause}; the node starts it again", remedy)


def judge_features(features: Collection[str], *, is_attached: bool) -> Finding:
    """``features``: flags that the binary knows."""
    if is_attached and not features:
        return finding("features", "info", "not known: p2pd is started by somebody else, and counts as a stock one")
    lacking = [words for flag, words in _STOCK_LACKS.items() if flag not in features]
    if not lacking:
        return finding("features", "ok", "Lloom's own build: " + ", ".join(_STOCK_LACKS.values()))
    remedy = "Leave out --p2pd to use the one inside the package."
    return finding("features", "info", "an unmodified p2pd, which lacks " + ", ".join(lacking), remedy)


def judge_stale(*, is_replaced: bool | None) -> Finding:
    """``is_replaced``: the running program is not the file at its path any more; None = cannot be told."""
    if is_replaced is None:
        return finding("stale_binary", "skipped", "not known: this node does not run p2pd, or not on Linux")
    if is_replaced:
        text = "p2pd was replaced on disk after the node had started it"
        return finding("stale_binary", "warning", text, "Restart the node, so that the new one is used.")
    return finding("stale_binary", "ok", "p2pd runs from the file on disk")


# --- listening ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What our own listener answered when it was asked for security protocols."""

    address: str
    """host:port that was dialled; empty = there was none to dial."""
    error: str = ""
    """Why there was no dialogue; empty when there was one."""
    accepted: frozenset[str] = frozenset()
    """Protocols that it would speak."""


def judge_dialogue(dialogue: Dialogue) -> list[Finding]:
    """Does it listen, and does it refuse plaintext."""
    skipped = finding("plaintext", "skipped", "no dialogue with the node's own listener")
    if not dialogue.address:
        text = "p2pd listens on no TCP address that this machine can dial"
        return [
            finding("listening", "info", text, "Add --listen /ip4/0.0.0.0/tcp/4001 so that peers can dial."),
            skipped,
        ]
    if dialogue.error:
        text = f"nobody speaks libp2p at {dialogue.address} ({dialogue.error})"
        remedy = "Check --listen, and that no firewall stands between this node and its own address."
        return [finding("listening", "warning", text, remedy), skipped]
    listening = finding("listening", "ok", f"libp2p answers at {dialogue.address}")
    plain = sorted(one for one in dialogue.accepted if one.startswith("/plaintext"))
    if plain:
        text = f"{dialogue.address} speaks {', '.join(plain)}: others can read and forge what this node says"
        return [listening, finding("plaintext", "error", text, "Start p2pd with -plaintext=false -noise=true.")]
    if "/noise" not in dialogue.accepted:
        text = f"{dialogue.address} refuses plaintext and Noise: other nodes cannot connect"
        return [listening, finding("plaintext", "error", text, "Start p2pd with -noise=true.")]
    return [listening, finding("plaintext", "ok", f"{dialogue.address} refuses plaintext, speaks Noise")]


def judge_reachability(addrs: Sequence[str], *, is_validator: bool) -> Finding:
    """From the addresses that the node tells others. Whether a firewall stands before them can't be seen from here."""
    kinds = {_kind_of(addr) for addr in addrs}
    if not kinds:
        return finding("reachability", "warning", "there is no address to tell others", "Check --listen.")
    if "public" in kinds or "name" in kinds:
        hint = "whether a firewall lets others in shows `lloomctl peer ping` from another machine"
        return finding("reachability", "ok", f"public addresses are told to others; {hint}")
    if "relayed" in kinds:
        return finding("reachability", "ok", "reached through a relay")
    where = "this machine" if kinds == {"loopback"} else "the same local network"
    text = f"only nodes on {where} can dial this one"
    if is_validator and kinds != {"loopback"}:
        return finding("reachability", "warning", text, "Give a validator a public address, and --announce-addr.")
    return finding("reachability", "info", text, "Fine for a network that lives there; else --announce-addr MULTIADDR.")


def _kind_of(addr: str) -> str:
    if "/p2p-circuit" in addr:
        return "relayed"
    parts = addr.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return "name"
    try:
        ip = ipaddress.ip_address(parts[2].partition("%")[0])
    except ValueError:
        return "name"
    if ip.is_loopback:
        return "loopback"
    return "public" if ip.is_global else "private"


# --- validators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ValidatorFacts:
    """How one configured validator answered."""

    name: str
    """End of its peer id."""
    address: str
    """One of the configured ones."""
    rtt_ms: float | None = None
    """None when it did not answer."""
    is_member: bool = False
    """It proved our network."""
    clock_ahead_ms: int = 0
    """Our clock against its, positive when ours is ahead."""
    code: str = ""
    """Of the error; empty when it answered."""
    error: str = ""
    """The error's sentence."""


def judge_validators(facts: Sequence[ValidatorFacts], *, is_validator: bool, is_open: bool) -> list[Finding]:
    """One finding for those that answer, one for each that does not: an error when there is none left."""
    if not facts:
        if is_validator:
            return [finding("validators", "ok", "this node is a validator; no other is configured")]
        text = "none is configured: only nodes that dial this one, or are on the same link, are found"
        return [finding("validators", "info", text, "Join a network with `lloomctl network join FILE`.")]
    good = [one for one in facts if not one.code and (one.is_member or is_open)]
    found = []
    if good:
        shown = ", ".join(f"{one.name} in {one.rtt_ms or 0:.1f} ms" for one in good[:5])
        found.append(finding("validators", "ok", f"{len(good)} of {len(facts)} answer: {shown}"))
    severity: FindingSeverity = "warning" if good else "error"
    for one in facts:
        if one not in good:
            text, remedy = _explain_validator(one)
            found.append(finding("validators", severity, text, remedy))
    return found


_CAUSES: Final = (
    # A part of the code or text, in lower case -> (cause, remedy).
    ("not_member", "it belongs to another network", "Compare `lloomctl network show` on both; join with a new invite."),
    ("bad_proof", "its network key differs", "Compare `lloomctl network show` on both; join with a new invite."),
    ("hello_version", "it speaks another major version", "Upgrade the older of the two."),
    ("kept_away", "this node keeps it away", "See the events: `lloomctl events --kind network_error`."),
    ("peer id mismatch", "another node answers at its address", "Correct the peer id behind /p2p/ in the address."),
    ("no such host", "its name is not known", "Check the name, and this machine's name server."),
    ("connection refused", "nothing listens at its address", "Start the validator, or correct the port."),
    ("no route to host", "its machine is not reached", "Check the address and the routes."),
    ("network is unreachable", "its network is not reached", "Check this machine's connection."),
    ("protocols not supported", "it runs no lloom-sidecar", "Check that the address is a Lloom node's."),
    ("daemon_unavailable", "p2pd of this node is down", "See the finding p2pd."),
    ("timeout", "it does not answer in time", "Check that its port is open in every firewall on the way."),
    ("did not answer", "it does not answer in time", "Check that its port is open in every firewall on the way."),
)


def _explain_validator(one: ValidatorFacts) -> tuple[str, str]:
    if not one.code:
        return (
            f"{one.name} at {one.address} answers, but did not prove this network",
            "Compare `lloomctl network show` on both; join with a new invite.",
        )
    error = " ".join(one.error.split())  # p2pd lists the addresses that it tried on lines of their own
    lower = f"{one.code} {error}".lower()
    for part, cause, remedy in _CAUSES:
        if part in lower:
            return f"{one.name} at {one.address}: {cause} ({one.code})", remedy
    return (
        f"{one.name} at {one.address}: {error[:300]} ({one.code})",
        "Check that it runs, and its address and port.",
    )


def judge_clock(facts: Sequence[ValidatorFacts]) -> Finding:
    """Against every validator that answered; with several the one in the middle counts."""
    skews = sorted(one.clock_ahead_ms for one in facts if not one.code)
    if not skews:
        return finding("clock", "skipped", "no validator answers to compare with")
    ahead_ms = skews[len(skews) // 2]
    size_s = abs(ahead_ms) / 1000
    way = "ahead of" if ahead_ms > 0 else "behind"
    text = f"{size_s:.1f} s {way} the validators' clocks"
    remedy = "Set the clock, for instance with `timedatectl set-ntp true`."
    if abs(ahead_ms) >= CLOCK_ERROR_MS:
        return finding("clock", "error", f"{text}: announcements are dropped over 15 min", remedy)
    if abs(ahead_ms) > CLOCK_WARNING_MS:
        return finding("clock", "warning", f"{text}: requests tolerate it, announcements up to 15 min", remedy)
    return finding("clock", "ok", f"within {max(0.1, size_s):.1f} s of {len(skews)} validator{'s'[: len(skews) > 1]}")


# --- DHT, gossip, the public network --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """Who holds this node's provider record of one key, asked one by one."""

    key: str
    holders: int
    """Other peers that named this node."""
    asked: int
    """Other peers that answered."""


def judge_records(facts: Sequence[RecordFacts], *, error: str = "") -> list[Finding]:
    """``facts`` are empty for a node that provides nothing; ``error``: the DHT could not be walked."""
    if error:
        return [finding("provider_record", "skipped", f"the DHT could not be asked ({error})")]
    if not facts:
        return [finding("provider_record", "ok", "a node that is only a client provides nothing")]
    if not any(one.asked for one in facts):
        text = "no other peer takes part in the DHT, so nobody could hold this node's record"
        return [finding("provider_record", "info", text, "Connect to a validator first.")]
    found = [one for one in facts if one.holders]
    lost = [one for one in facts if not one.holders]
    findings = []
    if found:
        shown = ", ".join(f"{one.key} at {one.holders} of {one.asked}" for one in found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        findings.append(finding("provider_record", "ok", f"other peers hold it: {shown}{more}"))
    for one in lost:
        remedy = f"Right after a start wait a minute; `lloomctl dht provide {one.key}` puts it now."
        text = f"none of {one.asked} other peers near {one.key} holds this node's record"
        findings.append(finding("provider_record", "warning", text, remedy))
    return findings


def judge_gossip(topics: Mapping[str, int], *, wanted: Collection[str], members: int) -> Finding:
    """``topics``: subscribed topic -> other subscribers; ``members``: connected members of the network."""
    missing = sorted(set(wanted) - set(topics))
    if missing and members:
        text = f"not subscribed to {', '.join(missing)}"
        return finding("gossip", "warning", text, "Wait a few seconds after p2pd's start; else restart the node.")
    lonely = sorted(topic for topic in wanted if not topics.get(topic))
    if lonely and members:
        text = f"no neighbour shares {', '.join(lonely)}, though {members} members are connected"
        remedy = "Gossip skips relayed connections: connect directly to a validator (`lloomctl peer list`)."
        return finding("gossip", "warning", text, remedy)
    if lonely:
        return finding("gossip", "skipped", "no member is connected")
    return finding("gossip", "ok", ", ".join(f"{topic}: {topics[topic]}" for topic in sorted(wanted)) + " neighbours")


def judge_public_network(connected: Iterable[str], *, has_flag: bool) -> Finding:
    """``has_flag``: p2pd was started with ``-b``."""
    strangers = sorted(WELL_KNOWN_BOOTSTRAP & set(connected))
    remedy = "Start p2pd without -b and -bootstrapPeers: the sidecar dials the validators itself."
    if strangers:
        text = f"connected to a bootstrap node of the public IPFS network ({strangers[0][-8:]})"
        return finding("public_network", "error", text, remedy)
    if has_flag:
        return finding("public_network", "error", "p2pd was started with -b: it joins the public IPFS network", remedy)
    return finding("public_network", "ok", "no connection to its bootstrap nodes")


# --- settings, machine ----------------------------------------------------------------------------------------------


def judge_open_settings(*, is_open: bool, is_api_open: bool, api: str, allows_media: bool) -> list[Finding]:
    """The switches that let strangers in."""
    found = []
    if is_open:
        text = "open: nodes of any network are dealt with, and see prompts"
        found.append(finding("open_settings", "warning", text, "Leave out --open; `lloomctl network join FILE`."))
    if is_api_open:
        text = f"api_open: whoever reaches {api} uses the API without a key"
        found.append(finding("open_settings", "warning", text, "Give --api-key-file FILE instead of --api-open."))
    if allows_media:
        text = "allow_remote_media: peers make the backend fetch URLs from inside your network"
        found.append(finding("open_settings", "warning", text, "Leave out --allow-remote-media."))
    return found or [finding("open_settings", "ok", "open, api_open and allow_remote_media are off")]


def judge_ledger(error: str) -> Finding:
    """``error``: why a write failed, empty = it did not."""
    if not error:
        return finding("ledger", "ok", "lloom.db takes writes")
    remedy = "Free disk space; check that HOME and lloom.db belong to the user that runs the node, on a writable disk."
    return finding("ledger", "error", f"lloom.db takes no writes ({error})", remedy)


def judge_disk(free_bytes: int) -> Finding:
    """Free space for this user in the home's file system."""
    text = f"{free_bytes / (1 << 30):.1f} GiB free" if free_bytes >= 1 << 30 else f"{free_bytes >> 20} MiB free"
    if free_bytes < DISK_ERROR_BYTES:
        return finding("disk", "error", f"only {text}: receipts cannot be kept", "Free disk space in the home.")
    if free_bytes < DISK_WARNING_BYTES:
        return finding("disk", "warning", f"only {text}", "Free disk space in the home.")
    return finding("disk", "ok", text)


def judge_descriptors(who: str, used: int, limit: int) -> Finding:
    """``limit``: the soft one of the process ``who``."""
    text = f"{who} uses {used} of {limit} files"
    remedy = "Raise it: `ulimit -n 65536` before the start, LimitNOFILE=65536 in a systemd unit."
    if used >= FILES_USED_ERROR * limit:
        return finding("descriptors", "error", f"{text}: new connections fail", remedy)
    if used >= FILES_USED_WARNING * limit or limit < FILES_WARNING:
        return finding("descriptors", "warning", text, remedy)
    if limit < FILES_GOOD:
        return finding("descriptors", "info", f"{text}: enough for a few hundred streams", remedy)
    return finding("descriptors", "ok", text)


def judge_conditions(conditions: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Those that no other check looks at, as they are."""
    found = []
    for one in conditions:
        if one["code"] not in COVERED_CONDITIONS:
            severity: FindingSeverity = "error" if one["severity"] == "error" else "warning"
            if one["severity"] == "info":
                severity = "info"
            found.append(
                finding("conditions", severity, f"{one['code']}: {one['text'] or one['title']}", one["remedy"])
            )
    return found or [finding("conditions", "ok", "none besides what the other checks say")]
