"""A diagnosis as text: what stands where, at every width, and nothing that was not captured."""

import io
import random
import re

import msgspec
import pytest
from loadings import Cost, consumer_only, loading, with_holes
from rich.cells import cell_len
from rich.console import Console

from bsprof import cli
from bsprof.diagnosis import diagnose
from bsprof.loading import (
    Batches,
    Cause,
    Diagnosis,
    LoaderSettings,
    Loading,
    Prediction,
    ProbeCost,
    Rate,
    SampleTimes,
    SlowSample,
    Verification,
    Worker,
)
from bsprof.noun import Note
from bsprof.report.loading import render_loading, render_short

TOO_FEW = Cause(
    code="too_few_workers",
    text="Making a batch takes 47 ms and the step could take one every 10 ms, but 2 workers make them (25 % of cores).",
    evidence={"workers": 2},
    gives_back=0.52,
    gives_back_low=0.45,
    gives_back_high=0.57,
    prescription="more workers: as many as the step can take",
    change={"num_workers": 6, "prefetch_factor": 2},
    not_separable_from=("slow_stage", "lock"),
)
SLOW = Cause(
    code="slow_stage",
    text="decode takes 71 % of the workers' CPU time.",
    evidence={"stage": "decode"},
    gives_back=0.034,
    prescription="decode once and keep what it gives",
    code_change=f"image = decode_jpeg(read_file(path))  # {'much ' * 30}more\nif image is None:\n    pass",
)
GROWTH = Cause(
    code="memory_growth",
    text="Each worker grows by 12 MiB a minute.",
    evidence={},
    gives_back=None,
    prescription="keep the index in an array",
)


def predicted(workers, prefetch, rate, speedup, **more):
    return Prediction(
        workers=workers,
        prefetch=prefetch,
        step_s=16 / rate,
        samples_per_s=rate,
        speedup=speedup,
        speedup_low=speedup * 0.9,
        speedup_high=speedup * 1.2,
        **more,
    )


PREDICTIONS = (
    predicted(0, None, 50.0, 0.5),
    *(predicted(workers, prefetch, 50.0 * workers, workers / 2) for workers in (1, 2, 4, 6) for prefetch in (1, 2, 8)),
)


def diagnosis(**changes):
    made = Diagnosis(
        verdict="highly_input_bound",
        sentence="Input-bound: the step waits 41 ms of 63 ms (65 %); 2 workers deliver 120 samples/s.",
        step_s=0.063,
        wait_s=0.041,
        busy_s=0.022,
        wait_share=0.65,
        delivered_per_s=120.0,
        possible_per_s=310.0,
        contention_s=0.002,
        waits_s={"production": 0.035, "ordering": 0.004, "handoff": 0.0012, "epoch": 0.0008},
        causes=(TOO_FEW, SLOW, GROWTH),
        predictions=PREDICTIONS,
        best=next(one for one in PREDICTIONS if (one.workers, one.prefetch) == (6, 2)),
    )
    return msgspec.structs.replace(made, **changes)


UNKNOWN = Diagnosis(
    verdict="unknown",
    sentence="Nothing is known.",
    step_s=None,
    wait_s=None,
    busy_s=None,
    wait_share=None,
    delivered_per_s=None,
    possible_per_s=None,
)

AGREES = Verification(
    change={"num_workers": 6},
    predicted=Rate(value=2.1, low=1.8, high=2.3),
    measured=Rate(value=1.95, low=1.9, high=2.0),
    before_s=[0.064, 0.062],
    after_s=[0.032, 0.032],
    agrees=True,
)


def text_of(found, judged, width=100, **options):
    stream = io.StringIO()
    render_loading(found, judged, Console(file=stream, width=width), **options)
    return stream.getvalue()


def flat(text):
    """Text as one line, wherever it was wrapped."""
    return " ".join(text.split())


