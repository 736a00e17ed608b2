"""The processes of bsprof that measure together on several machines: which of them this one is, and how others follow.

Node 0 sweeps and writes the result. Every other node needs no plan: it brings its share of the ranks to whatever case
node 0 measures, until that says that no case follows.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import psutil  # type: ignore[import-untyped]

from bsprof import store
from bsprof.errors import BsprofError
from bsprof.noun import Note
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.process import ChildError, Progressed, call

DEFAULT_PORT = 29400
"""torchrun's as well."""

FAREWELL_S = 10.0
"""Node 0 waits so long at its end for nodes that have not heard of it yet."""

STUCK_S = 20.0
"""A follower that has heard nothing of node 0 for so long in the middle of a case ends its part in it."""

_EXAMPLE = "for example --nnodes 2 --rdzv-endpoint node01:29400, the same on both machines"
_SRUN = "start one a node: srun --ntasks-per-node=1 bsprof bench …; or measure on one machine with --nnodes 1"


class Party(NamedTuple):
    """The processes that measure together, and which of them this is."""

    host: str
    port: int
    leads: bool
    """Whether this is node 0."""
    nodes: int
    """Machines."""
    processes: int
    """Of bsprof: one a machine, or one a rank where a launcher has started those."""
    launched: bool = False
    kept: bool = False
    """Whether the launcher keeps a store at the endpoint."""
    prefix: str = ""
    note: Note | None = None

    @property
    def endpoint(self) -> str:
        """Return HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def world_size(self) -> int | None:
        """The number of ranks where a launcher has fixed it."""
        return self.processes if self.launched else None

    def meeting(self, name: str) -> dict[str, Any]:
        """Return where the ranks of a case of that name meet, for its process."""
        return {
            "host": self.host,
            "port": self.port,
            "nodes": self.processes,
            "name": name,
            "launched": self.launched,
            "kept": self.kept,
            "prefix": self.prefix,
        }


def find_party(nnodes: int | None, endpoint: str | None, variables: Mapping[str, str]) -> Party | None:
    """Return who measures together by these flags and environment variables, or None where this process is alone.

    Raises BsprofError where they do not fit together, or this machine cannot be what they make of it.
    """
    if endpoint is not None and nnodes is None:
        raise BsprofError(f"--rdzv-endpoint {endpoint}: without --nnodes", hint=_EXAMPLE)
    launched = _of_torchrun(variables)
    if launched:
        if nnodes is not None:
            raise BsprofError(f"--nnodes {nnodes}: torchrun has started the ranks already", hint="leave it out")
        return launched
    if nnodes is None:
        return _of_slurm(variables)
    if nnodes < 1:
        raise BsprofError(f"--nnodes {nnodes}: expected 1 or more", hint=_EXAMPLE)
    if nnodes == 1:
        return None
    if endpoint is None:
        raise BsprofError(f"--nnodes {nnodes}: without --rdzv-endpoint", hint=_EXAMPLE)
    host, port = parse_endpoint(endpoint)
    own = _is_own(host)
    return _usable(Party(host=host, port=port, leads=own, nodes=nnodes, processes=nnodes))


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host and port of `HOST`, `HOST:PORT` or `[IPv6]:PORT`. Raises BsprofError."""
    match = re.fullmatch(r"(?:\[(?P<bracketed>[^\]\s]+)\]|(?P<plain>[^\s:\[\]]+))(?::(?P<port>\d+))?", text.strip())
    if not match:
        raise BsprofError(f"--rdzv-endpoint {text}: expected HOST or HOST:PORT", hint=_EXAMPLE)
    port = int(match["port"] or DEFAULT_PORT)
    if not 0 < port < 2**16:
        raise BsprofError(f"--rdzv-endpoint {text}: {port} is no port", hint=_EXAMPLE)
    return match["bracketed"] or match["plain"], port


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BsprofError(f"--rdzv-endpoint {host}: {reason}", hint="give the address of one of the nodes") from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_own(host: str) -> bool:
    """Whether `host` is this machine."""
    own = {one.address.partition("%")[0] for found in psutil.net_if_addrs().values() for one in found}
    return any(address in own or _is_loopback(address) for address in _addresses(host))


