"""The pytest plugin: the fixture `training_step`, and a gate on what it measured.

The fixture hands pytest-benchmark one entry for the step and one for each of its phases. A test that asks for it is
parametrized over `phase`; the training runs once, for the first of them, and the others are told what was measured.
pytest-benchmark times everything itself, so the recorded times are replayed to it: each round moves the hand of a clock
of ours by one recorded time.

Loading this module loads pytest and nothing heavier: each session of everybody who has bsprof installed does.
"""

from __future__ import annotations

import datetime
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from bsprof.errors import BsprofError, Exit

if TYPE_CHECKING:
    import torch

    from bsprof.compare import Comparison
    from bsprof.measure.own_step import LossFunction, OwnTraining
    from bsprof.model import Environment, Gate, Measurement, Result

FIXTURE = "training_step"
STEP = "step"
"""The first value of `phase`: the whole step."""

_BENCHMARK = ("benchmark", "pytest_benchmark.plugin")
"""What pytest-benchmark's plugin is called: by its entry point, and loaded by hand."""

_TAIL = 30
"""Lines that are shown of a fresh process that failed."""

_MEANING = {
    Exit.VERDICT: "slower than the baseline",
    Exit.INCOMPARABLE: "baseline and session cannot be compared",
    Exit.INCONCLUSIVE: "not decided, and the gate is strict",
    Exit.MISSING: "a baseline was not measured again",
}


# --- the session ------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add bsprof's flags, that all begin with `--bsprof-`."""
    group = parser.getgroup("bsprof", "what `training_step` measures")
    group.addoption(
        "--bsprof-save",
        metavar="PATH",
        help="Save what is measured as a result of bsprof's: a .json or .json.gz, or a new file in a folder.",
    )
    group.addoption(
        "--bsprof-gate",
        metavar="PATH",
        help="Compare with a saved result, or with a folder of results, and fail (1) where a step is slower.",
    )
    group.addoption(
        "--bsprof-repeat",
        metavar="K",
        type=int,
        help="Measure each test in K fresh processes; between them is where intervals come from.",
    )
    group.addoption(
        "--bsprof-malloc",
        choices=["pinned", "default"],
        default="pinned",
        help="Keep freed host memory while measuring. [%(default)s]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put in the half of the plugin that fits, and refuse flags that cannot be followed."""
    has_benchmark = any(map(config.pluginmanager.hasplugin, _BENCHMARK))
    try:
        flags = _read_flags(config, has_benchmark)
    except BsprofError as error:
        raise pytest.UsageError(_one_line(error)) from None
    session = BenchmarkedSession(config, flags) if has_benchmark else _WithoutBenchmark()
    config.pluginmanager.register(session, "bsprof-session")


class _Flags(NamedTuple):
    """The flags, checked."""

    save: Path | None
    gate: Path | None
    base: Result | None
    """What lies at `gate`."""
    repeat: int | None
    """None: in the session's own process."""
    pin: bool


def _read_flags(config: pytest.Config, has_benchmark: bool) -> _Flags:
    save, gate, repeat = (config.getoption(f"bsprof_{name}") for name in ("save", "gate", "repeat"))
    asked = [f"--bsprof-{name}" for name, value in (("save", save), ("gate", gate), ("repeat", repeat)) if value]
    reason = _switched_off(config) if has_benchmark else "pytest-benchmark is not installed"
    if asked and reason and not _is_worker(config):
        raise BsprofError(f"{asked[0]}: nothing is measured, {reason}")
    if repeat is not None and repeat < 1:
        raise BsprofError(f"--bsprof-repeat: {repeat} is less than one process", hint="5 processes say something")
    here = config.invocation_params.dir
    base = None
    if gate is not None:
        from bsprof import comparing

        gate = here / gate
        try:
            base = comparing.read(gate)
            comparing.find_gate(config.rootpath)
        except BsprofError as error:
            raise BsprofError(f"--bsprof-gate: {error.message}", hint=error.hint) from error
    if save is not None:
        save = here / save
        _check_place(save, gate)
    return _Flags(save, gate, base, repeat, config.getoption("bsprof_malloc") == "pinned")


def _switched_off(config: pytest.Config) -> str | None:
    """Return why pytest-benchmark measures nothing in this session, by its own rules, or None."""
    if config.getoption("benchmark_skip", False) and not config.getoption("benchmark_only", False):
        return "--benchmark-skip is given"
    if config.getoption("benchmark_disable", False) and not config.getoption("benchmark_enable", False):
        return "--benchmark-disable is given"
    if config.getoption("dist", "no") != "no" or _is_worker(config):
        return "pytest-benchmark is off under xdist (`--dist no` measures)"
    return None


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is a process of pytest-xdist's; its parent has told the user what there is to tell."""
    return hasattr(config, "workerinput")


def _check_place(save: Path, gate: Path | None) -> None:
    """Refuse a place that cannot be written, and one that is the baseline."""
    folder = save.parent if _is_file_name(save) else save
    if gate is not None and gate.resolve() in (save.resolve(), *save.resolve().parents):
        raise BsprofError(
            "--bsprof-save: this is where the baseline of --bsprof-gate lies: a slower session would be its own next "
            "baseline, and many small steps would add up unseen",
            hint="save elsewhere, and move the baseline on purpose",
        )
    try:
        if folder is save:
            folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder, prefix=".bsprof-").close()
    except OSError as error:
        raise BsprofError(f"--bsprof-save: {folder}: {(error.strerror or str(error)).lower()}") from error


