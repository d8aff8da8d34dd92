"""The ctypes mirror against indexcache.h, and the Python names against the C names."""

import ctypes
import dataclasses
import inspect
import re
import shutil
import subprocess
from ctypes import POINTER
from pathlib import Path

import pytest

import indexcache as ix
from indexcache import _abi, constants

HEADER = Path(__file__).resolve().parents[3] / "include" / "indexcache" / "indexcache.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.S)

SCALARS = {
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "idxc_status": ctypes.c_int32,
    "idxc_log_callback": _abi.LogCallback,
}


def python_name(c_name):
    """idxc_index_k_write_desc: IndexKWriteDesc."""
    special = {"idxc_dtype": "DType", "idxc_api": "Api"}
    return special.get(c_name) or "".join(p.capitalize() for p in c_name.split("_")[1:])


def split(declaration):
    """'const struct idxc_tensor *q': (type, 'q')."""
    match = re.fullmatch(r"(.*?)(\w+)", declaration.strip(), flags=re.S)
    return match[1].strip(), match[2]


def ctype(c):
    """A C type in ctypes."""
    c = re.sub(r"\b(const|struct)\b", "", c)
    stars, base = c.count("*"), c.replace("*", "").strip()
    if base in ("char", "void") and stars:
        t, stars = (ctypes.c_char_p if base == "char" else ctypes.c_void_p), stars - 1
    elif base == "void":
        return None
    else:
        t = SCALARS.get(base) or getattr(_abi, python_name(base))
    for _ in range(stars):
        t = POINTER(t)
    return t


STRUCTS = dict(
    (name, [split(f) for f in body.split(";") if f.strip()])
    for body, name in re.findall(r"typedef struct idxc_\w+ \{(.*?)\} (idxc_\w+);", TEXT, flags=re.S)
)
TABLE = re.search(r"struct idxc_api \{(.*?)\};", TEXT, flags=re.S)[1]
ENTRIES = re.findall(r"([^;]*?)\(\*(\w+)\)\((.*?)\);", TABLE, flags=re.S)


def test_every_struct():
    assert len(STRUCTS) >= 17
    for name, fields in STRUCTS.items():
        mirror = getattr(_abi, python_name(name))
        assert mirror._fields_ == [(n, ctype(c)) for c, n in fields], name


def test_every_table_entry_in_order():
    assert [name for _, name, _ in ENTRIES] == [name for name, *_ in _abi.FUNCTIONS]
    head = [split(f) for f in TABLE.split("(*")[0].split(";")[:2]]
    assert [(n, ctype(c)) for c, n in head] == _abi.Api._fields_[:2]
    for (result, name, args), (_, *ours) in zip(ENTRIES, _abi.FUNCTIONS):
        want = [] if args.strip() == "void" else [ctype(split(a)[0]) for a in args.split(",")]
        assert ours == [ctype(result), *(_abi.CHECKED.get(t, t) for t in want)], name


def test_every_constant():
    defined = dict(re.findall(r"#define IDXC_(\w+) (\d+)", TEXT))
    assert {n: int(v) for n, v in defined.items()} == {n: v for n, v in vars(constants).items() if n.isupper()}


def test_sizes_and_offsets_as_the_compiler_has_them(tmp_path):
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        pytest.skip("no C compiler")
    lines, ours = [], []
    for name, fields in STRUCTS.items():
        mirror = getattr(_abi, python_name(name))
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        ours.append(f"{name} {ctypes.sizeof(mirror)}")
        for _, f in fields:
            lines.append(f'printf("{name}.{f} %zu\\n", offsetof({name}, {f}));')
            ours.append(f"{name}.{f} {getattr(mirror, f).offset}")
    lines.append('printf("api %zu\\n", sizeof(struct idxc_api));')
    ours.append(f"api {ctypes.sizeof(_abi.Api)}")
    source = tmp_path / "sizes.c"
    body = "\n".join(lines)
    source.write_text(f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{body}\nreturn 0; }}\n')
    subprocess.run([cc, "-std=c99", str(source), "-o", str(tmp_path / "sizes")], check=True)
    out = subprocess.run([str(tmp_path / "sizes")], check=True, stdout=subprocess.PIPE, universal_newlines=True).stdout
    assert out.split("\n")[:-1] == ours


def test_every_descriptor_has_a_class_with_its_fields():
    descriptors = [n for n in STRUCTS if n.endswith("_desc")]
    assert len(descriptors) >= 10
    for name in descriptors:
        ours = {f.name for f in dataclasses.fields(getattr(ix, python_name(name)))}
        theirs = {n for _, n in STRUCTS[name] if not n.endswith("_count")}  # A list has its own length.
        assert ours == theirs - {"struct_size", "reserved"}, name


def test_every_function_has_a_python_function():
    """By the handle it makes or takes first; stateless ones are the module's."""
    owners = {"context": ix.Context, "plan": ix.Plan, "cache": ix.Cache, "search": ix.Search}
    for _, name, args in ENTRIES:
        short = name[len("idxc_") :]
        kind = next((k for k in owners if short.startswith(k + "_")), None)
        if kind:
            owner, short = owners[kind], short[len(kind) + 1 :]
        else:
            owner = ix.Cache if "idxc_cache *cache" in args else ix
        short = {"create": "__init__"}.get(short, short)
        function = getattr(owner, short)
        assert function.__doc__ or short == "__init__", name
        if "void *stream" in args:
            assert "stream" in inspect.signature(function).parameters, name
