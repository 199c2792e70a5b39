"""The server: each client has its own episode, and whatever a client sends, the others are served."""

import socket
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import difftori
from difftori.errors import ConfigError, ServingError
from difftori.loading import LoadedPolicy
from difftori.serving import Client
from difftori.serving.codec import pack, unpack
from difftori.serving.server import PolicyServer, in_thread
from difftori.types import EntrySpec
from tests.support import tiny_runs

pytest.importorskip("websockets", reason="needs websockets: pip install 'difftori[serve]'")
msgpack = pytest.importorskip("msgpack", reason="needs msgpack: pip install 'difftori[serve]'")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

TOKEN = "a-token-of-these-tests"


@pytest.fixture(scope="module")
def policy_run(tmp_path_factory):
    """Reads two observations, and executes three actions of a plan."""
    options = {"n-obs-steps": "2", "n-action-steps": "3", "horizon": "4"}
    return tiny_runs.policy_run(tmp_path_factory.mktemp("policy"), **options)


@pytest.fixture(scope="module")
def agent_run(tmp_path_factory):
    """Warm-starts its solves."""
    options = {"env": "probe:two-step", "steps": "16", "seed-steps": "9", "eval-episodes": "2", "horizon": "2"}
    options |= {"width": "16", "latent-dim": "4", "batch-size": "8", "plan-steps": "1"}
    return tiny_runs.trained("difftori", tmp_path_factory.mktemp("agent") / "run", **options)


def constant(value=0.5, size=3, **options):
    """A policy whose actions are a number, without a run."""
    made = lambda: lambda obs, first, active: np.full((1, 2), value, np.float32)  # noqa: E731
    return LoadedPolicy(made, "own", {"state": EntrySpec((size,))}, (-1.0,) * 2, (1.0,) * 2, scaled=False, **options)


@contextmanager
def serving(policy, **options):
    """A server and its port. Nothing listens afterwards."""
    server = PolicyServer(policy, **options)
    with in_thread(server) as port:
        yield server, port
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):  # noqa: PT011
        pass


@contextmanager
def raw(port, token=None, **options):
    """A connection that has received the metadata."""
    headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
    with connect(f"ws://127.0.0.1:{port}", compression=None, additional_headers=headers, proxy=None, **options) as ws:
        yield ws, unpack(ws.recv(timeout=10))


def ask(ws, message):
    ws.send(message if isinstance(message, bytes | str) else pack(message))
    return ws.recv(timeout=10)


def still_served(port, token=None):
    with Client(f"ws://127.0.0.1:{port}", token=token) as client:
        return client.act(np.zeros(client.obs["state"]["shape"])).shape == client.low.shape


