"""`difftori serve`: one policy for several clients, in openpi's wire protocol, each client with its own episode.

The weights are shared. Actions are computed one after the other in one thread, so that a client's actions do not depend on the
other clients, to the last bit: they are those of `difftori.load` on the same observations.
"""

import asyncio
import hmac
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from difftori import __version__
from difftori.errors import ConfigError, DifftoriError, ServingError, ShapeError
from difftori.loading import LoadedPolicy
from difftori.serving.codec import missing_extra, pack, unpack

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

_MARGIN = 2**20
"""Bytes of a message beyond the policy's observations, for names and for entries that it ignores."""
_NUMBER = 8
"""Bytes of the largest number type that a client may send."""
_ARRAY = np.ndarray | np.generic | int | float
_QUEUE, _KEPT, _CLOSE_SECONDS = 2, 10_000, 2.0
_INVALID, _UNSUPPORTED, _INTERNAL = 1007, 1003, 1011  # close codes of RFC 6455

_log = logging.getLogger(__name__)
_protocol_log = logging.getLogger(f"{__name__}.protocol")
_protocol_log.setLevel(logging.CRITICAL)  # failed handshakes of strangers are no errors of this program


@dataclass
class Traffic:
    """Numbers of clients and answers, and the seconds from the arrival of an observation to its answer, of the last 10 000."""

    clients: int = 0
    actions: int = 0
    refused: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def table(self) -> list[dict[str, Any]]:
        """The rows of a table: counts, and milliseconds."""
        counts = {"clients": self.clients, "answers": self.actions, "refused messages": self.refused}
        rows: list[dict[str, Any]] = [{"": name, "value": value} for name, value in counts.items()]
        if self.seconds:
            for name, share in {"median": 0.5, "99 %": 0.99, "longest": 1.0}.items():
                rows.append({"": f"answer, {name} (ms)", "value": 1e3 * float(np.quantile(self.seconds, share))})
        return rows


class PolicyServer:
    """A policy for several clients.

    `token`: what clients must send as `Authorization: Api-Key TOKEN` (default: nothing). `chunks`: answer with all actions of a
    plan that are executed, instead of the next one. `max_clients`: further ones are refused. `say` gets a line for each client.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        *,
        token: str | None = None,
        chunks: bool = False,
        max_clients: int = 32,
        say: Callable[[str], None] = lambda line: None,
    ):
        if chunks and policy.n_obs_steps > 1:
            raise ConfigError(
                [
                    f"--chunks: {policy.name} reads the last {policy.n_obs_steps} observations, so it needs that of every step. "
                    "Fix: remove --chunks"
                ]
            )
        if "reset" in {*policy.obs, *policy.parts}:
            raise ConfigError(
                [
                    f"serve: {policy.name} has an observation `reset`, which in a message begins an episode. Fix: train with another "
                    "name, such as --obs-keys my_reset=reset"
                ]
            )
        self.policy, self.max_clients, self.traffic = policy, max_clients, Traffic()
        self._expected = None if token is None else f"Api-Key {token}".encode()
        self._steps = policy.n_action_steps if chunks else 1
        self._say, self._connected = say, 0
        self._thread = ThreadPoolExecutor(1, "act")
        self.max_size = _MARGIN + _NUMBER * sum(math.prod(entry.shape) for entry in policy.obs.values())

    @property
    def metadata(self) -> dict[str, Any]:
        """The first message to each client, plain values only."""
        policy = self.policy
        return {
            "server": f"difftori {__version__}",
            "policy": policy.name,
            "obs": {name: {"shape": list(e.shape), "dtype": e.dtype} for name, e in policy.obs.items()},
            "parts": {name: list(shape) for name, shape in policy.parts.items()},
            "low": policy.low.tolist(),
            "high": policy.high.tolist(),
            "n_obs_steps": policy.n_obs_steps,
            "n_action_steps": policy.n_action_steps,
            "action_repeat": policy.action_repeat,
            "actions": [self._steps, len(policy.low)],
            "max_message_bytes": self.max_size,
        }

    async def run(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serve until `stop` is set, then close all connections. `ready` is called with the port, which is a free one for `port` 0.

        Raises ServingError if the address cannot be used, and MissingExtraError (extra `serve`).
        """
        try:
            from websockets.asyncio.server import serve
        except ImportError as error:
            raise missing_extra(error) from error
        try:
            server = await serve(
                self._client,
                host,
                port,
                process_request=self._admit,
                origins=[None],  # browsers send an origin: no web page reaches the policy
                compression=None,
                max_size=self.max_size,
                max_queue=_QUEUE,
                close_timeout=_CLOSE_SECONDS,
                logger=_protocol_log,
            )
        except OSError as error:
            raise ServingError(
                f"{host}:{port}: cannot listen there: {error}. Fix: choose another port or host"
            ) from error
        try:
            ready(next(iter(server.sockets)).getsockname()[1])
            await stop.wait()
        finally:
            server.close()
            await server.wait_closed()
            self._thread.shutdown(cancel_futures=True)

    def _admit(self, connection: "ServerConnection", request: "Request") -> "Response | None":
        """Answer the handshake: 401 without the token, 503 if there are enough clients, otherwise go on."""
        if self._expected is not None:
            given = request.headers.get_all("Authorization")
            if len(given) != 1 or not hmac.compare_digest(_bytes(given[0]), self._expected):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or missing token\n")
        if self._connected >= self.max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.max_clients} clients are connected\n")
        return None

    async def _client(self, connection: "ServerConnection") -> None:
        """Serve one client until it leaves."""
        from websockets.exceptions import ConnectionClosed

        self._connected += 1
        self.traffic.clients += 1
        number, session, own = self.traffic.clients, Session(self.policy.fork(), self._steps), Traffic()
        host, port, *_ = connection.remote_address or ("an unknown address", 0)
        self._say(f"client {number}: connected from {host} port {port}")
        try:
            await connection.send(pack(self.metadata))
            async for message in connection:
                if not await self._answer(connection, session, message, own):
                    break
        except ConnectionClosed:
            pass
        finally:
            self._connected -= 1
            median = f", {1e3 * float(np.median(own.seconds)):.3g} ms each" if own.seconds else ""
            refused = f", {own.refused} refused" if own.refused else ""
            self._say(f"client {number}: left after {own.actions} answers{refused}{median}")

    async def _answer(
        self, connection: "ServerConnection", session: "Session", message: str | bytes, own: Traffic
    ) -> bool:
        """Answer a message. Returns False if the connection is closed after it, because of an error."""
        began, code, answer = time.perf_counter(), None, b""
        try:
            if isinstance(message, str):
                code = _UNSUPPORTED
                raise ServingError("a text message. Fix: send msgpack in a binary message")
            code = _INVALID
            obs = _observation(message)
            code = None
            actions = await asyncio.get_running_loop().run_in_executor(self._thread, session.act, obs)
            timing = {"infer_ms": 1e3 * (time.perf_counter() - began)}
            answer = pack({"actions": actions, "server_timing": timing})
        except DifftoriError as error:
            answer = str(error)
        except Exception as error:
            _log.exception("an observation caused an error in the policy")
            code, answer = _INTERNAL, f"error in the policy: {type(error).__name__}. Its message is in the server's log"
        for traffic in (self.traffic, own):
            if isinstance(answer, str):
                traffic.refused += 1
            else:
                traffic.actions += 1
                traffic.seconds.append(time.perf_counter() - began)
        await connection.send(answer)
        if code is not None:
            await connection.close(code, "see the message before")
        return code is None


