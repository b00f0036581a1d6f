"""Import time, load time and peak memory, each in fresh processes, on a model directory in page cache."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bars import Bars
from based import GatedConvConfig, LinearAttentionConfig, ModelConfig, SlidingWindowConfig, _core, sizes

IMPORT = """
import time, numpy
start = time.perf_counter()
import based
print(time.perf_counter() - start)
"""

LOAD = """
import json, sys, time, based

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before, start = peak(), time.perf_counter()
model = based.load(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "before": before, "peak": peak(), "weights": model.weight_nbytes,
                  "dtype": model.dtype}))
"""


def write_model(config: ModelConfig, directory: Path) -> None:
    """A bfloat16 model directory of this shape, its weights small random numbers."""
    random = np.random.default_rng(0)
    d = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.padded_vocab_size, d)}
    fc1_rows = (2 if config.mlp.gated else 1) * config.mlp.inner_size
    for i, mixer in enumerate(config.layers):
        layer: dict[str, tuple[int, ...]] = {"norm1.weight": (d,), "norm2.weight": (d,)}
        layer |= {"mlp.fc1.weight": (fc1_rows, d), "mlp.fc2.weight": (d, config.mlp.inner_size)}
        match mixer:
            case GatedConvConfig():
                e = mixer.inner_size
                layer |= {"mixer.in_proj.weight": (2 * e, d), "mixer.in_proj.bias": (2 * e,)}
                layer |= {"mixer.conv.weight": (e, mixer.kernel_size)}
                layer |= {"mixer.out_proj.weight": (d, e), "mixer.out_proj.bias": (d,)}
            case LinearAttentionConfig():
                features, inner = mixer.num_heads * mixer.feature_dim, mixer.num_heads * mixer.head_dim
                layer |= {"mixer.proj_q.weight": (features, d), "mixer.proj_k.weight": (features, d)}
                layer |= {"mixer.proj_v.weight": (inner, d), "mixer.out_proj.weight": (d, inner)}
            case SlidingWindowConfig():
                inner = mixer.num_heads * mixer.head_dim
                layer |= {"mixer.qkv_proj.weight": (inner + 2 * mixer.num_kv_heads * mixer.head_dim, d)}
                layer |= {"mixer.out_proj.weight": (d, inner)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm.weight"] = (d,)

    def tensor(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        # Upper halves of float32s: bfloat16, cut off.
        noise = random.standard_normal(shape, dtype=np.float32) * 0.02
        return (noise.view(np.uint32) >> 16).astype(np.uint16)

    tensors = [(name, tensor(shape), "bfloat16") for name, shape in shapes.items()]
    (directory / "config.json").write_text(config.to_json())
    _core.write_safetensors(directory / "model.safetensors", tensors, {})


def run(code: str, *args: str) -> str:
    """stdout of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="360m", choices=sizes.SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    bars = Bars()

    run(IMPORT)  # into page cache
    bars.at_most(
        "import based, beyond import numpy", statistics.median(float(run(IMPORT)) for _ in range(7)), 0.15, "s"
    )

    with tempfile.TemporaryDirectory() as directory:
        write_model(sizes.named_config(args.size), Path(directory))
        (Path(directory) / "model.safetensors").read_bytes()  # into page cache
        records = [json.loads(run(LOAD, directory)) for _ in range(args.rounds)]
    weights = records[0]["weights"]
    peak = max(record["peak"] for record in records)
    print(f"{args.size}, {records[0]['dtype']}: weights {weights / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, of which")
    print(f"the interpreter with numpy and based {records[0]['before'] / 1e6:.1f} MB before the load")
    bars.at_most("load from page cache", statistics.median(record["seconds"] for record in records), 1.0, "s")
    bars.at_most("peak memory of the process over its weights", peak / weights, 1.15)
    bars.end()


if __name__ == "__main__":
    main()
