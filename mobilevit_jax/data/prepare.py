"""Packs a dataset into the tar shards that `pack.py` reads, and checks them: `launch.py prepare`.

The bytes written depend on the images and the options alone: not on the number of workers, nor on
interruptions. Each worker writes whole shards; a finished one is renamed into place after its part
of the index, so what is there under its own name is complete, and the next start goes on with the
others. pack.json comes last: where it is, all is.

The shards themselves are the matter of `shards.py`. Before editing: a change of a single byte that
is written needs a new `pack.VERSION`. Slow imports belong where they are needed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from mobilevit_jax.data import imagenet as official
from mobilevit_jax.data import pack, shards, sources, storage
from mobilevit_jax.data.record import SPLITS, DataError, Source

ORDER_KEY = 0x6D6F62696C65  # of the order of images; any number would do, but it may not change

# Called with what is being done, how much of it is done, and of how much (0: not known).
Progress = Callable[[str, int, int], None]


class OptionsError(Exception):
    """What is asked for does not fit the target directory; its text is one line for users."""


class Checked(NamedTuple):
    """What `verify` found; of what is damaged it raises."""

    images: dict[str, int]
    bytes: int
    unreadable: tuple[str, ...]  # whole, but no image that can be opened; so it was in the source


def imagenet(
    source: str, target: Path, *, options: shards.Options, workers: int, progress: Progress
) -> pack.Summary:
    """Packs ImageNet from the official tars or from what they unpacked, see `imagenet.py`.

    Raises:
      DataError: images or labels are missing or damaged, jpegtran is not installed, no room left.
      OptionsError: the target holds something else.
    """

    def read() -> _Listing:
        splits = official.read(Path(source).expanduser())
        return _Listing(
            dict(splits), _digest(name for split in SPLITS for name in splits[split].names)
        )

    return _prepare(
        target,
        {"dataset": "imagenet", **_stated(options)},
        read,
        options=options,
        workers=workers,
        progress=progress,
    )


def folder(
    source: str,
    target: Path,
    *,
    val_fraction: float,
    options: shards.Options,
    workers: int,
    progress: Progress,
) -> pack.Summary:
    """Packs a folder of classes, local or remote, divided and labelled as by `sources.folder`.

    Raises:
      DataError, OptionsError: as `imagenet`.
    """
    root = storage.directory(source)
    if target.expanduser().resolve().is_relative_to(Path(root).resolve()):
        raise OptionsError(f"{target} lies inside {root}; give another --target")

    def read() -> _Listing:
        try:
            found = {
                split: sources.folder(split, root=root, val_fraction=val_fraction)
                for split in SPLITS
            }
        except DataError as error:
            raise DataError(str(error).replace("--config.data.root=", "--source=")) from error
        names = (name for name in storage.walk(root) if name.lower().endswith(sources.EXTENSIONS))
        return _Listing(found, _digest(sorted(names)), f"{root}/")

    return _prepare(
        target,
        {"dataset": "folder", "val_fraction": val_fraction, **_stated(options)},
        read,
        options=options,
        workers=workers,
        progress=progress,
    )


class _Listing(NamedTuple):
    """The images of a source."""

    splits: dict[str, Source]
    digest: str  # of their names: were they the same when the start was interrupted?
    prefix: str = ""  # what record names begin with that nobody needs to know


def _digest(names: Iterable[str]) -> str:
    content = hashlib.sha256()
    for name in names:
        content.update(os.fsencode(name) + b"\0")
    return content.hexdigest()


def _stated(options: shards.Options) -> dict[str, Any]:
    values = options._asdict()
    return values if options.short_side is not None else {**values, "quality": None}


# --- from begin to end --------------------------------------------------------------------------


def _prepare(
    target: Path,
    stated: dict[str, Any],
    read: Callable[[], _Listing],
    *,
    options: shards.Options,
    workers: int,
    progress: Progress,
) -> pack.Summary:
    """Packs both splits; what is there already is kept.

    Args:
      stated: the options that the bytes depend on, as written into pack.json.
      read: lists the images; not called where all is done.
    """
    target = target.expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionsError(f"--target={target} cannot be made: {error.strerror}") from error
    try:
        with _alone_in(target):
            if _is_complete(target, stated):
                _remove_leftovers(target)
                return pack.read_summary(str(target))
            progress("listing", 0, 0)
            splits, digest, prefix = read()
            progress("listing", 1, 1)
            plan = {
                "options": stated,
                "class_names": list(splits["train"].class_names),
                "images": {split: len(source) for split, source in splits.items()},
                "digest": digest,
            }
            _begin(target, plan)
            _write_shards(target, splits, prefix, options, workers, progress)
            return _finish(target, plan, splits)
    except OSError as error:
        raise DataError(
            f"cannot write to {target}: {error.strerror or error}; what is finished is kept: make "
            "room, or mend it otherwise, and run the same command again"
        ) from error


@contextlib.contextmanager
def _alone_in(target: Path) -> Iterator[None]:
    """Two processes that write the same files would spoil them. The lock ends with the process."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionsError(f"another `launch.py prepare` is writing to {target}") from error
        except OSError:  # a network disk may know no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _is_complete(target: Path, stated: dict[str, Any]) -> bool:
    """Whether the target holds the finished pack.

    Raises:
      OptionsError: it holds something else, or a pack of other options.
    """
    if (target / pack.SUMMARY).exists():
        _check_same(target, pack.read_summary(str(target)).options, stated)
        return True
    strange = [path.name for path in target.iterdir() if not _is_ours(path.name)]
    if strange:
        raise OptionsError(f"{target} holds other files ({min(strange)}); give an empty --target")
    if plan := _plan_of(target):
        _check_same(target, plan["options"], stated)
    return False


