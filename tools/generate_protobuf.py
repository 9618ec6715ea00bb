"""Generates ``lloom_sidecar/protocol/pb`` from ``lloom_sidecar/protocol/*.proto``.

``python tools/generate_protobuf.py [--out FOLDER]``; the Makefile's `proto` runs it. ``grpcio-tools`` (extra ``dev``)
brings the compiler. Its version is pinned: generated code needs a protobuf runtime of its own version or newer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PROTOCOL = Path(__file__).resolve().parent.parent / "lloom_sidecar" / "protocol"


def generate(out: Path) -> None:
    """Write the modules and their type stubs into ``out``."""
    sources = sorted(path.name for path in PROTOCOL.glob("*.proto"))
    if not sources:
        sys.exit(f"{PROTOCOL} has no .proto file.")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOCOL}", f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([*command, *sources], check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PROTOCOL / "pb", help="folder for the generated files")
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
