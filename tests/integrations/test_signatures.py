"""The check of signatures alone; the tests of each integration change those that it uses."""

import pytest

from pydllm import PydllmError
from pydllm.integrations._signatures import check_called, check_replaced


def plain(a, b, c=0): ...


def keywords(a, *, b, c=0, **more): ...


class Thing:
    def __init__(self, a, *, b=1): ...

    def method(self, a, b): ...


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (plain, "a, b, c"),
        (plain, "*, c, a, b"),  # by keyword: the order is free
        (plain, "a, *, c, b"),
        (plain, "a, ..."),
        (keywords, "a, *, b, c, **more"),
        (Thing, "a, *, b"),
        (Thing.method, "a, b"),
        (Thing(1).method, "a, b"),
    ],
)
def test_the_same_signature(function, known):
    assert check_replaced("torch", function, known) == ""
    assert check_replaced("torch", function, {"other": "x", "mine": known}) == "mine"


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (plain, "a, b"),  # one more, which a caller may pass
        (plain, "a, b, c, d"),
        (plain, "b, a, c"),
        (plain, "a, b, x"),
        (plain, "b, ..."),
        (keywords, "a, *, b, c"),
        (keywords, "a, *, b, c, **less"),
        (Thing.method, "a, *, c"),
        (lambda *args, **kwargs: None, "a, b"),
    ],
)
def test_another_signature(function, known):
    with pytest.raises(PydllmError, match=r"expected \(.*\), found \(.*\)"):
        check_replaced("torch", function, known)


@pytest.mark.parametrize(
    ("function", "call", "fits"),
    [
        (plain, "1, 2", True),
        (plain, "1, 2, *, c", True),
        (plain, "1", False),
        (plain, "1, 2, 3, 4", False),
        (plain, "1, 2, *, d", False),
        (keywords, "1, *, b, anything", True),
        (keywords, "1, 2, *, b", False),
        (keywords, "1", False),
        (Thing, "1, *, b", True),
        (Thing.method, "1, 2", True),
        (lambda *args, **kwargs: None, "1, *, b", True),
    ],
)
def test_a_call(function, call, fits):
    if fits:
        assert check_called("torch", function, call) == ""
    else:
        with pytest.raises(PydllmError, match=r"expected \(.*\), found \(.*\)"):
            check_called("torch", function, call)


def test_the_call_that_fits_is_told():
    assert check_called("torch", plain, {"old": "1, *, past", "new": "1, *, b"}) == "new"


def test_the_message_has_version_and_both_signatures():
    import torch

    with pytest.raises(PydllmError) as raised:
        check_replaced("torch", keywords, {"old": "a, past", "new": "a, cache"})
    assert str(raised.value) == (
        f"torch {torch.__version__}: keywords: expected (a, past) or (a, cache), "
        "found (a, *, b, c, **more)"
    )
    with pytest.raises(PydllmError, match=r"no-such-package \(unknown version\): plain"):
        check_called("no-such-package", plain, "1")
