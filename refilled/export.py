"""A student's network as a file that runs without this package: a program of `torch.export`, or ONNX.

Both take uint8 images [N, C, H, W] of the size of the training images, N being free, and give the scores [N, number of
classes]: normalisation is inside, by the very code of training. What is written is checked against the student on real
images and measured.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from refilled.config import ExportFormat, Precision
from refilled.data.images import ImageSet
from refilled.data.text import one_line
from refilled.errors import UserError
from refilled.networks import multiply_adds
from refilled.student import Student
from refilled.training.compute import Compute

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram

FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
SUFFIX: dict[ExportFormat, str] = {"torch": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-4
"""Largest difference of a score between the student and its file, in float32, before it is said to differ."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCH_SIZES = (1, 32)
_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_S = 20, 200, 2.0
_CHECK_BATCH_SIZE = 500

Runner = Callable[[Tensor], Tensor]
"""Takes uint8 [N, C, H, W], gives scores [N, number of classes], both on the CPU."""


class ExportError(UserError):
    """A network that cannot be exported; the sentence says why."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds a batch of some size takes: median and 95th percentile of so many rounds."""

    p50_ms: float
    p95_ms: float
    num_rounds: int


def require_packages(formats: tuple[ExportFormat, ...]) -> None:
    """Check that what writes and runs the formats is installed.

    Raises:
        UserError: Naming what is missing.
    """
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None] if "onnx" in formats else []
    if missing:
        raise UserError(f"export: onnx needs {', '.join(missing)}; pip install 'refilled[onnx]' brings them.")


def precision_of(form: ExportFormat, student: Student) -> Precision:
    """How precisely a file computes: as the student; ONNX in float32, the one type whose layers its CPU runtime has."""
    return "float32" if form == "onnx" else student.compute.precision


def in_precision(student: Student, precision: Precision) -> Student:
    """A student of the same weights, on the CPU, as precise as this."""
    return Student(
        copy.deepcopy(student.model),
        classes=student.classes,
        image_shape=student.image_shape,
        normalization=student.normalization,
        compute=Compute(torch.device("cpu"), precision),
        batch_size=student.batch_size,
    )


def write(form: ExportFormat, student: Student, path: Path) -> None:
    """Write a student, which is on the CPU, as a file.

    Raises:
        ExportError: Its network cannot be exported.
    """
    with _one_sentence(form):
        program = _program(student)
        if form == "torch":
            torch.export.save(program, path)
        else:
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
            )
            assert exported is not None, "it is given back where no path is given"
            exported.save(path)


def open_file(form: ExportFormat, path: Path, num_threads: int) -> Runner:
    """A file, ready to run on the CPU; of torch the number of threads is the process's own."""
    if form == "torch":
        program = torch.export.load(path).module()

        def run(images: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = program(images)
            return logits

        return run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def export(form: ExportFormat, student: Student, path: Path, test: ImageSet, num_threads: int) -> dict[str, Any]:
    """Write a student as a file, check the file against the student on test images, and measure it.

    Only for a student whose refit has read the test set already: nothing may be chosen by what this says.

    Args:
        form: The format.
        student: On the CPU.
        path: The file to write.
        test: The images on which the student was tested.
        num_threads: Threads for the latencies.

    Returns:
        As plain data: `precision`, `file_bytes`, `max_logit_difference` to the student in the same precision,
        `test_accuracy`, `latency` by batch size, `num_threads`, `machine`.

    Raises:
        ExportError: The network cannot be exported, or what was exported does not run.
    """
    precision = precision_of(form, student)
    own = student if precision == student.compute.precision else in_precision(student, precision)
    write(form, own, path)
    with _one_sentence(form), _threads(num_threads):
        run = open_file(form, path, num_threads)
        difference, num_correct = 0.0, 0
        for chosen in torch.split(torch.arange(len(test)), _CHECK_BATCH_SIZE):
            images, labels = test.images[chosen], test.labels[chosen]
            logits = run(images)
            with torch.no_grad():
                difference = max(difference, float((logits - own.logits_of(images)).abs().max()))
            num_correct += int((logits.argmax(dim=1) == labels).sum())
        latencies = {size: _latency(run, test.images[:size], size) for size in _BATCH_SIZES}
    return {
        "precision": precision,
        "file_bytes": path.stat().st_size,
        "max_logit_difference": difference,
        "test_accuracy": num_correct / len(test),
        "latency": {str(size): vars(each) for size, each in latencies.items()},
        "num_threads": num_threads,
        "machine": machine(),
    }


def size_of(student: Student) -> dict[str, int]:
    """Parameters of the network, and its multiply-adds for one image, of convolutions and products of matrices."""
    image = torch.zeros(1, *student.image_shape, dtype=torch.uint8)
    parameters = sum(each.numel() for each in student.model.parameters())
    return {"parameters": parameters, "multiply_adds": multiply_adds(lambda: student.logits_of(image))}


def machine() -> str:
    """The processor, for whoever reads a latency."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class _Program(nn.Module):
    """From pixels to scores, as one module."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        # Weights are stored in torch's usual layout: of others its packager keeps more than the weights.
        self.model = copy.deepcopy(student.model).to(memory_format=torch.contiguous_format)
        self._compute, self._normalization = student.compute, student.normalization

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 [N, C, H, W] to [N, number of classes]."""
        return self._compute.forward(self.model, self._compute.place_images(images, self._normalization)).logits


def _program(student: Student) -> ExportedProgram:
    example = torch.zeros(2, *student.image_shape, dtype=torch.uint8)  # a dimension of 1 would be taken for a constant
    with torch.no_grad():
        return torch.export.export(
            _Program(student).eval(), (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )


def _latency(run: Runner, images: Tensor, batch_size: int) -> Latency:
    """Of one batch after the other, for about two seconds."""
    batch = images[torch.arange(batch_size) % len(images)]
    for _ in range(3):
        run(batch)
    rounds: list[float] = []
    began_s = time.perf_counter()
    while len(rounds) < _MIN_ROUNDS or (len(rounds) < _MAX_ROUNDS and time.perf_counter() - began_s < _ENOUGH_S):
        started_s = time.perf_counter()
        run(batch)
        rounds.append(1000 * (time.perf_counter() - started_s))
    p50, p95 = (
        torch.tensor(rounds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    )
    return Latency(p50, p95, len(rounds))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's threads, and after it as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _one_sentence(form: ExportFormat) -> Iterator[None]:
    """Say in a sentence why a network cannot be exported."""
    try:
        yield
    except Exception as error:  # a network of the user's, torch's tracer and ONNX's converter raise all there is
        raise ExportError(f"The network cannot be exported to {form} ({one_line(error)}).") from error
