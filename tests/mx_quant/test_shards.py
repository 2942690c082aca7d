"""Shards: the safetensors library reads what we write and we read what it writes; every corruption is a clear error."""

from __future__ import annotations

import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mx_quant.shards import DTYPES, INDEX, SINGLE, ShardReader, load_json, parse_header, parse_index
from mx_quant.writer import ShardWriter, TensorSpec, crc32_join, index_json, plan_shards, write_file

WIDE = [d for d, bits in DTYPES.values() if bits >= 8]


def example() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    t = {
        "a.weight": torch.randn(6, 32, generator=g).bfloat16(),
        "b.weight": torch.randn(3, 5, 7, generator=g),
        "c.codes": torch.randint(0, 256, (4, 16), dtype=torch.uint8, generator=g),
        "d.fp8": torch.randn(8, 4, generator=g).to(torch.float8_e4m3fn),
        "e.e5m2": torch.randn(8, 4, generator=g).to(torch.float8_e5m2),
        "f.scale": torch.randint(0, 255, (4, 3), dtype=torch.uint8, generator=g).view(torch.float8_e8m0fnu),
        "g.scalar": torch.tensor(2.5),
        "h.empty": torch.empty(0, 8),
        "i.ids": torch.arange(9),
        "j.half": torch.randn(5, generator=g).half(),
        "k.bool": torch.tensor([True, False, True]),
    }
    return t


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def write(folder, tensors, max_shard_bytes=10**9, metadata=None):
    shards = plan_shards(
        [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], max_shard_bytes, metadata
    )
    with ShardWriter(folder, shards) as w:
        for n, t in tensors.items():
            w.write(n, t.contiguous())
        w.finish()
    return shards


def raw_file(path, header: dict | bytes, data: bytes = b"", claim: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    save_file(example(), tmp_path / SINGLE, metadata={"format": "pt"})
    with ShardReader(tmp_path) as r:
        assert set(r.names) == set(example())
        assert r.metadata == {SINGLE: {"format": "pt"}}
        for name, t in example().items():
            assert equal(r.read(name), t), name
            assert r.info(name).nbytes == t.nbytes
        starts = [t.start for t in r]
        assert starts == sorted(starts)


@pytest.mark.parametrize("limit", [10**9, 200, 1])
def test_library_reads_what_we_write(tmp_path, limit):
    shards = write(tmp_path, example(), limit, {"made": "here"})
    assert (len(shards) > 1) == (tmp_path / INDEX).exists()
    found = {}
    for shard in shards:
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes
        found |= load_file(tmp_path / shard.file)
        with safe_open(tmp_path / shard.file, "pt") as f:
            assert f.metadata() == {"made": "here"}
    assert set(found) == set(example())
    assert all(equal(found[n], t) for n, t in example().items())
    if len(shards) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in example().values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / file, "pt") as f:
                assert name in f.keys()  # noqa: SIM118
    with ShardReader(tmp_path) as r:
        assert all(equal(r.read(n), t) for n, t in example().items())


def test_transformers_loads_our_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    shards = write(tmp_path, state, 5000, {"format": "pt"})
    assert len(shards) > 2
    config.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(equal(again[n], t) for n, t in state.items())


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, None), slice(-3, -1), slice(4, 2), slice(None)])
def test_rows(tmp_path, rows):
    save_file(example(), tmp_path / SINGLE)
    with ShardReader(tmp_path) as r:
        for name in ("a.weight", "b.weight", "c.codes", "f.scale", "h.empty", "i.ids"):
            assert equal(r.read(name, rows), example()[name][rows].clone()), name
        with pytest.raises(ValueError, match="no rows"):
            r.read("g.scalar", rows)
        with pytest.raises(ValueError, match="step"):
            r.read("a.weight", slice(0, 4, 2))
        with pytest.raises(KeyError, match=r"a\.weight"):
            r.read("a.wieght")


