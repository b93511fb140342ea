"""The command line killed and interrupted: what is done is kept, and the same call goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import ARGUMENTS, evaluate, filled

from fastscore.cli import commands as cli


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from filled(tmp_path, monkeypatch)


def start_and_stop(folder, how):
    """Run the command in a process of its own and stop it after two blocks; return its exit code and stderr."""
    (folder / "slow").touch()
    command = [sys.executable, "-m", "fastscore", "evaluate", *ARGUMENTS, "--out", "r.npz"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        # A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while len(list(folder.glob("r.npz.partial/block-*.npz"))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, how)
    _, stderr = process.communicate(timeout=240)
    (folder / "slow").unlink()
    assert not (folder / "r.npz").exists()
    return process.returncode, stderr


def resumed(folder):
    """Run the command again, and once without interruption; return the line about resuming and compare the files."""
    line = next(line for line in evaluate(*ARGUMENTS, "--out", "r.npz").stderr.splitlines() if "resuming" in line)
    evaluate(*ARGUMENTS, "--out", "whole.npz")
    assert (folder / "r.npz").read_bytes() == (folder / "whole.npz").read_bytes()
    assert not (folder / "r.npz.partial").exists()
    return line


def test_kill_9_loses_no_finished_block(folder):
    code, _ = start_and_stop(folder, signal.SIGKILL)
    assert code == -signal.SIGKILL
    kept = len(list(folder.glob("r.npz.partial/block-*.npz")))
    refused = evaluate(*ARGUMENTS, "--seed", "4", "--out", "r.npz", code=1).stderr
    assert f"{kept} finished blocks of another run: seed is 3 there and 4 here. Give another out, or discard" in refused
    assert resumed(folder) == f"resuming: {kept} of 7 blocks done"


def test_ctrl_c_says_how_to_resume(folder):
    code, stderr = start_and_stop(folder, signal.SIGINT)
    assert code == 130
    kept = len(list(folder.glob("r.npz.partial/block-*.npz")))
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == (
        f"interrupted: {kept} of 7 blocks are kept in r.npz.partial; run the same again to resume"
    )
    assert resumed(folder) == f"resuming: {kept} of 7 blocks done"


def test_ctrl_c_before_the_work(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_density", interrupt)
    assert evaluate(*ARGUMENTS, "--out", "r.npz", code=130).stderr == "interrupted before anything was computed\n"
