"""Text from outside, fit to stand inside a sentence: one line, printable, of bounded length."""

from __future__ import annotations

MOST_SHOWN = 200  # characters of one name or value


def shown(text: object) -> str:
    """Text as it reads, but with escapes for what cannot be printed, and cut in the middle where it is long."""
    flat = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text))
    half = MOST_SHOWN // 2
    return flat if len(flat) <= MOST_SHOWN else f"{flat[:half]} ... {flat[-half:]}"


def one_line(error: BaseException) -> str:
    """The message of another library's error."""
    return shown(" ".join(str(error).split())).rstrip(".") or type(error).__name__
