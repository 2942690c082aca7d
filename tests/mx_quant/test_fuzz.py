"""Untrusted input: more than 10,000 mutated headers, indexes and files end in a ValueError or in a right result.

Right: what we accept, the safetensors library accepts too and reads alike. Never a crash, a hang (each example has a
deadline) or a large allocation (bounded by the size of the input).
"""

from __future__ import annotations

import json
import struct
import tracemalloc

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mx_quant.convert import Checkpoint
from mx_quant.shards import DTYPES, INDEX, SINGLE, ShardReader, load_json, parse_header, parse_index

QUICK = {"deadline": 2000, "suppress_health_check": list(HealthCheck), "derandomize": True}


def example() -> bytes:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.randn(4, 32, generator=g).bfloat16(),
        "model.layers.0.mlp.experts.0.up_proj.weight_scale": torch.ones(4, 1, dtype=torch.uint8),
        "b": torch.randn(3, generator=g),
        "e": torch.empty(0, 2),
        "ü": torch.tensor(1.0),
    }
    return save(tensors, metadata={"format": "pt"})


WHOLE = example()
(N,) = struct.unpack("<Q", WHOLE[:8])
HEADER, DATA = WHOLE[8 : 8 + N], WHOLE[8 + N :]
INDEX_BYTES = json.dumps(
    {"metadata": {"total_size": 5}, "weight_map": {f"t{i}": f"model-0000{i % 3}.safetensors" for i in range(9)}}
).encode()
NASTY = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e999", b"9" * 40, b"null", b"true", b"\\u0000", b"\\ud800", b"\x00", b"\xff",
    b" ", b"\n", b"../", b"F4", b"F8_E8M0", b"BF16", b"18446744073709551616", b"9223372036854775807", b'"__metadata__":', b"NaN", b'""',
]  # fmt: skip
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "drop", "insert", "copy", "swap", "digit"]),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 16),
        st.sampled_from(NASTY),
    ),
    min_size=1,
    max_size=5,
)


def mutate(raw: bytes, changes) -> bytes:
    b = bytearray(raw)
    for kind, i, j, text in changes:
        if not b:
            break
        i, j = i % len(b), j % len(b)
        if kind == "flip":
            b[i] ^= 1 << (j % 8)
        elif kind == "drop":
            del b[i : i + 1 + j % 20]
        elif kind == "insert":
            b[i:i] = text
        elif kind == "copy":
            b[i:i] = b[j : j + 60]
        elif kind == "swap":
            b[i], b[j] = b[j], b[i]
        else:  # another number in place of a digit
            digits = [k for k, c in enumerate(b) if 48 <= c <= 57]
            if digits:
                b[digits[i % len(digits)]] = 48 + j % 10
    return bytes(b)


def agree_with_library(raw: bytes, tensors) -> None:
    theirs = dict(safetensors.deserialize(raw))
    assert set(theirs) == set(tensors)
    for name, info in tensors.items():
        assert theirs[name]["dtype"] == info.dtype
        assert tuple(theirs[name]["shape"]) == info.shape
        assert bytes(theirs[name]["data"]) == raw[info.start : info.start + info.nbytes]


def check_clear(e: Exception) -> None:
    """An error says something, and not the whole input."""
    assert 0 < len(str(e)) < 2000


def try_header(header: bytes, data: bytes) -> bool:
    try:
        tensors, _ = parse_header(header, len(data))
    except ValueError as e:
        check_clear(e)
        return False
    at = 8 + len(header)
    for info in tensors.values():
        assert info.start == at
        at += info.nbytes
    assert at == 8 + len(header) + len(data)
    agree_with_library(struct.pack("<Q", len(header)) + header + data, tensors)
    return True


def test_unchanged():
    assert try_header(HEADER, DATA)
    assert len(parse_index(INDEX_BYTES)) == 9


@settings(max_examples=5000, **QUICK)
@given(edits)
def test_headers_changed_in_bytes(changes):
    try_header(mutate(HEADER, changes), DATA)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
sizes = st.integers(-2, 5) | st.sampled_from([1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 200])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.tuples(sizes, sizes).map(list) | json_values,
    }
)


