r"""Documents that ask for what they said before: recall in context, as the bundled model learns it.

    # remember
    kelo=482
    tuva=093
    # recall
    tuva=093
    kelo=482

Keys are made-up words, values three digits, both random, so that only the document itself has the answers.
`python -m based.models.pairs` writes such documents to train on; `accuracy` asks a model.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from based._core import SamplingParams

if TYPE_CHECKING:
    from based import Model, Session

REMEMBER, RECALL = "# remember\n", "# recall\n"
VALUE_DIGITS = 3
ANSWER_TOKENS = 2 * VALUE_DIGITS
"""More than a right answer has, and the newline after it."""
MOST_PAIRS = 1000
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
_SHORTEST, _LONGEST = 1, 64  # pairs of a training document
_ROUNDS = 3  # how often a training document asks for each of its pairs

Pair = tuple[str, str]


def random_pairs(rng: random.Random, count: int) -> list[Pair]:
    """`count` pairs with different keys; from rng.random() alone, whose stream Python promises to keep.

    Raises ValueError unless 1 ≤ count ≤ MOST_PAIRS.
    """
    if not 1 <= count <= MOST_PAIRS:
        raise ValueError(f"{count} pairs, expected 1 to {MOST_PAIRS}")
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        key = "".join(_choice(rng, letters) for letters in (_CONSONANTS, _VOWELS) * 2)
        pairs.setdefault(key, "".join(_choice(rng, "0123456789") for _ in range(VALUE_DIGITS)))
    return list(pairs.items())


def statement(pairs: Sequence[Pair]) -> str:
    """What comes before the questions."""
    return REMEMBER + "".join(f"{question(key)}{value}\n" for key, value in pairs) + RECALL


def question(key: str) -> str:
    """What a value and a newline answer."""
    return f"{key}="


def documents(count: int, seed: int) -> Iterator[str]:
    """Training documents, the same for the same seed on every machine.

    Of n = 1 to 64 pairs with a probability of about 1/n², so that each doubling of n has an equal share of the text: on
    small ones a model learns how, on large ones how much. Each pair is asked for three times, in random order.
    """
    rng = random.Random(seed)
    for _ in range(count):
        most, least = 1 / _SHORTEST, 1 / (_LONGEST + 1)
        pairs = random_pairs(rng, int(1 / (most - rng.random() * (most - least))))
        asked = sorted(pairs * _ROUNDS, key=lambda _: rng.random())
        yield statement(pairs) + "".join(f"{question(key)}{value}\n" for key, value in asked)


def ask(session: "Session", keys: Sequence[str]) -> list[str]:
    """Asks each sequence, which has seen a statement, for one key: the greedy answers, up to the end of the line."""
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, stop=["\n"])
    return [output.outputs[0].text for output in session.generate([question(key) for key in keys], params)]


def accuracy(model: "Model", num_pairs: int, num_questions: int, *, seed: int) -> float:
    """The share of questions that a model answers right: the whole value, greedily, and nothing after it.

    Args:
        model: Has a tokenizer.
        num_pairs: Of each document, up to MOST_PAIRS. All are asked for, each right after the statement (of which they
            share one state), so that no question sees another one's answer.
        num_questions: At least; documents are asked whole.
        seed: Of the pairs.

    Raises:
        ValueError: num_pairs or num_questions is outside its domain.
    """
    if num_questions < 1:
        raise ValueError(f"{num_questions} questions, expected at least 1")
    rng = random.Random(seed)
    right = asked = 0
    while asked < num_questions:
        pairs = random_pairs(rng, num_pairs)
        session = model.session(num_pairs)
        session.prefill(statement(pairs), [0])
        for sequence in range(1, num_pairs):
            session.copy(0, sequence)
        answers = ask(session, [key for key, _ in pairs])
        right += sum(answer == value for answer, (_, value) in zip(answers, pairs, strict=True))
        asked += num_pairs
    return right / asked


def _choice(rng: random.Random, letters: str) -> str:
    return letters[int(rng.random() * len(letters))]


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m based.models.pairs", description='Writes documents of key-value pairs, a line {"text": …} each.'
    )
    parser.add_argument("count", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other documents (default: 0)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"count: {args.count} is not ≥ 1")
    for text in documents(args.count, args.seed):
        sys.stdout.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    _main()
