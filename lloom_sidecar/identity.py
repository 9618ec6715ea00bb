"""What a node keeps in its home about itself: the folder, its private key, the lock, the network's keys.

Everything here runs before the event loop or in the commands that need no node, so it blocks. Cryptography is imported
where it is used: most commands need only the home's path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from .errors import ConfigError, StartError

if TYPE_CHECKING:
    from .protocol.envelope import Signer
    from .protocol.network_key import NetworkKeys

DEFAULT_HOME: Final = Path("~/.local/share/lloom")
IDENTITY_NAME: Final = "identity.key"
LOCK_NAME: Final = "lock"
MAX_KEY_FILE_BYTES: Final = 64 * 1024
"""A key file is far shorter; a path such as /dev/zero must not fill the memory."""

_OUR_NAMES: Final = frozenset(
    {
        IDENTITY_NAME,
        LOCK_NAME,
        "network.key",
        "bootstrap",
        "config.toml",
        "run",
        "lloom.db",
        "lloom.db-wal",
        "lloom.db-shm",
    }
)
"""What a home may hold before it has an identity, and still be recognised as one."""


def resolve_home(flag: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None) -> Path:
    """The home that ``--home``, LLOOM_HOME or the default names, absolute. Creates nothing. Raises ConfigError."""
    given = os.fspath(flag) if flag is not None else (os.environ if env is None else env).get("LLOOM_HOME") or None
    if given is not None and (not given or given != given.strip() or not given.isprintable()):
        raise ConfigError(f"home: {given!r} is empty, or has control characters or a space at an end")
    try:
        return Path.cwd() / (DEFAULT_HOME if given is None else Path(given)).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"home: {exc}") from exc


def prepare_home(home: Path) -> None:
    """Make the folder with mode 0700, or narrow the mode of one that is ours.

    Raises:
        ConfigError: it belongs to another user, it is a folder with other things in it, or it cannot be made.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.stat()
    except (FileExistsError, NotADirectoryError) as exc:
        raise ConfigError(f"the home {home} is not a folder: choose another with --home or LLOOM_HOME") from exc
    except OSError as exc:
        raise ConfigError(f"the home {home} cannot be made ({_reason(exc)}): choose another with --home") from exc
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"the home {home} belongs to uid {status.st_uid} and this process runs as uid {os.geteuid()}: "
            f"run it as that user, or choose a folder of its own with --home, for instance {home / 'lloom'}"
        )
    if stat.S_IMODE(status.st_mode) & 0o077 == 0:
        return
    if not _is_a_home(home):
        raise ConfigError(
            f"the home {home} is a folder with other things in it, readable by others: "
            f"choose a folder of its own with --home, for instance {home / 'lloom'}"
        )
    try:
        home.chmod(0o700)
    except OSError as exc:
        raise ConfigError(f"the home {home} is readable by others and stays so ({_reason(exc)}): chmod 700 it") from exc


def init_home(home: Path, identity: bytes | None = None) -> tuple[Signer, bool]:
    """Make the home and its identity where they are missing; the second value is True when the identity is new.

    ``identity``: a marshalled key to take instead of a random one; a home that has one already keeps it.
    Idempotent, and safe when two processes do it at once: both end with the same key.

    Raises:
        ConfigError: as ``prepare_home`` and ``load_identity``, or the key cannot be written.
    """
    from .protocol.envelope import SEED_BYTES, Signer

    prepare_home(home)
    path = home / IDENTITY_NAME
    if path.exists() or path.is_symlink():
        return load_identity(home), False
    signer = Signer(os.urandom(SEED_BYTES)) if identity is None else Signer.from_marshalled(identity)
    try:
        is_created = write_private_file(path, signer.marshalled(), replace=False)
    except OSError as exc:
        raise ConfigError(f"the identity {path} cannot be written: {_reason(exc)}") from exc
    return (signer, True) if is_created else (load_identity(home), False)


