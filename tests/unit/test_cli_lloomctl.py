"""lloomctl: what it prints, where, and its exit codes. The node is a fake one behind a real socket."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from test_admin_fake_node import ADDR, OTHER, PEER, Served, served

from lloom_sidecar.admin.events import ExecutorDiscovered, ResponseReceived
from lloom_sidecar.cli import output
from lloom_sidecar.cli.lloomctl import COMMANDS, root
from lloom_sidecar.cli.network_files import network_key_path, parse_duration, reachable_addrs
from lloom_sidecar.config import read_bootstrap_file
from lloom_sidecar.identity import init_home, load_network_keys
from lloom_sidecar.protocol.network_key import Invite

VALIDATOR = f"/dns4/node.example.org/tcp/4001/p2p/{PEER}"


def run(home: Path, *args: str, stdin: str | None = None) -> Result:
    clean = {"LLOOM_HOME": None, "LLOOM_NODE": None}
    return CliRunner(env=clean).invoke(root, ["--home", str(home), *args], input=stdin, prog_name="lloomctl")


def commands(
    group: click.Command = root, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, group
    if isinstance(group, click.Group):
        ctx = click.Context(group)
        for name in group.list_commands(ctx):
            found = group.get_command(ctx, name)
            assert found is not None
            yield from commands(found, (*words, name))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One node for all tests that only read."""
    with served(tmp_path_factory.mktemp("home")) as one:
        one.node.health.set("few_peers", "0 of 1 peers")
        one.call(lambda: one.node.events.publish(ExecutorDiscovered(OTHER, ("smollm2:135m",), "gossip")))
        yield one


# --- form


def test_every_command_has_json_and_an_example() -> None:
    for words, command in commands():
        if not words or isinstance(command, click.Group):
            continue
        assert command.epilog, words
        assert "Example" in command.epilog
        assert f"lloomctl {' '.join(words)}" in command.epilog
        if words != ("completion",):
            assert "--json" in {name for one in command.params for name in one.opts}, words
    for words, command in commands():
        text = command.get_short_help_str(limit=80)
        assert text.endswith("."), words
        assert not text.endswith("..."), words


def test_the_root_help_says_what_the_commands_say() -> None:
    for name, lazy in COMMANDS.items():
        command = root.get_command(click.Context(root), name)
        assert command is not None
        assert (command.name, command.get_short_help_str(limit=200)) == (name, lazy.help)


