"""The chooser: the first that fits, every reason of those before it, and nothing replaced in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mx_kernels import Candidate, Choice, Unsupported, choose


def candidate(name, reason):
    return Candidate(name, lambda device, problem: reason and f"{reason} on {device} for {problem}", lambda: name)


verdicts = st.lists(st.sampled_from([None, "too small", "no instruction"]), min_size=1, max_size=6)


@given(verdicts)
def test_auto_takes_the_first_that_fits(reasons):
    candidates = [candidate(f"c{i}", r) for i, r in enumerate(reasons)]
    fitting = [i for i, r in enumerate(reasons) if r is None]
    told = tuple((f"c{i}", f"{r} on dev for job") for i, r in enumerate(reasons) if r is not None)
    if not fitting:
        with pytest.raises(Unsupported) as e:
            choose(candidates, "dev", "job")
        assert e.value.rejected == told
        for name, reason in told:
            assert f"{name}: {reason}" in str(e.value)
        return
    choice = choose(candidates, "dev", "job")
    assert choice.candidate is candidates[fitting[0]]
    assert choice.rejected == told[: fitting[0]]
    assert choice.to_dict() == {"backend": choice.name, "rejected": dict(choice.rejected)}
    assert str(choice).splitlines()[0] == choice.name
    assert len(str(choice).splitlines()) == 1 + len(choice.rejected)


@given(verdicts, st.data())
def test_a_request_is_taken_or_refused(reasons, data):
    candidates = [candidate(f"c{i}", r) for i, r in enumerate(reasons)]
    i = data.draw(st.integers(0, len(reasons) - 1))
    if reasons[i] is None:
        assert choose(candidates, "dev", "job", f"c{i}") == Choice(candidates[i])
    else:
        with pytest.raises(Unsupported, match=f"requested backend cannot run job on dev\n  c{i}: {reasons[i]}") as e:
            choose(candidates, "dev", "job", f"c{i}")
        assert e.value.rejected == ((f"c{i}", f"{reasons[i]} on dev for job"),)


def test_later_candidates_are_not_asked():
    def never(device, problem):
        raise AssertionError("asked although an earlier candidate fits")

    assert choose([candidate("a", None), Candidate("b", never, list)], 0, 0).name == "a"
    assert choose([Candidate("b", never, list), candidate("a", None)], 0, 0, "a").name == "a"


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown backend 'x'; there are auto, a, b"):
        choose([candidate("a", None), candidate("b", None)], 0, 0, "x")
    with pytest.raises(Unsupported, match="no backend can run job on dev"):
        choose([], "dev", "job")
