"""What is saved comes back, whole or not at all, and whatever is wrong with a file is said in one line."""

import fcntl
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsprof.store
from bsprof.errors import BsprofError
from bsprof.loading import MAIN, Batches, Worker
from bsprof.model import (
    Accelerator,
    Axes,
    Block,
    Case,
    Counters,
    Environment,
    Facts,
    Measurement,
    Outcome,
    Plan,
    Rank,
    Result,
    Samples,
    Settings,
    Startup,
    Stop,
    case_key,
)
from bsprof.noun import Note
from bsprof.store import Header, Journal, encode, load, read_plan, save, schema_json

GOLDEN = Path(__file__).parent / "golden" / "result-schema-1.json"

ENVIRONMENT = Environment(
    host="box",
    os="Linux",
    kernel="6.8.0",
    hypervisor="kvm",
    cpu="Some CPU @ 2.00GHz",
    cores_logical=4,
    cores_physical=2,
    cores_usable=2,
    cpu_quota=2.0,
    memory_bytes=8 << 30,
    memory_limit_bytes=4 << 30,
    shm_bytes=64 << 20,
    accelerators=(
        Accelerator(name="GPU", kind="cuda", index=0, uuid="GPU-1", memory_bytes=16 << 30, capability="9.0"),
    ),
    driver="580.1",
    python="3.11.7",
    torch="2.15.0",
    torchvision="0.29.2",
    cuda="13.0",
    cudnn="9.1",
    numpy="2.4.6",
    libc="glibc 2.39",
    bsprof="0.1.0",
    git_commit="0123abcd+",
    variables={"OMP_NUM_THREADS": "1"},
)

PLAN = Plan(
    axes=Axes(batch_size=(8, 16), workers=(0, 1)),
    blocks=(Axes(amp=("off", "bf16"), image_size=(None, 64)),),
    stop=Stop(precision=0.05, max_case_time_s=5.0, min_steps=3, max_steps=100),
    repeat=2,
    seed=3,
    order="listed",
    malloc="default",
    deadline_s=60.0,
    host_memory_bytes=2 << 30,
    data_root="data",
    download=True,
)


def case(process=0, **axes):
    asked = Settings(**axes)
    return Case(key=case_key(asked), settings=asked, process=process)


FULL = Measurement(
    case=case(process=1, batch_size=8, workers=1),
    outcome=Outcome(kind="ok"),
    wall_s=1.5,
    inside_s=1.4,
    facts=Facts(
        device="cuda:0",
        threads=2,
        parameters=3_504_872,
        image_size=64,
        samples_in_dataset=96,
        classes=10,
        malloc="pinned",
    ),
    startup=Startup(
        process_ns=15, build_ns=200, iterator_ns=30, first_batch_ns=400, epoch_end_ns=[20], epoch_start_ns=[50]
    ),
    samples=Samples(
        batch_size=8,
        step_ns=[100, 104, 99],
        host_ns={"data": [10, 11, 9], "forward": [40, 41, 40], "backward": [49, 50, 50]},
        device_step_ns=[99, 103, 98],
        device_ns={"data": [0, 1, 0], "forward": [50, 51, 49], "backward": [49, 51, 49]},
        blocks=[Block(kind="instrumented", steps=3, wall_ns=303), Block(kind="bare", steps=3, wall_ns=300)],
        epoch_boundaries=[1],
        warmup_ns=[300, 105],
        steady=False,
        recorder_ns_per_step=2,
        counters=Counters(
            wall_ns=603, cpu_ns=600, minor_faults=3, major_faults=0, voluntary_switches=5, involuntary_switches=1
        ),
        final_loss=2.25,
    ),
    notes=(Note(code="no_steady_state", text="the step time was still falling"),),
)

FAILED = Measurement(
    case=case(batch_size=16),
    outcome=Outcome(
        kind="oom",
        message="out of memory",
        hint="a smaller batch",
        phase="backward",
        traceback="Traceback …",
        evidence={"asked_bytes": 1024, "share": 0.5, "allocator": "native", "limit_bytes": None},
    ),
    wall_s=0.5,
)

RESULT = Result(
    created="2026-01-02T03:04:05Z",
    plan=PLAN,
    environment=ENVIRONMENT,
    measurements=[FULL, FAILED],
    wall_s=2.25,
    notes=(Note(code="threads", text="more threads than free cores"),),
)