@pytest.mark.parametrize(("run", "steps"), [("policy_run", 30), ("agent_run", 6)])
def test_eight_clients_at_once_each_act_as_a_policy_that_was_loaded_for_them(run, steps, request):
    folder = request.getfixturevalue(run)
    found, faults = {}, []
    streams = [np.random.default_rng(number) for number in range(8)]
    loaded = difftori.load(folder)
    shape = loaded.obs["state"].shape
    observations = [stream.normal(size=(steps, *shape)).astype(np.float32) for stream in streams]
    begins = [set(stream.integers(1, steps, 3).tolist()) for stream in streams]

    def play(number, act, reset):
        actions = []
        for step, obs in enumerate(observations[number]):
            if step in begins[number]:
                reset()
            actions.append(act({"state": obs, "camera": np.zeros(2)}))
        return np.array(actions)

    def play_served(number, port):
        try:
            with Client(f"ws://127.0.0.1:{port}") as client:
                found[number] = play(number, client.act, client.reset)
        except Exception as fault:
            faults.append(fault)

    with serving(difftori.load(folder)) as (server, port):
        clients = [threading.Thread(target=play_served, args=(number, port)) for number in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
    assert not faults
    assert (server.traffic.clients, server.traffic.actions, server.traffic.refused) == (8, 8 * steps, 0)
    for number in range(8):
        alone = loaded.fork()
        assert np.array_equal(found[number], play(number, alone.act, alone.reset)), number


def test_the_client_of_openpi_acts(policy_run):
    module = pytest.importorskip("openpi_client.websocket_client_policy", reason="needs openpi-client")
    broker = pytest.importorskip("openpi_client.action_chunk_broker", reason="needs dm-tree").ActionChunkBroker
    alone, obs = difftori.load(policy_run), np.ones(2, np.float32)
    with serving(difftori.load(policy_run), token=TOKEN) as (_, port), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls websockets in a way that newer versions warn of
        theirs = module.WebsocketClientPolicy("127.0.0.1", port, api_key=TOKEN)
        assert theirs.get_server_metadata()["obs"] == {"state": {"shape": [2], "dtype": "float32"}}
        for step in range(5):
            found = theirs.infer({"state": obs * step, "prompt": "go home"})["actions"]
            assert np.array_equal(found, alone.act(obs * step)[None])
        alone.reset()
        assert np.array_equal(theirs.infer({"state": obs, "reset": True})["actions"][0], alone.act(obs))
        with pytest.raises(RuntimeError, match="state missing"):
            theirs.infer({"prompt": "go home"})
        theirs._ws.close()
        chunked = constant(n_action_steps=4)
        with serving(chunked, chunks=True) as (server, other):
            theirs = module.WebsocketClientPolicy("127.0.0.1", other)
            played = broker(theirs, 4)
            assert [played.infer({"state": np.zeros(3)})["actions"].shape for _ in range(8)] == [(2,)] * 8
            assert server.traffic.actions == 2
            theirs._ws.close()


def test_chunks_are_the_plans_that_are_executed_and_the_client_executes_them(tmp_path):
    folder = tiny_runs.policy_run(tmp_path, **{"n-obs-steps": "1", "n-action-steps": "3", "horizon": "3"})
    alone, rng = difftori.load(folder), np.random.default_rng(0)
    with serving(difftori.load(folder), chunks=True) as (server, port):
        with Client(f"ws://127.0.0.1:{port}") as client:
            assert client.metadata["actions"] == [3, 2]
            for step in range(9):
                if step == 4:
                    client.reset()
                    alone.reset()
                obs = rng.normal(size=2)
                assert np.array_equal(client.act(obs), alone.act(obs))
        assert server.traffic.actions == 4


def test_chunks_of_a_policy_with_a_history_are_refused():
    with pytest.raises(ConfigError, match="reads the last 2 observations"):
        PolicyServer(constant(n_obs_steps=2), chunks=True)


def test_an_observation_named_as_the_beginning_of_an_episode_is_refused():
    policy = constant()
    policy.obs = {"reset": policy.obs["state"]}
    with pytest.raises(ConfigError, match="has an observation `reset`.*--obs-keys my_reset=reset"):
        PolicyServer(policy)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Api-Key wrong"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": f"Api-Key {TOKEN[:-1]}"},
        {"Authorization": f"Api-Key {TOKEN}x"},
        {"Authorization": "Api-Key "},
        [("Authorization", f"Api-Key {TOKEN}"), ("Authorization", "Api-Key wrong")],
    ],
)
def test_without_the_token_the_handshake_is_refused(headers):
    with serving(constant(), token=TOKEN) as (server, port):
        with pytest.raises(InvalidStatus) as refused:
            with connect(f"ws://127.0.0.1:{port}", additional_headers=headers, proxy=None):
                pass
        assert refused.value.response.status_code == 401
        assert TOKEN.encode() not in (refused.value.response.body or b"")
        assert server.traffic.clients == 0
        with pytest.raises(ServingError, match=r"401.*Fix: check the address and the token"):
            Client(f"ws://127.0.0.1:{port}", token="another")
        assert still_served(port, TOKEN)
        assert still_served(port, TOKEN + "\n"), "a file of it ends with a newline"


