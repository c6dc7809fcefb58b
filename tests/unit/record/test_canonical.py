"""The canonical form is that of RFC 8785, and everything whose form could differ is refused."""

from typing import Any

import pytest

from blindtune.client.record.canonical import LARGEST, canonical, parse_canonical


def test_the_form_is_that_of_the_rfc() -> None:
    # The texts and literals of the example in section 3.2.2; its numbers are floating-point.
    value = {
        "string": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/",
        "literals": [None, True, False],
        "numbers": [LARGEST, -LARGEST, 0],
    }
    assert canonical(value) == (
        b'{"literals":[null,true,false],"numbers":[9007199254740991,-9007199254740991,0],'
        b'"string":"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert parse_canonical(canonical(value)) == value


@pytest.mark.parametrize("value", [1.0, float("nan"), LARGEST + 1, {"é": 1}, {1: 2}, b"x", "\ud800", {1}])
def test_a_value_whose_form_could_differ_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        canonical([value])


@pytest.mark.parametrize(
    "content",
    [b'{"b":1,"a":2}', b'{"a": 1}', b'{"a":1}\n', b'"\\u0041"', b'{"a":1,"a":1}', b"1e0", b"-0", b"NaN"],
)
def test_another_form_of_the_same_value_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_canonical(content)
