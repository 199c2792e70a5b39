"""Tasks that only ManiSkill 2 has, in a second Python interpreter: mani_skill2 cannot be installed beside ManiSkill 3.

The interpreter runs `maniskill_server.py`. Requests and observations are frames over its pipes. It ends with this process,
because its input then ends.
"""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from typing import Any, final

import numpy as np
from gymnasium.spaces import Box

from difftori.envs import maniskill_server
from difftori.envs.base import RenderingError
from difftori.envs.maniskill_names import MANISKILL2
from difftori.envs.maniskill_simulation import Simulation, Step
from difftori.errors import ConfigError

VARIABLE = "DIFFTORI_MANISKILL2_PYTHON"
"""Environment variable with the path of the interpreter. It is not an option of the environment, because a run stores its options,
and a stored run must not name a program to execute."""
START, STEP, CLOSE = 600.0, 60.0, 3.0
"""Time limits in seconds: to import and compile, which soft bodies do at their first start; to answer; to close.

With `workers="async"`, the limit of a worker process applies first: `make_env(..., timeout=600)`; default: 120.
"""
OUTPUT = 2000
"""Number of bytes of the interpreter's output that are kept for errors: the last ones."""
_FIX = (
    "Fix: install mani_skill2 into a Python of its own (python3 -m venv ms2 && ms2/bin/pip install 'mani_skill2==0.5.3' "
    f"'setuptools<81'), and set the environment variable {VARIABLE} to its path, ms2/bin/python"
)


@final
class BridgedSimulation(Simulation):
    """A task of `MANISKILL2` in the interpreter at the path in the environment variable `DIFFTORI_MANISKILL2_PYTHON`.

    Raises `ConfigError` if the interpreter, mani_skill2, its assets or the CUDA toolkit is missing, `RenderingError` without
    Vulkan, and RuntimeError for other failures, with the last lines that the interpreter wrote.
    """

    def __init__(self, task: str, *, obs: str, start: float = START, timeout: float = STEP):
        self._python = _interpreter(task)
        self._task, self._timeout = task, timeout
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [self._python, maniskill_server.__file__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            self._process: Any = subprocess.Popen(command, env=kept, bufsize=0, **pipes)
        except OSError as error:
            raise ConfigError(
                [f"{VARIABLE} is {self._python!r}, which cannot be executed ({error}). {_FIX}"]
            ) from error
        self._output = _Output(self._process.stderr)
        env_id, control = MANISKILL2[task]
        mode = "pointcloud" if obs == "points" else "state"
        try:
            request = {"kind": "open", "env_id": env_id, "obs_mode": mode, "control": control}
            _, bounds = self._ask(request, {}, start)
            self.action_space = Box(bounds["low"], bounds["high"], dtype=np.float32)
            self.shapes = {name: array.shape for name, array in self.reset(0).arrays.items()}
        except BaseException:
            self.close()
            raise

    def reset(self, seed: int) -> Step:
        """See `Simulation`."""
        _, arrays = self._ask({"kind": "reset", "seed": seed}, {}, self._timeout)
        return Step(arrays, 0.0, False)

    def step(self, action: np.ndarray) -> Step:
        """See `Simulation`."""
        header, arrays = self._ask({"kind": "step"}, {"action": np.asarray(action, np.float32)}, self._timeout)
        return Step(arrays, float(header["reward"]), bool(header["success"]))

    def render(self) -> np.ndarray:
        """See `Simulation`."""
        return self._ask({"kind": "render"}, {}, self._timeout)[1]["image"]

    def close(self) -> None:
        """End the interpreter, by force after some seconds."""
        process = self._process
        if process.poll() is None:
            with contextlib.suppress(OSError):
                maniskill_server.send(process.stdin.fileno(), {"kind": "close"}, {})
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE)
        if process.poll() is None:
            process.kill()
            process.wait()
        self._output.close()
        process.stdin.close()
        process.stdout.close()

    def _ask(self, header: dict[str, Any], arrays: dict[str, np.ndarray], limit: float) -> tuple[Any, Any]:
        """Send a request and return the answer. After a failure of the connection, the interpreter is killed."""
        try:
            maniskill_server.send(self._process.stdin.fileno(), header, arrays)
            answer, found = maniskill_server.receive(self._process.stdout.fileno(), time.monotonic() + limit)
            kind = answer["kind"]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            self._process.kill()
            self._process.wait()
            what = f"did not answer within {limit:g} s" if isinstance(error, TimeoutError) else f"failed ({error})"
            raise RuntimeError(
                f"maniskill:{self._task}: the interpreter {self._python} {what} at {header['kind']!r}. The end of its output:\n"
                f"{self._output.close()}"
            ) from error
        if kind == "error":
            raise self._explained(str(answer.get("message")))
        return answer, found

    def _explained(self, message: str) -> Exception:
        """Return the error for a failure in the interpreter, with the fix."""
        place, env_id = f"maniskill:{self._task} in {self._python}: {message}", MANISKILL2[self._task][0]
        if "mani_skill2" in message and "ModuleNotFoundError" in message:
            fix = f"{self._python} -m pip install 'mani_skill2==0.5.3' 'setuptools<81'"
            return ConfigError([f"{place}. Fix: {fix}"])
        if "No valid URDF" in message or "download" in message.lower():
            where = os.environ.get("MS2_ASSET_DIR", "./data")
            fix = f"{self._python} -m mani_skill2.utils.download_asset {env_id}, and set MS2_ASSET_DIR to its folder"
            return ConfigError([f"{place} (searched {where}). Fix: {fix}"])
        if "CUDA" in message:
            return ConfigError([f"{place}. Fix: use a machine with an NVIDIA GPU and the CUDA toolkit (nvcc)"])
        if "vk::" in message or "Vulkan" in message:
            return RenderingError(f"{place}. Fix: install the Vulkan driver of the GPU")
        return RuntimeError(place)


class _Output:
    """Reads a pipe in a thread until its end, so that its writer never waits, and keeps the last `OUTPUT` bytes."""

    def __init__(self, pipe: Any):
        self._pipe, self._last = pipe, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> str:
        """Return the last bytes as text, after the end of the pipe or some seconds: other processes can keep it open."""
        self._thread.join(CLOSE)
        if not self._thread.is_alive():
            self._pipe.close()
        return self._last.decode(errors="replace")

    def _read(self) -> None:
        while part := self._pipe.read(1 << 16):
            self._last = (self._last + part)[-OUTPUT:]


def _interpreter(task: str) -> str:
    """Return the path of the interpreter. Raises `ConfigError` if there is none."""
    given = os.environ.get(VARIABLE, "")
    if not given:
        raise ConfigError([f"maniskill:{task} is a task of ManiSkill 2 and needs a second interpreter. {_FIX}"])
    path = shutil.which(given)
    if path is None:
        raise ConfigError([f"{VARIABLE} is {given!r}, which is not an executable file. {_FIX}"])
    return path
