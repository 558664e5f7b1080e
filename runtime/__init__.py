"""What executes an artifact: engines, the cache, sampling. Imports no pass and no code generator."""

if not __name__.startswith("qcompile."):
    raise ImportError(f"import qcompile.runtime, not {__name__}: a bare import would load every module twice")
