"""Tensors of the caller as ``idxc_tensor``, without a copy."""

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p, cast, pointer, py_object, pythonapi
from typing import Any, NamedTuple, Optional, Protocol, Tuple, Union

import numpy as np

from . import _abi
from .constants import DEVICE_CPU, DEVICE_CUDA, DTYPE_BFLOAT, DTYPE_FLOAT, DTYPE_FLOAT8_E4M3FN, DTYPE_INT, DTYPE_UINT


class SupportsDLPack(Protocol):
    """Anything with ``__dlpack__``, such as a ``torch.Tensor``."""

    def __dlpack__(self, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Tuple[int, int]: ...


class Typed(NamedTuple):
    """An array whose elements mean something that its own dtype cannot say. Made by ``as_dtype``."""

    array: Union[np.ndarray, SupportsDLPack]
    code: int
    bits: int


Tensor = Union[np.ndarray, SupportsDLPack, Typed]

# What as_dtype, and numpy dtypes of other packages (ml_dtypes), are called: type code and bits.
_NAMED = {"bfloat16": (DTYPE_BFLOAT, 16), "float8_e4m3fn": (DTYPE_FLOAT8_E4M3FN, 8)}
# By numpy's kind; the library says which of them it takes. DLPack: 5 complex, 6 bool.
_KINDS = {"i": DTYPE_INT, "u": DTYPE_UINT, "f": DTYPE_FLOAT, "c": 5, "b": 6}

_READ_ONLY, _COPIED = 1, 2  # Flags of a versioned DLPack tensor.


class _Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned``."""

    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _abi.Tensor),
    ]


_is_valid = ctypes.PYFUNCTYPE(c_int, py_object, c_char_p)(("PyCapsule_IsValid", pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", pythonapi))


def as_dtype(array: Union[np.ndarray, SupportsDLPack], dtype: str) -> Typed:
    """The same memory with elements read as ``"bfloat16"`` (of a 16-bit integer array) or ``"float8_e4m3fn"`` (8-bit).

    For numpy, which has no such types, and for frameworks whose DLPack export refuses them.
    """
    if dtype not in _NAMED:
        raise ValueError(f"dtype: expected one of {', '.join(_NAMED)}, got {dtype!r}")
    code, bits = _NAMED[dtype]
    if not isinstance(array, np.ndarray) and not hasattr(array, "__dlpack__"):
        raise TypeError(f"array: expected a numpy array or an object with __dlpack__, got {type(array).__name__}")
    return Typed(array, code, bits)


class Borrow:
    """The tensors of one call: gives pointers to their descriptions and keeps what these point to alive."""

    def __init__(self) -> None:
        self._keep: list = []

    def __call__(self, name: str, value: Optional[Tensor], written: bool = False):
        """``value`` as ``idxc_tensor*``; ``None`` as NULL. ``written``: the library will write it."""
        if value is None:
            return None
        typed = value if isinstance(value, Typed) else None
        array: Any = typed.array if typed else value
        if isinstance(array, np.ndarray):
            tensor = self._numpy(name, array, written)
        elif hasattr(array, "__dlpack__"):
            tensor = self._dlpack(name, array, written)
        else:
            raise TypeError(
                f"{name}: expected a numpy array, an object with __dlpack__ or None, got {type(array).__name__}"
            )
        if typed:
            d = tensor.contents.dtype
            if d.code not in (DTYPE_INT, DTYPE_UINT) or d.bits != typed.bits:
                raise TypeError(f"{name}: as_dtype expected {typed.bits}-bit integers, got code {d.code}, {d.bits} bits")
            t = _abi.Tensor.from_buffer_copy(tensor.contents)  # The exporter's description is not ours to change.
            t.dtype = _abi.DType(typed.code, typed.bits, 1)
            tensor = pointer(t)
        self._keep.append(tensor)
        return tensor

    def memory(self, name: str, value: Tensor) -> Tuple[Optional[int], int]:
        """Address and bytes of a one-dimensional tensor without gaps that the library will write."""
        t = self(name, value, written=True).contents
        if t.ndim != 1 or (t.shape[0] > 1 and t.strides and t.strides[0] != 1):
            raise ValueError(f"{name}: expected one dimension without gaps")
        return (t.data or 0) + t.byte_offset or None, t.shape[0] * (t.dtype.bits // 8)

    def _numpy(self, name: str, a: np.ndarray, written: bool):
        if written and not a.flags.writeable:
            raise ValueError(f"{name}: expected a writable array")
        if not a.dtype.isnative:
            raise TypeError(f"{name}: expected native byte order, got {a.dtype}")
        if a.dtype.name in _NAMED:
            code, bits = _NAMED[a.dtype.name]
        elif a.dtype.kind in _KINDS:
            code, bits = _KINDS[a.dtype.kind], 8 * a.dtype.itemsize
        else:
            raise TypeError(f"{name}: no DLPack type for {a.dtype}")
        if any(s % a.itemsize for s in a.strides):
            raise ValueError(f"{name}: expected strides in whole elements, got {a.strides} bytes")
        extents = c_int64 * a.ndim
        shape, strides = extents(*a.shape), extents(*(s // a.itemsize for s in a.strides))
        self._keep += [a, shape, strides]
        return pointer(
            _abi.Tensor(
                a.ctypes.data,
                _abi.Device(DEVICE_CPU, 0),
                a.ndim,
                _abi.DType(code, bits, 1),
                cast(shape, POINTER(c_int64)),
                cast(strides, POINTER(c_int64)),
                0,
            )
        )

    def _dlpack(self, name: str, array: SupportsDLPack, written: bool):
        # -1: no synchronisation. The caller's stream orders the work, as in C.
        stream = {"stream": -1} if array.__dlpack_device__()[0] == DEVICE_CUDA else {}
        try:
            capsule = array.__dlpack__(max_version=(1, 0), copy=False, **stream)
        except TypeError:  # An exporter from before DLPack 1.0.
            capsule = array.__dlpack__(**stream)
        # The capsule is kept, not consumed: with its name unchanged its destructor calls the deleter, once.
        self._keep.append(capsule)
        if not _is_valid(capsule, b"dltensor_versioned"):
            if not _is_valid(capsule, b"dltensor"):
                raise TypeError(f"{name}: __dlpack__ of {type(array).__name__} returned no DLPack capsule")
            return cast(_get_pointer(capsule, b"dltensor"), POINTER(_abi.Tensor))
        managed = _Versioned.from_address(_get_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise BufferError(f"{name}: expected DLPack 1, got {managed.major}.{managed.minor}")
        if managed.flags & _COPIED:
            raise BufferError(f"{name}: expected the tensor's own memory, got a copy of it")
        if written and managed.flags & _READ_ONLY:
            raise ValueError(f"{name}: expected a writable tensor")
        return pointer(managed.tensor)


class _Memory:
    """Memory of the library for numpy (host) and for consumers of ``__cuda_array_interface__`` (device)."""

    def __init__(self, t: _abi.Tensor, owner: object, read_only: bool):
        self._owner = owner
        bytes_each = t.dtype.bits // 8
        interface = {
            "data": (t.data + t.byte_offset, read_only),
            "shape": tuple(t.shape[: t.ndim]),
            "strides": tuple(s * bytes_each for s in t.strides[: t.ndim]),
            "typestr": f"<i{bytes_each}",
            "version": 3,
        }
        if t.device.device_type == DEVICE_CUDA:
            # torch takes no memory that is read-only.
            self.__cuda_array_interface__ = {**interface, "data": (interface["data"][0], False)}
        else:
            self.__array_interface__ = interface


def view(t: _abi.Tensor, owner: object, read_only: bool) -> Any:
    """int32 indices of the library without a copy, keeping ``owner`` alive: a numpy array, or on a device an object
    with ``__cuda_array_interface__``."""
    memory = _Memory(t, owner, read_only)
    return np.asarray(memory) if hasattr(memory, "__array_interface__") else memory
