"""The command line: one thin function a command, everything heavier imported when it is needed."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import click

from bsprof.errors import BsprofError, Exit

VERSION = "0.1.0"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a code of `bsprof.errors.Exit`: the only place where errors become codes."""
    code: int = Exit.DONE
    _speak_any_encoding()
    try:
        with _terminated_as_interrupted():
            code = commands.main(arguments, prog_name="bsprof", standalone_mode=False) or Exit.DONE
        if sys.stdout is not None:
            sys.stdout.flush()
    except BsprofError as error:
        _complain(error.message, error.hint)
        code = error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"see `{context.command_path if context else 'bsprof'} --help`"
        _complain(" ".join(error.format_message().split()), hint)
        code = Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted", None)
        code = Exit.INTERRUPTED
    except SystemExit:
        pass  # how click meets a reader that has gone
    except OSError as error:
        # A reader of our output that has gone, as in `bsprof show … | head`, is no error; a full disk is one.
        if not isinstance(error, BrokenPipeError):
            _complain(f"{error.filename or 'standard output'}: {error.strerror}", None)
            code = Exit.USAGE
    _drop_unwritable(sys.stdout)
    _drop_unwritable(sys.stderr)
    sys.exit(code)


_PLAIN = str.maketrans("±·─━–—…×µ█≤≥→", "~|-=--.xu#<>>")  # noqa: RUF001 - they are what is replaced


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: by a look-alike of the same width where there is one, else by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = unicodedata.normalize("NFKD", error.object[error.start : error.end].translate(_PLAIN))
    return text.encode("ascii", "backslashreplace").decode(), error.end


def _speak_any_encoding() -> None:
    """Let a terminal or a file that is not UTF-8 cost a table its looks, not the user the table."""
    codecs.register_error("bsprof", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bsprof")


def _drop_unwritable(stream: TextIO | None) -> None:
    """Let go of what cannot be written: Python would try again as it exits, complain, and change the exit code."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(message: str, hint: str | None) -> None:
    for kind, text in (("error", message), ("hint", hint)):
        if text:
            # One line, whatever stands in a file's name.
            line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
            with contextlib.suppress(OSError):
                click.echo(f"{kind}: {line}", err=True)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that what was measured is saved."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SweepCommand(click.Command):
    """A command with one flag for each axis, read off the nouns when the command is really used."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own options behind those of the axes."""
        from bsprof.model import AXES

        axes = [
            click.Option(
                [flag_of(name)], metavar="V[,V…]", help=f"{axis.info.help}.", type=str, default=None, expose_value=True
            )
            for name, axis in AXES.items()
        ]
        return [*axes, *super().get_params(ctx)]


def flag_of(axis: str) -> str:
    """Return the flag of an axis: `--batch-size` for `batch_size`."""
    return "--" + axis.replace("_", "-")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="bsprof")
def commands() -> None:
    """Where a PyTorch training step's time goes, in numbers that can be trusted."""


@commands.command(cls=SweepCommand)
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="Sweep a plan.toml, or repeat a result.json."
)
@click.option("--quick", is_flag=True, help="A smaller sweep, about 30 s.")
@click.option("--dry-run", is_flag=True, help="List the cases and the expected time, measure nothing.")
@click.option("--resume", type=click.Path(path_type=Path), help="Finish the sweep of this result file.")
@click.option("-o", "--output", metavar="FILE", help="Result file, .json or .json.gz; - writes JSON to stdout.")
@click.option("--data-root", help="Folder that holds the data set.")
@click.option("--download", is_flag=True, default=None, help="Download the data set where torchvision can.")
@click.option("--precision", type=float, help="Stop a case at this relative half-width of its interval. [0.02]")
@click.option("--max-case-time", type=float, metavar="S", help="Stop a case after this time, warm-up included.")
@click.option("--deadline", type=float, metavar="S", help="End a case that still runs after this time. [300]")
@click.option("--max-failures", type=int, metavar="N", help="End the sweep after so many failed cases.")
@click.option("--nnodes", type=int, metavar="N", help="Share the ranks among so many machines; run it on each of them.")
@click.option("--rdzv-endpoint", metavar="HOST[:PORT]", help="Node 0, where the others meet it. [port 29400]")
@click.option(
    "--scaling", type=click.Choice(["weak", "strong"]), help="Whose --batch-size: each rank's, or all's. [weak]"
)
@click.option("--repeat", type=int, help="Processes a case; the spread between them is reported. [1]")
@click.option("--seed", type=int, help="Of the case order, the weights and the shuffling. [0]")
@click.option("--order", type=click.Choice(["shuffled", "listed"]), help="Order of the cases. [shuffled]")
@click.option(
    "--malloc", type=click.Choice(["pinned", "default"]), help="Keep freed host memory while measuring. [pinned]"
)
@click.option("--host-memory", metavar="SIZE", help="Private memory that a case's process may have, as 4GiB.")
@click.option("--serialised-steps", type=int, help="Steps timed with a synchronisation at each boundary. [10]")
@click.option("--profile-steps", type=int, help="Steps under torch.profiler after the timed window; 0 for none. [5]")
@click.option("--trace", type=click.Path(path_type=Path), help="Keep the profiler's trace: a .json[.gz], or a folder.")
@click.option("--nvtx", is_flag=True, default=None, help="An NVTX range around each phase, for Nsight Systems.")
@click.option("--telemetry-hz", type=float, help="Samples a second of clocks, power and memory; 0 for none. [10]")
@click.option("--diagnose", is_flag=True, default=None, help="Say in full why each case's loader is slow.")
@click.option("--max-batch", is_flag=True, default=None, help="Search the largest batch that fits.")
@click.option(
    "--max-batch-margin", type=float, metavar="SHARE", help="Share of the memory that it must leave free. [0.05]"
)
def bench(
    plan_file: Path | None,
    quick: bool,
    dry_run: bool,
    resume: Path | None,
    output: str | None,
    trace: Path | None,
    **flags: Any,
) -> int:
    """Measure where a step's time goes, over any axes.

    Every axis takes a list, and all combinations are measured, each in a process of its own. Without arguments:
    MobileNetV2 on generated JPEG files, with batch sizes and workers that fit this machine.
    """
    from bsprof import bench as benching

    request = benching.Request(plan_file=plan_file, quick=quick, resume=resume, output=output, trace=trace, flags=flags)
    return benching.run(request, dry_run=dry_run, version=VERSION)


