"""``make fuzz``: each target under libFuzzer for a while; says how often it ran and what broke.

``make fuzz ARGS='sse frames --seconds 300'``; ``--keep`` writes what reached new code to ``corpus/``. A crash is
printed in base64: put it into ``crashes.py`` with the repair.
"""

from __future__ import annotations

import argparse
import base64
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .seeds import SEEDS, inputs_of, write_corpus

_STATS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
SLACK_S = 120
"""For imports, and an input that hangs until libFuzzer's own timeout."""


def main() -> int:
    """0 when nothing broke."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(SEEDS)}; none = all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--keep", action="store_true", help="write what was found to tests/fuzz/corpus")
    asked = parser.parse_args()
    if unknown := set(asked.targets) - set(SEEDS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    results = [run(name, asked.seconds, keep=asked.keep) for name in asked.targets or SEEDS]
    return 1 if any(results) else 0


def run(name: str, seconds: int, *, keep: bool) -> int:
    """Fuzz one; the number of crashes."""
    with tempfile.TemporaryDirectory(prefix="lloom-fuzz-") as folder:
        root = Path(folder)
        corpus, crashes = root / "corpus", root / "crashes"
        for path in (corpus, crashes):
            path.mkdir()
        for number, data in enumerate(inputs_of(name)):
            (corpus / f"seed{number}").write_bytes(data)
        words = _fuzzer(name, seconds, f"-max_total_time={seconds}", f"-artifact_prefix={crashes}/", str(corpus))
        ran, coverage = _STATS.search(words), _COVERAGE.findall(words)
        found = sorted(crashes.iterdir())
        cov, features, size = coverage[-1] if coverage else ("?", "?", "?")
        print(
            f"{name}: {ran[1] if ran else '?'} executions, {cov} edges, {features} features, corpus {size}, "
            f"{len(found)} crashes",
            flush=True,
        )
        for path in found:
            print(f"  {path.name}: {base64.b64encode(path.read_bytes()).decode()}")
            print("    " + "\n    ".join(words.splitlines()[-25:]))
        if keep and not found:
            write_corpus(name, [path.read_bytes() for path in corpus.iterdir() if not path.name.startswith("seed")])
        return len(found) if ran else 1


def _fuzzer(name: str, seconds: int, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.one", name, "-print_final_stats=1", "-timeout=10", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds * 3 + SLACK_S,
        check=False,
    )
    return done.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
