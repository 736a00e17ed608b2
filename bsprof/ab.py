"""`bsprof ab`: two things measured against each other in turns, from flags to a verdict."""

from __future__ import annotations

import contextlib
import datetime
import math
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from bsprof import noise, store
from bsprof.ceilings import identity
from bsprof.compare import Change, Comparison, compare
from bsprof.comparing import Format, exit_code, show
from bsprof.errors import BsprofError, Exit
from bsprof.model import AXES, Axes, Environment, Gate, Measurement, NoiseFloor, Plan, Result, Settings, Stop, Turns
from bsprof.report import terminal
from bsprof.report.figures import percent
from bsprof.report.turns import TurnsProgress
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.plan import convert_flags, default_axes, expand, parse_values
from bsprof.sweep.process import Interpreter, current_directory
from bsprof.sweep.runner import ChildDied, describe_environment, introduce, prepare
from bsprof.sweep.turns import PILOT, Bench, Pair, Protocol, Side, Taken, can_share_a_process, take
from bsprof.sweep.worktree import is_commit, worktree

THRESHOLD = 0.005
"""In turns smaller changes are told apart than between results of different days, whose gate is 2 %."""
EFFECT_OVER_THRESHOLD = 4.0
"""By default changes of four times the threshold are to be found: 2 %."""
BUDGET_S = 60.0
SECONDS = 2.0
"""Of measuring each side in a process, warm-up included."""
BESIDE_S = 30.0
"""What a process may take besides, before it is given up: 10 times the measuring, and this."""

Kind = Literal["settings", "code", "python", "script"]


class Request(NamedTuple):
    """What the command line asks for; `flags` by parameter name, None where not given."""

    a: str | None
    b: str | None
    aa: bool
    script: tuple[str, ...]
    output: Path | None
    format: Format
    flags: Mapping[str, Any]


def run(request: Request) -> int:
    """Measure, compare, print, and return the exit code."""
    words = _sides_asked(request)
    kinds = [_kind(flag, word, request) for flag, word in zip(("--a", "--b"), words, strict=True)]
    if kinds[0] != kinds[1]:
        raise BsprofError(
            f"--a {words[0]} and --b {words[1]}: {_KINDS[kinds[0]]} and {_KINDS[kinds[1]]} are not alike",
            hint="give two of a kind",
        )
    asked = _protocol(request)
    if request.output is not None and request.output.exists() and not request.output.is_dir():
        raise BsprofError(f"--output {request.output}: is no folder", hint="both sides go into one: a.json and b.json")
    notices = terminal.console(stderr=True)
    with contextlib.ExitStack() as stack, Interruption("\ninterrupted at once\n") as stop:
        with notices.status("starting") if notices.is_terminal else contextlib.nullcontext():
            environment = describe_environment()
            sides, plan = _sides(kinds[0], words, _interpreters(kinds[0], words, stack), request, environment)
            ready = {side: _made_ready(side, plan, environment) for side in dict.fromkeys(sides)}
        together = can_share_a_process(*sides, _here())
        floor = None if request.aa else noise.cached(environment, together=together)
        protocol = _above_the_floor(asked, floor)
        environments = (ready[sides[0]], ready[sides[1]])
        experiment = _Experiment(sides, environments, plan, protocol, together, request.output)
        with TurnsProgress(notices, protocol.budget_s) as progress:
            bench = Bench(sides, plan, together=together, stop=stop, heard=progress.heard)

            def on_pair(pairs: list[Pair], total: int) -> None:
                experiment.keep(pairs, total)
                progress.advance(len(pairs), total, experiment.change(pairs))

            taken = take(bench.measure, experiment.ratio_of, protocol, on_pair)
    return _tell(experiment, taken, request, environment, floor)


