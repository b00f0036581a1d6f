"""Which models are trained, on what, and how: the authors' sweep, and smaller ones."""

import dataclasses
import fnmatch
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from based.torch.recall.data import Examples, Setting, make_examples
from based.torch.recall.families import FAMILIES, Candidate

_TRAINING, _VALIDATION, _TEST = range(3)  # of which the texts are independent
_AUTHORS: dict[str, Any] = {
    "learning_rates": (1e-3, 3.2e-3, 1e-2, 3.2e-2),
    "epochs": 32,
    "stop_at": 0.99,
    "patience": None,
    "batch_size": 256,
    "weight_decay": 0.1,
    "dropout": 0.1,
    "schedule": "epoch",
    "first_weights": "authors",
    "tf32": False,
}
"""How the authors train the models of their Figure 2."""
_QUICK: dict[str, Any] = {
    "widths": (32,),
    "rival_widths": (64,),
    "feature_dims": (8,),
    "windows": (4,),
    "state_sizes": (4,),
    "learning_rates": (1e-2,),
    "epochs": 2,
    "batch_size": 32,
    "vocab_size": 64,
    "train": ((Setting(16, 2), 640), (Setting(32, 4), 320)),
    "test": (Setting(16, 2), Setting(32, 4), Setting(64, 8)),
    "test_examples": 100,
    "validation_examples": 50,
}
_CHOICES = ("families", "widths", "rival_widths", "feature_dims", "windows", "state_sizes", "points")
"""Keys that say which models are trained, and nothing of what becomes of one."""


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

    Texts and models are those of the authors' Figure 2 (arXiv:2402.18668) and their plot of 2025. The training is ours,
    minutes of one GPU for BASED; `Sweep.authors()` has theirs.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    widths: tuple[int, ...] = (48, 64, 128)
    """Hidden sizes of BASED and attention; windows have the largest alone."""
    rival_widths: tuple[int, ...] = (64, 128, 256)
    """Hidden sizes of the other families."""
    feature_dims: tuple[int, ...] = (8, 16, 24)
    windows: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Keys. One as long as the longest text is full attention, which is a family of its own."""
    state_sizes: tuple[int, ...] = (8, 16, 24)
    """Numbers of state of each channel of a scan."""
    points: tuple[str, ...] = ()
    """Names of models, or patterns of them (`mamba-d128-*`): these alone. Empty: all of the families."""
    learning_rates: tuple[float, ...] = (1e-3, 3.2e-3)
    epochs: int = 16
    stop_at: float = 0.999
    """Training ends when the accuracy on the validation texts reaches this."""
    patience: int | None = 6
    """Training also ends when that accuracy has not grown by 0.002 for so many epochs; None: it does not."""
    batch_size: int = 256
    weight_decay: float = 0.01
    dropout: float = 0.1
    """Share of the embeddings' numbers that a training step sets to zero."""
    schedule: str = "step"
    """The rate falls along half a cosine to 0: "step", with each step; "epoch", after each epoch."""
    first_weights: str = "published"
    """Their standard deviation: "published", √(2/5d) as of the published BASED models; "authors", 0.02 as in the
    authors' recall experiments. Those of Mamba, Mamba-2 and RWKV-7 follow their own authors' rules either way."""
    tf32: bool = True
    """Whether products on a GPU round their factors to 10 bits of mantissa."""
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
    def of(cls, settings: str, *, quick: bool = False, **changes: Any) -> "Sweep":
        """One with the training of the "authors", but for what `differences` says, or "ours".

        quick: one that takes seconds on a CPU: a vocabulary of 64, texts of 16 to 64 tokens, one model of each family,
        two epochs at one rate.
        """
        if settings not in ("ours", "authors"):
            raise ValueError(f"settings is {settings!r}, expected ours or authors")
        training = _AUTHORS if settings == "authors" else {}
        return cls(**(training | (_QUICK if quick else {}) | changes))

    @classmethod
    def authors(cls, **changes: Any) -> "Sweep":
        """One trained as the authors train theirs: of("authors")."""
        return cls.of("authors", **changes)

    @classmethod
    def quick(cls, **changes: Any) -> "Sweep":
        """One that takes seconds on a CPU: of("ours", quick=True)."""
        return cls.of("ours", quick=True, **changes)

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise ValueError(f"families has {name!r}, expected some of {', '.join(FAMILIES)}")
        grid = ("widths", "rival_widths", "feature_dims", "windows", "state_sizes")
        for key in ("families", *grid, "learning_rates", "train", "test"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key} is {values}, expected one or several different values")
        for key in grid:
            if min(getattr(self, key)) < 1:
                raise ValueError(f"{key} has {min(getattr(self, key))}, expected integers ≥ 1")
        for key in ("epochs", "patience", "batch_size", "test_examples", "validation_examples"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, expected ≥ 1")
        for key, known in (("schedule", ("step", "epoch")), ("first_weights", ("published", "authors"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected {' or '.join(known)}")
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
        self.candidates()

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return max(setting.length for setting in (*self.test, *(setting for setting, _ in self.train)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches have one setting each; texts that fill none are left out of an epoch."""
        return sum(count // self.batch_size for _, count in self.train)

    @property
    def settings(self) -> str:
        """How models are trained: "authors", "ours", or "other" than both."""
        for name, sweep in (("ours", Sweep()), ("authors", Sweep.authors())):
            if all(getattr(self, key) == getattr(sweep, key) for key in _AUTHORS):
                return name
        return "other"

    @property
    def has_authors_texts(self) -> bool:
        """Whether training and test texts are of the authors' settings, so that their numbers compare."""
        return all(getattr(self, key) == getattr(Sweep(), key) for key in ("vocab_size", "train", "test"))

    def differences(self, candidate: Candidate) -> list[str]:
        """What is not as in the authors' experiment: of the model, of the choice of models, of the training."""
        training = [
            f"{key} is {_shown(getattr(self, key))}; the authors' is {_shown(value)}"
            for key, value in _AUTHORS.items()
            if getattr(self, key) != value
        ]
        chosen = (
            f"{self.validation_examples} other texts of each test setting end the training and choose the learning "
            "rate; the authors use the test texts for both"
        )
        return [*FAMILIES[candidate.family].differences, chosen, *training]

    def candidates(self) -> list[Candidate]:
        """The models, wide ones first: they take longest. Raises ValueError where a point is none of them."""
        found = [candidate for name in self.families for candidate in FAMILIES[name].candidates(self)]
        names = [candidate.name for candidate in found]
        for point in self.points:
            if not fnmatch.filter(names, point):
                raise ValueError(f"points has {point!r}, expected names, or patterns of them, of: {', '.join(names)}")
        if self.points:
            found = [c for c in found if any(fnmatch.fnmatchcase(c.name, point) for point in self.points)]
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
        """What sweep.json says: all that a model's result depends on, as plain numbers, texts and lists.

        Which models are trained is not among it: a folder takes up others later, and those of other machines.
        """
        facts = {key: value for key, value in dataclasses.asdict(self).items() if key not in _CHOICES}
        document: dict[str, Any] = json.loads(json.dumps(facts))
        return document


def _shown(value: Any) -> str:
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)