def table(text, heading):
    """The lines of the table under a heading, without its header."""
    lines = text[text.index(f"\n{heading}") :].strip().splitlines()
    rule = next(index for index, line in enumerate(lines) if set(line.strip()) == {"─"})
    end = next((index for index, line in enumerate(lines) if index > rule and not line.strip()), len(lines))
    return lines[rule + 1 : end]


def bare(found: Loading) -> Loading:
    """The same batches with nothing known of them but that they came."""
    kept = ("epoch", "order", "worker")
    hidden = [None] * len(found.batches.epoch)
    fields = {
        name: getattr(found.batches, name) if name in kept else hidden
        for name in Batches.__struct_fields__
        if name != "stage_ns"
    }
    return Loading(
        settings=LoaderSettings(kind="DataLoader"),
        consumer=found.consumer,
        window_ns=found.window_ns,
        batches=Batches(**fields, stage_ns={}),
    )


def everything():
    """A loading with something to say in every table."""
    found = loading(
        workers=2,
        batches=40,
        epochs=2,
        stages={"read": Cost(0.0002, 0.004), "decode": Cost(0.03), "own": Cost(0.002)},
        slow_index=(417, 0.4),
        blocked_in={"futex_wait_queue": 30, "hrtimer_nanosleep": 10},
        memory_growth=20000,
        pickled_epoch_bytes=5 << 20,
        process_cpu=1.2,
    )
    notes = (Note(code="short", text="It was watched for less than a second."),)
    capacity = Rate(value=8.0, low=7.84, high=8.16)
    return msgspec.structs.replace(found, notes=notes, dropped=3, capacity_cores=capacity)


LOADINGS = {
    "everything": everything(),
    "no workers": loading(workers=0, batches=20),
    "pinned, out of order": loading(workers=3, in_order=False, pin_s=0.001, factors=(1.0, 3.0)),
    "fastest": loading(kind="fastest", style="iterable"),
    "64 workers": loading(workers=64, batches=300),
    "one batch": loading(batches=1),
    "no batch": consumer_only(batches=0),
    "consumer only": consumer_only(),
    "nulls": bare(loading(batches=12)),
    "long names": msgspec.structs.replace(
        loading(stages={"torchvision.transforms.v2.RandomApply" * 6: Cost(0.004), "解码": Cost(0.001)}),
        settings=LoaderSettings(kind="x" * 300, dataset="\x1b[31m<Images at 0x7f>\n\ud800"),
    ),
}


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("name", LOADINGS)
def test_it_fits_every_width(name, width):
    for judged in (diagnosis(), UNKNOWN, diagnose(LOADINGS[name], predictions=False)):
        text = text_of(LOADINGS[name], judged, width, sweep=True, verifications=(AGREES,))
        code = [f"         {line}" for line in SLOW.code_change.splitlines()]
        for line in text.splitlines():
            assert cell_len(line) <= width or line in code
            assert line == line.rstrip()


@pytest.mark.parametrize("name", LOADINGS)
def test_an_ascii_terminal_can_show_it(name):
    text = text_of(LOADINGS[name], diagnosis(), sweep=True, verifications=(AGREES,))
    others = {character for character in text if not character.isascii() and ord(character) not in cli._PLAIN}
    assert others <= {*"解码", "\N{REPLACEMENT CHARACTER}"}  # what a user's own name holds


@pytest.mark.parametrize("name", LOADINGS)
def test_nothing_in_it_steers_a_terminal(name):
    text = text_of(LOADINGS[name], diagnosis())
    assert all(character.isprintable() or character == "\n" for character in text)


def test_the_sections_stand_in_order():
    text = text_of(everything(), diagnosis(), sweep=True, verifications=(AGREES,))
    headings = [
        "Input-bound", "Causes", "Risks", "Verified", "Predicted", "Where a batch's time goes",
        "What a mean step waits for", "2 workers", "Slowest samples", "Batches that were ready", "  start-up",
        "  bsprof", "  ! It was watched", "  ! 3 batches",
    ]  # fmt: skip
    places = [text.index(heading if not index else f"\n{heading}") for index, heading in enumerate(headings)]
    assert places == sorted(places)