class _Experiment:
    """The two sides of a run, and what is known of them so far."""

    def __init__(
        self,
        sides: tuple[Side, Side],
        environments: tuple[Environment, Environment],
        plan: Plan,
        protocol: Protocol,
        together: bool,
        output: Path | None,
    ) -> None:
        self.sides, self.protocol, self.together = sides, protocol, together
        self._environments, self._plan, self._output = environments, plan, output
        self._run = secrets.token_hex(8)
        self._began = time.monotonic()
        self._created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def results(self, pairs: list[Pair], asked: int) -> tuple[Result, Result]:
        """Return both sides as results, of pairs A first."""
        a, b = (self._result(side, [pair[side] for pair in pairs], asked) for side in (0, 1))
        return a, b

    def _result(self, side: int, measurements: list[Measurement], asked: int) -> Result:
        letters: tuple[Literal["a", "b"], ...] = ("a", "b")
        turns = Turns(
            run=self._run,
            side=letters[side],
            name=self.sides[side].name,
            together=self.together,
            threshold=self.protocol.threshold,
            effect=self.protocol.effect,
            pilot=PILOT,
            asked=asked,
        )
        plan, settings = self._plan, self.sides[side].settings
        if settings is not None:
            values = ((name, getattr(settings, name)) for name in AXES)
            axes = {name: (value,) for name, value in values if value is not None}
            plan = msgspec.structs.replace(plan, axes=Axes(**axes), repeat=max(1, len(measurements)))
        return Result(
            created=self._created,
            plan=plan if settings else None,
            environment=self._environments[side],
            measurements=measurements,
            turns=turns,
            wall_s=time.monotonic() - self._began,
        )

    def comparison(self, pairs: list[Pair]) -> Comparison:
        """Return both sides compared, pair by pair."""
        gate = Gate(threshold=self.protocol.threshold)
        names = (self.sides[0].name, self.sides[1].name)
        return compare(*self.results(pairs, PILOT), gate, names=names)

    def ratio_of(self, pair: Pair) -> float | None:
        """Return b / a of one pair, None where a side failed."""
        change = self.change([pair])
        return None if change is None else change.ratio

    def change(self, pairs: list[Pair]) -> Change | None:
        """Return what decides, so far; None where a side failed."""
        if any(one.outcome.kind != "ok" for one in pairs[-1]):
            return None
        (case,) = self.comparison(pairs).cases
        return case.gated[0] if case.gated else None

    def keep(self, pairs: list[Pair], asked: int) -> None:
        """Write both sides where they were asked for; whatever comes then, these pairs are kept."""
        if self._output is None:
            return
        try:
            self._output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BsprofError(f"--output {self._output}: {error.strerror}", hint="name another folder") from error
        for name, result in zip(("a.json", "b.json"), self.results(pairs, asked), strict=True):
            store.save(result, self._output / name)


# --- what is compared -------------------------------------------------------------------------------

_KINDS: dict[Kind, str] = {
    "settings": "settings",
    "code": "a commit or a folder",
    "python": "a Python",
    "script": "a script",
}


def _sides_asked(request: Request) -> tuple[str, str]:
    if request.aa:
        if request.b is not None:
            raise BsprofError("--aa and --b: a thing is compared with itself", hint="leave out --b")
        same = request.a or (shlex.join(request.script) if request.script else "")
        return same, same
    if request.a is None or request.b is None:
        raise BsprofError(
            f"--{'a' if request.a is None else 'b'}: missing", hint="for example --a batch_size=32 --b batch_size=64"
        )
    return request.a, request.b


def _kind(flag: str, word: str, request: Request) -> Kind:
    """Return what a side is, by what there is of that name."""
    key = word.partition("=")[0].strip().replace("-", "_")
    path = Path(word)
    if not word or ("=" in word and key in AXES):
        kind: Kind = "script" if request.script and not word else "settings"
    elif path.is_dir():
        kind = "code"
    elif (program := next(iter(_words(flag, word)), "")).endswith(".py") and Path(program).is_file():
        kind = "script"
    elif path.is_file():
        kind = "python"
    elif is_commit(word):
        kind = "code"
    elif "=" in word:
        raise BsprofError(f"{flag} {word}: there is no axis '{key}'", hint=f"axes are {', '.join(AXES)}")
    else:
        raise BsprofError(
            f"{flag} {word}: neither settings, a script, a folder, a Python nor a commit",
            hint="as batch_size=64, train.py, ../other, venv/bin/python or HEAD~1",
        )
    if request.script and kind in ("settings", "script") and word and not request.aa:
        raise BsprofError(
            f"{flag} {word}: {_KINDS[kind]} beside a script to run", hint="a script is run by commits, folders, Pythons"
        )
    return kind