@settings(max_examples=3000, **QUICK)
@given(st.dictionaries(st.text(max_size=10), entries | json_values, max_size=4), st.integers(0, 40))
def test_headers_of_any_json(header, nbytes):
    try_header(json.dumps(header).encode(), bytes(nbytes))


@settings(max_examples=1000, **QUICK)
@given(
    st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=4),
    st.integers(-1, 1),
)
def test_headers_that_are_almost_right(found, slack):
    """Consecutive tensors of every dtype, with the data one byte short, right, or one byte long."""
    header, at = {}, 0
    for i, (dtype, shape) in enumerate(found):
        n = torch.Size(shape).numel() * DTYPES[dtype][1] // 8
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
        at += n
    whole = all(DTYPES[d][1] >= 8 or (s and s[-1] * DTYPES[d][1] % 8 == 0) for d, s in found)
    accepted = try_header(json.dumps(header).encode(), bytes(max(0, at + slack)))
    assert accepted == (whole and max(0, at + slack) == at)


@settings(max_examples=1500, **QUICK)
@given(edits)
def test_indexes_changed_in_bytes(changes):
    try:
        found = parse_index(mutate(INDEX_BYTES, changes))
    except ValueError as e:
        check_clear(e)
        return
    for file in found.values():
        assert not set("/\\\0") & set(file)
        assert file.endswith(".safetensors")


@settings(max_examples=500, **QUICK)
@given(
    st.dictionaries(
        st.text(max_size=5), json_values | st.text(max_size=30).map(lambda t: t + ".safetensors"), max_size=4
    )
)
def test_indexes_of_any_json(weight_map):
    try:
        found = parse_index(json.dumps({"weight_map": weight_map}).encode())
    except ValueError:
        return
    assert all(isinstance(f, str) and "/" not in f and f != ".." for f in found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=800, **QUICK)
@given(edits, st.integers(0, len(WHOLE)))
def test_files(folder, changes, cut):
    """Whole files, their length field too, cut short: opened, and read in full where they are accepted."""
    raw = mutate(WHOLE, changes)
    if cut % 3 == 0:
        raw = raw[:cut]
    (folder / SINGLE).write_bytes(raw)
    try:
        reader = ShardReader(folder)
    except ValueError:
        return
    with reader:
        for name, info in reader.tensors.items():
            assert reader.read(name).nbytes == info.nbytes <= len(raw)
        agree_with_library(raw, reader.tensors)


@settings(max_examples=300, **QUICK)
@given(json_values, st.sampled_from(["quantization_config", "model_type", "text_config", ""]))
def test_configs(tmp_path_factory, value, key):
    """config.json is untrusted as well: opening says ValueError (or TypeError for a wrong dtype), or works."""
    place = tmp_path_factory.mktemp("config")
    (place / SINGLE).write_bytes(WHOLE)
    (place / "config.json").write_text(json.dumps({key: value} if key else value))
    try:
        Checkpoint(place).close()
    except (ValueError, TypeError) as e:
        check_clear(e)


HOSTILE = {
    "nested lists": b'{"a":' + b"[" * 3_000_000,
    "nested maps": b'{"a":' * 500_000,
    "empty lists": b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
    "empty maps": b'{"a":[' + b"{}," * 1_000_000 + b"{}]}",
    "numbers": b'{"a":[' + b"1," * 1_500_000 + b"1]}",
    "names": b"{" + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}",
    "digits": b'{"a":' + b"9" * 3_000_000 + b"}",
    "escapes": b'{"' + b"\\u0041" * 500_000 + b'":1}',
    "spaces": b"{" + b" " * 3_000_000 + b"}",
    "string": b'{"' + b"x" * 3_000_000 + b'":1}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_memory_is_bounded_by_the_input(case):
    raw = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):  # noqa: PT011
            parse_header(raw, 8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(raw) + (1 << 20), f"{peak / len(raw):.0f} bytes for a byte"


def test_index_file_that_is_absurdly_long(tmp_path):
    with open(tmp_path / INDEX, "wb") as f:
        f.truncate(1 << 40)  # a hole: takes no space
    with pytest.raises(ValueError, match="is the limit"):
        ShardReader(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        load_json(b"\x80", "it")
