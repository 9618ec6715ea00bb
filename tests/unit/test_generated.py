"""What is generated and committed equals what would be generated now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_protobuf_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "tools/generate_protobuf.py"), "--out", str(tmp_path)], check=True, cwd=ROOT
    )
    committed = ROOT / "lloom_sidecar/protocol/pb"
    generated = sorted(path.name for path in tmp_path.iterdir())
    assert generated == ["lloom_pb2.py", "lloom_pb2.pyi"]
    for name in generated:
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), f"{name}: run `make proto`"
