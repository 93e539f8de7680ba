"""From the files of runs to one row per rank: losses over the seeds, the distance to the floor, and a verdict."""

import math
import statistics

from ks.factorize import Floor
from ks.patterns import Chain
from ks.results import finite

MEASURES = ("final_train_loss", "final_val_loss", "min_train_loss", "min_val_loss", "population_loss")
WITH_ERROR = ("final_train_loss", "final_val_loss", "population_loss")

# A floor below this share of predict-0 is zero for practical purposes: no ratio to it is reported.
NEGLIGIBLE_FLOOR = 1e-6
# Rounding of float32 factors and of the floor, as a share of predict-0 and of the floor.
ROUNDING = 1e-9
# A rank has converged when its excess is at most 0.1% of predict-0, or 1% of the smaller of its floor and of what its
# rank can remove (predict-0 − floor): within 1% of a floor close to predict-0 means nothing.
CONVERGED_EXCESS = 0.001
CONVERGED_SHARE = 0.01
# Samples are the limit where training sees less than half of the distance to the floor.
SEEN_SHARE = 0.5


def run_row(rank: int, curves: list[dict], status: str = "ok", **extra) -> dict:
    """Summary of one run; losses are None where a curve has no finite value, final ones where the run did not finish.

    Args:
        rank: of the run.
        curves: rows of `ks.results.read_curves`, possibly empty.
        status: 'ok', or what went wrong.
        extra: further columns, such as the seed.
    """
    row = {"rank": rank, "num_epochs": len(curves), "status": status, **extra}
    for split in ("train", "val"):
        values = [(entry[f"{split}_loss"], entry["epoch"]) for entry in curves if math.isfinite(entry[f"{split}_loss"])]
        best, epoch = min(values, default=(None, None))
        row |= {f"min_{split}_loss": best, f"min_{split}_epoch": epoch}
    last = curves[-1] if curves and status == "ok" else {}
    for name in ("final_train_loss", "final_val_loss", "population_loss"):
        row[name] = finite(last.get(name.removeprefix("final_")))
    return row


def rank_row(
    runs: list[dict], chain: Chain | None = None, floor: Floor | None = None, predict_zero: float | None = None
) -> dict:
    """One row of the summary: means over the finished seeds of one rank, and where it stands against its floor.

    Args:
        runs: rows of `run_row` for one rank, one per seed.
        chain: for parameters and saturation.
        floor: of that rank, in the units of the losses; None where there is none.
        predict_zero: loss of predicting 0, in the same units.
    Returns:
        a dict with the keys of `ks.results.SUMMARY_COLUMNS`; None where a value is not known.
    """
    finished = [run for run in runs if run["status"] == "ok"]
    good = finished or runs
    first = good[0]
    row = {key: first.get(key) for key in ("rank", "min_train_epoch", "min_val_epoch", "num_epochs")}
    row |= {"num_seeds": len(finished), "train_seconds": _mean([run.get("train_seconds") for run in runs])}
    row |= {name: _mean([run[name] for run in good]) for name in MEASURES}
    row |= {f"{name}_se": _standard_error([run[name] for run in good]) for name in WITH_ERROR}
    bad = [run["status"] for run in runs if run["status"] != "ok"]
    row["status"] = "ok" if not bad else bad[0] if len(runs) == 1 else f"{bad[0]} ({len(bad)} of {len(runs)} seeds)"
    if chain is not None:
        row["parameters"] = chain.parameters(row["rank"])
        row["compression_ratio"] = chain.rows * chain.cols / row["parameters"]
        row["saturated"] = row["rank"] >= chain.saturation_rank
    if predict_zero is not None and row["population_loss"] is not None:
        row["relative_loss"] = row["population_loss"] / predict_zero
    if floor is not None:
        row |= {"loss_floor": floor.lower, "loss_floor_upper": floor.upper, "loss_floor_is_exact": floor.exact}
        row |= _distance(row["population_loss"], floor, predict_zero)
    row["verdict"] = verdict(row, predict_zero)
    return row


def _mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _standard_error(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def _distance(population: float | None, floor: Floor, predict_zero: float) -> dict:
    if population is None:
        return {}
    distance = {"excess": max(0.0, population - floor.lower) / predict_zero, "optimality_gap": None}
    if floor.lower >= NEGLIGIBLE_FLOOR * predict_zero:
        distance["optimality_gap"] = max(0.0, population / floor.lower - 1)
    return distance


def check_above_floor(population: float | None, floor: Floor | None, predict_zero: float) -> None:
    """No chain can be below its floor: if this raises, the floor or the loss is computed wrongly. None is not checked.

    Raises:
        AssertionError: the population loss is below the lower bound by more than rounding.
    """
    if population is None or floor is None:
        return
    if population < floor.lower * (1 - ROUNDING) - ROUNDING * predict_zero:
        raise AssertionError(f"rank {floor.rank}: population loss {population!r} is below its floor {floor.lower!r}")


def verdict(row: dict, predict_zero: float | None) -> str | None:
    """What limits a rank, and its marks, comma-separated; None for a failed rank, only the marks without a floor.

    converged: at most 0.1% of predict-0 above the floor, or 1% of the smaller of the floor and of what the rank can
    remove; with bounds that do not meet, the upper one counts.
    sample-limited: not so, and the training loss hides more than half of the distance to the floor.
    undertrained: neither.
    """
    if row["num_seeds"] == 0:
        return None
    words = []
    if row.get("loss_floor") is not None and row["population_loss"] is not None:
        population, target = row["population_loss"], row["loss_floor_upper"]
        distance = population - target
        if distance <= max(CONVERGED_SHARE * min(target, predict_zero - target), CONVERGED_EXCESS * predict_zero):
            words.append("converged")
        elif row["final_train_loss"] - target < SEEN_SHARE * distance:
            words.append("sample-limited")
        else:
            words.append("undertrained")
    if row.get("saturated"):
        words.append("saturated")
    if row.get("compression_ratio") is not None and row["compression_ratio"] < 1:
        words.append("larger than dense")
    return ", ".join(words) or None


def advice(rows: list[dict], sampling: str | None = None) -> list[str]:
    """What to do about each rank that is not at its floor, one plain sentence each."""
    sentences = []
    for row in rows:
        words = (row.get("verdict") or "").split(", ")
        if row["status"].startswith("interrupted"):
            continue
        if row["status"] != "ok":
            sentences.append(f"rank {row['rank']}: {row['status']}; see its train.log")
        elif "sample-limited" in words:
            remedy = (
                "more samples" if sampling in ("whitened", "fresh") else "--sampling whitened, fresh or more samples"
            )
            sentences.append(
                f"rank {row['rank']}: {_above(row)} and training loss well below that: sample-limited; use {remedy}"
            )
        elif "undertrained" in words:
            sentences.append(f"rank {row['rank']}: {_above(row)}: undertrained; use more --num_epochs")
    larger = [str(row["rank"]) for row in rows if "larger than dense" in (row.get("verdict") or "")]
    if larger:
        sentences.append(f"rank {', '.join(larger)}: more parameters than the dense weight")
    return sentences


def _above(row: dict) -> str:
    if row.get("optimality_gap") is None:
        return f"{row['excess']:.2%} of predict-0 above its floor"
    gap = 100 * row["optimality_gap"]
    return f"{gap:.0f}% above its floor" if gap >= 10 else f"{gap:.2g}% above its floor"
