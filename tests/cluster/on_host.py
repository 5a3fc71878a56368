"""Runs a command as if on another host: python on_host.py NAMESPACE NAME HOSTS_FILE COMMAND ...

In that network namespace, under that host name, and with its own /etc/hosts.
"""

import ctypes
import os
import socket
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


def check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    namespace, name, hosts_file, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as entrance:
        check(libc.setns(entrance.fileno(), CLONE_NEWNET))
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(hosts_file.encode(), b"/etc/hosts", None, MS_BIND, None))
    socket.sethostname(name)
    os.execvp(command[0], command)


main()
