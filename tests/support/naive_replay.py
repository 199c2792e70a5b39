"""A buffer made of lists, to compare with, and a player that records the same episodes in both."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from difftori.data.replay import Replay
from difftori.types import Segment

ROWS = 2


@dataclass
class NaiveEpisode:
    obs: list[np.ndarray]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    position: int = -1

    def __len__(self):
        return len(self.actions)


@dataclass
class Player:
    """Plays events in a Replay and in lists; every observation, action and reward is another number."""

    replay: Replay
    stack: int
    pixels: bool
    growing: dict[int, NaiveEpisode] = field(default_factory=dict)
    kept: list[NaiveEpisode] = field(default_factory=list)
    ticks: int = 0
    head: int = 0

    def frame(self) -> np.ndarray:
        self.ticks += 1
        if self.pixels:
            return np.array(divmod(self.ticks, 256), dtype=np.uint8).reshape(2, 1, 1)
        return np.array([self.ticks, -self.ticks], dtype=np.float32)

    def play(self, event: str, row: int = 0):
        if event == "drop":
            self.replay.drop(row)
            self.growing.pop(row, None)
            return
        if row not in self.growing:
            first = np.concatenate([self.frame()] * self.stack)
            self.replay.begin(row, first)
            self.growing[row] = NaiveEpisode([first])
        episode = self.growing[row]
        newest = self.frame()
        obs = np.concatenate([episode.obs[-1][len(newest) :], newest])
        action, reward = np.array([self.ticks, 0.5], np.float32), self.ticks / 2
        ends = event in ("terminate", "truncate")
        self.replay.add(row, action, reward, obs, terminated=event == "terminate", truncated=event == "truncate")
        episode.obs.append(obs)
        episode.actions.append(action)
        episode.rewards.append(reward)
        if ends:
            episode.terminated = event == "terminate"
            self.keep(self.growing.pop(row))

    def episode(self, steps: int, end: str = "truncate", row: int = 0):
        for _ in range(steps - 1):
            self.play("step", row)
        self.play(end, row)

    def keep(self, episode: NaiveEpisode):
        capacity = self.replay.capacity
        slots = capacity + max(capacity // 20, 1)
        while self.kept and (
            sum(map(len, self.kept)) + len(episode) > capacity
            or sum(len(e) + 1 for e in self.kept) + len(episode) + 1 > slots
        ):
            self.kept.pop(0)
        episode.position = self.head
        self.head += len(episode) + 1
        self.kept.append(episode)

    def starts(self) -> dict[int, tuple[NaiveEpisode, int]]:
        """Where slices start: what a Segment calls them, and the episode and step that they are."""
        length = self.replay.length
        return {
            e.position + t: (e, t)
            for e in self.kept
            for t in range(len(e) if e.terminated else max(len(e) - length + 1, 1))
        }


def compare(player: Player, segment: Segment):
    """Every slice of a segment is, bit by bit, what the lists hold at its start."""
    starts = player.starts()
    steps = len(segment.actions)
    for b, position in enumerate(segment.index.tolist()):
        episode, first = starts[position]
        here = min(steps, len(episode) - first)
        for t in range(steps + 1):
            seen = segment.obs[t, b].numpy()
            if t <= here:
                np.testing.assert_array_equal(seen, episode.obs[first + t])
            newest = len(seen) // player.stack
            np.testing.assert_array_equal(seen[-newest:], episode.obs[first + min(t, here)][-newest:])
        assert segment.mask[:, b].tolist() == [1.0] * here + [0.0] * (steps - here)
        np.testing.assert_array_equal(segment.actions[:here, b], episode.actions[first : first + here])
        assert segment.rewards[:here, b].tolist() == episode.rewards[first : first + here]
        assert not segment.actions[here:, b].any()
        assert not segment.rewards[here:, b].any()
        ended = [episode.terminated and first + t + 1 == len(episode) for t in range(here)]
        assert segment.terminated[:, b].tolist() == ended + [False] * (steps - here)


def make_player(capacity=40, length=3, stack=1, pixels=False, **options) -> Player:
    shape, dtype = ((2 * stack, 1, 1), np.uint8) if pixels else ((2 * stack,), np.float32)
    replay = Replay(
        capacity,
        obs_shape=shape,
        obs_dtype=dtype,
        action_dim=2,
        length=length,
        stack=stack,
        num_rows=ROWS,
        **options,
    )
    return Player(replay, stack, pixels)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Segment, other: Segment) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def events(max_size: int = 120):
    names = ["step"] * 7 + ["terminate", "truncate", "drop"]
    return st.lists(st.tuples(st.sampled_from(names), st.integers(0, ROWS - 1)), min_size=1, max_size=max_size)
