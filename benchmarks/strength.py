"""How strong the penalty should be, chosen on held-out training images; the test images are not looked at.

    OMP_NUM_THREADS=1 python benchmarks/strength.py [--widths 32 64 128]

A quarter of the training images of scikit-learn's digits is held out; the rest trains DigitsResNet as the demo does:
with the penalty, half of the parameters removed by its score, fine-tuned without it. One line for each strength and
seed, then the table. Chosen is the highest mean of the three accuracies in it: of the trained network, right after the
removal, and after fine-tuning.
"""

import argparse
import json
from statistics import mean, stdev

from sklearn.model_selection import train_test_split

from netsurgery.demo import Digits, accuracy, digits, operate

STRENGTHS = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
COLUMNS = ("trained", "pruned", "pruned, fine-tuned")


def held_out(seed: int) -> Digits:
    """Three quarters of the training images to learn from, the last quarter in the place of the test images."""
    x, y = digits(seed).train
    learnt, held = train_test_split(range(len(y)), test_size=0.25, stratify=y, random_state=seed)
    return Digits((x[learnt], y[learnt]), (x[held], y[held]))


def measured(strength: float, seed: int, widths: tuple[int, ...]) -> list[float]:
    """Accuracy on the held-out images, trained, pruned and fine-tuned."""
    data = held_out(seed)
    networks, _ = operate(data, seed, 15, 10, lambda *_: lambda: None, strength=strength, widths=widths)
    return [accuracy(networks[name], data.test) for name in COLUMNS]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0.0:.2f}"


def chosen(found: dict[float, list[list[float]]]) -> float:
    """The strength with the highest mean over the columns of the table."""
    return max(found, key=lambda strength: mean(mean(row) for row in found[strength]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    options = parser.parse_args()
    found: dict[float, list[list[float]]] = {strength: [] for strength in options.strengths}
    for seed in options.seeds:
        for strength, rows in found.items():
            rows.append(measured(strength, seed, tuple(options.widths)))
            print(json.dumps({"strength": strength, "seed": seed, "accuracy": rows[-1]}), flush=True)
    print("| strength | trained | removed | fine-tuned |\n| ---: | ---: | ---: | ---: |")
    for strength, rows in found.items():
        print(f"| {strength:g} | {' | '.join(spread(list(column)) for column in zip(*rows, strict=True))} |")
    print(f"chosen: {chosen(found):g}")


if __name__ == "__main__":
    main()
