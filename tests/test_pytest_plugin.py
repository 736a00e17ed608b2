"""The pytest plugin, in real sessions: entries for pytest-benchmark, the machine, stored runs, and the gate."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from bsprof import cli, pytest_plugin, store
from bsprof.errors import BsprofError
from bsprof.measure.own_step import OwnTraining, measure, step_once
from bsprof.model import PHASES, Case

ROOT = Path(__file__).parents[1]
PHASE_VALUES = ("step", *PHASES)
LOADED = () if metadata.entry_points(group="pytest11", name="bsprof") else ("-p", "bsprof.pytest_plugin")
"""An installation from before the entry point does not know it; loading the plugin twice is an error."""

SUITE = """
import os
from pathlib import Path

import pytest


class Descent:  # torch.optim takes 2 s to load
    def __init__(self, model):
        self.parameters = list(model.parameters())

    def step(self):
        for parameter in self.parameters:
            parameter.data.sub_(parameter.grad, alpha=0.1)

    def zero_grad(self, set_to_none):
        for parameter in self.parameters:
            parameter.grad = None


class Batches:
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        import torch

        with Path("epochs.txt").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        while True:
            yield torch.ones(self.size, 64), torch.zeros(self.size, dtype=torch.long)


@pytest.mark.benchmark(disable_gc=True)
@pytest.mark.parametrize("size", [4, 8])
def test_step(training_step, size):
    import torch

    torch.set_num_threads(1)
    model = torch.nn.Linear(64, 10)
    training_step(model, Batches(size), Descent(model), steps=12, warmup=3)


def test_nothing_of_bsprofs():
    pass
"""
LIGHT = """
import sys

def test_light():
    assert {"torch", "numpy", "bsprof.model"}.isdisjoint(sys.modules)
"""
CASES = ("test_suite.py::test_step[4]", "test_suite.py::test_step[8]")
GONE = "test_suite.py::test_gone"


def run(folder, *arguments):
    """Run pytest in `folder`, as a user does; its rootdir is there."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "140"}
    for name in [name for name in variables if name.startswith("PYTEST_")]:
        del variables[name]
    command = [sys.executable, "-m", "pytest", *LOADED, "--rootdir", str(folder), *arguments]
    command += ["-p", "no:hypothesispytest"]  # it takes longer to load than all that is run here
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240)
    done.stdout += done.stderr
    return done


def epochs(folder):
    """Return the process of each epoch that was begun in `folder`."""
    file = folder / "epochs.txt"
    return file.read_text().split() if file.exists() else []


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder where the suite was measured once, and saved in every way."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "test_suite.py").write_text(SUITE)
    done = run(folder, "--benchmark-save=first", "--benchmark-json=all.json", "--bsprof-save=base.json")
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    return tmp_path


def stored(measured, suite, *, slow=(), gone=False, host=None):
    """Put the stored run of `measured` beside `suite`: a thousand times as slow, but for the names in `slow`."""
    (source,) = (measured / ".benchmarks").rglob("*.json")
    run = json.loads(source.read_text())
    for entry in run["benchmarks"]:
        factor = 1e-3 if entry["name"] in slow else 1e3
        entry["stats"] |= {name: entry["stats"][name] * factor for name in ("min", "max", "mean", "median")}
    if gone:
        entry = json.loads(json.dumps(run["benchmarks"][0]))
        entry["extra_info"]["bsprof"]["case"] = GONE
        run["benchmarks"].append(entry | {"fullname": f"{GONE}[step]", "name": "test_gone[step]"})
    if host:
        run["machine_info"]["bsprof"]["environment"]["host"] = host
    target = suite / source.relative_to(measured)
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(run))


# --- entries ----------------------------------------------------------------------------------------


def test_the_step_and_each_phase_is_an_entry_and_the_training_runs_once(measured, capsys):
    document = json.loads((measured / "all.json").read_text())
    entries = {(entry["group"], entry["params"]["phase"]): entry for entry in document["benchmarks"]}
    assert set(entries) == {(case, phase) for case in CASES for phase in PHASE_VALUES}
    result = store.load(measured / "base.json")
    assert [one.case for one in result.measurements] == [Case(key=case) for case in CASES]
    for one in result.measurements:
        columns = {**one.samples.host_ns, "step": one.samples.step_ns}
        for phase in PHASE_VALUES:
            entry = entries[one.case.key, phase]
            assert entry["stats"]["data"] == [ns * 1e-9 for ns in columns[phase]]
            assert entry["stats"]["rounds"] == 12
            assert entry["options"]["disable_gc"] is True  # what the test's own mark says holds
        phases = sum(entries[one.case.key, phase]["stats"]["mean"] for phase in PHASES)
        assert 0 < phases <= entries[one.case.key, "step"]["stats"]["mean"] * (1 + 1e-9)
        assert len(one.samples.warmup_ns) == 3
    assert len(epochs(measured)) == len(CASES)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["show", str(measured / "base.json")])
    assert "test_step[4]" in capsys.readouterr().out


