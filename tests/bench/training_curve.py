"""Draws how a run of `based train` went: RUN's logs as OUT.svg, and, thinned, as OUT.csv. Needs matplotlib."""

import argparse
import csv
import math
from pathlib import Path

from matplotlib.figure import Figure

POINTS = 200


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="its output folder")
    parser.add_argument("out", type=Path, help="without a suffix")
    args = parser.parse_args()

    train, validation = _read(args.run / "train.csv"), _read(args.run / "validation.csv")
    width = max(1, len(train) // POINTS)
    parts = [train[i : i + width] for i in range(0, len(train), width)]
    bits = {int(part[-1]["step"]): sum(r["loss"] for r in part) / len(part) / math.log(2) for part in parts}
    held_out = {int(r["step"]): r["bits_per_byte"] for r in validation}

    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "training_bits_per_byte", "held_out_bits_per_byte"])
        for step in sorted(bits.keys() | held_out.keys()):
            writer.writerow([step, *(f"{x[step]:.4f}" if step in x else "" for x in (bits, held_out))])

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(bits), list(bits.values()), linewidth=1, label=f"training mixture, means of {width} steps")
    axes.plot(list(held_out), list(held_out.values()), "o-", markersize=3, label="held-out files")
    top = sorted(bits.values())[-1 - len(bits) // 50]
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(min(*bits.values(), *held_out.values()) * 0.95, top))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(args.out.with_suffix(".svg"), metadata={"Date": None})


def _read(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


if __name__ == "__main__":
    main()