def test_sub_byte_types_are_bytes(tmp_path):
    raw_file(
        tmp_path / SINGLE,
        {
            "f4": {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]},
            "f6": {"dtype": "F6_E2M3", "shape": [1, 4], "data_offsets": [6, 9]},
        },
        bytes(range(9)),
    )
    with ShardReader(tmp_path) as r:
        assert r.read("f4").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert r.read("f4", slice(1, 2)).tolist() == [[3, 4, 5]]
        assert r.read("f6").tolist() == [[6, 7, 8]]


def test_aligned(tmp_path):
    """Odd-sized bytes never push a wider tensor off its alignment, whatever the order they come in."""
    tensors = {"u": torch.zeros(3, dtype=torch.uint8), "h": torch.zeros(3).half(), "d": torch.zeros(3).double()}
    (shard,) = write(tmp_path, tensors)
    for info in shard.tensors:
        assert info.start % info.torch_dtype.itemsize == 0
    assert load_file(tmp_path / SINGLE)["d"].dtype == torch.float64


def test_parts_from_threads(tmp_path):
    t = torch.randint(0, 256, (64, 1024), dtype=torch.uint8)
    other = torch.randn(7, 3)
    seen = []
    shards = plan_shards([TensorSpec("t", t.dtype, (64, 1024)), TensorSpec("o", other.dtype, (7, 3))], 10**9)
    with ShardWriter(tmp_path, shards, on_shard=lambda s, crc: seen.append((s.file, crc))) as w:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: w.write("t", t[i], 1024 * i), reversed(range(64))))
        assert w.needs("t")
        w.write("o", other)
        w.finish()
        assert not w.needs("t")
    assert seen == [(SINGLE, {"t": zlib.crc32(t.numpy()), "o": zlib.crc32(other.numpy())})]
    assert equal(load_file(tmp_path / SINGLE)["t"], t)


def test_crc_join():
    a, b = os.urandom(1000), os.urandom(12345)
    for n in (0, 1, 7, 8, 1000):
        assert crc32_join(zlib.crc32(a[:n]), zlib.crc32(b), len(b)) == zlib.crc32(a[:n] + b)
        assert crc32_join(zlib.crc32(b), zlib.crc32(a[:n]), n) == zlib.crc32(b + a[:n])


def finish_twice(w):
    w.write("s", torch.zeros(1))
    w.finish()


def test_writer_refuses(tmp_path):
    spec = TensorSpec("t", torch.float32, (4,))
    with pytest.raises(ValueError, match="two tensors"):
        plan_shards([spec, spec], 100)
    shards = plan_shards([spec, TensorSpec("s", torch.float32, (2,))], 100)
    with ShardWriter(tmp_path, shards) as w:
        with pytest.raises(ValueError, match="outside"):
            w.write("t", torch.zeros(5))
        with pytest.raises(TypeError, match="planned as"):
            w.write("t", torch.zeros(4, dtype=torch.int32))
        w.write("t", torch.zeros(2))
        with pytest.raises(ValueError, match="t, s were not written in full"):
            w.finish()
    with ShardWriter(tmp_path, shards) as w:
        w.write("t", torch.zeros(4))
        w.write("s", torch.zeros(1))
        with pytest.raises(ValueError, match="overlap"):  # noticed by the background thread: now or at the end
            finish_twice(w)


def test_only_empty_tensors(tmp_path):
    write(tmp_path, {"e": torch.empty(0, 4)})
    with ShardReader(tmp_path) as r:
        assert r.read("e").shape == (0, 4)