def _words(flag: str, text: str) -> tuple[str, ...]:
    """Return a command line's words, as a shell would."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise BsprofError(f"{flag} {text}: {str(error).lower()}", hint="quotes come in pairs") from None


def _here() -> Interpreter:
    return Interpreter(sys.executable, current_directory())


def _interpreters(kind: Kind, words: tuple[str, str], stack: contextlib.ExitStack) -> tuple[Interpreter, Interpreter]:
    here = _here()

    def of(word: str) -> Interpreter:
        if kind == "python":
            # Not resolved: a virtual environment's Python is a link, and knows itself by the link's place.
            return here._replace(python=str(Path(word).absolute()))
        if kind == "code":
            place = str(Path(word).resolve()) if Path(word).is_dir() else stack.enter_context(worktree(word))
            return here._replace(directory=place)
        return here

    first = of(words[0])
    return first, first if words[0] == words[1] else of(words[1])


def _made_ready(side: Side, plan: Plan, here: Environment) -> Environment:
    """Make all that a side needs before anything is timed, and return the Environment that it runs in."""
    interpreter, settings = side.interpreter, [side.settings] if side.settings else []
    if interpreter == _here():
        if settings:
            prepare(settings, plan)
        return here
    try:
        return introduce(interpreter, settings, plan)
    except ChildDied as error:
        words = (error.hint or "").removeprefix("its last words: ")
        raise BsprofError(
            f"{interpreter.python}: bsprof does not run there: {words or error.message}",
            hint=f"install it: {shlex.quote(interpreter.python)} -m pip install bsprof",
        ) from error


def _sides(
    kind: Kind,
    words: tuple[str, str],
    interpreters: tuple[Interpreter, Interpreter],
    request: Request,
    environment: Environment,
) -> tuple[tuple[Side, Side], Plan]:
    """Return both sides, and the plan that holds for their processes."""
    given = {
        name: _one_value(name, request.flags[name], "--" + name.replace("_", "-"))
        for name in AXES
        if request.flags.get(name) is not None
    }
    plan = _plan(request)
    found = []
    for flag, word, interpreter in zip(("--a", "--b"), words, interpreters, strict=True):
        script = request.script or (_words(flag, word) if kind == "script" else ())
        if script:
            if given:
                flag = "--" + next(iter(given)).replace("_", "-")
                raise BsprofError(f"{flag}: a script has settings of its own", hint="give them to the script")
            if not Path(interpreter.directory, script[0]).is_file():
                raise BsprofError(f"{script[0]}: there is no such script in {interpreter.directory}")
            found.append(Side(word or script[0], interpreter, script=script))
            continue
        own = _assignments(flag, word) if kind == "settings" and word else {}
        settings = _settings({**given, **own}, environment, plan)
        found.append(Side(word or "the same", interpreter, settings))
    a, b = found
    if a == b and not request.aa:
        raise BsprofError("--a and --b: are the same", hint="--aa measures how far a thing differs from itself")
    return (a, b), plan


def _assignments(flag: str, text: str) -> dict[str, Any]:
    """Return the axes that a text like `batch_size=64,data=jpeg:64x64,n=64` sets."""
    parts: list[str] = []
    for part in text.split(","):
        if part.partition("=")[0].strip().replace("-", "_") in AXES or not parts:
            parts.append(part)
        else:
            parts[-1] += "," + part  # of a data set's name
    found = {}
    for part in parts:
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise BsprofError(f"{flag}: {part!r} sets nothing", hint="as batch_size=64,amp=bf16")
        found[name] = _one_value(name, value, f"{flag} {name}")
    return found


def _one_value(name: str, text: str, flag: str) -> Any:
    values = parse_values(AXES[name], text, flag)
    if len(values) > 1:
        raise BsprofError(f"{flag}: {text} are {len(values)} values", hint="a side has one of each axis")
    return values[0]


def _settings(given: Mapping[str, Any], environment: Environment, plan: Plan) -> Settings:
    """Return the settings of a side: a small step without workers where nothing else is said."""
    fields = {name: values[0] for name, values in default_axes(environment, quick=False).items()}
    if str(given.get("data", "jpeg")).partition(":")[0] not in ("jpeg", "synthetic"):
        fields.pop("image_size", None)  # other data has a size of its own
    axes = {name: (value,) for name, value in {**fields, **given}.items()}
    # The plan says what cannot be measured.
    (case,) = expand(msgspec.structs.replace(plan, axes=convert_flags({"axes": axes}).axes), environment).cases
    assert case.settings is not None
    return case.settings


# --- how it is measured -----------------------------------------------------------------------------


def _plan(request: Request) -> Plan:
    """Return what holds for each process: nothing but the timed steps, for a fixed time."""
    flags = request.flags
    seconds = SECONDS if flags["seconds"] is None else flags["seconds"]
    deadline = 10 * seconds + BESIDE_S if flags["deadline"] is None else flags["deadline"]
    if request.script and flags["deadline"] is None:
        deadline = 3600.0
    for flag, value in (("seconds", seconds), ("deadline", deadline)):
        if not (math.isfinite(value) and value > 0):
            raise BsprofError(f"--{flag}: {value:g} is no time", hint="give a positive number of seconds")
    return Plan(
        stop=Stop(max_case_time_s=seconds, precision=1e-4),
        seed=flags["seed"],
        malloc=flags["malloc"],
        deadline_s=deadline,
        serialised_steps=0,
        profile_steps=0,
        telemetry_hz=0.0,
        diagnose="off",
        data_root=str(Path(flags["data_root"]).resolve()) if flags["data_root"] else None,
    )


def _protocol(request: Request) -> Protocol:
    """Return the protocol of the flags; a threshold that was not given is NaN, as the floor decides it."""
    flags = request.flags
    threshold, effect, budget = flags["threshold"], flags["effect"], flags["budget"]
    for flag, value in (("threshold", threshold), ("effect", effect)):
        if value is not None and not 0 < value < 1:
            raise BsprofError(f"--{flag}: {value:g} is not between 0 and 1", hint="0.02 is 2 %")
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise BsprofError(f"--budget: {budget:g} is no time", hint="give a positive number of seconds")
    if effect is not None and effect <= (threshold or THRESHOLD):
        raise BsprofError(
            f"--effect: {percent(effect)} lies within the threshold of {percent(threshold or THRESHOLD)}",
            hint="a smaller --threshold, or a larger --effect",
        )
    return Protocol(
        threshold=math.nan if threshold is None else threshold,
        effect=math.nan if effect is None else effect,
        budget_s=BUDGET_S if budget is None else budget,
    )


def _above_the_floor(asked: Protocol, known: NoiseFloor | None) -> Protocol:
    """Return the protocol with its threshold settled: one below this machine's noise floor is refused."""
    floor = known.floor if known else 0.0
    threshold = max(THRESHOLD, math.ceil(floor * 1000) / 1000) if math.isnan(asked.threshold) else asked.threshold
    if known and threshold < floor:
        raise BsprofError(
            f"--threshold: {percent(threshold)} is below this machine's noise floor, {percent(floor)}: the same code "
            f"differed as much from itself on {known.created[:10]}",
            hint="a larger threshold, or a quieter machine: `bsprof ab --aa` measures the floor again",
        )
    effect = EFFECT_OVER_THRESHOLD * threshold if math.isnan(asked.effect) else asked.effect
    if effect <= threshold:
        raise BsprofError(
            f"--effect: {percent(effect)} lies within the threshold, {percent(threshold)}, which is this machine's "
            "noise floor",
            hint="a larger --effect",
        )
    return asked._replace(threshold=threshold, effect=effect)