def test_the_machine_is_stored(measured):
    told = json.loads((measured / "all.json").read_text())["machine_info"]["bsprof"]
    result = store.load(measured / "base.json")
    assert told["environment"] == json.loads(store.to_json(result.environment))
    assert {"accelerators", "driver", "torch", "cuda", "cores_usable"} <= told["environment"].keys()
    facts = result.measurements[0].facts
    assert (told["threads"], told["malloc"]) == (facts.threads, facts.malloc)
    assert re.match(r"pinned: |default \(", facts.malloc)


def test_switched_off_it_takes_one_step_unmeasured(suite):
    done = run(suite, "--benchmark-disable")
    assert done.returncode == 0 and "13 passed" in done.stdout, done.stdout
    assert len(epochs(suite)) == len(CASES)
    done = run(suite, "--benchmark-skip")
    assert "1 passed, 12 skipped" in done.stdout
    assert len(epochs(suite)) == len(CASES)


# --- stored runs ------------------------------------------------------------------------------------


def test_the_comparison_fails_for_a_single_phase(measured, suite):
    stored(measured, suite, slow=["test_step[4-backward]"], gone=True)
    flags = ("--benchmark-compare", "--benchmark-compare-fail=median:10%", "--benchmark-group-by=param:phase")
    baseline(measured, suite / "base", gone=GONE)
    done = run(suite, *flags, "--benchmark-autosave", "--bsprof-gate=base")
    assert done.returncode == 1
    assert "exit code 5" in done.stdout and f"missing {GONE}: was not measured" in done.stdout
    regressed = re.findall(r"^\t(\S+) \(\S+\) - Field 'median' has failed", done.stdout, re.MULTILINE)
    assert regressed == ["test_step[4-backward]"], done.stdout
    assert all(f"phase={phase}" in done.stdout for phase in PHASE_VALUES)
    assert f"stored, and not measured now: {GONE}" in done.stdout
    assert "save in a session of its own" in done.stdout
    assert "machine_info is different" not in done.stdout


def test_what_is_no_longer_measured_fails_as_well(measured, suite):
    stored(measured, suite)
    (suite / "test_suite.py").write_text(LIGHT)
    done = run(suite, "--benchmark-compare", "--benchmark-compare-fail=median:10%")
    assert done.returncode == 5, done.stdout
    assert re.findall("stored, and not measured now: (.*)", done.stdout) == list(CASES)
    (suite / "test_other.py").write_text(LIGHT)
    done = run(suite, "--benchmark-compare", "--benchmark-compare-fail=median:10%", "test_other.py")
    assert done.returncode == 0, done.stdout  # nobody asked for them


def test_another_machines_run_is_refused_before_anything_is_measured(measured, suite):
    stored(measured, suite, host="elsewhere")
    done = run(suite, "--benchmark-compare")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ERROR: ")]
    assert "--benchmark-compare" in line and "host: elsewhere →" in line
    assert epochs(suite) == []


# --- the gate ---------------------------------------------------------------------------------------


def baseline(measured, folder, *, factor=1.0, processes=1, gone=None, host=None):
    """Save what was `measured`, its times multiplied, as `folder`/result.json."""
    result = store.load(measured / "base.json")
    if host:
        result = msgspec.structs.replace(
            result, environment=msgspec.structs.replace(result.environment, host="elsewhere")
        )
    many = []
    for one in result.measurements:
        for process in range(processes):

            def scaled(times, by=factor * (1 + process / 50)):
                return [max(1, round(time * by)) for time in times]

            samples = msgspec.structs.replace(
                one.samples,
                step_ns=scaled(one.samples.step_ns),
                host_ns={phase: scaled(times) for phase, times in one.samples.host_ns.items()},
            )
            case = Case(key=one.case.key, process=process)
            many.append(msgspec.structs.replace(one, case=case, samples=samples))
    if gone:
        many.append(msgspec.structs.replace(many[0], case=Case(key=gone)))
    folder.mkdir(exist_ok=True)
    store.save(msgspec.structs.replace(result, measurements=many), folder / "result.json")
    return folder


