"""`difftori publish`: a policy or agent acts from its published folder alone, bit by bit as from its run."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tiny_env.reach import ENV, write_demos

import difftori
from difftori.cli import main
from difftori.errors import CheckpointError, ConfigError, MissingExtraError, NonFiniteError
from difftori.experiments.gather import gather as gather_runs
from difftori.il.evaluate import evaluate_run as evaluate_policy_run
from difftori.policies.mpc import PendulumMPC
from difftori.policies.normalized import NormalizedPolicy
from difftori.published import FILES, NEEDED, Published, load_published, write_published
from difftori.publishing.evidence import _command, evaluated, gather, without_paths
from difftori.publishing.licence import checked_license, header_of
from difftori.publishing.publish import PublishRequest, publish
from difftori.rl.evaluate import evaluate_run as evaluate_agent_run
from difftori.rollout import wilson_interval
from difftori.runs.checkpoint import read_weights, write_weights
from difftori.types import TaskSpec
from tests.support.tiny_runs import trained

safetensors = pytest.importorskip("safetensors.torch")

BC = {"hidden": "8", "epochs": "2", "eval-episodes": "3"}
AGENT = {"env": "probe:two-step", "steps": "16", "seed-steps": "9", "eval-episodes": "3", "horizon": "1", "width": "8"}
AGENT |= {"latent-dim": "4", "batch-size": "4", "updates-per-step": "0.1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("alice-home")


@pytest.fixture(scope="module")
def bc(place):
    return trained("bc", place / "bc", env=ENV, demos=write_demos(place / "demos.zarr"), **BC)


@pytest.fixture(scope="module")
def refiner(place, bc):
    return trained("residual", place / "residual", base=str(bc), **BC)


@pytest.fixture(scope="module")
def stochastic(place, bc):
    small = {"dims": "16", "step-width": "8", "blocks": "1", "noise-steps": "4", "inference-steps": "2"}
    common = {"env": ENV, "demos": str(place / "demos.zarr"), "epochs": "2", "eval-episodes": "3"}
    return trained("diffusion", place / "diffusion", **common, **small)


@pytest.fixture(scope="module")
def agent(place):
    return trained("tdmpc", place / "agent", **AGENT)


RUNS = ("bc", "refiner", "stochastic", "agent")


def published(run, to, **options):
    publish(PublishRequest(run, str(to), **options))
    return to


def actions(source, **options):
    """The actions of five steps of two episodes."""
    torch.manual_seed(1)
    policy, rng, found = difftori.load(source, **options), np.random.default_rng(0), []
    for _ in range(2):
        policy.reset()
        for _ in range(5):
            obs = {n: rng.normal(size=(3, *e.shape)).astype(np.float32) for n, e in policy.obs.items()}
            found.append(policy.act(obs))
    return policy.name, np.array(found).tobytes()


@pytest.mark.parametrize("name", RUNS)
def test_it_acts_as_its_run_bit_by_bit_when_the_run_is_gone(name, request, tmp_path):
    run = request.getfixturevalue(name)
    folder, gone = published(run, tmp_path / "out"), tmp_path / "gone"
    wanted = actions(run)
    run.rename(gone)
    try:
        assert actions(str(folder)) == wanted
    finally:
        gone.rename(run)
    assert {path.name for path in folder.iterdir()} <= set(FILES)


def test_state_that_training_leaves_in_a_policy_needs_no_fixed_shape(tmp_path):
    spec = TaskSpec.rows(3, 1, 4, (-2.0,), (2.0,))
    policy = PendulumMPC(PendulumMPC.Config(), spec)
    policy.set_extra_state(torch.full((7, 4, 1), torch.nan))
    write_published(Published(NormalizedPolicy(policy), 0, "last"), tmp_path / "out", {})
    again = load_published(tmp_path / "out").network
    assert isinstance(again, PendulumMPC)
    assert again.get_extra_state().shape == (7, 4, 1)


def test_a_base_is_in_the_folder(refiner, tmp_path):
    folder = published(refiner, tmp_path / "out")
    names = safetensors.load_file(folder / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"model", "base"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["base"]["policy"] == "bc"
    assert "`bc`, which is included" in (folder / "README.md").read_text()


def test_the_card_has_the_numbers_of_the_evaluation(bc, tmp_path):
    evaluate_policy_run(bc, episodes=5)
    folder = published(bc, tmp_path / "out", license="MIT", dataset="alice/reach", name="Reach")
    entry = json.loads((bc / "eval.json").read_text())[-1]
    header, card = (folder / "README.md").read_text().split("---\n")[1:]
    stated = {m["type"]: m["value"] for m in yaml.safe_load(header)["model-index"][0]["results"][0]["metrics"]}
    assert stated == {name: entry["metrics"][name] for name in ("success", "score", "return", "length")}
    low, high = wilson_interval(round(5 * entry["metrics"]["success"]), 5)
    section = card.split("5 episodes of ")[1]
    assert f"| `success` | {entry['metrics']['success']:.6g} | {low:.6g} to {high:.6g} |" in section
    assert f"| `return` | {entry['metrics']['return']:.6g} |" in section
    stored = json.loads((folder / "evaluation.json").read_text())
    assert [each["count"] for each in stored] == [3, 5]
    assert stored[-1]["episodes"] == entry["episodes"]
    assert yaml.safe_load(header) | {"model-index": 0} == {
        "library_name": "difftori",
        "pipeline_tag": "robotics",
        "license": "mit",
        "tags": ["difftori", "imitation-learning", "bc", ENV],
        "datasets": ["alice/reach"],
        "model-index": 0,
    }
    assert "# Reach\n" in card


def test_the_card_of_an_agent_has_its_last_evaluation_with_an_interval(agent, tmp_path):
    found = gather(agent, "last").evaluations
    assert [each["count"] for each in found] == [3]
    metrics = found[0]["metrics"]
    reach = 4.302653 * metrics["return_std"] / 2**0.5  # Student's 97.5 % quantile of 2 degrees
    assert found[0]["intervals"]["return"] == pytest.approx(
        [metrics["return"] - reach, metrics["return"] + reach], rel=1e-5
    )
    evaluate_agent_run(agent, episodes=4)
    assert [each["count"] for each in gather(agent, "last").evaluations] == [3, 4]
    card = (published(agent, tmp_path / "out") / "README.md").read_text()
    assert "pipeline_tag: reinforcement-learning" in card
    assert "No licence was given" in card
    assert "4 episodes of `probe:two-step`" in card


def test_an_evaluation_of_earlier_weights_is_not_evidence(bc, tmp_path):
    run = shutil.copytree(bc, tmp_path / "run")
    evaluate_policy_run(run, episodes=2)
    entries = json.loads((run / "eval.json").read_text())
    entries[-1]["time"] = "2020-01-01T00:00:00+0000"
    (run / "eval.json").write_text(json.dumps(entries))
    assert 2 not in [each["count"] for each in gather(run, "last").evaluations]
    (run / "eval.json").write_text('[{"time": 3}]')
    with pytest.raises(difftori.errors.DataError, match="not a list of evaluations"):
        gather(run, "last")


def test_intervals_are_for_means_of_episodes_only():
    found = evaluated("here", "last", {"action_error": 3.0, "cost": 2.0}, {"action_error": [1, 2], "cost": [1, 3, 2]})
    assert found is not None
    assert list(found["intervals"]) == ["cost"]
    assert evaluated("here", "last", {"action_error": None, "episodes": 0.0}, {}) is None


@pytest.mark.parametrize("name", RUNS)
def test_the_example_of_the_card_runs(name, request, tmp_path, monkeypatch, capsys):
    folder = published(request.getfixturevalue(name), tmp_path / "out")
    example = re.search(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.S)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example[1], names)
    assert np.isfinite(names["action"]).all()
    assert f"shape {names['action'].shape}," in example[1]


@pytest.mark.parametrize("name", RUNS)
def test_no_file_names_a_path_of_this_machine(name, request, tmp_path, place):
    run = request.getfixturevalue(name)
    with (run / "command.txt").open("a") as commands:
        commands.write(
            f"2026-01-01T00:00:00+0000  {place}/bin/difftori train x --demos {place}/d.zarr --out=~/r -c ../y/z\n"
        )
    folder = published(run, tmp_path / "out")
    for file in folder.iterdir():
        content = file.read_bytes().decode(errors="replace")
        assert not re.search(r"alice-home|/tmp/|/usr/|/home/|/root|\.\./|~/|bin/difftori", content), file.name
    assert "$ difftori train x --demos d.zarr --out=r -c z\n" in (folder / "README.md").read_text()


def test_paths_are_shortened_and_names_are_kept():
    kept = [
        "gym:ALE/Pong-v5",
        "my_pkg.my_task:make",
        "hub:a/b",
        "none",
        "x86_64",
        "a=b",
        "AMD EPYC 7R32 @ 2.8 GHz",
        "1e-3",
    ]
    assert without_paths(kept) == kept
    given = [
        "/home/a/d.zarr",
        "runs/bc",
        r"C:\Users\a\d.hdf5",
        "~/d",
        "path=/home/a/d",
        "../..",
        "file:///home/a/x y.zarr",
        {"n": ("/a/b", 3, None)},
    ]
    assert without_paths(given) == ["d.zarr", "bc", "d.hdf5", "d", "path=d", "…", "x y.zarr", {"n": ["b", 3, None]}]
    assert without_paths("read /home/a/d.zarr twice") == "read … twice"


def test_keys_of_data_are_no_paths():
    assert without_paths({"obs_keys": ["state=obs/object"], "demos": "/a/b.zarr"}) == {
        "obs_keys": ["state=obs/object"],
        "demos": "b.zarr",
    }
    line = "/bin/difftori train bc --demos /a/d.hdf5 --obs-keys state=obs/object obs/rgb --out /a/run"
    assert _command(line) == "difftori train bc --demos d.hdf5 --obs-keys state=obs/object obs/rgb --out run"


def test_what_lacks_evidence_is_refused_unless_it_is_said(bc, tmp_path):
    run = shutil.copytree(bc, tmp_path / "run")
    with pytest.raises(ConfigError, match="its best weights were not evaluated. Fix: difftori eval .*--which best"):
        published(run, tmp_path / "out", which="best")
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="not finished. Fix: difftori train --resume"):
        published(run, tmp_path / "out")
    card = (published(run, tmp_path / "out", unfinished=True) / "README.md").read_text()
    assert card.split("\n# ")[1].split("\n")[2].startswith("> **Unfinished.**")
    assert "**Not evaluated.**" in card
    assert "model-index" not in card


def test_requests_that_cannot_be_met_are_refused(bc, agent, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="contains thesis.tex"):
        published(bc, other)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="private: .* is a folder"):
        published(bc, tmp_path / "out", private=True)
    with pytest.raises(ConfigError, match="license: 'apache2.0'.*apache-2.0"):
        published(bc, tmp_path / "out", license="apache2.0")
    with pytest.raises(ConfigError, match="last weights only"):
        published(agent, tmp_path / "out", which="best")
    with pytest.raises(ConfigError, match="hub:USER/NAME"):
        published(bc, "hub:alone")
    folder = published(bc, tmp_path / "out")
    published(agent, folder)  # replaces it, and leaves nothing of the other model
    assert not (folder / "data.json").exists()
    with pytest.raises(ConfigError, match="a published folder, not the directory of a run"):
        published(folder, tmp_path / "again")
    assert main(["eval", str(folder)]) == 2


def test_a_report_skips_published_folders(bc, tmp_path):
    shutil.copytree(bc, tmp_path / "run")
    published(bc, tmp_path / "run" / "out")
    found = gather_runs([tmp_path])
    assert [run.place for run in found.runs] == [tmp_path / "run"]
    assert not found.left_out


def test_licences():
    assert [checked_license(name, "license") for name in ("MIT", "cc-by-4.0", "My own")] == [
        "mit",
        "cc-by-4.0",
        "My own",
    ]
    assert header_of("My own") == {"license": "other", "license_name": "My own"}
    assert header_of(None) == {}


def rewritten(folder, name, content):
    """Replace a file of a published folder, and its sum."""
    from difftori.runs.checkpoint import digest

    (folder / name).write_bytes(content)
    kept = [line for line in (folder / "SHA256SUMS").read_text().splitlines() if not line.endswith(f"  {name}")]
    (folder / "SHA256SUMS").write_text("\n".join([*kept, f"{digest(content)}  {name}"]) + "\n")


@pytest.fixture
def folder(bc, tmp_path):
    return published(bc, tmp_path / "out")


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"not a complete published folder .*{name}"):
        difftori.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_flipped_byte_is_refused(name, folder):
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{name}: damaged or changed"):
        difftori.load(folder)


class Bomb:
    def __reduce__(self):
        return (Path(Bomb.mark).touch, ())

    mark = ""


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_executed(folder, tmp_path):
    Bomb.mark = str(tmp_path / "executed")
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    rewritten(folder, "model.safetensors", (tmp_path / "bomb.pt").read_bytes())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        difftori.load(folder)
    assert not (tmp_path / "executed").exists()


def test_a_configuration_of_a_huge_network_is_refused_before_it_is_built(folder):
    """Of a stranger's folder, whose sums are right."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["settings"]["hidden"] = [200_000, 200_000]
    rewritten(folder, "config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(CheckpointError, match=r"do not fit the configuration: .*200000"):
        difftori.load(folder)


def test_weights_with_nan_replace_nothing(folder, bc, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    run = shutil.copytree(bc, tmp_path / "run")
    policy = difftori.loading.open_model(bc).component
    with torch.no_grad():
        next(policy.policy.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf in model"):
        difftori.save(policy, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    state = read_weights(run / "policy.pt")
    for weights in (state["learner"]["policy"], state["learner"]["best"]):
        next(iter(weights.values())).view(-1)[0] = torch.nan
    write_weights(run / "policy.pt", state)
    with pytest.raises(NonFiniteError):
        published(run, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_weights_that_do_not_fit_are_named(folder):
    weights = safetensors.load_file(folder / "model.safetensors")
    first = next(name for name, value in sorted(weights.items()) if value.ndim == 2)
    for changed, match in (
        ({**weights, first: weights[first][:-1]}, rf"{first.removeprefix('model.')} is float32 \(.*, not float32 \("),
        ({**weights, first: weights[first].double()}, "is float64"),
        ({name: value for name, value in weights.items() if name != first}, "is missing"),
        ({**weights, "model.more": torch.zeros(1)}, "more is unknown"),
        ({**weights, "other": torch.zeros(1)}, "unknown weights other"),
    ):
        rewritten(folder, "model.safetensors", safetensors.save(changed))
        with pytest.raises(CheckpointError, match=match):
            difftori.load(folder)
    rewritten(folder, "model.safetensors", safetensors.save({**weights, first: weights[first] * torch.nan}))
    with pytest.raises(NonFiniteError, match=first.removeprefix("model.")):
        difftori.load(folder)


def test_an_invalid_configuration_is_refused(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for changed, match in (
        ({**config, "format": 99}, "format 99"),
        ({**config, "policy": "bcc"}, "'bcc' is unknown"),
        ({**config, "policy": ["bc"]}, "not the name"),
        ({**config, "settings": {"hidden": "many"}}, "does not describe"),
        ({**config, "spec": {**config["spec"], "obs": 3}}, "does not describe"),
        ({**config, "base": config}, "do not fit"),
        ({name: value for name, value in config.items() if name != "spec"}, "does not describe"),
    ):
        rewritten(folder, "config.yaml", yaml.safe_dump(changed).encode())
        with pytest.raises((ConfigError, CheckpointError), match=match):
            difftori.load(folder)
    rewritten(folder, "config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(ConfigError, match="has the last weights only"):
        difftori.load(folder, which="best")
    with pytest.raises(ConfigError, match="revision"):
        difftori.load(folder, revision="main")


FOREIGN = """
from pathlib import Path
Path({mark!r}).touch()
from difftori.policies.bc import BC

class Mine(BC.__bases__[0]):
    name = "mine"
    Config = BC.Config

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.inner = BC(config, spec)

    def loss(self, batch, *, generator):
        return self.inner.loss(batch, generator=generator)

    def act(self, obs, *, generator):
        return self.inner.act(obs, generator=generator)
"""


def test_a_module_of_the_config_is_imported_only_if_it_is_trusted(place, tmp_path, monkeypatch):
    mark = tmp_path / "imported"
    (tmp_path / "my_policies.py").write_text(FOREIGN.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    demos = write_demos(tmp_path / "demos.zarr")
    run = trained("my_policies:Mine", tmp_path / "run", env=ENV, demos=demos, **BC)
    folder = published(run, tmp_path / "out")
    wanted = actions(run)
    mark.unlink()
    monkeypatch.delitem(sys.modules, "my_policies")
    for trusted in ((), ("other",), "my_policies_too"):
        with pytest.raises(ConfigError, match=r"trust_code=\['my_policies'\]"):
            difftori.load(folder, trust_code=trusted)
    assert not mark.exists()
    assert actions(folder, trust_code=["my_policies"]) == actions(folder, trust_code="my_policies") == wanted
    export = ["export", str(folder), "--format", "pt2", "--out", str(tmp_path / "mine.pt2")]
    assert main(export) == 2
    assert main([*export, "--trust-code", "my_policies"]) == 0
    assert "trust_code=['my_policies']" in (folder / "README.md").read_text()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A local stand-in for the Hub: repositories are folders."""
    hub = pytest.importorskip("huggingface_hub")
    root, public, seen = tmp_path / "hub", set(), []

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            assert exist_ok
            if not (root / name).exists() and not private:
                public.add(name)
            (root / name).mkdir(parents=True, exist_ok=True)

        def model_info(self, name):
            return SimpleNamespace(private=name not in public)

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
            for name in delete_patterns:
                (root / repo_id / name).unlink(missing_ok=True)
            for name in allow_patterns:
                if (Path(folder_path) / name).exists():
                    shutil.copy(Path(folder_path) / name, root / repo_id / name)
            return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(name, *, revision, allow_patterns):
        if not (root / name).exists():
            raise hub.errors.LocalEntryNotFoundError("no such repository")
        seen.append((revision, list(allow_patterns)))
        cache = tmp_path / f"cache-{len(seen)}"
        cache.mkdir()
        for pattern in allow_patterns:
            shutil.copy(root / name / pattern, cache / pattern)
        return str(cache)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(root=root, seen=seen)


def test_to_the_hub_and_back(stand_in, agent, bc, capsys):
    assert main(["publish", str(bc), "--to", "hub:alice/reach"]) == 0
    assert "https://hub/alice/reach/commit/1" in capsys.readouterr().out.replace("\n", "")
    (stand_in.root / "alice/reach/setup.py").write_text("raise SystemExit")
    assert actions("hub:alice/reach", revision="v1") == actions(bc)
    assert stand_in.seen == [("v1", list(NEEDED))]
    assert 'difftori.load("hub:alice/reach")' in (stand_in.root / "alice/reach/README.md").read_text()
    with pytest.raises(ConfigError, match="exists and is public"):
        published(agent, "hub:alice/reach", private=True)
    assert (stand_in.root / "alice/reach/data.json").exists()  # nothing was uploaded
    published(agent, "hub:alice/reach")
    assert not (stand_in.root / "alice/reach/data.json").exists()
    published(agent, "hub:alice/secret", private=True)
    with pytest.raises(CheckpointError, match="hub:alice/nothing: cannot be downloaded.*no such repository"):
        difftori.load("hub:alice/nothing")


def test_without_the_extra_the_error_says_how_to_install_it(bc, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: difftori.load("hub:alice/reach"), lambda: published(bc, "hub:alice/reach")):
        with pytest.raises(MissingExtraError, match=r"pip install 'difftori\[hub\]'"):
            act()
