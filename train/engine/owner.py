"""One owner of a run's folder at a time: a lock that the system takes back from the dead.

The lock is a POSIX record lock on ``.owner`` in the folder. It belongs to a process, not to those
it forks, and ends with it however that ends, so that no lock is ever stale; network file systems
have it as well. The file's text says who has it. A process does not conflict with itself there,
so the folders of this one are remembered beside it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dcconv.operator.checks import value_error
from train.engine import distributed
from train.engine.files import MOST_TEXT, ContentError, read_json

OWNER = ".owner"

# What a file system answers that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

# Folders that this process owns, by device and number: opening their lock file again would, at
# closing, give the lock away.
_own: set[tuple[int, int]] = set()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _holder(path: Path) -> str:
    """Return who has a lock, as its file says; a process may be about to write it."""
    try:
        found = read_json(path, MOST_TEXT)
        return f"process {int(found['pid'])} on {found['host']!s:.80}, since {found['since']!s:.40}"
    except (ContentError, KeyError, OSError, TypeError, ValueError):
        return "another process"


def _lock(path: Path) -> int | None:
    """Return the descriptor of a locked file of this name, None if another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileExistsError(errno.EEXIST, f"{OWNER} in it is no regular file")
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed the file in between: then the name is another's.
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def _locked(folder: Path, argument: str, warn: Callable[[str], None]) -> Iterator[None]:
    path = folder / OWNER
    rule = "be a folder that no other run is using"
    identity = _identity(folder)
    if identity in _own:
        raise value_error(argument, rule, f"'{folder}' (used by this process)")
    try:
        handle = _lock(path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            rule = f"be a folder that can be written ({error.strerror})"
            raise value_error(argument, rule, f"'{folder}'") from error
        warn(
            f"The disk of '{folder}' has no locks ({error.strerror}): "
            "nothing keeps a second run out of this folder"
        )
        yield
        return
    if handle is None:
        raise value_error(argument, rule, f"'{folder}' (used by {_holder(path)})")
    _own.add(identity)
    try:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(owner) + "\n").encode(), 0)
        yield
    finally:
        _own.discard(identity)
        # Before the lock is given away, or the file of the next owner would go.
        path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def owned(folder: Path, argument: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Own a run's folder, for all processes of the run: rank 0 has the lock, and alone writes.

    Args:
        folder: of the run; it exists.
        argument: that named the folder, for the message.
        warn: is told where the disk has no locks.

    Raises:
        ValueError: another run uses the folder; every process raises it.
    """
    failure = ""
    with ExitStack() as stack:
        if distributed.is_main():
            try:
                stack.enter_context(_locked(folder, argument, warn))
            except ValueError as error:
                failure = str(error)
        failure = distributed.broadcast(failure)
        if failure:
            raise ValueError(failure)
        yield
