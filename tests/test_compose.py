"""docker-compose.yml, its images and .env.example agree with each other and with the code; without Docker."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis
import yaml

from pellucid._cli import main
from pellucid_server.settings import Settings as GatewaySettings
from pellucid_shared import keyspace
from pellucid_worker.settings import Settings as WorkerSettings
from redis_server import running_redis
from service import free_port

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
#: ``${NAME}``, ``${NAME:-default}`` or ``${NAME:?what is wrong}``.
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")


def example_env() -> dict[str, str]:
    """Every variable .env.example names, also those it has commented out."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(found.groups() for line in lines if (found := re.fullmatch(r"(?:# )?([A-Z_]+)=(.*)", line)))


def filled(value: Any) -> str:
    """A value with its variables as .env.example, with a password set, and the defaults have them."""
    env = {**example_env(), "PELLUCID_REDIS_PASSWORD": "secret"}
    return VARIABLE.sub(lambda m: env.get(m[1]) or (m[3] if m[2] == ":-" else ""), str(value))


def deploy_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def targets() -> Iterator[str]:
    yield from re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)


def test_it_has_the_services_and_nothing_that_old_compose_does_not_read() -> None:
    assert set(SERVICES) == {"redis", "gateway", "worker"}
    assert not {"name", "include", "version"} & set(COMPOSE)
    assert not re.search(r"(^|\s)![a-z]", TEXT), "YAML tags"


def test_every_variable_has_a_default_or_is_in_the_example() -> None:
    example = example_env()
    for name, kind, default in VARIABLE.findall(TEXT):
        assert name in example, f"{name} is not in .env.example"
        assert kind, f"{name} is empty where it is not set: give it a default, or :? and a reason"
        if kind == ":-" and example[name] and name != "PELLUCID_MODELS":
            assert example[name] == default, f"{name}: .env.example and docker-compose.yml differ"
    assert set(example) == {name for name, _, _ in VARIABLE.findall(TEXT)}, "in .env.example, and not used"


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_the_commands_exist_and_take_these_arguments(service: str) -> None:
    program, name, *arguments = map(filled, SERVICES[service]["command"])
    assert program == "pellucid"
    command = main.get_command(main.make_context("pellucid", ["--help"], resilient_parsing=True), name)
    assert command is not None
    command.make_context(name, arguments)  # raises UsageError


def test_the_environment_is_what_the_settings_read() -> None:
    wanted = {
        "gateway": {
            "PELLUCID_REDIS_URL",
            "PELLUCID_STORE_URL",
            "PELLUCID_EXPECT_MODELS",
            "PELLUCID_MAX_BODY_BYTES",
        },
        "worker": {"PELLUCID_REDIS_URL", "PELLUCID_STORE_URL", "HF_TOKEN"},
    }
    given = {name: {k: filled(v) for k, v in SERVICES[name]["environment"].items()} for name in wanted}
    assert {name: set(env) for name, env in given.items()} == wanted
    gateway, worker = GatewaySettings.from_env(given["gateway"]), WorkerSettings.from_env(given["worker"])
    assert gateway.redis_url == worker.redis_url == "redis://:secret@redis:6379/0"
    assert gateway.store_url == worker.store_url
    assert gateway == GatewaySettings(gateway.redis_url, gateway.store_url, expected=("smollm2",))


def test_the_gateway_and_the_worker_share_the_store_and_everything_named_is_kept() -> None:
    mounts = {
        name: dict(filled(v).split(":")[1::-1] for v in each["volumes"]) for name, each in SERVICES.items()
    }
    folder = filled(SERVICES["gateway"]["environment"]["PELLUCID_STORE_URL"]).removeprefix("file://")
    assert mounts["gateway"][folder] == mounts["worker"][folder]
    assert mounts["redis"] == {"/data": "redis-data"}
    home = re.search(r"HF_HOME=(\S+)", DOCKERFILE)
    assert home is not None
    assert any(home[1].startswith(f"{target}/") for target in mounts["worker"]), "fetched models are kept"
    named = {source for each in mounts.values() for source in each.values()} - {"/srv/models"}
    assert named | {"models"} == set(COMPOSE["volumes"])


def test_redis_keeps_what_it_is_told_and_asks_for_a_password() -> None:
    command = list(map(filled, SERVICES["redis"]["command"]))
    settings = dict(zip(command[1::2], command[2::2], strict=True))
    assert settings == {"--dir": "/data", "--appendonly": "yes", "--save": "", "--requirepass": "secret"}
    assert "ports" not in SERVICES["redis"]


def test_what_waits_for_redis_waits_until_it_is_healthy() -> None:
    assert "healthcheck" in SERVICES["redis"]
    for name in ("gateway", "worker"):
        assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_the_images_are_built_as_the_file_says() -> None:
    for name in ("gateway", "worker"):
        build = SERVICES[name]["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()
        assert build["target"] in targets()
        arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
        assert set(build["args"]) == arguments
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert "*" in source or (ROOT / source).exists(), source
    assert DOCKERFILE.index("USER pellucid") < DOCKERFILE.index("FROM runtime AS gateway")
    assert DOCKERFILE.count("HEALTHCHECK") == 2


def test_the_gateway_s_image_has_no_torch() -> None:
    pytest.importorskip("tomllib", reason="the images have Python 3.11 or later")
    needs = deploy_module("requirements").needs
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert not [line for line in needs(pyproject, "server") if line.startswith(("torch", "transformers"))]
    assert any(line.startswith("torch>=") for line in needs(pyproject, "worker"))
    assert re.search(r"AS gateway-needs\nRUN python3 requirements.py server ", DOCKERFILE)
    assert "COPY --from=gateway-build" in DOCKERFILE.split("FROM runtime AS gateway")[1].split("FROM")[0]


def test_the_build_sees_the_sources_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule[1:] for rule in rules if rule.startswith("!")}
    assert seen == {
        *("client", "server", "shared", "worker", "deploy"),
        *("pyproject.toml", "README.md", "LICENSE"),
    }


def test_the_health_of_a_gateway_and_of_a_worker() -> None:
    health = deploy_module("health")
    assert "the gateway does not answer" in health.gateway(f"http://127.0.0.1:{free_port()}/health")
    with running_redis() as url, redis.Redis.from_url(url) as client:
        assert "no heartbeat" in health.worker(url, "here")
        client.sadd(keyspace.MODELS, "m")
        client.zadd(keyspace.model_workers("m"), {"there:7:ab": 9e9, "here:7:cd": 1.0})
        assert "no heartbeat" in health.worker(url, "here")
        client.zadd(keyspace.model_workers("m"), {"here:7:cd": 9e9})
        assert health.worker(url, "here") is None
    assert "Redis does not answer" in health.worker(url, "here")
