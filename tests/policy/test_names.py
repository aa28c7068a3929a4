"""The keys of buckets: no two limits share one unless they have one name, whatever names and keys contain."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ratelimit import InvalidConfigurationError
from ratelimit.engine.several.parts import place_of
from ratelimit.policy import Limiter
from ratelimit.policy.managers import NAMESPACE_VARIABLE, bucket_key, namespace_of

# The characters that mean something in a key, and some that do not.
tricky = st.text(alphabet=r":|\{}()ab /", max_size=6)
names = st.text(alphabet=r":|\{}()ab /", min_size=1, max_size=6)
several = st.one_of(st.tuples(names), st.tuples(tricky, names, names), st.tuples(tricky, names, names, names))
namespaces = st.one_of(st.just(""), st.text(alphabet=r":|\{}()ab/", min_size=1, max_size=6))
keys = st.one_of(st.none(), tricky)


@given(st.tuples(several, keys, namespaces), st.tuples(several, keys, namespaces))
@example((("tenant",), "login:1", ""), (("tenant:login",), "1", ""))
@example((("a",), "b", "shop"), (("", "a", "x"), "b", ""))
@example((("{",), "x", ""), (("(",), "x", ""))
@example((("a",), "{", ""), (("a",), r"\(", ""))
@example((("a",), "{", ""), (("a|",), r"\(", ""))
@example((("a",), None, ""), (("a",), "", ""))
def test_different_limits_and_keys_have_different_buckets(one: Any, two: Any) -> None:
    assert (bucket_key(*one) == bucket_key(*two)) is (one == two)


@given(names, tricky)
def test_a_key_of_bytes_is_stored_as_the_text_that_it_is_of(name: str, key: str) -> None:
    text = bucket_key((name,), key)
    assert isinstance(text, str)
    assert bucket_key((name,), key.encode()) == text.encode()


@given(names, tricky | st.text() | tricky.map(str.encode) | st.binary())
def test_neither_names_nor_keys_choose_a_slot_or_a_place(name: str, key: str | bytes) -> None:
    stored = bucket_key((name,), key, name)
    raw = stored if isinstance(stored, bytes) else stored.encode("utf-8", "surrogatepass")
    assert not set(b"{}") & set(raw)
    assert place_of([b"other{a}", raw]) == place_of([raw]) == raw


@given(names, st.text(alphabet=r":|\()ab /", max_size=6))
def test_a_key_without_braces_is_stored_as_it_is(name: str, key: str) -> None:
    assert str(bucket_key((name,), key)).endswith(f":{key}")
    assert bucket_key(("login",), key) == f"login:{key}"


def test_braces_in_a_key_are_escaped_and_its_backslashes_with_them() -> None:
    assert bucket_key(("login",), r"{a}\b") == r"login|:\(a\)\\b"
    assert bucket_key(("login",), rb"{a}\b") == rb"login|:\(a\)\\b"


@pytest.mark.parametrize("namespace", ["a b", "ü", "a" * 101, "\n", 1])
def test_what_is_not_a_namespace_is_refused(namespace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfigurationError, match="namespace must be 1 to 100 printable"):
        Limiter[Any]("1/minute", namespace=namespace)
    if isinstance(namespace, str):
        monkeypatch.setenv(NAMESPACE_VARIABLE, namespace)
        with pytest.raises(InvalidConfigurationError, match="RATELIMIT_NAMESPACE must be 1 to 100 printable"):
            namespace_of(None)


def test_there_is_none_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAMESPACE_VARIABLE, raising=False)
    assert namespace_of(None) == namespace_of("") == ""
    assert set(namespace_of(string.punctuation)) == set(string.punctuation)
