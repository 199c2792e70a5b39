"""The model card of a published policy or agent: `README.md` with the header of the Hugging Face Hub."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

import difftori
from difftori.interfaces import Agent
from difftori.policies.normalized import NormalizedPolicy
from difftori.published import Published, modules_of
from difftori.publishing.evidence import Evidence, result_names, settings_of
from difftori.publishing.licence import header_of
from difftori.terminal import first_sentence


@dataclass(frozen=True)
class About:
    """What the publisher says: `title`; `address` for `difftori.load`; licences; `dataset`, the Hub's name of the demonstrations."""

    title: str
    address: str
    license: str | None = None
    dataset: str | None = None
    dataset_license: str | None = None

    @property
    def from_hub(self) -> bool:
        """Whether it is published on the Hub."""
        return self.address.startswith("hub:")


def render_card(model: Published, evidence: Evidence, about: About, size: int) -> str:
    """Return the card. `size`: that of the weights' file in bytes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("difftori.publishing", "."), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    component = model.component
    base = component.base if isinstance(component, NormalizedPolicy) else None
    network, config = model.network, evidence.config
    return environment.get_template("card.md.j2").render(
        header=_header(model, evidence, about),
        title=about.title,
        kind="agent" if isinstance(component, Agent) else "policy",
        name=model.name,
        env=config["env"],
        about=first_sentence(sys.modules[type(network).__module__].__doc__),
        base=f"`{base.policy.name}`" if isinstance(base, NormalizedPolicy) else "",
        parameters=f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " "),
        size=_bytes(size),
        version=difftori.__version__,
        finished=evidence.finished,
        example=example(model, about.address),
        foreign=[f"`{module}`" for module in sorted(modules_of(component))],
        from_hub=about.from_hub,
        obs=_observations(model),
        obs_note=_obs_note(model),
        actions=_actions(model),
        results=[_shown(evaluation, config) for evaluation in evidence.evaluations],
        commands=evidence.commands,
        training=_training(evidence),
        settings={name: _cell(value) for name, value in settings_of(config).items()},
        data=evidence.data.get("fingerprint", {}),
        data_note=_data_note(evidence, about),
        licence="No licence was given, so no permission to use it is granted."
        if about.license is None
        else f"{about.license}, as its publisher states.",
        limits=_limits(evidence),
    )


def example(model: Published, address: str) -> str:
    """Return a program that acts on one made-up observation."""
    entries = model.component.spec.obs
    shown = ", ".join(f'"{name}": np.zeros({entry.shape}, "{entry.dtype}")' for name, entry in entries.items())
    trusted = sorted(modules_of(model.component))
    trust = f", trust_code={trusted!r}" if trusted else ""
    lines = [
        "import difftori",
        "import numpy as np",
        "",
        f'policy = difftori.load("{address}"{trust})',
        "policy.reset()  # at the beginning of each episode",
        f"obs = {{{shown}}}  # what your environment returns",
        f"action = policy.act(obs)  # at every step; shape ({model.component.spec.action_dim},), in the units of the environment",
    ]
    return "\n".join(lines)


def _observations(model: Published) -> list[list[str]]:
    rows = []
    for name, entry in model.component.spec.obs.items():
        moments = entry.moments
        span = "" if moments is None else f"{min(moments.low):.4g} to {max(moments.high):.4g}"
        rows.append([f"`{name}`", str(entry.shape), entry.dtype, span])
    return rows


def _obs_note(model: Published) -> str:
    component = model.component
    if isinstance(component, NormalizedPolicy):
        spec = component.spec
        return (
            f"The policy sees the last {spec.n_obs_steps} observation{'s' * (spec.n_obs_steps > 1)}, predicts {spec.horizon} actions and "
            f"executes {spec.n_action_steps} of them; `act` does that inside."
        )
    spec = component.spec
    flattened = spec.flattened
    joined = "" if flattened is None else f" `state` is {' and '.join(f'{n} {s}' for n, s in flattened)}, concatenated."
    return f"One action is executed for {spec.action_repeat} step{'s' * (spec.action_repeat > 1)} of the environment.{joined}"


def _actions(model: Published) -> list[list[str]]:
    spec = model.component.spec
    bounds = zip(spec.low, spec.high, strict=True)
    return [[str(number), f"{low:.6g}", f"{high:.6g}"] for number, (low, high) in enumerate(bounds)]


def _shown(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    count = evaluation["count"]
    episodes = f"{count} episode{'s' * (count > 1)}"
    env = _env_of(evaluation, config)
    on = "held-out demonstrations, action by action" if env == "none" else f"`{env}`"
    seeds = [int(seed) for seed in evaluation["episodes"].get("seed", ())]
    counted = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    seeded = f" (seeds {seeds[0]} to {seeds[-1]})" if counted else ""
    which = "" if "agent" in config else f" with the {evaluation['weights']} weights"
    device = f", on {evaluation['device']}" if evaluation.get("device") else ""
    rows = [
        [f"`{name}`", f"{evaluation['metrics'][name]:.6g}", _span(evaluation["intervals"].get(name))]
        for name in result_names(evaluation)
    ]
    source = evaluation["source"]
    how = f"by `{evaluation.get('command') or source}`" if source == "difftori eval" else source
    return {"protocol": f"{episodes} of {on}{seeded}{which}, {how}{device}.", "rows": rows}


def _env_of(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the environment of an evaluation, which may be another one than the run's."""
    return str(evaluation.get("changes", {}).get("env", config["env"]))


