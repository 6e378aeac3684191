"""Configurations from outside: a value that does not fit is one sentence that names its field."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refilled.config import Config, RunConfig, SearchConfig
from refilled.embedding_cache.rows import DamagedError
from refilled.embedding_cache.rows import _meta as read_meta
from refilled.errors import UserError

_spec = importlib.util.spec_from_file_location("damage", Path(__file__).parent / "faults" / "damage.py")
assert _spec is not None
assert _spec.loader is not None
_damage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_damage)

GARBAGE: tuple[Any, ...] = (
    *(None, True, "", "zwei", -1, 0.5, 10**400, float("nan"), float("inf"), [], [1], {}, {"a": {"b": []}}, [[[1]]]),
    *("<script>", "x" * 10_000, "\ud800", "a\nb", b"bytes", object()),
)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"embedding": value}
    return value


def places(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, nested ones too."""
    for name, value in values.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from places(value, (*before, name))


def changed(values: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = place
    return values | {head: changed(values[head], tuple(rest), value) if rest else value}


def refused(make: Callable[[], Config], field: str) -> bool:
    """Whether there is one sentence that names the field; anything but that or a configuration is raised."""
    try:
        made = make()
    except UserError as error:
        message = str(error)
    else:
        assert type(made).from_dict(made.to_dict()) == made
        return False
    assert "\n" not in message
    assert len(message) < 1000
    assert field in message or "Config must be an object" in message or "Unknown setting" in message, (field, message)
    return True


@pytest.mark.parametrize("kind", [RunConfig, SearchConfig])
def test_garbage_in_a_field_is_refused_by_name_or_is_a_value(kind: type[Config]) -> None:
    plain = kind().to_dict()
    num_tried = num_refused = 0
    for place in places(plain):
        for garbage in GARBAGE:
            num_tried += 1
            num_refused += refused(lambda at=place, value=garbage: kind.from_dict(changed(plain, at, value)), place[-1])
    assert num_tried > 1000
    assert num_refused > 0.8 * num_tried


@pytest.mark.parametrize(
    "values", [None, [], "text", 3, {"unknown": 1}, {3: 1}, {"embedding": {"unknown": 1}}, nested(500)]
)
def test_what_is_no_configuration_is_refused(values: Any) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_damaged_configuration_files(tmp_path: Path) -> None:
    whole = json.dumps(RunConfig().to_dict(), indent=1).encode()
    num_refused = 0
    for name, content in _damage.damages(whole, random.Random(0), 90):
        try:
            values = json.loads(content)
        except ValueError:
            num_refused += 1
            continue
        num_refused += refused(lambda values=values: RunConfig.from_dict(values), "")
        assert name
    assert num_refused > 45


def test_damaged_accounts_of_a_bank_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": \x00}'):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="is not JSON"):
            read_meta(path)
