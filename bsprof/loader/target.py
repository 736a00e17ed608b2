"""What `bsprof loader` is pointed at, made into something that can be iterated, and made again with a change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _InfiniteConstantSampler

from bsprof.errors import BsprofError
from bsprof.loading import Change, LoaderRequest
from bsprof.measure.environment import cores_of_this_process
from bsprof.workloads import registry
from bsprof.workloads.registration import DATA, DataRequest

DEFAULT_BATCH = 32
MOST_DEFAULT_WORKERS = 4
"""A data set that comes without a loader gets a batch of 32 and as many workers as cores, four at the most."""

Loader = Iterable[Any]


class Target(NamedTuple):
    """A loader, and what it is a loader of."""

    loader: Loader
    dataset: Any
    """Null where it does not tell."""
    defaults: Change
    """DataLoader arguments that were chosen here because nobody gave them."""


def resolve(request: LoaderRequest, cache: Path) -> Target:
    """Return the loader that `request` names, with its arguments applied.

    A name of `bsprof workloads` (`imagefolder:PATH`) or what `pkg.module:name` names: a DataLoader, a Dataset, another
    iterable, or what is called to get one of these, with those of the arguments that it accepts. Raises BsprofError
    where there is none, or an argument cannot be applied; what a factory raises passes through.
    """
    torch.manual_seed(request.seed)
    arguments = dict(request.arguments)
    if request.target.partition(":")[0] in DATA:
        root = Path(request.data_root) if request.data_root else None
        wanted = DataRequest(root=root, seed=request.seed, cache=cache)
        registry.prepare_data(request.target, wanted)
        return _with_loader(registry.build_data(request.target, wanted).dataset, arguments)
    made = registry.import_own("loader", request.target, DATA)
    if not isinstance(made, DataLoader | Dataset) and callable(made):
        taken = {name: value for name, value in arguments.items() if name in _accepted(made)}
        factory: Callable[..., Any] = made
        made = factory(**taken)
        if inspect.isgenerator(made):
            made = _Again(lambda: factory(**taken))
        for name in taken:
            del arguments[name]
    if isinstance(made, DataLoader):
        return Target(changed(made, arguments) if arguments else made, made.dataset, {})
    if isinstance(made, Dataset):
        return _with_loader(made, arguments)
    if isinstance(made, Iterable):
        if arguments:
            flag = next(iter(arguments))
            raise BsprofError(
                f"'{request.target}' is a {type(made).__name__} and no DataLoader: it takes no {flag}",
                hint="leave the flag out, or name a factory that takes it as an argument",
            )
        return Target(made, getattr(made, "dataset", None), {})
    raise BsprofError(
        f"'{request.target}' is a {type(made).__name__}: a DataLoader, a Dataset or another iterable is expected",
        hint="name a function that returns one",
    )


class _Again:
    """A generator function as something that can be iterated again."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


_Again.__name__ = "generator"  # reports and errors call a loader by its class: here by that of what it stands for


def _accepted(factory: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have none
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _with_loader(dataset: Any, arguments: Change) -> Target:
    defaults: Change = {"batch_size": DEFAULT_BATCH, "num_workers": min(MOST_DEFAULT_WORKERS, cores_of_this_process())}
    chosen = {name: value for name, value in defaults.items() if name not in arguments}
    whole = {**chosen, **arguments}
    if not isinstance(dataset, IterableDataset):
        whole.setdefault("shuffle", True)
    return Target(_built(DataLoader, dataset, whole), dataset, chosen)


def changed(loader: DataLoader[Any], change: Change) -> DataLoader[Any]:
    """Return a new loader like `loader` with other arguments; `loader` stays as it is.

    Raises BsprofError where its class takes other arguments than DataLoader does, or DataLoader refuses them.
    """
    kind = type(loader)
    if kind.__init__ is not DataLoader.__init__ and kind.__name__ != "StatefulDataLoader":
        raise BsprofError(
            f"a {kind.__name__} cannot be made again with {_spelt(change)}: its arguments are its own",
            hint="name a factory that takes them, as in `def make_loader(num_workers=2)`",
        )
    batches: dict[str, Any] = {}
    if loader.batch_size is not None:
        batches = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        batches = {"batch_sampler": loader.batch_sampler}
    else:
        batches = {"batch_size": None}
    if "batch_sampler" not in batches and not isinstance(loader.sampler, _InfiniteConstantSampler):
        batches["sampler"] = loader.sampler
    whole = {
        **batches,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": loader.in_order,
        **change,
    }
    if "batch_size" in change and isinstance(whole.pop("batch_sampler", None), BatchSampler):
        whole.setdefault("sampler", getattr(loader.batch_sampler, "sampler", None))
    if "shuffle" in change:
        whole.pop("sampler", None)
    return _built(kind, loader.dataset, whole)


def _built(kind: type[DataLoader[Any]], dataset: Any, arguments: dict[str, Any]) -> DataLoader[Any]:
    if not arguments.get("num_workers"):
        # What only workers have means nothing without them; DataLoader would refuse it.
        for name in ("prefetch_factor", "multiprocessing_context", "persistent_workers", "timeout"):
            arguments.pop(name, None)
    try:
        return kind(dataset, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BsprofError(f"DataLoader refuses {_spelt(arguments)}: {error}") from error


def _spelt(arguments: dict[str, Any]) -> str:
    plain = {name: value for name, value in arguments.items() if isinstance(value, int | str | bool)}
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())
