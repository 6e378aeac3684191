from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refilled.data.images import ImageSet, make_image_set
from refilled.data.label_space import hold_out, label_spaces, order_classes, select_classes
from refilled.errors import UserError

HUNDRED = tuple(f"c{number:02d}" for number in range(100))
TEN = tuple("abcdefghij")


@pytest.mark.parametrize(("overlap", "first"), [(0.0, 50), (0.2, 40), (0.4, 30), (0.6, 20), (0.8, 10), (1.0, 0)])
def test_window_slides_as_in_figure_4(overlap: float, first: int) -> None:
    spaces = label_spaces(HUNDRED, overlap=overlap)
    assert spaces.teacher == HUNDRED[:50]
    assert spaces.student == HUNDRED[first : first + 50]
    assert spaces.num_shared == round(50 * overlap)


def test_windows_of_other_sizes() -> None:
    spaces = label_spaces(TEN, overlap=0.5, num_teacher=6, num_student=4)
    assert spaces.teacher == tuple("abcdef")
    assert spaces.student == tuple("efgh")


@pytest.mark.parametrize(
    ("overlap", "num_teacher", "num_student", "range_"),
    [
        (0.5, 5, 5, "k from 0 to 5"),
        (0.0, 6, 5, "k from 1 to 5"),
        (1.0, 3, 4, "k from 0 to 3"),
        (0.33, 3, 3, "k from 0 to 3"),
    ],
)
def test_inexpressible_overlap_names_those_that_are(
    overlap: float, num_teacher: int, num_student: int, range_: str
) -> None:
    with pytest.raises(UserError, match=range_) as caught:
        label_spaces(TEN, overlap=overlap, num_teacher=num_teacher, num_student=num_student)
    assert str(caught.value).startswith("overlap must be")


def test_cifar_fs_order_is_64_16_20_alphabetical_parts() -> None:
    text = (Path(__file__).parents[2] / "refilled/data/class_orders/cifar_fs.txt").read_text()
    names = tuple(text.split())
    order = order_classes("cifar_fs", tuple(sorted(names)))
    assert order == names
    assert len(set(order)) == 100
    for start, stop in ((0, 64), (64, 80), (80, 100)):
        assert list(order[start:stop]) == sorted(order[start:stop])
    assert order[:3] == ("apple", "aquarium_fish", "bear")
    assert order[64] == "beaver"
    assert order[80] == "baby"


def test_order_from_a_file_and_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "order.txt"
    path.write_text("\n".join(reversed(TEN)) + "\n")
    assert order_classes(str(path), TEN) == tuple(reversed(TEN))
    for text, sentence in (("a\na\n", "twice"), ("a\nb\n", "leaves out"), ("\n".join((*TEN, "z")), "'z'")):
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            order_classes(str(path), TEN)
    with pytest.raises(UserError, match="class_order must be alphabetical, cifar_fs or a readable text file"):
        order_classes(str(tmp_path / "none.txt"), TEN)


def _images(counts: list[int]) -> ImageSet:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return make_image_set(images, labels, tuple("abcdef"[: len(counts)]))


def test_hold_out_is_stratified_seeded_and_disjoint() -> None:
    image_set = _images([20, 40, 10])
    split = hold_out(image_set, fraction=0.2, seed=1)
    assert torch.bincount(image_set.labels[split.validation]).tolist() == [4, 8, 2]
    assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(70))
    assert torch.equal(split.validation, hold_out(image_set, fraction=0.2, seed=1).validation)
    assert not torch.equal(split.validation, hold_out(image_set, fraction=0.2, seed=2).validation)
    assert len(hold_out(image_set, fraction=0.0, seed=1).validation) == 0


def test_hold_out_of_a_class_does_not_depend_on_other_classes() -> None:
    alone, together = _images([20, 40]), _images([20, 40, 10])
    first, second = hold_out(alone, fraction=0.2, seed=1), hold_out(together, fraction=0.2, seed=1)
    assert torch.equal(first.validation, second.validation[second.validation < 60])


def test_hold_out_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="val_fraction must leave images of class 'b', which has 1"):
        hold_out(_images([20, 1]), fraction=0.1, seed=0)


def test_selected_images_are_relabelled_by_position() -> None:
    image_set = _images([3, 3, 3])
    chosen = select_classes(image_set, torch.tensor([0, 4, 7, 8]), ("c", "a"))
    assert chosen.class_names == ("c", "a")
    assert chosen.labels.tolist() == [1, 0, 0]
    assert chosen.images[:, 0, 0, 0].tolist() == [0, 7, 8]
    with pytest.raises(UserError, match="must have images of class 'b'"):
        select_classes(image_set, torch.tensor([0]), ("a", "b"))
