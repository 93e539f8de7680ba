"""Sweep the rank of a Kronecker-sparse chain: one run per rank, each in a process of its own, then compare.

    python rank_sweep_study.py --weight_path my_weight.pth --ranks 2 4 8 16 --log_scale
    python rank_sweep_study.py --weight_path my_weight.pth --target_relative_loss 0.1 --dry_run

Written to --output_dir: a folder rank_R for each rank (curves, checkpoints, train.log), and under --save_prefix
PREFIX_summary.csv and .json, PREFIX_runs.csv, PREFIX_all_curves.csv, PREFIX_floor.csv, PREFIX_config.json and the
figures PREFIX_loss_curves.png, _final_losses.png, _floor.png, _gap.png, _front.png and _latency.png; with --metric
NAME, also PREFIX_metric_NAME.png; PREFIX_report.html has all of it on one page.
The same command again keeps finished ranks, resumes unfinished ones and trains failed ones again; with more
--num_epochs it continues all ranks, and other --ranks join the study. Flags left out take the values of the study.
Exit codes: 0 well, 1 no rank succeeded, 2 bad input or another study's folder, 3 some ranks failed, 4 internal error,
130 interrupted.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and PYTHONSAFEPATH leave the folder of a script out

from ks.cli import console

if __name__ == "__main__":
    console.begin(__file__, "reads the weight, computes the floor of every rank, then trains a chain for each")

from ks import signals
from ks.cli.flags import SweepConfig
from ks.cli.parser import Parser
from ks.files.status import Status
from ks.study.folder import parse
from ks.study.fork_server import starting_runs
from ks.study.processes import Start, stop_with_parent
from ks.study.slurm_cluster import SlurmLauncher
from ks.study.weight_study import WeightStudy

TRAINER = Path(__file__).resolve().parent / "train_with_random.py"


def build_parser() -> Parser[SweepConfig]:
    return Parser(SweepConfig, __doc__)


def exit_code(statuses: set[Status]) -> int:
    if signals.came() or Status.INTERRUPTED in statuses:
        return console.EXIT_INTERRUPTED
    if Status.OK not in statuses:
        return console.EXIT_FAILED
    return console.EXIT_OK if statuses == {Status.OK} else console.EXIT_SOME_FAILED


def study_of(config: SweepConfig, start: Start):
    """Return the study that the flags ask for: of one weight, or of several layers of a checkpoint.

    `start` starts a run on this machine.
    """
    if config.is_of_several_layers():
        from ks.study.checkpoint_study import CheckpointStudy  # loads all of ks.model

        return CheckpointStudy(config, TRAINER, start)
    return WeightStudy(config.of_layer(config.weight_key[0] if config.weight_key else None), TRAINER, start)


@console.script
def main(argv=None) -> int:
    config = parse(build_parser(), sys.argv[1:] if argv is None else argv)
    with starting_runs(config, is_script=argv is None) as start:
        return sweep(config, start)


def sweep(config: SweepConfig, start: Start) -> int:
    """Run a study from its plan to its summary, or print the plan; return the exit code."""
    stop_with_parent()
    if config.gpus == "none" and config.device == "auto":
        config = dataclasses.replace(config, device="cpu")
    if config.dry_run and config.chains:
        from ks.study.family_comparison import compare_families, compares_families  # loads parts of ks.model

        if compares_families(config):
            print(compare_families(config))
            return console.EXIT_OK
    with study_of(config, start) as study:
        study.load()
        if not config.dry_run:
            study.check_folder()
        study.plan()
        if config.dry_run:
            print(study.plan_text())
            if config.launcher == "slurm":
                launcher = SlurmLauncher(config, study.runs_at_most())
                print(f"\n{launcher.script()}")
                launcher.check()
            return console.EXIT_OK
        study.open_launcher()
        with signals.deferred():
            study.claim()
            study.run()
            lines = study.conclude()
    if signals.came():
        print("rank_sweep_study.py: interrupted; the same command resumes", file=sys.stderr)
    print("\n".join(lines))
    study.check_floors()
    return exit_code(study.statuses())


if __name__ == "__main__":
    sys.exit(main())