@commands.command()
@click.argument("target")
@click.option("--batch-size", type=int, help="Samples in a batch. [32 for a data set without a loader]")
@click.option("--workers", type=int, help="DataLoader worker processes; 0 loads in the main process.")
@click.option("--prefetch", type=int, help="Batches prepared ahead by each worker.")
@click.option("--start-method", type=click.Choice(["fork", "forkserver", "spawn"]), help="How workers are started.")
@click.option("--persistent-workers/--no-persistent-workers", default=None, help="Workers outlive an epoch.")
@click.option("--pin-memory/--no-pin-memory", default=None, help="Page-locked batches.")
@click.option("--in-order/--no-in-order", default=None, help="Batches come in the sampler's order.")
@click.option("--shuffle/--no-shuffle", default=None, help="A new order each epoch.")
@click.option("--step-ms", type=float, metavar="MS", help="Take so long for a step, the cores left to the workers.")
@click.option("--model", help="Train this model on the batches: its step is measured.")
@click.option("--seconds", type=float, default=10.0, help="Watch so long from the first batch on. [10]")
@click.option("--sweep", is_flag=True, help="Predict the throughput for each number of workers and prefetch.")
@click.option("--verify", is_flag=True, help="Apply the change that is prescribed and measure again, in turns.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Chrome trace, .json or .json.gz, for Perfetto.")
@click.option("-o", "--output", metavar="FILE", help="Result file, .json or .json.gz; - writes JSON to stdout.")
@click.option("--data-root", help="Folder that holds the data set.")
@click.option("--deadline", type=float, metavar="S", help="Give the loader up after this time. [10 x --seconds]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the shuffling and the model's weights. [0]")
def loader(target: str, output: str | None, trace: Path | None, sweep: bool, verify: bool, **flags: Any) -> int:
    """Say why a DataLoader is slow, what to change, and prove it.

    TARGET is pkg.module:name of a DataLoader, a Dataset, or a function that returns one, or a data set of `bsprof
    workloads`, as imagefolder:PATH. Without --step-ms or --model batches are taken as fast as they come.
    """
    from bsprof import diagnosing

    request = diagnosing.Request(target=target, output=output, trace=trace, sweep=sweep, verify=verify, flags=flags)
    return diagnosing.run(request)


@commands.command()
@click.argument("result", type=click.Path(path_type=Path))
def show(result: Path) -> None:
    """Print the table of a saved RESULT again."""
    from bsprof import store
    from bsprof.report import terminal

    terminal.render(store.load(result), terminal.console())


_format_of_comparison = click.option(
    "--format",
    "output_format",
    type=click.Choice(["rich", "markdown", "json", "github"]),
    default="rich",
    help="A table for the terminal or for a pull request, JSON, or a workflow's annotations. [rich]",
)


@commands.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@_format_of_comparison
@click.option("--threshold", type=float, metavar="SHARE", help="Let the step change by this share. [0.02]")
@click.option("--strict/--no-strict", default=None, help="Fail (4) where something could not be decided.")
@click.option("--allow", multiple=True, metavar="NAME[,NAME]", help="Compare although this of the machine differs.")
@click.option(
    "--paired/--no-paired",
    default=None,
    help="The i-th process of both sides were measured in turns. [of the sides of `bsprof ab`]",
)
def compare(
    base: Path,
    new: Path,
    output_format: Literal["rich", "markdown", "json", "github"],
    threshold: float | None,
    strict: bool | None,
    allow: tuple[str, ...],
    paired: bool | None,
) -> int:
    """Say what has changed from BASE to NEW, with intervals.

    Each is a result, or a folder of results of one machine. Exit code 0: nothing is slower; 1: a case regressed; 3:
    they cannot be compared; 4: undecided, with --strict; 5: a case is missing. Thresholds of metrics and cases stand
    in pyproject.toml, [tool.bsprof.gate].
    """
    from bsprof import comparing

    return comparing.run(comparing.Request(base, new, output_format, threshold, strict, allow, paired))