def _is_ours(name: str) -> bool:
    endings = (".tar", ".npz", ".part", ".json")
    return name == "lost+found" or (
        name.removeprefix(".").startswith((*SPLITS, "prepare", "pack")) and name.endswith(endings)
    )


def _plan_of(target: Path) -> dict[str, Any] | None:
    """What an interrupted start wrote down, if it finished a shard; else it binds no one."""
    if not any(target.glob("*.tar")):
        return None
    path = target / pack.UNFINISHED
    try:
        plan = json.loads(path.read_text())
        return {key: plan[key] for key in ("options", "class_names", "images", "digest")}
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise OptionsError(
            f"{target} holds shards, but {path.name} with their options is missing or damaged; "
            "delete the directory, or give another --target"
        ) from error


def _check_same(target: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key} was {json.dumps(before.get(key))} and is now {json.dumps(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OptionsError(
            f"{target} was begun with other options: {', '.join(changed)}; give the same, or "
            "another --target"
        )


def _begin(target: Path, plan: dict[str, Any]) -> None:
    """Writes the plan down, or compares it with that of the start that was interrupted."""
    for path in target.glob(".*.part"):
        path.unlink()
    before = _plan_of(target)
    if before is None:
        shards.replace(target / pack.UNFINISHED, _json(plan))
    elif before != plan:
        counts = " and ".join(f"{n:,} {split}" for split, n in before["images"].items())
        raise OptionsError(
            f"{target} was begun with other images ({counts}, of {len(before['class_names'])} "
            "classes), or some have got other names since; give the same --source, or another "
            "--target"
        )


def _write_shards(
    target: Path,
    splits: Mapping[str, Source],
    prefix: str,
    options: shards.Options,
    workers: int,
    progress: Progress,
) -> None:
    """Writes all shards that are not there yet, `workers` at a time."""
    counters, todo = {}, []
    for split, source in splits.items():
        order = _order(len(source))
        firsts = range(0, len(source), options.shard_size)
        positions = [range(i, min(i + options.shard_size, len(source))) for i in firsts]
        wanted = [
            shards.Shard(target, split, k, part, order[part.start : part.stop])
            for k, part in enumerate(positions)
        ]
        missing = [shard for shard in wanted if not shards.is_finished(shard)]
        done = len(source) - sum(len(shard.images) for shard in missing)
        counters[split] = _Counter(split, done, len(source), progress)
        todo += missing

    def write(shard: shards.Shard, stop: threading.Event) -> None:
        shards.write(
            shard,
            splits[shard.split],
            options,
            prefix=prefix,
            counted=counters[shard.split].add,
            stop=stop,
        )

    _in_parallel(write, todo, workers)


def _in_parallel(
    work: Callable[[Any, threading.Event], Any], items: Sequence[Any], workers: int
) -> list[Any]:
    """Results in the order of `items`. After the first error, or Ctrl-C, the others stop soon."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(work, item, stop) for item in items]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _order(count: int) -> Int64[np.ndarray, " n"]:
    """A permutation that is the same everywhere: of a bit generator numpy guarantees the stream."""
    keys = np.random.Philox(key=ORDER_KEY).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


class _Counter:
    """Counts images over all workers."""

    def __init__(self, what: str, done: int, total: int, progress: Progress) -> None:
        self._what, self._done, self._total, self._progress = what, done, total, progress
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int = 1) -> None:
        with self._lock:
            self._done += count
            self._progress(self._what, self._done, self._total)


# --- the end ------------------------------------------------------------------------------------


def _finish(target: Path, plan: dict[str, Any], splits: Mapping[str, Source]) -> pack.Summary:
    """Joins the parts of the index, writes pack.json, and removes what only a resume needs."""
    size = plan["options"]["shard_size"]
    about = {
        split: _join(target, split, -(-len(source) // size)) for split, source in splits.items()
    }
    summary = {
        "format": pack.FORMAT,
        "version": pack.VERSION,
        "options": plan["options"],
        "class_names": plan["class_names"],
        "splits": {split: values._asdict() for split, values in about.items()},
    }
    shards.replace(target / pack.SUMMARY, _json(summary))
    _remove_leftovers(target)
    return pack.read_summary(str(target))


def _join(target: Path, split: str, count: int) -> pack.Split:
    """Writes the index of a split with `count` shards."""
    parts = [shards.read_part(shards.part_path(target, split, k)) for k in range(count)]
    joined = {
        name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]
    }
    counts = [len(part["label"]) for part in parts]
    index = pack.Index(
        shard=np.repeat(np.arange(count, dtype=np.int32), counts),
        **{name: joined[name] for name in pack.Index._fields[1:]},
    )
    names = shards.names_of(index)
    content = shards.npz(index._asdict())
    shards.replace(target / pack.INDEX.format(split=split), content)
    done = joined["done"]
    return pack.Split(
        images=len(names),
        shards=tuple(joined["bytes"].tolist()),
        index_crc32=zlib.crc32(content),
        counts={
            "with restart markers": int(np.count_nonzero(done & shards.MARKED)),
            "shrunk": int(np.count_nonzero(done & shards.SHRUNK)),
        },
        corrupt=tuple(names[i] for i in np.flatnonzero(done & shards.CORRUPT)),
    )


def _remove_leftovers(target: Path) -> None:
    for path in list(target.iterdir()):
        if path.name.startswith(".") and _is_ours(path.name):
            path.unlink()


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


# --- verify -------------------------------------------------------------------------------------


def verify(target: str, *, workers: int, progress: Progress) -> Checked:
    """Reads a whole pack, local or remote, and compares every byte of its shards with the index.

    Raises:
      DataError: something is missing or damaged; its text counts and names it.
    """
    root = storage.directory(target)
    summary = pack.read_summary(root)
    damaged: dict[str, int] = {}
    unreadable: list[str] = []
    for split, about in summary.splits.items():
        index = pack.read_index(root, split, summary)
        pack.check_shards(root, split, about)
        counter = _Counter(f"verifying {split}", 0, about.images, progress)
        ends = np.searchsorted(index.shard, np.arange(len(about.shards)), side="right").tolist()
        written = [
            shards.Written(pack.shard_path(root, split, number), index, range(first, last), size)
            for number, (first, last, size) in enumerate(
                zip([0, *ends], ends, about.shards, strict=False)
            )
        ]

        def check(
            shard: shards.Written,
            stop: threading.Event,
            counted: Callable[[], None] = counter.add,
        ) -> tuple[list[int], list[int]]:
            return shards.check(shard, counted=counted, stop=stop)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # headers are small
            found = _in_parallel(check, written, workers)
        damaged |= {
            shard.path: len(bad) for shard, (bad, _) in zip(written, found, strict=True) if bad
        }
        closed = [i for _, images in found for i in images]
        names = shards.names_of(index) if closed else []
        unreadable += [f"{split}: {names[i]}" for i in closed]
    if damaged:
        first = ", ".join(list(damaged)[:3]) + (" …" if len(damaged) > 3 else "")
        raise DataError(
            f"{sum(damaged.values()):,} images in {len(damaged)} shards are not what was written: "
            f"{first}; copy these shards again, or prepare the dataset again"
        )
    images = {split: about.images for split, about in summary.splits.items()}
    size = sum(sum(about.shards) for about in summary.splits.values())
    return Checked(images, size, tuple(unreadable))
