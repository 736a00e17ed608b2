"""Several machines: two hosts made of network namespaces, a cable between them, and what goes wrong with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import TINY, command, ended, eventually, only_result, run, surroundings
from machines import environment

from bsprof import bench as benching
from bsprof.errors import BsprofError
from bsprof.model import Measurement, Result
from bsprof.sweep.nodes import DEFAULT_PORT, expand_nodes, find_party, parse_endpoint

ROOT = Path(__file__).parents[1]
SHORT = (
    "--data", "factories:Pixels", "--workers", "0", "--precision", "0.5", "--max-case-time", "2", "--order", "listed",
    "--batch-size", "4", "--threads", "1", "--profile-steps", "0", "--telemetry-hz", "0",
)  # fmt: skip
LONG_S = 240


def outcomes(result: Result) -> list[str]:
    return [measurement.outcome.kind for measurement in result.measurements]


def message(measurement: Measurement) -> str:
    return measurement.outcome.message or ""


# --- who this is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node01", ("node01", DEFAULT_PORT)),
        ("node01:29", ("node01", 29)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[fd00::1]:4000", ("fd00::1", 4000)),
        ("[fd00::1]", ("fd00::1", DEFAULT_PORT)),
    ],
)
def test_endpoints_are_read(text, found):
    assert parse_endpoint(text) == found


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:b", "a:0", "a:65536", "fd00::1", "a b", "[a:1", "a:-1"])
def test_what_is_no_endpoint_is_refused(text):
    with pytest.raises(BsprofError, match="--rdzv-endpoint") as refused:
        parse_endpoint(text)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("node[01-04,7]", ["node01", "node02", "node03", "node04", "node7"]),
        ("a[1-2]-b", ["a1-b", "a2-b"]),
        ("a[1-2]-b,c[9-10],d", ["a1-b", "a2-b", "c9", "c10", "d"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("gpu-a100-[003]", ["gpu-a100-003"]),
    ],
)
def test_slurms_node_lists_are_read(listed, names):
    assert expand_nodes(listed) == names


@pytest.mark.parametrize("listed", ["", "a[1-2", "a[x]", "a[1-]", "a[]", "a1-2]"])
def test_what_is_no_node_list_is_refused(listed):
    with pytest.raises(BsprofError, match="SLURM_JOB_NODELIST"):
        expand_nodes(listed)


def slurm(**more: str) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "3", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[07-09]"}
    return {**job, **{name: value for name, value in more.items() if value}}


def test_slurm_says_who_leads():
    party = find_party(None, None, slurm())
    assert party is not None
    assert (party.host, party.port, party.leads, party.nodes) == ("node07", DEFAULT_PORT, False, 3)
    assert party.note is not None
    assert "node07" in party.note.text


def test_a_step_of_a_slurm_job_counts_and_not_the_job():
    party = find_party(None, None, slurm(SLURM_STEP_NUM_NODES="2", SLURM_STEP_NODELIST="node[08-09]"))
    assert party is not None
    assert (party.host, party.nodes) == ("node08", 2)
    assert find_party(None, None, slurm(SLURM_STEP_NUM_NODES="1", SLURM_STEP_NODELIST="node08")) is None


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "77"}, {**slurm(), "SLURM_NNODES": "1"}])
def test_without_several_nodes_there_is_no_party(variables):
    assert find_party(None, None, variables) is None


def test_on_slurm_one_machine_can_be_asked_for():
    assert find_party(1, None, slurm()) is None


@pytest.mark.parametrize(
    "more",
    [
        {"SLURM_NTASKS_PER_NODE": "2"},
        {"SLURM_STEP_TASKS_PER_NODE": "1(x2),4"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
        {"SLURM_LOCALID": "1"},
    ],
)
def test_more_than_one_process_a_node_is_refused(more):
    with pytest.raises(BsprofError, match="processes of bsprof a node") as refused:
        find_party(None, None, slurm(**more))
    assert "--ntasks-per-node=1" in (refused.value.hint or "")


@pytest.mark.parametrize("told", ["1", "1(x3)", "1(x2),1"])
def test_one_process_a_node_is_what_slurm_should_start(told):
    assert find_party(None, None, slurm(SLURM_STEP_TASKS_PER_NODE=told, SLURM_LOCALID="0")) is not None


def test_a_slurm_job_without_srun_is_told_how():
    variables = slurm()
    del variables["SLURM_NODEID"]
    with pytest.raises(BsprofError, match="3 nodes") as refused:
        find_party(None, None, variables)
    assert "srun" in (refused.value.hint or "")


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "here",
    "MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip


def test_torchrun_says_who_leads_even_on_slurm():
    party = find_party(None, None, {**slurm(), **TORCHRUN})
    assert party is not None
    assert (party.host, party.port, party.leads, party.nodes, party.world_size) == ("here", 1234, False, 2, 4)
    assert party.launched
    assert party.kept
    first = find_party(None, None, {**TORCHRUN, "RANK": "0"})
    assert first is not None
    assert first.leads


def test_torchrun_with_one_process_is_no_party():
    assert find_party(None, None, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("nnodes", "endpoint", "variables", "says"),
    [
        (2, None, {}, "--nnodes 2: without --rdzv-endpoint"),
        (None, "a:1", {}, "--rdzv-endpoint a:1: without --nnodes"),
        (0, "a:1", {}, "--nnodes 0"),
        (2, "a:b", {}, "expected HOST or HOST:PORT"),
        (2, "host.invalid", {}, "host.invalid"),
        (2, "localhost", {}, "which no other machine reaches"),
        (2, "a:1", TORCHRUN, "torchrun has started the ranks already"),
    ],
)
def test_flags_that_do_not_fit_are_refused(nnodes, endpoint, variables, says):
    with pytest.raises(BsprofError) as refused:
        find_party(nnodes, endpoint, variables)
    assert says in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nnodes", "2"), "error: --nnodes 2: without --rdzv-endpoint"),
        (("--rdzv-endpoint", "a:1"), "error: --rdzv-endpoint a:1: without --nnodes"),
    ],
)
def test_one_flag_without_the_other_is_one_clear_line(tmp_path, flags, says):
    done = run(tmp_path, "bench", *TINY, *flags)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [says]
    assert "hint: " in done.stderr
    assert done.stdout == ""


# --- torchrun ---------------------------------------------------------------------------------------


def torchrun(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=directory,
        env=surroundings(),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        stdin=subprocess.DEVNULL,
    )


def test_torchruns_ranks_are_the_world(tmp_path):
    models = "rank_models:Killed,rank_models:Raises,rank_models:Hangs,factories:Perceptron"
    done = torchrun(tmp_path, "-m", "bsprof", "bench", "--model", models, *SHORT, "--deadline", "12")
    assert done.returncode == 0, done.stderr
    result = only_result(tmp_path)
    assert outcomes(result) == ["crash", "error", "timeout", "ok"], [message(m) for m in result.measurements]
    killed, raised, hung, good = result.measurements
    assert "rank 1: killed by SIGKILL" in message(killed)
    assert "rank 1: " in message(raised)
    assert "no weights today" in message(raised)
    assert "rank 1 still in forward" in message(hung)
    assert "rank 0 waits for it" in message(hung)
    assert [rank.rank for rank in good.ranks] == [0, 1]
    assert good.case.settings is not None
    assert good.case.settings.world_size == 2
    assert good.samples is not None
    assert good.samples.batch_size == 8
    assert good.communication is not None
    assert good.communication.backend == "gloo"
    assert "factories:Perceptron" in done.stdout
    assert "following" not in done.stderr


@pytest.mark.parametrize("asked", ["1", "1,2", "4"])
def test_torchrun_allows_no_other_world(asked):
    party = find_party(None, None, {**TORCHRUN, "WORLD_SIZE": "2"})
    with pytest.raises(BsprofError, match=f"--world-size {asked}: torchrun has started 2 ranks"):
        benching.world_sizes(asked, party, environment())
    for same in (None, "auto", "2"):
        assert benching.world_sizes(same, party, environment()) == {"world_size": (2,)}


def test_several_nodes_have_a_rank_for_each_device_and_auto_all_there_are():
    party = find_party(None, None, slurm())
    none = environment(accelerators=(), cores_usable=4)
    assert benching.world_sizes(None, party, none) == {"world_size": (3,)}
    assert benching.world_sizes("auto", party, none) == {"world_size": (3, 6, 12)}
    assert benching.world_sizes("3,6", party, none) == {}
    assert benching.world_sizes(None, None, none) == {}


# --- two hosts --------------------------------------------------------------------------------------


class Hosts:
    """Two network namespaces, each with a name and an address of its own, and a cable.

    Each lives as long as the process that holds it, and so ends with this one whatever happens.
    """

    NAMES = ("nodea", "nodeb")
    ADDRESSES = ("10.213.7.1", "10.213.7.2")
    CABLE = "cable"

    def __init__(self, directory: Path) -> None:
        self.folders = tuple(directory / name for name in self.NAMES)
        self.mark = directory / "mark"
        self._holders: list[subprocess.Popen[str]] = []
        self._running: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        for folder, name in zip(self.folders, self.NAMES, strict=True):
            folder.mkdir()
            script = f"hostname {name} && echo there && exec cat"  # until this end of its pipe is closed
            holder = subprocess.Popen(
                ["unshare", "--net", "--uts", "sh", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self._holders.append(holder)
            assert holder.stdout is not None
            if (said := holder.stdout.readline().strip()) != "there":
                raise subprocess.CalledProcessError(1, "unshare", stderr=said)
        a, b = (str(holder.pid) for holder in self._holders)
        cable = ("link", "add", self.CABLE, "netns", a, "type", "veth", "peer", "name", self.CABLE, "netns", b)
        subprocess.run(["ip", *cable], check=True, capture_output=True, text=True)
        for number, address in enumerate(self.ADDRESSES):
            self.inside(number, "ip", "addr", "add", f"{address}/24", "dev", self.CABLE)
            self.inside(number, "ip", "link", "set", "lo", "up")
            self.inside(number, "ip", "link", "set", self.CABLE, "up")

    def remove(self) -> None:
        for process in (*self._running, *self._holders):
            if process.poll() is None:
                process.kill()
                process.communicate()

    def enter(self, number: int) -> list[str]:
        return ["nsenter", "--target", str(self._holders[number].pid), "--net", "--uts"]

    def inside(self, number: int, *arguments: str) -> None:
        subprocess.run([*self.enter(number), *arguments], check=True, capture_output=True, text=True)

    def cut(self) -> None:
        self.inside(1, "ip", "link", "set", self.CABLE, "down")

    def mend(self) -> None:
        self.inside(1, "ip", "link", "set", self.CABLE, "up")

    def slow(self, kilobits: int) -> None:
        """Let no more through from the second host, and nothing in a burst; `netem` is missing in many kernels."""
        bucket = ("tbf", "rate", f"{kilobits}kbit", "burst", "2kb", "latency", "5s")
        try:
            self.inside(1, "tc", "qdisc", "add", "dev", self.CABLE, "root", *bucket)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel slows no cable: {error.stderr.strip()}")

    def start(self, number: int, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*self.enter(number), *command("bench", *arguments)],
            cwd=self.folders[number],
            env=surroundings(BSPROF_TEST_MARK=str(self.mark), **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._running.append(process)
        return process

    def meet(self, number: int, *arguments: str) -> subprocess.Popen[str]:
        return self.start(number, *arguments, "--nnodes", "2", "--rdzv-endpoint", f"{self.ADDRESSES[0]}:29555")

    def both(self, *arguments: str) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
        return self.meet(0, *arguments), self.meet(1, *arguments)

    def wait_for_steps(self) -> None:
        """Wait until a case is really trained, by the model that says so; the next one is waited for anew."""
        assert eventually(self.mark.exists, 120)
        self.mark.unlink()


HOSTS = "BSPROF_TEST_HOSTS"
"""An environment variable that asks for the tests on two hosts."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if not os.environ.get(HOSTS):
        pytest.skip(f"two machines take a minute and a half: {HOSTS}=1 runs them")
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed here")
    made = Hosts(tmp_path)
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces take rights that are missing here: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LONG_S)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def step_s(measurement: Measurement, kind: str) -> float:
    """Return the median step of rank 0 in blocks of that kind."""
    blocks = [block for block in measurement.ranks[0].blocks if block.kind == kind]
    return statistics.median(block.wall_ns / block.steps / 1e9 for block in blocks)


