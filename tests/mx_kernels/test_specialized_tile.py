"""Who loads and who multiplies hand stages to each other (``kernels/specialized_load.py``, ``specialized_tile.py``).

Their source runs here as plain Python, a thread for each warpgroup, over barriers and buffers that remember what they hold: every step
finds its own rows, codes and scales, nothing is overwritten before all have read it, and nobody waits forever.
"""

from __future__ import annotations

import queue
import threading
from types import FunctionType, SimpleNamespace

import pytest

load = pytest.importorskip("mx_kernels.kernels.specialized_load", exc_type=ImportError)
tile = pytest.importorskip("mx_kernels.kernels.specialized_tile", exc_type=ImportError)

SECONDS = 5  # until who waits is given up
JOINS = -1  # in place of a block's level: it joins the one in front


class Barrier:
    """An mbarrier: a phase ends when ``count`` have arrived and all bytes that were expected have come."""

    def __init__(self, world, count):
        self.world, self.count = world, count
        self.phase = self.arrived = self.missing = 0

    def change(self, arrivals=0, expected=0, came=0):
        with self.world:
            self.arrived += arrivals
            self.missing += expected - came
            assert self.arrived <= self.count
            if self.arrived == self.count and self.missing == 0:
                self.phase, self.arrived = self.phase ^ 1, 0
                self.world.notify_all()

    def wait(self, parity):
        with self.world:
            assert self.world.wait_for(lambda: self.phase != parity, SECONDS), "waits forever"


class Place:
    """A part of shared memory: what it holds, and how many have still to read it."""

    def __init__(self, readers):
        self.readers, self.held, self.unread = readers, None, 0

    def slice(self, *_):
        return self

    def begin(self, what):
        assert self.unread == 0 or self.held == what, "overwritten before all have read it"

    def fill(self, what):
        self.begin(what)
        self.held, self.unread = what, self.readers

    def read(self):
        assert self.unread > 0, "read where nothing has come"
        self.unread -= 1
        return self.held


class Places(list):
    index = list.__getitem__
    shape: tuple[int, int]


class Number(int):
    """An int whose comparisons are tensors."""

    def __sub__(self, other):
        return Number(int(self) - other)

    def __eq__(self, other):
        return Bit(int(self) == other)

    def __le__(self, other):
        return Bit(int(self) <= other)

    __hash__ = int.__hash__


class Bit(int):
    def to(self, kind):
        return kind(self)


