"""Serves one environment of ManiSkill 2 over its standard input and output, for `maniskill_bridge`.

This file runs in another Python interpreter, from 3.8 on, which has mani_skill2 and not difftori; it imports nothing of
difftori. A message is a frame: 4 bytes with the length of a header, the header as JSON, and the bytes of the arrays that its
entry `arrays` lists as [name, dtype, shape]. Nothing is unpickled. Both sides refuse frames beyond fixed sizes.
"""

import importlib
import json
import os
import select
import struct
import sys
import time
from typing import Any

import numpy as np

MAX_HEADER = 1 << 20
MAX_ARRAYS = 1 << 28
"""Largest header and largest total of the arrays, in bytes."""
DTYPES = ("float32", "uint8")


def send(fd: int, header: dict, arrays: dict) -> None:
    """Write a frame to a file descriptor. The arrays must have a type in `DTYPES`."""
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": listed}).encode()
    data = [struct.pack(">I", len(text)), text]
    data += [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
    rest = memoryview(b"".join(data))
    while len(rest):
        rest = rest[os.write(fd, rest) :]


def receive(fd: int, deadline=None) -> tuple:
    """Read a frame, and return its header and its arrays by name.

    Raises EOFError if the other side is gone, TimeoutError after `deadline` (`time.monotonic`), ValueError for an invalid frame.
    """
    (size,) = struct.unpack(">I", _read(fd, 4, deadline))
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(_read(fd, size, deadline).decode())
    if not isinstance(header, dict):
        raise ValueError("a header that is not an object")
    layout, total = [], 0
    for name, dtype, shape in header.pop("arrays"):
        if dtype not in DTYPES or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"an array of type {dtype} and shape {shape}")
        count = np.dtype(dtype).itemsize
        for length in shape:
            count *= length
        total += count
        if total > MAX_ARRAYS:
            raise ValueError(f"arrays of more than {MAX_ARRAYS} bytes")
        layout.append((str(name), dtype, shape, count))
    arrays = {}
    for name, dtype, shape, count in layout:
        arrays[name] = np.frombuffer(_read(fd, count, deadline), dtype).reshape(shape).copy()
    return header, arrays


def _read(fd: int, count: int, deadline) -> bytes:
    """Return exactly `count` bytes."""
    parts = []
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    while count:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not ready.poll(wait):
            raise TimeoutError("no answer")
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _shown(observation) -> dict:
    """Return the arrays of an observation: the state, or the points of the cameras and the robot's state."""
    if not isinstance(observation, dict):
        return {"state": np.asarray(observation, dtype=np.float32)}
    cloud, robot, extra = observation["pointcloud"], observation["agent"], observation.get("extra", {})
    found = {"xyzw": np.asarray(cloud["xyzw"], dtype=np.float32), "rgb": np.asarray(cloud["rgb"], dtype=np.uint8)}
    for name in ("qpos", "qvel"):
        found[name] = np.asarray(robot[name], dtype=np.float32)
    for name in ("tcp_pose", "goal_pos"):
        if name in extra:
            found[name] = np.asarray(extra[name], dtype=np.float32)
    return found


def _open(request: dict) -> Any:
    """Create the environment. ManiSkill 2 registers its tasks with Gymnasium."""
    import gymnasium

    importlib.import_module("mani_skill2.envs")

    made = gymnasium.make(
        request["env_id"], obs_mode=request["obs_mode"], control_mode=request["control"], render_mode="cameras"
    )
    return made.unwrapped


def _answer(env, request: dict, arrays: dict) -> tuple:
    """Execute one request."""
    if request["kind"] == "reset":
        observation, _ = env.reset(seed=request["seed"])
        return {"kind": "reset"}, _shown(observation)
    if request["kind"] == "step":
        observation, reward, _, _, info = env.step(arrays["action"])
        return {"kind": "step", "reward": float(reward), "success": bool(info["success"])}, _shown(observation)
    if request["kind"] == "render":
        return {"kind": "render"}, {"image": np.asarray(env.render(), dtype=np.uint8)}
    raise ValueError(f"unknown request {request['kind']!r}")


def main() -> None:
    """Answer requests until `close` or the end of the input. Whatever a library prints goes to the error output."""
    # Python puts the folder of this file first, whose gym.py and others would hide packages.
    sys.path[:] = [
        folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))
    ]
    inputs, outputs = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    env: Any = None
    while True:
        try:
            request, arrays = receive(inputs)
        except EOFError:
            return
        if request["kind"] == "close":
            if env is not None:
                env.close()
            return
        try:
            if request["kind"] == "open":
                env = _open(request)
                space = env.action_space  # a Box
                low, high = (np.asarray(bound, dtype=np.float32) for bound in (space.low, space.high))
                send(outputs, {"kind": "open"}, {"low": low, "high": high})
            else:
                send(outputs, *_answer(env, request, arrays))
        except Exception as error:  # every failure is an answer, and the other side decides
            text = f"{type(error).__name__}: {error}"
            send(outputs, {"kind": "error", "message": text[:2000]}, {})


if __name__ == "__main__":
    main()
