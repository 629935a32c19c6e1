"""Steps of deploy/Dockerfile, read from it and run in a chroot, where there is no container engine: `make test-image`.

The base image is a Debian of `debootstrap` with its own Python, whose version may be another one than the image's. A
stage is a copy of it, RUN a shell in it, and COPY a copy. The service then runs as a container of the Dockerfile does:
the user of USER, without capabilities, on a read-only root with an empty /tmp, in namespaces of its own without a
network, with a store and a key file that it cannot write; its HEALTHCHECK is asked, a recommendation with and without a
key, and it ends by its STOPSIGNAL. Needs root, debootstrap, util-linux, and Debian's and Python's package indexes. What
this cannot show: layers, the registry's image, an engine's seccomp filter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
SUITE = "trixie"
BASE_IMAGE = re.compile(r"python:3\.\d+-slim")
BUILDING = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
"""Environment of a container before ENV."""
OF_THE_MACHINE = re.compile(
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|DEFAULT_TIMEOUT|CERT)|(HTTPS?|NO)_PROXY|SSL_CERT_FILE", re.IGNORECASE
)
"""Variables with which this machine reaches its package index; steps have them, the service does not."""
SECONDS = 120
"""Seconds until the service is healthy, and until it has ended."""


class ImageError(Exception):
    """A step that fails, or that is not understood."""


@dataclass(frozen=True)
class Stage:
    """State of a stage of the build: its root, and what the instructions so far have set."""

    root: Path
    name: str = ""
    env: Mapping[str, str] = field(default_factory=lambda: dict(BUILDING))
    folder: str = "/"
    user: str = "0"
    stop: signal.Signals = signal.SIGTERM
    health: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Dockerfile with their arguments; a line that ends with a backslash goes on."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


def build(text: str, new_root: Callable[[str], Path], context: Path, run: Callable[[Stage, str], None]) -> Stage:
    """Run the instructions of a Dockerfile and return the last stage. Raises ImageError for one that is not understood.

    `new_root` makes the root of a stage from the name of its image; `run` runs a command of a shell in a stage."""
    stages: list[Stage] = []
    for word, rest in instructions(text):
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(new_root(image.strip()), name.strip()))
            continue
        if not stages:
            raise ImageError(f"{word}: stands before FROM")
        at = stages[-1]
        if word == "RUN":
            run(at, rest)
        elif word == "COPY":
            _copy(at, rest, context, stages)
        else:
            stages[-1] = _set(at, word, rest)
    if not stages:
        raise ImageError("the Dockerfile has no FROM")
    return stages[-1]


def _copy(at: Stage, rest: str, context: Path, stages: Sequence[Stage]) -> None:
    options, *others = rest.split()
    source = context
    if options.startswith("--from="):
        source = next((s.root for s in stages if s.name == options.removeprefix("--from=")), context / "?")
        if source == context / "?":
            raise ImageError(f"COPY {rest}: no stage has that name")
    elif options.startswith("--"):
        raise ImageError(f"COPY {options}: not understood")
    else:
        others = [options, *others]
    *patterns, target = others
    for pattern in patterns:
        found = sorted(source.glob(pattern.lstrip("/")))
        if not found:
            raise ImageError(f"COPY {rest}: nothing is found for {pattern} (the wheel is made by `make dist BASE=1`)")
        for path in found:
            to = at.root / target.lstrip("/") / (path.name if target.endswith("/") else "")
            to.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(path, to)


def _set(at: Stage, word: str, rest: str) -> Stage:
    match word:
        case "ENV":
            return replace(at, env={**at.env, **dict(pair.split("=", 1) for pair in shlex.split(rest))})
        case "WORKDIR":
            (at.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            return replace(at, folder=rest)
        case "USER":
            return replace(at, user=rest)
        case "EXPOSE":
            return at
        case "STOPSIGNAL":
            return replace(at, stop=signal.Signals[rest])
        case "HEALTHCHECK":
            _, found, command = rest.rpartition("CMD ")
            return replace(at, health=_words(word, command if found else rest))
        case "ENTRYPOINT":
            return replace(at, entrypoint=_words(word, rest))
        case "CMD":
            return replace(at, command=_words(word, rest))
    raise ImageError(f"{word} {rest}: not understood")


def _words(word: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(json.loads(text))
    except ValueError:
        raise ImageError(f"{word} {text}: expected a list of JSON") from None


# ---- in the chroot -----------------------------------------------------------------------------------------------


def debian(folder: Path) -> Path:
    """Return the root of a Debian with Python, made by debootstrap unless it is there."""
    if folder.is_dir():
        return folder
    made = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", SUITE, str(made)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ImageError(f"debootstrap: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    (made / "usr/bin/python").symlink_to("python3")
    return made.rename(folder)


def run_step(at: Stage, command: str) -> None:
    """Run a command of a shell in a stage, with the network and the certificates of this machine. Raises ImageError."""
    lent = [Path(name) for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/dev/null", "/dev/urandom")]
    binds = " && ".join(
        f"{{ test -e {at.root}{path} || touch {at.root}{path}; }} && mount --rbind {path} {at.root}{path}"
        for path in lent if path.exists()
    )  # fmt: skip
    env = {**at.env, **{k: v for k, v in os.environ.items() if OF_THE_MACHINE.fullmatch(k)}}
    words = ["env", "-i", *(f"{k}={v}" for k, v in env.items()), "sh", "-ec", f"cd {at.folder}\n{command}"]
    inner = f"{binds} && mount -t proc proc {at.root}/proc && exec chroot {_as_user(at)} {at.root} {shlex.join(words)}"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", inner], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ImageError(f"RUN {command}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")


def _as_user(at: Stage) -> str:
    user, group = identity(at)
    return f"--userspec={user}:{group} --groups="


def identity(at: Stage) -> tuple[int, int]:
    """Return the numbers of the user and the group of a stage, from its own list of users."""
    for line in (at.root / "etc/passwd").read_text().splitlines():
        name, _, user, group, *_ = line.split(":")
        if at.user in (name, user):
            return int(user), int(group)
    if at.user.isdecimal():
        return int(at.user), 0
    raise ImageError(f"USER {at.user}: the image has no such user")


def serve(at: Stage, store: Path, keys: Path, key: str) -> None:
    """Run the service of a finished stage, and ask it. Raises ImageError."""
    (at.root / "store").mkdir(exist_ok=True)
    (at.root / "keys.toml").touch()
    for name in ("null", "zero", "random", "urandom"):
        (at.root / "dev" / name).touch()
    described = {
        "root": str(at.root), "store": str(store), "keys": str(keys), "key": key, "env": dict(at.env),
        "folder": at.folder,
        "identity": identity(at), "stop": int(at.stop), "health": at.health, "words": [*at.entrypoint, *at.command],
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc",
         sys.executable, __file__, "--inside"],
        input=json.dumps(described), text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ImageError("the service does not do what is expected of it; see above")


@dataclass(frozen=True)
class Container:
    """The mounted root of the service, in the namespaces of this process."""

    root: Path
    env: Mapping[str, str]
    folder: str
    identity: tuple[int, int]

    def mount(self, store: Path, keys: Path) -> None:
        """Mount the root read-only, with an empty /tmp, and the store and the keys read-only."""
        root = self.root
        _do("mount", "--make-rprivate", "/")
        _do("ip", "link", "set", "lo", "up")
        _do("mount", "--bind", root, root)
        for name in ("null", "zero", "random", "urandom"):
            _do("mount", "--bind", f"/dev/{name}", root / "dev" / name)
        for source, target in ((store, root / "store"), (keys, root / "keys.toml")):
            _do("mount", "--bind", source, target)
            _do("mount", "-o", "remount,bind,ro", target)
        _do("mount", "-t", "proc", "proc", root / "proc")
        _do("mount", "-o", "remount,bind,ro", root)
        _do("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp")

    def words(self, command: Sequence[str]) -> list[str]:
        """Return a command in the root as its user, without capabilities."""
        user, group = self.identity
        variables = [f"{k}={v}" for k, v in self.env.items()]
        # env of the new root changes to the folder after chroot has.
        return [
            "chroot", str(self.root), "/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups",
            "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "/usr/bin/env", "-i", "-C", self.folder,
            *variables, *command,
        ]  # fmt: skip

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the root to its end."""
        return subprocess.run(self.words(command), capture_output=True, text=True, check=False, timeout=SECONDS)


