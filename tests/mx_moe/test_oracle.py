"""The oracle, for every architecture in the table without its hardware: what runs, and the reason for each that does not."""

from __future__ import annotations

import json

import pytest
import torch

import mx_kernels as mk
import mx_quant as mq
from mx_moe import (
    EXPERT_BACKENDS,
    Problem,
    explain,
    make_experts,
    select_backend,
    select_mxfp4_moe_backend,
    select_mxfp8_moe_backend,
    select_nvfp4_moe_backend,
)
from mx_moe.__main__ import environment

SILU = mk.Activation("silu")
MXFP8_HARDWARE = {"sm100", "sm103", "sm120", "sm121", "gfx950", "gfx1250"}
MXFP4_HARDWARE = {"sm100", "sm103", "gfx950", "gfx1250"}  # MXFP8 inputs x MXFP4 weights
NVFP4_HARDWARE = {"sm100", "sm103", "sm120", "sm121", "gfx1250"}
GPUS = [a for a in mk.ARCHITECTURES if a not in ("cpu", "sm75")]


def reasons(choice: mk.Choice) -> dict[str, str]:
    return dict(choice.rejected)


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize(
    ("select", "hardware"),
    [
        (select_mxfp8_moe_backend, MXFP8_HARDWARE),
        (select_mxfp4_moe_backend, MXFP4_HARDWARE),
        (select_nvfp4_moe_backend, NVFP4_HARDWARE),
    ],
)
def test_gpus(arch: str, select, hardware: set[str]) -> None:
    choice = select(mk.Device.fake(arch))
    if arch in hardware:
        assert choice.name == "native"
        assert choice.rejected == ()
    else:
        assert choice.name == "fused"
        assert f"{arch} has no hardware dot_scaled" in reasons(choice)["native"]
        with pytest.raises(mk.Unsupported, match="no hardware dot_scaled"):
            select(mk.Device.fake(arch), "native")
    for requested in ("emulation", "reference"):
        assert select(mk.Device.fake(arch), requested).name == requested


def test_the_reason_names_the_hardware_that_has_it() -> None:
    choice = select_mxfp8_moe_backend(mk.Device.fake("sm90"))
    assert reasons(choice)["native"] == (
        "sm90 has no hardware dot_scaled for mxfp8_e4m3 (sm100, sm103, sm120, sm121, gfx950, gfx1250 have)"
    )
    choice = select_mxfp4_moe_backend(mk.Device.fake("sm120"))
    assert reasons(choice)["native"] == (
        "sm120 has no hardware dot_scaled for mxfp8_e4m3 x mxfp4 (sm100, sm103, gfx950, gfx1250 have)"
    )
    assert select_mxfp4_moe_backend(mk.Device.fake("sm120"), inputs="mxfp4").name == "native"


@pytest.mark.parametrize(
    "select", [select_mxfp8_moe_backend, select_mxfp4_moe_backend, select_nvfp4_moe_backend], ids=lambda s: s.__name__
)
def test_cpu(select) -> None:
    """On the CPU native and fused are refused with their reasons, emulation and reference run."""
    choice = select("cpu")
    assert choice.name == "emulation"
    assert "cpu has no hardware dot_scaled" in reasons(choice)["native"]
    assert "cpu runs no Triton kernels" in reasons(choice)["fused"]
    assert select("cpu", "reference").name == "reference"
    for name in ("native", "fused"):
        with pytest.raises(mk.Unsupported) as error:
            select("cpu", name)
        assert [n for n, _ in error.value.rejected] == [name]


def test_order_of_preference() -> None:
    assert [c.name for c in EXPERT_BACKENDS if c.opt_in is None] == ["native", "fused", "emulation", "reference"]


def test_inputs_in_16_bits_are_respected() -> None:
    choice = select_mxfp8_moe_backend(mk.Device.fake("sm100"), inputs=None)
    assert choice.name == "fused"
    assert "the scheme keeps inputs in 16 bits" in reasons(choice)["native"]


@pytest.mark.parametrize(
    ("scheme", "options", "backend", "inputs"),
    [
        ("mxfp8", {}, "fused", None),
        ("w4a16", {}, "fused", None),
        ("w8a8", {}, "native", mk.MXFP8),
        ("w4a4", {}, "native", mk.MXFP4),
        ("w8a8", {"inputs": None}, "fused", None),
        ("mxfp8", {"inputs": "auto"}, "native", mk.MXFP8),
        ("mxfp8", {"inputs": "mxfp8"}, "native", mk.MXFP8),
        ("w4a16", {"backend": "native"}, "native", mk.MXFP8),
    ],
)
def test_weight_only_schemes_stay_in_16_bits(oracle, monkeypatch, scheme, options, backend, inputs) -> None:
    """Where the hardware would multiply quantized inputs: those are quantized if the scheme or the caller says so, and only then."""
    case = oracle.layer("bfloat16", dtype=torch.bfloat16)
    weights = mq.quantize_experts(case.weights.w13, case.weights.w2, scheme)
    monkeypatch.setattr(mk.Device, "probe", classmethod(lambda cls, device=None: mk.Device.fake("sm100")))
    experts = make_experts(weights, case.activation, **options)
    assert experts.choice.name == backend
    assert experts.inputs.format is inputs
    if backend == "fused":
        assert "would multiply" in reasons(experts.choice)["native"]


