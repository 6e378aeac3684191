"""Passwords in addresses: found in one way, wherever an address is shown or kept."""

from __future__ import annotations

import re

# Up to the last @ before a space: a password may hold every character that ends other parts of an address.
_PASSWORD = re.compile(r"(?P<before>\w[\w+.-]*://[^\s:/@]*:)(?P<password>\S+)@")


def password_of(url: str) -> str | None:
    """The password in an address such as `postgresql://USER:PASSWORD@HOST/NAME`; none where it has none."""
    found = _PASSWORD.search(url)
    return found["password"] if found else None


def without_passwords(text: str) -> str:
    """A text with `***` for the password of every address in it."""
    return _PASSWORD.sub(r"\g<before>***@", text)
