"""Backends: each turns a lowered graph into kernels."""

if not __name__.startswith("qcompile."):
    raise ImportError(f"import qcompile.codegen, not {__name__}: a bare import would load every module twice")
