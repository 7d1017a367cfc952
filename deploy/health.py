"""Health of a container: `health.py gateway` asks it over HTTP, `health.py worker` looks for its heartbeat.

Exits with 0 if it is well; else it prints one line and exits with 1.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.request

GATEWAY = "http://127.0.0.1:8470/health"


def gateway(url: str = GATEWAY) -> str | None:
    """What is wrong with the gateway at a URL, or None."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4):
            return None
    except OSError as error:
        return f"the gateway does not answer: {error}"


def worker(redis_url: str, host: str) -> str | None:
    """What is wrong with the worker on a host, or None: its model is loaded and its heart beats.

    Workers are registered as host:pid:number under their model.
    """
    from redis import Redis, RedisError

    from pellucid_shared import keyspace

    since = time.time() - keyspace.LEASE_SECONDS
    try:
        with Redis.from_url(redis_url, decode_responses=True, socket_timeout=4) as client:
            for model in client.smembers(keyspace.MODELS):
                alive = client.zrangebyscore(keyspace.model_workers(model), since, "+inf")
                if any(name.partition(":")[0] == host for name in alive):
                    return None
    except RedisError as error:
        return f"Redis does not answer: {error}"
    return "no heartbeat of this worker: its model is loading, or it hangs"


def main() -> int:
    wrong = (
        gateway()
        if sys.argv[1] == "gateway"
        else worker(os.environ["PELLUCID_REDIS_URL"], socket.gethostname())
    )
    if wrong is not None:
        print(wrong)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