HEADER = Header(created=RESULT.created, plan=PLAN, environment=ENVIRONMENT)


def fault(call, *args):
    """Return the error of `call`, having seen that it is one line with a hint of one line at most."""
    with pytest.raises(BsprofError) as caught:
        call(*args)
    assert "\n" not in caught.value.message
    assert "\n" not in (caught.value.hint or "")
    assert "`" not in caught.value.message
    return caught.value


# --- any result -------------------------------------------------------------------------------------

WHOLE = st.integers(-(2**63), 2**63 - 1)


def strategy(kind):
    """Return a strategy of all values of a noun's field type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        limits = {k: getattr(m, k) for m in args[1:] for k in ("ge", "gt", "le", "lt") if getattr(m, k) is not None}
        if args[0] is float:
            low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
            return st.floats(
                low, high, exclude_min="gt" in limits, exclude_max="lt" in limits, allow_nan=False, allow_infinity=False
            )
        return st.integers(limits["ge"], 2**62) if "ge" in limits else strategy(args[0])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([strategy(arg) for arg in args])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(strategy(args[0]), max_size=3).map(tuple)
    if origin is list:
        return st.lists(strategy(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(strategy(args[0]), strategy(args[1]), max_size=3)
    if kind is Samples:
        return noun(Samples).map(consistent)
    if kind is Rank:
        return noun(Rank).map(a_mark_a_step)
    if kind is Batches:
        return batches()
    if kind is Worker:
        return noun(Worker).map(lambda w: msgspec.structs.replace(w, private_bytes=[0] * len(w.memory_at_ns)))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return noun(kind)
    plain = {int: WHOLE, float: st.floats(allow_nan=False, allow_infinity=False), str: st.text(), bool: st.booleans()}
    return {**plain, type(None): st.none(), msgspec.UnsetType: st.just(msgspec.UNSET)}[kind]


def noun(kind):
    return st.builds(kind, **{field.name: strategy(field.type) for field in msgspec.structs.fields(kind)})


@st.composite
def batches(draw):
    """Return as many entries in every column; moments may lie before the watching began, durations are none or some."""
    count = draw(st.integers(0, 3))
    durations, moments = st.integers(0, 2**62), st.integers(-(2**62), 2**62)

    def column(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    columns = {}
    for field in msgspec.structs.fields(Batches):
        values = moments if field.name.endswith("_at_ns") else durations
        if field.name == "stage_ns":
            columns[field.name] = {name: column(durations) for name in draw(st.sets(st.text(), max_size=2))}
        elif field.name == "worker":
            columns[field.name] = column(st.integers(MAIN, 2**31))
        else:
            columns[field.name] = column(
                values | st.none() if type(None) in typing.get_args(typing.get_args(field.type)[0]) else values
            )
    return Batches(**columns)


def a_mark_a_step(rank):
    steps = len(rank.samples.step_ns) if rank.samples else 0
    before = None if rank.before_reduce_ns is None else [0] * steps
    return msgspec.structs.replace(rank, before_reduce_ns=before)


def consistent(samples):
    """Give every array as many entries as there are steps, and nothing that cannot be negative a negative value."""
    steps = len(samples.step_ns)

    def fitted(times):
        return (times + [0] * 3)[:steps]

    def positive(times):
        return [abs(time) for time in times]

    return msgspec.structs.replace(
        samples,
        batch_size=None if samples.batch_size is None else abs(samples.batch_size) + 1,
        step_ns=positive(samples.step_ns),
        epoch_boundaries=[index % steps for index in samples.epoch_boundaries if steps],
        host_ns={phase: positive(fitted(times)) for phase, times in samples.host_ns.items()},
        device_ns=samples.device_ns and {phase: fitted(times) for phase, times in samples.device_ns.items()},
        device_step_ns=None if samples.device_step_ns is None else fitted(samples.device_step_ns),
        blocks=[Block(kind=b.kind, steps=b.steps % 2**31, wall_ns=b.wall_ns % 2**31) for b in samples.blocks],
    )


def any_result():
    return noun(Result).map(lambda result: msgspec.structs.replace(result, schema=1))


@settings(max_examples=40, deadline=None)
@given(result=any_result(), name=st.sampled_from(["r.json", "r.json.gz"]))
def test_any_result_comes_back_as_it_was_saved(tmp_path_factory, result, name):
    path = tmp_path_factory.mktemp("any") / name
    save(result, path)
    assert load(path) == result
    assert [p.name for p in path.parent.iterdir()] == [name]


@settings(max_examples=60, deadline=None)
@given(plan=noun(Plan))
def test_any_plan_is_read_back_from_json(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("any") / "plan.json"
    path.write_bytes(msgspec.json.encode(plan))
    assert read_plan(path) == plan


# --- saving -----------------------------------------------------------------------------------------


def test_a_file_has_one_measurement_a_line():
    lines = encode(RESULT).decode().splitlines()
    holding = [line for line in lines if line.startswith('{"case":')]
    assert [json.loads(line.rstrip(","))["outcome"]["kind"] for line in holding] == ["ok", "oom"]
    assert json.loads(encode(RESULT)) == json.loads(msgspec.json.encode(RESULT))
    assert json.loads(encode(msgspec.structs.replace(RESULT, measurements=[])))["measurements"] == []


def test_gzip_goes_by_the_name_when_written_and_by_the_content_when_read(tmp_path):
    save(RESULT, tmp_path / "r.json.gz")
    assert (tmp_path / "r.json.gz").read_bytes().startswith(b"\x1f\x8b")
    (tmp_path / "r.json.gz").rename(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == RESULT
    save(RESULT, tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == encode(RESULT)


def test_equal_results_make_equal_files(tmp_path):
    save(RESULT, tmp_path / "a.json.gz")
    save(RESULT, tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_a_step_of_five_phases_takes_few_bytes():
    steps, cases = 1000, 1000
    times = [12_345_678] * steps
    phases = {phase: times for phase in ("data", "h2d", "forward", "backward", "optimizer")}
    one = Measurement(
        case=case(),
        outcome=Outcome(kind="ok"),
        wall_s=1.0,
        samples=Samples(batch_size=8, step_ns=[60_000_000] * steps, host_ns=phases, warmup_ns=[60_000_000] * 100),
    )
    assert cases * len(msgspec.json.encode(one)) < 80e6


def test_a_failed_save_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("what was there")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert fault(save, RESULT, path).message == f"{path}: no space left on device"
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_no_draft(tmp_path, monkeypatch):
    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(RESULT, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_written_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    assert fault(save, RESULT, tmp_path / "no" / "r.json").message.endswith(f"there is no directory {tmp_path / 'no'}")
    assert fault(save, RESULT, tmp_path / "file" / "r.json").message.endswith("r.json: not a directory")
    assert fault(save, RESULT, tmp_path).message == f"{tmp_path}: not a regular file"
    assert "not a regular file" in fault(save, RESULT, Path(os.devnull)).message
    assert not Path(os.devnull).is_file()


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "latest.json").symlink_to(tmp_path / "far" / "r.json")
    save(RESULT, tmp_path / "latest.json")
    assert (tmp_path / "latest.json").is_symlink()
    assert load(tmp_path / "far" / "r.json") == RESULT


def test_names_that_are_no_text_do_not_lose_the_failure_that_names_them(tmp_path):
    failed = Measurement(
        case=case(),
        outcome=Outcome(kind="error", message="corrupt: \udcff.jpg", evidence={"file": "\udcff.jpg"}),
        wall_s=1.0,
    )
    save(msgspec.structs.replace(RESULT, measurements=[failed]), tmp_path / "r.json")
    outcome = load(tmp_path / "r.json").measurements[0].outcome
    assert outcome.message == "corrupt: \\udcff.jpg"
    assert outcome.evidence == {"file": "\\udcff.jpg"}


def test_a_loss_that_diverged_is_not_captured(tmp_path):
    samples = msgspec.structs.replace(FULL.samples, final_loss=math.nan)
    save(
        msgspec.structs.replace(RESULT, measurements=[msgspec.structs.replace(FULL, samples=samples)]),
        tmp_path / "r.json",
    )
    assert load(tmp_path / "r.json").measurements[0].samples.final_loss is None


# --- loading what is not right ----------------------------------------------------------------------


@pytest.mark.parametrize("read", [load, read_plan])
def test_files_that_are_none(tmp_path, read):
    assert fault(read, tmp_path / "r.json").message.endswith("r.json: no such file or directory")
    assert "there is no directory" in fault(read, tmp_path / "no" / "r.json").message
    (tmp_path / "d.json").mkdir()
    assert fault(read, tmp_path / "d.json").message.endswith("d.json: is a directory")
    for content in ("", " \n"):
        (tmp_path / "r.json").write_text(content)
        assert fault(read, tmp_path / "r.json").message.endswith("r.json: empty")


@pytest.mark.parametrize("read", [load, read_plan])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "seed": 1,\n "repeat": x}', "not JSON: invalid character at line 3, column 12"),
        (b'{\n "seed": NaN}', "not JSON: invalid character at line 2, column 10"),
        ('{"ééé": x'.encode(), "not JSON: invalid character at line 1, column 9"),
        (b'{\n "seed": 1', "truncated: the JSON ends early, at line 2, column 11"),
        (b'{"seed": 1} {', "not JSON: trailing characters at line 1, column 13"),
        (b'{"seed": "\xff"}', "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_not_json(tmp_path, read, content, message):
    (tmp_path / "r.json").write_bytes(content)
    assert fault(read, tmp_path / "r.json").message == f"{tmp_path / 'r.json'}: {message}"


@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"name": "x"}', "7", "null", '"text"'])
def test_files_that_are_no_result(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert fault(load, tmp_path / "r.json").message.endswith("r.json: not a bsprof result")


def damaged(path, *place, value):
    """Save RESULT with `value` at `place`, and return the path."""
    content = at = msgspec.to_builtins(RESULT)
    content = at = json.loads(json.dumps(content))
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("plan", "axes", "batch_size", 1), "x", "$.plan.axes.batch_size[1]: expected int, got str"),
        (("plan", "axes", "batch_size", 1), 0, "$.plan.axes.batch_size[1]: expected int >= 1"),
        (("wall_s",), "x", "$.wall_s: expected float | null, got str"),
        (("measurements", 1, "outcome", "kind"), "fine", "$.measurements[1].outcome.kind: invalid value 'fine'"),
        (("measurements", 0, "samples", "colour"), 1, "$.measurements[0].samples.colour: unknown field"),
        (("measurements", 0, "case"), {}, "$.measurements[0].case.key: missing"),
        (("schema",), "1", "$.schema: expected int, got str"),
        (("schema",), 0, "$.schema: there is no schema 0"),
        (
            ("measurements", 0, "samples", "step_ns"),
            [1],
            "$.measurements[0].samples.host_ns.data: 3 entries for 1 steps",
        ),
        (
            ("measurements", 0, "samples", "host_ns", "forward"),
            [],
            "[0].samples.host_ns.forward: 0 entries for 3 steps",
        ),
        (("measurements", 0, "samples", "device_step_ns"), [1], "[0].samples.device_step_ns: 1 entries for 3 steps"),
        (("measurements", 0, "samples", "device_ns", "data"), [1], "samples.device_ns.data: 1 entries for 3 steps"),
        (
            ("measurements", 0, "samples", "blocks", 1, "steps"),
            -1,
            "samples.blocks[1].steps: expected int >= 0, got -1",
        ),
        (("measurements", 0, "samples", "blocks", 0, "wall_ns"), -1, "blocks[0].wall_ns: expected int >= 0, got -1"),
        (("measurements", 0, "samples", "step_ns", 1), -5, "[0].samples.step_ns[1]: expected int >= 0"),
        (("measurements", 0, "samples", "batch_size"), 0, "[0].samples.batch_size: expected int >= 1, got 0"),
        (("measurements", 0, "samples", "epoch_boundaries"), [3], "epoch_boundaries: there is no step 3 among 3"),
        (
            ("measurements", 0, "ranks"),
            [{"rank": 0, "node": 0, "host": "h", "before_reduce_ns": [1]}],
            "[0].ranks[0].before_reduce_ns: 1 entries for 0 steps",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, place, value, message):
    error = fault(load, damaged(tmp_path / "r.json", *place, value=value))
    assert error.message.startswith(f"{tmp_path / 'r.json'}: $")
    assert error.message.endswith(message)


@pytest.mark.parametrize("read", [load, read_plan])
def test_a_newer_schema_is_said_before_anything_it_changed(tmp_path, read):
    path = damaged(tmp_path / "r.json", "schema", value=2)
    damaged_more = json.loads(path.read_text()) | {"measurements": "elsewhere", "plan": 7}
    for content in (json.loads(path.read_text()), damaged_more):
        path.write_text(json.dumps(content))
        error = fault(read, path)
        assert error.message == f"{path}: written by schema 2, this bsprof reads up to 1"
        assert "upgrade" in error.hint


SMALL = msgspec.structs.replace(RESULT, measurements=[FULL])


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_every_beginning_of_a_file_is_an_error_and_no_traceback(tmp_path, name):
    path = tmp_path / name
    save(SMALL, path)
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        error = fault(load, path)
        if length > 20:
            assert "truncated" in error.message


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_file_with_any_byte_changed_loads_or_is_explained(tmp_path_factory, data):
    whole = bytearray(data.draw(st.sampled_from([encode(SMALL), gzip.compress(encode(SMALL), mtime=0)])))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "r.json"
    path.write_bytes(whole)
    try:
        load(path)
    except BsprofError as error:
        assert "\n" not in error.message


# --- plans ------------------------------------------------------------------------------------------


def test_a_plan_is_read_from_toml_from_json_and_from_a_result(tmp_path):
    (tmp_path / "plan.toml").write_text(
        """
        seed = 3
        repeat = 2
        [stop]
        precision = 0.05
        [axes]
        batch_size = [8, 16]
        amp = ["off", "bf16"]
        [[blocks]]
        workers = [0, 1]
        [[blocks]]
        cudnn_benchmark = [true, false]
        """
    )
    plan = Plan(
        axes=Axes(batch_size=(8, 16), amp=("off", "bf16")),
        blocks=(Axes(workers=(0, 1)), Axes(cudnn_benchmark=(True, False))),
        stop=Stop(precision=0.05),
        repeat=2,
        seed=3,
    )
    assert read_plan(tmp_path / "plan.toml") == plan
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(plan))
    assert read_plan(tmp_path / "plan.json") == plan
    for name in ("r.json", "r.json.gz"):
        save(RESULT, tmp_path / name)
        assert read_plan(tmp_path / name) == PLAN


def test_a_result_without_a_plan_has_nothing_to_repeat(tmp_path):
    save(msgspec.structs.replace(RESULT, plan=None), tmp_path / "r.json")
    error = fault(read_plan, tmp_path / "r.json")
    assert "there is no plan to repeat" in error.message
    assert error.hint


def test_a_plan_has_a_known_suffix(tmp_path):
    (tmp_path / "plan.yaml").write_text("seed: 1")
    assert "a plan is a .toml or .json file" in fault(read_plan, tmp_path / "plan.yaml").message


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("seed = 1\n[axes\n", "line 2, column 6: expected ']' at the end of a table declaration", None),
        ("seed = \n", "line 1, column 8: invalid value", None),
        ("seed = [1", "end of document: unclosed array", None),
        ('[axes]\nbatch_size = [1, "x"]', "$.axes.batch_size[1]: expected int, got str (line 2)", None),
        ("[axes]\nbatch_size = 8", "$.axes.batch_size: expected array, got int (line 2)", "batch_size = [32]"),
        ("[axes]\nbatchsize = [8]", "$.axes.batchsize: unknown axis (line 2)", "did you mean batch_size?"),
        (
            "[axes]\ncolour = [8]",
            "$.axes.colour: unknown axis (line 2)",
            "known are model, data, optimizer, batch_size",
        ),
        ("[[blocks]]\nworker = [8]", "$.blocks[0].worker: unknown axis (line 2)", "did you mean workers?"),
        ("seeds = 1", "$.seeds: unknown field (line 1)", "did you mean seed?"),
        ("[largest_batch]\nfoo = 1", "$.largest_batch.foo: unknown field (line 2)", "known are margin, steps, most"),
        (
            "[axes]\ncudnn_benchmark = true",
            "$.axes.cudnn_benchmark: expected array, got bool (line 2)",
            "an axis takes a list of values: cudnn_benchmark = [false]",
        ),
        (
            '[axes]\nmodel = "resnet18"',
            "$.axes.model: expected array, got str (line 2)",
            'an axis takes a list of values: model = ["mobilenet_v2"]',
        ),
        (
            "[axes]\nprefetch = 2",
            "$.axes.prefetch: expected array, got int (line 2)",
            "an axis takes a list of values: prefetch = [2]",
        ),
        ("[stop]\nmin_step = 1", "$.stop.min_step: unknown field (line 2)", "did you mean min_steps?"),
        (
            '[axes]\noptimizer = ["sgdx"]',
            "$.axes.optimizer[0]: invalid value 'sgdx' (line 2)",
            "one of sgd, adam, adamw",
        ),
        ("[stop]\nprecision = 2.0", "$.stop.precision: expected float < 1.0 (line 2)", None),
        ("deadline_s = inf", "$.deadline_s: expected float, got str (line 1)", None),
        (
            "[[blocks]]\nworkers = [1]\n[[blocks]]\nworkers = ['x']",
            "$.blocks[1].workers[0]: expected int, got str",
            None,
        ),
    ],
)
def test_a_malformed_plan_names_line_and_place(tmp_path, text, message, hint):
    (tmp_path / "plan.toml").write_text(text)
    error = fault(read_plan, tmp_path / "plan.toml")
    assert error.message == f"{tmp_path / 'plan.toml'}: {message}"
    assert hint is None or hint in error.hint


def test_a_malformed_plan_in_json_names_line_and_place(tmp_path):
    (tmp_path / "plan.json").write_text('{\n "axes": {\n  "batch_size": [1, "x"]\n }\n}')
    message = fault(read_plan, tmp_path / "plan.json").message
    assert message.endswith("plan.json: $.axes.batch_size[1]: expected int, got str (line 3)")
    path = damaged(tmp_path / "r.json", "plan", "axes", "batchsize", value=[1])
    error = fault(read_plan, path)
    assert error.message.startswith(f"{path}: $.plan.axes.batchsize: unknown axis")
    assert error.hint == "did you mean batch_size?"


def test_a_plan_that_is_not_text(tmp_path):
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe")
    assert fault(read_plan, tmp_path / "plan.toml").message.endswith("plan.toml: not UTF-8 text")


# --- schema -----------------------------------------------------------------------------------------


def test_the_shipped_schema_is_that_of_the_types():
    shipped = Path(bsprof.store.__file__).with_name("result.schema.json")
    assert shipped.read_bytes() == schema_json(), (
        "regenerate: python -c 'import sys, bsprof.store as s; sys.stdout.buffer.write(s.schema_json())'"
    )


@pytest.mark.parametrize("result", [RESULT, msgspec.structs.replace(RESULT, plan=None, wall_s=None)])
def test_results_fit_the_shipped_schema_and_damaged_ones_do_not(result):
    schema = json.loads(schema_json())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content = json.loads(encode(result))
    validator.validate(content)

    content["measurements"][0]["samples"]["step_ns"][0] = "fast"
    content["measurements"][1]["outcome"]["kind"] = "fine"
    content["environment"]["colour"] = "blue"
    places = {error.json_path for error in validator.iter_errors(content)}
    assert {"$.measurements[1].outcome.kind", "$.environment"} <= places
    assert any(place.startswith("$.measurements[0].samples") for place in places)


@pytest.mark.parametrize("golden", sorted(GOLDEN.parent.glob("*schema-1.json")), ids=lambda path: path.stem)
def test_schema_1_is_readable_for_ever(golden):
    result = load(golden)
    assert result.schema == 1
    assert result.plan is not None
    assert read_plan(golden) == result.plan
    measured = [m for m in result.measurements if m.samples is not None]
    assert measured and all(sum(m.samples.step_ns) > 0 for m in measured)
    jsonschema.Draft202012Validator(json.loads(schema_json())).validate(json.loads(golden.read_bytes()))


# --- journal ----------------------------------------------------------------------------------------


@pytest.fixture
def journal_path(tmp_path):
    return tmp_path / "r.json.journal"


def test_a_journal_holds_what_was_appended_and_goes_when_it_is_done(journal_path):
    with Journal.create(journal_path, HEADER) as journal:
        journal.append(FULL)
    with Journal.resume(journal_path) as journal:
        assert journal.header == HEADER
        assert journal.measurements == [FULL]
        journal.append(FAILED)
        assert journal.measurements == [FULL, FAILED]
    journal = Journal.resume(journal_path)
    assert journal.measurements == [FULL, FAILED]
    journal.discard()
    assert list(journal_path.parent.iterdir()) == []
    Journal.create(journal_path, HEADER).discard()


def test_a_line_is_on_disk_before_append_returns(journal_path):
    with Journal.create(journal_path, HEADER) as journal:
        assert journal_path.read_bytes().count(b"\n") == 1
        journal.append(FULL)
        assert msgspec.json.decode(journal_path.read_bytes().splitlines()[1], type=Measurement) == FULL


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(journal_path):
    with Journal.create(journal_path, HEADER) as journal:
        journal.append(FULL)
        kept = journal_path.stat().st_size
        journal.append(FAILED)
    whole = journal_path.read_bytes()
    for length in range(kept, len(whole)):
        journal_path.write_bytes(whole[:length])
        with Journal.resume(journal_path) as journal:
            assert journal.measurements == [FULL]
        assert journal_path.stat().st_size == kept
    with Journal.resume(journal_path) as journal:
        journal.append(FAILED)
    assert journal_path.read_bytes() == whole


def test_a_journal_killed_before_its_first_line_was_complete_is_begun_again(journal_path):
    Journal.create(journal_path, HEADER).close()
    first = journal_path.read_bytes()
    for length in [0, 1, 10, 40, len(first) - 1]:
        journal_path.write_bytes(first[:length])
        assert "no journal of bsprof's to resume" in fault(Journal.resume, journal_path).message
        Journal.create(journal_path, HEADER).close()
        assert journal_path.read_bytes() == first


def test_other_damage_is_said_with_its_line(journal_path):
    with Journal.create(journal_path, HEADER) as journal:
        journal.append(FULL)
        journal.append(FAILED)
    first, second, third, _ = whole = journal_path.read_bytes().split(b"\n")
    damage = {
        "line 2: truncated: the JSON ends early": [first, second[:-5], third, b""],
        "line 3: $.outcome.kind: invalid value 'fine'": [first, second, third.replace(b'"oom"', b'"fine"'), b""],
        "line 2: $.samples.host_ns.data: 3 entries for 1 steps": [
            first,
            second.replace(b"[100,104,99]", b"[1]"),
            third,
            b"",
        ],
        "line 1: $.environment.host: expected str, got int": [first.replace(b'"box"', b"7"), second, b""],
        "written by schema 2, this bsprof reads up to 1": [first.replace(b'"schema":1', b'"schema":2'), second, b""],
        "no journal of bsprof's to resume": [second, third, b""],
    }
    for message, lines in damage.items():
        journal_path.write_bytes(b"\n".join(lines))
        assert message in fault(Journal.resume, journal_path).message
        assert journal_path.read_bytes() == b"\n".join(lines)
    journal_path.write_bytes(b"\n".join(whole))
    Journal.resume(journal_path).close()


def test_a_journal_left_behind_waits_to_be_resumed(journal_path):
    with Journal.create(journal_path, HEADER) as journal:
        journal.append(FULL)
    error = fault(Journal.create, journal_path, HEADER)
    assert "unfinished" in error.message and "--resume" in error.hint
    with Journal.resume(journal_path) as journal:
        assert journal.measurements == [FULL]


def test_somebody_elses_file_is_left_alone(journal_path):
    for content in ("dear diary", "dear diary\n", '{"kind": "x"}'):
        journal_path.write_text(content)
        assert "is not a bsprof journal" in fault(Journal.create, journal_path, HEADER).message
        fault(Journal.resume, journal_path)
        assert journal_path.read_text() == content


def test_where_no_journal_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    missing = tmp_path / "no" / "r.journal"
    assert fault(Journal.create, missing, HEADER).message == f"{missing}: there is no directory {missing.parent}"
    assert "not a directory" in fault(Journal.create, tmp_path / "file" / "r.journal", HEADER).message
    assert "no such file" in fault(Journal.resume, tmp_path / "r.journal").message
    with pytest.raises(BsprofError, match=r"r\.journal: (no space left|file too large)"):
        Journal.create(tmp_path / "r.journal", HEADER, reserve_bytes=2**60)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_without_write_permission_is_known_before(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("permissions do not bind this user (root)")
    assert "permission denied" in fault(Journal.create, tmp_path / "locked" / "r.journal", HEADER).message
    assert "permission denied" in fault(save, RESULT, tmp_path / "locked" / "r.json").message


def test_without_fallocate_the_free_space_is_asked(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert "no space left" in fault(lambda: Journal.create(tmp_path / "j", HEADER, reserve_bytes=2**60)).message
    Journal.create(tmp_path / "j", HEADER, reserve_bytes=1 << 20).close()


# --- journal: real processes ------------------------------------------------------------------------

# What the children do is told by a name; they run this very file, so that they share its measurements.
ROLES = {}


def role(function):
    ROLES[function.__name__] = function
    return function


@role
def append_for_ever(path):
    journal = Journal.create(path, HEADER)
    for count in range(10**9):
        journal.append(msgspec.structs.replace(FULL, wall_s=float(count)))
        print(count, flush=True)


@role
def hold(path):
    with Journal.create(path, HEADER) as journal:
        journal.append(FULL)
        print("held", flush=True)
        sys.stdin.read()


@role
def fill_the_disk(path):
    """Append until the disk is full, then make room and go on; on a file system of 1 MB."""
    try:
        Journal.create(path.with_name("other"), HEADER, reserve_bytes=2 << 20)
    except BsprofError as error:
        assert error.message == f"{path.with_name('other')}: no space left on device", error.message
    assert not list(path.parent.iterdir())

    journal = Journal.create(path, HEADER)
    ballast = path.with_name("ballast")
    ballast.write_bytes(bytes(600_000))
    long = msgspec.structs.replace(FAILED, outcome=Outcome(kind="error", traceback="x" * 30_000))
    count = 0
    try:
        while True:
            journal.append(long)
            count += 1
    except BsprofError as error:
        assert error.message == f"{path}: no space left on device", error.message
    assert 5 < count == len(journal.measurements)
    assert path.read_bytes().count(b"\n") == 1 + count and path.read_bytes().endswith(b"\n")

    large = Result(created="", plan=PLAN, environment=ENVIRONMENT, measurements=[long] * 100)
    try:
        save(large, path.with_name("r.json"))
    except BsprofError as error:
        assert error.message == f"{path.with_name('r.json')}: no space left on device", error.message
    assert sorted(p.name for p in path.parent.iterdir()) == ["ballast", path.name]

    ballast.unlink()
    journal.append(FULL)
    journal.close()
    assert Journal.resume(path).measurements == [long] * count + [FULL]
    print("survived", flush=True)


def start(name, path):
    command = [sys.executable, __file__, name, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(bsprof.store.__file__).parents[1])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("appended", [1, 30])
def test_kill_9_while_appending_loses_nothing_that_was_appended(journal_path, appended):
    with start("append_for_ever", journal_path) as child:
        for _ in range(appended):
            last = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in child.stdout.read().splitlines())])
    with Journal.resume(journal_path) as journal:
        walls = [measurement.wall_s for measurement in journal.measurements]
        assert walls == [float(count) for count in range(len(walls))]
        assert len(walls) > last
        journal.append(FAILED)


def test_two_processes_do_not_share_a_journal(journal_path):
    with start("hold", journal_path) as child:
        assert child.stdout.readline() == "held\n"
        for call in (lambda: Journal.create(journal_path, HEADER), lambda: Journal.resume(journal_path)):
            assert fault(call).message == f"{journal_path}: another bsprof is writing this journal"
        child.send_signal(signal.SIGKILL)
    with Journal.resume(journal_path) as journal:  # the lock died with its process
        assert journal.measurements == [FULL]


def test_a_journal_discarded_while_another_waits_at_it_is_not_written_to(journal_path, monkeypatch):
    """The second opens the file, the first discards it, the second locks it: it would write to a nameless file."""
    first = Journal.create(journal_path, HEADER)
    real = fcntl.flock

    def discarded_before(file, operation):
        monkeypatch.setattr(fcntl, "flock", real)
        first.discard()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", discarded_before)
    second = Journal.create(journal_path, HEADER)
    second.append(FULL)
    second.close()
    assert Journal.resume(journal_path).measurements == [FULL]


def test_a_full_disk_costs_the_line_that_does_not_fit_and_no_other(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("no unshare: a small file system cannot be mounted for this test alone")
    mount = "mount -t tmpfs -o size=1m tmpfs"
    probe = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} "$0"', str(tmp_path)], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {probe.stderr.strip()}")
    script = f'{mount} "$0" && exec "$@"'
    command = [sys.executable, __file__, "fill_the_disk", str(tmp_path / "r.journal")]
    environment = {**os.environ, "PYTHONPATH": str(Path(bsprof.store.__file__).parents[1])}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, str(tmp_path), *command], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "survived\n", done.stderr


if __name__ == "__main__":
    ROLES[sys.argv[1]](Path(sys.argv[2]))
