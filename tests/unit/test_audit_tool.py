"""``make audit``: nothing that was not checked counts as clean."""

from __future__ import annotations

import json

from tools.audit import CLEAN, FOUND, UNCHECKED, judge_govulncheck, judge_pip_audit

SOUND = {"name": "trio", "version": "0.35.0", "vulns": []}
SKIPPED = {"name": "six", "skip_reason": "Dependency not found on PyPI and could not be audited: six (1.17.0)"}
FAULTY = {
    "name": "old",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}],
}


def said(*found: object) -> str:
    return json.dumps({"dependencies": found, "fixes": []})


def test_what_pip_audit_says() -> None:
    assert judge_pip_audit(0, said(SOUND), "") == (CLEAN, ("1 packages, no vulnerability is known",))
    assert judge_pip_audit(1, said(SOUND, FAULTY), "") == (FOUND, ("old 1.0: PYSEC-1, repaired in 1.1",))
    assert judge_pip_audit(1, said(SKIPPED, FAULTY), "").status == FOUND


def test_packages_that_it_skipped_were_not_checked() -> None:
    verdict = judge_pip_audit(0, said(SOUND, SKIPPED), "")
    assert verdict.status == UNCHECKED
    assert "1 of 2 packages are unknown to the advisory service" in verdict.lines[0]
    assert judge_pip_audit(0, said(), "").status == UNCHECKED


def test_a_service_that_does_not_answer_is_told() -> None:
    verdict = judge_pip_audit(1, "", "Traceback\nmore\nmore\nConnectionError: no route")
    assert verdict.status == UNCHECKED
    assert verdict.lines[-1] == "  ConnectionError: no route"
    for returncode in (1, 2):
        verdict = judge_govulncheck(returncode, "", "govulncheck: fetching vulnerabilities: no such host")
        assert verdict.status == UNCHECKED
        assert "no such host" in verdict.lines[-1]


def test_what_govulncheck_says() -> None:
    assert judge_govulncheck(0, "\nNo vulnerabilities found.\n", "") == (CLEAN, ("No vulnerabilities found.",))
    assert judge_govulncheck(3, "Vulnerability #1: GO-1\n", "exit") == (FOUND, ("Vulnerability #1: GO-1",))
