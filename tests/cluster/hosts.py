"""Two hosts on this machine: network namespaces with addresses, names and a cable of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ON_HOST = Path(__file__).with_name("on_host.py")
NAMES = ("n1", "n2")


@dataclass(frozen=True)
class Hosts:
    """The hosts n1 and n2. Their namespaces carry this process's id, so that two test runs do not meet."""

    folder: Path
    tag: str

    def command(self, host: str, *command: str) -> list[str]:
        """A command as it runs on a host."""
        return [sys.executable, str(ON_HOST), self._namespace(host), host, str(self.folder / "hosts"), *command]

    def start(self, host: str, *command: str, **options: Any) -> subprocess.Popen:
        return subprocess.Popen(self.command(host, *command), **options)

    def run(self, host: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run(self.command(host, *command), check=False, **options)

    def set_cable(self, up: bool) -> None:
        """Pulls the cable between the hosts out, or plugs it in: nothing that runs is told."""
        ip("-n", self._namespace("n1"), "link", "set", "eth0", "up" if up else "down")

    def processes(self) -> list[psutil.Process]:
        """All that runs on the hosts."""
        found = []
        for host in NAMES:
            pids = ip("netns", "pids", self._namespace(host)).split()
            for pid in pids:
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(int(pid)))
        return found

    def set_up(self) -> None:
        lines = ["127.0.0.1 localhost"]
        for number, host in enumerate(NAMES, start=1):
            ip("netns", "add", self._namespace(host))
            lines.append(f"10.231.77.{number} {host}")
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        n1, n2 = map(self._namespace, NAMES)
        ip("link", "add", "eth0", "netns", n1, "type", "veth", "peer", "name", "eth0", "netns", n2)
        for number, namespace in enumerate((n1, n2), start=1):
            ip("-n", namespace, "address", "add", f"10.231.77.{number}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "link", "set", "eth0", "up")

    def tear_down(self) -> list[str]:
        """Ends what still runs there, and says what that was."""
        left = self.processes()
        said = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                said.append(" ".join(process.cmdline()) or process.name())
                process.kill()
        psutil.wait_procs(left, timeout=10)
        for host in NAMES:
            subprocess.run(["ip", "netns", "delete", self._namespace(host)], check=False, capture_output=True)
        return said

    def _namespace(self, host: str) -> str:
        return f"{self.tag}-{host}"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """The hosts; fails the test if something is left running on them. Skips where they cannot be made."""
    if os.getuid() != 0:
        pytest.skip("network namespaces need root")
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` here (Debian: iproute2)")
    hosts = Hosts(folder, f"trainer{os.getpid()}")
    try:
        try:
            hosts.set_up()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr}")
        yield hosts
    finally:
        left = hosts.tear_down()
    assert not left, f"left running on the hosts: {left}"
