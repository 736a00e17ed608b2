"""An NVML library of made-up GPUs. Constants, structures and error classes are the real binding's, handed over."""

from types import SimpleNamespace
from typing import Any


class FakeGpu:
    """A GPU, or a slice of one in another's `parts`. `told` holds what it answers: a value, or an error's code."""

    def __init__(self, uuid: str, name: str = "NVIDIA H200", parts: list["FakeGpu"] | None = None, **told: Any) -> None:
        self.uuid, self.name, self.parts = uuid, name, parts
        self.lost: int | None = None
        """The code that every question is answered by from now on."""
        self.told = {
            "energy": 5_000_000,
            "power": 412_500,
            "instant": 431_250,
            "sm": 1980,
            "memory_clock": 3201,
            "gpu": 97,
            "memory": 41,
            "used": 12 * 2**30,
            "total": 141 * 2**30,
            "temperature": 54,
            "reasons": 0,
            "generation": 5,
            "width": 16,
            "state": 0,
            "limit": 700_000,
            "slowdown": 89,
            "processes": [],
        } | told


class FakeNvml:
    """Stands in `sys.modules` for pynvml. Its answers come from `gpus`; `asked` counts the questions by name."""

    def __init__(self, real: Any, gpus: list[FakeGpu], init_error: int | None = None) -> None:
        self._real, self._gpus, self._init_error = real, gpus, init_error
        self.open = 0
        self.asked: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml") and not name.startswith(("nvmlClocksEvent", "nvmlTemperature")):
            raise AttributeError(name)  # nothing of the real library's may be called
        return getattr(self._real, name)

    def _tell(self, gpu: FakeGpu, name: str) -> Any:
        self.asked[name] = self.asked.get(name, 0) + 1
        if gpu.lost is not None:
            raise self._real.NVMLError(gpu.lost)
        value = gpu.told[name]
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self):
        if self._init_error is not None:
            raise self._real.NVMLError(self._init_error)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "570.86.15"

    def nvmlDeviceGetCount(self):
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._gpus[index]

    def nvmlDeviceGetUUID(self, gpu):
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu):
        if gpu.lost is not None:
            raise self._real.NVMLError(gpu.lost)
        return gpu.name

    def nvmlDeviceGetMigMode(self, gpu):
        if gpu.parts is None:
            raise self._real.NVMLError(self._real.NVML_ERROR_NOT_SUPPORTED)
        return [1, 1] if gpu.parts else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, index):
        if index >= len(gpu.parts):
            raise self._real.NVMLError(self._real.NVML_ERROR_NOT_FOUND)
        return gpu.parts[index]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return self._tell(gpu, "energy")

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self._tell(gpu, "power")

    def nvmlDeviceGetFieldValues(self, gpu, ids):
        assert list(ids) == [self._real.NVML_FI_DEV_POWER_INSTANT]
        values = (self._real.c_nvmlFieldValue_t * 1)()
        try:
            values[0].value.uiVal = self._tell(gpu, "instant")
            values[0].valueType = self._real.NVML_VALUE_TYPE_UNSIGNED_INT
        except self._real.NVMLError as error:
            if gpu.lost is not None:
                raise
            values[0].nvmlReturn = error.value
        return values

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return self._tell(gpu, {self._real.NVML_CLOCK_SM: "sm", self._real.NVML_CLOCK_MEM: "memory_clock"}[kind])

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return {self._real.NVML_CLOCK_SM: 1980, self._real.NVML_CLOCK_MEM: 3201}[kind]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return self._tell(gpu, "reasons")

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self._tell(gpu, "gpu"), memory=self._tell(gpu, "memory"))

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=self._tell(gpu, "used"), total=self._tell(gpu, "total"))

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        assert sensor == self._real.NVML_TEMPERATURE_GPU
        return self._tell(gpu, "temperature")

    def nvmlDeviceGetTemperatureThreshold(self, gpu, threshold):
        assert threshold == self._real.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return self._tell(gpu, "slowdown")

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return self._tell(gpu, "limit")

    def nvmlDeviceGetCurrPcieLinkGeneration(self, gpu):
        return self._tell(gpu, "generation")

    def nvmlDeviceGetCurrPcieLinkWidth(self, gpu):
        return self._tell(gpu, "width")

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu):
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu):
        return 16

    def nvmlDeviceGetPerformanceState(self, gpu):
        return self._tell(gpu, "state")

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self._tell(gpu, "processes")]
