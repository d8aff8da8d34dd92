"""Checks what the compiler made of the kernels for one architecture: `python3 kernels/check.py [FILE.cu ...]`.

Such a file (`*_sm90.cu`) says in its head comment what its machine code must be like:

    // Tensor cores: QGMMA
    // May spill:    name_of_kernel (why)

The first line is required: the tensor-core instructions that the file has, all of them and no others, or `none`.
A kernel that the second does not name must not spill registers. wgmma that the compiler serialises and a `setmaxnreg`
that it ignores are never right. Needs nvcc and nvdisasm (CUDA_HOME, PATH, or the Python wheels).
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# By the number in a file's name: the target with all of the architecture's instructions.
TARGETS = {"90": "90a"}
IGNORED = re.compile(r"(?i)setmaxnreg.*ignored|wgmma.*serializ|potential performance loss")


def tool(name):
    """A program of the CUDA toolkit."""
    homes = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        homes += sorted(Path(root).glob("*"))
    found = [home / "bin" / name for home in homes if (home / "bin" / name).is_file()]
    found += [Path(p) for p in [shutil.which(name)] if p]
    if not found:
        sys.exit(f"{name} is not in CUDA_HOME, on PATH or in the wheel nvidia-cuda-{name}")
    return str(found[0])


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}{done.stdout}")
    return done.stdout + done.stderr


def declared(source, what):
    """The line of the head comment that starts with `what`."""
    head = re.match(r"(?://.*\n)*", source).group()
    line = re.search(rf"^// {what}:[ ]*(.*)$", head, re.MULTILINE)
    return line and line.group(1)


def compiled(path, target, folder):
    """What ptxas says, and by kernel the tensor-core instructions."""
    cubin = str(Path(folder) / (path.stem + ".cubin"))
    arch = f"-gencode=arch=compute_{target},code=sm_{target}"
    # As build.rs compiles it.
    flags = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"]
    report = run(tool("nvcc"), *flags, arch, "-cubin", "-o", cubin, str(path))
    instructions, kernel = {}, None
    for line in run(tool("nvdisasm"), "-c", cubin).splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            kernel = instructions.setdefault(section.group(1), {})
        elif kernel is not None and (mma := re.search(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w*MMA)\b", line)):
            kernel[mma.group(1)] = kernel.get(mma.group(1), 0) + 1
    return report, instructions


def check(path, folder):
    """Prints a line a kernel; gives what is wrong."""
    source, wrong = path.read_text(), []
    number = re.search(r"_sm(\d+)$", path.stem)
    if not number or number.group(1) not in TARGETS:
        return [f"{path}: expected a name that ends in one of {', '.join('_sm' + n for n in TARGETS)}"]
    want = declared(source, "Tensor cores")
    if not want:
        wrong.append(f"{path}: the head comment has no line `// Tensor cores: …`")
    want = set(re.findall(r"\w+", want or "none")) - {"none"}
    may_spill = declared(source, "May spill") or ""
    may_spill = set(re.findall(r"\w+", may_spill.partition("(")[0]))

    report, instructions = compiled(path, TARGETS[number.group(1)], folder)
    wrong += [f"{path}: {line.strip()}" for line in report.splitlines() if IGNORED.search(line)]
    properties = re.compile(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"(?:\n.*?Used (\d+) registers)?"
    )
    spills = set()
    for name, stack, stores, loads, registers in properties.findall(report):
        mma = ", ".join(f"{n} {what}" for what, n in sorted(instructions.get(name, {}).items()))
        print(f"{path.name:<24} {name:<32} {registers or '-':>4} registers {stack:>5} B stack {stores:>5} B spilled  {mma}")
        if int(stores) or int(loads):
            spills.add(name)
    have = {mma for kernel in instructions.values() for mma in kernel}
    wrong += [f"{path}: {name} spills registers" for name in sorted(spills - may_spill)]
    wrong += [f"{path}: {name} may spill, it says, and does not" for name in sorted(may_spill - spills)]
    wrong += [f"{path}: no {mma}" for mma in sorted(want - have)]
    wrong += [f"{path}: has {mma}, which the head comment does not name" for mma in sorted(have - want)]
    return wrong


def main():
    here = Path(__file__).parent
    files = [Path(a) for a in sys.argv[1:]] or sorted(here.glob("*_sm[0-9]*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        wrong = [line for path in files for line in check(path, folder)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