def test_a_token_is_in_no_message():
    with serving(constant(), token=TOKEN) as (_, port), pytest.raises(ServingError, match="no connection") as refused:
        Client(f"ws://127.0.0.1:{port}", token=f"{TOKEN}\nsecond line")
    assert TOKEN not in str(refused.value)


def test_a_client_takes_tensors_and_names_what_is_no_array():
    with serving(constant()) as (_, port), Client(f"ws://127.0.0.1:{port}") as client:
        assert client.act(torch.zeros(3, requires_grad=True)).shape == (2,)
        with pytest.raises(ServingError, match="obs: state is no array of numbers"):
            client.act({"state": [[1.0], [1.0, 2.0]]})


def test_a_web_page_is_refused():
    with serving(constant()) as (_, port):
        with pytest.raises(InvalidStatus) as refused:
            with connect(f"ws://127.0.0.1:{port}", origin="http://127.0.0.1", proxy=None):
                pass
        assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\nAuthorization: Api-Key \xff\xfe\r\n", b"\x16\x03\x01\x00", b"GET /" + b"x" * 9000]
)
def test_strangers_get_an_error_and_the_server_lives_on(request_, caplog):
    lines = b"Host: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    with serving(constant(), token=TOKEN) as (_, port):
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(request_ + lines + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
            stranger.settimeout(15)
            answer = stranger.recv(100)
            assert not answer or answer.split()[1] in (b"401", b"400", b"414", b"431"), answer
        assert still_served(port, TOKEN)
    assert not caplog.records


def test_an_oversized_message_closes_the_connection():
    with serving(constant()) as (server, port):
        with raw(port) as (ws, metadata):
            largest = {"state": np.zeros(3), "other": b"\0" * (metadata["max_message_bytes"] - 200)}
            assert unpack(ask(ws, largest))["actions"].shape == (1, 2)
            with pytest.raises(ConnectionClosed) as closed:
                ask(ws, {"state": np.zeros(3), "other": b"\0" * metadata["max_message_bytes"]})
            assert closed.value.rcvd.code == 1009
        assert metadata["max_message_bytes"] == server.max_size == 2**20 + 24
        assert still_served(port)


def pickled_objects():
    entries = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|O", b"shape": [1]}
    return msgpack.packb({"state": entries})


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\xc1", 1007),
        (b"\x80\x04\x95pickle", 1007),
        (pickled_objects(), 1007),
        (msgpack.packb([1, 2]), 1007),
        (msgpack.packb({b"state": 1}), 1007),
        (msgpack.packb(msgpack.ExtType(1, b"x")), 1007),
        (b"\x91" * 10_000, 1007),
        ("a text", 1003),
    ],
)
def test_a_malformed_message_gets_an_error_and_the_server_lives_on(message, code):
    with serving(constant()) as (server, port):
        with raw(port) as (ws, _):
            answer = ask(ws, message)
            assert isinstance(answer, str)
            assert "Fix:" in answer
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=10)
            assert closed.value.rcvd.code == code
        assert server.traffic.refused == 1
        assert still_served(port)


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"state": np.array([0.0, np.nan])}, "NaN or Inf in state"),
        ({"state": np.array([0.0, -np.inf])}, "NaN or Inf in state"),
        ({"state": np.array([0.0, 1e300])}, "state has numbers beyond"),
        ({"state": np.zeros(3)}, r"state \(3,\), not \(2,\)|state has shape \(3,\)"),
        ({"state": np.zeros((1, 2))}, "state has a leading dimension"),
        ({"state": [0.0, 0.0]}, "state is a list"),
        ({"state": "left"}, "state is a str"),
        ({"state": None}, "state is a NoneType"),
        ({"place": np.zeros(2)}, "state missing; given are place"),
        ({}, "state missing"),
        ({"state": np.zeros(2), "reset": "yes"}, "reset: is a str"),
    ],
)
def test_a_wrong_observation_gets_an_error_and_the_episode_goes_on(policy_run, message, part):
    alone, rng = difftori.load(policy_run), np.random.default_rng(0)
    with serving(difftori.load(policy_run)) as (_, port), raw(port) as (ws, _):
        for step in range(8):
            if step % 3 == 1:
                answer = ask(ws, message)
                assert isinstance(answer, str)
                pytest.raises(ServingError, _raise, answer).match(part)
            obs = rng.normal(size=2)
            assert np.array_equal(unpack(ask(ws, {"state": obs}))["actions"][0], alone.act(obs))


