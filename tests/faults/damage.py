"""Ways in which a file comes to harm."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator


def damages(content: bytes, draws: random.Random, num: int) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file, every way in turn, at places drawn.

    Args:
        content: of the whole file, at least two bytes.
        draws: where, and by how much.
        num: how many.

    Yields:
        What was done, and the bytes, which differ from `content`.
    """
    for number in range(num):
        damage = _DAMAGES[number % len(_DAMAGES)]
        damaged = damage(content, draws)
        while damaged == content:  # two equal blocks were swapped, or zeros were zeroed
            damaged = _flip(content, draws)
        yield f"{damage.__name__.strip('_')} {number}", damaged


def _flip(content: bytes, draws: random.Random) -> bytes:
    """One bit, somewhere."""
    changed = bytearray(content)
    changed[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, draws: random.Random) -> bytes:
    return content[: draws.randrange(len(content))]


def _empty(content: bytes, draws: random.Random) -> bytes:
    return b""


def _zero(content: bytes, draws: random.Random) -> bytes:
    """A block that never reached the disk."""
    start, length = draws.randrange(len(content)), draws.randint(1, 4096)
    block = content[start : start + length]
    return content[:start] + bytes(len(block)) + content[start + len(block) :]


def _swap(content: bytes, draws: random.Random) -> bytes:
    """Two neighbouring blocks."""
    length = draws.randint(1, max(1, len(content) // 4))
    start = draws.randrange(max(1, len(content) - 2 * length + 1))
    first, second = content[start : start + length], content[start + length : start + 2 * length]
    return content[:start] + second + first + content[start + 2 * length :]


def _append(content: bytes, draws: random.Random) -> bytes:
    return content + draws.randbytes(draws.randint(1, 200))


def _insert(content: bytes, draws: random.Random) -> bytes:
    start = draws.randrange(len(content))
    return content[:start] + draws.randbytes(draws.randint(1, 20)) + content[start:]


def _cut_out(content: bytes, draws: random.Random) -> bytes:
    start = draws.randrange(len(content) - 1)
    return content[:start] + content[start + draws.randint(1, 100) :]


def _replace(content: bytes, draws: random.Random) -> bytes:
    """Another kind of file under this name."""
    kinds = (b"PK\x05\x06" + bytes(18), b"%PDF-1.7\n", b"\x89PNG\r\n\x1a\n", b"{}\n", b"null\n", b"\x80\x04.")
    return draws.choice(kinds)


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _truncate,
    _empty,
    _zero,
    _swap,
    _append,
    _insert,
    _cut_out,
    _replace,
)
