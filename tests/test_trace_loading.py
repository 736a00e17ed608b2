"""The trace of a loader: what the format asks of every event, and that it shows what was recorded."""

import gzip
import json
import random
from collections import defaultdict

import msgspec
import pytest
from loadings import Cost, consumer_only, loading, with_holes

from bsprof.errors import BsprofError
from bsprof.loading import MAIN, Batches, Loading
from bsprof.report.trace import chrome_trace, write_trace

PHASES = {"X", "M", "C", "i", "s", "t", "f"}


def nanoseconds(event):
    """The moments of an event as Perfetto reads them: multiplied in floats, and cut off."""
    start = int(event["ts"] * 1000.0)
    return start, start + int(event.get("dur", 0.0) * 1000.0)


def strict(loading):
    """The trace of a loading, by way of JSON that holds no NaN, after the rules of the format."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    trace = json.loads(json.dumps(chrome_trace(loading), allow_nan=False), parse_constant=refuse)
    events = trace["traceEvents"]
    named = {(event["pid"], event["tid"]) for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    processes = {event["pid"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    lanes = defaultdict(list)
    for event in events:
        assert event["ph"] in PHASES
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["ts"], float)
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named
            lanes[event["pid"], event["tid"]].append(event)
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())
    for spans in lanes.values():
        assert_nested(spans)
    assert_flows(events, lanes)
    return events


def assert_nested(spans):
    running = []
    for start, end in sorted(map(nanoseconds, spans), key=lambda span: (span[0], -span[1])):
        while running and running[-1] <= start:
            running.pop()
        assert not running or end <= running[-1], "two spans of a lane overlap"
        running.append(end)


def assert_flows(events, lanes):
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
    for points in flows.values():
        assert [point["ph"] for point in points] == ["s", *"t" * (len(points) - 2), "f"]
        assert len(points) >= 2 and points[-1]["bp"] == "e"
        assert [point["ts"] for point in points] == sorted(point["ts"] for point in points)
        for point in points:
            at, _ = nanoseconds(point)
            around = [nanoseconds(span) for span in lanes[point["pid"], point["tid"]]]
            assert any(start <= at < end for start, end in around), "an end of an arrow hangs in the air"


def lane_names(events):
    return {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}


def spans_of(events, lane, name=None):
    tid = lane_names(events)[lane]
    spans = [event for event in events if event["ph"] == "X" and event["tid"] == tid]
    return [event for event in spans if name in (None, event["name"])]


@pytest.mark.parametrize(
    "planted",
    [
        {},
        {"workers": 0},
        {"workers": 5, "in_order": False, "factors": (1.0, 4.0)},
        {"workers": 3, "epochs": 3, "factors": (1.0, 1.0, 6.0)},
        {"workers": 2, "epochs": 2, "persistent": True, "pin_s": 0.001},
        {"workers": 64, "batches": 200},
        {"batches": 1},
        {"kind": "fastest", "style": "iterable", "serialise_s": 0.0},
    ],
    ids=str,
)
def test_every_event_keeps_the_rules_of_the_format(planted):
    strict(loading(**planted))


def test_each_worker_and_each_thread_has_a_lane():
    lanes = lane_names(strict(loading(workers=2, pin_s=0.001)))

    assert set(lanes) == {
        "main thread", "pin thread", "worker 0", "worker 0 feeder thread", "worker 1", "worker 1 feeder thread",
    }  # fmt: skip


def test_a_batch_is_drawn_when_it_was_made_with_what_it_cost():
    found = loading(workers=2, stages={"decode": Cost(0.004, 0.002), "own": Cost(0.001)}, batches=10)
    events = strict(found)

    fetches = sorted(spans_of(events, "worker 0", "fetch"), key=lambda event: event["args"]["order"])
    mine = [i for i, worker in enumerate(found.batches.worker) if worker == 0]
    first, index = fetches[0], mine[0]
    assert len(fetches) == len(mine)
    assert nanoseconds(first) == (found.batches.begun_at_ns[index], found.batches.produced_at_ns[index])
    args = first["args"]
    assert (args["epoch"], args["order"], args["samples"], args["bytes"]) == (0, 0, 16, found.batches.bytes[index])
    assert args["stage decode ms"] == pytest.approx(found.batches.stage_ns["decode"][index] / 1e6)
    assert args["cpu_ms"] + args["run_queue_ms"] + args["blocked_ms"] == pytest.approx(first["dur"] / 1000)
    assert not any("decode" in event["name"] for event in events)  # a sum over samples has no place in time


def test_the_main_thread_alternates_between_waiting_and_its_own_steps():
    found = loading(workers=2, batches=10, step_s=0.01)
    calls = sorted(spans_of(strict(found), "main thread"), key=lambda event: event["ts"])

    assert [call["name"] for call in calls] == ["iter()", *["next()", "step"] * 10, "next() at the end"]
    steps = [call["dur"] for call in calls if call["name"] == "step"]
    assert steps == pytest.approx([10_000.0] * 10)


def test_without_workers_batches_are_made_inside_of_next():
    events = strict(loading(workers=0, batches=5))
    calls, fetches = spans_of(events, "main thread", "next()"), spans_of(events, "main thread", "fetch")

    assert len(calls) == len(fetches) == 5
    for call, fetch in zip(map(nanoseconds, calls), map(nanoseconds, fetches), strict=True):
        assert call[0] <= fetch[0] <= fetch[1] <= call[1]
    assert not [event for event in events if event["ph"] in "stf"]


def test_an_arrow_leads_from_the_worker_to_the_call_that_returned_its_batch():
    found = loading(workers=1, batches=6, stages={"decode": Cost(0.05)})
    events = strict(found)
    arrows = {event["id"] for event in events if event["ph"] == "s"}

    assert len(arrows) == 6
    tid = lane_names(events)["main thread"]
    assert all(event["tid"] == tid for event in events if event["ph"] == "f")


def test_ready_batches_are_counted_and_all_taken_in_the_end():
    events = strict(loading(workers=2, prefetch=4, batches=20))
    depths = [event["args"]["batches"] for event in events if event["name"] == "ready batches"]

    assert 0 < max(depths) <= 8
    assert min(depths) == 0 and depths[-1] == 0


def test_memory_and_the_ends_of_epochs_are_there():
    found = loading(workers=1, batches=5, epochs=2, memory_bytes=1 << 20)
    events = strict(found)

    memory = [event["args"]["MiB"] for event in events if event["name"] == "private memory of worker 0"]
    assert memory == [1.0] * 10
    instants = [event["name"] for event in events if event["ph"] == "i"]
    assert instants == ["epoch 0 begins", "epoch 0 ends", "epoch 1 begins", "epoch 1 ends"]


def test_what_was_not_captured_is_not_drawn():
    events = strict(consumer_only(batches=4))

    assert set(lane_names(events)) == {"main thread"}
    assert not [event for event in events if event["ph"] in "Cstf"]
    waits = spans_of(events, "main thread", "next()")
    assert len(waits) == 4
    assert set(waits[0]["args"]) == {"epoch", "order"}


def test_nothing_recorded_is_a_valid_trace():
    strict(consumer_only(batches=0))


def test_two_passes_at_a_time_get_lanes_of_their_own():
    once = loading(workers=1, batches=6)
    both = {
        name: value + [at + 1_700_000 if at is not None and name.endswith("at_ns") else at for at in value]
        for name, value in msgspec.to_builtins(once.batches).items()
        if name != "stage_ns"
    }
    stages = {name: times * 2 for name, times in once.batches.stage_ns.items()}
    twice = msgspec.structs.replace(once, batches=Batches(**both, stage_ns=stages))

    assert "worker 0 (2)" in lane_names(strict(twice))


def test_names_that_are_no_text_are_made_such():
    found = loading(workers=1, batches=3, stages={"\x1b[31m\ud800" + "x" * 300: Cost(0.001)})
    settings = msgspec.structs.replace(found.settings, dataset="<locals>\x00\n")
    json.loads(msgspec.json.encode(chrome_trace(msgspec.structs.replace(found, settings=settings))))


def test_every_nanosecond_comes_back():
    luck = random.Random(1)
    moments = sorted(luck.randrange(10 ** luck.randrange(3, 16)) for _ in range(2000))
    found = consumer_only(batches=1000)
    asked, got = moments[::2], moments[1::2]
    batches = msgspec.structs.replace(found.batches, asked_at_ns=asked, got_at_ns=got)
    events = strict(msgspec.structs.replace(found, batches=batches, epochs=()))

    assert sorted(nanoseconds(event)[0] for event in events if event["name"] == "next()") == asked


@pytest.mark.parametrize("seed", range(5))
def test_holes_in_a_recording_do_no_harm(seed):
    strict(with_holes(loading(workers=3, batches=20, epochs=2, pin_s=0.0005), random.Random(seed), 0.3))


def test_a_trace_is_written_whole_and_gzipped_by_its_name(tmp_path):
    found: Loading = loading(batches=5)
    plain, packed = tmp_path / "trace.json", tmp_path / "trace.json.gz"
    write_trace(found, plain)
    write_trace(found, packed)

    assert json.loads(plain.read_bytes()) == json.loads(gzip.decompress(packed.read_bytes()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json", "trace.json.gz"]


def test_a_trace_that_cannot_be_written_names_its_path(tmp_path):
    with pytest.raises(BsprofError, match="as JSON"):
        write_trace(loading(batches=2), tmp_path / "trace.txt")
    with pytest.raises(BsprofError, match="missing"):
        write_trace(loading(batches=2), tmp_path / "missing" / "trace.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BsprofError, match="not a regular file"):
        write_trace(loading(batches=2), tmp_path / "folder.json")


def test_a_main_thread_that_makes_batches_is_no_worker():
    assert MAIN not in {
        event["args"].get("worker") for event in strict(loading(workers=0, batches=3)) if event["ph"] == "X"
    }
