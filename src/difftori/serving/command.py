"""What `difftori serve` does: it loads a policy and serves it until a signal ends it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Literal

import numpy as np
import torch

from difftori.errors import NonFiniteError
from difftori.loading import load
from difftori.serving.access import read_token, require_token
from difftori.serving.server import PolicyServer, Traffic, serve


@dataclass(frozen=True)
class ServeRequest:
    """The options of `difftori serve`."""

    run: str
    host: str
    port: int
    token_file: Path | None
    chunks: bool
    max_clients: int
    threads: int
    which: Literal["best", "last"] | None
    device: str


def serve_run(request: ServeRequest, say: Callable[[str], None]) -> Traffic:
    """Serve until SIGINT or SIGTERM. `say` gets the address, and a line for each client.

    Raises ConfigError for an address that needs a token, the errors of `difftori.load`, and ServingError if the address cannot be used.
    """
    token = None if request.token_file is None else read_token(request.token_file)
    require_token(request.host, token)
    policy = load(request.run, which=request.which, device=request.device)
    torch.set_num_threads(request.threads)
    with suppress(NonFiniteError):  # of made-up observations
        policy.fork().act(
            {name: np.zeros(entry.shape, entry.dtype) for name, entry in policy.obs.items()}
        )  # the first is slow
    server = PolicyServer(policy, token=token, chunks=request.chunks, max_clients=request.max_clients, say=say)

    def ready(port: int) -> None:
        name = gethostname() if request.host in ("0.0.0.0", "::") else request.host
        address = f"ws://[{name}]:{port}" if ":" in name else f"ws://{name}:{port}"
        secret = "" if token is None else ", token=…"
        say(f"serving {policy.name} of {request.run} at {address}; Ctrl-C ends it")
        say(f"to act with it: difftori.serving.Client({address!r}{secret}), or openpi-client")

    serve(server, request.host, request.port, ready)
    return server.traffic
