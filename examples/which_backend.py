"""Which backend would run on hardware that is not here, and why the others would not."""

from __future__ import annotations

import mx_kernels as mk
import mx_moe as mm

for arch in ("sm80", "sm90", "sm100", "gfx950"):
    print(f"{arch}: {mm.select_mxfp8_moe_backend(mk.Device.fake(arch))}")

try:
    mm.select_mxfp8_moe_backend(mk.Device.fake("sm90"), "native")
except mk.Unsupported as error:
    print(error)
