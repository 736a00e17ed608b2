"""The machine and its software, and whether bsprof measures right on it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.text import Text

from bsprof.model import Accelerator, Check, Environment
from bsprof.report import figures
from bsprof.report.grid import column, print_grid, print_words


def machine_lines(environment: Environment) -> list[str]:
    """Describe the machine and its software, a short line each."""
    cores = f"{environment.cores_usable} of {figures.plural(environment.cores_logical, 'core')} usable"
    memory = f"{figures.size(environment.memory_bytes)} memory"
    if environment.memory_limit_bytes is not None:
        memory += f" (limit {figures.size(environment.memory_limit_bytes)})"
    quota = f"quota {environment.cpu_quota:g} cores" if environment.cpu_quota is not None else None
    software = [
        f"torch {environment.torch}",
        f"torchvision {environment.torchvision}" if environment.torchvision else None,
        f"CUDA {environment.cuda}" if environment.cuda else None,
        f"cuDNN {environment.cudnn}" if environment.cudnn else None,
        f"driver {environment.driver}" if environment.driver else None,
        f"Python {environment.python}",
        f"commit {_short_commit(environment.git_commit)}" if environment.git_commit else None,
        f"bsprof {environment.bsprof}",
    ]
    accelerators = [_accelerator(accelerator) for accelerator in environment.accelerators] or ["no accelerator"]
    hardware = [environment.cpu, cores, quota, memory, environment.hypervisor, *accelerators]
    return [" · ".join(part for part in line if part) for line in (hardware, software)]


def _short_commit(commit: str) -> str:
    return commit[:10] + ("+" if commit.endswith("+") else "") if len(commit) > 11 else commit


def _accelerator(accelerator: Accelerator) -> str:
    parts = [f"{accelerator.kind}:{accelerator.index}", accelerator.name]
    if accelerator.memory_bytes is not None:
        parts.append(figures.size(accelerator.memory_bytes))
    if accelerator.capability:
        parts.append(f"capability {accelerator.capability}")
    return " ".join(parts)


def render_environment(environment: Environment, console: Console) -> None:
    """Print every field of an environment, one a line; a dash for what was not captured."""
    labels, values = [], []
    for field in msgspec.structs.fields(Environment):
        value = getattr(environment, field.name)
        label = field.name.removesuffix("_bytes").replace("_", " ")
        if field.name == "accelerators":
            lines = [_accelerator(one) + (f" {one.uuid}" if one.uuid else "") for one in value] or ["none"]
        elif field.name == "variables":
            lines = [f"{name}={text}" for name, text in sorted(value.items())] or ["none set"]
        elif field.name.endswith("_bytes") and value is not None:
            lines = [figures.size(value)]
        else:
            lines = [figures.setting(value)]
        labels += [label, *[""] * (len(lines) - 1)]
        values += lines
    width = max(map(len, labels)) + 2
    for label, text in zip(labels, values, strict=True):
        console.print(Text.assemble((f"{label:<{width}}", "bold"), text), highlight=False, soft_wrap=True)


def render_selftest(checks: Sequence[Check], console: Console) -> None:
    """Print what was planted in each phase, what came back there, and what leaked elsewhere."""
    milliseconds = 1e6
    two_clocks = len({check.clock for check in checks}) > 1
    columns = [
        column("planted in", (check.phase for check in checks), right=False),
        *([column("clock", (check.clock for check in checks), right=False)] if two_clocks else []),
        column("planted ms", (f"{check.planted_ns / milliseconds:.3f}" for check in checks)),
        column("found ms", (f"{check.found_ns / milliseconds:.3f}" for check in checks)),
        column(
            "largest leak ms",
            (f"{check.leaked_ns / milliseconds:+.3f} into {check.leaked_into}" for check in checks),
        ),
        column("residual ms", (f"{check.residual_ns / milliseconds:+.4f}" for check in checks)),
        column("", (Text("ok", "green") if check.passed else Text("WRONG", "bold red") for check in checks)),
    ]
    print_grid(console, columns, {}, 1)
    console.print()
    tolerance = max(check.tolerance_ns for check in checks) / milliseconds
    wrong = [check.phase + (f" ({check.clock})" if two_clocks else "") for check in checks if not check.passed]
    verdict = (
        f"wrong in {', '.join(wrong)} (was the machine busy? try again when it is quiet)"
        if wrong
        else "every delay came back where it was planted"
    )
    print_words(console, f"{verdict}, to within {tolerance:.3f} ms (the larger of 1 % and 0.1 ms)")
