"""lloomctl receipt and usage: what they ask, print, and their exit codes; the admin API's ledger routes behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import golden_vectors as golden
import pytest
import test_admin_fake_node
from test_admin_fake_node import OTHER, FakeBooks, Served, served
from test_cli_lloomctl import run

from lloom_sidecar.admin.books import ExchangeFilter
from lloom_sidecar.admin.client import NodeClient, NodeRefusedError
from lloom_sidecar.protocol.receipt_file import ExportedReceipt

REQUEST = "0a" * 16
RECEIPT = ExportedReceipt(request=golden.REQUEST, receipt=golden.RECEIPT, ack=golden.ACK, salt=golden.SALT)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as one:
        yield one


@pytest.fixture
def books(node: Served) -> FakeBooks:
    return node.node.books


# ---------------------------------------------------------------- list, show
def test_list_shows_what_is_owed_and_why_not(node: Served, books: FakeBooks) -> None:
    done = run(node.home, "receipt", "list")
    assert done.exit_code == 0
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["AT", "ROLE", "PEER", "MODEL", "TOKENS", "COST", "OWED", "ACK", "REQUEST"]
    assert first.split()[2:] == [
        *("client", OTHER, "smollm2:135m", "3+5", "7", "EUR"),
        *("yes", "(lost,", "partial,", "doubtful)", "yes", REQUEST),
    ]
    assert second.split()[2:] == ["executor", OTHER, "smollm2:135m", "-", "-", "no", "(refused)", "no", REQUEST]
    assert books.asked == [(ExchangeFilter(is_doubtful=False), 50)]
    done = run(node.home, "receipt", "list", "--json")
    assert json.loads(done.stdout) == {"receipts": books.rows}


def test_list_asks_for_what_is_wanted(node: Served, books: FakeBooks) -> None:
    flags = ["--role", "executor", "--peer", OTHER[-8:], "--model", "a/b c", "--not-owed", "--doubtful", "--limit", "3"]
    assert run(node.home, "receipt", "list", *flags).exit_code == 0
    wanted = ExchangeFilter(role="executor", peer=OTHER, model="a/b c", is_owed=False, is_doubtful=True)
    assert books.asked == [(wanted, 3)]
    books.rows.clear()
    done = run(node.home, "receipt", "list", "--owed")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no such exchange" in done.stderr


def test_show(node: Served, books: FakeBooks) -> None:
    done = run(node.home, "receipt", "show", REQUEST)
    assert done.exit_code == 0
    first, second = done.stdout.split("\n\n")
    assert "nothing was signed" in first
    assert "no (refused)" in first
    assert "too many" in second
    assert json.loads(run(node.home, "receipt", "show", REQUEST, "--json").stdout) == {"receipts": books.rows}
    done = run(node.home, "receipt", "show", "0b" * 16)
    assert (done.exit_code, "has no exchange of request" in done.stderr) == (1, True)
    done = run(node.home, "receipt", "show", "zz")
    assert (done.exit_code, "no request id" in done.stderr) == (1, True)


# ---------------------------------------------------------------- export, verify
def test_export_and_verify_without_a_node(
    node: Served, books: FakeBooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_admin_fake_node, "EXPORTED", [RECEIPT.as_dict()])
    done = run(node.home, "receipt", "export", REQUEST, "--with-salt", "--role", "client")
    assert done.exit_code == 0
    assert books.asked == [(bytes.fromhex(REQUEST), "client", True)]
    file, body, answer = tmp_path / "r.json", tmp_path / "body", tmp_path / "answer"
    file.write_text(done.stdout)
    body.write_bytes(golden.BODY)
    answer.write_bytes(golden.ANSWER)
    nowhere = tmp_path / "nowhere"
    done = run(nowhere, "receipt", "verify", str(file), "--body", str(body), "--answer", str(answer))
    assert (done.exit_code, done.stderr) == (0, "")
    assert "WRONG" not in done.stdout
    assert done.stdout.endswith("every check holds\n")
    assert str(golden.EXECUTOR.peer) in done.stdout
    assert not nowhere.exists()
    answer.write_bytes(golden.ANSWER + b"!")
    done = run(nowhere, "receipt", "verify", str(file), "--answer", str(answer), "--json")
    assert done.exit_code == 1
    (found,) = json.loads(done.stdout)["receipts"]
    assert (found["holds"], found["kind"], found["states"]["cost"]) == (False, "receipt", 1)
    assert [one["name"] for one in found["checks"] if one["holds"] is False] == ["answer"]


def test_verify_of_several_says_which_is_wrong(tmp_path: Path) -> None:
    forged = ExportedReceipt(request=golden.REQUEST, receipt=golden.RECEIPT[:-1] + b"\x00")
    file = tmp_path / "r.json"
    file.write_text(json.dumps([RECEIPT.as_dict(), forged.as_dict()]))
    done = run(tmp_path, "receipt", "verify", str(file))
    assert done.exit_code == 1
    first, second = done.stdout.split("\n\n")
    assert first.endswith("every check holds")
    assert "WRONG  receipt" in second
    assert second.endswith("this receipt does not hold\n")


def test_verify_of_what_is_no_file_of_receipts(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text("{}")
    done = run(tmp_path, "receipt", "verify", str(file))
    assert (done.exit_code, "holds no receipts" in done.stderr) == (1, True)
    done = run(tmp_path, "receipt", "verify", str(tmp_path / "none"))
    assert (done.exit_code, "cannot be read" in done.stderr) == (1, True)


def test_export_of_what_was_never_signed(node: Served) -> None:
    done = run(node.home, "receipt", "export", REQUEST)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nothing was signed" in done.stderr


# ---------------------------------------------------------------- usage
def test_usage(node: Served, books: FakeBooks) -> None:
    done = run(node.home, "usage", "--by", "peer", "--role", "client", "--since", "2026-11-01", "--until", "2026-11-25")
    assert done.exit_code == 0
    assert done.stdout.split() == [
        *("ROLE", "PEER", "EXCHANGES", "OWED", "PROMPT", "COMPLETION", "COST"),
        *("client", "smollm2:135m", "3", "2", "4", "5", "6", "EUR"),
    ]
    since, until = (int(datetime(2026, 11, day, tzinfo=UTC).timestamp() * 1000) for day in (1, 25))
    assert books.asked == [("peer", "client", since, until)]
    done = run(node.home, "usage", "--since", "30d", "--json")
    assert json.loads(done.stdout)["usage"][0]["cost"] == 6
    done = run(node.home, "usage", "--role", "executor")
    assert (done.stdout, done.stderr) == ("", "nothing in the ledger for that\n")
    for flags in (["--since", "yesterday"], ["--until", "99999d"], ["--by", "week"]):
        assert run(node.home, "usage", *flags).exit_code == 2


def test_without_a_node_they_say_so(tmp_path: Path) -> None:
    for words in (["receipt", "list"], ["receipt", "show", REQUEST], ["receipt", "export", REQUEST], ["usage"]):
        assert run(tmp_path / "none", *words).exit_code == 3


# ---------------------------------------------------------------- the routes
@pytest.mark.parametrize(
    ("path", "phrase"),
    [
        ("/v1/receipts?role=validator", "role"),
        ("/v1/receipts?owed=yes", "owed"),
        ("/v1/receipts?limit=1001", "limit"),
        ("/v1/receipts?before=-1", "before"),
        ("/v1/receipts?request=0A", "no request id"),
        ("/v1/receipts?peer=x", "no peer id"),
        ("/v1/receipts/xx/export", "no request id"),
        ("/v1/usage?by=week", "by"),
        ("/v1/usage?since_ms=99999999999999999999", "since_ms"),
    ],
)
def test_a_wrong_query_is_400_with_a_sentence(node: Served, path: str, phrase: str) -> None:
    with NodeClient.for_home(node.home) as client, pytest.raises(NodeRefusedError, match=phrase) as caught:
        client._get(path)
    assert caught.value.http_status == 400
