"""Makes train.bin, calibration.txt and heldout.txt from the Rust 1.63.0 sources.

The text is Debian's package rust-src 1.63.0+dfsg1-2 (MIT or Apache-2.0):

    apt-get download rust-src=1.63.0+dfsg1-2
    dpkg -x rust-src_1.63.0+dfsg1-2_all.deb rust-src
    python prepare.py rust-src/usr/src/rustc-1.63.0
"""

import argparse
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {
    "rs": ["library", "compiler", "src/librustdoc", "src/tools/clippy", "src/tools/rustfmt", "src/tools/compiletest"],
    "md": ["library", "src/doc/book", "src/doc/reference", "src/doc/rust-by-example", "src/doc/nomicon", "src/doc/rustc",
           "src/doc/rustc-dev-guide", "src/doc/edition-guide", "src/doc/rustdoc", "src/tools/clippy"],
}
# Machine-written intrinsics and tables: easy bytes that say nothing about a model.
SKIPPED = ("library/stdarch/", "library/core/src/unicode/", "library/core/src/num/dec2flt/table.rs")
LARGEST = 200_000
HELD_OUT_FROM = ("library/alloc/src/", "library/core/src/", "library/std/src/", "src/doc/book/", "src/doc/reference/")
HELD_OUT_SIZES = range(8_000, 64_000)
CONTEXT = 2048
HELD_OUT_BYTES = CONTEXT * 192
CALIBRATION_SETS, CALIBRATION_ROWS = 3, 32
# A held-out file may share at most this part of its long lines with the rest: macros and tests repeat themselves.
MOST_SHARED = 0.08


def order(path):
    return hashlib.sha256(path.encode()).digest()


def long_lines(text):
    return [line for line in map(bytes.strip, text.split(b"\n")) if len(line) >= 40]


def calibration_text(train):
    """Evenly spaced rows of the training text, dealt out to the sets in turn; the rows of a set lie together."""
    count = CALIBRATION_SETS * CALIBRATION_ROWS
    starts = [i * (len(train) // count) for i in range(count)]
    dealt = [start for k in range(CALIBRATION_SETS) for start in starts[k::CALIBRATION_SETS]]
    return b"".join(train[start : start + CONTEXT] for start in dealt)


def read_files(root):
    files, seen = {}, set()
    for suffix, folders in SOURCES.items():
        for folder in folders:
            for path in sorted((root / folder).rglob(f"*.{suffix}")):
                name = path.relative_to(root).as_posix()
                if path.is_symlink() or not path.is_file() or name.startswith(SKIPPED):
                    continue
                text = path.read_bytes()
                digest = hashlib.sha256(text).digest()
                if len(text) <= LARGEST and digest not in seen:
                    seen.add(digest)
                    files[name] = text
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder rustc-1.63.0")
    files = read_files(parser.parse_args().root)

    counts = {}
    for text in files.values():
        for line in set(long_lines(text)):
            counts[line] = counts.get(line, 0) + 1

    held, size = [], 0
    for name in sorted(files, key=order):
        if size >= HELD_OUT_BYTES:
            break
        lines = long_lines(files[name])
        if name.startswith(HELD_OUT_FROM) and len(files[name]) in HELD_OUT_SIZES and lines:
            if sum(counts[line] > 1 for line in lines) <= MOST_SHARED * len(lines):
                held.append(name)
                size += len(files[name])

    train = [name for name in sorted(files, key=order) if name not in set(held)]
    (HERE / "heldout.txt").write_bytes(b"".join(files[name] for name in held)[:HELD_OUT_BYTES])
    train_text = b"".join(files[name] for name in train)
    (HERE / "train.bin").write_bytes(train_text)
    (HERE / "calibration.txt").write_bytes(calibration_text(train_text))

    train_lines = {line for name in train for line in long_lines(files[name])}
    held_lines = [line for name in held for line in long_lines(files[name])]
    shared = sum(line in train_lines for line in held_lines) / len(held_lines)
    print(f"train: {len(train)} files, {sum(len(files[name]) for name in train)} bytes")
    print(f"held out: {HELD_OUT_BYTES} bytes, {shared:.1%} of its long lines also occur in the training text, from {len(held)} files:")
    print("\n".join(held))


if __name__ == "__main__":
    main()
