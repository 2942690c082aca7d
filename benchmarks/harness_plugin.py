"""Our layers as a plug-in of the peer harness: a process that has its modules ``peers`` and ``moebench`` loads this file.

The harness gives one layer's weights as plain tensors, clones whatever tensors ``prepare`` returns for its other layers, and calls
``make`` for each token count; it checks against its own float32 reference and times all peers alike.
"""

from __future__ import annotations

import types

import torch
from peers import Peer, reg  # of the harness, not of this folder

import mx_kernels as mk
import mx_moe as mm
import mx_quant as mq

ACTIVATIONS = {
    "silu": mk.Activation("silu"),
    "swigluoai": mk.Activation("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0),
}


class _Ours(Peer):
    backend, inputs, promote = "auto", None, False

    def prepare(self, shape, W):
        return types.SimpleNamespace(**{f"{n}{i}": t for n in ("w13", "w2") for i, t in enumerate(W.t[n])}, made=[])

    def make(self, st, shape, inp):
        if st.made[:1] != [st.w130.data_ptr()]:  # a clone's list still names the tensor that it was cloned from
            f = mk.get_format(self.fmt if self.fmt != "bf16" else "mxfp8")
            parts = []
            for n in ("w13", "w2"):
                q = mk.QuantizedTensor(
                    getattr(st, f"{n}0"),
                    getattr(st, f"{n}1"),
                    f,
                    f.default_rule,
                    torch.bfloat16,
                    getattr(st, f"{n}2", None),
                )
                parts.append(mk.dequantize(q) if self.fmt == "bf16" else q)
            weights = mq.ExpertWeights(*parts)
            experts = mm.make_experts(weights, ACTIVATIONS[shape.act], backend=self.backend, inputs=self.inputs)
            if self.promote:
                experts.promote = True
            st.made[:] = [st.w130.data_ptr(), experts]
        experts, routing = st.made[1], mm.Routing(inp.ids, inp.w)
        return lambda: experts(inp.x, routing)


def _register(name: str, fmt: str, **options: object) -> None:
    reg(type(name, (_Ours,), {"name": name, "fmt": fmt, **options}))


for _fmt in ("bf16", "mxfp8", "mxfp4", "nvfp4"):
    _register(f"mx_{_fmt}", _fmt)
for _fmt in ("mxfp8", "mxfp4"):
    _register(f"mx_{_fmt}_a8", _fmt, inputs="mxfp8", tol=0.06)
    _register(f"mx_{_fmt}_a8_rebased", _fmt, inputs="mxfp8", backend="rebased", tol=0.06)
    _register(f"mx_{_fmt}_a8_rebased_promoted", _fmt, inputs="mxfp8", backend="rebased", promote=True, tol=0.06)
_register("mx_mxfp8_emulation", "mxfp8", backend="emulation")