def _usable(party: Party) -> Party:
    """Return `party`, or raise BsprofError where this machine is node 0 and nobody could reach it at that endpoint."""
    if not party.leads:
        return party
    addresses = _addresses(party.host)
    if all(map(_is_loopback, addresses)):
        raise BsprofError(
            f"--rdzv-endpoint {party.endpoint}: is {', '.join(sorted(addresses))} here, which no other machine reaches",
            hint=f"give this machine's address on the network: --nnodes {party.nodes} --rdzv-endpoint ADDRESS",
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", party.port))
        except OSError as error:
            hint = "name another port, the same on every node"
            if error.errno == errno.EACCES:
                hint = "ports below 1024 are not yours to take; name another one"
            raise BsprofError(f"--rdzv-endpoint {party.endpoint}: {error.strerror}", hint=hint) from error
    return party


# --- launchers --------------------------------------------------------------------------------------


def _of_torchrun(variables: Mapping[str, str]) -> Party | None:
    """Return the party that torchrun has started, or None where it has not, or only one process."""
    if "TORCHELASTIC_RUN_ID" not in variables or int(variables.get("WORLD_SIZE", "1")) == 1:
        return None
    size = int(variables["WORLD_SIZE"])
    return Party(
        host=variables["MASTER_ADDR"],
        port=int(variables["MASTER_PORT"]),
        leads=variables["RANK"] == "0",
        nodes=int(variables.get("GROUP_WORLD_SIZE", "1")),
        processes=size,
        launched=True,
        kept=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        # torchrun's own keys lie in the same store, and so do ours of before a restart.
        prefix=f"bsprof/{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )


def _of_slurm(variables: Mapping[str, str]) -> Party | None:
    """Return the party of a Slurm job, or None outside of one, or on one node. Raises BsprofError."""
    if "SLURM_JOB_ID" not in variables:
        return None
    # What srun started may have less than the job.
    nodes = int(variables.get("SLURM_STEP_NUM_NODES") or variables.get("SLURM_NNODES") or 1)
    if nodes == 1:
        return None
    listed = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if not listed or "SLURM_NODEID" not in variables:
        raise BsprofError(f"this Slurm job has {nodes} nodes, but srun has not started bsprof on them", hint=_SRUN)
    if (tasks := _tasks_per_node(variables)) > 1:
        raise BsprofError(f"SLURM_NTASKS_PER_NODE: {tasks} processes of bsprof a node; each starts ranks", hint=_SRUN)
    host = expand_nodes(listed)[0]
    note = Note(code="slurm_nodes", text=f"{nodes} nodes of Slurm job {variables['SLURM_JOB_ID']}, {host} leads")
    leads = variables["SLURM_NODEID"] == "0"
    return _usable(Party(host=host, port=DEFAULT_PORT, leads=leads, nodes=nodes, processes=nodes, note=note))


def _tasks_per_node(variables: Mapping[str, str]) -> int:
    """Return the most processes on one node, of `1`, or of a list as `2(x3),1`."""
    told = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_NTASKS_PER_NODE") or "1"
    counts = [int(count) for count in re.findall(r"(?:^|,)(\d+)", told)]
    return max([*counts, 1 + int(variables.get("SLURM_LOCALID", "0"))])


def expand_nodes(listed: str) -> list[str]:
    """Return the names of a Slurm node list, as `a[01-03,7]-b,c`. Raises BsprofError."""
    names: list[str] = []
    # A comma inside brackets separates numbers, not names.
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", listed):
        names.extend(_expand(part))
    if not names or listed.count("[") != listed.count("]"):
        raise BsprofError(f"SLURM_JOB_NODELIST: cannot read {listed!r}", hint="give --nnodes and --rdzv-endpoint")
    return names


def _expand(name: str) -> Iterator[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    numbers, _, after = rest.partition("]")
    for part in numbers.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not span:
            raise BsprofError(f"SLURM_JOB_NODELIST: cannot read {name!r}", hint="give --nnodes and --rdzv-endpoint")
        first, last = span[1], span[2] or span[1]
        for number in range(int(first), int(last) + 1):
            for end in _expand(after):
                yield f"{before}{number:0{len(first)}}{end}"


# --- following --------------------------------------------------------------------------------------


class _NotHeard(Exception):
    """Nothing has been heard of node 0 for too long."""


class _Ear:
    """Hears what a follower's process hears of node 0, and gives it up after too long a silence."""

    def __init__(self, patience_s: float) -> None:
        self.case = ""
        self._patience_s = patience_s
        self._last = time.monotonic()

    def __call__(self, message: Progressed | None) -> None:
        now = time.monotonic()
        if message is not None:
            self.case, self._last = message.stage or self.case, now
        elif now - self._last > (STUCK_S if self.case else self._patience_s + STUCK_S):
            raise _NotHeard


def follow(party: Party, patience_s: float, stop: Interruption) -> None:
    """Bring ranks to every case that node 0 measures, until it says that none follows.

    Raises BsprofError where node 0 was not there for `patience_s`, and KeyboardInterrupt once `stop` is requested.
    """
    seen = ""
    while True:
        ear = _Ear(patience_s)
        question = {"meeting": party.meeting(""), "seen": seen, "patience_s": patience_s}
        try:
            reply = call("bsprof.sweep.child:follow", store.to_json(question), on_progress=ear, stop=stop)
        except _NotHeard:
            word = "over" if ear.case else "silent"
        except ChildError as error:
            hint = "is it the same version of bsprof and of torch on every node?"
            raise BsprofError(f"{party.endpoint}: cannot follow node 0: {error.text}", hint=hint) from error
        else:
            # A process that has died took part in a case, which is over for this node.
            word = msgspec.json.decode(reply.value, type=str) if reply.value else "over" if ear.case else "died"
        if word == "end":
            return
        if word == "died":
            raise BsprofError("the process that follows node 0 died", hint="is there memory left?")
        if word == "silent":
            raise BsprofError(
                f"{party.endpoint}: node 0 was not there for {patience_s:g} s",
                hint="start the same command there too; is the port open between the machines?",
            )
        seen = ear.case or seen


@contextlib.contextmanager
def leading(party: Party | None) -> Iterator[None]:
    """Tell the others at the end of the block, however it ends, that no case follows, where this is node 0."""
    try:
        yield
    finally:
        if party and party.leads:
            question = {"meeting": party.meeting(""), "patience_s": FAREWELL_S}
            # Who cannot be told learns it by waiting.
            with contextlib.suppress(BsprofError, ChildError):
                call("bsprof.sweep.child:dismiss", store.to_json(question), deadline_s=2 * FAREWELL_S)
