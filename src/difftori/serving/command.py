"""What `difftori serve` does: it loads a policy and serves it until a signal ends it."""

from collections.abc import Callable
from contextlib import suppress
from socket import gethostname

import numpy as np
import torch

from difftori.arguments import ServeArguments
from difftori.errors import NonFiniteError
from difftori.loading import load
from difftori.serving.access import read_token, require_token
from difftori.serving.server import PolicyServer, Traffic, serve


def serve_run(options: ServeArguments, say: Callable[[str], None]) -> Traffic:
    """Serve until SIGINT or SIGTERM. `say` gets the address, and a line for each client.

    Raises ConfigError for an address that needs a token, the errors of `difftori.load`, and ServingError if the address cannot be used.
    """
    token = None if options.token_file is None else read_token(options.token_file)
    require_token(options.host, token)
    policy = load(options.run, which=options.which, device=options.device, trust_code=options.trust_code)
    torch.set_num_threads(options.threads)
    made_up = {name: np.zeros(entry.shape, entry.dtype) for name, entry in policy.obs.items()}
    with suppress(NonFiniteError):
        policy.fork().act(made_up)  # the first action takes longer than the others
    server = PolicyServer(policy, token=token, chunks=options.chunks, max_clients=options.max_clients, say=say)

    def ready(port: int) -> None:
        name = gethostname() if options.host in ("0.0.0.0", "::") else options.host
        address = f"ws://[{name}]:{port}" if ":" in name else f"ws://{name}:{port}"
        secret = "" if token is None else ", token=…"
        say(f"serving {policy.name} of {options.run} at {address}; Ctrl-C ends it")
        say(f"to act with it: difftori.serving.Client({address!r}{secret}), or openpi-client")

    serve(server, options.host, options.port, ready)
    return server.traffic