def test_the_verdict_comes_first_and_is_bold_where_it_can_be():
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system="standard")
    render_loading(everything(), diagnosis(), console)
    assert re.match(r"\x1b\[1;31mInput-bound:\x1b\[0m the step waits 41 ms of 63 ms", stream.getvalue())

    assert text_of(everything(), diagnosis()).startswith("Input-bound: the step waits 41 ms of 63 ms (65%);")


def test_a_cause_is_told_with_its_gain_its_cure_and_what_cannot_be_told_from_it():
    text = flat(text_of(everything(), diagnosis()))

    assert "1. too few workers 52% [45%, 57%] Making a batch takes 47 ms" in text
    assert "→ more workers: as many as the step can take DataLoader(…, num_workers=6, prefetch_factor=2)" in text
    assert "does not separate it from: slow stage, lock" in text
    assert "2. slow stage: decode 3.4% decode takes 71% of the workers' CPU time." in text


def test_a_change_is_not_written_twice():
    twice = msgspec.structs.replace(TOO_FEW, prescription="num_workers=6, prefetch_factor=2.")
    assert text_of(loading(), diagnosis(causes=(twice,), best=None)).count("num_workers=6") == 1


def test_a_wait_that_nobody_saw_into_is_said_to_be_one():
    rows = table(text_of(consumer_only(), diagnosis(waits_s={"epoch": 0.001})), "What a mean step waits for")
    assert [row.split()[:4] for row in rows] == [["epoch", "1.0", "1.6%"], ["not", "told", "41.0", "65%"]]


def test_code_is_neither_wrapped_nor_cut():
    lines = text_of(everything(), diagnosis(), 80).splitlines()
    start = next(index for index, line in enumerate(lines) if "decode_jpeg" in line)
    assert [line[9:] for line in lines[start : start + 3]] == SLOW.code_change.splitlines()


def test_a_risk_stands_apart_from_what_costs_time():
    text = text_of(everything(), diagnosis(causes=(GROWTH, TOO_FEW)))
    causes, _, risks = text.partition("\nRisks")
    assert "1. too few workers" in causes and "memory growth" not in causes
    assert "! memory growth" in risks


def test_a_healthy_loader_has_no_causes_to_list():
    text = text_of(loading(), diagnosis(verdict="not_input_bound", causes=(), sentence="Not input-bound."))
    assert "Causes" not in text and "Risks" not in text


def test_stages_are_split_into_what_the_thread_did():
    rows = table(text_of(everything(), diagnosis()), "Where a batch's time goes")
    cells = {row.replace("making it", "").split()[0]: row.split() for row in rows if "lying" not in row}
    assert float(cells["decode"][1]) == pytest.approx(30.0, rel=0.05)
    assert float(cells["decode"][2]) == pytest.approx(30.0, rel=0.05)
    assert float(cells["read"][-3 if "█" in cells["read"][-1] else -2]) == pytest.approx(4.0, rel=0.05)  # blocked
    assert cells["serialise"][2:5] == ["–"] * 3  # noqa: RUF001 - its CPU time is not captured, which is no 0


def test_what_was_not_captured_is_left_out_or_a_dash():
    text = text_of(consumer_only(), UNKNOWN)

    assert "is not captured: only next() was seen" in flat(text)
    for absent in ("Causes", "workers", "Slowest", "ready when", "bsprof", "machine", "cached"):
        assert absent not in text
    assert "wait" not in text_of(bare(loading(batches=12)), UNKNOWN)


def test_run_queue_that_is_not_known_is_no_column():
    found = loading()
    batches = msgspec.structs.replace(found.batches, runqueue_ns=[None] * len(found.batches.epoch))
    text = text_of(msgspec.structs.replace(found, batches=batches), diagnosis())
    header = next(line for line in text.splitlines() if line.startswith("  worker "))
    assert "CPU" in header and "run-queue" not in header and "blocked" not in header


