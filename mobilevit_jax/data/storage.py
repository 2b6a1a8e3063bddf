"""Reading bytes from where the data lie: a local disk, or all that fsspec reaches (gs://, s3://).

A path with "://" is remote, all others are local; the functions behave alike on both. Whatever goes
wrong becomes one `DataError` line. What may pass (an I/O error, a lost connection) is tried again
after each of `WAITS`; a missing file or a refused permission is told at once. Nothing here holds on
to a file system or a file between processes, so sources need to pickle their paths only.
All functions may be called from many threads; the bytes of local files take the short way.
"""

import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mobilevit_jax.data.record import DataError, gist

WAITS = (0.5, 2.0)  # seconds before the second and the third attempt

# What stays wrong however often it is tried.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

_Result = TypeVar("_Result")


class _Descriptor:
    """An open file, closed with the last reference: a thread may still read what others forgot."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_descriptors: dict[str, _Descriptor] = {}  # in order of opening, the oldest is closed first
_lock = threading.Lock()  # taken to change that table, not to read from it


def is_remote(path: str) -> bool:
    """Whether `path` is a URL for fsspec, such as gs://bucket/folder."""
    return "://" in path


def directory(root: str) -> str:
    """A directory or URL that a user gave, as names are appended to it.

    Raises:
      DataError: none was given. It would be the current one, of which nobody thinks.
    """
    if not root:
        raise DataError("no directory of images is given; name one, as by --config.data.root=DIR")
    return root.rstrip("/") if is_remote(root) else str(Path(root).expanduser())


def read(path: str) -> bytes:
    """The whole file.

    Raises:
      DataError: it is missing or forbidden, or reading failed three times.
    """
    if is_remote(path):
        return _again(path, lambda: _remote(path, "cat_file"))
    return _again(path, lambda: _read_local(path))


def read_range(path: str, start: int, size: int) -> bytes:
    """Exactly `size` bytes of the file, from byte `start` on.

    Raises:
      DataError: the file ends before, is missing or forbidden, or reading failed three times.
    """
    if size == 0:
        return b""
    if is_remote(path):
        data = _again(path, lambda: _remote(path, "cat_file", start=start, end=start + size))
        if len(data) > size:
            raise DataError(
                f"the server of {path} sends whole files where a part was asked for; "
                "copy the data to a local disk"
            )
    else:
        data = _again(path, lambda: _read_range_local(path, start, size))
    if len(data) < size:
        raise DataError(
            f"{path} is cut short: bytes {start} to {start + size} were asked for, but it ends at "
            f"{start + len(data) if data else length(path)}; copy it again"
        )
    return data


def length(path: str) -> int:
    """Bytes in the file. A local file put in the place of one read before is noticed here."""
    if is_remote(path):
        size = _again(path, lambda: _remote(path, "info"))["size"]
        if size is None:  # a web server
            raise DataError(f"the server of {path} does not tell its size; copy it to a local disk")
        return size
    return _again(path, lambda: _length_local(path))


def lengths(path: str) -> dict[str, int]:
    """Bytes in each file right in the folder `path`, by name, from one listing where it tells.

    Raises:
      DataError: as `list_folder`.
    """
    if not is_remote(path):
        return {name: length(f"{path}/{name}") for name in list_folder(path)[1]}
    entries = _again(path, lambda: _list_remote(path))
    return {
        name: length(f"{path}/{name}") if size is None else size
        for name, is_dir, size in entries
        if not is_dir
    }


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    if is_remote(path):
        return _again(path, lambda: _remote(path, "exists"))
    return _again(path, Path(path).exists)


