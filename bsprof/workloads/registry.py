"""Models and data sets by name, or by `pkg.module:factory` where they are the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bsprof.errors import BsprofError
from bsprof.workloads.registration import DATA, MODELS, Data, DataRequest, DataSource, ImageShape

__all__ = [
    "Data",
    "DataRequest",
    "Entry",
    "ImageShape",
    "build_data",
    "build_model",
    "catalogue",
    "check_names",
    "described",
    "import_own",
    "prepare_data",
]

# Every file of the room makes its workloads known as it is imported.
for _file in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _file.name != "registry":
        importlib.import_module(f"{__package__}.{_file.name}")

Kind = Literal["model", "data"]


@dataclass(frozen=True)
class Entry:
    """One line of `bsprof workloads`."""

    kind: Kind
    name: str
    summary: str


def catalogue() -> list[Entry]:
    """Return every registered model and data set, models first, by name."""
    return [
        *(Entry("model", name, MODELS[name].summary) for name in sorted(MODELS)),
        *(Entry("data", name, DATA[name].summary) for name in sorted(DATA)),
    ]


def check_names(model: str, data: str) -> None:
    """Raise BsprofError unless both can be found and are well-formed; reads and generates nothing.

    A `pkg.module:factory` is imported, but not called.
    """
    if model not in MODELS:
        _import_factory("model", model, MODELS)
    source, options = _find_data(data)
    if source is None:
        _import_factory("data", data, DATA)
    else:
        source.check(options)


def build_model(name: str, *, classes: int, shape: ImageShape, seed: int) -> nn.Module:
    """Return the model with `classes` outputs for images of `shape`; the same seed gives the same weights.

    A factory is called with `num_classes` if it accepts it; what it raises passes through. Raises BsprofError where
    the name is unknown, the images do not fit, or a factory returns something else than a module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name in MODELS:
            return MODELS[name].build(classes, shape)
        factory = _import_factory("model", name, MODELS)
        built = factory(**_accepted(factory, {"num_classes": classes}, through_kwargs=True))
    if not isinstance(built, nn.Module):
        raise BsprofError(f"model '{name}' returned {described(built)}", hint="a factory returns a torch.nn.Module")
    return built


def prepare_data(spec: str, request: DataRequest) -> None:
    """Generate, download or validate the data set, so that cases need only open it.

    Raises BsprofError where it is not there or cannot be made. Of a factory only the import is tried.
    """
    source, options = _find_data(spec)
    if source is None:
        _import_factory("data", spec, DATA)
    else:
        source.prepare(options, request)


def build_data(spec: str, request: DataRequest) -> Data:
    """Return the data set, opened and ready to be loaded from.

    A factory is called with those of `image_size`, `root` and `train` that it accepts and returns a Dataset, or a
    Dataset and its number of classes; what it raises passes through. Raises BsprofError where the spec is unknown
    or malformed, the data is absent, or a factory returns something that cannot be trained on.
    """
    source, options = _find_data(spec)
    if source is not None:
        return source.build(options, request)
    factory = _import_factory("data", spec, DATA)
    # A root that nobody chose leaves the factory its own, if it has one.
    root = request.datasets if request.root or "root" in _required(factory) else None
    known = {"image_size": request.image_size, "root": root, "train": True}
    return _own_data(spec, factory(**_accepted(factory, known, through_kwargs=False)))


# --- by name ----------------------------------------------------------------------------------------


def _find_data(spec: str) -> tuple[DataSource | None, str]:
    name, _, options = spec.partition(":")
    return DATA.get(name), options


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    near = difflib.get_close_matches(name.partition(":")[0], known)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise BsprofError(
        f"unknown {kind} '{name}'", hint=f"{guess}`bsprof workloads` lists them; your own is pkg.module:factory"
    )


# --- the user's own ---------------------------------------------------------------------------------


