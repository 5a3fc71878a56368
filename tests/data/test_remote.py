"""A remote shard is whole or it is not there, is fetched once for all processes of a host, and the folder stays small.

A real https server on this host, and real processes. They are started anew, as the server's certificate is trusted by
the environment that Python starts with. s3:// and hf:// differ in fsspec's file system only, and have no server here.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.data.remote import expand
from trainer.errors import ConfigError
from trainer.urls import check_scheme, scheme_of, shown

ROOT = Path(__file__).resolve().parents[2]
SIZE = 100_000
SHARDS = {f"/{name}.tar": name.encode() * SIZE for name in "abcdef"}

START = """
import os, resource, sys
from pathlib import Path
from trainer.data import remote
from trainer.errors import ConfigError, DataError
remote.BACKOFF = 0.01
url, folder = sys.argv[1], Path(sys.argv[2])
cache = remote.ShardCache(folder, int(sys.argv[3]))
def say(*words):
    print(*words, flush=True)
def refusal(act, *arguments):
    try:
        say("no error:", act(*arguments))
    except (ConfigError, DataError) as error:
        say("ConfigError" if isinstance(error, ConfigError) else "DataError", error)
"""


@pytest.fixture(autouse=True)
def _served(server):
    server.files.update(SHARDS)


@pytest.fixture
def start(server, certificate, tmp_path):
    """start(script, shards=..., trusted=True): the script in a process of its own, with a cache for so many shards."""
    started = []

    def start(script: str, shards: float = 3, trusted: bool = True) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        if trusted:
            environment["SSL_CERT_FILE"] = str(certificate)
        limit = str(int(shards * SIZE))
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", START + script, server.url, str(tmp_path / "cache"), limit],
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """Runs a script to its end: the lines that it says. What it logs is on `run.log`."""

    def run(script: str, **settings) -> list[str]:
        process = start(script, **settings)
        said, run.log = process.communicate(timeout=60)
        assert process.returncode == 0, run.log
        return said.splitlines()

    return run


@pytest.fixture
def files(tmp_path):
    """Names in the cache without their hashes and without the locks."""

    def files() -> list[str]:
        names = [file.name for file in (tmp_path / "cache").iterdir() if file.is_file()]
        return sorted(name if name.startswith("tmp") else name.partition("-")[2] for name in names)

    return files


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("path", ["data/a.tar", "/data/{000..009}.tar", "a:b/*.tar", "pipes/a.tar"])
def test_local_paths_have_no_scheme(path):
    assert scheme_of(path) is None
    check_scheme(path)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("pipe:cat x.tar", "pipe"),
        ("http://host/a.tar", "http"),
        ("file:///etc/passwd", "file"),
        ("gs://bucket/a.tar", "gs"),
        ("ftp://host/a.tar", "ftp"),
        ("simplecache::s3://bucket/a.tar", "simplecache"),
        ("filecache::https://host/a.tar", "filecache"),
        ("https::s3://bucket/a.tar", "https"),
        ("S3://bucket/a.tar", "S3"),
    ],
)
def test_other_schemes_and_chains_are_refused_by_name(url, scheme):
    assert scheme_of(url) == scheme
    with pytest.raises(ConfigError, match="s3://, https://, hf://") as refusal:
        check_scheme(url)
    assert url in str(refusal.value)
    with pytest.raises(ConfigError):
        expand(url)


def test_http_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"nothing protects the data .* use https://"):
        check_scheme("http://host/a.tar")


def test_a_web_server_has_no_glob_and_a_single_url_is_itself():
    with pytest.raises(ConfigError, match=r"write a range"):
        expand("https://host/data-*.tar")
    for url in ("https://host/a.tar?token=*", "s3://bucket/a.tar", "hf://datasets/user/name@main/a.tar"):
        assert expand(url) == [url]


def test_secrets_of_a_url_are_not_shown():
    assert shown("https://me:word@host/a.tar?token=secret") == "https://host/a.tar"
    assert shown("403, url='https://host/a?b=c', x") == "403, url='https://host/a', x"
    assert shown("hf://datasets/user/name@main/a.tar") == "hf://datasets/user/name@main/a.tar"


def test_a_shard_is_fetched_once_and_then_read_from_its_copy(run, server, files, tmp_path):
    script = f"""
