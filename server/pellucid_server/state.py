"""What the routes share: opened when the app starts, closed when it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import Redis

from .deployments import Deployments
from .jobs import Jobs
from .metrics import Metrics
from .settings import Settings
from .store import Store


@dataclass(frozen=True, slots=True)
class State:
    settings: Settings
    redis: Redis
    store: Store
    jobs: Jobs
    deployments: Deployments
    metrics: Metrics


def _state(request: Request) -> State:
    found: State = request.app.state.pellucid
    return found


Shared = Annotated[State, Depends(_state)]