# --- what came of it --------------------------------------------------------------------------------


def _tell(
    experiment: _Experiment, taken: Taken, request: Request, environment: Environment, floor: NoiseFloor | None
) -> int:
    """Print and keep what came of it, and return the exit code."""
    if not taken.pairs:
        raise BsprofError("stopped before the first pair was measured", exit_code=Exit.INTERRUPTED)
    experiment.keep(taken.pairs, taken.asked)
    comparison = experiment.comparison(taken.pairs)
    show(comparison, request.format)
    notices = terminal.console(stderr=True)
    failed = [one for pair in taken.pairs for one in pair if one.outcome.kind not in ("ok", "skipped")]
    for one in failed[:1]:
        hint = f"; {one.outcome.hint}" if one.outcome.hint else ""
        text = f"failed: {one.outcome.kind}: {one.outcome.message}{hint}"
        notices.print(text, highlight=False, markup=False, soft_wrap=True)
    if len(taken.pairs) < taken.asked and not failed:
        why = "stopped by the user" if taken.interrupted else f"--budget {experiment.protocol.budget_s:g} ended"
        notices.print(
            f"{len(taken.pairs)} pairs, where the pilot's scatter asks for {taken.asked} to find "
            f"{percent(experiment.protocol.effect)}: {why}",
            highlight=False,
            soft_wrap=True,
        )
    if not request.aa:
        known = "not known: `bsprof ab --aa` measures it" if floor is None else f"{percent(floor.floor)}"
        notices.print(f"this machine's noise floor: {known}", highlight=False, style="dim")
    elif not failed and not taken.interrupted:
        _keep_floor(experiment, taken, environment, notices)
    if request.output:
        notices.print(
            f"saved {request.output}; again: bsprof compare {shlex.quote(str(request.output / 'a.json'))} "
            f"{shlex.quote(str(request.output / 'b.json'))} --threshold {experiment.protocol.threshold:g}",
            highlight=False,
            soft_wrap=True,
        )
    if taken.interrupted:
        return Exit.INTERRUPTED
    if request.aa:
        return Exit.DONE if not failed else Exit.USAGE
    return exit_code(comparison)


def _keep_floor(experiment: _Experiment, taken: Taken, environment: Environment, notices: Any) -> None:
    change = experiment.change(taken.pairs)
    if change is None or change.low is None or change.high is None:
        return
    floor = math.expm1(max(abs(math.log(change.low)), abs(math.log(change.high))))
    kept = NoiseFloor(
        identity=identity(environment),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        together=experiment.together,
        floor=floor,
        pairs=len(taken.pairs),
    )
    path = noise.keep(kept)
    how = "in one process" if experiment.together else "in processes of their own"
    notices.print(
        f"noise floor, both sides {how}: {percent(floor)}; smaller thresholds are refused from now on ({path})",
        highlight=False,
        soft_wrap=True,
    )
