"""Several ranks on a terminal: the table, the bar, sentences and predictions."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from worlds import all_reduces, result, world

from bsprof.metrics import summarise
from bsprof.model import Outcome
from bsprof.report.figures import MISSING, amount
from bsprof.report.scaling import render_scaling
from bsprof.report.terminal import render
from bsprof.report.words import summary

replace = msgspec.structs.replace
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def text_of(one, width=140, **options):
    stream = io.StringIO()
    render(one, Console(file=stream, width=width, **options))
    return stream.getvalue()


def section(one, width=140, **options):
    stream = io.StringIO()
    render_scaling(one, summarise(one), Console(file=stream, width=width, **options))
    return stream.getvalue()


def flat(text):
    return " ".join(text.split())


def told(one):
    return "\n".join(summary(one))


def table(text):
    """Return the first table's rows, a list of cells each, the header first."""
    lines = text.splitlines()
    (rule, *_) = (place for place, line in enumerate(lines) if set(line.strip()) == {"─"})
    end = next(place for place in range(rule, len(lines)) if not lines[place].strip())
    return [re.split(r" {2,}", line.strip()) for line in (lines[rule - 1], *lines[rule + 1 : end])]


@pytest.fixture(scope="module")
def worlds():
    """1, 2 and 4 ranks; of four the last waits for its data."""
    return result(
        world(1),
        world(2, exposed_ms=3.0),
        world(4, exposed_ms=5.0, more_ms={3: {"data": 12.0}}),
        all_reduce=all_reduces(noise=0.03),
    )


@pytest.fixture(scope="module")
def many_axes():
    cases = [
        world(size, batch_size=batch, comm_hook=hook if size > 1 else "none", amp=amp)
        for size in (1, 2, 4)
        for batch in (16, 32)
        for hook in (("none", "fp16") if size > 1 else ("none",))
        for amp in ("off", "bf16")
    ]
    return result(*cases, all_reduce=all_reduces())


@pytest.mark.parametrize("width", [80, 100, 120, 140, 200])
def test_every_line_fits_the_terminal(worlds, many_axes, width):
    for one in (worlds, many_axes):
        text = text_of(one, width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in section(one, width)


def test_one_rank_alone_has_no_section():
    assert section(result(world(1))) == ""
    assert "Scaling" not in text_of(result(world(1)))
    failed = replace(world(2), outcome=Outcome(kind="crash", message="rank 1: killed by SIGKILL"), samples=None)
    assert section(result(world(1), failed)) == ""


def test_the_whole_table_at_200_columns(worlds):
    header, *rows = table(section(worlds, 200))
    assert header == [
        "world", "step ms", "img/s", "efficiency", "compute", "communication", "skew", "loading", "exchanged MiB",
        "hidden", "bus GB/s", "late rank", "where a step goes",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["1", "2", "4"]
    one, two, four = rows
    assert one[3] == MISSING and re.fullmatch(r"95\.\d% ±0\.\d%", two[3])
    assert re.fullmatch(r"3\.\d+ ±0\.\d+", two[5]) and one[5] == MISSING
    assert two[8] == "13.4" and two[9] == "80%" and two[10] == "0.70"
    assert two[11] == "none" and four[11] == "3 data"


@pytest.mark.parametrize("width", [80, 140])
def test_what_counts_is_there_at_any_width(worlds, many_axes, width):
    for one in (worlds, many_axes):
        header = table(section(one, width))[0]
        assert {"world", "efficiency", "compute", "communication"} <= set(header)
    assert {"skew", "loading"} <= set(table(section(worlds, width))[0])


def test_columns_go_in_the_order_of_what_they_are_worth(worlds):
    seen = [set(table(section(worlds, width))[0]) for width in (200, 140, 120, 80)]
    assert "hidden" in seen[0] and "hidden" not in seen[-1]
    assert "where a step goes" in seen[1] and "where a step goes" not in seen[-1]
    assert "±" in section(worlds, 140).partition("efficiency:")[0]
    for wider, narrower in pairwise(seen):
        assert narrower <= wider


def test_without_colour_the_bar_is_made_of_letters(worlds):
    bars = [row[-1] for row in table(section(worlds, 140))[1:]]
    for bar in bars:
        assert re.fullmatch(r"c+x*s*l*", bar) and len(bar) == 24
    assert "x" not in bars[0] and "x" in bars[1] and "s" in bars[2]
    assert "bar: c compute, x communication, s skew, l loading" in flat(section(worlds, 140))


def test_with_colour_it_is_blocks(worlds, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = section(worlds, 140, force_terminal=True)
    assert "█" in text and "cccc" not in text


def test_the_legend_says_what_was_held_against_what(worlds):
    text = flat(section(worlds))
    assert "Scaling · weak: the same batch of each rank" in text
    assert "efficiency: img/s a rank / img/s a rank in a world of 1, ± 95 % interval within a process" in text
    assert "they add up to the mean step" in text
    without_one = flat(section(result(world(2), world(4))))
    assert "in a world of 2, the smallest measured" in without_one
    strong = section(result(world(1, batch_size=64), world(2, scale=0.5), scaling="strong"))
    assert "strong: the same batch of all ranks together" in strong
    several = result(*(world(size, process=process) for size in (1, 2) for process in (0, 1)))
    assert "between processes" in flat(section(several))


def test_skew_is_told_by_phase(worlds):
    text = flat(section(worlds))
    assert re.search(r"world 4: the longest of the ranks - their mean: data (9\.0|8\.9)\d ms Predicted", text)


def test_what_was_not_captured_is_a_dash():
    bare = world(2)
    ranks = tuple(replace(rank, blocks=[], before_reduce_ns=None) for rank in bare.ranks)
    both = result(world(1), replace(bare, ranks=ranks, communication=None))
    header, _, row = table(section(both, 140))
    assert "communication" not in header and "late rank" not in header and "exchanged" not in " ".join(header)
    assert dict(zip(header, row, strict=True))["compute"] == MISSING
    assert "2 ranks have" in told(both)


# --- larger worlds ------------------------------------------------------------------------------------


def test_predictions_are_labelled_and_checked(worlds):
    text = flat(section(worlds))
    assert "Predicted for larger worlds · not measured" in text
    assert re.search(r" 8 +\d+\.\d+ ±\d+\.\d+ ", section(worlds))
    assert "ring model of 18 all-reduces measured by gloo: latency" in text
    assert re.search(r"check, without having seen it: all-reduce of 64\.0 MiB between 4 ranks predicted", text)
    assert "do not rely on" not in text


def test_without_measured_all_reduces_nothing_is_predicted():
    assert "Predicted" not in text_of(result(world(1), world(2)))


def test_a_model_that_fails_its_check_says_so():
    points = [replace(one, seconds=one.seconds * 5) if one.bytes == 2**26 else one for one in all_reduces()]
    text = flat(section(result(world(2), all_reduce=tuple(points))))
    assert "the interval misses it, so do not rely on the prediction" in text


def test_hidden_communication_is_not_extrapolated():
    text = flat(section(result(world(2, exposed_ms=-2.0), all_reduce=all_reduces())))
    assert "none: there is no exposed communication above zero" in text


# --- in words -----------------------------------------------------------------------------------------


def test_words_tell_the_efficiency_and_what_costs_the_most():
    text = told(result(world(1), world(4, exposed_ms=8.0)))
    assert re.search(
        r"4 ranks have 3\.5\d times the img/s of one, an efficiency of 8\d% \[8\d%, 8\d%\] within a process; "
        r"what costs the most is communication that no computing hides, \d\.\d+ ms \(\d+% of the step\)\.",
        text,
    )
    assert "others wait" not in text


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"more_ms": {1: {"forward": 20.0}}}, "ranks are not equally fast, 15"),
        ({"scale": 1.2}, "computing, which takes 1"),
        ({"more_ms": {rank: {"data": 9.0} for rank in range(4)}}, "loading, which takes"),
        ({"exposed_ms": 0.3}, "nothing surely costs more than 1.0% of the step"),
    ],
)
def test_words_name_each_kind_of_loss(made, words):
    assert words in told(result(world(1), world(4, **{"exposed_ms": 0.0, **made})))