def descendants(process: subprocess.Popen[str]) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    return []


def test_two_nodes_measure_together_and_the_cable_between_them_is_seen(hosts):
    """As a Slurm job, so that no flag says where they meet."""
    hosts.slow(256)
    job = {"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": ",".join(hosts.ADDRESSES)}
    arguments = ("--model", "rank_models:Killed,factories:Perceptron", *SHORT, "--deadline", "90")
    leader, follower = (hosts.start(number, *arguments, **job, SLURM_NODEID=str(number)) for number in (0, 1))
    code, out, err = finish(leader)
    assert code == 0, err
    assert "note: 2 nodes of Slurm job 5, 10.213.7.1 leads" in err
    assert "rank_models:Killed" in out
    endpoint = f"{hosts.ADDRESSES[0]}:{DEFAULT_PORT}"
    assert finish(follower) == (0, "", f"following node 0 at {endpoint}: the result is written there\n")
    assert list(hosts.folders[1].iterdir()) == []
    result = only_result(hosts.folders[0])
    assert result.plan is not None
    assert result.plan.nodes == 2
    assert "slurm_nodes" in {note.code for note in result.notes}
    assert outcomes(result) == ["crash", "ok"], [message(m) for m in result.measurements]
    killed, good = result.measurements
    assert "rank 1: killed by SIGKILL" in message(killed)
    assert [(rank.rank, rank.node, rank.host) for rank in good.ranks] == [(0, 0, "nodea"), (1, 1, "nodeb")]
    assert good.samples is not None
    assert good.samples.batch_size == 8
    # 7,720 bytes of gradients a step take 0.24 s at that rate, less what the bucket lets through at once.
    assert step_s(good, "synchronised") > 0.15
    assert step_s(good, "synchronised") > step_s(good, "unsynchronised")


