"""What an NVIDIA GPU tells of itself through NVML: which one it is, its limits, its clocks, power and memory.

Each field is a question of its own, so that what one device does not tell costs no other field. Neither torch nor CUDA
is needed: the process that samples has neither. The library (nvidia-ml-py) is loaded when a source is opened.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Number = int | float
Ask = Callable[[Any, Any], Number]
"""`(pynvml, handle) -> value`, in the unit of the column's name."""


class Gpu(NamedTuple):
    """Which CUDA device is meant: its place among the visible ones, and its UUID where CUDA has told it."""

    ordinal: int
    uuid: str | None = None


class GpuProcess(NamedTuple):
    """A process that computes on the device; `memory_bytes` is `None` where the driver does not tell."""

    pid: int
    memory_bytes: int | None


class DeviceLostError(Exception):
    """The device fell off the bus, or needs a reset: nothing more can be asked of it."""


class Source(Protocol):
    """Where the readings of one device come from."""

    name: str
    """`nvml` or `none`."""
    uuid: str | None
    mig: bool | None
    """Whether the device is a slice of a GPU, or `None` where nothing tells."""
    limits: dict[str, Number]
    unsupported: list[str]
    problem: str | None
    """Why there is no device to read, where there should be one."""

    def read(self, *, slow: bool = True) -> dict[str, Number]:
        """Return what the device tells now, by column; without `slow` only what changes within a second.

        Raises DeviceLostError.
        """

    def processes(self) -> list[GpuProcess] | None:
        """Return the processes that compute on the device, or `None` where it does not tell."""

    def close(self) -> None:
        """Let go of the library."""


class NullSource:
    """No device, or nothing that would tell of it."""

    name = "none"

    def __init__(self, problem: str | None = None) -> None:
        self.uuid: str | None = None
        self.mig: bool | None = None
        self.limits: dict[str, Number] = {}
        self.unsupported: list[str] = []
        self.problem = problem

    def read(self, *, slow: bool = True) -> dict[str, Number]:
        """Return nothing."""
        return {}

    def processes(self) -> list[GpuProcess] | None:
        """Return `None`: nothing tells."""
        return None

    def close(self) -> None:
        """Nothing to let go of."""