def test_words_claim_no_loss_that_intervals_do_not_show():
    loose = [world(size, exposed_ms=0.5, scale=s, process=i) for size in (1, 2) for i, s in enumerate((1.0, 1.1))]
    assert "not distinguishable from 100%" in told(result(*loose))
    noisy = told(result(world(2, exposed_ms=0.0, jitter=0.1)))
    assert "communication that" not in noisy


def test_words_name_the_rank_that_others_wait_for():
    text = told(result(world(1), world(2, more_ms={1: {"forward": 20.0}})))
    assert re.search(
        r"world 2: others wait for rank 1 in 100% of the steps, 20\.\d ms a step in the median: "
        r"its forward takes 20\.\d ms longer\.",
        text,
    )
    backward = told(result(world(2, more_ms={0: {"before": 9.0}})))
    assert "Others wait for rank 0 in" in backward and "its backward, up to its first gradients, takes" in backward


def test_words_without_a_smaller_world_say_how_to_get_one():
    text = told(result(world(4, exposed_ms=9.0)))
    assert "There is no smaller world to hold 4 ranks against" in text and "`--world-size 1,4`" in text
    assert "what costs the most is communication" in text


def test_words_of_several_processes():
    late = [world(size, more_ms={1: {"data": 9.0}}, process=i) for size in (1, 2) for i in (0, 1, 2)]
    text = told(result(*late))
    assert "between 3 and 3 processes" in text and "(in 3 of 3 processes)" in text


def test_words_of_the_largest_world_alone(many_axes):
    text = told(many_axes)
    assert text.count("an efficiency of") == 1
    assert re.search(r"batch \d+, amp \w+, hook \w+: 4 ranks have", text)


# --- what the house asks ------------------------------------------------------------------------------


def test_the_page_explains_every_column(worlds):
    page = PAGE.read_text(encoding="utf-8")
    text = section(worlds, 200)
    lines = text.splitlines()
    headers = [lines[place - 1] for place, line in enumerate(lines) if set(line.strip()) == {"─"}]
    assert len(headers) == 2
    for header in headers:
        for name in re.split(r" {2,}", header.strip()):
            assert f"| {re.sub(r' (ms|MiB)$', '', name)} |" in page, name


def test_bandwidths_are_written_as_links_are_sold():
    assert amount("B/s", 1.25e9) == "1.25 GB/s"
    assert amount("B/s", 812e6) == "812 MB/s"
