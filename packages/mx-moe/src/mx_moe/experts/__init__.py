"""Classes of experts: native, fused, emulation, reference, and those of the re-created systems by name."""
