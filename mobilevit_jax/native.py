"""C and C++ of our own, compiled on the machine that runs it, once, into the user's cache.

Without a compiler everything works, slower: what is built on this says so and does without. Before
editing: launch.py imports this ahead of everything else, so it imports nothing that takes long.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

HUGE_PAGES = "glibc.malloc.hugetlb=1"
BLOCKS = pathlib.Path(__file__).with_name("blocks.c")
BLOCKS_FLAGS = ("-O2", "-lpthread", "-ldl")
COMPILERS = {".c": ("CC", "cc", "gcc", "clang"), ".cc": ("CXX", "c++", "g++", "clang++")}


class BuildError(Exception):
    """Something could not be compiled; says in one line what is in the way."""


def environment() -> dict[str, str]:
    """The environment that a training process on Linux is to begin with.

    A step touches gigabytes of fresh memory. With 4 KiB pages the page faults cost more than the
    arithmetic (measured: 1.4 times the training speed with huge ones), and clearing the pages of
    what was given back the step before costs up to a third more; blocks.c keeps them. The C library
    reads both variables before main().
    """
    variables = {"GLIBC_TUNABLES": HUGE_PAGES}
    if platform.libc_ver()[0] == "glibc":
        try:
            preload = [str(compiled(BLOCKS, BLOCKS_FLAGS))]
        except BuildError:
            return variables
        if "LD_PRELOAD" in os.environ:
            preload.append(os.environ["LD_PRELOAD"])
        variables["LD_PRELOAD"] = ":".join(preload)
    return variables


def compiled(
    source: pathlib.Path,
    flags: Sequence[str],
    *,
    headers: Sequence[str] = (),
    versions: Sequence[str] = (),
) -> pathlib.Path:
    """The shared library of a source file.

    Args:
        source: of C (.c) or C++ (.cc).
        flags: of the compiler.
        headers: directories of others' headers.
        versions: of what these belong to: with another one it is compiled again, as it is for
            another processor, compiler or source.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written to.
    """
    variable, *names = COMPILERS[source.suffix]
    candidates = [os.environ.get(variable, ""), *names]
    compiler = next((found for name in candidates if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(
            f"there is no compiler ({names[0]}): apt-get install g++, or set {variable}"
        )
    flags = [*flags, "-fPIC", "-shared"]
    facts = [source.read_text(), compiler, *flags, *versions, _processor()]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = home / "mobilevit_jax" / "native" / f"{source.stem}-{digest}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = pathlib.Path(directory) / path.name
            systems = [f"-isystem{each}" for each in headers]
            command = [compiler, *systems, "-o", str(made), str(source), *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.splitlines()
                said = next((line for line in lines if "error" in line), "it says nothing")
                raise BuildError(f"{compiler} fails: {said.strip()}")
            made.replace(path)  # in one go: another process may be at it as well
    except OSError as error:
        raise BuildError(f"{path.parent}: {error.strerror}") from error
    return path


def _processor() -> str:
    """What tells processors apart for which a compiler makes different code."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
