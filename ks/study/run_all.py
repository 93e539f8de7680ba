"""All runs of a study: those that ended well before are kept, the others run, also when some fail."""

from collections.abc import Callable, Mapping

from ks import signals
from ks.cli import console
from ks.cli.flags import SweepConfig
from ks.files.status import ended_well
from ks.study.progress import Progress
from ks.study.runs import Result, Run
from ks.study.task import Exit, Launcher, Task

ReadResult = Callable[[Run, Exit | None], Result]


def finished_before(config: SweepConfig, runs: list[Run], read_result: ReadResult) -> dict[Run, Result]:
    """Return the results of the runs that ended well before, and delete the logs of those that start anew.

    Args:
        config: of the sweep.
        runs: of the study.
        read_result: returns the result of a run.
    """
    results: dict[Run, Result] = {}
    for run in runs:
        if signals.came():
            break
        result = read_result(run, None)
        if ended_well(result.ending):
            results[run] = result
            console.note(f"{run.task.name}: finished before", config.quiet)
        elif not run.files.resume.exists():
            run.files.log.unlink(missing_ok=True)
    return results


def run_all(
    config: SweepConfig,
    runs: list[Run],
    launcher: Launcher,
    read_result: ReadResult,
    before_last: Callable[[], None] = lambda: None,
    floors: Mapping[int, float] | None = None,
) -> dict[Run, Result]:
    """Run those that are left, also when others fail.

    Args:
        config: of the sweep.
        runs: in their order.
        launcher: of the sweep.
        read_result: returns the result of a run whose process has ended.
        before_last: called while the last one runs.
        floors: the best known loss of each rank, in the unit of the curves.
    Returns:
        the results of the runs that have ended; after an interrupt, some are missing.
    """
    results: dict[Run, Result] = {}
    run_of = {run.task: run for run in runs}
    progress = Progress(runs, config.num_epochs, config.quiet, floors)

    def poll(running: list[Task]) -> None:
        signals.check()
        progress.poll(running)
        if len(running) == 1:
            before_last()

    try:
        for task, exit in launcher.run(list(run_of), poll):
            result = results[run_of[task]] = read_result(run_of[task], exit)
            progress.end(result, exit)
    except KeyboardInterrupt:
        progress.say("stopping: finished epochs are kept, and the same command resumes")
    finally:
        progress.close()
    return results
