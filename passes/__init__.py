"""Graph rewrites: one file per pass, run by the manager."""

if not __name__.startswith("qcompile."):
    raise ImportError(f"import qcompile.passes, not {__name__}: a bare import would load every module twice")