def _do(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


ASK = """import json, sys, urllib.request
key, body = sys.argv[1], json.dumps({"user_id": sys.argv[2], "k": 5}).encode()
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
try:
    request = urllib.request.Request("http://127.0.0.1:8000/v1/recommend", body, headers)
    reply = urllib.request.urlopen(request, timeout=60)
    print(reply.status, len(json.load(reply)["items"]))
except urllib.error.HTTPError as e:
    print(e.code)
"""


def inside(given: Mapping[str, object]) -> int:
    """Run and ask the service in namespaces of its own; print what is seen, and return 0 if it is as expected."""
    container = Container(
        Path(str(given["root"])), dict(given["env"]), str(given["folder"]), tuple(given["identity"])  # type: ignore[call-overload, arg-type]
    )  # fmt: skip
    container.mount(Path(str(given["store"])), Path(str(given["keys"])))
    service = subprocess.Popen(container.words([str(w) for w in given["words"]]))  # type: ignore[attr-defined]
    health = [str(w) for w in given["health"]]  # type: ignore[attr-defined]
    begun, asked = time.monotonic(), 0
    while (checked := container.call(*health)).returncode:
        asked += 1
        if service.poll() is not None or time.monotonic() - begun > SECONDS:
            print(f"unhealthy: {checked.stderr.strip().splitlines()[-1:]}, exit code of the service {service.poll()}")
            service.kill()
            return 1
        time.sleep(0.5)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{service.pid}/status").read_text().splitlines() if ":\t" in line
    )
    python = health[0]
    write = "import sys; open(sys.argv[1], 'w')"
    refused = {
        path: container.call(python, "-c", write, path).stderr.strip().rpartition("\n")[2]
        for path in ("/opt/x", "/store/x", "/keys.toml", "/x")
    }
    seen = {
        "healthy after health checks": asked + 1,
        "user of the service": status["Uid"].split()[0],
        "capabilities": f"{status['CapEff'].strip()} {status['CapBnd'].strip()}, no new privileges "
        f"{status['NoNewPrivs'].strip()}",
        "a recommendation with the key": container.call(python, "-c", ASK, str(given["key"]), "c1").stdout.strip(),
        "a recommendation without": container.call(python, "-c", ASK, "", "c1").stdout.strip(),
        "a write to /tmp": "refused" if container.call(python, "-c", write, "/tmp/x").returncode else "done",
        **{f"a write to {path}": error for path, error in refused.items()},
    }
    service.send_signal(int(str(given["stop"])))
    try:
        seen["exit code after the stop signal"] = service.wait(SECONDS)
    except subprocess.TimeoutExpired:
        service.kill()
        seen["exit code after the stop signal"] = "none"
    for name, value in seen.items():
        print(f"{name}: {value}")
    expected = (
        seen["user of the service"] == str(container.identity[0]) != "0"
        and seen["capabilities"] == f"{'0' * 16} {'0' * 16}, no new privileges 1"
        and seen["a recommendation with the key"] == "200 5"
        and seen["a recommendation without"] == "401"
        and seen["a write to /tmp"] == "done"
        and all("Read-only file system" in error or "Permission denied" in error for error in refused.values())
        and "Read-only file system" in refused["/keys.toml"] + refused["/store/x"]
        and seen["exit code after the stop signal"] == 0
    )
    return 0 if expected else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "image", help="Folder of the roots; the base is kept there."
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return inside(json.load(sys.stdin))
    needed = [name for name in ("debootstrap", "unshare", "chroot", "mount", "ip") if shutil.which(name) is None]
    if os.geteuid() or needed:
        print(
            f"error: needs root{''.join(f', {name}' for name in needed)}; on Debian: apt-get install debootstrap "
            f"iproute2"
        )
        return 2
    work: Path = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            base = debian(work / "base")
            folder.chmod(0o755)

            def new_root(image: str) -> Path:
                if not BASE_IMAGE.fullmatch(image):
                    raise ImageError(f"FROM {image}: expected python:3.X-slim")
                root = folder / f"stage{len(list(folder.iterdir()))}"
                subprocess.run(["cp", "-a", str(base), str(root)], check=True)
                python = subprocess.run(
                    ["chroot", str(root), "python", "-V"], capture_output=True, text=True, check=True
                )
                print(f"FROM {image}: Debian {SUITE} with {python.stdout.strip()}", flush=True)
                return root

            def run(at: Stage, command: str) -> None:
                started = time.monotonic()
                run_step(at, command)
                print(f"RUN {command}: {time.monotonic() - started:.0f} s", flush=True)

            image = build(DOCKERFILE.read_text(encoding="utf-8"), new_root, ROOT, run)
            store, keys, key = published(folder)
            serve(image, store, keys, key)
    except ImageError as e:
        print(f"error: {e}")
        return 1
    print(f"the image is built and serves: {time.monotonic() - begun:.0f} s")
    return 0


def published(folder: Path) -> tuple[Path, Path, str]:
    """Return a store with a small model, a file of keys that all may read, and the key, made by the commands of the
    package."""

    def twotower(*words: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "twotower", *map(str, words)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ImageError(f"twotower {words[0]}: {done.stderr.strip()}")
        return done

    config, run, store, keys = (folder / name for name in ("mine.toml", "run", "store", "keys.toml"))
    twotower("suggest", ROOT / "examples" / "own-data" / "clicks.csv", "--output", config)
    twotower("train", config, "--run", run, "--set", "train.epochs=1")
    twotower("publish", run, "--store", store, "--force")
    made = twotower("key", "shop")
    keys.write_text(made.stdout, encoding="utf-8")
    found = re.search(r"[\w-]{20,}", made.stderr)
    if found is None:
        raise ImageError("twotower key: no key on standard error")
    return store, keys, found[0]


if __name__ == "__main__":
    sys.exit(main())
