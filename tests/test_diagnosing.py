"""`bsprof loader` as it is used: the real command on real loaders, good and bad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

from bsprof import store
from bsprof.diagnosing import _cure, _overlap
from bsprof.loading import Cause, Diagnosis, Prediction, Rate

TESTS = Path(__file__).parent


def loader(*arguments):
    return run(TESTS, "loader", *arguments)


def test_a_loader_is_diagnosed_saved_shown_and_drawn(tmp_path):
    result, trace = tmp_path / "loader.json.gz", tmp_path / "trace.json"
    done = loader(
        "loaders:make_loader", "--workers", "2", "--step-ms", "1", "--seconds", "0.5", "--sweep",
        "-o", str(result), "--trace", str(trace),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nput-bound" in done.stdout.splitlines()[0]
    assert "Predicted samples/s" in done.stdout
    saved = store.load(result)
    (measurement,) = saved.measurements
    assert saved.loader.arguments == {"num_workers": 2}
    assert measurement.loading.settings.workers == 2
    assert measurement.diagnosis.sentence.split(":")[0] in done.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    shown = run(tmp_path, "show", str(result))
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[0] == done.stdout.splitlines()[0]


def test_a_cure_is_applied_and_measured_in_turns(tmp_path):
    done = loader("loaders:loader", "--workers", "0", "--step-ms", "9", "--seconds", "1", "--verify", "-o", "-")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (verification,) = result["verifications"]
    assert verification["change"]["num_workers"] >= 1
    assert len(verification["before_s"]) == len(verification["after_s"]) == 4
    assert verification["measured"]["value"] > 1.2
    assert "predicted" in done.stderr


def test_a_models_step_is_taken():
    done = loader("loaders:pictures", "--model", "factories:Perceptron", "--seconds", "0.3", "-o", "-")
    assert done.returncode == 0, done.stderr
    (measurement,) = json.loads(done.stdout)["measurements"]
    assert measurement["loading"]["consumer"]["kind"] == "model"
    assert measurement["loading"]["cached_step_ns"]


@pytest.mark.parametrize(
    ("target", "outcome", "message"),
    [
        ("loaders:broken", "error", "sample 20 is damaged"),
        ("loaders:deadly", "crash", "SIGKILL"),
        ("loaders:stuck", "timeout", "after 8 s"),
    ],
)
def test_a_loader_that_fails_says_how_and_what_was_seen_until_then(target, outcome, message):
    done = loader(target, "--seconds", "20", "--deadline", "8", "-o", "-")
    assert done.returncode == 2
    (measurement,) = json.loads(done.stdout)["measurements"]
    assert measurement["outcome"]["kind"] == outcome
    assert message in measurement["outcome"]["message"]
    assert len(measurement["loading"]["batches"]["order"]) >= 3
    assert outcome in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loaders:nothing",), "'loaders:nothing': loaders has no 'nothing'"),
        (("nowhere:loader",), "no module named 'nowhere'"),
        (("imagefolder:/nowhere",), "imagefolder /nowhere: no such folder"),
        (("loaders:number",), "a DataLoader, a Dataset or another iterable is expected"),
        (("loaders:numbers", "--workers", "2"), "it takes no num_workers"),
        (("loaders:fussy", "--workers", "2"), "a Fussy cannot be made again with num_workers=2"),
        (("loaders:make_nothing",), "the loader gives no batch"),
        (("loaders:loader", "--step-ms", "-1"), "--step-ms: -1 is no time"),
        (("loaders:loader", "--step-ms", "nan"), "--step-ms: nan is no time"),
        (("loaders:loader", "--seconds", "0"), "--seconds: 0 is no time"),
        (("loaders:loader", "--workers", "-1"), "--workers: -1 is less than 0"),
        (("loaders:loader", "--prefetch", "0"), "--prefetch: 0 is less than 1"),
        (("loaders:loader", "--deadline", "0"), "--deadline: 0 is no time"),
        (("loaders:loader", "--step-ms", "1", "--model", "resnet18"), "--step-ms and --model"),
        (("loaders:loader", "--model", "resnet18"), "batches of (images, class numbers) are expected"),
        (("loaders:pictures", "--model", "resnet1"), "unknown model 'resnet1'"),
        (("loaders:pictures", "--model", "mnist_cnn"), "mnist_cnn takes 28x28 images, the data gives 32x32"),
        (("loaders:loader", "-o", "out.txt"), "--output out.txt"),
        (("loaders:loader", "--trace", "out.txt"), "--trace out.txt: expected .json"),
        (("loaders:loader", "--trace", "nowhere/out.json"), "--trace nowhere/out.json: cannot be written there"),
        (("loaders:loader", "--trace", "a.json", "-o", "a.json"), "is where the result goes"),
        ((), "TARGET"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(tmp_path, arguments, message):
    done = run(tmp_path, "loader", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert all(line.startswith("hint: ") for line in done.stderr.splitlines()[1:])
    assert done.stdout == ""


def test_ctrl_c_ends_it_with_all_its_workers():
    process = subprocess.Popen(
        [sys.executable, "-m", "bsprof", "loader", "loaders:loader", "--seconds", "60"],
        cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(6)
        os.kill(process.pid, 2)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "error: interrupted" and out == ""


# --- what is verified -------------------------------------------------------------------------------


def diagnosis(*causes, best=None):
    return Diagnosis(
        verdict="highly_input_bound", sentence="", step_s=1.0, wait_s=0.5, busy_s=0.5, wait_share=0.5,
        delivered_per_s=1.0, possible_per_s=2.0, causes=causes, best=best,
    )  # fmt: skip


def cause(change, share, low=None, high=None):
    return Cause(
        code="x", text="", evidence={}, gives_back=share, gives_back_low=low, gives_back_high=high,
        prescription="", change=change,
    )  # fmt: skip


def test_the_first_cause_that_is_a_matter_of_arguments_is_verified():
    found = _cure(diagnosis(cause(None, 0.6), cause({"num_workers": 4}, 0.5, 0.4, 0.6)))
    assert found.change == {"num_workers": 4}
    assert found.predicted.value == pytest.approx(2)
    assert found.predicted.low == pytest.approx(1 / 0.6) and found.predicted.high == pytest.approx(2.5)


def test_a_risk_is_not_verified_and_without_causes_a_better_setting_is():
    assert _cure(diagnosis(cause({"persistent_workers": True}, None))) is None
    better = Prediction(
        workers=6, prefetch=4, step_s=0.5, samples_per_s=2.0, speedup=2.0, speedup_low=1.8, speedup_high=2.2
    )
    assert _cure(diagnosis(best=better)).change == {"num_workers": 6, "prefetch_factor": 4}


def test_intervals_agree_where_they_overlap():
    assert _overlap(Rate(value=2.0, low=1.8, high=2.3), Rate(value=2.4, low=2.2, high=2.6))
    assert not _overlap(Rate(value=2.0, low=1.8, high=2.1), Rate(value=2.4, low=2.2, high=2.6))
    assert not _overlap(Rate(value=2.0), Rate(value=2.4))