def test_what_breaks_ends_a_case_and_whoever_comes_back_joins_the_next_one(hosts):
    arguments = (
        "--model", "rank_models:Marking", *SHORT, "--deadline", "60", "--repeat", "4", "--max-case-time", "30",
    )  # fmt: skip
    leader, follower = hosts.both(*arguments)
    hosts.wait_for_steps()
    started = descendants(follower)
    os.kill(follower.pid, signal.SIGKILL)
    follower.communicate()
    assert ended(started)
    follower = hosts.meet(1, *arguments)  # in the middle of a case that it cannot join
    (journal,) = hosts.folders[0].glob("*.journal")
    assert eventually(lambda: journal.read_bytes().count(b"\n") >= 2, 60)
    hosts.wait_for_steps()  # the second case, with both of them again
    hosts.cut()
    assert eventually(lambda: journal.read_bytes().count(b"\n") >= 3, 60)
    hosts.mend()
    hosts.wait_for_steps()  # the third
    started = [*descendants(leader), *descendants(follower)]
    leader.send_signal(signal.SIGINT)
    code, _, err = finish(leader)
    assert code == 130, err
    assert finish(follower)[0] == 0
    assert ended(started)
    result = only_result(hosts.folders[0])
    assert outcomes(result) == ["crash", "crash", "interrupted", "skipped"], [message(m) for m in result.measurements]
    for gone in result.measurements[:2]:
        assert message(gone) == "node nodeb is gone (rank 1): nothing heard of it for 10 s"


