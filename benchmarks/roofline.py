"""Make the table and the roofline picture of a GPU, from what gpu_check.py measured on it.

    python benchmarks/roofline.py --csv docs/gpu/check.csv --table docs/gpu/table.md --picture docs/gpu/roofline.png

Each forward pass is a point: its operations per byte that must be moved, and the rate that it reached. The roof is the
GPU's own copy bandwidth times that intensity, or its matmul rate, whichever is lower; both were measured in the same
run. The table gives, for each dtype and batch, the time of the peers over that of ours, and the share of the roof.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

PEERS = ("bmm", "bmm_last", "plain", "einsum", "structured", "dense")


def passed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["worst_error"] <= 1) & rows["forward_ours_ms"].notna()]


def table(rows: pd.DataFrame) -> str:
    """Return the table in Markdown; a ratio has its smallest value and its median over chains, shapes and ranks."""
    lines = [["dtype", "batch", "cells"]]
    lines[0] += [f"{peer}, {what}" for what in ("forward", "both") for peer in PEERS]
    lines[0] += ["share of roof, median (smallest)"]
    lines.append(["---"] * len(lines[0]))
    for (dtype, batch), group in passed(rows).groupby(["dtype", "batch"], sort=False):
        line = [dtype, f"{batch}", f"{len(group)}"]
        for what in ("forward", "both"):
            for peer in PEERS:
                ratio = (group[f"{what}_{peer}_ms"] / group[f"{what}_ours_ms"]).dropna()
                line.append(f"{ratio.min():.2f}, {ratio.median():.2f}" if len(ratio) else "")
        share = group["forward_share_of_ceiling"]
        lines.append([*line, f"{share.median():.0%} ({share.min():.0%})"])
    cells = ["chain", "shape", "rank", "batch", "dtype"]
    farthest = passed(rows).nsmallest(5, "forward_share_of_ceiling")
    below = [
        f"- {' '.join(map(str, row[cells]))}: {row['forward_share_of_ceiling']:.1%}" for _, row in farthest.iterrows()
    ]
    failed = len(rows) - len(passed(rows))
    first = rows.iloc[0]
    head = f"{first['hardware']}, driver {first['driver']}, torch {first['torch']}, revision {first['revision']}; "
    head += f"copy {first['copy_gb_s']:.0f} GB/s; {failed} of {len(rows)} cells failed their check."
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "", *lines, "", "Farthest from the roof, forward:", "", *below]) + "\n"


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Draw one panel per dtype: rate against intensity, both logarithmic, under the measured roof."""
    rows = passed(rows)
    dtypes = list(dict.fromkeys(rows["dtype"]))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, dtype in zip(panels[0], dtypes):
        group = rows[rows["dtype"] == dtype]
        intensity = group["forward_tflop_s"] * 1e3 / group["forward_gb_s"]
        copy, rate = group["copy_gb_s"].iloc[0], group["matmul_tflop_s"].iloc[0]
        axis = np.geomspace(
            min(intensity.min(), rate * 1e3 / copy) / 2, max(intensity.max(), rate * 1e3 / copy) * 2, 200
        )
        panel.loglog(axis, np.minimum(axis * copy * 1e-3, rate), color="black", label="measured roof")
        for (chain, batch), points in group.groupby(["chain", "batch"], sort=False):
            marker = "o" if chain == "monarch" else "^"
            panel.loglog(intensity[points.index], points["forward_tflop_s"], marker, label=f"{chain}, batch {batch}")
        panel.set(title=dtype, xlabel="operations per byte that must be moved")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("TFLOP/s, forward")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(rows["hardware"].iloc[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file of gpu_check.py")
    parser.add_argument("--table", type=Path, help="Markdown file")
    parser.add_argument("--picture", type=Path, help="PNG file")
    options = parser.parse_args(argv)
    rows = pd.read_csv(options.csv)
    place = rows[["hardware", "revision"]].fillna("")  # a copy of the repository without git has no revision
    rows = rows[(place == place.iloc[-1]).all(axis=1)]  # the latest ones
    text = table(rows)
    print(text)
    if options.table:
        options.table.write_text(text)
    if options.picture:
        picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
