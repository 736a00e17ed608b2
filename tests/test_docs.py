"""What is written is what there is: commands, flags, names and examples."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest
import torch
from factories import Perceptron, Pixels
from torch.utils.data import DataLoader

from bsprof import store
from bsprof.cli import commands, flag_of
from bsprof.model import AXES, PHASES, Gate, OutcomeKind
from bsprof.sweep.plan import parse_values

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
CONCEPTS = TEXT["docs/concepts.md"]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [body for found, body in _FENCED.findall(TEXT[page]) if found == language]


# --- commands and flags -----------------------------------------------------------------------------


def flags_of(command: click.Command) -> Iterator[str]:
    """Return the flags of a command, each by its long name."""
    context = click.Context(command, info_name=command.name)
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            yield max(parameter.opts, key=len)


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_and_flag_is_documented(name):
    written = "\n".join(TEXT.values())
    assert re.search(rf"\bbsprof {name}\b", written)
    missing = [flag for flag in flags_of(commands.commands[name]) if not re.search(rf"{flag}(?![\w-])", written)]
    assert [flag for flag in missing if flag != "--help"] == []


def written_commands() -> Iterator[tuple[str, str]]:
    """Return (page, arguments) of each `bsprof …` in a block of code or in backticks."""
    for page, text in TEXT.items():
        shell = [line for body in blocks(page, "sh") for line in body.splitlines()]
        prose = _FENCED.sub("", text)
        indented = [line.strip() for line in prose.splitlines() if line.startswith("    ")]
        inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        for line in (*shell, *indented, *inline):
            for part in re.split(r"&&|\||;", line):
                words = part.strip().removeprefix("$ ")
                if re.match(r"(\S*/)?bsprof( |$)", words):
                    yield page, words


WRITTEN = sorted(set(written_commands()))


def test_commands_are_found_in_the_pages():
    named = {shlex.split(command, comments=True)[1:2][0] for _, command in WRITTEN if " " in command}
    assert named >= {"bench", "show", "env", "selftest", "workloads"}


@pytest.mark.parametrize(("page", "command"), WRITTEN, ids=[f"{page}: {command}" for page, command in WRITTEN])
def test_every_command_line_that_is_written_parses(page, command):
    _, *words = shlex.split(command, comments=True)
    if len(words) < 2:  # a command is mentioned, not written out
        assert set(words) <= {*commands.commands, "--help", "--version"}
        return
    try:
        with commands.make_context("bsprof", list(words)) as top:
            name, found, rest = commands.resolve_command(top, [*top._protected_args, *top.args])
            assert found is not None
            with found.make_context(name, rest, parent=top) as context:
                axes = AXES if name == "bench" else ()
                given = {flag: context.params[flag] for flag in axes if context.params.get(flag) is not None}
                if given.get("world_size") == "auto":  # which only a machine can tell
                    del given["world_size"]
    except click.exceptions.Exit as end:  # --help and --version
        assert end.exit_code == 0
        return
    for axis, text in given.items():
        assert parse_values(AXES[axis], text, flag_of(axis))


def test_the_two_commands_open_the_readme():
    """Each complete on a fresh machine: a virtual environment, an installation, and what is to be run."""
    bench, test = re.findall(r"^    (python3 -m venv .*)$", TEXT["README.md"], re.MULTILINE)
    for line in (bench, test):
        venv, install, run = (shlex.split(part) for part in line.split("&&"))
        assert venv == ["python3", "-m", "venv", ".venv"]
        assert install[0] == ".venv/bin/pip"
        assert run[0] in (".venv/bin/bsprof", ".venv/bin/pytest")
    assert TEXT["README.md"].index(test) < 800


# --- examples ---------------------------------------------------------------------------------------


def test_the_readmes_loop_runs(tmp_path, monkeypatch):
    (example,) = blocks("README.md", "python")
    monkeypatch.chdir(tmp_path)
    model = Perceptron()
    scope = {
        "loader": DataLoader(Pixels(), batch_size=64),
        "device": torch.device("cpu"),
        "model": model,
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(example, scope)
    result = store.load(tmp_path / "run.json")
    (measurement,) = result.measurements
    assert measurement.samples is not None
    assert tuple(measurement.samples.host_ns) == PHASES
    assert measurement.samples.batch_size == 64


def test_reading_a_result_in_python_runs(tmp_path, monkeypatch, capsys):
    (example,) = blocks("docs/result-file.md", "python")
    monkeypatch.chdir(tmp_path)
    golden = store.load(ROOT / "tests" / "golden" / "result-schema-1.json")
    store.save(golden, "result.json")
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) >= 1


@pytest.mark.parametrize("page", sorted(TEXT))
def test_written_plans_and_gates_are_read(page, tmp_path):
    for body in blocks(page, "toml"):
        path = tmp_path / "plan.toml"
        path.write_text(body)
        assert store.load_gate(path) != Gate() if "[tool.bsprof.gate" in body else store.read_plan(path)


# --- names ------------------------------------------------------------------------------------------


def note_codes() -> set[str]:
    """Return the code of every Note that the source can make."""
    codes = set()
    for path in (ROOT / "bsprof").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"] if name == "Note" else []
            given += node.args[:1] if name == "_note" else []
            codes |= {value.value for value in given if isinstance(value, ast.Constant)}
    return codes


def test_the_source_makes_notes():
    assert {"axis_collapsed", "precision_not_reached", "cpu_contended", "no_steady_state"} <= note_codes()


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([flag_of(axis) for axis in AXES], id="axes"),
        pytest.param([*PHASES, "other"], id="phases"),
        pytest.param(list(get_args(OutcomeKind)), id="outcomes"),
        pytest.param(sorted(note_codes()), id="notes"),
        pytest.param(["starting", "build", "warmup", "measure", "inspect", "epoch", "loader"], id="stages"),
    ],
)
def test_concepts_explains_every_name(names):
    """In the first column of a table, which is where one looks it up."""
    explained = {
        name for row in re.findall(r"^\|([^|]+)\|", CONCEPTS, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    assert [name for name in names if name not in explained] == []


def test_concepts_explains_no_note_that_does_not_exist():
    section = CONCEPTS.partition("### Notes")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == note_codes()


# --- links ------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "reports").rglob("*.md"))]


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in LINKED])
def test_relative_links_lead_somewhere(page):
    text = _FENCED.sub("", (ROOT / page).read_text())
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if there.suffix == ".md" else []
        if not there.exists() or (fragment and fragment not in map(anchor, headings)):
            wrong.append(target)
    assert wrong == []
