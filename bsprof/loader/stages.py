"""The stages of making a sample, timed where libraries offer a place to stand.

Each row of `_HOOKS` names a function of a library and the stage that it is. Nothing is imported for it: what a process
has not loaded it does not use. Times are exclusive: a stage's own, without the stages inside it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from threading import get_ident
from typing import Any, NamedTuple

from bsprof.loader.patches import Patches

NS, CALLS, CLOSELY_NS, CLOSELY_CPU_NS, CLOSELY_CALLS = range(5)
Cell = list[int]
"""What a stage took since the batch began: the five figures above."""

_now = time.perf_counter_ns
_cpu = time.thread_time_ns


class StageClock:
    """What each stage took in the thread that makes a batch. There is one in a process."""

    def __init__(self) -> None:
        self.owner = 0
        """The thread that makes samples now; a data set's own threads work beside it and are not timed."""
        self.closely = False
        """Whether CPU time is read as well: twice the cost, so not for each sample of a fast data set."""
        self.inner_ns = 0
        """Time that went to stages inside the one that is open."""
        self.inner_cpu_ns = 0
        self.cells: dict[str, Cell] = {}

    def cell(self, stage: str) -> Cell:
        """Return the figures of `stage`, always the same list."""
        return self.cells.setdefault(stage, [0] * 5)

    def begin(self) -> None:
        """Time the stages of this thread from now on."""
        self.inner_ns = self.inner_cpu_ns = 0
        self.owner = get_ident()

    def end(self) -> None:
        """Time them no more."""
        self.owner = 0
        self.closely = False


CLOCK = StageClock()


class _Hook(NamedTuple):
    """A function of a library that is timed."""

    module: str
    names: tuple[str, ...]
    """`function` or `Class.method`."""
    stage: str


_HOOKS = (
    _Hook("PIL.Image", ("open",), "read"),  # opens the file and reads its header
    _Hook("PIL.ImageFile", ("ImageFile.load",), "decode"),
    _Hook("PIL.JpegImagePlugin", ("JpegImageFile.load_read",), "read"),  # called back while it decodes
    _Hook("PIL.PngImagePlugin", ("PngImageFile.load_read",), "read"),
    _Hook("torchvision.io.image", ("read_file",), "read"),
    _Hook("torchvision.io", ("read_file",), "read"),
    *(
        _Hook(module, tuple(f"decode_{kind}" for kind in ("image", "jpeg", "png", "gif", "webp")), "decode")
        for module in ("torchvision.io.image", "torchvision.io")
    ),
    _Hook("numpy", ("load",), "load"),
    _Hook("torch", ("load",), "load"),
    _Hook("cv2", ("imread", "imdecode"), "decode"),
)

_COMPOSES = (("torchvision.transforms.transforms", "__call__"), ("torchvision.transforms.v2._container", "forward"))
"""Where the two generations of `Compose` live, and the method that goes through its transforms."""


class Hooks:
    """The hooks of this process. There is one of them, as two would stand in each other."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._hooked: set[tuple[str, str]] = set()
        self._timed: dict[int, tuple[object, Callable[..., Any]]] = {}
        self._modules = 0

    def refresh(self) -> None:
        """Put hooks into the libraries that were loaded since; next to nothing when there are none."""
        if len(sys.modules) == self._modules:
            return
        self._modules = len(sys.modules)
        for hook in _HOOKS:
            for name in hook.names:
                self._put(hook.module, name, functools.partial(self._timing, stage=hook.stage))
        for module, method in _COMPOSES:
            self._put(module, f"Compose.{method}", _splitting)

    def undo(self) -> None:
        """Take all hooks out."""
        self._patches.undo()
        self._hooked.clear()
        self._timed.clear()
        self._modules = 0

    def _put(self, module: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        holder: Any = sys.modules.get(module)
        owner, _, attribute = name.rpartition(".")
        holder = getattr(holder, owner, None) if owner else holder
        original = vars(holder).get(attribute) if holder is not None else None
        if original is None or (module, name) in self._hooked:
            return
        self._hooked.add((module, name))
        self._patches.put(holder, attribute, wrap(original))

    def _timing(self, function: Callable[..., Any], *, stage: str) -> Callable[..., Any]:
        # A library may offer one function in two places; it is one stage, not one in the other.
        if any(function is wrapper for _, wrapper in self._timed.values()):
            return function
        if id(function) not in self._timed:
            wrapper = timed(function, CLOCK.cell(stage))
            self._timed[id(function)] = (function, _unless_loaded(function, wrapper) if stage == "decode" else wrapper)
        return self._timed[id(function)][1]


HOOKS = Hooks()


def timed(function: Callable[..., Any], cell: Cell) -> Callable[..., Any]:
    """Return `function` with its time added to `cell` wherever the owner of the clock calls it."""
    clock = CLOCK

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if get_ident() != clock.owner:
            return function(*arguments, **named)
        if clock.closely:
            return closely(arguments, named)
        outer_ns, clock.inner_ns = clock.inner_ns, 0
        begun = _now()
        try:
            return function(*arguments, **named)
        finally:
            ns = _now() - begun
            cell[NS] += ns - clock.inner_ns
            cell[CALLS] += 1
            clock.inner_ns = outer_ns + ns

    def closely(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        outer_ns, clock.inner_ns = clock.inner_ns, 0
        outer_cpu_ns, clock.inner_cpu_ns = clock.inner_cpu_ns, 0
        begun, cpu = _now(), _cpu()  # what the looks take falls on the stage that is looked at, not on those around it
        try:
            return function(*arguments, **named)
        finally:
            cpu_ns = _cpu() - cpu
            ns = _now() - begun
            cell[NS] += ns - clock.inner_ns
            cell[CALLS] += 1
            cell[CLOSELY_NS] += ns - clock.inner_ns
            cell[CLOSELY_CPU_NS] += cpu_ns - clock.inner_cpu_ns
            cell[CLOSELY_CALLS] += 1
            clock.inner_ns, clock.inner_cpu_ns = outer_ns + ns, outer_cpu_ns + cpu_ns

    return call


def _unless_loaded(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """PIL asks for an image's pixels before each operation; only the first time are they decoded."""
    if function.__name__ != "load":
        return wrapper

    @functools.wraps(function)
    def load(image: Any, *arguments: Any, **named: Any) -> Any:
        return (wrapper if image.tile else function)(image, *arguments, **named)

    return load