class Session:
    """The policy of one client: one environment, one observation at a time, `steps` actions for each."""

    def __init__(self, policy: LoadedPolicy, steps: int):
        self._policy, self._steps = policy, steps

    def act(self, message: dict[str, Any]) -> np.ndarray:
        """Return the next actions (steps A); an entry `reset`, if true, begins a new episode.

        Raises ShapeError, also for lists and for several rows, and NonFiniteError. Only `reset` has an effect then.
        """
        begin = message.get("reset", False)
        if not isinstance(begin, bool | np.bool_):
            raise ShapeError(f"reset: is a {type(begin).__name__}. Fix: give true or false")
        shapes = {name: entry.shape for name, entry in self._policy.obs.items()} | self._policy.parts
        for name in shapes.keys() & message.keys():
            values = message[name]
            if not isinstance(values, _ARRAY):
                raise ShapeError(f"obs: {name} is a {type(values).__name__}. Fix: give a numpy array")
            if np.ndim(values) == len(shapes[name]) + 1:
                raise ShapeError(f"obs: {name} has a leading dimension of rows. Fix: connect once per environment")
        if begin:
            self._policy.reset()
        # with one observation step, the actions of a plan follow one another at the same observation
        obs = {name: np.asarray(value) for name, value in message.items() if isinstance(value, _ARRAY)}
        return np.stack([self._policy.act(obs) for _ in range(self._steps)])


def _bytes(header: str) -> bytes:
    return header.encode("utf-8", "surrogateescape")


def _observation(message: bytes) -> dict[str, Any]:
    obs = unpack(message)
    if not isinstance(obs, dict) or not all(isinstance(name, str) for name in obs):
        raise ServingError(
            "malformed message: not a map with texts as keys. Fix: send a dictionary of observations by name"
        )
    return obs


def serve(server: PolicyServer, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM. A second signal has its previous effect. Raises the errors of `PolicyServer.run`."""

    async def run() -> None:
        stop = asyncio.Event()
        with _stopped_by((signal.SIGINT, signal.SIGTERM), stop):
            await server.run(host, port, stop, ready)

    asyncio.run(run())


@contextmanager
def in_thread(server: PolicyServer, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Serve in a thread of this process, until the block ends. Yields the port. Raises the errors of `PolicyServer.run`."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def run() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await server.run(host, port, stop, lambda port: started.set_result((loop, stop, port)))
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = Thread(target=asyncio.run, args=(run(),), name="policy server")
    thread.start()
    try:
        loop, stop, port = started.result()
        try:
            yield port
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join()


@contextmanager
def _stopped_by(signals: Sequence[signal.Signals], stop: asyncio.Event) -> Iterator[None]:
    loop, former = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(stop.set)
        signal.signal(number, former[signal.Signals(number)])

    for number in signals:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
