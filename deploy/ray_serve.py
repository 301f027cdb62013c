"""Several replicas of one artifact behind one address, with Ray Serve.

    pip install "ray[serve]" && pip install -e ".[serve]"      # in a checkout
    AMX_TVM_ARTIFACT=dist/smollm2 serve run deploy.ray_serve:app

Each replica is a process with an engine of its own; Ray's proxy at port 8000 spreads requests over
them and streams their answers. A replica whose engine fails ends, and Ray starts another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray import serve

import amx_tvm.runtime
from amx_tvm.server.app import Server, Settings

REPLICAS = int(os.environ.get("AMX_TVM_REPLICAS", "2"))
CPUS = int(os.environ.get("AMX_TVM_CPUS", "1"))  # of each; their sum is the machine's at most


def build() -> Any:
    """Load the artifact in the replica and return its ASGI application."""
    artifact = Path(os.environ["AMX_TVM_ARTIFACT"])
    engine = amx_tvm.runtime.load(artifact, threads=CPUS, speculation=True)
    return Server(engine, Settings(artifact.name), lambda error: os._exit(1)).app


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=256,  # the engine's own queue is behind it
    ray_actor_options={"num_cpus": CPUS},
)
@serve.ingress(build)
class Replica:
    """One engine behind the application's routes."""

    def check_health(self) -> None:
        """Nothing: an engine that fails ends the process."""


app = Replica.bind()