GOOD = {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def with_(**changes):
    return {"t": GOOD["t"] | changes}


BAD_HEADERS = {
    "hole": ({**GOOD, "u": {"dtype": "U8", "shape": [1], "data_offsets": [9, 10]}}, 10, "hole"),
    "overlap": ({**GOOD, "u": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, 8, "overlaps"),
    "beyond": (with_(shape=[4], data_offsets=[0, 16]), 8, "outside"),
    "extra data": (GOOD, 9, "truncated"),
    "backwards": (with_(data_offsets=[8, 0]), 8, "outside"),
    "bytes": (with_(shape=[3]), 8, "takes 12 bytes"),
    "dtype": (with_(dtype="F31"), 8, "dtype 'F31'"),
    "dtype type": (with_(dtype=["F32"]), 8, "dtype"),
    "negative": (with_(shape=[-2]), 8, "dimension"),
    "bool": (with_(shape=[True, 2]), 8, "dimension"),
    "float": (with_(shape=[2.0]), 8, "dimension"),
    "overflow": (with_(shape=[2**62, 2**62]), 8, "takes"),
    "too big an int": (with_(shape=[2**64]), 8, "2\\^63"),
    "rank": (with_(shape=[1] * 40), 8, "at most 32"),
    "offsets": (with_(data_offsets=[0]), 8, "begin, end"),
    "field": (with_(more=1), 8, "exactly dtype"),
    "not a map": ({"t": 3}, 8, "exactly dtype"),
    "odd nibbles": ({"t": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "whole bytes"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "map of strings"),
    "list": (b"[]", 0, "does not begin"),
    "empty": (b"", 0, "does not begin"),
    "nan": (b'{"t": NaN}', 0, "NaN"),
    "twice": (b'{"t": {}, "t": {}}', 0, "twice"),
    "deep": (b'{"t": ' + b"[" * 40 + b"1234567890" * 40 + b"]" * 40 + b"}", 0, "exactly dtype"),
    "very deep": (b'{"t": ' + b'{"aaaaaaaaaaaaaaa":' * 30000 + b"1" + b"}" * 30000 + b"}", 0, "deep"),
    "brackets": (b'{"t": [' + b"[]," * 100000 + b"[]]}", 0, "plausible"),
    "digits": (b'{"t": ' + b"1" * 100000 + b"}", 0, "JSON"),
    "utf8": (b'{"\xff": 1}', 0, "JSON"),
    "surrogate": (b'{"\\ud800": 1}', 0, "Unicode"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path, case):
    header, nbytes, message = BAD_HEADERS[case]
    path = raw_file(tmp_path / SINGLE, header, bytes(nbytes))
    with pytest.raises(ValueError, match=message):
        ShardReader(path)


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, 10**9, 101])
def test_absurd_header_length(tmp_path, claim):
    path = raw_file(tmp_path / SINGLE, GOOD, bytes(8), claim=claim)
    with pytest.raises(ValueError, match="claims a header"):
        ShardReader(path)


def test_good_header():
    tensors, metadata = parse_header(json.dumps(GOOD).encode(), 8)
    assert metadata == {}
    assert tensors["t"].shape == (2,)


def test_truncated_and_foreign(tmp_path):
    save_file(example(), tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=SINGLE):
            ShardReader(tmp_path)
    torch.save(torch.zeros(3), tmp_path / SINGLE)
    with pytest.raises(ValueError, match="not safetensors"):
        ShardReader(tmp_path)


def test_shrinks_while_open(tmp_path):
    save_file({"t": torch.zeros(1000)}, tmp_path / SINGLE)
    with ShardReader(tmp_path) as r:
        os.truncate(tmp_path / SINGLE, 2000)
        with pytest.raises(ValueError, match="shrank"):
            r.read("t")


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x.bin", "", ".safetensors", 3, None,
     "x\0.safetensors", "a" * 300 + ".safetensors", ["model.safetensors"]],
)  # fmt: skip
def test_index_may_not_leave(file):
    with pytest.raises(ValueError, match="plain name"):
        parse_index(json.dumps({"weight_map": {"t": file}}).encode())


@pytest.mark.parametrize(
    "text", [b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"3", b'{"weight_map": {"a": "x", "a": "y"}}']
)
def test_bad_index(text):
    with pytest.raises(ValueError, match=r"weight_map|object|twice"):
        parse_index(text)


