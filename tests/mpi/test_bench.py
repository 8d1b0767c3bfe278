"""The benches of communication with real ranks, tiny: keys, and ratios that are quotients."""

from __future__ import annotations

import json

import pytest

from .launch import knl, run
from .runs import SMALL_RECIPE


def bench(*arguments: str):
    done = run(knl("bench", *arguments, "--json"), timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_allreduce_has_every_rival_and_quotients_for_ratios():
    result = bench("allreduce", "-n", "2", "--rounds", "2", "--bytes", "4096", "--bytes", "65536")
    rows = {(row["bytes"], row["rival"]): row for row in result["rows"]}
    rivals = ("shared", "oneccl", "oneccl-bare", "mpi", "gloo", "imb", "copy")
    assert set(rows) >= {(size, rival) for size in (4096, 65536) for rival in rivals}
    for (size, _), row in rows.items():
        assert row["median_s"] > 0
        assert row["algorithm_gbs"] == pytest.approx(size / row["median_s"] / 1e9)
        for other in ("imb", "gloo", "copy"):
            quotient = row["median_s"] / rows[size, other]["median_s"]
            assert row[f"ratio_to_{other}"] == pytest.approx(quotient)
    ours, bare = rows[65536, "oneccl"]["median_s"], rows[65536, "oneccl-bare"]["median_s"]
    assert result["overhead_over_bare"] == pytest.approx(ours / bare - 1)
    assert (result["ranks"], result["copy_gbs"] > 0) == (2, True)
    assert result["imb"].endswith("IMB-MPI1")


def test_sync_compares_the_same_gradients_and_tells_the_overlap(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    result = bench("sync", "-n", "2", "--recipe", str(recipe), "--images", "4", "--rounds", "1")
    rows = {row["rival"]: row for row in result["rows"]}
    assert set(rows) >= {"knl", "knl-oneccl", "ddp-gloo"}
    quotient = rows["knl"]["median_s"] / rows["ddp-gloo"]["median_s"]
    assert rows["knl"]["ratio_to_ddp"] == pytest.approx(quotient)
    overlap = result["overlap"]
    both = (overlap["compute_s"], overlap["comm_s"])
    assert overlap["ratio_to_max"] == pytest.approx(overlap["step_s"] / max(both))
    assert overlap["ratio_to_sum"] == pytest.approx(overlap["step_s"] / sum(both))


def test_overhead_draws_a_line_for_each_number_of_ranks():
    counts = ("--tensors", "10", "--tensors", "50", "--tensors", "100")
    result = bench("overhead", "-n", "1", "-n", "2", "--rounds", "2", *counts)
    assert [(row["ranks"], row["tensors"]) for row in result["rows"]] == [
        (ranks, tensors) for ranks in (1, 2) for tensors in (10, 50, 100)
    ]
    for fit in result["fits"]:
        rows = [row for row in result["rows"] if row["ranks"] == fit["ranks"]]
        rest = [r["seconds"] - fit["per_tensor_s"] * r["tensors"] for r in rows]
        assert sum(rest) / len(rest) == pytest.approx(fit["intercept_s"], abs=1e-12)
        assert fit["r2"] <= 1


def test_data_measures_records_beside_their_peers_and_a_step_that_reads_them(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    result = bench("data", "--recipe", str(recipe), "--steps", "1", "--rounds", "1")
    speed = {n[: -len("_images_per_s")]: v for n, v in result.items() if n.endswith("_per_s")}
    assert set(speed) >= {"jpeg_rrc", "jpeg_crop", "raw_crop", "pil_rrc", "decode", "memcpy"}
    for ratio, over, under in (
        ("jpeg_rrc_over_decode", "decode", "jpeg_rrc"),
        ("jpeg_crop_over_decode", "decode_256", "jpeg_crop"),
        ("jpeg_rrc_speedup_vs_pil", "jpeg_rrc", "pil_rrc"),
        ("raw_crop_speedup_vs_pil", "raw_crop", "pil_crop"),
    ):
        assert result[ratio] == pytest.approx(speed[over] / speed[under])
    assert result["step_model"] == "resnet-small" and 0 <= result["t_data_s"] < result["step_s"]
    assert result["t_data_share"] == pytest.approx(result["t_data_s"] / result["step_s"])


def test_the_pil_rival_makes_the_same_batch_as_the_loader(tmp_path):
    """Else their times would not be comparable."""
    import numpy as np

    from knl.bench.data import _KINDS, _by_pil, _data, _pack

    data = _pack(tmp_path, "jpeg_rrc", _KINDS["jpeg_rrc"])
    numbers = np.arange(8)
    ours, _ = data.train_batch(numbers, 0)
    theirs = _by_pil(
        [bytes(record.data) for record in data.train.read(numbers)],
        _data(tmp_path, _KINDS["jpeg_rrc"]),
    )
    assert np.abs(ours - theirs).mean() < 0.02  # of a spread; a level is 0.017
