from __future__ import annotations

import json

import mx_quant as mq

ROWS = (
    mq.Covered("a.weight", 60, "mxfp4"),
    mq.Covered("b.experts.up_proj", 30, "mxfp4", "", True),
    mq.Covered("c.experts.up_proj", 10, None, "skipped by 'c.*'", True),
)


def test_percentages():
    c = mq.Coverage(mq.W4A8, ROWS, 100)
    assert (c.numel, c.quantized) == (200, 90)
    assert c.percent == 45
    assert c.expert_percent == 75
    assert mq.Coverage(mq.W4A8, ROWS[:1]).expert_percent is None
    assert mq.Coverage(mq.W4A8, ()).percent == 0


def test_forms():
    c = mq.Coverage(mq.W4A8, ROWS, 100)
    d = json.loads(json.dumps(c.to_dict()))
    assert d["percent"] == 45
    assert d["scheme"]["name"] == "mxfp4_w4a8"
    assert d["weights"][2] == {
        "name": "c.experts.up_proj", "numel": 10, "format": None, "reason": "skipped by 'c.*'", "expert": True,
    }  # fmt: skip
    assert str(c) == (
        "mxfp4_w4a8: 45.0% of 200 parameters quantized, 75.0% of expert weights; 2 weights quantized, 1 left as they were"
    )
    assert "| `c.experts.up_proj` | 10 | as it was: skipped by 'c.*' |" in c.to_markdown()