@commands.command(cls=SweepCommand)
@click.option("--a", metavar="SIDE", help="Settings, a commit, a folder, a Python, or a script; what is compared with.")
@click.option("--b", metavar="SIDE", help="Another of the same kind.")
@click.option("--aa", is_flag=True, help="Compare a thing with itself: this machine's noise floor, which is kept.")
@click.option("--threshold", type=float, metavar="SHARE", help="A change within is none. [0.005, or the noise floor]")
@click.option("--effect", type=float, metavar="SHARE", help="Change that is to be found. [4 x the threshold]")
@click.option("--budget", type=float, metavar="S", help="Begin no pair that would end later; 4 are measured. [60]")
@click.option("--seconds", type=float, metavar="S", help="Measure each side so long in a process. [2]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep both sides' results there."
)
@_format_of_comparison
@click.option(
    "--malloc", type=click.Choice(["pinned", "default"]), default="pinned", help="Keep freed host memory. [pinned]"
)
@click.option("--data-root", help="Folder that holds the data set.")
@click.option("--deadline", type=float, metavar="S", help="End a process that still runs after this time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the weights and the shuffling. [0]")
@click.argument("script", nargs=-1)
def ab(
    a: str | None,
    b: str | None,
    aa: bool,
    script: tuple[str, ...],
    output: Path | None,
    output_format: Literal["rich", "markdown", "json", "github"],
    **flags: Any,
) -> int:
    """Measure two things against each other, in turns.

    --a and --b are two settings (batch_size=64,amp=bf16), two commits or folders, two Pythons, or two scripts; axes
    given as flags hold for both. SCRIPT [ARGS] is run in each commit, folder or Python instead of bsprof's own step.
    Exit codes are those of `bsprof compare`: 1 where B is slower.
    """
    from bsprof import ab as comparing_in_turns

    return comparing_in_turns.run(comparing_in_turns.Request(a, b, aa, script, output, output_format, flags))


@commands.command()
@click.option(
    "--measure", is_flag=True, help="Measure what it can do at the most, where that is not known yet; 20 to 60 s."
)
@click.option("--refresh", is_flag=True, help="Measure that again, although it is known.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(measure: bool, refresh: bool, as_json: bool) -> None:
    """Print the machine, its software, and its ceilings.

    Ceilings are what the machine does at the most: copies, matrix products, decoding, reading, cores that really run
    at once. They are measured once, kept in the user's cache, and go into every result of this machine.
    """
    from bsprof import ceilings
    from bsprof.report import ceilings as rendering
    from bsprof.report import terminal
    from bsprof.sweep.runner import describe_environment, measure_ceilings

    environment = describe_environment()
    known = None if refresh else ceilings.cached(environment)
    unkept: BsprofError | None = None
    if refresh or (measure and known is None):
        notices = terminal.console(stderr=True)
        known = measure_ceilings(
            ceilings.identity(environment), lambda stage: notices.print(f"measuring {stage}", soft_wrap=True)
        )
        try:
            ceilings.keep(known)
        except BsprofError as error:
            unkept = error
    if as_json:
        import msgspec

        whole = {**msgspec.to_builtins(environment), "ceilings": msgspec.to_builtins(known)}
        click.echo(msgspec.json.format(msgspec.json.encode(whole)).decode())
    else:
        console = terminal.console()
        terminal.render_environment(environment, console)
        console.print()
        rendering.render(known, None if unkept or known is None else ceilings.path_of(known.identity), console)
    if unkept:
        raise unkept


@commands.command()
def workloads() -> None:
    """List the models and data sets that have a name."""
    from bsprof.report import terminal
    from bsprof.sweep.runner import catalogue

    terminal.render_catalogue(catalogue(), terminal.console())


@commands.command()
def selftest() -> int:
    """Plant known delays and check that they come back.

    A delay is put into each phase of the real step loop in turn, and must be found there and nowhere else.
    """
    from bsprof.report import terminal
    from bsprof.sweep.runner import check_clocks

    checks = check_clocks()
    terminal.render_selftest(checks, terminal.console())
    return Exit.DONE if all(check.passed for check in checks) else Exit.VERDICT


@commands.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["rich", "markdown", "json"]),
    default="rich",
    help="A table for the terminal or for a page, or JSON. [rich]",
)
@click.option("--metric", default="step", help="Follow this metric of each case. [step]")
@click.option("--threshold", type=float, default=0.02, metavar="SHARE", help="Let it drift by this share. [0.02]")
def history(
    results: tuple[Path, ...], output_format: Literal["rich", "markdown", "json"], metric: str, threshold: float
) -> int:
    """Say since when a case is slower, over many results.

    RESULTS are results and folders of results of one machine, taken in the order in which they were measured. Exit code
    0: nothing has drifted to the worse; 1: a case has, beyond the threshold; 3: they do not belong together.
    """
    from bsprof import tracking

    return tracking.run(tracking.Request(results, output_format, metric, threshold))
