"""The command line as a user meets it: exit statuses, messages, tables. Training itself is tested in tests/training."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from difftori import cli, registry
from difftori.errors import NonFiniteError
from difftori.experiments import modules

TINY = [
    "tiny_imitation:Tiny",
    "--env",
    "tiny_imitation:make",
    "--num-train",
    "6",
    "--eval-episodes",
    "3",
    "--epochs",
    "1",
]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "support" / "out_of_tree"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("DIFFTORI_DEBUG", raising=False)


@pytest.fixture
def command(capsys):
    """Run a command; (exit status, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.main(words)
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_light_commands_import_nothing_heavy():
    """Runs in a separate process. Modules that `import difftori` itself imports do not count."""
    program = (
        "import sys, difftori\nbefore = set(sys.modules)\nfrom difftori.cli import main\n"
        "main(['--version']); main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'pydantic', 'yaml', 'rich', 'difftori.il', 'difftori.rl'}\n"
        "print('brings', sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("brings []\n")


def test_the_package_runs_as_the_command():
    words = [sys.executable, "-m", "difftori", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "difftori 0.1.0\n"


def test_version_and_help(command):
    assert command("--version") == (0, "difftori 0.1.0\n", "")
    status, out, _ = command("--help")
    assert status == 0
    assert "train NAME" in out
    assert command()[0] == 2


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["train", "difftori", "--gamma", "0.9"], "--gamma: unknown; perhaps you meant '--discount'"),
        (["train", "difftori", "--learning-rate", "1"], "perhaps you meant '--lr'"),
        (["train", "difftori", "--n-envs", "1"], "perhaps you meant '--num-envs'"),
        (["train", "difftori", "--total-timesteps", "1"], "perhaps you meant '--steps'"),
        (["train", "difftori", "--batch", "1"], "perhaps you meant '--batch-size'"),
        (["train", "difftori", "--planer", "fast"], "perhaps you meant '--planner'"),
        (["train", "bc", "--total-timesteps", "1"], "perhaps you meant '--updates'"),
        (["train", "bc", "--steps", "1"], "perhaps you meant '--updates'"),
        (["train", "bc", "--output_dir", "x"], "perhaps you meant '--out'"),
        (["train", "bc", "--dataset.repo_id", "x"], "--dataset.repo-id: unknown; perhaps you meant '--demos'"),
        (["train", "bc", "--optimizer.lr", "1"], "--optimizer.lr: unknown; perhaps you meant '--lr'"),
        (["train", "bc", "--policy.horizon", "1"], "--policy.horizon: unknown; perhaps you meant '--horizon'"),
        (
            ["train", "bc", "--seed", "0", "1", "2"],
            "--seed: takes one value, but got '0' '1' '2'. Fix: give one, or train",
        ),
        (["train", "bc", "--lr", "0", "1"], "--lr: takes one value, but got '0' '1'. Fix: give one\n"),
        (["train", "bc", "--epochs", "1.5e0"], "--epochs: '1.5e0': Input should be a valid integer"),
        (["study", "table8", "--methods", "bc", "nope"], "--methods: 'nope': Input should be 'expert'"),
        (["sweep", "--job", "2", "x.yaml"], "--job: unknown; perhaps you meant '--jobs'"),
        (["eval", "x", "y"], "RUN: takes one value, but got 'x' 'y'"),
        (["eval"], "RUN: missing"),
        (["collect", "stray"], "belongs to no option"),
        (["trian"], "perhaps you meant 'train'"),
        (["train", "tiny_imitation:Tinny"], "perhaps you meant 'Tiny'"),
        (["train", "bcc"], "perhaps you meant 'bc'"),
        (["train", *TINY, "--sede", "3"], "perhaps you meant '--seed'"),
        (["train", *TINY, "--hiddn", "3"], "perhaps you meant '--hidden'"),
        (["train", *TINY, "--settings.hiddn", "3"], "--hiddn: unknown; perhaps you meant '--hidden'"),
        (["train", *TINY, "--num_trian", "3"], "--num-trian: unknown; perhaps you meant '--num-train'"),
        (["train", *TINY, "--xyzxyz", "3"], "--xyzxyz: unknown; known: --accept-changed-data, --action-key, --base, "),
        (["train", *TINY, "--otu", "x"], "perhaps you meant '--out'"),
        (["eval", "x", "--episods", "3"], "--episodes"),
        (["study", "own_stud"], "not a study"),
        (["study", "own.study"], "no module 'own'"),
        (["bench", "solvr"], "not a bench"),
        (["train"], "none given"),
        (["study"], "a name is missing"),
    ],
)
def test_a_slip_ends_with_status_2_and_a_suggestion(command, words, suggestion):
    status, _, err = command(*words)
    assert status == 2
    assert suggestion in err
    assert "Traceback" not in err