def test_the_wait_is_split_by_what_was_awaited():
    rows = table(text_of(loading(), diagnosis()), "What a mean step waits for")
    assert [row.split()[:3] for row in rows] == [
        ["production", "35.00", "56%"],
        ["ordering", "4.00", "6.3%"],
        ["hand-off", "1.20", "1.9%"],
        ["epoch", "0.80", "1.3%"],
    ]


def test_few_workers_have_a_row_each_and_many_are_folded():
    few = table(text_of(loading(workers=3), diagnosis()), "3 workers")
    assert [row.split()[0] for row in few] == ["0", "1", "2"]

    slow = {number: 1 + number / 20 for number in range(20)}
    many = table(text_of(loading(workers=20, batches=200, worker_factors=slow), diagnosis()), "20 workers")
    assert [row.split()[0] for row in many] == ["least", "middle", "most"]
    fetches = [float(row.split()[2]) for row in many]
    assert fetches == sorted(fetches) and fetches[2] > 1.7 * fetches[0]


def test_a_worker_that_died_is_named():
    found = loading(workers=1)
    died = msgspec.structs.replace(found.workers[0], ended="died", pid=77)
    assert "worker 0 (pid 77) died" in text_of(msgspec.structs.replace(found, workers=(died,)), diagnosis())


def test_slow_samples_are_named_with_each_time_they_took():
    rows = table(text_of(everything(), diagnosis()), "Slowest samples")
    assert rows[0].split()[:3] == ["417", "0", "400.0"]
    assert rows[0].split()[-2:] == ["400", "400"]

    samples = SampleTimes(
        count=10,
        mean_ns=1e6,
        quantiles_ns={"p50": 1_000_000, "max": 9_000_000},
        slowest=(SlowSample(index="x" * 200, worker=-1, times_ns=[9_000_000] * 9),),
    )
    text = text_of(msgspec.structs.replace(loading(), samples=samples), diagnosis(), 120)
    assert re.search(r"x{39}… +main +9\.00 +9\.00× +9\.00 9\.00 9\.00 9\.00 … \(9 times\)", text)  # noqa: RUF001