def _raise(text):
    raise ServingError(text)


def test_an_action_with_nan_is_not_sent():
    with serving(constant(np.nan)) as (_, port), Client(f"ws://127.0.0.1:{port}") as client:
        with pytest.raises(ServingError, match="the action of own has NaN"):
            client.act(np.zeros(3))


def test_an_error_in_the_policy_closes_one_connection_and_is_logged(caplog):
    def fails(obs, first, active):
        if obs["state"][0, 0] > 0:
            raise RuntimeError("a secret path")
        return np.zeros((1, 2), np.float32)

    policy = LoadedPolicy(lambda: fails, "own", {"state": EntrySpec((3,))}, (-1.0,) * 2, (1.0,) * 2, scaled=False)
    with serving(policy) as (_, port):
        with raw(port) as (ws, _):
            assert (
                ask(ws, {"state": np.ones(3)})
                == "error in the policy: RuntimeError. Its message is in the server's log"
            )
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=10)
            assert closed.value.rcvd.code == 1011
        assert still_served(port)
    assert "a secret path" in caplog.text


def test_more_clients_than_allowed_are_refused():
    with serving(constant(), max_clients=1) as (_, port):
        with Client(f"ws://127.0.0.1:{port}") as client:
            client.act(np.zeros(3))
            with pytest.raises(ServingError, match="503"):
                Client(f"ws://127.0.0.1:{port}")
            client.act(np.zeros(3))


def test_clients_that_are_connected_when_the_server_ends_are_told():
    with serving(constant()) as (_, port):
        client = Client(f"ws://127.0.0.1:{port}")
        client.act(np.zeros(3))
    with pytest.raises(ServingError, match=r"closed.*Fix: connect again"):
        client.act(np.zeros(3))
    client.close()
    with pytest.raises(ServingError, match="no connection"):
        Client(f"ws://127.0.0.1:{port}")


def test_a_late_answer_is_not_taken_for_the_next():
    held = threading.Event()

    def slow(obs, first, active):
        held.wait(10)
        return np.zeros((1, 2), np.float32)

    policy = LoadedPolicy(lambda: slow, "own", {"state": EntrySpec((3,))}, (-1.0,) * 2, (1.0,) * 2, scaled=False)
    with serving(policy) as (_, port):
        client = Client(f"ws://127.0.0.1:{port}", timeout=0.2)
        with pytest.raises(ServingError, match=r"no answer within 0\.2 s"):
            client.act(np.zeros(3))
        held.set()
        with pytest.raises(ServingError, match="closed"):
            client.act(np.zeros(3))


def test_an_address_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match="Fix: choose another port"):
            with in_thread(PolicyServer(constant()), port=port):
                pass


def test_images_of_cameras_and_several_entries():
    obs = {"image": EntrySpec((8, 8, 3), dtype="uint8"), "state": EntrySpec((2,))}
    seen = []

    def act(obs, first, active):
        seen.append(obs)
        return np.zeros((1, 2), np.float32)

    policy = LoadedPolicy(lambda: act, "own", obs, (-1.0,) * 2, (1.0,) * 2, scaled=False)
    image = np.random.default_rng(0).random((8, 8, 3))
    with serving(policy) as (_, port), Client(f"ws://127.0.0.1:{port}") as client:
        assert client.obs["image"] == {"shape": [8, 8, 3], "dtype": "uint8"}
        client.act({"image": image, "state": np.zeros(2), "wrist": np.zeros((2000, 2000))})  # not sent
        with pytest.raises(ServingError, match="image, state"):
            client.act(image)
    assert np.array_equal(seen[0]["image"][0].transpose(1, 2, 0), np.rint(image * 255))