def load_identity(home: Path) -> Signer:
    """The node's key from HOME/identity.key; a mode wider than 0600 of a file that is ours is narrowed.

    Raises:
        ConfigError: one sentence with the remedy: missing, unreadable, somebody else's, damaged.
    """
    from .protocol.envelope import Signer

    path = home / IDENTITY_NAME
    try:
        data = _read_private(path)
    except FileNotFoundError as exc:
        raise ConfigError(f"there is no identity in {home}: run `lloom-sidecar init --home {home}`") from exc
    try:
        return Signer.from_marshalled(data)
    except ConfigError as exc:
        raise ConfigError(
            f"the identity {path} cannot be used: {exc.message}; restore it from a copy, or move it away and run "
            "`lloom-sidecar init` for a new one (the node then has another peer id)"
        ) from exc


def load_network_keys(path: Path) -> NetworkKeys:
    """The keys in a network key file. Raises ConfigError, one sentence with the remedy, when it cannot be used."""
    from .protocol.network_key import parse_key_file

    try:
        data = _read_private(path)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"there is no network key at {path}: run `lloomctl network create` or `lloomctl network join FILE`"
        ) from exc
    try:
        return parse_key_file(data)
    except ConfigError as exc:
        raise ConfigError(f"the network key {path} cannot be used: {exc.message}") from exc


class HomeLock:
    """Held for the life of a sidecar's process, so that no second one uses the same home.

    A lock of the kernel (flock): it ends with the process, whatever way that ends. Source: flock(2).
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._fd: int | None = None

    @property
    def path(self) -> Path:
        """The file that is locked; its text is the holder's process id."""
        return self._home / LOCK_NAME

    def acquire(self) -> None:
        """Take the lock. Raises StartError, with the holder's process id, when another process has it."""
        if self._fd is not None:
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise StartError(f"the lock {self.path} cannot be opened: {_reason(exc)}") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StartError(f"the lock {self.path} cannot be taken: {_reason(exc)}") from exc
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise StartError(
                f"{who} runs a node in {self._home} already: stop it, or give this one a home of its own with --home"
            ) from exc
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; without effect when it is not held. The file stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> HomeLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def write_private_file(path: Path, data: bytes, *, replace: bool) -> bool:
    """Write ``data`` with mode 0600 so that a reader sees all of it or nothing, also after a power cut.

    Returns False, and leaves the file as it is, when it exists and ``replace`` is False. Raises OSError.
    """
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp's mode is 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(name, path)
        elif not _link(name, path):
            return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _link(name: str, path: Path) -> bool:
    """Give the finished file its name unless that is taken. A rename would overwrite."""
    try:
        os.link(name, path)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links: a small window is left
            return False
        os.replace(name, path)
    return True


def _is_a_home(home: Path) -> bool:
    names = set(os.listdir(home))
    return IDENTITY_NAME in names or names <= _OUR_NAMES


def _read_private(path: Path) -> bytes:
    """The bytes of a secret file. Raises FileNotFoundError, or ConfigError when it cannot be read or is another's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is not a file")
            # Another owner is fine for what an orchestrator mounts (root's, read-only), unless others can write it.
            if status.st_mode & stat.S_IWOTH:
                raise ConfigError(f"{path} can be written by everybody: chmod 600 it, after checking that it is yours")
            if status.st_uid == os.geteuid() and status.st_mode & 0o077:
                with contextlib.suppress(OSError):  # a read-only mount
                    os.fchmod(fd, 0o600)
            data = os.read(fd, MAX_KEY_FILE_BYTES + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except PermissionError as exc:
        raise ConfigError(
            f"{path} cannot be read by uid {os.geteuid()} (permission denied): run as its owner, or chown it"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {_reason(exc)}") from exc
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{path} is no key: it has more than {MAX_KEY_FILE_BYTES} bytes")
    return data


def _reason(exc: OSError) -> str:
    return (exc.strerror or type(exc).__name__).lower()
