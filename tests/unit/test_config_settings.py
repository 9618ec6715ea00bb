"""The settings: sources and their order, every fault at once, and the table that documentation is made from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.config import (
    Config,
    HostPort,
    describe_settings,
    load_config,
    read_bootstrap_file,
    read_secret_lines,
    resolve_home,
)
from lloom_sidecar.errors import ConfigError
from lloom_sidecar.protocol.network_key import NetworkKey, format_key_file

PEER = "12D3KooWPzmtXC6iEAcbKV56WtQfWX2pcKhGDhxJQxG9aREpCEoU"
VALIDATOR = f"/dns4/node.example.org/tcp/4001/p2p/{PEER}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that belongs to a network."""
    (tmp_path / "network.key").write_bytes(format_key_file(NetworkKey(bytes(32))))
    return tmp_path


def load(home: Path, env: dict[str, str] | None = None, /, **flags: Any) -> Config:
    return load_config({"roles": ("client",), "home": str(home), **flags}, env=env or {})


def faults(home: Path, env: dict[str, str] | None = None, /, **flags: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(home, env, **flags)
    return caught.value.faults


# --- sources


def test_defaults(home: Path) -> None:
    config = load(home)
    assert (str(config.api), str(config.probe)) == ("127.0.0.1:4880", "127.0.0.1:4881")
    assert [str(one) for one in config.listen] == ["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1"]
    assert config.network_key_file == home / "network.key"
    assert config.has_network_key
    assert (config.heartbeat_s, config.grace_s, config.bootstrap, config.is_dht_server) == (10.0, 30.0, (), False)
    assert config.warnings == ()


def test_flags_win_over_the_environment_over_the_file_over_defaults(home: Path) -> None:
    (home / "config.toml").write_text('min_peers = 2\nqueue_limit = 3\ngrace_s = 4\nlog_level = "debug"\n')
    config = load(home, {"LLOOM_MIN_PEERS": "5", "LLOOM_QUEUE_LIMIT": "6"}, min_peers="7")
    assert (config.min_peers, config.queue_limit, config.grace_s, config.slots) == (7, 6, 4.0, None)
    assert config.config_file == home / "config.toml"
    sources = {one["name"]: one["source"] for one in config.effective()}
    assert (sources["min_peers"], sources["queue_limit"], sources["grace_s"]) == ("flag", "env", "file")
    assert sources["slots"] == "default"


def test_lists_are_comma_separated_in_the_environment_and_keep_their_order(home: Path) -> None:
    env = {"LLOOM_ALLOWED_HOSTS": "b.example, a.example,,b.example"}
    assert load(home, env).allowed_hosts == ("b.example", "a.example")


def test_an_empty_variable_and_an_absent_flag_are_not_set(home: Path) -> None:
    config = load(home, {"LLOOM_MIN_PEERS": "", "LLOOM_BACKEND": ""}, bootstrap=(), slots=None)
    assert (config.min_peers, config.backend, config.bootstrap) == (1, None, ())


def test_a_switch_can_be_turned_off_by_a_flag(home: Path) -> None:
    assert load(home, {"LLOOM_OPEN": "yes"}).open
    assert not load(home, {"LLOOM_OPEN": "yes"}, open=False).open


def test_the_file_can_be_named(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("etc") / "lloom.toml"
    path.write_text(f'home = "{home}"\nroles = ["client"]\nprobe = "off"\n')
    for config in (load_config(env={"LLOOM_CONFIG": str(path)}), load_config(env={}, config_file=path)):
        assert (config.home, config.roles, config.probe) == (home, ("client",), None)


def test_joined_validators_are_the_default_of_bootstrap(home: Path) -> None:
    (home / "bootstrap").write_text(f"# ours\n\n{VALIDATOR}  # first\n{VALIDATOR}\n")
    config = load(home)
    assert [str(one) for one in config.bootstrap] == [VALIDATOR]
    assert {one["name"]: one["source"] for one in config.effective()}["bootstrap"] == "joined"
    other = VALIDATOR.replace("node", "other")
    assert [str(one) for one in load(home, bootstrap=(other,)).bootstrap] == [other]


def test_dnsaddr_is_an_address_of_a_validator(home: Path) -> None:
    addr = f"/dnsaddr/bootstrap.example.org/p2p/{PEER}"
    assert [str(one) for one in load(home, bootstrap=addr).bootstrap] == [addr]


def test_paths_are_made_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "keys").write_text("secret\n")
    assert load(home, api_key_file="keys").api_key_file == home / "keys"
    assert resolve_home("x", {}) == home / "x"
    assert resolve_home(None, {"LLOOM_HOME": "/a"}) == Path("/a")
    assert resolve_home(None, {}) == Path.home() / ".local/share/lloom"


def test_places_and_consequences(home: Path) -> None:
    config = load(home)
    assert config.admin_socket == home / "run" / "admin.sock"
    assert str(config.control_address) == f"/unix{home}/run/control.sock"
    assert config.handler_path == home / "run" / "handler.sock"
    attached = load(home, p2pd_control="/unix/run/both/control.sock")
    assert attached.is_attached
    assert attached.handler_path == Path("/run/both/handler.sock")
    assert load(home, handler_socket="/x/h.sock").handler_path == Path("/x/h.sock")
    executor = load(home, roles=("executor",), model="builtin", price_prompt="5", price_currency="EUR")
    assert executor.is_dht_server
    assert executor.price.prompt_per_million == 5
    assert not load(home, roles=("executor",), model="builtin", dht="client").is_dht_server


# --- faults


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('min_pears = 3\nslots = "4"\napi_key = "x"\nopen = "yes"\n')
    found = faults(
        tmp_path,
        {"LLOOM_BACKEND": "http://user:pw@host/"},
        roles=("client", "exectuor"),
        api="0.0.0.0:80",
        bootstrap=("/ip4/192.0.2.1/tcp/1", "nonsense"),
        max_tokens_default="50000",
        price_prompt="3",
    )
    text = "\n".join(found)
    for part in (
        "min_pears in",
        "did you mean min_peers?",
        "name that with api_key_file",
        "slots in the config file: '4' is of the wrong type (expected: whole number)",
        "open in the config file: 'yes' is of the wrong type",
        "--role: 'exectuor' is none of client, executor, validator; did you mean executor?",
        "LLOOM_BACKEND: the URL holds a password",
        "--bootstrap: '/ip4/192.0.2.1/tcp/1' does not name its node",
        "--bootstrap: not a multiaddr: 'nonsense'",
        "--api: 0.0.0.0:80 can be reached by others",
        "max_tokens_default (50000) is over max_tokens_limit",
        "a price needs its currency",
        "belongs to no network",
    ):
        assert part in text
    assert len(found) == 12
    assert "pw" not in text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"roles": ()}, "no role is given"),
        ({"roles": ("executor",)}, "an executor needs what it serves"),
        ({"roles": ("executor",), "backend": "http://h/v1", "model": "builtin"}, "exclude each other"),
        ({"backend": "http://h/v1"}, "is for executors only"),
        ({"roles": ("executor",), "backend": "ftp://h"}, "is not a URL"),
        ({"roles": ("executor",), "model": "/none.gguf"}, "/none.gguf does not exist"),
        ({"roles": ("executor",), "model": "builtin", "backend_key_file": "/none"}, "no effect without a backend"),
        ({"p2pd": "/bin/sh", "p2pd_control": "/unix/x.sock"}, "exclude each other"),
        ({"p2pd": "/none"}, "/none does not exist"),
        ({"p2pd": "/etc"}, "/etc is not a program"),
        ({"p2pd": "/etc/passwd"}, "is not executable"),
        ({"p2pd_control": "/dns4/x/udp/1"}, "is not p2pd's control address"),
        ({"api_key_file": "/none"}, "/none cannot be read: no such file"),
        ({"api": "4880"}, "is not HOST:PORT"),
        ({"probe": "nowhere"}, "is not HOST:PORT"),
        ({"network_key_file": "/none"}, "there is no network key at /none"),
        ({"network_key_file": "/etc/hostname"}, "cannot be used"),
        ({"listen": ("/dns4/x/tcp/1",)}, "is not an address to listen on"),
        ({"announce_addrs": (VALIDATOR,)}, "is not an address of this node"),
        ({"bootstrap": ("/unix/x",)}, "does not name its node"),
        ({"allow_peers": ("me",)}, "not a peer id"),
        ({"allowed_origins": ("https://a.example/path",)}, "is not an origin"),
        ({"allowed_hosts": ("a.example:80",)}, "is not a host name"),
        ({"model_alias": " x"}, "a space at an end"),
        ({"price_currency": "a euro"}, "is not a currency"),
        ({"model_digests": ("abc",)}, "does not end with a SHA-256"),
        ({"model_digests": ("m=" + "g" * 64,)}, "does not end with a SHA-256"),
        ({"model_digests": (" m=" + "0" * 64,)}, "space at an end"),
        ({"roles": ("executor",), "model": "builtin", "model_digests": ("0" * 64,)}, "the digest is computed"),
        ({"min_peers": "-1"}, "is not a whole number from 0"),
        ({"heartbeat_s": "nan"}, "is not a number of seconds"),
        ({"open": "maybe"}, "is neither true nor false"),
        ({"log_level": "loud"}, "is none of debug"),
        ({"home": "/" + "x" * 200}, "too long"),
    ],
)
def test_faults(home: Path, flags: dict[str, Any], text: str) -> None:
    assert any(text in one for one in faults(home, **flags))