# --- Compose ----------------------------------------------------------------------------------------

_PLANS = 256
"""Lists of transforms whose stages are remembered."""


def _splitting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return Compose's method with each transform as a stage.

    The method is given a stand-in for its Compose whose transforms are a generator: what passes between two of its
    `next` is one transform. So torchvision's own code applies them, whatever it does between them.
    """
    plans: dict[int, _Plan] = {}

    @functools.wraps(method)
    def call(compose: Any, *inputs: Any, **named: Any) -> Any:
        if get_ident() != CLOCK.owner:
            return method(compose, *inputs, **named)
        transforms = compose.transforms
        if not isinstance(transforms, list | tuple):
            return method(compose, *inputs, **named)
        plan = plans.get(id(transforms))
        if plan is None or plan.transforms is not transforms or plan.known != tuple(transforms):
            if len(plans) >= _PLANS:  # somebody makes a Compose for each sample
                plans.clear()
            plan = plans[id(transforms)] = _Plan(transforms)
        outer_ns, outer_cpu_ns = CLOCK.inner_ns, CLOCK.inner_cpu_ns
        stand_in = _StandIn(compose, plan)
        try:
            return method(stand_in, *inputs, **named)
        finally:
            stand_in.close()  # after an exception a transform is still open
            CLOCK.inner_ns = outer_ns + stand_in.ns
            CLOCK.inner_cpu_ns = outer_cpu_ns + stand_in.cpu_ns

    return call


class _Plan:
    """A list of transforms and the cell of each. The list is held, so that no other takes its identity."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = transforms
        self.known = tuple(transforms)
        self.cells = [CLOCK.cell(name) for name in stage_names(transforms)]


class _StandIn:
    """Stands for a Compose in its own method."""

    def __init__(self, compose: Any, plan: _Plan) -> None:
        self._compose = compose
        self._plan = plan
        self._steps: list[Generator[Any, None, None]] = []
        self.ns = 0
        self.cpu_ns = 0

    @property
    def transforms(self) -> Iterator[Any]:
        self._steps.append(self._one_by_one(self._plan))
        return self._steps[-1]

    def close(self) -> None:
        for steps in self._steps:
            steps.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compose, name)

    def _one_by_one(self, plan: _Plan) -> Generator[Any, None, None]:
        clock = CLOCK
        closely = clock.closely
        begun = _now()
        cpu = _cpu() if closely else 0
        # A transform's time ends where the next one's begins: adding it up, all that lies between, falls on the stages
        # and not on the data set's own code.
        for transform, cell in zip(plan.known, plan.cells, strict=True):
            clock.inner_ns = clock.inner_cpu_ns = 0
            try:
                yield transform
            finally:
                ended_cpu = _cpu() if closely else 0
                ended = _now()
                ns, cpu_ns = ended - begun, ended_cpu - cpu
                begun, cpu = ended, ended_cpu
                cell[NS] += ns - clock.inner_ns
                cell[CALLS] += 1
                self.ns += ns
                if closely:
                    cell[CLOSELY_NS] += ns - clock.inner_ns
                    cell[CLOSELY_CPU_NS] += cpu_ns - clock.inner_cpu_ns
                    cell[CLOSELY_CALLS] += 1
                    self.cpu_ns += cpu_ns


def stage_names(transforms: Iterable[Any]) -> Iterator[str]:
    """Yield what each transform is called: its class or function, with `#2` for the second of its name, and so on."""
    seen: dict[str, int] = {}
    for transform in transforms:
        name = getattr(transform, "__name__", None) or type(transform).__name__
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"
