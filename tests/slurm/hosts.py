"""Hosts in network namespaces, without a scheduler: launch/multinode.sh on each of them, and their ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from dist_trainer.storage.processes import ProcessId, command_of, environment_of
from tests.end_to_end.commands import ROOT, environment
from tests.slurm.jobs import TRAINING

SCRIPT = Path(__file__).with_name("netns.sh")
RANKS = 2
"""On each host, unless NPROC is given."""


class Hosts:
    """`names` are up, each with its own address."""

    def __init__(self, state: Path, names: tuple[str, ...]) -> None:
        self._state, self.names = state, names
        subprocess.run([SCRIPT, "up", *names], env=self._settings(), check=True, timeout=60)
        self.master = self.address(names[0])

    def _settings(self, **changes: str) -> dict[str, str]:
        return environment(NETNS_STATE=str(self._state), **changes)

    def name_them_as_debian_does(self) -> None:
        """Each host's own name means a loopback address to itself, and the others know it by its true one."""
        for own in self.names:
            others = [f"{self.address(name)} {name}" for name in self.names if name != own]
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {own}", *others]
            (self._state / "hosts" / own / "etc-hosts").write_text("\n".join(lines) + "\n")
        self.master = self.names[0]

    def give_them_only_ipv6(self) -> None:
        """As on networks without IPv4; still no names."""
        for name in self.names:
            address = f"fd00::{self.address(name).rpartition('.')[2]}"
            for words in (f"-6 addr add {address}/64 dev eth0 nodad", "-4 addr flush dev eth0"):
                subprocess.run([SCRIPT, "exec", name, "ip", *words.split()], env=self._settings(), check=True, timeout=60)
        self.master = f"fd00::{self.address(self.names[0]).rpartition('.')[2]}"

    def address(self, name: str) -> str:
        return (self._state / "hosts" / name / "addr").read_text().strip()

    @contextmanager
    def train(self, output: Path, *arguments: str, **variables: str) -> Generator[list[subprocess.Popen[bytes]]]:
        """One run over all hosts; the launchers, by host. What still runs at the end dies with its host."""
        meeting = {"NODES": str(len(self.names)), "MASTER_ADDR": self.master, "MASTER_PORT": "29501"}
        ranks = {"PYTHON": sys.executable, "NPROC": str(RANKS), "SHUTDOWN_TIMEOUT": "10"}
        launchers = []
        try:
            for number, name in enumerate(self.names):
                words = [SCRIPT, "exec", name, ROOT / "launch/multinode.sh", *TRAINING, "--output_dir", output, *arguments]
                settings = self._settings(**meeting, **{**ranks, **variables}, NODE_RANK=str(number))
                with (output.parent / f"said-{name}.txt").open("wb") as said:
                    launchers.append(subprocess.Popen(words, env=settings, cwd=ROOT, stdout=said, stderr=said))
            yield launchers
        finally:
            for launcher in launchers:
                launcher.kill()
                launcher.wait()


def said(output: Path) -> str:
    """All that the launchers and their ranks have said."""
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(output.parent.glob("said-*.txt")))


def ranks_of(output: Path) -> dict[int, ProcessId]:
    """The processes of the run in `output`, whichever host they are on, by rank: this machine sees them all."""
    found = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        rank = environment_of(int(process)).get("RANK")
        if rank is not None and str(output) in command_of(int(process)):
            found[int(rank)] = ProcessId.of(int(process))
    return found
