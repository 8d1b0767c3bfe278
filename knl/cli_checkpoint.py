"""`knl checkpoint`: what one holds, whether it is whole, its weights for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from knl.errors import FailedError, InputError, KnlError

if TYPE_CHECKING:
    from knl.train.checkpoint import Checkpoint

app = typer.Typer(
    name="checkpoint",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look into checkpoints, check them, export their weights.",
)

_PLACE = typer.Argument(..., help="A checkpoint, or a run directory for its newest whole one.")
_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")


@app.command()
def info(place: Path = _PLACE, as_json: bool = _JSON) -> None:
    """Tell what a checkpoint holds: step, accuracy, recipe, sizes.

    Example: knl checkpoint info runs/resnet50
    """
    import msgspec

    path, found = _open(place)
    state = found.state
    facts = {
        "path": str(path),
        **{key: value for key, value in msgspec.to_builtins(state).items() if key != "order"},
        "tensors": len(found.tensors),
        "parameters": sum(a.size for name, a in found.weights.items() if _is_weight(name, found)),
        "bytes": path.stat().st_size,
    }
    if as_json:
        print(json.dumps(facts))
        return
    for key in ("path", "step", "epoch", "ranks", "written", "weights_crc32", "parameters",
                "bytes", "skipped"):  # fmt: skip
        print(f"{key:14} {facts[key]}")
    for key, mark in (("evaluation", state.evaluation), ("best", state.best)):
        if mark is not None:
            print(f"{key:14} top-1 {mark.top1:.2%}, top-5 {mark.top5:.2%}, step {mark.step}")
    versions = ", ".join(f"{name} {version}" for name, version in state.versions.items())
    print(f"{'versions':14} {versions}")
    print(f"{'recipe':14} {state.recipe['name']}: {json.dumps(state.recipe['train'])}")


@app.command()
def verify(place: Path = _PLACE, as_json: bool = _JSON) -> None:
    """Check every byte of a checkpoint, or of all in a run directory; exit status 1 for damage.

    Example: knl checkpoint verify runs/resnet50
    """
    paths = _all_in(place) if place.is_dir() else [_existing(place)]
    problems = {str(path): _problem(path) for path in paths}
    if as_json:
        print(json.dumps({"whole": not any(problems.values()), "problems": problems}))
    else:
        for path, problem in problems.items():
            print(problem or f"checkpoint {path} is whole")
    if any(problems.values()):
        raise typer.Exit(FailedError.exit_code)


@app.command()
def export(
    place: Path = _PLACE,
    out: Path = typer.Option(..., "--out", help="File to write; it must not be there yet."),
    as_json: bool = _JSON,
) -> None:
    """Write the weights as a plain state_dict, which torch.load reads with weights_only=True.

    Example: knl checkpoint export runs/resnet50 --out resnet50.pt
    """
    path, found = _open(place)
    import numpy as np
    import torch

    weights = {name: torch.from_numpy(np.array(a)) for name, a in found.weights.items()}
    try:
        with out.open("xb") as file:
            torch.save(weights, file)
    except FileExistsError:
        raise InputError(f"--out {out} is there already: name a new file") from None
    except (OSError, RuntimeError) as error:
        out.unlink(missing_ok=True)
        raise FailedError(f"--out {out} cannot be written: {error}") from None
    facts = {"path": str(path), "out": str(out), "step": found.state.step, "tensors": len(weights)}
    print(
        json.dumps(facts)
        if as_json
        else f"{out}: {len(weights)} tensors of the network after step {found.state.step}"
    )


def _open(place: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint that is meant. Raises KnlError naming what is wrong with it."""
    from knl.train.checkpoint import read

    if not place.is_dir():
        return place, read(_existing(place))
    problems = []
    for path in _all_in(place):
        try:
            return path, read(path)
        except KnlError as error:
            problems.append(str(error))
    raise FailedError(f"{place} has no whole checkpoint: {'; '.join(problems)}")


def _all_in(place: Path) -> list[Path]:
    """Of a run directory or of its folder of checkpoints, the newest first."""
    from knl.train.checkpoint import listed

    found = listed(place / "checkpoints") or listed(place)
    if not found:
        raise InputError(f"{place} has no checkpoint: name one, or the directory of a run")
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"checkpoint {path} is not there: name one, or the directory of a run")
    return path


def _problem(path: Path) -> str:
    from knl.train.checkpoint import read

    try:
        read(path)
    except KnlError as error:
        return str(error)
    return ""


def _is_weight(name: str, found: Checkpoint) -> bool:
    """The optimiser keeps a momentum of each weight, and of nothing else."""
    from knl.train.checkpoint import MOMENTUM

    tensors: Any = found.tensors
    return MOMENTUM + name in tensors