def _span(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.6g} to {ends[1]:.6g}"


def _training(evidence: Evidence) -> list[list[str]]:
    config, summary, versions = evidence.config, evidence.summary, evidence.versions
    lengths = {"env_steps": "environment steps", "episodes": "episodes", "epochs": "epochs", "updates": "updates"}
    rows = [[label, f"{summary[name]:.0f}"] for name, label in lengths.items() if name in summary]
    if "seconds" in summary:
        label = "wall-clock time" if "agent" in config else "wall-clock time of the updates"
        rows.append([label, f"{summary['seconds']:.4g} s"])
    rows.append(["seed", str(config["seed"])])
    if config.get("data_seed") is not None:
        rows.append(["seed of the data", str(config["data_seed"])])
    processor = versions.get("device_name") or versions.get("cpu")
    rows.append(
        ["hardware", f"{processor or 'unknown'}, device {config.get('device')}, {config.get('threads')} CPU threads"]
    )
    names = ("difftori", "git_commit", "python", "torch", "numpy", "gymnasium", "mujoco")
    rows.append(["versions", ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))])
    return [[first, _cell(second)] for first, second in rows]


def _data_note(evidence: Evidence, about: About) -> str:
    config = evidence.config
    if "agent" in config:
        return "It learned from its own episodes; there are no demonstrations."
    source = about.dataset or config.get("demos")
    if source is None:
        return "The demonstrations were generated by the task's expert, from the seed of the data."
    licence = f"licence {about.dataset_license}" if about.dataset_license else "their licence was not given"
    known = "" if evidence.data else " Their fingerprint was not recorded."
    return f"Demonstrations: `{source}`; {licence}. The fingerprint (`data.json`) tells whether other data are the same.{known}"


def _limits(evidence: Evidence) -> list[str]:
    config = evidence.config
    envs = list(dict.fromkeys(_env_of(evaluation, config) for evaluation in evidence.evaluations)) or [config["env"]]
    limits = ["One training run with one seed: the intervals do not contain the spread over seeds."]
    if envs == ["none"]:
        limits.append("It was compared with recorded actions only, never executed in closed loop.")
    else:
        limits.append(
            f"Its results hold for {', '.join(f'`{name}`' for name in envs)}, with the observations and options above. Nothing is "
            "known about other tasks."
        )
    if "agent" in config:
        limits.append("It may have learned to use properties of the simulation that a real system does not have.")
    else:
        limits.append("It imitates its demonstrations, and is unreliable in states that they do not contain.")
    limits.append("No part of it was tested on a real robot, and nothing bounds its actions except the bounds above.")
    return limits


def _header(model: Published, evidence: Evidence, about: About) -> str:
    agent = isinstance(model.component, Agent)
    env = str(evidence.config["env"])
    learning = "reinforcement-learning" if agent else "imitation-learning"
    values: dict[str, Any] = {
        "library_name": "difftori",
        "pipeline_tag": "reinforcement-learning" if agent else "robotics",
        **header_of(about.license),
        "tags": list(
            dict.fromkeys(["difftori", learning, model.name.rpartition(":")[2], *([] if env == "none" else [env])])
        ),
    }
    if about.dataset is not None:
        values["datasets"] = [about.dataset]
    if (largest := evidence.largest) is not None:
        values["model-index"] = [
            {
                "name": about.title,
                "results": [_indexed(largest, _env_of(largest, evidence.config), values["pipeline_tag"])],
            }
        ]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _indexed(evaluation: Mapping[str, Any], env: str, task: str) -> dict[str, Any]:
    """Return an evaluation in the form of the Hub's results."""
    metrics = []
    for name in result_names(evaluation):
        span = _span(evaluation["intervals"].get(name))
        label = f"{name}, {evaluation['count']} episodes" + (f", 95 % interval {span}" if span else "")
        metrics.append({"type": name, "value": evaluation["metrics"][name], "name": label})
    return {"task": {"type": task}, "dataset": {"type": env, "name": env}, "metrics": metrics}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