def test_without_input_scales_nvfp4_is_not_native() -> None:
    choice = select_nvfp4_moe_backend(mk.Device.fake("sm100"), features=frozenset())
    assert choice.name == "fused"
    assert "need a calibrated global scale per GEMM" in reasons(choice)["native"]


@pytest.mark.parametrize("triton", [None, "3.4.0"])
def test_without_a_fitting_triton(triton: str | None) -> None:
    choice = select_mxfp8_moe_backend(mk.Device.fake("sm100", triton))
    assert choice.name == "emulation"
    want = "Triton is not installed" if triton is None else "Triton 3.4.0 is older than 3.6.0, which sm100 needs"
    assert want in reasons(choice)["native"]
    assert want in reasons(choice)["fused"]


def test_hardware_that_a_newer_triton_uses() -> None:
    choice = select_mxfp8_moe_backend(mk.Device.fake("sm121", "3.6.0"))
    assert choice.name == "fused"
    assert reasons(choice)["native"] == (
        "sm121 multiplies mxfp8_e4m3 in hardware from Triton 3.8.0 on, and this is Triton 3.6.0: update it"
    )
    choice = select_mxfp8_moe_backend(mk.Device.fake("gfx1250", "3.6.0"))
    assert choice.name == "emulation"
    assert "Triton 3.6.0 is older than 3.7.1, which gfx1250 needs" in reasons(choice)["fused"]


def test_plain_weights() -> None:
    problem = Problem("bfloat16", SILU, 8, 64, 64)
    choice = select_backend(problem, mk.Device.fake("sm100"))
    assert choice.name == "fused"
    assert "not quantized" in reasons(choice)["native"]


def test_sm75_has_no_bfloat16() -> None:
    problem = Problem("mxfp4", SILU, 8, 64, 64)
    assert "no bfloat16 matrix instructions" in reasons(select_backend(problem, mk.Device.fake("sm75")))["fused"]


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'; there are auto, native"):
        select_mxfp8_moe_backend("cpu", "cuda")
    with pytest.raises(ValueError, match="unknown architecture 'sm1'"):
        select_mxfp8_moe_backend(mk.Device.fake("sm1"))
    with pytest.raises(ValueError, match="unknown weights 'int4'"):
        Problem("int4", SILU, 8, 64, 64)
    with pytest.raises(ValueError, match="unknown inputs 'int8'"):
        Problem("mxfp4", SILU, 8, 64, 64, inputs="int8")
    with pytest.raises(ValueError, match=r"unknown features \['lora'\]"):
        Problem("mxfp4", SILU, 8, 64, 64, features=frozenset({"lora"}))


def test_choice_says_why(oracle) -> None:
    case = oracle.layer()
    experts = make_experts(case.weights, case.activation)
    assert str(experts.choice).splitlines()[0] == "emulation"
    assert "  native: cpu has no hardware dot_scaled for mxfp8_e4m3 (sm100" in str(experts.choice)
    assert json.loads(json.dumps(experts.choice.to_dict()))["backend"] == "emulation"


def test_explain_is_json() -> None:
    table = json.loads(json.dumps(explain(mk.Device.fake("gfx950"))))
    assert set(table) == {"bfloat16", *mk.FORMATS}
    assert table["mxfp8_e4m3"]["backend"] == "native"
    assert table["mxfp8_e4m3"]["inputs"] == "mxfp8_e4m3"
    assert table["nvfp4"]["backend"] == "fused"
    assert "gfx950 has no hardware dot_scaled for nvfp4" in table["nvfp4"]["rejected"]["native"]


def test_device_by_torch_name() -> None:
    assert select_mxfp8_moe_backend(torch.device("cpu")).name == "emulation"


@pytest.mark.parametrize("kind", ["mps", "privateuseone"])
def test_a_device_without_triton(kind: str) -> None:
    """Devices that PyTorch has and Triton has not: the reference and the emulation run, and the others say why not."""
    choice = select_mxfp8_moe_backend(torch.device(kind))
    assert choice.name == "emulation"
    assert f"{kind} has no hardware dot_scaled" in reasons(choice)["native"]
    assert reasons(choice)["fused"].startswith(f"{kind} runs no Triton kernels")
    assert select_mxfp8_moe_backend(kind, "reference").name == "reference"
    with pytest.raises(mk.Unsupported, match=f"{kind} runs no Triton kernels"):
        select_mxfp8_moe_backend(kind, "fused")
    assert {row["backend"] for row in explain(mk.Device.probe(kind)).values()} == {"emulation"}


@pytest.mark.parametrize(("arch", "bf16"), [("sm70", False), ("sm87", True), ("sm110", True)])
def test_a_gpu_that_is_not_in_the_table(arch: str, bf16: bool) -> None:
    """Nothing is native there; the reason says that it is unknown, not that it lacks the instruction."""
    device = mk.Device("cuda", mk.Architecture(arch, "nvidia", bf16=bf16), arch, "3.6.0")
    choice = select_mxfp8_moe_backend(device)
    assert choice.name == ("fused" if bf16 else "emulation")
    assert reasons(choice)["native"].startswith(f"{arch} is not in the table of architectures: no hardware dot_scaled")
    assert "(sm100, sm103, sm120" in reasons(choice)["native"]
    if not bf16:
        assert "no bfloat16 matrix instructions: use float16" in reasons(choice)["fused"]


def test_env_lists_every_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    found = environment(None)
    assert [(d["device"], d["arch"], d["triton"]) for d in found["devices"]] == [
        ("mps:0", "mps", None),
        ("cpu", "cpu", None),
    ]
    assert found["arch"] == "mps"
