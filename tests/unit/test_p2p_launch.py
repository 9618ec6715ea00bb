"""p2pd's command line, what is kept of its output, and the record that finds a leftover."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.errors import ConfigError, StartError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.launch import (
    FEATURE_STDIN_EOF,
    DaemonSettings,
    build_argv,
    is_stock,
    probe_features,
    probe_version,
    read_note,
    write_note,
)
from lloom_sidecar.p2p.leftover import end_leftover, remove_record, start_time, write_record
from lloom_sidecar.p2p.output import MAX_LINE_CHARS, MAX_LINES, MAX_LOG_BYTES, OutputTail

PEER = PeerId.from_ed25519(bytes(32))
TCP = Multiaddr.parse("/ip4/0.0.0.0/tcp/4001")
QUIC = Multiaddr.parse("/ip4/0.0.0.0/udp/4001/quic-v1")
STOCK = frozenset(
    {
        *("listen", "q", "id", "b", "bootstrapPeers", "dht", "dhtClient", "dhtServer", "connManager", "connLo"),
        *("connHi", "connGrace", "natPortMap", "pubsub", "pubsubRouter", "pubsubSign", "pubsubSignStrict"),
        *("gossipsubHeartbeatInterval", "gossipsubHeartbeatInitialDelay", "relay", "relayHop", "autoRelay"),
        *("autonat", "hostAddrs", "announceAddrs", "noListenAddrs", "metricsAddr", "f", "i", "noise", "tls"),
        *("plaintext", "muxer", "echo", "forceReachabilityPublic", "forceReachabilityPrivate"),
    }
)
OURS = STOCK | {
    *("userAgent", "protocolVersion", "streamsPerProtocolPeer", "connsPerIP", "controlMode", "exitOnStdinEOF"),
    *("version", "psk", "mdns", "mdnsServiceTag", "staticRelays", "holePunch", "gossipsubDegree"),
}


def settings(**changes: object) -> DaemonSettings:
    fields: dict[str, object] = {
        "binary": Path("/bin/p2pd"),
        "run_dir": Path("/run/lloom"),
        "identity_file": Path("/home/lloom/identity.key"),
        **changes,
    }
    return DaemonSettings(**fields)  # type: ignore[arg-type]


class TestArgv:
    def test_ours_with_defaults(self) -> None:
        assert build_argv(settings(dht_mode="server"), OURS) == [
            "/bin/p2pd",
            "-listen=/unix/run/lloom/p2pd.sock",
            "-id=/home/lloom/identity.key",
            "-controlMode=0600",
            "-hostAddrs=/ip4/0.0.0.0/tcp/4001,/ip4/0.0.0.0/udp/4001/quic-v1",
            "-noise=true",
            "-muxer=yamux",
            "-dhtServer=true",
            "-pubsub=true",
            "-pubsubRouter=gossipsub",
            "-pubsubSign=true",
            "-pubsubSignStrict=true",
            "-gossipsubHeartbeatInterval=10000ms",
            "-holePunch=true",
            "-exitOnStdinEOF=true",
        ]

    def test_stock_is_kept_from_what_it_does_by_default(self) -> None:
        argv = build_argv(settings(), STOCK)
        assert is_stock(STOCK)
        assert argv[-4:] == [
            "-plaintext=false",
            "-echo=false",
            "-relay=false",
            "-f=/run/lloom/p2pd-stock.json",
        ]
        assert "-hostAddrs=/ip4/0.0.0.0/tcp/4001" in argv
        assert "-dht=true" in argv

    def test_everything_that_ours_can(self) -> None:
        argv = build_argv(
            settings(
                announce=(TCP,),
                dht_mode="client",
                heartbeat_s=0.7,
                gossip_degree=64,
                user_agent="lloom/1",
                protocol_version="/lloom/1.0.0",
                streams_per_protocol_peer=99,
                conns_per_ip=7,
                connmgr_lo=10,
                connmgr_hi=20,
                relay_service=True,
                static_relays=(TCP.with_peer(PEER),),
                hole_punch=False,
                nat_port_map=True,
                autonat=True,
                force_reachability="private",
                mdns=True,
                mdns_service_tag="_x._udp",
                metrics_address="127.0.0.1:9",
                control_mode=0o660,
                extra_args=("-q",),
            ),
            OURS,
        )
        assert set(argv) >= {
            "-announceAddrs=/ip4/0.0.0.0/tcp/4001",
            "-dhtClient=true",
            "-gossipsubHeartbeatInterval=700ms",
            "-gossipsubDegree=64",
            "-userAgent=lloom/1",
            "-protocolVersion=/lloom/1.0.0",
            "-streamsPerProtocolPeer=99",
            "-connsPerIP=7",
            "-connManager=true",
            "-connLo=10",
            "-connHi=20",
            "-connGrace=120000ms",
            "-relayHop=true",
            f"-staticRelays=/ip4/0.0.0.0/tcp/4001/p2p/{PEER}",
            "-natPortMap=true",
            "-autonat=true",
            "-forceReachabilityPrivate=true",
            "-mdns=true",
            "-mdnsServiceTag=_x._udp",
            "-metricsAddr=127.0.0.1:9",
            "-controlMode=0660",
        }
        assert argv[-1] == "-q"
        assert "-holePunch=true" not in argv

    def test_a_stock_relay_stays_one(self) -> None:
        argv = build_argv(settings(relay_service=True), STOCK)
        assert "-relayHop=true" in argv
        assert not [arg for arg in argv if arg.startswith(("-relay=", "-f="))]

    @given(st.frozensets(st.sampled_from(sorted(OURS))), st.booleans(), st.sampled_from(["server", "client", "auto"]))
    def test_no_flag_that_the_binary_lacks_and_never_the_public_bootstrap(
        self, features: frozenset[str], relay: bool, mode: str
    ) -> None:
        argv = build_argv(settings(relay_service=relay, dht_mode=mode, mdns=True, user_agent="x"), features)
        flags = {arg[1:].partition("=")[0] for arg in argv[1:]}
        assert flags <= features
        assert not flags & {"b", "bootstrapPeers"}

    def test_no_dht(self) -> None:
        assert not [arg for arg in build_argv(settings(dht_mode="off"), OURS) if "dht" in arg]

    def test_no_listener(self) -> None:
        assert "-noListenAddrs=true" in build_argv(settings(listen=()), OURS)

    @pytest.mark.parametrize("psk", [None, Path("/psk")])
    def test_only_udp_where_only_tcp_is_spoken(self, psk: Path | None) -> None:
        with pytest.raises(ConfigError, match="no address is left"):
            build_argv(settings(listen=(QUIC,), psk_file=psk), STOCK if psk is None else OURS)

    def test_a_private_transport_is_tcp(self) -> None:
        argv = build_argv(settings(psk_file=Path("/psk")), OURS)
        assert "-psk=/psk" in argv
        assert "-hostAddrs=/ip4/0.0.0.0/tcp/4001" in argv

    def test_a_private_transport_is_never_left_out_silently(self) -> None:
        with pytest.raises(ConfigError, match="pre-shared key"):
            build_argv(settings(psk_file=Path("/psk")), STOCK)

    def test_a_socket_path_too_long(self) -> None:
        with pytest.raises(ConfigError, match=r"p2pd's control socket has 1\d\d bytes.*LLOOM_HOME"):
            build_argv(settings(run_dir=Path("/" + "x" * 120)), OURS)


class TestProbe:
    async def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(StartError, match=r"there is no p2pd at .*No such file.*--p2pd PATH"):
            await probe_features(tmp_path / "p2pd")

    async def test_not_executable(self, tmp_path: Path) -> None:
        path = tmp_path / "p2pd"
        path.write_bytes(b"#!/bin/sh\n")
        with pytest.raises(StartError, match="may not be executed: chmod"):
            await probe_features(path)

    async def test_of_another_machine(self, tmp_path: Path) -> None:
        path = tmp_path / "p2pd"
        path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
        path.chmod(0o755)
        with pytest.raises(StartError, match="is no program for this machine"):
            await probe_features(path)

    async def test_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(StartError, match="is no libp2p daemon"):
            await probe_features(script(tmp_path, "echo hello"))

    async def test_is_asked_once_per_version(self, tmp_path: Path) -> None:
        lines = "\n".join(f"echo '  -{flag} string' >&2" for flag in sorted(STOCK))
        path = script(tmp_path, f"echo x >> {tmp_path}/calls\n{lines}")
        assert await probe_features(path) == STOCK
        assert await probe_features(path) == STOCK
        assert (tmp_path / "calls").read_text() == "x\n"
        script(tmp_path, f"echo x >> {tmp_path}/calls\n{lines}\necho '  -version'")
        assert await probe_features(path) == STOCK | {"version"}

    async def test_version(self, tmp_path: Path) -> None:
        path = script(tmp_path, "echo p2pd 1.2; echo more")
        assert await probe_version(path, STOCK) is None
        assert await probe_version(path, OURS) == "p2pd 1.2"


def script(directory: Path, body: str) -> Path:
    path = directory / "p2pd"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


class TestOutput:
    @given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=10))
    def test_any_cutting_gives_the_same_lines(self, data: bytes, cuts: list[int]) -> None:
        whole, pieces = OutputTail(None), OutputTail(None)
        whole.feed(data)
        whole.feed(b"")
        last = 0
        for cut in sorted(min(cut, len(data)) for cut in cuts):
            if data[last:cut]:
                pieces.feed(data[last:cut])
            last = cut
        if data[last:]:
            pieces.feed(data[last:])
        pieces.feed(b"")
        assert pieces.lines == whole.lines
        assert all(line.isprintable() and line for line in whole.lines)

    def test_is_bounded(self) -> None:
        tail = OutputTail(None)
        tail.feed(b"x" * 10_000_000)
        tail.feed(b"\n" + b"\n".join(b"%d" % number for number in range(1000)) + b"\n")
        assert len(tail.lines) == MAX_LINES
        assert tail.lines[-1] == "999"
        tail.feed(b"y" * 10_000 + b"\n")
        assert tail.lines[-1] == "y" * MAX_LINE_CHARS

    def test_terminal_controls_do_not_pass(self) -> None:
        tail = OutputTail(None)
        tail.feed(b"\x1b[2Jred\x07\n")
        assert list(tail.lines) == [" [2Jred"]

    def test_log_is_begun_anew_and_the_last_one_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "p2pd.log"
        for text in (b"one\n", b"two\n"):
            tail = OutputTail(path)
            tail.feed(text)
            tail.close()
            tail.close()
        assert path.read_bytes() == b"two\n"
        assert (tmp_path / "p2pd.log.1").read_bytes() == b"one\n"
        assert path.stat().st_mode & 0o777 == 0o600

    def test_log_is_bounded(self, tmp_path: Path) -> None:
        tail = OutputTail(tmp_path / "p2pd.log")
        for _ in range(25):
            tail.feed(bytes(500_000))
        tail.close()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * MAX_LOG_BYTES

    def test_a_log_that_cannot_be_written_is_given_up(self, tmp_path: Path) -> None:
        tail = OutputTail(tmp_path / "none" / "p2pd.log")
        tail.feed(b"line\n")
        assert list(tail.lines) == ["line"]
        tail.close()


class TestLeftover:
    def test_record_names_this_process_for_ever(self, tmp_path: Path) -> None:
        path = tmp_path / "p2pd.json"
        write_record(path, os.getpid())
        assert json.loads(path.read_text()) == {"pid": os.getpid(), "start_time_ticks": start_time(os.getpid())}
        assert path.stat().st_mode & 0o777 == 0o600
        remove_record(path)
        remove_record(path)
        assert not path.exists()

    def test_no_process_no_record(self, tmp_path: Path) -> None:
        assert start_time(2**22 + 1) is None
        write_record(tmp_path / "p2pd.json", 2**22 + 1)
        assert not (tmp_path / "p2pd.json").exists()

    @pytest.mark.parametrize(
        "text",
        ["", "garbage", "[]", "{}", '{"pid": "1", "start_time_ticks": 2}', '{"pid": 1, "start_time_ticks": 2}'],
    )
    async def test_garbage_ends_nothing(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "p2pd.json").write_text(text)
        assert await end_leftover(tmp_path / "p2pd.json", tmp_path / "p2pd.sock", PEER) is None

    async def test_no_record(self, tmp_path: Path) -> None:
        assert await end_leftover(tmp_path / "p2pd.json", tmp_path / "p2pd.sock", PEER) is None

    async def test_another_process_with_that_pid_is_left_alone(self, tmp_path: Path) -> None:
        record = {"pid": os.getpid(), "start_time_ticks": (start_time(os.getpid()) or 0) + 1}
        (tmp_path / "p2pd.json").write_text(json.dumps(record))
        assert await end_leftover(tmp_path / "p2pd.json", tmp_path / "p2pd.sock", PEER) is None

    async def test_a_process_that_does_not_answer_as_this_node_is_left_alone(self, tmp_path: Path) -> None:
        write_record(tmp_path / "p2pd.json", os.getpid())
        assert await end_leftover(tmp_path / "p2pd.json", tmp_path / "p2pd.sock", PEER) is None

    async def test_a_process_that_is_gone(self, tmp_path: Path) -> None:
        (tmp_path / "p2pd.json").write_text(json.dumps({"pid": 2**22 + 1, "start_time_ticks": 1}))
        assert await end_leftover(tmp_path / "p2pd.json", tmp_path / "p2pd.sock", PEER) is None
        assert not (tmp_path / "p2pd.json").exists()


class TestNote:
    def test_whoever_attaches_reads_what_was_left(self, tmp_path: Path) -> None:
        write_note(tmp_path / "p2pd.sock", frozenset({"mdns", FEATURE_STDIN_EOF}), "lloom-p2pd 1")
        assert read_note(tmp_path / "p2pd.sock") == (frozenset({"mdns", FEATURE_STDIN_EOF}), "lloom-p2pd 1")

    @pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"features": 1, "version": null}', "[" * 100_000])
    def test_somebody_elses_p2pd_is_taken_for_a_stock_one(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "p2pd.sock.json").write_text(text)
        assert read_note(tmp_path / "p2pd.sock") == (frozenset(), None)


def test_a_p2pd_in_its_own_container_does_not_end_with_standard_input() -> None:
    argv = build_argv(replace(settings(), control_file=Path("/run/lloom/p2pd.sock"), ends_with_parent=False), OURS)
    assert "-listen=/unix/run/lloom/p2pd.sock" in argv
    assert not any(FEATURE_STDIN_EOF in one for one in argv)