def import_own(kind: str, spec: str, known: Iterable[str]) -> Any:
    """Return what `pkg.module:name` names, or raise BsprofError saying which part of it failed.

    `known` are the names that would have done instead; `kind` says what was looked for.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (colon and attribute and all(part.isidentifier() for part in module_name.split("."))):
        _unknown(kind, spec, known)
    # As `python -m` would: a console script does not look into the working directory by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            near = difflib.get_close_matches(module_name, known)
            raise BsprofError(
                f"{kind} '{spec}': no module named {error.name!r}",
                hint=f"did you mean {near[0]}?" if near else "it is looked for in the working directory and PYTHONPATH",
            ) from error
        raise BsprofError(
            f"{kind} '{spec}': importing {module_name} raised {type(error).__name__}: {error}",
            hint=f'`python -c "import {module_name}"` shows where',
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = difflib.get_close_matches(part, dir(found))
            raise BsprofError(
                f"{kind} '{spec}': {module_name} has no {attribute!r}",
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            ) from None
    return found


def _import_factory(kind: Kind, spec: str, known: Iterable[str]) -> Callable[..., Any]:
    found = import_own(kind, spec, known)
    if not callable(found) or isinstance(found, nn.Module):
        raise BsprofError(
            f"{kind} '{spec}' is {described(found)}, not a factory", hint="name a function or class that returns it"
        )
    factory: Callable[..., Any] = found
    return factory


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except ValueError:  # some built-in callables have none
        return []


def _required(factory: Callable[..., Any]) -> set[str]:
    return {parameter.name for parameter in _parameters(factory) if parameter.default is inspect.Parameter.empty}


def _accepted(factory: Callable[..., Any], known: dict[str, Any], *, through_kwargs: bool) -> dict[str, Any]:
    """Return those of `known` that the factory takes by keyword; one without a value leaves it its own default."""
    required = _required(factory)
    parameters = _parameters(factory)
    by_keyword = {
        parameter.name
        for parameter in parameters
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    if through_kwargs and any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        by_keyword |= known.keys()
    return {
        name: value for name, value in known.items() if name in by_keyword and (value is not None or name in required)
    }


def _own_data(spec: str, made: Any) -> Data:
    """Check what a factory made by its first sample, and find out its shape and number of classes."""
    dataset, classes = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(dataset, Dataset):
        hint = "bsprof makes the DataLoader itself" if isinstance(dataset, DataLoader) else None
        raise BsprofError(
            f"data '{spec}' returned {described(dataset)}, a torch.utils.data.Dataset is expected",
            hint=hint or "return a Dataset, or a Dataset and its number of classes",
        )
    if classes is None:
        classes = _count_classes(spec, dataset)
    if not isinstance(classes, int) or classes < 1:
        raise BsprofError(f"data '{spec}': {classes!r} is no number of classes", hint="return (dataset, classes)")

    sample = _first_sample(spec, dataset)
    image, label = sample if isinstance(sample, (tuple, list)) and len(sample) == 2 else (None, None)
    if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and _is_index(label)):
        raise BsprofError(
            f"data '{spec}': a sample is {described(sample)}",
            hint="expected is (float tensor of channels x height x width, int); ToTensor() makes one of an image",
        )
    return Data(dataset=dataset, classes=classes, shape=ImageShape(*image.shape))


def _count_classes(spec: str, dataset: Dataset[Any]) -> int:
    if hasattr(dataset, "classes"):
        return len(dataset.classes)
    if hasattr(dataset, "targets") and len(dataset.targets):
        return int(max(dataset.targets)) + 1
    raise BsprofError(
        f"data '{spec}' does not say how many classes it has",
        hint="return (dataset, classes), or give the dataset `classes` or `targets`",
    )


def _first_sample(spec: str, dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset):
        for sample in dataset:
            return sample
    elif not hasattr(dataset, "__len__"):
        raise BsprofError(f"data '{spec}' has no length", hint="define __len__, or derive it from IterableDataset")
    elif len(dataset):
        return dataset[0]
    raise BsprofError(f"data '{spec}' is empty")


def _is_index(label: Any) -> bool:
    """Whether a label is an integer: Python's, NumPy's or a tensor's."""
    if isinstance(label, Tensor):
        return label.ndim == 0 and not label.is_floating_point()
    return hasattr(label, "__index__")


def described(value: Any) -> str:
    """Describe a value by its type, a tensor also by its dtype and shape, a sequence by what is in it."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of ({', '.join(map(described, value[:4]))}{', …' if len(value) > 4 else ''})"
    return "nothing" if value is None else f"a {type(value).__name__}"