say(remote.expand(url + "/a.tar") == [url + "/a.tar"])
copy = cache.path(url + "/a.tar", {SIZE})
changed = copy.stat().st_mtime_ns
say(copy.read_bytes() == b"a" * {SIZE}, cache.path(url + "/a.tar", {SIZE}) == copy, copy.stat().st_mtime_ns == changed)
say(os.read(cache.open(url + "/a.tar"), 3))
"""
    assert run(script) == ["True", "True True True", "b'aaa'"]
    assert server.requests == {("HEAD", "/a.tar"): 1, ("GET", "/a.tar"): 1}
    assert files() == ["a.tar"]


def test_two_processes_that_ask_at_once_share_one_download(start, server, files):
    server.seconds["/a.tar"] = 1
    script = """
remote._files("https", os.getpid())
say("ready")
input()
say(cache.path(url + "/a.tar").read_bytes() == b"a" * 100000)
"""
    processes = [start(script), start(script)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=30)[0] for process in processes] == ["True\n"] * 2
    assert server.requests["GET", "/a.tar"] == 1
    assert files() == ["a.tar"]


def test_the_least_recently_used_shard_makes_room(run, files):
    # Three fit. a was fetched first but is used again, so b goes, then c.
    run('for name in "abcad": cache.path(f"{url}/{name}.tar")')
    assert files() == ["a.tar", "c.tar", "d.tar"]
    run('cache.path(url + "/e.tar")')
    assert files() == ["a.tar", "d.tar", "e.tar"]


def test_a_shard_held_open_stays_and_room_that_is_not_there_names_the_limit(run, files):
    script = """
held = [cache.open(f"{url}/{name}.tar") for name in "ab"]
for name in "cdef":
    cache.path(f"{url}/{name}.tar")
say(*(os.pread(file, 1, 99999) for file in held), *(os.fstat(file).st_nlink for file in held))
held.append(cache.open(url + "/c.tar"))
refusal(cache.open, url + "/d.tar")
os.close(held[0])
cache.path(url + "/d.tar")
"""
    said = run(script)
    assert said[0] == "b'a' b'b' 1 1"
    assert said[1].startswith("DataError")
    assert "data.cache_gib" in said[1]
    assert "d.tar" in said[1]
    assert files() == ["b.tar", "c.tar", "d.tar"]


def test_a_shard_removed_while_it_is_opened_is_fetched_again(run, server):
    # Another process makes room between this one's `open` and its lock.
    script = """
copy, flock = cache.path(url + "/a.tar"), remote.fcntl.flock
def late(descriptor, kind):
    if kind == remote.fcntl.LOCK_SH:
        remote.fcntl.flock = flock
        copy.unlink()
    flock(descriptor, kind)
remote.fcntl.flock = late
say(os.fstat(cache.open(url + "/a.tar")).st_nlink)
"""
    assert run(script) == ["1"]
    assert server.requests["GET", "/a.tar"] == 2


def test_room_is_taken_and_names_change_under_one_lock(start, server, files):
    # Two processes that counted at once would both find the same room. The process stops whenever it asks for the lock
    # and before it gives it back: all that changes does so in between.
    script = """
flock = remote.fcntl.flock
def watched(descriptor, kind):
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/locks/room"):
        say({remote.fcntl.LOCK_EX: "asks", remote.fcntl.LOCK_UN: "frees"}[kind])
        input()
    flock(descriptor, kind)
remote.fcntl.flock = watched
cache.path(url + "/a.tar")
"""
    process = start(script)

    def at_the_lock() -> tuple[str, int, list[str]]:
        said = process.stdout.readline().strip()
        found = [name.split("-")[0] for name in files()]
        process.stdin.write("go on\n")
        process.stdin.flush()
        return said, server.requests["GET", "/a.tar"], found

    assert at_the_lock() == ("asks", 0, [])
    assert at_the_lock() == ("frees", 0, ["tmp"])
    assert at_the_lock() == ("asks", 1, ["tmp"])
    assert at_the_lock() == ("frees", 1, ["a.tar"])
    assert process.wait(30) == 0
    assert files() == ["a.tar"]


def test_many_forked_workers_keep_the_bound_and_never_lose_an_open_shard(start, server, tmp_path):
    # Four workers hold one shard each at most, or are fetching it: four of five places. The parent has used its own
    # connection before, which a fork does not survive.
    script = """
