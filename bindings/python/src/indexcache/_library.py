"""Finding the shared library, calling its functions, turning statuses into exceptions."""

import ctypes
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Optional, Union

from . import _abi
from .constants import ABI_VERSION, ERR_INVALID

_NAMES = ("libindexcache.so.0", "libindexcache.so")
_lock = threading.Lock()
_functions: Optional[SimpleNamespace] = None


class Error(Exception):
    """A call that the library refused.

    ``status``: one of ``ERR_…``; ``name``: its name, such as ``"IDXC_ERR_STALE"``; ``text``: function, argument,
    expected, got.
    """

    def __init__(self, status: int, name: str, text: str):
        super().__init__(status, name, text)
        self.status = status
        self.name = name
        self.text = text

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


Error.__module__ = "indexcache"


def load(path: Union[str, "os.PathLike[str]", None] = None) -> None:
    """Loads the library. Called without a path by the first function that needs it.

    Looks at ``path``, else at the environment variable ``INDEXCACHE_LIBRARY``, else for ``libindexcache.so`` beside
    this package. A process has one library: a second path raises ``RuntimeError``.
    """
    global _functions
    with _lock:
        if _functions is None:
            _functions = _open(_find(path))
        elif path is not None and Path(path).resolve() != _functions.path:
            raise RuntimeError(f"{_functions.path} is already loaded, {path} cannot be loaded beside it")


def _find(path) -> Path:
    source, chosen = "the path", path
    if chosen is None:
        source, chosen = "INDEXCACHE_LIBRARY", os.environ.get("INDEXCACHE_LIBRARY") or None
    if chosen is not None:
        if not Path(chosen).is_file():
            raise ImportError(f"indexcache: {source} names {os.fspath(chosen)!r}, which is not a file")
        return Path(chosen).resolve()
    here = Path(__file__).resolve().parent
    for name in _NAMES:
        if (here / name).is_file():
            return (here / name).resolve()
    raise ImportError(
        f"indexcache: no shared library: call indexcache.load(path), set INDEXCACHE_LIBRARY, or put {_NAMES[1]} "
        f"in {here}"
    )


def _open(path: Path) -> SimpleNamespace:
    try:
        library = ctypes.CDLL(str(path))
        get_api = library.idxc_get_api
    except (OSError, AttributeError) as e:
        raise ImportError(f"indexcache: {path} is not the indexcache library: {e}") from e
    get_api.restype = ctypes.POINTER(_abi.Api)
    get_api.argtypes = [ctypes.c_uint32]
    table = get_api(ABI_VERSION)
    if not table or table.contents.struct_size < ctypes.sizeof(_abi.Api):
        raise ImportError(f"indexcache: {path} is older than this package, which needs ABI version {ABI_VERSION}")
    names = [name for name, *_ in _abi.FUNCTIONS]
    return SimpleNamespace(path=path, **{name: getattr(table.contents, name) for name in names})


def lib() -> SimpleNamespace:
    """The library's functions by name."""
    if _functions is None:
        load()
    assert _functions is not None
    return _functions


def check(status: int) -> None:
    """Raises unless ``status`` is OK. To be called by the thread that made the call, before it makes another."""
    if status:
        raise failure(status)


def failure(status: int = ERR_INVALID) -> Error:
    """The last error of this thread as an exception."""
    api = lib()
    return Error(status, api.idxc_status_name(status).decode(), api.idxc_last_error().decode())