def plain_python(**replaced):
    """The functions of both modules, which see each other and ``replaced``."""
    space = {}
    for name, value in {**vars(load), **vars(tile)}.items():
        jitted = hasattr(value, "fn") and hasattr(value, "arg_names")
        space[name] = FunctionType(value.fn.__code__, space, name, value.fn.__defaults__) if jitted else value
    for name in ("BK", "PART", "LINES", "TABLE", "FULL", "COPIERS"):
        space[name] = getattr(load, name).value
    gl = SimpleNamespace(
        cdiv=lambda a, b: Number(-(-a // b)),
        where=lambda c, a, b: a if c else b,
        minimum=min,
        static_range=range,
        int32=int,
    )
    gl.DotOperandLayout = gl.NVMMADistributedLayout = lambda *_: None
    mbarrier = SimpleNamespace(
        wait=Barrier.wait,
        arrive=lambda barrier, count, pred=True: barrier.change(arrivals=count) if pred else None,
        expect=lambda barrier, size, pred=True: barrier.change(1, size) if pred else None,
    )
    space |= {"gl": gl, "mbarrier": mbarrier}
    space |= {"_barrier": lambda: None, "fence_async_shared": lambda: None}
    return SimpleNamespace(**(space | {"space": space})), space.update(replaced)


class Copies:
    """Copies that come while whoever began them goes on, and arrive for all of its threads then."""

    def __init__(self):
        self.open, self.begun = [], queue.SimpleQueue()

    def begin(self, place, what):
        place.begin(what)
        self.open.append((place, what))

    def mbarrier_arrive(self, barrier, increment_count):
        assert not increment_count, "the barrier's count has them already"
        self.begun.put((barrier, self.open))
        self.open = []

    def come(self):
        for barrier, copies in iter(self.begun.get, None):
            for place, what in copies:
                place.fill(what)
            barrier.change(arrivals=load.COPIERS.value)


def run(kind, groups, stages, k, pairs, levels, copied, passes):
    """What each warpgroup multiplied, step by step, in tiles of such numbers of pairs. copied: rows of x are, else boxes bring them.
    passes: by tile, how many warpgroups, the first ones, have nothing to multiply."""
    world = threading.Condition()
    full, empty = (Places(Barrier(world, n) for _ in range(stages)) for n in (1 + load.COPIERS.value * copied, groups))
    xs, xt = (Places(Place(groups) for _ in range(stages)) for _ in range(2))
    xs.shape = (stages, 256 if groups == 2 else 128)  # what is over lies in xt
    ws, ss = (Places(Place(1) for _ in range(stages * groups)) for _ in range(2))
    ring = (xs, xt, ws, ss, full, empty)
    box, units, tail = 64 if pairs == 256 else 32, 1 if kind == "e2m1" else 2, int(k % 128 != 0)
    seen, errors, current, rows = [[] for _ in range(groups)], [], [0], Copies()

    def copy_box(source, at, barrier, target, pred=True):
        if pred:
            what, size = source(*at)
            target.fill((current[0], *what))
            barrier.change(came=size)

    sources = (  # what a box brings, and its bytes
        lambda row, column: (("x", column), 2 * 64 * box),
        (lambda row, column: (("w", row // 64, column), 2 * 64 * 64))
        if kind == ""
        else (lambda row, column: (("w", row % 1000 // 16, row // 1000 // units * 64), 64 * 32)),
        lambda row, column: (("s", column // 64, row), 64 * 4),
    )

    def loads():
        loader, _ = plain_python(_copy_box=copy_box)
        stage = phase = 0
        for current[0], n in enumerate(levels):
            where = (0, 0, 0, 0, 32000, Number(k), stage, phase, ring)
            stage, phase = loader._load_boxes(*sources, *where, n, box, groups, kind, 32, tail, stages, int(copied))

    def copies():
        tiles = [0]
        loader, _ = plain_python(
            _copy_rows=lambda x, at, place, first, n: rows.begin(place, (tiles[0], "x", x)), async_copy=rows
        )
        stage = phase = 0
        for tiles[0], n in enumerate(levels):
            stage, phase = loader._load_rows(0, None, Number(k), stage, phase, ring, n, tail, stages)
        rows.begun.put(None)

    def multiplies(of):
        flying, fences = [], []

        def issued(a, ring, stage, acc, rest, n):
            assert not copied or len(fences) > len(seen[of]) + len(flying), "copies are not there for the product yet"
            flying.append((a, [xs[stage], xt[stage]] if n > xs.shape[1] else [xs[stage]]))
            return acc, rest

        def wait(pending, deps=()):
            while len(flying) > pending:
                a, rows = flying.pop(0)
                found = {place.read() for place in rows}
                assert len(found) == 1
                seen[of].append((a.read() if isinstance(a, Place) else a, *found))
            return deps[0] if deps else None

        def ended(ring, acc, rest, n, but=0):
            wait(but)
            return acc, rest

        product, _ = plain_python(
            _issued=issued,
            _ended=ended,
            warpgroup_mma_wait=wait,
            fence_async_shared=lambda: fences.append(None),
            _sums_of=lambda *_: (0, 0),
            _used=lambda a: None,
            _scale_words=lambda ss, stage, of, groups, *_: ss[stage * groups + of].read(),
            _decoded=lambda ws, scales, stage, second, of, groups, *_: (
                ws[stage * groups + of].read(),
                scales,
                int(second),
            ),
        )

        def given_back(empty, stage):
            read = [xs[stage], *([xt[stage]] if n > xs.shape[1] else ()), ws[stage * groups + of]]
            for place in read + ([ss[stage * groups + of]] if kind and passed[0] % 2 == 0 else []):
                place.read()
            passed[0] += 1
            empty[stage].change(arrivals=1)

        passing, _ = plain_python(released=given_back)
        stage = phase = 0
        for i, n in enumerate(levels):
            passed = [0]
            if of < passes.get(i, 0):
                stage, phase = passing.passed_over(ring, stage, phase, Number(k), stages)
            elif kind == "":
                *_, stage, phase = product.plain_tile(ring, stage, phase, Number(k), of, groups, n, stages, copied)
            else:
                *_, stage, phase = product.tile(
                    ring, stage, phase, Number(k), of, groups, n, kind, 32, tail, k // 64 % 2 == 0, stages, copied
                )

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as e:
            errors.append(e)

    loaders = (loads, copies, rows.come) if copied else (loads,)
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in loaders]
    threads += [threading.Thread(target=guarded, args=(multiplies, of), daemon=True) for of in range(groups)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(2 * SECONDS)
    if errors:
        raise errors[0]
    return seen


@pytest.mark.compile
@pytest.mark.parametrize("k", [64, 128, 192, 256, 320, 768, 2880])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize(
    ("kind", "groups", "pairs", "levels", "copied", "passes"),
    [
        ("", 2, 256, (256, 64, 192, 128), False, {}),
        ("", 2, 256, (64, 256, 192), True, {1: 1}),
        ("", 3, 256, (256, 64, 192, 128), False, {1: 2, 3: 1}),
        ("", 3, 256, (128, 256, 64, 192), True, {0: 1, 1: 2}),
        ("e2m1", 2, 256, (64, 256, 128), False, {0: 1, 1: 1}),
        ("e4m3", 2, 256, (128, 192, 256), True, {}),
        ("e2m1", 2, 288, (288, 64, 256, 288), False, {3: 1}),
        ("e4m3", 2, 288, (192, 288, 128), True, {1: 1}),
        ("e4m3", 3, 160, (160, 96, 64, 128, 160), False, {0: 2, 4: 1}),
        ("e2m1", 3, 160, (128, 160, 64, 96), True, {1: 2}),
    ],
)
def test_every_step_finds_its_own(kind, groups, pairs, levels, copied, passes, stages, k):
    seen = run(kind, groups, stages, k, pairs, levels, copied, passes)
    steps = range(-(-k // 64))
    for of, got in enumerate(seen):
        want = []
        for i in range(len(levels)):
            for step in steps if of >= passes.get(i, 0) else ():
                w, x = (i, "w", of, 64 * step), (i, "x", 64 * step)
                second = 1 if step % 2 or (k % 128 and step == steps[-1]) else 0
                want.append((w, x) if kind == "" else ((w, (i, "s", of, step // 2), second), x))
        assert got == want


@pytest.mark.compile
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("largest", [256, 288])
@pytest.mark.parametrize(
    "levels",
    [
        [[2] * 5 + [0], [2], [], [1], [2, 2]],
        [[0]],
        [[2, 2, 2]],
        [[1], [2] * 7 + [1]] * 9,
        [[2] * 3 + [1]] * 256,
        [[2, 2, 3, JOINS], [3, JOINS], [0], [2], [2, 1]],
        [[2] * 4 + [3, JOINS]] * 170,
    ],
)
def test_pieces(group, largest, levels):
    """Each weight tile of each block once, none of one that joins another; where blocks walk together, full ones first, those of an
    expert side by side."""
    python, _ = plain_python(_entry=lambda table, i: Number(table[i]))
    table, full, tiles = load.TABLE.value, load.FULL.value, 5
    if largest == 256:
        levels = [[0 if n == JOINS else min(n, 2) for n in held] for held in levels]
    blocks = [(e, level, len([n for n in held if n >= 2])) for e, held in enumerate(levels) for level in held]
    ids, runs, up_to = [], [], 0
    for b, (e, level, alike) in enumerate(blocks):
        up_to += level >= 2 if group > 1 else largest == 288 and level != JOINS
        start = next(i for i, other in enumerate(blocks) if other[0] == e)
        run = start + alike * table if level >= 2 and group > 1 else b + table
        ids.append((e + 1 if level != JOINS else 0) + up_to * full)
        runs.append(run + max(level, 0) * 2 * table * table)
    ids += [up_to * full] * (table - len(ids))
    drawn = [
        python.piece(Number(t), tiles, Number(len(blocks)), group, runs, ids, None, None, 0, largest)
        for t in range(len(blocks) * tiles)
    ]
    assert sorted((b, t) for b, t, _, _ in drawn) == [(b, t) for b in range(len(blocks)) for t in range(tiles)]
    found = [piece for piece in drawn if piece[2] >= 0]
    assert {b for b, _, _, _ in found} == {b for b, (_, level, _) in enumerate(blocks) if level != JOINS}
    assert all((e, level) == blocks[b][:2] for b, _, e, level in found)
    if group == 1:
        assert drawn[: len(found)] == found, "what is left out comes last"
    else:
        order = [level >= 2 for _, _, _, level in found]
        assert order == sorted(order, reverse=True)
        together = {}
        for at, (b, t, e, level) in enumerate(found):
            if level >= 2:
                together.setdefault((e, t), []).append((at, b))
        for (e, _), places in together.items():
            size = blocks[places[0][1]][2]
            width = -(-size // -(-size // group))
            for i in range(0, size, width):
                part = places[i : i + width]
                assert [b for _, b in part] == [part[0][1] + n for n in range(len(part))]
                assert part[-1][0] - part[0][0] == len(part) - 1, e
