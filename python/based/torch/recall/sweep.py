"""Which models are trained, on what, and how: the authors' sweep, and smaller ones."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from based.torch.recall.data import Examples, Setting, make_examples
from based.torch.recall.families import FAMILIES, Candidate

_TRAINING, _VALIDATION, _TEST = range(3)  # of which the texts are independent


@dataclass(frozen=True, slots=True)
class Run:
    """A model to be trained at one learning rate."""

    candidate: Candidate
    learning_rate: float

    @property
    def name(self) -> str:
        """Of its folder."""
        rate = f"{self.learning_rate:g}"
        return f"{self.candidate.name}-lr{rate if float(rate) == self.learning_rate else self.learning_rate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep. Raises ValueError when it makes no sense.

    The defaults are those of the authors' Figure 2 (arXiv:2402.18668), but two of its four learning rates (1e-3 to
    3.2e-2), at most 16 of its 32 epochs, and `patience`: minutes on one GPU.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    widths: tuple[int, ...] = (48, 64, 128)
    """Hidden sizes; windows have the largest alone."""
    feature_dims: tuple[int, ...] = (8, 16, 24)
    windows: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Keys. One as long as the longest text is full attention, which is a family of its own."""
    learning_rates: tuple[float, ...] = (1e-3, 3.2e-3)
    epochs: int = 16
    stop_at: float = 0.999
    """Training ends when the accuracy on the validation texts reaches this."""
    patience: int = 6
    """Training also ends when that accuracy has not grown by 0.002 for so many epochs."""
    batch_size: int = 256
    weight_decay: float = 0.01
    dropout: float = 0.1
    """Share of the embeddings' numbers that a training step sets to zero."""
    vocab_size: int = 8192
    train: tuple[tuple[Setting, int], ...] = (
        (Setting(64, 4), 100_000),
        (Setting(128, 8), 20_000),
        (Setting(256, 16), 20_000),
        (Setting(256, 32), 20_000),
        (Setting(256, 64), 20_000),
    )
    """Settings, and how many texts of each."""
    test: tuple[Setting, ...] = (
        Setting(64, 4),
        Setting(64, 8),
        Setting(64, 16),
        Setting(128, 32),
        Setting(256, 64),
        Setting(512, 128),
        Setting(1024, 256),
    )
    test_examples: int = 1000
    """Of each setting."""
    validation_examples: int = 128
    """Of each test setting: other texts, which choose the learning rate and end the training."""
    seed: int = 0

    @classmethod
    def quick(cls, **changes: Any) -> "Sweep":
        """One that takes seconds on a CPU: a vocabulary of 64, texts of 16 to 64 tokens, one model of each family."""
        small: dict[str, Any] = {
            "widths": (32,),
            "feature_dims": (8,),
            "windows": (4,),
            "learning_rates": (1e-2,),
            "epochs": 2,
            "batch_size": 32,
            "vocab_size": 64,
            "train": ((Setting(16, 2), 640), (Setting(32, 4), 320)),
            "test": (Setting(16, 2), Setting(32, 4), Setting(64, 8)),
            "test_examples": 100,
            "validation_examples": 50,
        }
        return cls(**(small | changes))

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise ValueError(f"families has {name!r}, expected some of {', '.join(FAMILIES)}")
        for key in ("families", "widths", "feature_dims", "windows", "learning_rates", "train", "test"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key} is {values}, expected one or several different values")
        for key in ("widths", "feature_dims", "windows"):
            if min(getattr(self, key)) < 1:
                raise ValueError(f"{key} has {min(getattr(self, key))}, expected integers ≥ 1")
        for key in ("epochs", "patience", "batch_size", "test_examples", "validation_examples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, expected ≥ 1")
        if not all(rate > 0 and math.isfinite(rate) for rate in self.learning_rates):
            raise ValueError(f"learning_rates is {self.learning_rates}, expected finite numbers > 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a number ≥ 0 and < 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected ≥ 0")
        if max(self.windows) >= self.max_length:
            found = f"{max(self.windows)}, expected less than {self.max_length}, the length of the longest text"
            raise ValueError(f"windows has {found}: that is the family attention")
        for setting in (*self.test, *(setting for setting, _ in self.train)):
            setting.check(self.vocab_size)
        for setting, count in self.train:
            if count < self.batch_size:
                raise ValueError(f"{count} training texts of {setting}, expected at least batch_size {self.batch_size}")

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return max(setting.length for setting in (*self.test, *(setting for setting, _ in self.train)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches have one setting each; texts that fill none are left out of an epoch."""
        return sum(count // self.batch_size for _, count in self.train)

    def candidates(self) -> list[Candidate]:
        """The models, wide ones first: they take longest."""
        found = [candidate for name in self.families for candidate in FAMILIES[name].candidates(self)]
        return sorted(found, key=lambda candidate: -candidate.width)

    def runs(self) -> Iterator[Run]:
        """What is to be trained, in this order."""
        candidates = self.candidates()
        for rate in self.learning_rates:
            for candidate in candidates:
                yield Run(candidate, rate)

    def training_examples(self) -> list[Examples]:
        """Of each of `train`."""
        return [self._examples(setting, count, _TRAINING) for setting, count in self.train]

    def validation_examples_of(self) -> list[Examples]:
        """Of each of `test`."""
        return [self._examples(setting, self.validation_examples, _VALIDATION) for setting in self.test]

    def test_examples_of(self) -> list[Examples]:
        """Of each of `test`."""
        return [self._examples(setting, self.test_examples, _TEST) for setting in self.test]

    def _examples(self, setting: Setting, count: int, part: int) -> Examples:
        return make_examples(setting, count, self.vocab_size, (self.seed, part))

    def to_json(self) -> dict[str, Any]:
        """What sweep.json says: plain numbers, texts and lists."""
        document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return document
