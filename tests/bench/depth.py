"""Time per token deep in a sequence against time per token at its beginning.

Two sessions of one model, prefilled to the two depths, are stepped in turns, so that whatever else the machine does
touches both.
"""

import argparse
import statistics
import time

import numpy as np
from bars import Bars
from based import Model, sizes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="360m", choices=sizes.SIZES)
    parser.add_argument("--shallow", type=int, default=64)
    parser.add_argument("--deep", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    config = sizes.named_config(args.size)
    model = Model.random(config, dtype="bfloat16", num_threads=args.threads)
    random = np.random.default_rng(0)
    sessions = {depth: model.session() for depth in (args.shallow, args.deep)}
    for depth, session in sessions.items():
        start = time.perf_counter()
        session.prefill(random.integers(config.vocab_size, size=depth))
        print(f"prefilled {depth} tokens in {time.perf_counter() - start:.1f} s", flush=True)

    seconds: dict[int, list[float]] = {depth: [] for depth in sessions}
    for round_ in range(-5, args.rounds):  # five to warm up
        for depth in sorted(sessions, reverse=round_ % 2 == 1):  # each one first in half of the rounds
            token = random.integers(config.vocab_size, size=1)
            start = time.perf_counter()
            sessions[depth].step(token)
            if round_ >= 0:
                seconds[depth].append(time.perf_counter() - start)

    for depth, times in seconds.items():
        print(f"depth {depth:6}: {statistics.median(times) * 1e3:.3f} ms per token, median of {len(times)}")
    bars = Bars()
    pairs = zip(seconds[args.deep], seconds[args.shallow], strict=True)
    bars.at_most("time per token, deep over shallow", statistics.median(d / s for d, s in pairs), 1.03)
    bars.end()


if __name__ == "__main__":
    main()
