"""Messages: what is sent is what arrives, and no message does more than raise one error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from difftori.errors import ServingError
from difftori.serving.codec import pack, unpack

msgpack = pytest.importorskip("msgpack", reason="needs msgpack: pip install 'difftori[serve]'")

DTYPES = ["?", "i1", ">i2", "<i4", "i8", "u1", "u2", ">u4", "u8", "f2", "<f4", ">f4", "f8"]
NUMBERS = st.sampled_from(DTYPES).flatmap(lambda name: arrays.arrays(name, arrays.array_shapes(min_dims=0, min_side=0)))
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
TREES = st.recursive(
    PLAIN | NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def same(sent, found):
    if isinstance(sent, np.ndarray):
        assert found.dtype == sent.dtype.newbyteorder("=")
        assert found.flags.writeable
        assert found.shape == sent.shape
        return found.tobytes() == sent.astype(found.dtype).tobytes()
    if isinstance(sent, dict):
        return sent.keys() == found.keys() and all(same(value, found[name]) for name, value in sent.items())
    if isinstance(sent, list):
        return len(sent) == len(found) and all(map(same, sent, found))
    return type(sent) is type(found) and (sent == found or (sent != sent and found != found))


@given(TREES)
def test_every_tree_arrives_as_it_was_sent(tree):
    assert same(tree, unpack(pack(tree)))


@given(st.sampled_from([np.bool_(True), np.int8(-3), np.uint64(2**64 - 1), np.float16(0.5), np.float32(2)]))
def test_a_numpy_number_keeps_its_type(number):
    found = unpack(pack({"value": number}))["value"]
    assert (type(found), found) == (type(number), number)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_one_error(message):
    try:
        unpack(message)
    except ServingError:
        pass


@given(st.data())
def test_a_damaged_message_is_a_value_or_one_error(data):
    message = bytearray(pack({"state": np.arange(6.0).reshape(2, 3), "gain": np.float32(1), "reset": True}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(message))
    except ServingError:
        pass


def array(**changes):
    entries = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({"state": {name.encode(): value for name, value in entries.items()}})


def test_the_array_that_the_next_test_changes_is_one():
    assert unpack(array())["state"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "message",
    [
        array(dtype="|O"),
        array(dtype="O"),
        array(dtype="<c8", shape=[1]),
        array(dtype="V8", shape=[1]),
        array(dtype="<U2", shape=[1]),
        array(dtype="<M8[s]", shape=[1]),
        array(dtype="f4,f4", shape=[1]),
        array(dtype=["a", "b"]),
        array(dtype=None),
        array(shape=[3]),
        array(shape=[-2]),
        array(shape=[-1, -2]),
        array(shape=[2.0]),
        array(shape=[True, 2]),
        array(shape=[2**62, 4]),
        array(shape=[1] * 17 + [2]),
        array(shape=2),
        array(data="text"),
        array(data=None),
        msgpack.packb({"state": {b"__ndarray__": True}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": [1.0] * 9, b"dtype": "<f4"}}),
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": None, b"dtype": "|O"}}),
        msgpack.packb(msgpack.ExtType(4, b"code")),
        msgpack.packb({1: 2}),
        msgpack.packb(1) * 2,
        b"\x91" * 100_000,  # lists in lists
        b"\xdd\xff\xff\xff\xff",  # a list of four billion entries, none of which follows
        b"\xc6\xff\xff\xff\xff",  # four billion bytes, none of which follows
        b"",
        b"\x80\x04\x95",  # a pickle's first bytes
    ],
)
def test_a_hostile_message_is_refused(message):
    with pytest.raises(ServingError, match="malformed message"):
        unpack(message)


@pytest.mark.parametrize(
    "value",
    [np.array([print], dtype=object), np.array(["a"]), np.array([1j]), np.zeros(2, "f4,f4"), object(), {1, 2}, 2**80],
)
def test_what_is_no_number_is_not_sent(value):
    with pytest.raises(ServingError, match="cannot be sent"):
        pack({"state": value})