def test_a_file_that_is_no_toml_is_one_fault(home: Path) -> None:
    (home / "config.toml").write_text("min_peers = \n")
    (found,) = faults(home)
    assert "is not TOML" in found
    (home / "config.toml").write_text(f'home = "{home}"\n')
    assert "has no effect" in faults(home)[0]
    with pytest.raises(ConfigError, match="cannot be read: no such file"):
        load_config({"roles": "client", "home": str(home)}, env={}, config_file="/none.toml")


def test_bad_lines_of_the_bootstrap_file_are_faults(home: Path) -> None:
    (home / "bootstrap").write_text(f"{VALIDATOR}\n/ip4/192.0.2.1/tcp/1\nx\n")
    assert [one.partition(": ")[0][-6:] for one in faults(home)] == ["line 2", "line 3"]
    assert read_bootstrap_file(home / "none") == ()


def test_the_status_page_is_not_shown_to_others_by_accident(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"page: 0\.0\.0\.0:4882 can be reached by others"):
        load(home, page="0.0.0.0:4882")
    assert load(home, page="off").page is None
    assert str(load(home, page="0.0.0.0:4882", api_open=True).page) == "0.0.0.0:4882"


def test_a_certificate_needs_its_key(home: Path) -> None:
    for one, lacking in (("cert", "key"), ("key", "cert")):
        with pytest.raises(ConfigError, match=f"needs its counterpart: add --api-tls-{lacking}-file FILE"):
            load(home, **{f"api_tls_{one}_file": str(home / "file")})


