"""A fork server that is a fork: in a process of its own, since a process has but one fork server."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver, util
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from commands import ended, surroundings

from bsprof.measure import forks

MARKER = "only_the_parent_has_it"


def tell(answers):
    answers.send((MARKER in sys.modules, os.getppid(), [file.path for file in psutil.Process().open_files()]))


def parent(path):
    """Serve, ask two children what they see, say which process served them, and wait to be ended."""
    sys.modules[MARKER] = ModuleType(MARKER)
    reader, writer = os.pipe()
    before = util.spawnv_passfds
    with Path(path).open() as kept:
        forks.serve()
        forks.serve()
        assert util.spawnv_passfds is before
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        children = [context.Process(target=tell, args=(theirs,)) for _ in range(2)]
        for child in children:
            child.start()
        told = [ours.recv() for _ in children]
        for child in children:
            child.join()
    os.close(writer)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b"", "somebody else holds the other end"
    assert all(knows for knows, _, _ in told)
    assert all(kept.name not in files for _, _, files in told)
    assert {server for _, server, _ in told} == {forkserver._forkserver._forkserver_pid}
    assert [child.exitcode for child in children] == [0, 0]
    print(told[0][1], flush=True)
    sys.stdin.read()


@pytest.mark.parametrize("how", ["done", "killed"])
def test_children_find_modules_loaded_and_no_open_files_and_the_server_goes_with_its_process(how, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", f"import test_forks; test_forks.parent({str(tmp_path / 'file')!r})"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=surroundings(), cwd=tmp_path, text=True, **pipes) as process:
        server = int(process.stdout.readline())
        assert psutil.pid_exists(server)
        if how == "killed":
            process.kill()
        process.stdin.close()
        assert process.wait(30) == (-9 if how == "killed" else 0)
        assert ended([server])
