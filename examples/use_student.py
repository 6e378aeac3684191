"""Ask a trained student what is on images.

python examples/use_student.py SOURCE IMAGE [IMAGE ...]

SOURCE is what `refilled.load` takes: a search's storage folder, a run's folder, a model.pt, or a URI of MLflow.
"""

import sys

import refilled
from refilled.command import exit_code
from refilled.errors import UserError


def main() -> int:
    """Print an image's path, its class and the probability, a line an image."""
    if len(sys.argv) < 3:
        raise UserError("SOURCE and at least one IMAGE must be given.")
    source, *images = sys.argv[1:]
    student = refilled.load(source)
    for image, found in zip(images, student.predict(images), strict=True):
        print(f"{image}: {found.class_name} ({100 * found.probability:.1f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("use_student", main))