def test_the_admin_api_on_tcp_is_local_and_has_a_token(home: Path) -> None:
    (home / "token").write_text("secret\n")
    given = load(home, admin="127.0.0.1:4883", admin_token_file=str(home / "token"))
    assert given.admin == HostPort("127.0.0.1", 4883)
    assert load(home).admin is None
    with pytest.raises(ConfigError, match="admin needs its token: add --admin-token-file FILE"):
        load(home, admin="127.0.0.1:4883")
    with pytest.raises(ConfigError, match=r"admin: 0\.0\.0\.0:4883 can be reached by others"):
        load(home, admin="0.0.0.0:4883", admin_token_file=str(home / "token"))
    with pytest.raises(ConfigError, match="--admin-token-file has no effect without --admin"):
        load(home, admin_token_file=str(home / "token"))
    (home / "token").write_text("\n# none\n")
    with pytest.raises(ConfigError, match="is empty: put the key into it"):
        load(home, admin="127.0.0.1:4883", admin_token_file=str(home / "token"))


def test_a_key_or_api_open_lets_others_reach_the_api(home: Path) -> None:
    (home / "keys").write_text("# apps\n secret-1 \n\nsecret-2\n")
    assert load(home, api="[::]:4880", api_key_file=str(home / "keys")).api == HostPort("::", 4880)
    assert load(home, api="0.0.0.0:4880", api_open=True).api_open
    assert read_secret_lines(home / "keys") == ("secret-1", "secret-2")
    (home / "keys").write_text("# none yet\n")
    assert "is empty" in faults(home, api_key_file=str(home / "keys"))[0]


