"""Every error a user can cause: one class per kind of mistake.

Each message names the place, what was expected, what came, and the remedy.
"""


class QCompileError(Exception):
    """Base of every error this package raises on bad input."""


class TargetError(QCompileError):
    """A target, scheme, or cache format that does not exist or does not go together."""


class OptionError(QCompileError, TypeError):
    """A keyword option that does not exist, or holds what it cannot."""


class FormatError(QCompileError):
    """A quantization format that cannot hold what it was asked to hold."""


class TraceError(QCompileError):
    """A model that `torch.export` could not capture, or captured with a fixed batch or sequence."""


class UnsupportedModelError(QCompileError):
    """A model or a node that is understood well enough to know that it cannot be served."""


class UnboundConstantError(QCompileError):
    """A weight or buffer for which no value was found."""


class WeightError(QCompileError):
    """A weight holding values that cannot be quantized (NaN or infinity)."""


class VerifyError(QCompileError):
    """A graph that breaks a rule of the intermediate representation."""


class PipelineError(QCompileError):
    """A pipeline text that does not parse, or names a pass or option that does not exist."""


class PassError(QCompileError):
    """A pass that failed, or whose claim (changed, exact) was found to be false."""


class BrokenPassError(PassError):
    """A pass that crashed or whose claim to have changed something was false: the mistake is in the pass, not in what it was given."""


class NumericError(PassError):
    """A pass after which the graph no longer computes what it did, found by running it before and after.

    Attributes:
        place: where the values part (`qcompile.passes.locate.Place`), None where that is not known.
        reproducer: the file that repeats it, "" where none was written.
    """

    def __init__(self, message: str, place: object = None, reproducer: str = "") -> None:
        """Say what is wrong, where, and which file repeats it."""
        super().__init__(message)
        self.place = place
        self.reproducer = reproducer


class CoverageError(QCompileError):
    """With `strict=True`: an operator that was left alone, or a kernel that a backend refused."""


class KernelBuildError(QCompileError):
    """A kernel that does not build, spills, exceeds shared memory or lacks an expected instruction."""


class ArtifactError(QCompileError):
    """An artifact that is missing, damaged, of another version, or hostile."""


class UntrustedCodeError(ArtifactError):
    """Native code that was not built on this machine and that the caller did not allow."""


class CapacityError(QCompileError):
    """More sequences or tokens than the cache was made for."""


class TokenizerError(QCompileError):
    """Text asked of a model that carries no tokenizer or chat template."""


class SourceError(QCompileError):
    """A model file, directory or token array that cannot be read."""


class ExportError(QCompileError):
    """A graph that another system's format does not express, or a file that does not compute what the graph does."""


class EngineError(QCompileError):
    """A device or driver that cannot run what it was given."""