def test_every_fault_of_file_and_command_line_is_listed(command, tmp_path):
    Path("c.yaml").write_text("polic: bc\nsettings: {epochs: many}\n")
    status, _, err = command("train", "bc", "--config", "c.yaml", "--seed", "-3", "--lrr", "4", "--env", "pendulun")
    assert status == 2
    places = {line.removeprefix("error: ").partition(":")[0] for line in err.splitlines()}
    assert places == {"polic", "settings.epochs", "--seed", "--lrr", "--env"}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--resume", "run", "--seed", "1"], "--seed: not allowed with --resume"),
        (["bc", "--resume", "run"], "bc: not allowed with --resume"),
        (["--resume"], "needs a value"),
        (["bc", "--out"], "needs a value"),
        (["bc", "--quiet", "loud"], "--quiet: takes no value, but got 'loud'. Fix: remove it"),
        (["--resume", "absent"], "directory of a run"),
        (["--config", "absent.yaml"], "cannot be read"),
        (["bc", "stray"], "belongs to no option"),
        (["bc", "--seed"], "needs a value"),
    ],
)
def test_misused_options_of_train(command, words, fault):
    status, _, err = command("train", *words)
    assert status == 2
    assert fault in err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "bc", "--demos", "absent", "--env", "probe:two-step"],
        ["train", "difftori", "--env", "gym:Absent-v1"],
        ["train", "difftori", "--env", "gym:Pendulum-v1", "--out", "a/b"],
        ["train", "difftori-il", "--base", "absent"],
        ["train", *TINY, "--device", "cuda:99"],
        ["study", "figure3", "--device", "cuda:99", "--tasks", "cup-catch"],
        ["collect", "--env", "tiny_expert:FAMILY", "--obs", "absent"],
        ["collect", "--env", "tiny_expert:FAMILY", "--episodes", "0"],
        ["report", "absent", "--out", "page"],
        ["sweep", "absent.yaml"],
    ],
)
def test_a_refused_command_leaves_nothing_behind(command, words, tmp_path, monkeypatch):
    if "gym:Pendulum-v1" in words:
        monkeypatch.setattr("difftori.rl.train.env_spec", lambda env: 1 / 0)  # a bug in an environment
        with pytest.raises(ZeroDivisionError):
            command(*words)
    else:
        assert command(*words)[0] in (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_train_then_eval_then_resume(command):
    status, out, err = command("train", *TINY, "--hidden", "4", "4", "--no-flag")
    assert status == 0, err
    assert "best" in out
    assert "validation_error" in out
    run = Path("runs/tiny_imitation.Tiny-tiny_imitation.make-0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["settings"]["hidden"] == [4, 4]
    status, out, err = command("eval", str(run), "--episodes", "5", "--which", "last")
    assert status == 0, err
    assert "error" in out
    for words in (["train", "--resume", str(run)], ["train", *TINY, "--hidden", "4", "4"]):
        assert command(*words)[0] == 0
    status, _, err = command("train", *TINY, "--hidden", "5")
    assert status == 2
    assert "settings.hidden" in err


def test_the_command_line_wins_over_the_file(command):
    Path("c.yaml").write_text("env: tiny_imitation:make\nnum_train: 6\nseed: 4\nsettings: {epochs: 1, lr: 1e-3}\n")
    status, _, err = command("train", TINY[0], "--config", "c.yaml", "--seed", "5", "--out", "run", "--quiet")
    assert status == 0, err
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["seed"], config["num_train"], config["settings"]["lr"]) == (5, 6, 0.001)


def test_eval_of_nothing(command):
    assert command("eval", "absent")[0] == 2
    assert command("eval", "absent", "--episodes", "0")[0] == 2
    assert command("eval", "absent", "--which", "worst")[0] == 2
    assert command("eval")[0] == 2


def test_help_of_a_policy_tells_its_own_options(command):
    status, out, _ = command("train", TINY[0], "--help")
    assert status == 0
    for words in (
        "--hidden [INT …]",
        "Widths of the hidden layers. Default: 8.",
        "--seed INT",
        "--lr",
        "--out",
        "--config",
    ):
        assert words in out
    status, out, _ = command("train", "--help")
    assert status == 0
    assert re.search(r"^  bc  +Behaviour cloning", out, re.M)


@pytest.mark.parametrize(
    "words",
    [
        "collect",
        "data render",
        "eval",
        "publish",
        "sweep",
        "report",
        "train difftori",
        "train dp3",
        "train difftori-il",
    ],
)
def test_help_fits_80_columns_and_tells_each_default_once(command, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command(*words.split(), "--help")
    assert max(map(len, out.splitlines())) <= 80
    for forbidden in (
        "None",
        "NoneType",
        "typing",
        "Undefined",
        "False",
        "True",
        "--settings",
        "--policy ",
        "--agent ",
    ):
        assert forbidden not in re.sub(r"`.*?`", "", out, flags=re.S), forbidden
    entries = re.split(r"\n  (?=--|[A-Z]+…? )", out)[1:]
    assert len(entries) >= 4
    for entry in entries:
        text = " ".join(entry.split())
        assert len(re.findall("(?i)[(.] ?default: ", text)) <= 1, text
        assert len(text.split()) > 3, f"no description: {text}"


def test_help_tells_the_defaults_of_a_preset_and_of_an_environment(command):
    for words, default in (([], 512), (["--preset", "small"], 64)):
        width = re.search(r"--width INT.*?Default: (\d+)", command("train", "difftori", *words, "--help")[1], re.S)
        assert width
        assert int(width[1]) == default


def test_types_are_named_as_they_are_written(command):
    out = command("train", "difftori-il", "--help")[1] + command("train", "mpc", "--help")[1]
    for words in (
        "--num-train INT or none",
        "--weights {best,last,both} or none",
        "--encoder-layers [INT …] or none",
        "--init-spread FLOAT FLOAT FLOAT",
        "--latent-norm, --no-latent-norm",
        "--images.crop FLOAT or none",
    ):
        assert words in out


def test_words_without_an_option_may_follow_one(command, monkeypatch):
    seen = []
    monkeypatch.setattr("difftori.trainers.trainer_of", lambda config: seen.append(config))
    for words in (["--episodes", "3", "here"], ["--video", "here"], ["here", "--which=last"]):
        assert "here" in command("eval", *words)[2]
    assert not seen


class Config(BaseModel):
    """Settings of a study made for the tests."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seeds: int = Field(default=3, ge=1)
    """How many seeds."""


class PlainConfig(BaseModel):
    """Settings of a bench made for the tests."""

    repeats: int = 2
    """How often."""


def module(name: str, monkeypatch, **members) -> None:
    made = ModuleType(name, "What it is for.")
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


def test_studies_and_benches_are_found_and_run(command, monkeypatch):
    monkeypatch.setattr(
        modules, "module_names", lambda package: {"own-study": f"{package}.own_study", "helper": f"{package}.helper"}
    )
    monkeypatch.setattr(registry, "module_names", modules.module_names)
    rows = [{"method": "a", "cost": 1.5}, {"method": "b", "cost": None}]
    module("difftori.experiments.paper.own_study", monkeypatch, Config=Config, run=lambda config: rows * config.seeds)
    module("difftori.experiments.paper.helper", monkeypatch, run=len)
    module("benchmarks.own_study", monkeypatch, Config=PlainConfig, run=lambda config: {"ms": config.repeats})
    status, out, err = command("study", "own_study", "--seeds", "2")
    assert status == 0, err
    assert out.count("1.5") == 2
    status, out, _ = command("bench", "own-study")
    assert status == 0
    assert "ms" in out
    status, out, _ = command("study", "own-study", "--help")
    assert status == 0
    assert "How many seeds" in out
    assert "What it is for" in out
    assert "own-study" in command("study", "--help")[1]
    assert "helper" not in command("study", "--help")[1]
    for words, suggestion in (
        (["study", "own-studdy"], "perhaps you meant 'own-study'"),
        (["study", "helper"], "no pydantic model Config"),
        (["study", "own-study", "--sees", "2"], "--seeds"),
        (["study", "own-study", "--seeds", "0"], "greater than or equal to 1"),
    ):
        status, _, err = command(*words)
        assert status == 2
        assert suggestion in err


def test_a_study_of_ones_own_and_its_failures(command, monkeypatch):
    def run(config):
        raise NonFiniteError("NaN in [bold]the[/bold] encoder")

    module("own.study", monkeypatch, Config=Config, run=run)
    module("own", monkeypatch)
    status, _, err = command("study", "own.study")
    assert status == 1
    assert err == "error: NaN in [bold]the[/bold] encoder\n"
    monkeypatch.setenv("DIFFTORI_DEBUG", "1")
    with pytest.raises(NonFiniteError):
        cli.main(["study", "own.study"])


def test_an_interrupt_ends_with_130(command, monkeypatch):
    def run(config):
        raise KeyboardInterrupt

    module("own.study", monkeypatch, Config=Config, run=run)
    module("own", monkeypatch)
    assert command("study", "own.study")[0] == 130


def test_every_module_of_the_packages_can_be_listed(command):
    for kind in ("study", "bench"):
        status, out, err = command(kind, "--help")
        assert status == 0, err
        assert "names:" in out


def test_benchmarks_are_found_in_a_checkout_only(command, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "site-packages" / "difftori" / "registry.py"))
    for words in ([], ["--help"], ["solver"]):
        status, _, err = command("bench", *words)
        assert status == 2
        assert "source checkout" in err
        assert "Fix:" in err
    module("own.bench", monkeypatch, Config=PlainConfig, run=lambda config: {"ms": config.repeats})
    module("own", monkeypatch)
    assert command("bench", "own.bench")[0] == 0
    (tmp_path / "src" / "difftori").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "benchmarks" / "results")
    assert registry.source_checkout() == tmp_path


def test_the_working_directory_is_searched_last(command):
    Path("own_task.py").write_text("raise RuntimeError('found')")
    with pytest.raises(RuntimeError, match="found"):
        cli.main(["train", "own_task:Policy"])
    assert sys.path[-1] == os.getcwd()
    sys.path.remove(os.getcwd())


def test_collecting_ends_with_a_table_and_a_second_time_at_once(command, tmp_path, monkeypatch):
    pytest.importorskip("zarr", reason="needs zarr: pip install 'difftori[metaworld]'")
    (tmp_path / "cli_lab").mkdir()
    source = Path(__file__).parent / "support" / "out_of_tree" / "tiny_expert.py"
    (tmp_path / "cli_lab" / "arm.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "cli_lab.arm:FAMILY"
    words = ["collect", "--env", name, "--episodes", "2", "--workers", "1", "--out", "here", "--quiet"]
    for played in ("2", "0"):
        status, out, err = command(*words)
        assert (status, err) == (0, "")
        table = {cells[1].strip(): cells[2].strip() for line in out.splitlines() if len(cells := line.split("│")) == 4}
        assert (table["episodes"], table["played_now"]) == ("2", played)
        assert (tmp_path / table["data"]).is_dir()
    status, out, _ = command(*words[:3], name, *words[3:-2], "there", "--quiet")
    assert status == 0
    assert out.count(name) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "metaworld:asembly"], "perhaps you meant 'assembly'"),
        (["--env", "metaworld:assembly", "--episodes", "0"], "episodes is 0; it must be at least 1"),
        (["--env", "metaworld:assembly", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["--env"], "env"),
        ([], "env"),
    ],
)
def test_an_invalid_request_to_collect_ends_with_status_2(command, words, message):
    status, _, err = command("collect", *words, "--quiet")
    assert status == 2
    assert message in err


@pytest.mark.parametrize("words", ["eval {run} --episodes 2", "export {run} --format pt2 --out {out}/file.pt2"])
def test_quiet_commands_write_their_result_only(command, policy_run, tmp_path, words):
    status, out, err = command(*words.format(run=policy_run, out=tmp_path).split(), "--quiet")
    assert (status, err) == (0, "")
    assert "value" in out


def test_the_demo_learns_to_swing_up(command, tmp_path):
    """The expert's cost is 13.2; that of a policy that was hardly trained, 31. Seeds have excess costs of .02 to .25."""
    status, out, err = command("demo", "--out", str(tmp_path / "run"), "--quiet")
    assert (status, err) == (0, "")
    excess = re.findall(r"excess_cost +│ +([\d.]+)", out)
    assert float(excess[-1]) < 0.5, out
    assert (tmp_path / "run" / "report.html").exists()
