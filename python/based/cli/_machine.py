"""What a measurement says of the code and the machine that it was made with."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any


def torch_with_cuda(measured: str) -> Any | None:
    """PyTorch, where it can use a GPU; else None, with a note on stderr that `measured` is not."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        return torch
    print(f"based: note: {measured} is not measured: that needs PyTorch with CUDA", file=sys.stderr)
    return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "+" for changes; None when it runs from elsewhere."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in another repository
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """As the system tells it."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
