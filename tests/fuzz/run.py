"""Runs the fuzz targets: their corpora, then mutations of them for some seconds each.

    python tests/fuzz/run.py                                      # every corpus once
    python tests/fuzz/run.py safetensors --seconds 600            # one target, ten minutes
    python tests/fuzz/run.py --changed origin/main --seconds 600  # mutations where the code differs from a commit

C++ targets are built in build/fuzz with AddressSanitizer, UndefinedBehaviorSanitizer and coverage, and run by libFuzzer
when CXX is Clang, by driver.cc otherwise; or taken from --build. The Python targets need the package `based`.
A failing input is kept in build/fuzz/TARGET-crash; the exit status is then 1.
"""

import argparse
import faulthandler
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "fuzz"
BUILD = ROOT / "build" / "fuzz"
MAX_BYTES = 1 << 16
TIMEOUT = 10  # seconds for one input

# Target → the files whose change calls for it, as beginnings of their paths.
CPP = {
    "safetensors": ("cpp/io/safetensors", "cpp/io/json", "cpp/io/text", "cpp/io/file"),
    "config": ("cpp/io/config_json", "cpp/io/json", "cpp/io/text", "cpp/include/based/"),
    "state": (
        "cpp/io/state_file",
        "cpp/io/safetensors",
        "cpp/io/json",
        "cpp/session/state_io",
        "cpp/backend/state_layout",
    ),
    "index": ("cpp/io/weight_files", "cpp/io/json", "cpp/io/safetensors"),
}
PYTHON = {
    "pickle": ("python/based/_pickle.py",),
    "torch_file": ("python/based/_pickle.py",),
    "published": ("python/based/_published.py", "python/based/_json.py"),
    "tokenizer": ("python/based/_tokenizer",),
    "bpe_files": ("python/based/_tokenizer", "python/based/_json.py"),
    "train_yaml": ("python/based/torch/train/config.py",),
}
WORDS = rb'{ } [ ] null true -1 0 1e308 2147483647 18446744073709551616 "Fixed" "Regex" (a+)+$ \ud800'.split()
WORDS += [b"&a ", b"*a", b"!!int ", b"? ", b"\x1b[31m", b"\xff", b"\n  "]  # YAML, texts
WORDS += [b"\x80\x02", b"q\0", b"h\0", b"R", b"s", b"u", b"(", b"t", b"\x85", b"Q", b"\x8a\1\xff"]  # opcodes of pickle


def main() -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join([*CPP, *PYTHON])}; by default all")
    parser.add_argument("--seconds", type=float, default=0, help="of mutations, for each target (default 0)")
    parser.add_argument("--changed", metavar="COMMIT", help="mutate only where the code differs from this commit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--build", type=Path, help="a build folder that has the C++ targets (BASED_BUILD_FUZZ=ON)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.targets) - CPP.keys() - PYTHON.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if args.worker:
        return work(args.worker, args.seconds, args.seed)

    targets = args.targets or [*CPP, *PYTHON]
    changed = changed_files(args.changed) if args.changed else None
    BUILD.mkdir(parents=True, exist_ok=True)
    programs = args.build or BUILD
    if args.build is None and any(target in CPP for target in targets):
        build()
    failed = []
    for target in targets:
        files = CPP.get(target) or PYTHON[target]
        touched = changed is None or any(path.startswith(("tests/fuzz/", *files)) for path in changed)
        seconds = args.seconds if touched else 0
        print(f"{target}: ", end="", flush=True)
        if target in CPP:
            program = programs / "tests" / "fuzz" / f"fuzz_{target}"
            # libFuzzer takes a time of 0 for no limit
            options = [
                f"-max_total_time={seconds:g}" if seconds else "-runs=0",
                f"-seed={args.seed}",
                f"-timeout={TIMEOUT}",
            ]
            found = BUILD / f"{target}-found"  # libFuzzer writes what it finds into the first folder
            found.mkdir(exist_ok=True)
            command = [program, *options, f"-artifact_prefix={BUILD}/{target}-", found, FOLDER / "corpus" / target]
        else:
            command = [sys.executable, __file__, "--worker", target, f"--seconds={seconds}", f"--seed={args.seed}"]
        quiet = os.environ | {"RUST_BACKTRACE": "0"}  # of panics that are caught
        if subprocess.run(command, env=quiet).returncode != 0:
            failed.append(target)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def changed_files(commit: str) -> list[str] | None:
    """Paths that differ from a commit; None, for all, where git does not know it."""
    result = subprocess.run(["git", "diff", "--name-only", commit], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.split("\n") if result.returncode == 0 else None


def build() -> None:
    """Makes the C++ targets in build/fuzz."""
    options = ["BASED_BUILD_FUZZ=ON", "BASED_FUZZ_COVERAGE=ON", "BASED_BUILD_TESTS=OFF", "BASED_CUDA=OFF"]
    options += ["BASED_SANITIZE=address,undefined", "CMAKE_CXX_FLAGS_RELEASE=-O1"]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, *[f"-D{option}" for option in options]], check=True)
    subprocess.run(["cmake", "--build", BUILD, "-j", str(os.cpu_count())], check=True)


def work(target: str, seconds: float, seed: int) -> int:
    """One Python target, in a process of its own: what it runs may end it."""
    sys.path.insert(0, str(FOLDER))
    from python_targets import TARGETS

    call = TARGETS[target]
    faulthandler.register(signal.SIGALRM, chain=True)  # the stack, then the end of the process
    corpus = [path.read_bytes() for path in sorted((FOLDER / "corpus" / target).iterdir())]
    kept = BUILD / f"{target}-crash"
    with kept.open("w+b") as file:  # what runs now: there whatever ends the process
        file.truncate(MAX_BYTES + 8)
        now = mmap.mmap(file.fileno(), 0)
        rng, runs = random.Random(seed), 0

        def run(data: bytes, timeout: int = TIMEOUT) -> None:
            now[:8] = len(data).to_bytes(8, "little")
            now[8 : 8 + len(data)] = data
            signal.alarm(timeout)
            call(data)
            signal.alarm(0)

        try:
            run(b"", timeout=0)  # without a limit: the first run imports what the target needs
            end = time.monotonic() + seconds
            for data in corpus:
                run(data[:MAX_BYTES])
            while time.monotonic() < end:
                run(mutate(rng.choice(corpus), corpus, rng))
                runs += 1
        except BaseException:
            length = int.from_bytes(now[:8], "little")
            kept.with_suffix(".input").write_bytes(now[8 : 8 + length])
            print(f"the input is in {kept.with_suffix('.input')}", file=sys.stderr)
            raise
    kept.unlink()
    print(f"{len(corpus)} files of the corpus, {runs} mutations")
    return 0


def mutate(data: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Some changes of bits, bytes, words and parts."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randint(0, len(out)) for _ in range(2))
        j = min(j, i + 64)
        match rng.randrange(7):
            case 0 if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[rng.randrange(len(out))] = rng.randrange(256)
            case 2:
                del out[i:j]
            case 3:
                out[i:i] = out[i:j]
            case 4:
                out[i:i] = rng.choice(WORDS)
            case 5:
                out[i:j] = rng.choice(WORDS)
            case 6:
                other = rng.choice(corpus)
                out[i:] = other[rng.randint(0, len(other)) :]
    return bytes(out[:MAX_BYTES])


if __name__ == "__main__":
    sys.exit(main())
