"""Configurations from outside: a value that does not fit is one sentence that names its field."""

from __future__ import annotations

import importlib.util
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refilled.config import Config, RunConfig, SearchConfig
from refilled.errors import UserError
from refilled.storage.artifact_folder import MANIFEST, open_whole, seal, start

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


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": \x00}', b"[]", b"{}", b'{"files": {}, "about": 3}'),
        b'{"files": {"a": {"bytes": "many", "crc32": 0}}, "about": {}}',
    ],
)
def test_a_damaged_manifest_is_a_damaged_artifact(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "key"
    folder.mkdir()
    (tmp_path / "a").write_bytes(b"1")  # of another artifact, and none of this one's business
    (folder / MANIFEST).write_bytes(content)
    assert open_whole(folder) is None
    assert "key is damaged and is not used" in caplog.text
    assert MANIFEST in caplog.text


def test_a_manifest_that_names_a_file_elsewhere_is_a_damaged_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    (start(folder, {}, None) / "a").write_bytes(b"1")
    seal(folder, {})
    assert open_whole(folder) is not None
    (tmp_path / "a").write_bytes(b"1")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    files = {"../a": manifest["files"]["a"]}
    checksum = zlib.crc32(json.dumps([files, {}], sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps({"files": files, "about": {}, "crc32": checksum}))
    assert open_whole(folder) is None
