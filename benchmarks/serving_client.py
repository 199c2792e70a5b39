"""One client of the benchmark of serving, in its own process without torch: reads a line to begin, and prints its times as JSON."""

import json
import sys
import time

import numpy as np

from difftori.serving import Client

_WARM_UP = 5


def main(address: str, count: int) -> None:
    """Act `count` times at random observations, as fast as the server answers, and print the milliseconds of each."""
    rng, times = np.random.default_rng(0), []
    with Client(address) as client:
        obs = {
            name: rng.integers(0, 255, entry["shape"], np.uint8)
            if entry["dtype"] == "uint8"
            else rng.uniform(-1, 1, entry["shape"]).astype(np.float32)
            for name, entry in client.obs.items()
        }
        for _ in range(_WARM_UP):
            client.act(obs)
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(count):
            began = time.perf_counter()
            client.act(obs)
            times.append(1e3 * (time.perf_counter() - began))
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
