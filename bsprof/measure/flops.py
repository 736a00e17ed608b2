"""Floating-point operations of a training step, counted from the shapes of what it runs."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bsprof.measure.loop import Stage

COUNTED = ("forward", "backward")
"""The model's own work; what the loader and the optimizer compute is none of it."""

_PRODUCTS = {
    *("mm", "bmm", "addmm", "addbmm", "baddbmm", "gemm", "matmul", "linear", "trilinear"),
    *("rnn", "lstm", "gru", "attention", "attn", "convolution", "conv"),
}
"""Words in the name of an operator that multiplies matrices or convolves."""
_NO_PRODUCTS = {"flatten", "thnn", "upsample"}
"""Words that say otherwise: weights laid out, the pointwise part of a cell, interpolation that is called linear."""


def count(stages: Sequence[Stage]) -> int | None:
    """Run one whole training step and return the floating-point operations of its forward and backward.

    Counted are matrix products, convolutions and attention, by the formulas of `torch.utils.flop_counter` from the
    shapes of what really runs, a multiply-add as two: what activation checkpointing computes again counts again, and
    attention counts whole where it is causal.
    Everything else (elementwise operators, reductions, normalisation, FFT) counts nothing, so 0 says that there are no
    such products. A compiled model runs uncompiled for this step, so that its operators are seen.

    Returns None where no stage is called `forward` or `backward`, and where an operator that by its name multiplies
    matrices has no formula (cuDNN's recurrent layers, quantised products, hand-written kernels): the sum would be too
    small by an unknown amount. A kernel that is called past torch's dispatcher cannot be seen at all.

    The weights move by one step, as they do in any. What a stage raises comes through.
    """
    total: int | None = None
    complete = True
    with _uncompiled(), warnings.catch_warnings():
        # The counter hooks all modules while it counts; with compilation off for the step this doubles nothing.
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        warnings.filterwarnings("ignore", "FlopCounterMode does not have a registered FLOP formula")
        for phase, run in stages:
            if phase not in COUNTED:
                run()
                continue
            counter = FlopCounterMode(display=False, custom_mapping=_CORRECTED, **_OPTIONS)
            with _Uncounted(counter.flop_registry) as uncounted, counter:
                run()
            total = (total or 0) + counter.get_total_flops()
            complete = complete and not uncounted.names
    return total if complete else None


_OPTIONS: dict[str, Any] = (
    {"skip_unsupported": True} if "skip_unsupported" in inspect.signature(FlopCounterMode).parameters else {}
)
"""Without it, newer versions of the counter refuse operators without a formula, or do not run them."""


def _convolution_backward(
    grad_output: Sequence[int],
    inputs: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: object,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """Return the operations of a convolution's gradients, from shapes in the order of `aten::convolution_backward`.

    The gradients of the input and of the weight multiply the same pairs as the convolution itself does: at each place
    of the output (of the input, where it is transposed) each weight once. `weight` is of one group's channels already.
    """
    places = math.prod((inputs if transposed else grad_output)[2:])
    once = 2 * inputs[0] * places * math.prod(weight)
    return once * sum(wanted[:2])  # the third is the bias: sums, no products


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}
"""torch's own formula (seen in 2.15) counts the weight's gradient `groups` times, MobileNetV2's step sevenfold."""


class _Uncounted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered before the counter, it sees each operator that the counter lets through, and keeps what it cannot count.

    `formulas` are the counter's, by operator. `names` are those of operators that multiply and have none.
    """

    supports_higher_order_operators = True

    def __init__(self, formulas: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = formulas
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = getattr(func, "overloadpacket", func)
        if packet not in self._formulas and (packet is func or _multiplies(packet.__name__)):
            self.names.add(str(packet))  # an operator without overloads holds others, or a hand-written kernel
        return func(*args, **(kwargs or {}))


def _multiplies(name: str) -> bool:
    words = {word.rstrip("0123456789d") or word for word in name.split("_")}
    return bool(words & _PRODUCTS) and not words & _NO_PRODUCTS


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled code as it was written. Where nothing is compiled the compiler is not even loaded."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
