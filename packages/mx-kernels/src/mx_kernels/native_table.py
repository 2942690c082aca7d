"""What each architecture multiplies in hardware. Made by ``nox -s native``: do not edit.

The canonical GEMM was compiled with Triton 3.6.0, 3.7.1, 3.8.0, 3.9.0, and its matrix instructions read.
"""

NATIVE: dict[str, frozenset[tuple[str, str]]] = {
    "sm100": frozenset(
        {("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")}
    ),
    "sm103": frozenset(
        {("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")}
    ),
    "sm120": frozenset({("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")}),
    "sm121": frozenset({("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")}),
    "gfx950": frozenset({("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp4", "mxfp4")}),
    "gfx1250": frozenset(
        {("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")}
    ),
}
"""(activation family, weight family) whose products are block-scaled instructions only; an architecture without any is not here."""

NATIVE_SINCE: dict[str, str] = {
    "sm121": "3.8.0",
    "gfx1250": "3.8.0",
}
"""The first of those versions that makes an architecture's row of NATIVE, where that is not the oldest."""

PRODUCT_SINCE: dict[str, str] = {
    "gfx1250": "3.7.1",
}
"""The first of those versions that compiles 16-bit activations times upcast weights, where that is not the oldest."""
