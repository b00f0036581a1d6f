"""The figures of the bundled model's card, and what must hold of it.

  bits per byte   of held-out files, each scored whole: by torch in float32, and by the runtime in both dtypes
  recall          the share of questions answered right, over the number of pairs, by the runtime
  greedy          256 tokens of the runtime in float32 are the greedy ones of torch in float32
  text            what it makes of some prompts

`configs/based-bytes.sh` fetches the files. Exit status 1 when a bar is missed.
"""

import argparse
import json
import math
import random
from pathlib import Path

import based
import numpy as np
import torch
from bars import Bars
from based.models import pairs
from based.torch import BasedForCausalLM

PAIRS = (4, 8, 16, 32, 48, 64, 96, 128)
GREEDY_PROMPTS = ("def fibonacci(", pairs.statement(pairs.random_pairs(random.Random(5), 8)))
PROMPTS = ("def fibonacci(", "import os\nimport sys\n\n", ":mod:`!", "class Stack:\n    def push(self, item):\n")


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="based-bytes")
    parser.add_argument("--held-out", type=Path, default=Path("data/held-out"))
    parser.add_argument("--questions", type=int, default=1024, help="for each number of pairs, at least")
    parser.add_argument("--device", default="cpu", help="of torch and of the runtime")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    runtimes = {dtype: based.load(args.model, device=args.device, dtype=dtype) for dtype in ("float32", "bfloat16")}
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = BasedForCausalLM.load(args.model, device=args.device)
    end = runtimes["float32"].config.eos_token_id
    assert end is not None

    files = sorted(path for path in args.held_out.glob("*/*") if path.suffix in (".py", ".rst"))
    if not files:
        parser.error(f"{args.held_out}: no files")
    bits: dict[str, dict[str, float]] = {}
    nbytes = {}
    for path in files:
        ids = np.array([end, *path.read_bytes()])
        name, nbytes[path] = f"{path.parent.name}/{path.name}", len(ids) - 1
        tokens = torch.from_numpy(ids)[None].to(args.device)
        with torch.no_grad():
            nats = {"torch float32": float(reference(tokens, labels=tokens)) * nbytes[path]}
        for dtype, model in runtimes.items():
            nats[f"based {dtype}"] = -float(np.asarray(model.score(ids), np.float64).sum())
        bits[name] = {who: value / math.log(2) / nbytes[path] for who, value in nats.items()}
        print(f"{name:28}", "  ".join(f"{who} {value:.4f}" for who, value in bits[name].items()), flush=True)
    sizes = np.array(list(nbytes.values()))
    total = {
        who: float((np.array([b[who] for b in bits.values()]) * sizes).sum() / sizes.sum())
        for who in next(iter(bits.values()))
    }
    for folder in ("Lib", "Doc"):
        here = np.array([path.parent.name == folder for path in files])
        each = np.array([b["based bfloat16"] for b in bits.values()])
        print(f"{folder}: {(each * sizes)[here].sum() / sizes[here].sum():.4f} bits per byte, bfloat16")
    print(f"{len(files)} files, {sizes.sum():,} bytes:", "  ".join(f"{who} {x:.5f}" for who, x in total.items()))

    recall = {}
    for count in PAIRS:
        recall[count] = pairs.accuracy(runtimes["bfloat16"], count, args.questions, seed=10**6 + count)
        print(f"{count:4} pairs: {recall[count]:.4f} of at least {args.questions} questions right", flush=True)

    same = [_greedy_is_the_same(runtimes["float32"], reference, prompt) for prompt in GREEDY_PROMPTS]
    params = [based.SamplingParams(max_tokens=400, temperature=t, seed=1) for t in (0, 0.5, 0.8)]
    for prompt in PROMPTS:
        for param in params:
            text = runtimes["bfloat16"].generate(prompt, param)[0].outputs[0].text
            print(f"---- temperature {param.temperature}\n{prompt}|{text}")

    if args.json:
        args.json.write_text(json.dumps({"bits_per_byte": total, "files": bits, "recall": recall}, indent=1) + "\n")
    bars = Bars()
    bars.at_most("bits per byte, runtime − torch, float32", abs(total["based float32"] - total["torch float32"]), 1e-3)
    bars.at_most(
        "bits per byte, runtime in bfloat16 − torch", abs(total["based bfloat16"] - total["torch float32"]), 1e-2
    )
    bars.at_least("questions right at 32 pairs", recall[32], 0.95)
    bars.at_least("prompts with the same 256 greedy tokens", sum(same), len(same))
    bars.end()


def _greedy_is_the_same(model: based.Model, reference: BasedForCausalLM, prompt: str) -> bool:
    """Each of 256 tokens is what torch finds the likeliest after those before it: so it would have chosen the same."""
    params = based.SamplingParams(max_tokens=256, temperature=0, ignore_eos=True)
    output = model.generate(prompt, params)[0]
    chosen = output.outputs[0].token_ids
    ids = torch.tensor([*output.prompt_token_ids, *chosen], device=reference.embedding.weight.device)
    with torch.no_grad():
        logits = reference(ids[None, :-1])[0, -len(chosen) :, : model.config.vocab_size]
    return bool((logits.argmax(-1).cpu() == torch.tensor(chosen)).all())


if __name__ == "__main__":
    main()
