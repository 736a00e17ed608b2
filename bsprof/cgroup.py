"""Control groups: what Linux allows this process, and what it did to hold it to that. Version 1 and version 2.

Limits are set anywhere between a process's own group and the root, and the tightest one holds; `cpu_count` and
`/proc/meminfo` show none of them. Everything here reads a few small files; where there are no control groups (another
system, a locked-down container) the answer is `None`, never an exception. `root` is `/` but for tests, which hand
over a recorded tree. Neither torch nor numpy is needed: the sweep's parent asks for `oom_kills` as well as the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")

NO_LIMIT_BYTES = 1 << 60
"""Version 1 says 'no limit' as the largest signed 64-bit number rounded down to a page. No machine has an exbibyte."""


class Throttling(NamedTuple):
    """How often a CPU quota held this process's groups back, counted since each group was made."""

    periods: int
    throttled_periods: int
    throttled_ns: int


class _Groups(NamedTuple):
    version: int
    directories: tuple[Path, ...]
    """The process's own group first, then its parents up to the highest one mounted."""


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the cores granted, as a quota of time over a period, or `None` where no group sets a limit."""
    groups = _find("cpu", root)
    return _tightest(groups, _quota_v2 if groups.version == 2 else _quota_v1) if groups else None


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the limit on this process's group in bytes, or `None` where no group sets one."""
    groups = _find("memory", root)
    if groups is None:
        return None
    limit = _tightest(groups, _memory_v2 if groups.version == 2 else _memory_v1)
    return None if limit is None else int(limit)


def throttling(root: Path = ROOT) -> Throttling | None:
    """Return what CPU quotas did so far, summed over the groups that have one, or `None` where nothing is counted."""
    groups = _find("cpu", root)
    if groups is None:
        return None
    stats = [stat for directory in groups.directories if "nr_periods" in (stat := _read_pairs(directory / "cpu.stat"))]
    if not stats:
        return None
    return Throttling(
        periods=sum(stat["nr_periods"] for stat in stats),
        throttled_periods=sum(stat.get("nr_throttled", 0) for stat in stats),
        # microseconds in version 2, nanoseconds in version 1
        throttled_ns=sum(stat.get("throttled_usec", 0) * 1000 + stat.get("throttled_time", 0) for stat in stats),
    )


def pressure_file(root: Path = ROOT) -> Path:
    """Return where CPU pressure is read: this process's own group where it counts any, else the whole machine.

    On a large shared host somebody always waits for a core; only the group's own file says that this process did.
    """
    groups = _find("cpu", root)
    if groups is not None and groups.version == 2 and (own := groups.directories[0] / "cpu.pressure").exists():
        return own
    return root / "proc/pressure/cpu"


def oom_kills(root: Path = ROOT) -> int | None:
    """Return how many processes of this group the kernel has killed for want of memory, or `None` where uncounted.

    A group counts a kill whoever's limit caused it, the machine's included, so the nearest group that counts is enough.
    Without one the machine's count is given, which may include the processes of others.
    """
    groups = _find("memory", root)
    for directory in groups.directories if groups else ():
        counts = _read_pairs(directory / ("memory.events" if groups and groups.version == 2 else "memory.oom_control"))
        if "oom_kill" in counts:
            return counts["oom_kill"]
    return _read_pairs(root / "proc/vmstat").get("oom_kill")


# --- finding the groups -----------------------------------------------------------------------------


def _find(controller: str, root: Path) -> _Groups | None:
    """Join `/proc/self/cgroup` (which group) with `/proc/self/mountinfo` (where groups are seen from here).

    A machine may have both versions mounted, each controller on one of them; version 1 names its controllers.
    """
    memberships = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    mounts = [mount for line in _read(root / "proc/self/mountinfo").splitlines() if (mount := _parse_mount(line))]
    for version in (1, 2):
        wanted = controller if version == 1 else ""
        group = next((path for _, names, path in memberships if wanted in names.split(",")), None)
        mount = next((m for m in mounts if m.version == version and (version == 2 or wanted in m.options)), None)
        if group is not None and mount is not None:
            return _Groups(version, tuple(_climb(group, mount, root)))
    return None


class _Mount(NamedTuple):
    version: int
    shown: str
    """The group that is seen at `point`: not `/` where a container has a part of the host's tree bound in."""
    point: str
    options: frozenset[str]


def _parse_mount(line: str) -> _Mount | None:
    """Read a line of mountinfo: id parent major:minor root point options … - type source super_options (proc(5))."""
    left, separator, right = line.partition(" - ")
    before, after = left.split(), right.split()
    if not separator or len(before) < 5 or len(after) < 3 or after[0] not in ("cgroup", "cgroup2"):
        return None
    return _Mount(2 if after[0] == "cgroup2" else 1, before[3], before[4], frozenset(after[2].split(",")))


def _climb(group: str, mount: _Mount, root: Path) -> Iterable[Path]:
    top = root / mount.point.lstrip("/")
    try:
        below = PurePosixPath(group).relative_to(mount.shown)
    except ValueError:
        below = PurePosixPath()  # the group's name is the host's, only its contents are bound in here
    own = top.joinpath(*below.parts)
    if ".." in below.parts or not own.is_dir():
        own = top
    return [own, *(parent for parent in own.parents if parent.is_relative_to(top))]


# --- reading them -----------------------------------------------------------------------------------


def _tightest(groups: _Groups, limit: Callable[[Path], float | None]) -> float | None:
    return min((value for directory in groups.directories if (value := limit(directory)) is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # 'max', or no such file
        return None
    return cores if cores > 0 else None  # -1 is version 1's 'no limit'


def _memory_v2(group: Path) -> int | None:
    return _bytes(_read(group / "memory.max"))


def _memory_v1(group: Path) -> int | None:
    return _bytes(_read(group / "memory.limit_in_bytes"))


def _bytes(text: str) -> int | None:
    limit = int(text) if text.strip().isdigit() else NO_LIMIT_BYTES
    return limit if limit < NO_LIMIT_BYTES else None


def _read_pairs(path: Path) -> dict[str, int]:
    """Read lines of `name number`."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