def test_a_slower_step_in_fresh_processes_fails(measured, suite):
    # Beside other programs a process may be a hundred times slower than the next one: it must not matter.
    baseline(measured, suite / "base", factor=1e-6, processes=3)
    done = run(suite, "-k", "4", "--bsprof-gate=base", "--bsprof-save=new", "--bsprof-repeat=3")
    assert done.returncode == 1, done.stdout
    assert "1 case: 1 regressed" in done.stdout and "exit code 1" in done.stdout
    assert "missing" not in done.stdout  # what -k leaves out
    processes = epochs(suite)
    assert len(processes) == len(set(processes)) == 3
    (saved,) = (suite / "new").glob("*.json")
    assert [one.case for one in store.load(saved).measurements] == [Case(key=CASES[0], process=i) for i in range(3)]


@pytest.mark.parametrize(
    ("code", "text", "what"),
    [
        pytest.param(3, "another machine", {"host": "elsewhere"}, id="incomparable"),
        pytest.param(4, "--bsprof-repeat 6", {"processes": 2}, id="undecided and strict"),
    ],
)
def test_the_gate_decides_how_a_session_ends(measured, suite, code, text, what):
    base = baseline(measured, suite / "base", **what)
    strict = "true" if code == 4 else "false"
    (suite / "pyproject.toml").write_text(f"[tool.bsprof.gate]\nstrict = {strict}\n")
    if code == 3:  # which it need not measure for
        (suite / "test_suite.py").write_text("def test_it(): pass")
    done = run(suite, f"--bsprof-gate={base / 'result.json'}")
    assert done.returncode == code, done.stdout
    assert text in done.stdout and f"exit code {code}" in done.stdout


