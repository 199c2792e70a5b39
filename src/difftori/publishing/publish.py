"""Publishes the policy or agent of a run in a folder or on the Hugging Face Hub, with its evidence."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftori.errors import ConfigError
from difftori.hub import PREFIX, hub_name, library, upload
from difftori.il.weights import Which
from difftori.loading import open_model
from difftori.published import CARD, FILES, Published, weights_bytes, write_published
from difftori.publishing.card import About, render_card
from difftori.publishing.evidence import Evidence, gather
from difftori.publishing.licence import checked_license
from difftori.runs.records import read_config


@dataclass(frozen=True)
class PublishRequest:
    """What to publish: the weights `which` of the run (default: as `difftori eval`), to a folder or `hub:USER/NAME`.

    `name`: title of the card. `license`: of the weights. `dataset`: the Hub's name of the demonstrations. `private`: make a new repository
    private. `unfinished`: publish although the run has not finished or these weights were not evaluated.
    """

    run: Path
    to: str
    which: Which | None = None
    name: str | None = None
    license: str | None = None
    dataset: str | None = None
    dataset_license: str | None = None
    private: bool = False
    unfinished: bool = False


def publish(request: PublishRequest) -> dict[str, Any]:
    """Write the folder, and upload it to the Hub if requested. Returns what was published, for a table.

    Raises ConfigError for invalid requests, and for a run that has not finished or was not evaluated; CheckpointError for missing or
    damaged weights, a folder that cannot be written, or a failed upload; MissingExtraError without the extra `hub`.
    """
    target = hub_name(request.to)
    if target is None and request.private:
        raise ConfigError([f"private: {request.to} is a folder. Fix: remove --private, or give --to hub:USER/NAME"])
    weights_license = checked_license(request.license, "license")
    data_license = checked_license(request.dataset_license, "dataset_license")
    if target is not None:
        library()
    read_config(request.run)  # refuses a folder that is not a run
    model = open_model(request.run, which=request.which)
    evidence = gather(request.run, model.which)
    _require_evidence(request, evidence, model.which)
    title = request.name or _title(evidence.config)
    address = request.to if target is not None else Path(request.to).resolve().name
    about = About(title, address, weights_license, request.dataset, data_license)
    if target is None:
        size = _write(model, evidence, about, Path(request.to))
        return _summary(evidence, title, request.to, size)
    with tempfile.TemporaryDirectory() as scratch:
        size = _write(model, evidence, about, Path(scratch))
        place = upload(Path(scratch), target, FILES, private=request.private)
    return _summary(evidence, title, f"{PREFIX}{target}", size) | {"address": place}


def _require_evidence(request: PublishRequest, evidence: Evidence, which: Which) -> None:
    if request.unfinished:
        return
    run = request.run
    if not evidence.finished:
        raise ConfigError(
            [f"{run}: not finished. Fix: difftori train --resume {run}, or publish it as it is by --unfinished"]
        )
    if not evidence.evaluations:
        chosen = "" if "agent" in evidence.config else f" --which {which}"
        raise ConfigError(
            [
                f"{run}: its {which} weights were not evaluated. Fix: difftori eval {run}{chosen}, or publish them by --unfinished"
            ]
        )


def _write(model: Published, evidence: Evidence, about: About, folder: Path) -> int:
    """Write the folder. Returns the size of the weights' file in bytes."""
    size = len(weights_bytes(model))
    others = {
        CARD: (render_card(model, evidence, about, size).strip() + "\n").encode(),
        "evaluation.json": _json(evidence.evaluations),
        "versions.json": _json(evidence.versions),
        **({"data.json": _json(evidence.data)} if evidence.data else {}),
    }
    write_published(model, folder, others)
    return size


def _title(config: dict[str, Any]) -> str:
    task = Path(str(config.get("demos"))).stem if config["env"] == "none" else config["env"]
    return f"{config.get('agent') or config.get('policy')}-{task}-{config['seed']}".replace(":", ".")


def _summary(evidence: Evidence, title: str, place: str, size: int) -> dict[str, Any]:
    largest = evidence.largest
    episodes = 0 if largest is None else largest["count"]
    return {"name": title, "place": place, "weights_bytes": size, "evaluation_episodes": episodes}


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()
