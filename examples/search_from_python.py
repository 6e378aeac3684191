"""A search from Python: what `refilled search` does, with the results as objects.

    python examples/search_from_python.py --trials 8 --seeds 3

The same call again finds what is done and returns it.
"""

from __future__ import annotations

import argparse

import refilled


def main() -> None:
    """Search the digits, say what was found, and take the best student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 20))
    parser.add_argument("--storage", default="runs")
    given = parser.parse_args()
    results = refilled.search(
        "smoke",
        methods=["student", "refilled"],
        overlaps=[0.4],
        trials=given.trials,
        seeds=given.seeds,
        storage=given.storage,
        settings={"epochs": tuple(given.epochs), "teacher_epochs": sum(given.epochs)},
    )
    print(results)
    best = results.best()
    print(f"best on validation: {best.method}, test accuracy {100 * best.mean:.2f} %, in {best.folder}")
    student = best.load()
    print(f"it knows {', '.join(student.classes)}")


if __name__ == "__main__":  # workers import this file
    main()
