"""`pellucid up`: Redis, a worker for each model and the gateway, under one supervisor."""

from __future__ import annotations

import errno
import fcntl
import http.client
import importlib.util
import ipaddress
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from .redis_process import NoRedisError, PrivateRedis
from .supervisor import Service, Supervisor, end_leftovers

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_HTTP_SECONDS = 2.0


@dataclass(frozen=True)
class _Model:
    """A model to serve: its name, and a folder or hub id."""

    name: str
    source: str


@click.command()
@click.argument("models", metavar="NAME=PATH_OR_HUB_ID...", nargs=-1, required=True)
@click.option("--port", default=8470, show_default=True, type=click.IntRange(1, 65535))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the gateway listens on.")
@click.option("--data", type=Path, help="Folder that keeps jobs and results between runs.")
@click.option("--dtype", help="float32, bfloat16, ...; by default the checkpoint's own.")
def up(models: tuple[str, ...], port: int, host: str, data: Path | None, dtype: str | None) -> None:
    """Serve models on this machine: a private Redis, a worker for each model, and the gateway.

    NAME is what users ask for; PATH_OR_HUB_ID is a folder with a transformers checkpoint, or a model of the
    Hugging Face hub. Ctrl-C stops everything. Without --data, jobs are kept in
    ~/.local/share/pellucid/up-PORT.
    """
    deployments = [_parse(argument) for argument in models]
    if len({model.name for model in deployments}) < len(deployments):
        raise click.ClickException("two models have the same name; give each its own")
    _require_the_workers_packages()
    _require_free(host, port)
    folder = data or _default_data() / f"up-{port}"
    with _locked(folder):
        try:
            redis = PrivateRedis(folder.resolve())
        except NoRedisError as error:
            raise click.ClickException(str(error)) from None
        failure = _supervise(deployments, host, port, folder.resolve(), dtype, redis)
    if failure is not None:
        raise click.ClickException(failure)


def _supervise(
    models: list[_Model], host: str, port: int, data: Path, dtype: str | None, redis: PrivateRedis
) -> str | None:
    """Run everything until it is told to stop; the reason if that was a failure."""
    names = [model.name for model in models]
    url = f"http://{_bracketed(_reachable(host))}:{port}"

    def worker(model: _Model) -> Service:
        return Service(
            name=model.name,
            command=_pellucid(
                "worker", f"{model.name}={model.source}", *(["--dtype", dtype] if dtype else [])
            ),
            before_start=lambda: redis.forget_worker(model.name),
            healthy=lambda: redis.state_of(model.name)[0] == "ready",
            why=lambda: redis.state_of(model.name)[1],
        )

    def announce() -> None:
        supervisor.say(f"ready at {url} with {', '.join(names)}; Ctrl-C stops it")
        supervisor.say(f"    export PELLUCID_HOST={url}")

    supervisor = Supervisor(
        [
            Service("redis", redis.command(), redis.answers, why=lambda: f"see {redis.log}"),
            Service(
                name="gateway",
                command=_pellucid("serve", "--host", host, "--port", str(port)),
                before_start=lambda: redis.forget_models_but(names),
                healthy=lambda: _answers_200(_reachable(host), port, "/health"),
            ),
            *map(worker, models),
        ],
        env=_environment(redis.url, data, names),
        pids=data / "pids.json",
        ready=lambda: _answers_200(_reachable(host), port, "/ready"),
        announce=announce,
    )
    if left := end_leftovers(data / "pids.json"):
        supervisor.say(f"ended what a killed `pellucid up` left behind: {', '.join(left)}")
    if not _is_loopback(host):
        supervisor.say(f"anyone who reaches {host}:{port} can run jobs: there are no keys")
    supervisor.say(f"starting; data in {data}")
    return supervisor.run()


def _environment(redis_url: str, data: Path, names: list[str]) -> dict[str, str]:
    """The children's environment. Workers share the cores, unless the user says otherwise."""
    cores = max(1, (os.cpu_count() or 1) // len(names))
    return {
        "OMP_NUM_THREADS": str(cores),
        **os.environ,
        "PELLUCID_REDIS_URL": redis_url,
        "PELLUCID_STORE_URL": (data / "store").as_uri(),
        "PELLUCID_EXPECT_MODELS": ",".join(names),
        "PYTHONUNBUFFERED": "1",
    }


def _parse(argument: str) -> _Model:
    """NAME=PATH_OR_HUB_ID. What has the form of a hub id and is no folder here is taken for one."""
    name, equals, source = argument.partition("=")
    if not equals or not source or not _NAME.fullmatch(name):
        raise click.ClickException(
            f"{argument!r} is not NAME=PATH_OR_HUB_ID, e.g. smollm2=/models/smollm2; a name has letters, "
            "digits and ._/-"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise click.ClickException(f"{folder} holds no transformers checkpoint: it has no config.json")
        return _Model(name, str(folder.resolve()))
    if source.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(source):
        raise click.ClickException(f"there is no folder {source} (for {name})")
    return _Model(name, source)


def _require_the_workers_packages() -> None:
    missing = [name for name in ("torch", "transformers", "celery") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"pellucid up needs the worker part ({missing[0]} is not installed): pip install 'pellucid[all]'"
        )


def _require_free(host: str, port: int) -> None:
    """Fail in one line if the gateway could not listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise click.ClickException(f"{host} is not an address of this machine") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except PermissionError:
            raise click.ClickException(f"port {port} is for root alone; give another with --port") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} on {host} is in use; stop what uses it, or give another with --port"
            else:
                reason = f"cannot listen on {host}: {error.strerror}"
            raise click.ClickException(reason) from None


def _default_data() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "pellucid"


def _locked(folder: Path) -> IO[str]:
    """The data folder's lock: the system drops it when the file is closed or this process ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        raise click.ClickException(f"cannot write to the data folder {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise click.ClickException(
            f"another `pellucid up` uses the data folder {folder}; stop it, or give another with --data"
        ) from None
    return lock


def _pellucid(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pellucid", *arguments]


def _answers_200(host: str, port: int, path: str) -> bool:
    """Asked without the proxies that the environment may name."""
    connection = http.client.HTTPConnection(host, port, timeout=_HTTP_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (http.client.HTTPException, OSError):
        return False
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """An address under which this machine reaches a gateway that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