def test_an_open_node_needs_no_network(tmp_path: Path) -> None:
    assert not load(tmp_path, open=True).has_network_key


def test_a_setting_that_does_not_exist_is_a_bug_of_the_caller(home: Path) -> None:
    with pytest.raises(TypeError, match="not a setting: colour"):
        load(home, colour="red")


def test_unknown_variables_are_warnings_but_not_those_of_kubernetes(home: Path) -> None:
    env = {
        "LLOOM_BACKNED": "x",
        "LLOOM_SERVICE_HOST": "10.0.0.1",
        "LLOOM_PORT": "tcp://10.0.0.1:4880",
        "LLOOM_VALIDATOR_PORT_4001_TCP_ADDR": "10.0.0.1",
        "LLOOM_VALIDATOR_SERVICE_PORT_P2P": "4001",
        "LLOOM_TEST_P2PD": "x",
        "LLOOM_NODE": "x",
    }
    (warning,) = load(home, env).warnings
    assert warning == "LLOOM_BACKNED is not a setting and has no effect; did you mean LLOOM_BACKEND?"


# --- the table


def test_every_field_is_a_setting_with_documentation() -> None:
    docs = describe_settings()
    fields = {one.name for one in dataclasses.fields(Config)} - {"config_file", "sources", "warnings"}
    assert [one.name for one in docs] == [one.name for one in dataclasses.fields(Config) if one.name in fields]
    for one in docs:
        assert one.doc.endswith(".")
        assert one.flag.startswith("--")
        assert one.env == "LLOOM_" + one.name.upper()
        assert one.metavar or one.is_switch
        assert one.group in ("node", "executor", "api", "network", "p2pd")
    for column in ("flag", "env"):
        assert len({getattr(one, column) for one in docs}) == len(docs)


def test_the_flags_of_the_design_exist() -> None:
    flags = {one.flag for one in describe_settings()}
    assert flags >= {
        "--home", "--role", "--backend", "--model", "--bootstrap", "--listen", "--api", "--probe", "--network-key-file",
        "--open", "--p2pd", "--p2pd-control", "--api-key-file", "--api-open", "--allowed-host", "--allowed-origin",
    }  # fmt: skip


def test_effective_settings_are_plain_values(home: Path) -> None:
    import json

    (home / "bootstrap").write_text(VALIDATOR)
    found = json.loads(json.dumps(load(home).effective()))
    values = {one["name"]: one["value"] for one in found}
    assert values["bootstrap"] == [VALIDATOR]
    assert (values["api"], values["home"], values["open"]) == ("127.0.0.1:4880", str(home), False)
    assert set(found[0]) == {"name", "value", "source", "env", "flag"}


@given(st.text("[]:.0129abz%", max_size=30))
def test_no_text_breaks_host_port(text: str) -> None:
    try:
        found = HostPort.parse(text)
    except ValueError:
        return
    assert HostPort.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "is_loopback"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("127.9.9.9:1", True), ("0.0.0.0:1", False),
     ("[::]:1", False), ("10.0.0.1:1", False), ("127.0.0.1.example.org:1", False)],
)  # fmt: skip
def test_loopback(text: str, is_loopback: bool) -> None:
    assert HostPort.parse(text).is_loopback is is_loopback


@given(st.dictionaries(st.sampled_from([one.env for one in describe_settings()]), st.text(max_size=40), max_size=6))
def test_garbage_in_the_environment_is_a_config_error(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"home": "/none", "roles": (), "min_peers": "-1"}, env=env)
    assert all(caught.value.faults)


def test_the_process_environment_is_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in os.environ if one.startswith("LLOOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLOOM_HOME", str(home))
    monkeypatch.setenv("LLOOM_ROLES", "client")
    assert load_config().home == home


def test_the_low_water_mark_is_not_over_the_high_one(home: Path) -> None:
    assert load(home, connections_low="5", connections_high="5").connections_high == 5
    assert faults(home, connections_low="6", connections_high="5") == (
        "connections_low (6) is over connections_high (5)",
    )


def test_digests_of_weights(home: Path) -> None:
    digests = ("A" * 64, "org/m=x=" + "b" * 64)
    config = load(home, roles=("executor",), backend="http://h:1", model_digests=digests)
    assert config.model_digests == ("a" * 64, "org/m=x=" + "b" * 64)
