"""Completes the prompts of a file of JSON lines on a cluster of Ray: python complete.py PROMPTS OUTPUT [GPUS].

A line is {"prompt": TEXT} and may have "params", arguments of based.SamplingParams for it alone. OUTPUT is a folder of
JSON lines. Without GPUS two workers have a CPU each.
"""

import json
import sys
from pathlib import Path

import ray
from based.ray import Completer


def main(prompts: str, output: str, gpus: int = 0, batch_size: int = 4096) -> None:
    """Runs on the cluster that $RAY_ADDRESS names, or on this machine."""
    lines = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    rows = [{"prompt": line["prompt"], "params": line.get("params")} for line in lines]
    done = ray.data.from_items(rows).map_batches(
        Completer,
        fn_constructor_kwargs={"params": {"max_tokens": 32, "temperature": 0}, "row_params": "params"},
        batch_size=batch_size,
        num_gpus=1 if gpus else 0,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=gpus or 2),
    )
    done.write_json(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