def open_source(gpu: Gpu | None, environ: Mapping[str, str]) -> Source:
    """Return the source for `gpu` as CUDA numbers devices under `environ`; a NullSource where there is none.

    Never fails: a missing library, driver or device, or one that cannot be told from its neighbours, is the `problem`
    of a NullSource.
    """
    if gpu is None:
        return NullSource()
    try:
        import pynvml
    except ImportError:
        return NullSource("nvidia-ml-py is not installed")
    except Exception as error:  # another module of that name
        return NullSource(f"nvidia-ml-py cannot be loaded: {type(error).__name__}: {error}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NullSource(f"NVML: {error}")
    try:
        return NvmlSource(pynvml, *_find(pynvml, gpu, environ))
    except _NotFoundError as error:
        problem = str(error)
    except (pynvml.NVMLError, DeviceLostError) as error:
        problem = f"NVML: {error}"
    _shut_down(pynvml)
    return NullSource(problem)


def driver_version() -> str | None:
    """Return the driver's version, or `None` where NVML is not there to tell it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or its own errors, which have no name without it
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        _shut_down(pynvml)


def _shut_down(pynvml: Any) -> None:
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


# --- the questions ----------------------------------------------------------------------------------


class _Field(NamedTuple):
    """A column and the ways to ask for it, best first: drivers and the library rename their functions now and then."""

    column: str
    ways: tuple[Ask, ...]
    slow: bool = False
    """Asked once a second only: it changes slowly, and each question costs the sampler core time."""
    of_slice: bool = False
    """A MIG device tells it; all else only the GPU that it is a slice of."""


def _power_now(pynvml: Any, handle: Any) -> float:
    """Return the draw of this moment in W, as from Ampere on a field of its own tells it."""
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
    if field.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(field.nvmlReturn)
    if field.valueType != pynvml.NVML_VALUE_TYPE_UNSIGNED_INT:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return float(field.value.uiVal) / 1e3


# Energy comes first, next to the sample's time stamp; the PCIe throughput counters, that block for 20 ms, not at all.
# `power_w` is what nvidia-smi shows: on A100 and H100 the mean of a part of the time only (arXiv 2312.02741).
_FIELDS = (
    _Field("energy_mj", (lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h),)),
    _Field("power_instant_w", (_power_now,)),
    _Field("power_w", (lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1e3,)),
    _Field("sm_mhz", (lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),)),
    _Field(
        "throttle_reasons",
        (
            lambda n, h: n.nvmlDeviceGetCurrentClocksEventReasons(h),
            lambda n, h: n.nvmlDeviceGetCurrentClocksThrottleReasons(h),
        ),
    ),
    _Field("gpu_percent", (lambda n, h: n.nvmlDeviceGetUtilizationRates(h).gpu,)),
    _Field("memory_percent", (lambda n, h: n.nvmlDeviceGetUtilizationRates(h).memory,), slow=True),
    _Field("memory_used_bytes", (lambda n, h: n.nvmlDeviceGetMemoryInfo(h).used,), slow=True, of_slice=True),
    _Field("memory_mhz", (lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM),), slow=True),
    _Field(
        "temperature_c",
        (
            lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            lambda n, h: n.nvmlDeviceGetTemperatureV(h, n.NVML_TEMPERATURE_GPU),
        ),
        slow=True,
    ),
    _Field("pcie_generation", (lambda n, h: n.nvmlDeviceGetCurrPcieLinkGeneration(h),), slow=True),
    _Field("pcie_width", (lambda n, h: n.nvmlDeviceGetCurrPcieLinkWidth(h),), slow=True),
    _Field("performance_state", (lambda n, h: n.nvmlDeviceGetPerformanceState(h),), slow=True),
)
_UNKNOWN_STATE = 32  # NVML_PSTATE_UNKNOWN

# The largest link is what card and slot agree on, not what the card could do elsewhere.
_LIMITS = (
    _Field("sm_mhz_max", (lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM),)),
    _Field("memory_mhz_max", (lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM),)),
    _Field(
        "power_limit_w",
        (
            lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1e3,
            lambda n, h: n.nvmlDeviceGetPowerManagementLimit(h) / 1e3,
        ),
    ),
    _Field(
        "slowdown_c",
        (lambda n, h: n.nvmlDeviceGetTemperatureThreshold(h, n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),),
    ),
    _Field("pcie_generation_max", (lambda n, h: n.nvmlDeviceGetMaxPcieLinkGeneration(h),)),
    _Field("pcie_width_max", (lambda n, h: n.nvmlDeviceGetMaxPcieLinkWidth(h),)),
    _Field("memory_total_bytes", (lambda n, h: n.nvmlDeviceGetMemoryInfo(h).total,), of_slice=True),
)


class NvmlSource:
    """A GPU, or a slice of one, seen through NVML. What it does not tell when it is opened is not asked again.

    `device` is the GPU's handle; `part` the MIG device's, or `None`; `mig` whether what computes is a slice, also one
    that could not be told from its neighbours. Power, clocks and energy of a slice are the whole GPU's.
    """

    name = "nvml"

    def __init__(self, pynvml: Any, device: Any, part: Any | None, mig: bool) -> None:
        self._nvml, self._device, self._part = pynvml, device, part
        self.problem: str | None = None
        self.mig: bool | None = mig
        self.uuid: str | None = _uuid(pynvml, part if part is not None else device)
        self.unsupported: list[str] = []
        self.limits = {field.column: value for field, _, value in self._supported(_LIMITS)}
        self._ways = [(field, way) for field, way, _ in self._supported(_FIELDS)]

    def read(self, *, slow: bool = True) -> dict[str, Number]:
        """Return what the device tells now. A question that fails for once has no entry."""
        told: dict[str, Number] = {}
        asked = refused = 0
        for field, way in self._ways:
            if field.slow and not slow:
                continue
            asked += 1
            try:
                told[field.column] = self._ask(field, way)
            except self._nvml.NVMLError as error:
                refused += error.value == self._nvml.NVML_ERROR_UNKNOWN
        if asked and refused == asked:  # one 'unknown error' may be one field's; of all fields it is the device's
            raise DeviceLostError("every question was answered by an unknown error")
        return told

    def questions(self) -> Iterator[tuple[str, Callable[[], Number]]]:
        """Yield each column that the device tells, and how to ask for it alone: to see what a question costs."""
        for field, way in self._ways:
            yield field.column, functools.partial(self._ask, field, way)

    def processes(self) -> list[GpuProcess] | None:
        """Return the processes that compute on the device; of a slice, in the slice."""
        handle = self._handle(of_slice=True)
        if handle is None:
            return None
        for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetComputeRunningProcesses_v2"):
            try:
                found = getattr(self._nvml, name)(handle)
            except Exception:  # an older driver is told by an error that is no NVMLError
                continue
            return [GpuProcess(int(process.pid), process.usedGpuMemory) for process in found]
        return None

    def close(self) -> None:
        """Shut the library down."""
        _shut_down(self._nvml)

    def _handle(self, *, of_slice: bool) -> Any | None:
        return self._part if self.mig and of_slice else self._device

    def _ask(self, field: _Field, way: Ask) -> Number:
        """Return the answer to one question. Raises DeviceLostError, or NVMLError where it is only not told."""
        nvml = self._nvml
        handle = self._handle(of_slice=field.of_slice)
        if handle is None:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        try:
            value = way(nvml, handle)
        except (AttributeError, TypeError) as error:  # an older nvidia-ml-py
            raise nvml.NVMLError(nvml.NVML_ERROR_FUNCTION_NOT_FOUND) from error
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                raise DeviceLostError(str(error)) from error
            raise
        if field.column == "performance_state" and value == _UNKNOWN_STATE:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _supported(self, fields: tuple[_Field, ...]) -> list[tuple[_Field, Ask, Number]]:
        """Return each field that the device tells, the way that works and its first answer; note the others."""
        told = []
        for field in fields:
            for way in field.ways:
                try:
                    told.append((field, way, self._ask(field, way)))
                    break
                except self._nvml.NVMLError:
                    continue
            else:
                self.unsupported.append(field.column)
        return told


# --- which device -----------------------------------------------------------------------------------


class _NotFoundError(Exception):
    """There is no such device, or it cannot be told from others."""


class _Device(NamedTuple):
    handle: Any
    uuid: str
    name: str
    parts: tuple[tuple[Any, str], ...]
    """Handle and UUID of each MIG device."""
    sliced: bool


def visible(environ: Mapping[str, str]) -> list[int | str] | None:
    """Return what `CUDA_VISIBLE_DEVICES` names, in its order: indices, UUIDs or their beginnings; `None` for 'all'.

    As CUDA reads it: the first entry that names nothing ends the list, and a device named twice empties it.
    """
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    found: list[int | str] = []
    for entry in (part.strip() for part in text.split(",")):
        number = re.match(r"\+?\d+", entry)
        if number is None and not entry.startswith(("GPU-", "MIG-")):
            break
        name = int(number[0]) if number else entry
        if name in found:
            return []
        found.append(name)
    return found


def _find(pynvml: Any, gpu: Gpu, environ: Mapping[str, str]) -> tuple[Any, Any | None, bool]:
    """Return the GPU's handle, its MIG device's or `None`, and whether it is a slice that computes.

    The UUID is the only join that always holds: CUDA puts the fastest GPU first and leaves the order of the rest
    open unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`, whereas NVML counts along the bus. Without a UUID an index is
    trusted only under that order, or where all GPUs are of one kind. Raises _NotFoundError.
    """
    devices = list(_devices(pynvml))
    named = visible(environ)
    entry = named[gpu.ordinal] if named is not None and gpu.ordinal < len(named) else None
    if gpu.uuid is not None:
        bare = re.sub(r"^(GPU|MIG)-", "", gpu.uuid)
        for device in devices:
            if device.uuid == f"GPU-{bare}":
                # CUDA may tell the whole GPU's UUID for a slice of it; the variable says which slice is meant.
                return _with_part(device, entry if isinstance(entry, str) else None)
            for handle, uuid in device.parts:
                if uuid == f"MIG-{bare}":
                    return device.handle, handle, True
        raise _NotFoundError(f"NVML knows no device of UUID {gpu.uuid}")
    if named is not None and entry is None:
        raise _NotFoundError(f"CUDA_VISIBLE_DEVICES names no device {gpu.ordinal}")
    if isinstance(entry, str):
        return _by_name(pynvml, devices, entry)
    index = gpu.ordinal if entry is None else entry
    if index >= len(devices):
        raise _NotFoundError(f"NVML knows {len(devices)} devices, and none of index {index}")
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len({device.name for device in devices}) > 1:
        raise _NotFoundError(
            f"which GPU cuda:{gpu.ordinal} is cannot be told before CUDA has started: there are several kinds, and "
            "CUDA numbers them by speed (set CUDA_DEVICE_ORDER=PCI_BUS_ID)"
        )
    return _with_part(devices[index], None)


def _by_name(pynvml: Any, devices: list[_Device], name: str) -> tuple[Any, Any | None, bool]:
    """Find what a UUID, or the beginning of one that fits one device only, names."""
    whole = [device for device in devices if device.uuid.startswith(name)]
    parts = [(device, part) for device in devices for part, uuid in device.parts if uuid.startswith(name)]
    if len(whole) + len(parts) > 1:
        raise _NotFoundError(f"CUDA_VISIBLE_DEVICES: {name} fits several devices")
    if whole:
        return _with_part(whole[0], None)
    if parts:
        return parts[0][0].handle, parts[0][1], True
    if name.startswith("MIG-GPU-"):  # before driver 470: MIG-GPU-<uuid>/<GPU instance>/<compute instance>
        with contextlib.suppress(pynvml.NVMLError):
            part = pynvml.nvmlDeviceGetHandleByUUID(name)
            return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part), part, True
    raise _NotFoundError(f"CUDA_VISIBLE_DEVICES: NVML knows no device {name}")


def _with_part(device: _Device, name: str | None) -> tuple[Any, Any | None, bool]:
    """Return a GPU; where it is cut into slices also the one named, or the only one: CUDA computes on one at a time."""
    if device.handle is None:
        raise _NotFoundError("the GPU gives NVML no handle: it may be lost")
    if not device.sliced:
        return device.handle, None, False
    named = [handle for handle, uuid in device.parts if name is not None and uuid.startswith(name)]
    fitting = named or [handle for handle, _ in device.parts]
    return device.handle, fitting[0] if len(fitting) == 1 else None, True


def _devices(pynvml: Any) -> Iterator[_Device]:
    """Yield every GPU in the order of the bus; one that is lost keeps its place with no name."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            device_name = pynvml.nvmlDeviceGetName(handle)
            uuid = _uuid(pynvml, handle) or ""
        except pynvml.NVMLError:
            yield _Device(None, "", "", (), False)
            continue
        sliced = False
        with contextlib.suppress(pynvml.NVMLError):  # most GPUs cannot be cut, and say so
            sliced = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        yield _Device(handle, uuid, _text(device_name), tuple(_parts(pynvml, handle)) if sliced else (), sliced)


def _parts(pynvml: Any, device: Any) -> Iterator[tuple[Any, str]]:
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        with contextlib.suppress(pynvml.NVMLError):  # places that hold no slice
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
            yield handle, _uuid(pynvml, handle) or ""


def _uuid(pynvml: Any, handle: Any) -> str | None:
    try:
        return _text(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 11.5
