"""Noise and samplers, compared with Hugging Face diffusers; make_golden_diffusion.py shows how to regenerate the numbers."""

import json
from pathlib import Path

import pytest
import torch

from difftori.errors import ConfigError
from difftori.models.diffusion import DDIM, DDPM, NoiseSchedule, denoise, squared_cosine
from tests.support.diffusion import SHAPE, STEPS, noise, predicted

GOLDEN = json.loads((Path(__file__).parent / "golden_diffusion.json").read_text())


def formula(x, step):
    return predicted(x, int(step[0]))


def golden(name) -> torch.Tensor:
    return torch.tensor(GOLDEN[name])


def test_the_schedule_is_the_one_of_diffusers():
    signal = squared_cosine(STEPS)
    assert torch.allclose(signal.float(), golden("signal"), rtol=1e-4, atol=1e-8)
    assert (signal[1:] < signal[:-1]).all()
    assert squared_cosine(3).shape == (3,)


def test_noise_is_added_alike():
    schedule = NoiseSchedule(STEPS)
    for step, expected in zip(GOLDEN["noised_at"], GOLDEN["noised"], strict=True):
        found = schedule.noised(0.5 * predicted(noise(step), step), noise(step), torch.full((2,), step))
        assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_every_step_of_ddpm_is_that_of_diffusers(prediction):
    schedule, sampler, x, found = NoiseSchedule(STEPS, prediction), DDPM(), noise(-1), []
    for step, before in sampler.pairs(STEPS):
        clean, estimated = schedule.estimate(x, predicted(x, step), step)
        x = sampler.back(x, clean, estimated, noise(step), schedule.at(step), schedule.at(before))
        found.append(x)
    assert torch.allclose(torch.stack(found[::9]), golden(f"ddpm {prediction} {STEPS}"), atol=2e-5)
    assert torch.equal(found[-1], clean)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("count", [10, 16, 100])
def test_ddim_arrives_where_that_of_diffusers_does(prediction, count):
    schedule = NoiseSchedule(STEPS, prediction)
    found = denoise(formula, schedule, DDIM(count), noise(-1), generator=torch.Generator())
    assert torch.allclose(found, golden(f"ddim {prediction} {count}"), atol=2e-5)


def test_ddpm_draws_fresh_noise_from_the_generator_but_none_at_the_end():
    schedule, generator = NoiseSchedule(5), torch.Generator().manual_seed(3)
    found = denoise(formula, schedule, DDPM(), noise(-1), generator=generator)
    again, x = torch.Generator().manual_seed(3), noise(-1)
    for step in (4, 3, 2, 1, 0):
        clean, estimated = schedule.estimate(x, predicted(x, step), step)
        fresh = torch.randn(SHAPE, generator=again) if step else torch.full(SHAPE, 1e6)
        x = DDPM().back(x, clean, estimated, fresh, schedule.at(step), schedule.at(step - 1))
    assert torch.equal(found, x)
    assert torch.equal(generator.get_state(), again.get_state())


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(10)], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_network_that_knows_the_answer_is_led_to_it(sampler, prediction):
    """With one plan possible, ε̂ = (x_k − √ᾱ_k a) / √(1 − ᾱ_k) is the best guess everywhere."""
    answer = torch.linspace(-0.9, 0.9, 24).reshape(SHAPE)
    schedule = NoiseSchedule(STEPS, prediction)

    def oracle(x, step):
        signal = schedule.at(int(step[0]))
        return answer if prediction == "sample" else (x - signal.sqrt() * answer) / (1 - signal).sqrt()

    found = denoise(oracle, schedule, sampler, noise(-1), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found, answer, atol=1e-4)


def test_the_target_is_what_is_said():
    clean, added = torch.zeros(SHAPE), torch.ones(SHAPE)
    assert torch.equal(NoiseSchedule(4, "epsilon").target(clean, added), added)
    assert torch.equal(NoiseSchedule(4, "sample").target(clean, added), clean)


def test_nothing_is_saved_of_a_schedule():
    assert not NoiseSchedule(4).state_dict()


@pytest.mark.parametrize("count", [0, 40, 60, 101])
def test_steps_that_begin_far_from_pure_noise_are_refused(count):
    with pytest.raises(ConfigError, match=r"inference_steps: \d+ steps do not cover the 100"):
        DDIM(count).pairs(100)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(10)], ids=["ddpm", "ddim"])
def test_a_guide_that_changes_nothing_changes_nothing(sampler):
    """And it is told once that the step is the last."""
    schedule, last = NoiseSchedule(STEPS), []

    def sampled(guide):
        return denoise(formula, schedule, sampler, noise(-1), generator=torch.Generator().manual_seed(0), guide=guide)

    def same(actions, ends):
        last.append(ends)
        return actions.clone()

    assert torch.equal(sampled(same), sampled(None))
    assert last == [False] * (len(last) - 1) + [True]
    assert sampled(lambda actions, ends: actions.clamp(max=0.1)).max() <= 0.1 < sampled(None).max()
