"""What is asked of NVML, of which device, and what becomes of the answers it does not give."""

import os
import sys

import pynvml
import pytest
import torch
from fake_nvml import FakeGpu, FakeNvml

from bsprof.measure import environment, nvml
from bsprof.measure.nvml import DeviceLostError, Gpu, NvmlSource

A, B, C = (f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "abc")
MIG = [f"MIG-{digit * 8}-0000-0000-0000-000000000000" for digit in "de"]

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
UNKNOWN = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)


@pytest.fixture
def install(monkeypatch):
    def put(*gpus, **options):
        fake = FakeNvml(pynvml, list(gpus), **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


def sliced_gpu(**told):
    """A GPU cut in two. Like the real thing it tells no utilisation, and a slice tells its memory alone."""
    own = ("used", "total", "processes")
    silent = {name: NOT_SUPPORTED for name in FakeGpu("").told if name not in own}
    parts = [FakeGpu(uuid, **silent, used=index * 2**30, total=16 * 2**30) for index, uuid in enumerate(MIG, 1)]
    return FakeGpu(A, parts=parts, gpu=NOT_SUPPORTED, memory=NOT_SUPPORTED, **told)


# --- what a device tells ----------------------------------------------------------------------------


def test_a_gpu_tells_all_in_the_columns_units(install):
    fake = install(FakeGpu(A))
    source = nvml.open_source(Gpu(0), {})
    assert (source.name, source.uuid, source.mig, source.problem) == ("nvml", A, False, None)
    assert source.unsupported == []
    assert source.read() == {
        "energy_mj": 5_000_000,
        "power_instant_w": 431.25,
        "power_w": 412.5,
        "sm_mhz": 1980,
        "throttle_reasons": 0,
        "gpu_percent": 97,
        "memory_percent": 41,
        "memory_used_bytes": 12 * 2**30,
        "memory_mhz": 3201,
        "temperature_c": 54,
        "pcie_generation": 5,
        "pcie_width": 16,
        "performance_state": 0,
    }
    assert source.limits == {
        "sm_mhz_max": 1980,
        "memory_mhz_max": 3201,
        "power_limit_w": 700.0,
        "slowdown_c": 89,
        "pcie_generation_max": 5,
        "pcie_width_max": 16,
        "memory_total_bytes": 141 * 2**30,
    }
    source.close()
    assert fake.open == 0


def test_what_changes_slowly_is_not_asked_each_time(install):
    fake = install(FakeGpu(A))
    source = nvml.open_source(Gpu(0), {})
    fake.asked.clear()
    quick = source.read(slow=False)
    assert quick.keys() == {"energy_mj", "power_instant_w", "power_w", "sm_mhz", "throttle_reasons", "gpu_percent"}
    assert fake.asked.keys().isdisjoint({"temperature", "generation", "used", "state"})


@pytest.mark.parametrize(
    ("silent", "column"),
    [
        ("energy", "energy_mj"),
        ("instant", "power_instant_w"),
        ("power", "power_w"),
        ("temperature", "temperature_c"),
        ("reasons", "throttle_reasons"),
        ("width", "pcie_width"),
        ("slowdown", "slowdown_c"),
        ("limit", "power_limit_w"),
    ],
)
def test_a_field_that_is_not_supported_costs_no_other(install, silent, column):
    install(FakeGpu(A))
    whole = nvml.open_source(Gpu(0), {})
    install(FakeGpu(A, **{silent: NOT_SUPPORTED}))
    source = nvml.open_source(Gpu(0), {})
    assert source.unsupported == [column]
    told = source.read().keys() | source.limits.keys()
    assert told == (whole.read().keys() | whole.limits.keys()) - {column}


def test_an_unknown_error_from_the_start_is_one_fields_own(install):
    install(FakeGpu(A, temperature=UNKNOWN))
    source = nvml.open_source(Gpu(0), {})
    assert source.unsupported == ["temperature_c"]
    assert source.read()["sm_mhz"] == 1980


def test_a_function_that_an_older_binding_lacks_is_one_field_less(install, monkeypatch):
    install(FakeGpu(A))
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetPerformanceState")
    assert nvml.open_source(Gpu(0), {}).unsupported == ["performance_state"]


def test_a_renamed_function_is_asked_by_its_older_name(install, monkeypatch):
    install(FakeGpu(A, reasons=4))
    monkeypatch.setattr(
        FakeNvml,
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        FakeNvml.nvmlDeviceGetCurrentClocksEventReasons,
        raising=False,
    )
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksEventReasons")
    source = nvml.open_source(Gpu(0), {})
    assert source.unsupported == []
    assert source.read()["throttle_reasons"] == 4


def test_a_question_that_fails_for_once_has_no_entry(install):
    gpu = FakeGpu(A)
    install(gpu)
    source = nvml.open_source(Gpu(0), {})
    gpu.told["power"] = pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
    assert "power_w" not in source.read()
    gpu.told["power"] = 0
    assert source.read()["power_w"] == 0.0
    assert source.unsupported == []


def test_an_unknown_performance_state_is_not_told(install):
    install(FakeGpu(A, state=32))
    assert nvml.open_source(Gpu(0), {}).unsupported == ["performance_state"]


@pytest.mark.parametrize("code", ["NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED", "NVML_ERROR_UNKNOWN"])
def test_a_gpu_lost_midway_is_told(install, code):
    gpu = FakeGpu(A)
    install(gpu)
    source = nvml.open_source(Gpu(0), {})
    source.read()
    gpu.lost = getattr(pynvml, code)
    with pytest.raises(DeviceLostError):
        source.read()
    assert source.processes() is None


def test_processes_with_and_without_their_memory(install):
    install(FakeGpu(A, processes=[(10, 2**30), (11, None)]))
    assert nvml.open_source(Gpu(0), {}).processes() == [(10, 2**30), (11, None)]


def test_processes_through_an_older_driver(install, monkeypatch):
    def mismatch(self, gpu):
        raise pynvml.NVMLLibraryMismatchError("use _v2")

    install(FakeGpu(A, processes=[(10, 2**30)]))
    monkeypatch.setattr(
        FakeNvml,
        "nvmlDeviceGetComputeRunningProcesses_v2",
        FakeNvml.nvmlDeviceGetComputeRunningProcesses,
        raising=False,
    )
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetComputeRunningProcesses", mismatch)
    assert nvml.open_source(Gpu(0), {}).processes() == [(10, 2**30)]


# --- no device --------------------------------------------------------------------------------------


def test_the_real_binding_without_a_driver_is_a_null_source():
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    source = nvml.open_source(Gpu(0), {})
    assert source.name == "none"
    assert source.problem is not None
    assert (source.read(), source.processes(), source.limits) == ({}, None, {})
    assert nvml.driver_version() is None


def test_without_a_gpu_nothing_is_missing():
    assert nvml.open_source(None, {}).problem is None


def test_without_the_binding(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.open_source(Gpu(0), {}).problem == "nvidia-ml-py is not installed"
    assert nvml.driver_version() is None


def test_another_module_of_the_bindings_name(tmp_path, monkeypatch):
    (tmp_path / "pynvml.py").write_text("raise RuntimeError('not that one')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml")
    assert "not that one" in nvml.open_source(Gpu(0), {}).problem


def test_a_driver_that_does_not_fit_its_library(install):
    install(FakeGpu(A), init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    assert "mismatch" in nvml.open_source(Gpu(0), {}).problem


# --- which device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, None),
        ("", []),
        ("-1", []),
        ("0", [0]),
        ("2, 0", [2, 0]),
        ("0,-1,1", [0]),
        ("1,1", []),
        ("1gpu2,0", [1, 0]),
        ("GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]),
        ("MIG-dd", ["MIG-dd"]),
        ("MIG-GPU-aa/1/0", ["MIG-GPU-aa/1/0"]),
        ("NoDevFiles", []),
    ],
)
def test_the_variable_is_read_as_cuda_reads_it(text, named):
    assert nvml.visible({} if text is None else {"CUDA_VISIBLE_DEVICES": text}) == named


@pytest.mark.parametrize(
    ("ordinal", "variable", "uuid"),
    [
        (0, None, A),
        (2, None, C),
        (0, "2", C),
        (1, "2,1", B),
        (0, B, B),
        (0, "GPU-b", B),
        (1, "GPU-ccc,GPU-aaaaaaaa", A),
    ],
)
def test_index_and_variable_lead_to_the_device(install, ordinal, variable, uuid):
    install(FakeGpu(A), FakeGpu(B), FakeGpu(C))
    environ = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert nvml.open_source(Gpu(ordinal), environ).uuid == uuid


@pytest.mark.parametrize(
    ("ordinal", "variable"),
    [(0, ""), (0, "-1"), (1, "0"), (3, None), (0, "7"), (0, "GPU-"), (0, "GPU-f"), (0, "MIG-d")],
)
def test_a_device_that_is_not_there_or_not_told_from_others_is_none(install, ordinal, variable):
    fake = install(FakeGpu(A), FakeGpu(B), FakeGpu(C))
    source = nvml.open_source(Gpu(ordinal), {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable})
    assert source.name == "none"
    assert source.problem
    assert fake.open == 0


def test_the_uuid_that_cuda_tells_goes_before_any_index(install):
    """CUDA puts the fastest first, NVML counts along the bus."""
    install(FakeGpu(A, name="NVIDIA T400"), FakeGpu(B, name="NVIDIA H200"))
    assert nvml.open_source(Gpu(0, B.removeprefix("GPU-")), {}).uuid == B


def test_an_index_among_several_kinds_means_nothing_but_in_bus_order(install):
    install(FakeGpu(A, name="NVIDIA T400"), FakeGpu(B, name="NVIDIA H200"))
    assert "several kinds" in nvml.open_source(Gpu(0), {}).problem
    assert nvml.open_source(Gpu(0), {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).uuid == A


def test_a_lost_neighbour_keeps_its_place(install):
    lost = FakeGpu(A)
    lost.lost = pynvml.NVML_ERROR_GPU_IS_LOST
    install(lost, FakeGpu(B))
    assert nvml.open_source(Gpu(0, B), {}).uuid == B
    assert nvml.open_source(Gpu(0), {}).problem


# --- slices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "variable"),
    [
        pytest.param(Gpu(0), MIG[1], id="by id"),
        pytest.param(Gpu(0), "MIG-eee", id="by the id's beginning"),
        pytest.param(Gpu(0, MIG[1].removeprefix("MIG-")), None, id="CUDA tells the slice's UUID"),
        pytest.param(Gpu(0, A.removeprefix("GPU-")), MIG[1], id="CUDA tells the GPU's UUID"),
    ],
)
def test_a_slice_has_its_own_memory_and_the_gpus_power(install, gpu, variable):
    install(FakeGpu(B), sliced_gpu(processes=[(1, 1)]))
    source = nvml.open_source(gpu, {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable})
    assert (source.uuid, source.mig) == (MIG[1], True)
    told = source.read()
    assert told["memory_used_bytes"] == 2 * 2**30
    assert (told["power_w"], told["sm_mhz"]) == (412.5, 1980)
    assert source.limits["memory_total_bytes"] == 16 * 2**30
    assert source.limits["power_limit_w"] == 700.0
    assert source.unsupported == ["gpu_percent", "memory_percent"]
    assert source.processes() == []


def test_a_slice_that_cannot_be_told_from_its_neighbour_has_no_memory(install):
    install(sliced_gpu())
    source = nvml.open_source(Gpu(0, A), {})
    assert (source.uuid, source.mig) == (A, True)
    assert {"memory_used_bytes", "memory_total_bytes"} <= set(source.unsupported)
    assert source.processes() is None
    assert source.read()["power_w"] == 412.5


def test_the_only_slice_is_the_one(install):
    gpu = sliced_gpu()
    del gpu.parts[0]
    install(gpu)
    assert nvml.open_source(Gpu(0), {}).uuid == MIG[1]


# --- the environment --------------------------------------------------------------------------------


class Properties:
    name, total_memory, major, minor, multi_processor_count = "NVIDIA H200", 141 * 2**30, 9, 0, 132
    uuid = A.removeprefix("GPU-")


def test_an_accelerator_is_described_by_cuda_and_nvml(install, monkeypatch):
    fake = install(FakeGpu(A))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = environment._describe("cuda", 0)
    assert (found.uuid, found.multiprocessors, found.pcie) == (A, 132, "gen5 x16")
    assert (found.power_limit_w, found.mig, found.capability) == (700.0, False, "9.0")
    assert fake.open == 0
    assert nvml.driver_version() == "570.86.15"


def test_a_slice_is_named_as_one(install, monkeypatch):
    install(sliced_gpu())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", MIG[0])
    found = environment._describe("cuda", 0)
    assert (found.uuid, found.mig) == (MIG[0], True)


def test_an_accelerator_without_nvml_is_what_cuda_tells(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    found = environment._describe("cuda", 0)
    assert (found.uuid, found.multiprocessors) == (Properties.uuid, 132)
    assert (found.pcie, found.power_limit_w, found.mig) == (None, None, None)


# --- the real thing ---------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU")
def test_the_gpu_that_is_here_tells_of_itself():
    properties = torch.cuda.get_device_properties(0)
    source = nvml.open_source(Gpu(0, str(properties.uuid)), os.environ)
    try:
        assert source.problem is None
        assert isinstance(source, NvmlSource)
        told = source.read()
        assert 0 < told["memory_used_bytes"] <= source.limits["memory_total_bytes"]
        assert str(properties.uuid) in source.uuid or source.mig
    finally:
        source.close()