import random
cache.path(url + "/a.tar")
workers = []
for worker in range(4):
    if not (process := os.fork()):
        draw = random.Random(worker)
        for _ in range(25):
            name = draw.choice("abcdef")
            file = cache.open(f"{url}/{name}.tar", 100000)
            whole = b"".join(os.pread(file, 50000, start) for start in (0, 50000)) == name.encode() * 100000
            if not whole or not os.fstat(file).st_nlink:
                os._exit(1)
            os.close(file)
        os._exit(0)
    workers.append(process)
say([os.waitpid(process, 0)[1] for process in workers])
"""
    process = start(script, shards=5)
    most = 0
    while process.poll() is None:
        total = 0
        for file in (tmp_path / "cache").glob("*-*"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                total = 0  # counted while names changed: this look says nothing
                break
        most = max(most, total)
        time.sleep(0.002)
    said, log = process.communicate()
    assert said == "[0, 0, 0, 0]\n", log
    assert most <= 5 * SIZE
    assert sum(server.requests[key] for key in server.requests if key[0] == "GET") > 6, "nothing was ever removed"


def test_a_connection_cut_in_the_middle_is_tried_again(run, server, files):
    server.cuts["/a.tar"] = 2
    assert run(f'say(cache.path(url + "/a.tar").read_bytes() == b"a" * {SIZE})') == ["True"]
    assert server.requests["GET", "/a.tar"] == 3
    assert files() == ["a.tar"]
    assert run.log.count("trying again") == 2


def test_a_connection_that_is_always_cut_ends_in_an_error_and_no_file(run, server, files):
    server.cuts["/a.tar"] = 100
    (said,) = run('refusal(cache.path, url + "/a.tar?token=secret")')
    assert said.startswith("DataError")
    assert "not fetched in 3 tries" in said
    assert "secret" not in said + run.log
    assert server.requests["GET", "/a.tar?token=secret"] == 3
    assert files() == []


def test_a_server_that_falls_silent_is_given_up(run, server, files):
    server.seconds["/a.tar"] = 5
    (said,) = run('remote.READ_SECONDS = 0.2; refusal(cache.path, url + "/a.tar")')
    assert said.startswith("DataError")
    assert "not fetched in 3 tries (SocketTimeoutError" in said
    assert files() == []


def test_a_killed_process_leaves_a_temporary_that_the_next_one_removes(start, run, server, files):
    server.seconds["/a.tar"] = 30
    process = start('cache.path(url + "/a.tar")')
    wait_for(lambda: server.requests["GET", "/a.tar"])
    # While it lives its temporary is its own, and the room for all of it is taken.
    (said,) = run('refusal(cache.path, url + "/b.tar")', shards=1.5)
    assert "data.cache_gib" in said
    assert [name.split("-")[0] for name in files()] == ["tmp"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(files()) == 1
    run('cache.path(url + "/b.tar")', shards=1.5)
    assert files() == ["b.tar"]


def test_a_size_other_than_the_index_says_is_an_error(run, server, files):
    (said,) = run('refusal(cache.path, url + "/a.tar", 5)')
    assert said.startswith("DataError")
    assert "100000 bytes, but its index was made of 5" in said
    assert server.requests["GET", "/a.tar"] == 0
    assert files() == []


def test_an_answer_that_ends_early_is_no_shard_though_the_connection_ends_well(run, server, files):
    server.promised["/a.tar"] = SIZE + 1
    (said,) = run('refusal(cache.path, url + "/a.tar")')
    assert said.startswith("DataError")
    assert "received 100000 of 100001 bytes" in said
    assert files() == []


def test_a_copy_of_another_size_is_fetched_again(run, files):
    script = f"""
