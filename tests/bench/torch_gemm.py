"""Prefill against torch's bf16 matrix products.

Times the products of a 512-token prefill as torch's F.linear does them (bf16, the same shapes, every weight its own
memory, nothing else), and the whole prefill here, alternately in one process on the same number of threads.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from bars import Bars
from based import Model, sizes
from based.cli.bench import prefill_operations


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="360m", choices=sizes.SIZES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    config = sizes.named_config(args.size)
    model = Model.random(config, dtype="bfloat16", num_threads=args.threads)
    torch.set_num_threads(model.num_threads)
    session = model.session()
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=args.tokens)

    weights = [torch.randn(shape).bfloat16() for shape in sizes.gemm_shapes(config)]
    head = torch.randn(config.padded_vocab_size, config.hidden_size).bfloat16()
    inputs = {weight.shape[1]: torch.randn(args.tokens, weight.shape[1]).bfloat16() for weight in weights}
    last = torch.randn(1, config.hidden_size).bfloat16()

    def theirs() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        torch.nn.functional.linear(last, head)

    def ours() -> None:
        session.reset()
        session.prefill(prompt)

    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    with torch.inference_mode():
        for round_ in range(-2, args.rounds):  # two to warm up
            for name, run in (("theirs", theirs), ("ours", ours)):
                start = time.perf_counter()
                run()
                if round_ >= 0:
                    seconds[name].append(time.perf_counter() - start)

    median = {name: statistics.median(times) for name, times in seconds.items()}
    gflops = prefill_operations(config, args.tokens) / 1e9
    print(
        f"{args.tokens} tokens, {args.size}, {model.num_threads} threads, {model.kernel_isa}, torch {torch.__version__}"
    )
    print(f"torch, products alone  {median['theirs'] * 1e3:8.1f} ms  {gflops / median['theirs']:8.1f} GFLOP/s")
    print(f"based, whole prefill   {median['ours'] * 1e3:8.1f} ms  {gflops / median['ours']:8.1f} GFLOP/s")
    bars = Bars()
    ratio = statistics.median(t / o for t, o in zip(seconds["theirs"], seconds["ours"], strict=True))
    bars.at_least("speed of prefill over that of torch's products", ratio, 0.7)
    bars.end()


if __name__ == "__main__":
    main()