def test_ready_batches_are_a_histogram_of_all_calls():
    rows = table(text_of(loading(workers=2, prefetch=4, step_s=0.05), diagnosis()), "Batches that were ready")
    shares = [float(re.search(r"([\d.]+)%", row)[1]) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert rows[-1].count("█") > rows[0].count("█")


def test_what_watching_cost_is_a_share_of_the_time_it_was_part_of():
    found = loading(workers=1, batches=10, stages={"decode": Cost(0.01)}, collate=Cost(), jitter=0.0)
    found = msgspec.structs.replace(found, probe=ProbeCost(batch_ns=50_000, sample_ns=100, stage_ns=500))
    text = flat(text_of(found, diagnosis()))
    # 50 µs + 16 samples of 100 ns + 16 calls of 500 ns, of 10 ms
    assert "50.0 µs a batch, 100 ns a sample, 500 ns a call of a stage: 0.60% of the time" in text


def test_one_line_each_for_what_needs_no_table():
    text = flat(text_of(everything(), diagnosis()))

    assert "iter() 4.00 ms · then the first batch" in text
    assert "5.0 MiB pickled for the workers (medians of 2 epochs)" in text
    assert "futex_wait_queue 30% · hrtimer_nanosleep 10% of 400 looks" in text
    assert "10.0 ms a step on batches that are there already" in text
    assert "lengthen the consumer's own part of the step by 2.00 ms, 9.1% of its 22.0 ms" in text
    assert "8.00 [7.84, 8.16] really ran at once" in text
    assert "num_workers=6, prefetch_factor=2 is the smallest setting within 2%" in text
    assert "predicted 3.00× [2.70, 3.60]" in text  # noqa: RUF001


def test_predictions_are_a_matrix_that_marks_the_measured_and_the_best():
    text = text_of(loading(workers=2, prefetch=8), diagnosis(), 80, sweep=True)
    rows = {row.split()[0]: row for row in table(text, "Predicted samples/s")}

    assert list(rows) == ["0", "1", "2", "4", "6"]
    assert rows["0"].split() == ["0", "50", "±10"]
    assert rows["2"].split() == ["2", "100", "±20", "100", "±20", "100", "±20", "m"]
    assert rows["6"].split() == ["6", "300", "±60", "300", "±60", "*", "300", "±60"]
    assert "Predicted samples/s" not in text_of(loading(), diagnosis())


def test_a_matrix_that_is_too_wide_is_split_and_loses_no_setting():
    rates = {prefetch: 1000.0 + prefetch for prefetch in range(1, 41)}
    made = tuple(predicted(2, prefetch, rate, 1.0) for prefetch, rate in rates.items())
    text = text_of(loading(), diagnosis(predictions=made, best=None), 80, sweep=True)
    assert all(re.search(rf"\b{rate:.0f}\b", text) for rate in rates.values())


def test_each_order_has_a_matrix_of_its_own():
    made = (predicted(2, 2, 100.0, 1.0), predicted(2, 2, 140.0, 1.4, in_order=False))
    text = text_of(loading(), diagnosis(predictions=made, best=made[1]), sweep=True)
    assert table(text, "Predicted samples/s by workers and prefetch, in order")[0].split() == ["2", "100", "±20", "m"]
    assert table(text, "Predicted samples/s by workers and prefetch, in any")[0].split() == ["2", "140", "±28", "*"]


def test_a_verification_stands_beside_its_prediction():
    differs = msgspec.structs.replace(AGREES, agrees=False, change={"in_order": False})
    text = flat(text_of(loading(), diagnosis(), verifications=(AGREES, differs)))
    assert "num_workers=6 predicted 2.10× [1.80, 2.30] · measured 1.95× [1.90, 2.00] · they agree" in text  # noqa: RUF001
    assert "63.0 ms → 32.0 ms a step, 2 rounds" in text
    assert "in_order=False" in text and "they DISAGREE" in text


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        (
            diagnosis(),
            "highly input-bound, waits 41.0 ms of 63.0 ms (65%): "
            "too few workers (52% of the step) → num_workers=6, prefetch_factor=2",
        ),
        (diagnosis(causes=(GROWTH,)), "highly input-bound, waits 41.0 ms of 63.0 ms (65%): memory growth → keep"),
        (diagnosis(causes=(), verdict="not_input_bound"), "not input-bound, waits 41.0 ms of 63.0 ms (65%)"),
        (UNKNOWN, "unknown"),
    ],
)
def test_a_case_has_one_line(judged, said):
    assert render_short(judged).plain.startswith(said)
    assert "\n" not in render_short(judged).plain


def test_a_worker_whose_memory_alone_is_known_has_a_row():
    found = msgspec.structs.replace(
        bare(loading(workers=1, batches=3)),
        workers=(
            Worker(
                id=0,
                pid=1,
                epoch=0,
                entered_at_ns=None,
                ready_at_ns=None,
                cores=None,
                torch_threads=None,
                threads=None,
                memory_at_ns=[0],
                private_bytes=[3 << 20],
            ),
        ),
    )
    assert [row.split() for row in table(text_of(found, UNKNOWN), "1 worker")] == [["0", "3", "3.00"]]


@pytest.mark.parametrize("seed", range(5))
def test_holes_in_a_recording_do_no_harm(seed):
    luck = random.Random(seed)
    found = with_holes(loading(workers=3, batches=20, epochs=2, pin_s=0.0005), luck, 0.0, 0.3, 1.0)
    dropped = {name: None for name in ("samples", "machine", "resources", "probe") if luck.random() < 0.5}
    text = text_of(msgspec.structs.replace(found, **dropped), UNKNOWN)
    assert "nan" not in text and "None" not in text