copy = cache.path(url + "/a.tar")
copy.write_bytes(b"half")
say(cache.path(url + "/a.tar", {SIZE}).stat().st_size)
"""
    assert run(script) == [str(SIZE)]
    assert files() == ["a.tar"]


def test_a_shard_larger_than_the_limit_is_refused_before_it_is_fetched(run, server, files):
    (said,) = run('refusal(cache.path, url + "/a.tar")', shards=0.5)
    assert said.startswith("DataError")
    assert "data.cache_gib" in said
    assert server.requests["GET", "/a.tar"] == 0
    assert files() == []


def test_a_disk_that_fills_up_is_named_and_keeps_no_part(run, server, files):
    # A limit on the size of files stands for the full disk: the same write fails, with EFBIG in place of ENOSPC.
    (said,) = run('resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)); refusal(cache.path, url + "/a.tar")')
    assert said.startswith("DataError")
    assert "the disk is full" in said
    assert server.requests["GET", "/a.tar"] == 1, "another try cannot help"
    assert files() == []
    # Where it is known before, nothing is fetched.
    (said,) = run(
        'remote.shutil.disk_usage = lambda _: resource; resource.free = 50000; refusal(cache.path, url + "/b.tar")'
    )
    assert "the disk is full" in said
    assert server.requests["GET", "/b.tar"] == 0


def test_what_the_server_refuses_is_said_without_the_secret(run, server, files):
    server.status = {"/forbidden.tar": 403, "/broken.tar": 500, "/refused.tar": 416}
    server.redirects = {"/insecure.tar": "http://127.0.0.1:1/a.tar", "/moved.tar": "/a.tar"}
    names = ("missing", "forbidden", "broken", "refused", "insecure")
    script = "".join(f'refusal(cache.path, url + "/{name}.tar?token=secret")\n' for name in names)
    *said, moved = run(script + 'say(cache.path(url + "/moved.tar").stat().st_size)')
    expected = (
        "no such file",
        "does not let us read it",
        "not fetched in 3 tries",
        "status 416",
        "leads on to http://",
    )
    for name, line, words in zip(names, said, expected, strict=True):
        assert line.startswith(f"DataError {server.url}/{name}.tar: ")
        assert words in line
    assert "secret" not in "".join(said) + run.log
    assert moved == str(SIZE)
    assert files() == ["moved.tar"]
    # HEAD and then GET ask how large it is: once where it is final, three times where the server fails.
    assert server.requests["GET", "/missing.tar?token=secret"] == 1
    assert server.requests["GET", "/broken.tar?token=secret"] == 3


def test_a_server_of_unknown_certificate_is_not_believed(run, server):
    (said,) = run('refusal(cache.path, url + "/a.tar")', trusted=False)
    assert said.startswith("DataError")
    assert "SSL_CERT_FILE" in said
    assert not server.requests


def test_the_index_beside_a_shard_is_fetched_where_there_is_one(run, server):
    server.files["/a.tar.index.npz"] = b"index"
    server.status["/c.tar.index.npz"] = 403
    script = """
say(cache.index_path(url + "/a.tar?token=secret").read_bytes())
say(cache.index_path(url + "/b.tar"), cache.index_path(url + "/c.tar"))
"""
    assert run(script) == ["b'index'", "None None"]
    assert server.requests["GET", "/a.tar.index.npz?token=secret"] == 1


def test_a_package_that_is_not_installed_is_named(run):
    script = """
sys.modules["aiohttp"] = sys.modules["s3fs"] = None
refusal(cache.path, url + "/a.tar")
refusal(remote.expand, "s3://bucket/*.tar")
"""
    https, s3 = run(script)
    assert https.startswith("ConfigError")
    assert "pip install aiohttp" in https
    assert s3.startswith("ConfigError")
    assert "pip install s3fs" in s3


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "cache").write_text("a file")
    (said,) = run('refusal(cache.path, url + "/a.tar")')
    assert said.startswith(f"DataError {tmp_path / 'cache'}: shards cannot be kept here")
