"""Whole shards to a finished set: indices, counts, the rejected, a contact sheet, meta.json."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knl.data.pack.plan import Plan, read_plan
from knl.data.pack.shards import PARTS, Note, index_path, read_note
from knl.data.pack.sheet import draw_sheet
from knl.data.packed_set import INDEX, META, REJECTED, SCHEMA, SHEET, Meta, Split
from knl.errors import FailedError, say
from knl.files import replace_file

# From so many times chance on, the order of a set is worth a word.
_CLUMPED = 3.0


def finish(folder: Path, max_rejected: int) -> Meta:
    """Write what makes a folder of shards a set; meta.json last. Raises FailedError where a shard
    is missing or too many pictures were rejected."""
    plan = read_plan(folder)
    notes = _notes(folder, plan)
    rejected = [entry for note in notes.values() for entry in note.rejected]
    if len(rejected) > max_rejected:
        first = "{key}: {reason}".format(**rejected[0])
        raise FailedError(
            f"{len(rejected)} pictures cannot be taken, more than --max-rejected {max_rejected}; "
            f"the first: {first}; all are in {_write_rejected(folder, rejected)}; run again with a "
            "higher limit to leave them out"
        )
    splits, clumped = {}, []
    for name in sorted({shard.split for shard in plan.shards}):
        mine = [notes[shard.name] for shard in plan.shards if shard.split == name]
        index = _write_index(folder, name, plan)
        splits[name] = _split(folder, name, mine, index)
        clumped.append(_clumped(index["label"]))
    _write_rejected(folder, rejected)
    form = plan.form
    meta = Meta(
        schema=SCHEMA,
        kind="raw" if form.raw else "jpeg",
        side=form.side,
        quality=form.quality,
        source=plan.source,
        classes=plan.classes,
        splits=splits,
        rejected=len(rejected),
        clumped=max(clumped),
    )
    if meta.clumped > _CLUMPED:
        say(
            f"{folder}: neighbouring records are of one class {meta.clumped:.0f} times as often as "
            "by chance, as the source has them in that order: set data.chunk = 1, or shuffle the "
            "source and pack it again"
        )
    draw_sheet(folder, meta, folder / SHEET)
    for left in folder.glob(f".*.{'[0-9a-f]' * 32}"):  # by one that was killed here
        left.unlink(missing_ok=True)
    meta = msgspec.structs.replace(meta, crc32=meta.checksum())
    with replace_file(folder / META) as file:
        file.write(msgspec.json.format(msgspec.json.encode(meta), indent=1) + b"\n")
    shutil.rmtree(folder / PARTS)
    return meta


def _notes(folder: Path, plan: Plan) -> dict[str, Note]:
    notes = {shard.name: read_note(folder, shard.name) for shard in plan.shards}
    missing = [name for name, note in notes.items() if note is None]
    if missing:
        raise FailedError(
            f"{folder}: {len(missing)} of {len(notes)} shards are not packed yet, {missing[0]} is "
            "the first: run the same knl data pack again (each --part i/n of it), then --finish"
        )
    return {name: note for name, note in notes.items() if note is not None}


def _write_index(folder: Path, split: str, plan: Plan) -> NDArray[Any]:
    parts = []
    names = [shard.name for shard in plan.shards if shard.split == split]
    for number, name in enumerate(names):
        rows = np.load(index_path(folder, name), allow_pickle=False)
        rows["shard"] = number
        parts.append(rows)
    index = np.concatenate([np.empty(0, INDEX), *parts])
    with replace_file(folder / _index_name(split)) as file:
        np.save(file, index)
    return index


def _split(folder: Path, name: str, notes: list[Note], index: NDArray[Any]) -> Split:
    return Split(
        records=len(index),
        index=_index_name(name),
        index_crc32=zlib.crc32((folder / _index_name(name)).read_bytes()),
        per_class=np.sum([note.per_class for note in notes], axis=0).tolist(),
        shards=[note.shard for note in notes],
    )


def _write_rejected(folder: Path, rejected: list[dict[str, str]]) -> Path:
    text = io.StringIO()
    for entry in rejected:
        text.write(json.dumps(entry) + "\n")
    with replace_file(folder / REJECTED) as file:
        file.write(text.getvalue().encode())
    return folder / REJECTED


def _clumped(labels: NDArray[Any]) -> float:
    """How often neighbours are of one class, over how often chance would have it."""
    if len(labels) < 2:
        return 1.0
    shares = np.bincount(labels) / len(labels)
    return float(np.mean(labels[1:] == labels[:-1]) / np.sum(shares**2))


def _index_name(split: str) -> str:
    return f"{split}.index.npy"