def is_folder(path: str) -> bool:
    """Whether there is a folder. Object stores have none that are empty."""
    if is_remote(path):
        return _again(path, lambda: _remote(path, "isdir"))
    return _again(path, Path(path).is_dir)


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files right in the folder `path`, each sorted.

    Links are followed.

    Raises:
      DataError: it is missing, forbidden or no folder, or reading failed three times.
    """
    if is_remote(path):
        entries = [(name, is_dir) for name, is_dir, _ in _again(path, lambda: _list_remote(path))]
    else:
        entries = _again(path, lambda: _list_local(path))
    folders, files = ([n for n, is_dir in entries if is_dir == which] for which in (True, False))
    return sorted(folders), sorted(files)


def walk(path: str) -> Iterator[str]:
    """Names relative to `path` of all files below it, in no order.

    Folders whose name begins with a dot are left out; links are followed, but not to a folder
    above. An object store is asked for the whole tree at once.

    Raises:
      DataError: as `list_folder`, for any folder below.
    """
    if is_remote(path):
        found = _again(path, lambda: _remote(path, "find"))
        top = _stripped(path) + "/"
        for name in found:
            relative = name.removeprefix(top)
            if not any(part.startswith(".") for part in relative.split("/")[:-1]):
                yield relative
    else:
        yield from _walk_local(path, "", ())


def _read_local(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  (a third of Path.open's time)
        return file.read()


def _read_range_local(path: str, start: int, size: int) -> bytes:
    file = _descriptors.get(path) or _opened(path)
    try:
        data = os.pread(file.number, size, start)
        while 0 < len(data) < size:  # the end of the file, or more than one call may give
            more = os.pread(file.number, size - len(data), start + len(data))
            if not more:
                break
            data += more
    except OSError:
        _forget(path)  # a network disk may have lost it: the next attempt opens it anew
        raise
    return data


def _opened(path: str) -> _Descriptor:
    """Opens `path` and keeps it open; half of the descriptors a process may have are left alone."""
    file = _Descriptor(path)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    keep = min(limit, 8192) // 2 if limit > 0 else 4096  # -1: unlimited
    with _lock:
        while len(_descriptors) >= keep:
            del _descriptors[next(iter(_descriptors))]
        _descriptors[path] = file
    return file


def _forget(path: str) -> None:
    with _lock:
        _descriptors.pop(path, None)


def _list_local(path: str) -> list[tuple[str, bool]]:
    with os.scandir(path) as entries:
        return [(entry.name, entry.is_dir()) for entry in entries]


def _length_local(path: str) -> int:
    status = Path(path).stat()
    cached = _descriptors.get(path)
    if cached and not os.path.samestat(os.fstat(cached.number), status):
        _forget(path)
    return status.st_size


def _list_remote(path: str) -> list[tuple[str, bool, int | None]]:
    """For each entry its name, whether it is a folder, and its bytes as far as they are told."""
    top = _stripped(path)
    entries = [
        (entry["name"].rstrip("/"), entry["type"] == "directory", entry.get("size"))
        for entry in _remote(path, "ls", detail=True)
    ]
    if [name for name, _, _ in entries] == [top]:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    # object stores list an empty object of the folder's own name in some folders
    return [(name.rpartition("/")[2], *rest) for name, *rest in entries if name != top]


def _walk_local(path: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(path)
    if real in above:  # a link back
        return
    for name, is_dir in _again(path, lambda: _list_local(path)):
        if not is_dir:
            yield prefix + name
        elif not name.startswith("."):
            yield from _walk_local(f"{path}/{name}", f"{prefix}{name}/", (*above, real))


def _remote(path: str, method: str, **options: Any) -> Any:
    """Calls a method of the file system that `path` lies on."""
    system, inner = _file_system(path)
    return getattr(system, method)(inner, **options)


def _stripped(path: str) -> str:
    return _file_system(path)[1].rstrip("/")


def _file_system(path: str) -> tuple[Any, str]:
    try:
        import fsspec  # an optional package, and 0.1 s

        return fsspec.url_to_fs(path)  # which keeps one file system per address
    except ImportError as error:
        raise DataError(
            f"cannot read {path}: {gist(error)}; type `pip install 'mobilevit_jax[remote]'`"
        ) from error
    except ValueError as error:  # an unknown protocol, or a malformed address
        raise DataError(f"cannot read {path}: {gist(error)}; use e.g. gs:// or s3://") from error


def _again(path: str, call: Callable[[], _Result]) -> _Result:
    """`call()`, again after each of `WAITS` as long as it fails."""
    for wait in (*WAITS, None):
        try:
            return call()
        except DataError:
            raise
        # Remote file systems raise errors of many packages: of HTTP, of credentials, of DNS.
        except Exception as error:
            _check_passing(path, error)
            if wait is None:
                raise DataError(
                    f"reading {path} failed three times: {gist(error)}; "
                    f"check the {'network' if is_remote(path) else 'disk'} and start again"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last round returns or raises")


def _check_passing(path: str, error: Exception) -> None:
    """Turns what no second attempt can mend into a `DataError`; other bugs pass unchanged."""
    if isinstance(error, _LASTING):
        denied = isinstance(error, PermissionError)
        # remote file systems often give nothing but the path
        what = error.strerror or ("access denied" if denied else "not found")
        if not denied:
            mend = "was it moved? Check the path"
        elif is_remote(path):
            mend = "log in, or ask its owner for access"
        else:
            mend = f"type `chmod -R u+rX {path}` as its owner"
        raise DataError(f"cannot read {path}: {what}; {mend}") from error
    if not isinstance(error, OSError) and not is_remote(path):
        raise error
