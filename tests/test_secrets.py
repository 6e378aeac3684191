"""A password is found whatever it holds, wherever an address stands."""

import pytest

from refilled.secrets import password_of, without_passwords
from tune.tracking.texts import clean_params, clean_tags

PASSWORDS = ["hunter2", "a:b", "100%", "p@ss", "x/y?z#1", "***"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg", "s3"])
def test_it_is_replaced_in_addresses_and_sentences(scheme, password):
    url = f"{scheme}://bob:{password}@host:5000/a?b=c"
    assert password_of(url) == password
    assert without_passwords(url) == f"{scheme}://bob:***@host:5000/a?b=c"
    assert without_passwords(f"at {url}, or {url}") == f"at {without_passwords(url)}, or {without_passwords(url)}"


@pytest.mark.parametrize(
    "text", ["http://host:5000/a", "postgresql://bob@host/a", "sqlite:////a/b.db", "see a:b@c", "/home/me@work/x"]
)
def test_what_holds_none_stays_as_it_is(text):
    assert password_of(text) is None
    assert without_passwords(text) == text


@pytest.mark.parametrize("clean", [clean_params, clean_tags])
def test_settings_and_tags_lose_them(clean):
    assert clean({"tracking_uri": "http://bob:hunter2@host"}) == {"tracking_uri": "http://bob:***@host"}
