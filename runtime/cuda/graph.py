"""Streams and CUDA graphs: a program's actions, recorded once and replayed with one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qcompile.errors import EngineError
from qcompile.runtime.cuda.driver import Driver
from qcompile.runtime.cuda.launch import FrozenLaunch
from qcompile.runtime.cuda.program import Action, Program
from qcompile.runtime.cuda.steps import Clear, Copy, TorchStep


class Queue:
    """The stream an engine works on: torch's where tensors live on a GPU, so that both put their work on the same one."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        """A new stream."""
        self.driver, self.device = driver, device
        self.torch_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.handle: int = self.torch_stream.cuda_stream if self.torch_stream is not None else driver.create_stream()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Work of the caller's stream comes before what is inside, work after it waits."""
        self.driver.make_current()
        if self.torch_stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        self.torch_stream.wait_stream(caller)
        with torch.cuda.stream(self.torch_stream), torch.device(self.device):
            yield
        caller.wait_stream(self.torch_stream)

    def close(self) -> None:
        """Wait, and give the stream back unless it is torch's."""
        self.driver.synchronize(self.handle)
        if self.torch_stream is None:
            self.driver.destroy_stream(self.handle)


class CaptureError(EngineError):
    """A step that a CUDA graph cannot hold; the program itself is sound and runs step by step."""


class CapturedProgram:
    """A program as one CUDA graph. It holds the program, whose memory the graph reads and writes."""

    def __init__(self, program: Program, queue: Queue) -> None:
        """Run the program once, so that everything lazy is loaded, then record it.

        Raises:
            CaptureError: naming the step that cannot be recorded.
        """
        self.program, self._queue = program, queue
        self._driver = queue.driver
        # What torch allocates while recording must stay the graph's own: replays write there without asking the allocator.
        self._pool = torch.cuda.MemPool() if queue.device.type == "cuda" else None
        if program.obstacles:
            raise self._not_capturable(program.obstacles[0])
        with queue(), self._own_memory():
            program.run()
            self._driver.synchronize(queue.handle)
            self._executable = self._driver.instantiate(self._record())

    def _not_capturable(self, step: str) -> CaptureError:
        return CaptureError(f"{self.program.entry.name}: expected steps that a CUDA graph can hold, got {step}")

    def _own_memory(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.use_mem_pool(self._pool) if self._pool is not None else contextlib.nullcontext()

    def _record(self) -> int:
        self._driver.begin_capture(self._queue.handle)
        for action in self.program.actions:
            try:
                action()
            except (EngineError, RuntimeError) as error:
                self._driver.abandon_capture(self._queue.handle)
                raise self._not_capturable(f"{describe(action)}: {error}") from error
        return self._driver.end_capture(self._queue.handle)

    def run(self) -> None:
        """Put the graph on the stream."""
        self._driver.launch_graph(self._executable, self._queue.handle)

    def close(self) -> None:
        """Give the graph back."""
        self._driver.destroy_graph(self._executable)


def describe(action: Action) -> str:
    """The step or kernel behind an action, for messages."""
    if isinstance(action, TorchStep):
        return f"{action.step.node or action.step.operator} ({action.step.operator})"
    if isinstance(action, FrozenLaunch | Clear):
        return f"kernel {action.kernel}"
    return f"a copy for {action.node}" if isinstance(action, Copy) else repr(action)