def test_help_is_quick_because_it_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lloom_sidecar.cli.lloomctl import root\nroot(['--help'], standalone_mode=False)\n"
        "slow = {'httpx', 'rich', 'starlette', 'trio', 'multiaddr', 'nacl', 'google.protobuf', 'asyncio'}\n"
        "bad = slow & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "completion" in done.stdout


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["pear"], "no such command: pear; did you mean peer?"),
        (["peer", "lst"], "no such command: lst; did you mean list?"),
        (["status", "--jsn"], "--jsn"),
        (["network", "rotate", "--keep-old", "soon"], "is not a time such as 24h"),
        (["network", "join"], "FILE"),
        (["network", "join", "lloom-invite-1:abc"], "an invite is a secret"),
        (["completion", "tcsh"], "tcsh"),
        (["--node", "http://x", "status"], "exclude each other"),
    ],
)
def test_wrong_usage_is_exit_2(tmp_path: Path, args: list[str], text: str) -> None:
    done = run(tmp_path, *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert text in done.stderr


def test_a_node_address_of_another_form_is_wrong_usage(tmp_path: Path) -> None:
    done = CliRunner(env={"LLOOM_HOME": None}).invoke(root, ["--node", "ftp://x", "status"])
    assert done.exit_code == 2
    assert "expected unix:PATH or http://HOST:PORT" in done.stderr


@pytest.mark.parametrize(
    "args",
    [["status"], ["peer", "list"], ["model", "list"], ["executor", "list"], ["executor", "drain"], ["events"],
     ["config", "show"], ["peer", "connect", ADDR], ["status", "--json"], ["peer", "ping", PEER], ["gossip", "topics"],
     ["peer", "disconnect", OTHER[-8:]], ["model", "show", "m"], ["model", "query", PEER],
     ["model", "quote", PEER, "m"], ["executor", "show", PEER], ["bootstrap", "list"], ["bootstrap", "add", ADDR],
     ["bootstrap", "rm", PEER], ["dht", "findprovs", "--model", "m"], ["dht", "provide", "/x"],
     ["dht", "closest", PEER],
     ["dht", "findpeer", PEER], ["dht", "get", PEER], ["dht", "put", "--own"], ["gossip", "peers", "network"]],
)  # fmt: skip
def test_without_a_node_the_exit_is_3_with_the_next_step(tmp_path: Path, args: list[str]) -> None:
    done = run(tmp_path, *args)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == (
        f"error: no node runs in {tmp_path}: start one with `lloom-sidecar run --home {tmp_path} --role client`, "
        "or name another with --home or --node\n"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(tmp_path: Path, shell: str) -> None:
    done = run(tmp_path, "completion", shell)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"_LLOOMCTL_COMPLETE={shell}_complete" in done.stdout


def test_completion_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.shell_completion import ShellComplete

    complete = ShellComplete(root, {}, "lloomctl", "_LLOOMCTL_COMPLETE")
    assert [one.value for one in complete.get_completions(["network"], "jo")] == ["join"]


# --- reading a node


def test_status(node: Served) -> None:
    done = run(node.home, "status")
    assert (done.exit_code, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"""\
peer        {PEER}
version     0.1.0, up 1h 2m
roles       client
home        /srv/lloom
network     {"ab" * 32}
p2pd        managed, up, version 0.1.0, pid 42, 1 restart
api         http://127.0.0.1:4880 (ready)
addresses   {ADDR}
peers       2 connected, 1 member
validators  1 of 1 connected
offers      1 model at 1 executor
requests    1 in flight, 0 queued; 7 served, 2 failed, 0 cancelled

warning few_peers: 0 of 1 peers
  Check that this machine reaches the network; min_peers is the wanted number.
"""
    )


def test_what_validators_say_of_the_network(node: Served) -> None:
    done = run(node.home, "network", "status")
    assert (done.exit_code, done.stdout, "`lloomctl bootstrap list`" in done.stderr) == (0, "", True)
    free = {"prompt_per_million": 0, "completion_per_million": 0, "currency": ""}
    models = [
        {
            "id": "m",
            "executors": 20,
            "slots": 160,
            "median_price": {**free, "prompt_per_million": 15, "currency": "EUR"},
        },
        {"id": "n", "executors": 1, "slots": 8, "median_price": free},
    ]
    said = {
        "peer": OTHER,
        "age_s": 12.4,
        "current": True,
        "executors": 20,
        "members": 40,
        "models_total": 3,
        "models": models,
        "software": [{"software": "lloom/0.1.0", "nodes": 39}, {"software": "lloom/0.2.0", "nodes": 1}],
        "in_flight": 7,
        "queued": 2,
        "slots": 160,
    }
    node.node.said = [said, {**said, "peer": PEER, "current": False, "executors": 21}]  # type: ignore[list-item, typeddict-item]
    done = run(node.home, "network", "status")
    validators, _, offered = done.stdout.partition("\n\n")
    assert [line.split()[1:] for line in validators.splitlines()[1:]] == [
        ["12s", "ago", "20", "40", "7/160", "2", "39", "x", "lloom/0.1.0,", "1", "x", "lloom/0.2.0"],
        [
            "12s",
            "ago,",
            "out",
            "of",
            "date",
            "21",
            "40",
            "7/160",
            "2",
            "39",
            "x",
            "lloom/0.1.0,",
            "1",
            "x",
            "lloom/0.2.0",
        ],
    ]
    assert [line.split() for line in offered.splitlines()[1:]] == [
        ["m", "20", "160", "15/0", "EUR"],
        ["n", "1", "8", "free"],
    ]
    assert done.stderr == "and 1 more models\n"
    assert json.loads(run(node.home, "network", "status", "--json").stdout) == {"network_status": node.node.said}
    lines = run(node.home, "status").stdout.splitlines()
    assert f"network says  …{OTHER[-8:]} 12s ago: 20 executors, 40 members, 3 models, 7 of 160 slots busy" in lines
    assert (
        f"              …{PEER[-8:]} 12s ago, out of date: 21 executors, 40 members, 3 models, 7 of 160 slots busy"
        in lines
    )


def test_lists_are_tables_that_nothing_is_cut_from(node: Served) -> None:
    assert run(node.home, "peer", "list").stdout.splitlines() == [
        "PEER                                                  ROLES     PATH    MEMBER  LEASE  LEFT     RTT  SOFTWARE     SOURCE",  # noqa: E501
        f"{OTHER}  executor  direct  yes     fresh   25s  12.3ms  lloom/0.1.0  gossip",
        f"{PEER}  -         -       no      -         -       -  -            dht",
    ]
    assert run(node.home, "model", "list").stdout.splitlines()[1].split() == (
        ["smollm2:135m", OTHER, "fresh", "2048", "1/4", "0", "80ms", "41.3", "10/30", "EUR", "chat"]
    )
    assert run(node.home, "executor", "list").stdout.splitlines()[1].split() == (
        [OTHER, "suspect", "2s", "relayed", "yes", "closed", "1", "0", "smollm2:135m", "lloom/0.1.0"]
    )
    assert run(node.home, "config", "show", "--changed").stdout.splitlines()[1].split() == (
        ["roles", "client", "flag", "LLOOM_ROLES", "--role"]
    )


def test_json_is_what_the_node_said(node: Served) -> None:
    fake = node.node
    for args, expected in (
        (["status"], fake.status()),
        (["peer", "list"], {"peers": fake.peers()}),
        (["peer", "list", "--connected"], {"peers": fake.peers()[:1]}),
        (["model", "list"], {"models": fake.models()}),
        (["model", "list", "none"], {"models": []}),
        (["executor", "list"], {"executors": fake.executors()}),
        (["config", "show"], {"settings": fake.config_effective(), "p2pd": fake.operations.p2pd_effective()}),
    ):
        done = run(node.home, *args, "--json")
        assert (done.exit_code, done.stderr, json.loads(done.stdout)) == (0, "", expected)


def test_an_empty_list_is_words_on_stderr(node: Served) -> None:
    done = run(node.home, "model", "list", "none")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "no executor offers none: `lloomctl model list` shows what is offered\n"


def test_what_others_say_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with served(tmp_path) as one:
        one.node.software = "evil\x1b[2J\x9b1m\n[red]"
        for noun in ("peer", "executor"):
            shown = run(tmp_path, noun, "list").stdout
            assert "evil\\x1b[2J\\x9b1m\\n[red]" in shown
            assert "\x1b" not in shown
        assert "\x9b" not in run(tmp_path, "peer", "list", "--json").stdout


def test_id_from_the_home_and_from_a_node(node: Served, tmp_path: Path) -> None:
    assert run(tmp_path, "id").exit_code == 1
    assert "lloom-sidecar init" in run(tmp_path, "id").stderr
    signer, _ = init_home(tmp_path / "home")
    assert run(tmp_path / "home", "id").stdout == f"{signer.peer}\n"
    env = {"LLOOM_HOME": None, "LLOOM_NODE": f"unix:{node.home}/run/admin.sock"}
    assert json.loads(CliRunner(env=env).invoke(root, ["id", "--json"]).stdout) == {"peer": PEER}
    # --home wins over LLOOM_NODE
    assert CliRunner(env=env).invoke(root, ["--home", str(tmp_path / "home"), "id"]).stdout == f"{signer.peer}\n"


def test_actions(node: Served) -> None:
    done = run(node.home, "peer", "connect", ADDR)
    assert done.stdout == f"{OTHER} connected, direct, a member\n"
    failed = run(node.home, "peer", "connect", f"/ip4/192.0.2.66/tcp/1/p2p/{PEER}")
    assert (failed.exit_code, failed.stderr) == (1, "error: the peer at 192.0.2.66 does not answer\n")
    before = node.node.drained
    assert run(node.home, "executor", "drain").stdout == ""
    assert json.loads(run(node.home, "executor", "drain", "--json").stdout) == {"draining": True}
    assert node.node.drained == before + 2


def test_events_of_the_past(node: Served) -> None:
    done = run(node.home, "events", "--kind", "executor_discovered")
    assert done.stdout == (
        f"2023-11-14T22:13:20.000Z  executor_discovered     peer={OTHER}  models=smollm2:135m  source=gossip\n"
    )
    assert json.loads(run(node.home, "events", "--json").stdout.splitlines()[0])["sequence"] == 1
    assert run(node.home, "events", "--kind", "weather").exit_code == 1


def test_followed_events_end_with_the_node(tmp_path: Path) -> None:
    with served(tmp_path) as one:

        def act() -> None:
            while not one.node.events.readers:
                time.sleep(0.005)  # noqa: TID251 - another thread than the loop's
            one.call(lambda: one.node.events.publish(ResponseReceived("r1", "m", peer=OTHER, duration_s=1.23456)))
            one.stop()

        thread = threading.Thread(target=act)
        thread.start()
        done = run(tmp_path, "events", "--follow")
        thread.join(10)
    assert done.exit_code == 3
    assert "response_received       request_id=r1  model=m  role=client" in done.stdout
    assert "duration_s=1.235" in done.stdout
    assert done.stderr == "error: the node ended the stream: it is stopping\n"


# --- networks


def create(home: Path) -> str:
    done = run(home, "network", "create")
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_create_writes_a_private_key_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    network = create(home)
    path = network_key_path(home)
    assert network == load_network_keys(path).current.network_id.hex()
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    again = run(home, "network", "create")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "belongs to a network already" in again.stderr
    assert path.read_bytes() == before


def test_an_invite_leads_another_home_into_the_network(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    network = create(a)
    done = run(a, "network", "invite", "--validator", VALIDATOR)
    assert done.stdout.count("\n") == 1
    joined = run(b, "network", "join", "-", stdin=done.stdout)
    assert (joined.exit_code, joined.stdout.strip()) == (0, network)
    assert [str(one) for one in read_bootstrap_file(b / "bootstrap")] == [VALIDATOR]
    assert (b / "bootstrap").stat().st_mode & 0o777 == 0o600
    assert load_network_keys(b / "network.key").current == load_network_keys(a / "network.key").current
    again = json.loads(run(b, "network", "join", "-", "--json", stdin=done.stdout).stdout)
    assert again == {"network": network, "joined": False, "validators_added": []}
    shown = json.loads(run(b, "network", "show", "--json").stdout)
    assert (shown["network"], shown["validators"], shown["previous_key_until"]) == (network, [VALIDATOR], None)
    # b invites on with what it joined through
    assert Invite.decode(run(b, "network", "invite").stdout) == Invite.decode(done.stdout)


def test_an_invite_can_go_into_a_new_private_file(tmp_path: Path) -> None:
    create(tmp_path / "a")
    out = tmp_path / "invite"
    args = ("network", "invite", "--validator", VALIDATOR, "--out", str(out))
    assert run(tmp_path / "a", *args).stdout == ""
    assert out.stat().st_mode & 0o777 == 0o600
    assert "exists: name a new file" in run(tmp_path / "a", *args).stderr
    assert run(tmp_path / "b", "network", "join", str(out)).exit_code == 0


def test_a_wrong_invite_changes_nothing(tmp_path: Path) -> None:
    create(tmp_path / "a")
    text = run(tmp_path / "a", "network", "invite", "--validator", VALIDATOR).stdout.strip()
    wrong = text[:-9] + ("a" if text[-9] != "a" else "b") + text[-8:]
    for bad, words in ((wrong, "checksum"), (text[:-20], "cut off"), ("", "empty"), ("x", "not a Lloom invite")):
        done = run(tmp_path / "b", "network", "join", "-", stdin=bad)
        assert (done.exit_code, done.stdout) == (1, "")
        assert words in done.stderr
    assert not (tmp_path / "b").exists()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "it is not text" in run(tmp_path / "b", "network", "join", str(tmp_path / "binary")).stderr
    assert "cannot be read" in run(tmp_path / "b", "network", "join", str(tmp_path / "none")).stderr


def test_another_network_is_taken_only_when_asked(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    create(a)
    create(b)
    old = f"/ip4/192.0.2.1/tcp/4001/p2p/{OTHER}"
    (b / "bootstrap").write_text(old)
    invite = run(a, "network", "invite", "--validator", VALIDATOR).stdout
    refused = run(b, "network", "join", "-", stdin=invite)
    assert (refused.exit_code, "--replace" in refused.stderr) == (1, True)
    assert [str(one) for one in read_bootstrap_file(b / "bootstrap")] == [old]
    assert run(b, "network", "join", "-", "--replace", stdin=invite).exit_code == 0
    # another network's validators are trusted no more
    assert [str(one) for one in read_bootstrap_file(b / "bootstrap")] == [VALIDATOR]


def test_rotate_keeps_the_old_key_for_a_while(tmp_path: Path) -> None:
    network = create(tmp_path)
    done = run(tmp_path, "network", "rotate", "--keep-old", "2h")
    assert (done.exit_code, done.stdout.strip() != network) == (0, True)
    keys = load_network_keys(tmp_path / "network.key")
    assert keys.previous is not None
    assert keys.previous.network_id.hex() == network
    assert abs(keys.previous_until_ms / 1000 - time.time() - 7200) < 60
    assert json.loads(run(tmp_path, "network", "show", "--json").stdout)["previous_key_until"] is not None
    gone = run(tmp_path, "network", "rotate", "--keep-old", "0")
    assert "accepted no more" in gone.stderr
    assert load_network_keys(tmp_path / "network.key").previous is None
    assert run(tmp_path / "none", "network", "rotate").exit_code == 1


def test_a_running_validator_is_what_an_invite_names(tmp_path: Path) -> None:
    network = create(tmp_path)
    alone = run(tmp_path, "network", "invite")
    assert (alone.exit_code, "--validator MULTIADDR" in alone.stderr) == (3, True)
    with served(tmp_path) as one:
        one.node.network_id = network
        assert "is no validator" in run(tmp_path, "network", "invite").stderr
        one.node.roles = ["validator"]
        one.node.addrs = [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}", ADDR]
        done = run(tmp_path, "network", "invite")
        assert [str(addr) for addr in Invite.decode(done.stdout).validators] == [ADDR]
        one.node.network_id = "cd" * 32
        assert "another network" in run(tmp_path, "network", "invite").stderr
    assert run(tmp_path, "network", "invite", "--validator", "/ip4/192.0.2.1/tcp/1").exit_code == 2


def test_no_command_prints_the_key(tmp_path: Path) -> None:
    create(tmp_path)
    secret = network_key_path(tmp_path).read_text().partition("current: ")[2].partition("\n")[0]
    for args in (["show"], ["show", "--json"], ["create"], ["rotate", "--json"]):
        assert secret not in run(tmp_path, "network", *args).output


# --- config check


def test_config_check_lists_every_fault(tmp_path: Path) -> None:
    create(tmp_path)
    file = tmp_path / "config.toml"
    file.write_text('min_pears = 1\napi = "x"\n')
    done = run(tmp_path, "config", "check", "--role", "client")
    assert (done.exit_code, done.stdout, done.stderr.count("error: ")) == (2, "", 2)
    assert json.loads(run(tmp_path, "config", "check", "--json").stdout)["ok"] is False
    file.write_text('roles = ["client"]\n')
    assert (run(tmp_path, "config", "check", str(file)).exit_code) == 0


# --- small parts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.9, "59s"), (60, "1m"), (200, "3m 20s"), (3600, "1h"), (93_784, "1d 2h"), (-3, "0s")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text


def test_times_to_keep_a_key() -> None:
    assert [parse_duration(one) for one in ("24h", "30m", "7d", "90s", "0")] == [86400, 1800, 604800, 90, 0]
    for bad in ("", "1", "h", "-1h", "31d", "1h30m", "24H"):
        with pytest.raises(ValueError, match="is not a time"):
            parse_duration(bad)


def test_loopback_addresses_are_for_demos_only() -> None:
    local = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"
    assert [str(one) for one in reachable_addrs([local, ADDR])] == [ADDR]
    assert [str(one) for one in reachable_addrs([local])] == [local]
    assert reachable_addrs(["/ip4/192.0.2.1/tcp/1"]) == ()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, *row: object) -> str:
    """What TABLE with one row looks like on a terminal of 80 columns."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    with monkeypatch.context() as patch:
        # Not by a fixture: pytest puts its own stdout in place between fixtures and test.
        patch.setattr(sys, "stdout", terminal)
        output.print_table(TABLE, [row], empty="")
        assert not output.wants_colour()
    return terminal.getvalue()


TABLE = (
    output.Column("PEER", is_id=True),
    output.Column("TEXT"),
    output.Column("N", is_number=True),
    output.Column("MORE", is_minor=True),
)


def test_a_table_with_room_keeps_ids_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(monkeypatch, PEER, "[bold]a", 7, "more")
    assert PEER in shown
    assert "[bold]a" in shown
    assert "more" in shown


def test_a_table_without_room_shows_the_ends_of_ids(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = on_terminal(monkeypatch, PEER, "x" * 30, 7, "more")
    assert PEER not in shown
    assert f"{output.SHORT_MARK}{PEER[-8:]}" in shown
    assert "more" in shown
    assert capsys.readouterr().err == ""


def test_a_table_leaves_out_what_matters_least(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = on_terminal(monkeypatch, PEER, "a long text that is folded " * 3, 7, "more")
    assert "folded" in shown
    assert "more" not in shown
    assert capsys.readouterr().err == "(no room for MORE)\n"
    assert all(len(line) <= 80 for line in shown.splitlines()[1:])  # the first has escapes for bold
