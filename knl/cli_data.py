"""`knl data`: source images to a packed set, what it holds, whether it is whole; a made set."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from knl.errors import InputError

if TYPE_CHECKING:
    from knl.data.packed_set import Meta

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Pack images into a few large files, look into them, verify them, make some to try.",
)

_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
_DST = typer.Argument(..., metavar="DST", help="Folder of a packed set.")
_SHOWN = 20


@app.command()
def pack(
    source: Path = typer.Argument(
        ...,
        metavar="SRC",
        help="Folder of: class folders (in train/ and val/), Parquet files (as on the Hugging Face "
        "hub), WebDataset tars, or IDX files.",
    ),
    folder: Path = typer.Argument(..., metavar="DST", help="Folder to pack into."),
    short_side: Optional[int] = typer.Option(
        None, min=16, help="Shrink JPEGs to so many pixels on the short side; as they are if not."
    ),
    quality: int = typer.Option(90, min=1, max=100, help="Of JPEGs that have to be encoded."),
    raw: Optional[int] = typer.Option(
        None, min=8, help="Store uint8 pixels, so many a side, cut from the middle; no JPEG."
    ),
    part: str = typer.Option("1/1", metavar="I/N", help="Pack part I of N, 1/N to N/N."),
    finish: bool = typer.Option(False, "--finish", help="All parts are packed: make them a set."),
    processes: Optional[int] = typer.Option(None, min=1, help="One for each CPU if not given."),
    max_rejected: int = typer.Option(
        100, min=0, help="Give up where more images than this cannot be taken."
    ),
    as_json: bool = _JSON,
) -> None:
    """Pack source images into shards of about 1 GB, to be read without a million small files.

    Example: knl data pack imagenet/ packed/ --short-side 256

    Goes on from the whole shards when it was stopped. Over Slurm tasks: each runs its --part, and
    when all are done one runs --finish. What cannot be taken is listed in DST/rejected.jsonl.
    """
    from knl.data.pack.convert import Form
    from knl.data.pack.run import finish_set, pack

    if short_side and raw:
        raise InputError(f"--short-side {short_side} --raw {raw}: give one of the two")
    form = Form(raw is not None, raw or short_side or 0, quality)
    number, of = _part(part)
    result: dict[str, Any] = {"folder": os.fspath(folder)}
    if not finish:
        cpus = len(os.sched_getaffinity(0))
        result |= pack(source, folder, form, (number, of), processes or cpus, max_rejected)
    if finish or of == 1:
        result |= _summary(finish_set(source, folder, form, max_rejected), folder)
    if as_json:
        print(json.dumps(result))
    elif "splits" in result:
        print(_describe(result))
    else:
        print(
            f"part {part}: {result['shards']} shards, {result['packed_now']:,} images packed now, "
            f"{result['rejected_now']} rejected; knl data pack {source} {folder} --finish when all "
            "parts are done"
        )


@app.command()
def info(
    folder: Path = _DST,
    png: Optional[Path] = typer.Option(None, help="Draw a contact sheet into this file."),
    as_json: bool = _JSON,
) -> None:
    """Show what a packed set holds: splits, counts, sizes, classes.

    Example: knl data info packed/ --png sheet.png
    """
    from knl.data.packed_set import read_meta

    meta = read_meta(folder)
    result = _summary(meta, folder)
    if png is not None:
        from knl.data.pack.sheet import draw_sheet

        try:
            draw_sheet(folder, meta, png)
        except OSError as error:
            raise InputError(f"--png {png}: {error.strerror}") from None
        result["contact_sheet"] = os.fspath(png)
    print(json.dumps(result) if as_json else _describe(result))


@app.command()
def verify(folder: Path = _DST, as_json: bool = _JSON) -> None:
    """Read every byte of a packed set: checksums, decoding, labels. Exit 1 names what is damaged.

    Example: knl data verify packed/
    """
    from knl.data.pack.progress import PackProgress
    from knl.data.pack.verify import count_records, verify
    from knl.data.packed_set import read_meta

    meta = read_meta(folder)
    total = count_records(meta.splits)
    progress = PackProgress(total, 0)
    faults = verify(folder, meta, progress.add)
    progress.close()
    if as_json:
        rows = [fault._asdict() for fault in faults]
        print(json.dumps({"folder": os.fspath(folder), "records": total, "faults": rows}))
    elif not faults:
        print(f"{folder}: {total:,} records, all whole")
    else:
        for fault in faults[:_SHOWN]:
            record = "" if fault.record is None else f" record {fault.record}"
            print(f"{folder / fault.shard}{record}: {fault.reason}")
        more = f" ({len(faults) - _SHOWN} more: --json lists all)" if len(faults) > _SHOWN else ""
        print(f"{folder}: {len(faults)} faults{more}; copy or pack these shards again")
    if faults:
        raise typer.Exit(1)


@app.command()
def synth(
    folder: Path = typer.Argument(..., metavar="DST", help="Folder to make, as of class folders."),
    images: int = typer.Option(..., min=1, help="In all; one in ten is to test on."),
    classes: int = typer.Option(10, min=2, help="Kinds of pictures."),
    as_json: bool = _JSON,
) -> None:
    """Make JPEGs that a network can learn to tell apart, to try the path from files to accuracy.

    Example: knl data synth made/ --images 2000 --classes 10
    """
    from knl.data.synth import synthesise

    result = synthesise(folder, images, classes)
    print(
        json.dumps(result)
        if as_json
        else f"{folder}: {result['train']:,} images to train on, {result['val']:,} to test on, "
        f"{classes} classes, {result['bytes'] / 1e6:.1f} MB"
    )


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(found.group(1)), int(found.group(2))) if found else (0, 0)
    if not 1 <= number <= of:
        raise InputError(f"--part {text}: must be I/N with I from 1 to N, such as 3/8")
    return number, of


def _summary(meta: Meta, folder: Path) -> dict[str, Any]:
    """What `info --json` prints; its keys are a contract."""
    form = (
        f"JPEG, short side {meta.side}, quality {meta.quality}" if meta.side else "JPEG as it was"
    )
    return {
        "folder": os.fspath(folder),
        "source": meta.source,
        "records": f"uint8 {meta.side} x {meta.side} x 3" if meta.kind == "raw" else form,
        "classes": meta.classes,
        "rejected": meta.rejected,
        "clumped": meta.clumped,
        "splits": {
            name: {
                "images": split.records,
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
                "smallest_class": min(split.per_class),
                "largest_class": max(split.per_class),
            }
            for name, split in meta.splits.items()
        },
    }


def _describe(result: dict[str, Any]) -> str:
    lines = [f"{result['folder']}: {result['records']}, from {result['source']}"]
    for name, split in result["splits"].items():
        lines.append(
            f"{name:6} {split['images']:>10,} images in {split['shards']} shards, "
            f"{split['bytes'] / 1e9:.2f} GB, {split['smallest_class']:,} to "
            f"{split['largest_class']:,} of each class"
        )
    names = ", ".join(result["classes"][:5])
    more = ", ..." if len(result["classes"]) > 5 else ""
    lines.append(f"{len(result['classes'])} classes: {names}{more}")
    if result["rejected"]:
        lines.append(f"{result['rejected']} images not taken: see rejected.jsonl")
    if "contact_sheet" in result:
        lines.append(f"contact sheet: {result['contact_sheet']}")
    return "\n".join(lines)
