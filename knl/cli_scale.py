"""`knl scale`: the scaling study, measured and predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import typer

from knl import cli_study
from knl.errors import InputError

app = typer.Typer(
    name="scale",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure and predict what more nodes bring to the training of a recipe.",
)
app.command()(cli_study.run)
app.command()(cli_study.submit)

_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
_NODES = "1,2,4,8,16,32,64,128,256,512,1024,2048"
_MOST_NODES = 100_000


@app.command()
def predict(
    recipe: str = typer.Argument(help="Name of a recipe, or path of a TOML file."),
    source: Optional[Path] = typer.Option(
        None,
        "--from",
        metavar="STUDY_OR_PROFILE",
        help="Folder of a study, to which the network is fitted, or a profile of knl tune.",
    ),
    images_per_s: Optional[float] = typer.Option(
        None, "--node-images-per-s", help="Training images/s of one node, instead of --from."
    ),
    site: Optional[str] = typer.Option(
        None, help="Name of a site, or path of its TOML file; the study's if not given."
    ),
    nodes: str = typer.Option(_NODES, help="Numbers of nodes."),
    strong: bool = typer.Option(
        False, "--strong", help="Keep the recipe's global batch; else each node has one lane's."
    ),
    ranks_per_node: Optional[int] = typer.Option(
        None, min=1, help="Ranks that share a node's images; the study's or the site's."
    ),
    extrap: Optional[Path] = typer.Option(
        None, metavar="FILE", help="Write the study as JSON for Extra-P, too."
    ),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
    ),
    as_json: bool = _JSON,
) -> None:
    """Predict steps, hours, node-hours, SUs, energy and cost of a recipe on many nodes.

    Example: knl scale predict resnet50-32k --site stampede2 --node-images-per-s 79

    Every number rests on the assumptions that are printed with it; scaling.md says how far the
    published results are from this model.
    """
    from knl.config import load_recipe
    from knl.scaling.extrap import write_extrap
    from knl.scaling.predict import describe, prepare, to_json

    counts = cli_study.numbers(nodes, "--nodes")
    if counts[-1] > _MOST_NODES:
        raise InputError(f"--nodes {nodes}: must be {_MOST_NODES} at most")
    found = load_recipe(recipe, overrides)
    made = prepare(found, source, images_per_s, site, ranks_per_node, "strong" if strong else None)
    if extrap is not None:
        if made.study is None:
            raise InputError(f"--extrap {extrap}: needs --from with a study's folder")
        write_extrap(made.study, extrap)
    result = to_json(made, counts)
    print(json.dumps(result) if as_json else describe(result))


@app.command()
def backtest(
    smpi: bool = typer.Option(
        False, "--smpi", help="Hold the allreduce against SimGrid's, too (a minute; needs smpicc)."
    ),
    as_json: bool = _JSON,
) -> None:
    """Hold the model against published trainings, and its allreduce against a simulated one.

    Example: knl scale backtest --smpi
    """
    from knl.scaling.backtest import ASSUMPTIONS, claims, describe, published_rows, smpi_rows

    result = {"published": published_rows(), "efficiency": claims(), "assumptions": ASSUMPTIONS}
    if smpi:
        result["smpi"] = smpi_rows()
    print(json.dumps(result) if as_json else describe(result))


@app.command()
def cost(
    recipe: str = typer.Argument("resnet50-32k", help="Name of a recipe, or path of a TOML file."),
    source: Optional[Path] = typer.Option(
        None, "--from", metavar="STUDY_OR_PROFILE", help="As of knl scale predict."
    ),
    images_per_s: Optional[float] = typer.Option(
        None, "--node-images-per-s", help="Training images/s of one node, instead of --from."
    ),
    site: Optional[str] = typer.Option(None, help="Name of a site, or path of its TOML file."),
    nodes: str = typer.Option("512", help="Numbers of nodes of the prediction."),
    price: list[str] = typer.Option(
        [], metavar="NAME=USD", help="Price of a node, as in 'KNL 7250=2436'; repeatable."
    ),
    machine_flops: float = typer.Option(
        2e17, min=1.0, help="Operations/s of the machine whose shortest time is asked for."
    ),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
    ),
    as_json: bool = _JSON,
) -> None:
    """Set published trainings beside a prediction of one's own: time, hardware, accuracy.

    Example: knl scale cost resnet50-32k --site stampede2 --node-images-per-s 79 --nodes 512
    """
    from knl.config import load_recipe
    from knl.scaling import cost as costs
    from knl.scaling.predict import prepare, to_json

    counts = cli_study.numbers(nodes, "--nodes")
    found = load_recipe(recipe, overrides)
    systems = costs.published_systems(costs.prices_with(price))
    assumptions: dict[str, str] = {}
    if source is not None or images_per_s is not None:
        made = prepare(found, source, images_per_s, site, None, None)
        predicted = to_json(made, counts)
        systems += [costs.predicted_system(row, made.known) for row in predicted["rows"]]
        assumptions = predicted["assumptions"]
    result = {
        "systems": systems,
        "budget": costs.budget(found, machine_flops),
        "assumptions": assumptions,
    }
    print(json.dumps(result) if as_json else costs.describe(result))
