"""``lloomctl top``'s rates and one look; ``lloomctl chat`` without an API to talk to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_admin_fake_node import Served, served

from lloom_sidecar.cli.ctl_top import WINDOW_S, Meter
from lloom_sidecar.cli.lloomctl import root


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as one:
        yield one


def run(home: Path, *args: str, stdin: str | None = None) -> Result:
    clean = {"LLOOM_HOME": None, "LLOOM_NODE": None, "LLOOM_API_KEY_FILE": None}
    return CliRunner(env=clean).invoke(root, ["--home", str(home), *args], input=stdin, prog_name="lloomctl")


def test_rates_are_means_over_the_window_and_begin_anew_after_a_restart() -> None:
    meter = Meter()
    assert meter.add(100.0, 10, 1000, 5.0) == (0.0, 0.0, None)
    assert meter.add(102.0, 14, 1100, 6.0) == (2.0, 50.0, 0.5)
    assert meter.add(100.0 + WINDOW_S + 1, 14, 1100, None)[2] is None
    requests, tokens, _ = meter.add(102.0 + WINDOW_S, 29, 1400, 7.0)
    assert requests == pytest.approx(15 / WINDOW_S)
    assert tokens == pytest.approx(300 / WINDOW_S)
    assert meter.add(200.0, 1, 5, 0.1) == (0.0, 0.0, None)


def test_one_look(node: Served) -> None:
    done = run(node.home, "top", "--once", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["requests_per_s"] == 0.0
    assert found["tokens_per_s"] == 0.0
    words = run(node.home, "top", "--once")
    assert "requests per s" in words.stdout


def test_chat_says_when_the_api_does_not_answer(node: Served) -> None:
    done = run(node.home, "chat", "-q", "Hello")
    assert done.exit_code == 1
    assert "does not answer" in done.stderr
    assert done.stdout == ""


def test_chat_needs_a_question_when_nobody_can_type(node: Served, tmp_path: Path) -> None:
    assert run(node.home, "chat", "--api-key-file", str(tmp_path / "none"), stdin="x").exit_code == 1
    (tmp_path / "empty").write_text("# none\n")
    assert "holds no key" in run(node.home, "chat", "--api-key-file", str(tmp_path / "empty"), stdin="x").stderr