# --- what cannot be done ----------------------------------------------------------------------------


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, bsprof.pytest_plugin; print(*{'torch', 'numpy', 'pytest_benchmark', 'msgspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_session_that_does_not_use_it_pays_nothing(tmp_path):
    (tmp_path / "test_light.py").write_text(LIGHT)
    assert run(tmp_path).returncode == 0
    done = run(tmp_path, "--benchmark-json=all.json")
    assert done.returncode == 0 and not (tmp_path / "all.json").exists()


def test_without_pytest_benchmark_the_fixture_says_so(tmp_path):
    (tmp_path / "test_light.py").write_text(LIGHT + "\ndef test_asks(training_step): pass\n")
    done = run(tmp_path, "-p", "no:benchmark")
    assert "1 passed, 1 error" in done.stdout
    assert re.search(r"^E? *(Failed: )?training_step needs pytest-benchmark", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--bsprof-gate=none.json"], "--bsprof-gate: .*none.json: no such file"),
        (["--bsprof-gate=empty"], "--bsprof-gate: .*empty: no results there"),
        (["--bsprof-gate=base", "--bsprof-save=base/new.json"], "--bsprof-save: this is where the baseline"),
        (["--bsprof-save=test_light.py/new"], "--bsprof-save: .*not a directory"),
        (["--bsprof-repeat=0"], "--bsprof-repeat: 0 is less than one"),
        (["--bsprof-save=new.json", "-n1"], "--bsprof-save: nothing is measured, .*xdist"),
        (["--bsprof-save=new.json", "-p", "no:benchmark"], "--bsprof-save: .*pytest-benchmark is not installed"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused_in_one_line(tmp_path, measured, flags, text):
    (tmp_path / "test_light.py").write_text(LIGHT)
    (tmp_path / "empty").mkdir()
    baseline(measured, tmp_path / "base")
    done = run(tmp_path, *flags)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ERROR: ")]
    assert re.search(text, line)
    assert "Traceback" not in done.stdout


FAILING = """
import torch
from test_suite import Descent


def train(training_step, loader, model=None, **options):
    model = model or torch.nn.Linear(64, 10)
    training_step(model, loader, Descent(model), warmup=1, **options)


PAIR = torch.ones(4, 64), torch.zeros(4, dtype=torch.long)


def test_no_pairs(training_step):
    train(training_step, [{"pixels": PAIR[0]}])


def test_short_epochs(training_step):
    train(training_step, [PAIR])


def test_empty(training_step):
    train(training_step, [])


def test_no_steps(training_step):
    train(training_step, [PAIR], steps=0)


def test_raises(training_step):
    train(training_step, [PAIR] * 9, torch.nn.Linear(63, 10))
"""


def test_what_cannot_be_trained_fails_once_and_so_does_the_session(measured, suite):
    (suite / "test_failing.py").write_text(FAILING)
    baseline(measured, suite / "base", gone="test_failing.py::test_gone")
    done = run(suite, "test_failing.py", "-rfs", "--bsprof-save=new.json", "--bsprof-gate=base")
    assert done.returncode == 1  # its own, although the gate says missing
    assert "missing test_failing.py::test_gone" in done.stdout and "exit code" not in done.stdout
    assert "test_step" not in done.stdout  # the baseline has it, and nobody asked for it
    for name, text in {
        "no_pairs": "a batch of the loader is a dict",
        "short_epochs": "an epoch of the loader is one batch",
        "empty": "no full batch",
        "no_steps": "steps=0 is too little",
        "raises": "mat1 and mat2 shapes",
    }.items():
        assert re.search(rf"^FAILED test_failing.py::test_{name}\[step\] - .*{text}", done.stdout, re.MULTILINE), (
            done.stdout
        )
    assert "10 failed, 20 skipped" in done.stdout  # all phases of a bad argument; else the step alone
    assert not (suite / "new.json").exists()


# --- the measurement itself -------------------------------------------------------------------------


def training(batches=64, **options):
    model = nn.Linear(64, 10)
    loader = [(torch.ones(4, 64), torch.zeros(4, dtype=torch.long))] * batches
    return OwnTraining(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_steps_in_which_an_epoch_ends_are_told():
    found = measure(training(batches=7), key="a", steps=20, warmup=4, pin=False)
    # The first step, three more of the warm-up, then 20: batches 7 and 14 and 21 begin a new epoch.
    assert found.samples.epoch_boundaries == [3, 10, 17]
    assert len(found.samples.step_ns) == 20 and len(found.samples.warmup_ns) == 4
    assert sum(block.steps for block in found.samples.blocks) == 20
    assert found.facts.malloc == "default" and found.samples.batch_size == 4
    for index, step in enumerate(found.samples.step_ns):
        assert sum(times[index] for times in found.samples.host_ns.values()) == step


def test_a_warm_up_that_is_never_steady_is_noted(monkeypatch):
    monkeypatch.setattr("bsprof.stats.is_steady", lambda values, window: False)
    found = measure(training(), key="a", steps=2000, seconds=0.05, pin=False)
    assert not found.samples.steady and "no_steady_state" in [note.code for note in found.notes]
    assert 10 <= len(found.samples.step_ns) <= 2000


def test_a_steady_warm_up_ends(monkeypatch):
    asked = []
    monkeypatch.setattr("bsprof.stats.is_steady", lambda values, window: asked.append(len(values)) or len(asked) == 3)
    found = measure(training(), key="a", steps=10, pin=False)
    assert found.samples.steady and len(found.samples.warmup_ns) == 4


def test_a_loss_of_ones_own_is_used():
    losses = []

    def loss(outputs, targets):
        losses.append((outputs.shape, targets.shape))
        return outputs.square().mean()

    step_once(training(loss_fn=loss, device="cpu"))
    assert losses == [((4, 10), (4,))]


def test_batches_that_are_no_pairs_are_refused():
    one = training()
    one._loader = [torch.ones(4, 64)]
    with pytest.raises(BsprofError, match="is a Tensor, not a pair"):
        step_once(one)


# --- what is written about it -----------------------------------------------------------------------


class Parser:
    """Takes the plugin's flags as pytest does, and remembers their names."""

    def __init__(self):
        self.flags = set()

    def getgroup(self, name, description):
        return self

    def addoption(self, flag, **told):
        assert told["help"]
        self.flags.add(flag)


WORKFLOW = (ROOT / "docs" / "examples" / "bsprof-gate.yml").read_text()


def test_every_flag_is_documented_and_every_one_that_is_written_exists():
    parser = Parser()
    pytest_plugin.pytest_addoption(parser)
    page = (ROOT / "docs" / "pytest.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"--bsprof-[a-z]+", page)) == parser.flags
    assert set(re.findall(r"--bsprof-[a-z]+", readme + WORKFLOW)) <= parser.flags
    arguments = set(inspect.signature(pytest_plugin.TrainingStep.__call__).parameters) - {"self"}
    assert {name for name in arguments if not re.search(rf"^\| `[^`]*\b{name}\b", page, re.MULTILINE)} == set()


def test_the_workflow_that_is_shown_is_the_file():
    page = (ROOT / "docs" / "pytest.md").read_text()
    assert re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL) == [WORKFLOW]


def test_every_command_of_the_workflow_parses():
    lines = [line.split(">")[0] for line in re.findall(r"bin/bsprof (.*)", WORKFLOW)]
    assert len(lines) == 2
    for line in lines:
        name, *rest = shlex.split(line)
        with cli.commands.commands[name].make_context(name, rest) as context:
            assert context.params["output_format"] in ("github", "markdown")
