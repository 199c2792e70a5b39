"""`Client`: acts with a policy that `difftori serve` serves. It needs numpy, msgpack and websockets, not torch."""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, final

import numpy as np

from difftori.errors import ServingError
from difftori.serving.codec import missing_extra, pack, unpack


@final
class Client:
    """One environment or robot, connected to a policy server, with the methods of `difftori.loading.LoadedPolicy`.

    `address`: such as `ws://127.0.0.1:8000`. `token`: that of the server, if it has one. `timeout`: seconds to wait for the
    connection and for each answer. `metadata`: what the server says about its policy; `obs`, `low` and `high` are parts of it.
    An episode begins with the connection, and with `reset`.

    Raises ServingError if the server is not reachable or refuses the token, and MissingExtraError (extra `serve`).
    """

    def __init__(self, address: str, *, token: str | None = None, timeout: float = 60.0):
        try:
            from websockets.exceptions import WebSocketException
            from websockets.sync.client import connect
        except ImportError as error:
            raise missing_extra(error) from error
        self._failures, self._timeout, self._stack = (WebSocketException, OSError), timeout, ExitStack()
        secret = (token or "").strip()  # a file of it ends with a newline
        headers = {"Authorization": f"Api-Key {secret}"} if secret else {}
        try:
            # no proxy: a robot reaches its server directly
            opened = connect(address, compression=None, additional_headers=headers, proxy=None, open_timeout=timeout)
            self._connection = self._stack.enter_context(opened)
        except (*self._failures, ValueError) as error:
            reason = str(error).replace(secret, "…") if secret else str(error)
            raise ServingError(f"{address}: no connection: {reason}. Fix: check the address and the token") from None
        try:
            self.metadata: dict[str, Any] = self._receive()
            self.obs: dict[str, dict[str, Any]] = self.metadata["obs"]
            self.low, self.high = np.array(self.metadata["low"]), np.array(self.metadata["high"])
        except BaseException as error:
            self.close()
            if isinstance(error, KeyError):
                raise ServingError(f"{address}: its metadata has no {error}. Fix: check the server") from error
            raise
        self._begin = True
        self._plan: list[np.ndarray] = []

    def reset(self) -> None:
        """Begin a new episode with the next `act`."""
        self._begin, self._plan = True, []

    def act(self, obs: Any) -> np.ndarray:
        """Return the next action (A) in the environment's units.

        `obs`: a dictionary of arrays by name, of which names unknown to the policy are not sent, or one array if it has only one
        observation. Tensors of torch, on any device, and lists are arrays too.
        If the server answers with chunks, their actions are returned one by one, and only then is it asked again.

        Raises ServingError, which has the server's message if it refuses the observation, and if there is no answer.
        """
        if not self._plan:
            if not isinstance(obs, Mapping):
                if len(self.obs) > 1:
                    raise ServingError(f"obs: the policy needs {', '.join(self.obs)}. Fix: give a dictionary")
                obs = {next(iter(self.obs)): obs}
            known = {*self.obs, *self.metadata["parts"]}
            message: dict[str, Any] = {name: _array(name, values) for name, values in obs.items() if name in known}
            self._send(message | ({"reset": True} if self._begin else {}))
            self._plan, self._begin = list(self._receive()["actions"]), False
        return self._plan.pop(0)

    def close(self) -> None:
        """Close the connection."""
        self._stack.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._connection.send(pack(message))
        except self._failures as error:
            raise ServingError(f"the connection is closed: {error}. Fix: connect again") from error

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._connection.recv(timeout=self._timeout)
        except TimeoutError as error:
            self.close()  # a late answer would be taken for that of a later observation
            raise ServingError(f"no answer within {self._timeout:g} s. Fix: check the server") from error
        except self._failures as error:
            raise ServingError(f"the server closed the connection: {error}. Fix: connect again") from error
        if isinstance(answer, str):
            raise ServingError(answer)
        return unpack(answer)


def _array(name: str, values: Any) -> np.ndarray:
    """Convert to numpy, also tensors of torch on any device. Raises ServingError for what is no array."""
    try:
        return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ServingError(f"obs: {name} is no array of numbers ({error}). Fix: give one array") from error