def test_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file(example(), outside / "real.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / SINGLE).symlink_to(outside / "real.safetensors")
    with pytest.raises(ValueError, match="leaves its folder"):
        ShardReader(folder)
    (folder / SINGLE).unlink()
    save_file(example(), folder / "model.v2.safetensors")
    (folder / SINGLE).symlink_to("model.v2.safetensors")
    ShardReader(folder).close()
    # The Hugging Face cache links snapshots/<revision>/file to blobs/<hash>.
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(example(), blobs / "0123")
    (snapshot / SINGLE).symlink_to("../../blobs/0123")
    with ShardReader(snapshot) as r:
        assert equal(r.read("c.codes"), example()["c.codes"])


def test_not_regular(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(ValueError, match="regular file"):
        ShardReader(tmp_path)


def test_folder_contents(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        ShardReader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        ShardReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled"):
        ShardReader(tmp_path)
    save_file({"t": torch.zeros(1)}, tmp_path / "x.safetensors")
    ShardReader(tmp_path).close()
    save_file({"u": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="which belong"):
        ShardReader(tmp_path)


def test_read_ahead_changes_nothing(tmp_path):
    """Asked for bytes that are there, partly there and not there at all."""
    x = torch.arange(5000, dtype=torch.int32)
    save_file({"x": x}, tmp_path / SINGLE)
    with ShardReader(tmp_path) as r:
        for offset, nbytes in ((0, 4096), (15_000, 1 << 20), (1 << 40, 1)):
            r.read_ahead(r.info("x"), offset, nbytes)
            assert torch.equal(r.read("x"), x)


def test_a_complete_set_needs_no_index(tmp_path):
    """As OpenAI published gpt-oss-120b: the names say that nothing is missing."""
    files = [f"model--0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, file in enumerate(files):
        save_file({f"t{i}": torch.full((2,), i)}, tmp_path / file)
    with ShardReader(tmp_path) as r:
        assert r.names == ("t0", "t1", "t2")
    (tmp_path / files[1]).rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"3 \.safetensors files and no"):
        ShardReader(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2 \.safetensors files and no"):
        ShardReader(tmp_path)
    save_file({"t0": torch.zeros(1)}, tmp_path / files[1])
    with pytest.raises(ValueError, match="is both in"):
        ShardReader(tmp_path)


def test_index_and_shards_agree(tmp_path):
    save_file({"t": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"u": torch.zeros(1)}, tmp_path / "b.safetensors")

    def index(**weight_map):
        write_file(
            tmp_path / INDEX,
            json.dumps({"weight_map": {k: f"{v}.safetensors" for k, v in weight_map.items()}}).encode(),
        )

    index(t="a", u="b")
    with ShardReader(tmp_path) as r:
        assert r.files == ("a.safetensors", "b.safetensors")
    for weight_map, message in (
        ({"t": "a", "u": "c"}, "missing"),
        ({"t": "a", "u": "b", "v": "b"}, "does not hold"),
        ({"t": "b", "u": "a"}, "does not hold"),
        ({"t": "a"}, None),
    ):
        index(**weight_map)
        if message is None:
            assert ShardReader(tmp_path).names == ("t",)
        else:
            with pytest.raises(ValueError, match=message):
                ShardReader(tmp_path)
    save_file({"t": torch.zeros(1), "v": torch.zeros(1)}, tmp_path / "a.safetensors")
    index(t="a")
    with pytest.raises(ValueError, match="does not list"):
        ShardReader(tmp_path)
    save_file({"t": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"t": torch.zeros(1)}, tmp_path / "b.safetensors")
    index(t="a", u="b")
    with pytest.raises(ValueError, match="both in"):
        ShardReader(tmp_path)


def test_descriptors_are_closed(tmp_path):
    save_file({"t": torch.zeros(1)}, tmp_path / SINGLE)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("needs /proc")
    for _ in range(3):
        ShardReader(tmp_path).close()
        raw_file(tmp_path / "bad.safetensors", b"[]")
        with pytest.raises(ValueError, match="does not begin"):
            ShardReader(tmp_path / "bad.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before


def test_index_json_is_sorted():
    shards = plan_shards([TensorSpec(n, torch.float32, (4,)) for n in "cab"], 16)
    found = load_json(index_json(shards), "index")
    assert list(found["weight_map"]) == ["a", "b", "c"]
    assert [s.file for s in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(set(WIDE) >= {t.torch_dtype for t in s.tensors} for s in shards)
