"""Run the whole workflow in about a minute: make a 1024 × 2048 weight, sweep ranks 2 … 64, print where the report is.

    python example_rank_sweep.py
    python example_rank_sweep.py --output_dir /tmp/demo --ranks 4 16 --num_epochs 5

Further flags go to rank_sweep_study.py. Writes ./demo_rank_sweep_results/ in the current folder (or --output_dir): the
weight demo_weight.pth and everything that rank_sweep_study.py writes. Exit code: that of the step that failed, else 0.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and PYTHONSAFEPATH leave the folder of a script out

from ks.cli import console

if __name__ == "__main__":
    console.begin(__file__)

from ks.cli.flags import DemoConfig
from ks.cli.parser import Parser
from ks.study.processes import Lifeline

SCRIPTS = Path(__file__).resolve().parent
SWEEP_FLAGS = ["--ranks", "2", "4", "8", "16", "32", "64", "--num_epochs", "20", "--num_samples", "5000", "--log_scale"]


def build_parser() -> Parser[DemoConfig]:
    return Parser(DemoConfig, __doc__)


def run(script: str, *arguments) -> None:
    """Run one script; leave with its exit code if that is not 0."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    console.note(f"\n$ python {script} {' '.join(map(str, arguments))}")
    with contextlib.closing(Lifeline()) as lifeline:
        process = subprocess.Popen(
            command,
            start_new_session=True,
            env=os.environ | lifeline.environment,
            pass_fds=[lifeline.descriptor],
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()  # the sweep stops its runs and still writes its summary
            process.send_signal(signal.SIGCONT)
            code = process.wait()
    if code != 0:
        print(f"example_rank_sweep.py: {script} ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code)


@console.script
def main(argv=None) -> int:
    options, sweep_flags = build_parser().parse_known(argv)
    output_dir = Path(options.output_dir)
    weight = output_dir / "demo_weight.pth"
    shape = ("--output_features", 1024, "--input_features", 2048)
    run("generate_test_weight.py", *shape, "--init_method", "power_law", "--output_path", weight)
    run("rank_sweep_study.py", "--weight_path", weight, "--output_dir", output_dir, *SWEEP_FLAGS, *sweep_flags)
    print(f"\nThe results are in {output_dir.resolve()}: open rank_sweep_report.html first.")
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
