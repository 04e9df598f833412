"""The cache of compiled kernels: content under a key, never executed unless this user wrote it."""

from __future__ import annotations

import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path

SCHEMA = 2
_MAGIC = b"lowbit object %d\n" % SCHEMA


def directory() -> tuple[Path | None, str]:
    """Return the folder of the object cache, or None and why kernels stay in memory only."""
    given = os.environ.get("LOWBIT_CACHE_DIR")
    if given:
        folder = Path(given).absolute()
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("lowbit", appauthor=False))
        if not folder.is_absolute():
            return None, "this user has no home folder. Set LOWBIT_CACHE_DIR."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return None, f"{folder} cannot be made: {error.strerror}"
    why = _distrust(status)
    if why:
        why = f"{folder} is {why}, and kernels are executed from it. Set LOWBIT_CACHE_DIR."
        warnings.warn(f"object cache not used: {why}", RuntimeWarning, stacklevel=2)
        return None, why
    return folder, ""


def read(key: str) -> bytes | None:
    """Return what was written under a key; None where that is nothing whole and trusted."""
    folder, _ = directory()
    return None if folder is None else _read(folder / key, key)


def write(key: str, content: bytes) -> None:
    """Keep content under a key, where there is a folder that takes it."""
    folder, _ = directory()
    if folder is not None:
        _write(folder / key, key, content)


def digest(data: bytes) -> bytes:
    """Return the SHA-256 that keys and seals are made of."""
    import hashlib  # here, not at the top: the pool is part of `import lowbit`

    return hashlib.sha256(data).digest()


def _distrust(status: os.stat_result) -> str:
    """Say why somebody else could have written what stands there; empty: only we could."""
    if not hasattr(os, "geteuid"):
        return ""  # Windows: the user's own profile folder, guarded by its access list.
    if status.st_uid != os.geteuid():
        return f"owned by user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"writable by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _seal(key: str, content: bytes) -> bytes:
    return _MAGIC + digest(key.encode() + content)


def _read(path: Path, key: str) -> bytes | None:
    try:
        with path.open("rb") as entry:
            if _distrust(os.fstat(entry.fileno())):
                return None
            data = entry.read()
    except OSError:
        return None
    size = len(_MAGIC) + 32
    content = data[size:]
    return content if data[:size] == _seal(key, content) else None


def _write(path: Path, key: str, content: bytes) -> None:
    import tempfile

    # Another process may write the same entry now: each has its own file, the last one stays.
    with suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as entry:
                entry.write(_seal(key, content) + content)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
