"""The documents say what the code does: generated pages are current, names that they use exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lloom_sidecar.config import describe_settings
from lloom_sidecar.protocol import names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / ".github/CONTRIBUTING.md"]


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/generate_docs.py"), "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_variables_in_pages_exist(page: Path) -> None:
    docs = describe_settings()
    variables = {doc.env for doc in docs} | {"LLOOM_CONFIG", "LLOOM_CACHE", "LLOOM_NODE", "LLOOM_P2PD_PREBUILT"}
    variables |= {"LLOOM_TEST_P2PD", "LLOOM_UPSTREAM_P2PD", "LLOOM_API_PORT"}
    assert set(re.findall(r"LLOOM_[A-Z0-9_]*[A-Z0-9]", page.read_text())) <= variables


def test_the_wire_spec_names_every_name() -> None:
    text = (ROOT / "lloom_sidecar/protocol/PROTOCOL.md").read_text()
    for name in (
        names.PROTOCOL_REQUEST,
        names.PROTOCOL_HELLO,
        names.TOPIC_EXECUTORS,
        names.TOPIC_NETWORK,
        names.SERVICE_EXECUTOR,
        names.SERVICE_VALIDATOR,
        names.service_model(""),
        names.IDENTIFY_PROTOCOL_VERSION,
        *(kind.domain for kind in names.ALL_KINDS),
        *(kind.payload_type.decode() for kind in names.ALL_KINDS),
    ):
        assert name in text, name


def test_make_targets_in_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= targets, page.name