def _is_file_name(path: Path) -> bool:
    return path.name.endswith((".json", ".json.gz"))


def _one_line(error: BsprofError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


class _WithoutBenchmark:
    """The plugin where pytest-benchmark is not there."""

    @pytest.fixture
    def training_step(self) -> None:
        """Measure a training step, phase by phase; needs pytest-benchmark."""
        pytest.fail("training_step needs pytest-benchmark: pip install pytest-benchmark", pytrace=False)


# --- a test and its entries -------------------------------------------------------------------------


def _is_measured(item: pytest.Item) -> bool:
    """Whether `item` is one of the tests that `pytest_generate_tests` made for the fixture."""
    return FIXTURE in getattr(item, "fixturenames", ()) and "phase" in getattr(item, "callspec", _NOTHING).params


class _Nothing:
    params: Mapping[str, Any] = {}


_NOTHING = _Nothing()


def case_key(item: pytest.Item) -> str:
    """Return the node id of the test without its phase: the name of what is measured, for all its phases."""
    callspec: Any = item.callspec  # type: ignore[attr-defined]  # only a pytest.Function has it
    names = callspec.id.split("-")
    # Ours is the last of the parameters, unless another plugin came behind; a value of another may be called the same.
    names.reverse()
    names.remove(callspec.params["phase"])
    names.reverse()
    others = "-".join(names)
    return item.nodeid.removesuffix(f"[{callspec.id}]") + (f"[{others}]" if others else "")


class Replay:
    """A clock whose hand moves only while a recorded time is replayed: pytest-benchmark reads it for its own."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._left_s: Iterator[float] = iter(())

    def read(self) -> float:
        """Return the time in seconds."""
        return self._now_s

    def to(self, benchmark: Any, times_s: Sequence[float]) -> None:
        """Let `benchmark` measure the `times_s`, one a round, each exactly: the hand starts from 0 every time."""
        self._left_s = iter(times_s)
        benchmark.pedantic(self._move, setup=self._rewind, rounds=len(times_s))

    def _rewind(self) -> None:
        self._now_s = 0.0

    def _move(self) -> None:
        self._now_s = next(self._left_s, 0.0)  # --benchmark-cprofile calls once more


class TrainingStep:
    """What the fixture gives: called once in a test, with what trains."""

    def __init__(self, session: BenchmarkedSession, item: pytest.Item, phase: str, benchmark: Any) -> None:
        self._session, self._item, self._phase, self._benchmark = session, item, phase, benchmark

    def __call__(
        self,
        model: torch.nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        loss: LossFunction | None = None,
        steps: int = 100,
        warmup: int | None = None,
        seconds: float = 20.0,
        device: torch.device | str | None = None,
    ) -> None:
        """Measure the training of `model` on the batches of `loader`, which are pairs (inputs, targets).

        `loss(outputs, targets)` is cross entropy unless another is given. `steps` are timed after a `warmup` of so many
        steps, or of as many as it takes until the step time is steady; `seconds` are all that it may take, the first
        step excepted. The model is moved to `device`, or trained where it is. It is trained for real: its weights are
        others afterwards. Where pytest-benchmark is switched off one step is taken, unmeasured.
        """
        from bsprof.measure import own_step

        for name, value, least in (("steps", steps, 2), ("warmup", warmup, 1), ("seconds", seconds, 0.0)):
            if value is not None and (value < least or value <= 0):
                pytest.fail(f"training_step: {name}={value} is too little", pytrace=False)
        key = case_key(self._item)
        try:
            training = own_step.OwnTraining(model, loader, optimizer, loss_fn=loss, device=device)
            if self._benchmark.disabled:
                first = self._session.is_first(key)
                self._benchmark.pedantic(lambda: own_step.step_once(training) if first else None)
                return
            measurements = self._session.measurements_of(
                key, self._item, training, steps=steps, warmup=warmup, seconds=seconds
            )
        except BsprofError as error:
            pytest.fail(_one_line(error), pytrace=False)
        self._hand_over(key, measurements)

    def _hand_over(self, key: str, measurements: Sequence[Measurement]) -> None:
        times_s = [time for one in measurements for time in _times_s(one, self._phase)]
        facts = measurements[0].facts
        assert facts is not None
        self._benchmark.group = self._benchmark.group or key
        self._benchmark.extra_info["bsprof"] = {
            "case": key,
            "processes": len(measurements),
            "clock": facts.clock,
            "threads": facts.threads,
            "malloc": facts.malloc,
        }
        self._session.replay.to(self._benchmark, times_s)


def _times_s(measurement: Measurement, phase: str) -> list[float]:
    """Return the seconds of each steady step, or of a phase in each; by the device's clock where it has one."""
    samples = measurement.samples
    assert samples is not None
    columns = samples.device_ns or samples.host_ns
    times_ns = (samples.device_step_ns or samples.step_ns) if phase == STEP else columns[phase]
    ends = set(samples.epoch_boundaries)
    return [time * 1e-9 for index, time in enumerate(times_ns) if index not in ends]


class _Stored(NamedTuple):
    """What of bsprof's stands in a run that --benchmark-compare has loaded."""

    created: str
    machine: dict[str, Any] | None
    cases: list[str]


class BenchmarkedSession:
    """The plugin where pytest-benchmark is there: what was measured so far, and what comes of it in the end."""

    def __init__(self, config: pytest.Config, flags: _Flags) -> None:
        self.replay = Replay()
        self._config = config
        self._flags = flags
        self._measured: dict[str, list[Measurement]] = {}
        """By case; without any where measuring failed."""
        self._seen: set[str] = set()
        self._deselected: set[str] = set()
        self._stored: list[_Stored] = []
        self._environment: Environment | None = None
        self._comparison: Comparison | None = None
        self._words: list[str] = []

    # --- collecting ---

    @pytest.hookimpl(trylast=True)  # behind the user's own parameters, so that the phases of a test stand together
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of each phase; a fixture of the same name that somebody else has made asks for no phase."""
        if {FIXTURE, "phase", "benchmark"} <= set(metafunc.fixturenames):
            from bsprof.model import PHASES

            phases = (STEP, *PHASES)
            metafunc.parametrize("phase", phases, ids=phases)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Let pytest-benchmark read our clock, with whatever else the test's own mark says."""
        if _is_measured(item):
            mark = item.get_closest_marker("benchmark")
            own = {} if mark is None else dict(mark.kwargs)
            item.add_marker(pytest.mark.benchmark(**own | {"timer": self.replay.read}), append=False)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Remember what was left out on purpose."""
        self._deselected |= {case_key(item) for item in items if _is_measured(item)}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Refuse another machine's run: now it is known that this session measures, and nothing is measured yet."""
        if self._stored and not _switched_off(self._config) and any(map(_is_measured, session.items)):
            for stored in self._stored:
                self._refuse_other_machine(stored)

    # --- measuring ---

    @pytest.fixture
    def training_step(self, request: pytest.FixtureRequest, phase: str, benchmark: Any) -> TrainingStep:
        """Measure a training step, phase by phase: `training_step(model, loader, optimizer)`."""
        return TrainingStep(self, request.node, phase, benchmark)

    def is_first(self, key: str) -> bool:
        """Whether this is the first phase of the case; of each case once."""
        known = key in self._seen
        self._seen.add(key)
        return not known

    def measurements_of(self, key: str, item: pytest.Item, training: OwnTraining, **pace: Any) -> list[Measurement]:
        """Return what was measured of the case, one entry a process; the first to ask has it measured.

        An exception passes through; whoever asks for the same case after that is skipped.
        """
        if self.is_first(key):
            self._measured[key] = self._measure(key, item, training, **pace)
        elif key not in self._measured:
            pytest.skip("the training failed when it was measured, for another phase")
        return self._measured[key]

    def _measure(self, key: str, item: pytest.Item, training: OwnTraining, **pace: Any) -> list[Measurement]:
        if self._flags.repeat is None:
            from bsprof.measure import own_step

            return [own_step.measure(training, key=key, pin=self._flags.pin, **pace)]
        return list(self._in_fresh_processes(key, item, self._flags.repeat))

    def _in_fresh_processes(self, key: str, item: pytest.Item, processes: int) -> Iterator[Measurement]:
        """Yield what a pytest of its own measured, one process after the other.

        This process has collected and perhaps run other tests, so that none of the measurements is made in it.
        """
        import msgspec

        from bsprof import store
        from bsprof.model import Case

        with tempfile.TemporaryDirectory(prefix="bsprof-") as folder:
            for process in range(processes):
                file = Path(folder, f"{process}.json")
                done = subprocess.run(
                    self._alone(item, file),
                    cwd=self._config.invocation_params.dir,
                    env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                )
                if done.returncode or not file.exists():
                    said = "\n".join((done.stdout + done.stderr).splitlines()[-_TAIL:])
                    ended = f"process {process + 1} of {processes} ended with code {done.returncode}"
                    pytest.fail(f"training_step: {ended} and said\n{said}", pytrace=False)
                (measurement,) = store.load(file).measurements
                yield msgspec.structs.replace(measurement, case=Case(key=key, process=process))

    def _alone(self, item: pytest.Item, file: Path) -> list[str]:
        """Return the command that measures `item` alone and saves it to `file`.

        It has this session's plugins, configuration file and overrides, and no `addopts`: what stands there (reports,
        coverage, xdist) is for the whole session.
        """
        config = self._config
        node = f"{item.path}::{item.nodeid.partition('::')[2]}"
        command = [sys.executable, "-m", "pytest", node, "--rootdir", str(config.rootpath)]
        if config.inipath is not None:
            command += ["-c", str(config.inipath)]
        for flag, values in (
            ("-p", config.getoption("plugins")),
            ("-W", config.getoption("pythonwarnings")),
            ("-o", [*(config.getoption("override_ini") or ()), "addopts="]),
        ):
            for value in values or ():
                command += [flag, value]
        command += ["--import-mode", config.getoption("importmode"), "--bsprof-save", str(file)]
        return [*command, "--bsprof-malloc", config.getoption("bsprof_malloc")]

    # Not a property: pytest looks at each attribute of a plugin for fixtures.
    def _here(self) -> Environment:
        if self._environment is None:
            from bsprof.measure import environment

            self._environment = environment.collect(self._config.rootpath)
        return self._environment

    def _gate(self) -> Gate:
        from bsprof import comparing

        return comparing.find_gate(self._config.rootpath)

    # --- pytest-benchmark's own files ---

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Add what training depends on, where this session has trained."""
        facts = next((one.facts for many in self._measured.values() for one in many), None)
        if facts is not None:
            import msgspec

            machine_info["bsprof"] = {
                "environment": msgspec.to_builtins(self._here()),
                "device": facts.device,
                "threads": facts.threads,
                "malloc": facts.malloc,
            }

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_compare_machine_info(self, compared_benchmark: dict[str, Any]) -> None:
        """Take out what we added, and keep it until it is known whether this session measures.

        It is not collected yet. What stayed in would be held against a machine_info without it, and always differ.
        """
        infos = [entry.get("extra_info", {}).get("bsprof") for entry in compared_benchmark["benchmarks"]]
        cases = list(dict.fromkeys(info["case"] for info in infos if info))
        machine = compared_benchmark["machine_info"].pop("bsprof", None)
        if machine is not None or cases:
            self._stored.append(_Stored(str(compared_benchmark.get("datetime")), machine, cases))

    def _refuse_other_machine(self, stored: _Stored) -> None:
        """Raise UsageError where the run was stored on another machine, by the rules of `bsprof compare`."""
        import msgspec

        from bsprof.compare import MACHINE, environment_differences
        from bsprof.model import Environment

        place = f"--benchmark-compare: the run of {stored.created}"
        if stored.machine is None:
            raise pytest.UsageError(f"{place} does not say which machine measured it")
        try:
            there = msgspec.convert(stored.machine.get("environment"), Environment)
        except msgspec.ValidationError as error:
            raise pytest.UsageError(f"{place} was stored by another bsprof ({error}): store it anew") from None
        try:
            allowed = self._gate().allow
        except BsprofError as error:
            raise pytest.UsageError(_one_line(error)) from None
        differences = environment_differences(there, self._here())
        refused = [str(one) for one in differences if one.name in MACHINE and one.name not in allowed]
        if refused:
            raise pytest.UsageError(
                f"{place} is another machine's: {'; '.join(refused)} (measure the baseline here, or name what may "
                "differ in pyproject.toml, [tool.bsprof.gate] allow)"
            )

    # --- what comes of it ---

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Save, compare, and decide how the session ends; one that has failed by itself keeps its code."""
        if _switched_off(self._config):
            return
        try:
            code = self._conclude()
        except BsprofError as error:
            self._words.append(f"error: {_one_line(error)}")
            code = error.exit_code
        if exitstatus == pytest.ExitCode.OK and code is not Exit.DONE:
            session.exitstatus = code
            self._words.append(f"exit code {code.value}: {_MEANING.get(code, 'could not be done')}")

    def _conclude(self) -> Exit:
        code = self._look_for_unmeasured()
        flags = self._flags
        if flags.save is not None and self._measured:
            self._save(flags.save)
        if flags.gate is not None and flags.base is not None:
            import msgspec

            from bsprof import comparing
            from bsprof.compare import compare

            base = [one for one in flags.base.measurements if self._is_asked_for(one.case.key)]
            if not base and not self._measured:
                return code
            self._comparison = compare(
                msgspec.structs.replace(flags.base, measurements=base),
                self._result(),
                self._gate(),
                names=(self._config.getoption("bsprof_gate"), "this session"),
            )
            code = comparing.exit_code(self._comparison) or code
            if any(min(case.base_processes, case.new_processes) < 2 for case in self._comparison.cases):
                self._words.append("a side of one process decides nothing: `--bsprof-repeat 6` measures each test in 6")
        return code

    def _result(self) -> Result:
        from bsprof.model import Result

        return Result(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            plan=None,
            environment=self._here(),
            measurements=[one for many in self._measured.values() for one in many],
        )

    def _save(self, place: Path) -> None:
        from bsprof import store

        if not _is_file_name(place):
            place /= f"bsprof-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.json"
        store.save(self._result(), place)
        self._words.append(f"saved: {place}")

    def _look_for_unmeasured(self) -> Exit:
        """Name stored entries that have no counterpart now, and the other way round; pytest-benchmark says nothing.

        Under `--benchmark-compare-fail` what is no longer measured fails: it would pass for ever.
        """
        stored = list(dict.fromkeys(case for run in self._stored for case in run.cases))
        gone = [case for case in stored if case not in self._measured and self._is_asked_for(case)]
        self._words += [f"stored, and not measured now: {case}" for case in gone]
        if stored:
            self._words += [f"measured, and compared with nothing: {case}" for case in self._measured.keys() - stored]
        decides = bool(self._config.getoption("benchmark_compare_fail", None))
        keeps = any(self._config.getoption(f"benchmark_{name}", None) for name in ("save", "autosave"))
        if decides and keeps and self._measured:
            self._words.append(
                "--benchmark-save keeps this run even where --benchmark-compare-fail fails it, and then it is the next "
                "baseline: save in a session of its own"
            )
        return Exit.MISSING if gone and decides else Exit.DONE

    def _is_asked_for(self, key: str) -> bool:
        """Whether this session should have measured the case: it lies where pytest was told to look."""
        if key in self._measured:
            return True
        return key not in self._deselected and any(self._covers(argument, key) for argument in self._config.args)

    def _covers(self, argument: str, key: str) -> bool:
        path, separator, node = argument.partition("::")
        place = (self._config.invocation_params.dir / path).resolve()
        root = self._config.rootpath.resolve()
        if not place.exists() or place == root:  # --pyargs names no path
            return True
        if not place.is_relative_to(root):
            return False
        start = place.relative_to(root).as_posix() + separator + node
        return key == start or key.startswith((f"{start}/", f"{start}::", f"{start}["))

    @pytest.hookimpl(tryfirst=True)  # pytest-benchmark ends its own summary with an exception where its check fails
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the comparison, and what else there is to say."""
        if self._comparison is not None:
            terminalreporter.section("bsprof gate")
            terminalreporter.write(_rendered(self._comparison, colour=terminalreporter.hasmarkup))
        elif self._words:
            terminalreporter.section("bsprof")
        for text in self._words:
            terminalreporter.write_line(text)


def _rendered(comparison: Comparison, *, colour: bool) -> str:
    from rich.console import Console

    from bsprof.report import comparison as report

    text = io.StringIO()
    report.render(comparison, Console(file=text, force_terminal=colour, highlight=False))
    return text.getvalue()