def test_who_waits_in_vain_gives_up_and_a_node_that_was_told_otherwise_says_so(hosts):
    endpoint = ("--rdzv-endpoint", hosts.ADDRESSES[0])
    leader = hosts.start(
        0, "--model", "factories:Perceptron", *SHORT, "--deadline", "12", "--nnodes", "2", *endpoint, "--repeat", "2",
        "--max-failures", "1",
    )  # fmt: skip
    follower = hosts.start(1, *TINY, "--deadline", "60", "--nnodes", "3", *endpoint)
    elsewhere = f"{hosts.ADDRESSES[0]}:29444"
    stray = hosts.start(1, *TINY, "--deadline", "3", "--nnodes", "2", "--rdzv-endpoint", elsewhere)
    code, _, err = finish(follower)
    assert code == 2
    assert "error: --nnodes 3: node 0 measures with 2" in err
    code, _, err = finish(leader)
    assert code == 2, err
    result = only_result(hosts.folders[0])
    assert outcomes(result) == ["timeout", "skipped"]
    absent = f"only 1 of 2 nodes came to {hosts.ADDRESSES[0]}:{DEFAULT_PORT} within "
    assert message(result.measurements[0]).startswith(absent)
    code, out, err = finish(stray)
    assert (code, out) == (2, "")
    assert f"error: {elsewhere}: node 0 was not there for 3 s" in err
    assert "hint: " in err


# --- what is documented -----------------------------------------------------------------------------


def test_the_example_for_slurm_is_a_shell_script_that_starts_one_process_a_node():
    script = ROOT / "docs" / "examples" / "bsprof-bench.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "srun " in text
