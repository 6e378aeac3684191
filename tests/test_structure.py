"""The layout holds: imports run one way, no circle, few rooms at the top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("refilled", "tune", "analysis")
# Imports that leave their package on purpose.
UPWARD = {"refilled": set(), "tune": {"refilled"}, "analysis": {"refilled", "tune"}}
# A storage finds the kind that its location names, and what is built on it, where it is asked for them.
WHERE_USED = {("refilled.storage.storage", f"refilled.storage.{name}") for name in ("object_storage", "artifacts")}
# All that the lower rooms of the method may lead to, over other modules too. Decoded images are artifacts of a storage.
SHARED = {"config", "errors", "keyed", "methods"}
REACHED = {
    "losses": {"keyed"},
    "models": SHARED | {"user_code", "user_package"},
    "data": SHARED | {"distributed", "storage"},
    "storage": SHARED | {"distributed", "metrics", "models", "user_code", "user_package"},
}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, those inside functions and for types alone included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def graph() -> dict[str, set[str]]:
    """Which module imports which, of the product's own; a package's face stands for what it hands on."""
    known = modules()
    return {name: {each for each in imports(path) if each in known and each != name} for name, path in known.items()}


def room(module: str) -> str:
    """The folder or file at the top of a package in which a module lies."""
    return ".".join(module.split(".")[:2])


def test_no_module_imports_itself_in_a_circle() -> None:
    faces = {name for name, path in modules().items() if path.name == "__init__.py"}
    edges = {name: found - ({name.rpartition(".")[0]} & faces) for name, found in graph().items()}
    for name, used in WHERE_USED:
        edges[name].remove(used)
    order = list(TopologicalSorter(edges).static_order())
    assert len(order) > 100


def test_no_room_imports_another_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, found in graph().items():
        rooms.setdefault(room(name), set()).update(room(each) for each in found)
    edges = {name: {each for each in found if each not in (name, *PACKAGES)} for name, found in rooms.items()}
    TopologicalSorter(edges).prepare()


def test_a_circle_would_be_seen() -> None:
    edges = graph()
    edges["refilled.terms.base"].add("refilled.training.loop")
    with pytest.raises(CycleError):
        TopologicalSorter(edges).prepare()


@pytest.mark.parametrize("lower", REACHED)
def test_lower_rooms_lead_to_few_others(lower: str) -> None:
    edges = graph()
    seen: set[str] = set()
    front = {name for name in edges if room(name) == f"refilled.{lower}"}
    while front:
        seen |= front
        front = {each for name in front for each in edges[name]} - seen
    assert {room(name).removeprefix("refilled.") for name in seen} - {lower, "refilled"} <= REACHED[lower]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_packages_point_one_way(package: str) -> None:
    others = {each.partition(".")[0] for name, found in graph().items() if name.startswith(package) for each in found}
    assert others - {package} <= UPWARD[package]


def test_reports_know_of_the_platform_how_a_store_is_opened_and_the_simulator_how_trials_are_chosen() -> None:
    for name, found in graph().items():
        if name.startswith("analysis"):
            known = {each for each in found if each.startswith("tune.")}
            if name.startswith("analysis.simulator"):
                assert {each for each in known if not each.startswith("tune.studies.")} == set(), name
            else:
                assert known <= {"tune.tracking.store"}, name


def test_the_method_knows_no_platform() -> None:
    foreign = {"ray", "optuna", "mlflow"}
    for name, path in modules().items():
        if name.startswith("refilled"):
            assert not {each.partition(".")[0] for each in imports(path)} & foreign, name


def test_few_rooms_at_the_top_of_the_platform() -> None:
    rooms = [path for path in (ROOT / "tune").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert len(rooms) <= 15


def test_files_stay_small() -> None:
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: lines for name, lines in long.items() if lines > 320} == {}


def test_contracts_are_for_tests_alone() -> None:
    """Nobody else imports them, and they do not need pytest, which a user may not have."""
    contracts = {"refilled.testing", "tune.studies.testing"}
    importers = {name for name, found in graph().items() if any(each.startswith(tuple(contracts)) for each in found)}
    assert {name for name in importers if not name.startswith(tuple(contracts))} == set()
    assert not [name for name, path in modules().items() if "pytest" in set(imports(path))]
