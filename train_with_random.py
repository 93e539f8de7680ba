"""Train one Kronecker-sparse chain of a given rank to stand in for a dense weight W, on random inputs.

    python train_with_random.py --weight_path my_weight.pth --rank 16
    python train_with_random.py --weight_path model.safetensors --weight_key encoder.dense.weight --inputs inputs.pt

Inputs x are random: isotropic, or with the second moment that the layer's inputs in --inputs have. Targets are W x.
Writes to --output_dir, under --save_prefix: PREFIX_rank_R_loss_curves.csv and .json and PREFIX_training_log.json after
every epoch; PREFIX_config.json; PREFIX_final.pth and PREFIX_best.pth (lowest validation loss) at the end, which
`ks.load` reads; PREFIX_epoch_N.pth every --save_interval epochs; PREFIX_resume.pth, from which --resume goes on.
Without --resume, a rerun under the same prefix replaces these files, also those of another rank.
Exit codes: 0 finished, 1 diverged or out of memory, 2 bad input, 4 internal error, 130 interrupted.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and PYTHONSAFEPATH leave the folder of a script out

from ks.cli import console

if __name__ == "__main__":
    console.begin(__file__)

import torch

from ks.cli.flags import TrainerConfig
from ks.cli.parser import Parser
from ks.study.processes import stop_with_parent
from ks.training.choose_optimizer import make_optimizer
from ks.training.criterion import GuardedMetrics, averages, check_edits, loss_and_gradient, loss_of, mean_squared_error
from ks.training.criterion_identity import edits_of
from ks.training.problem import Problem, resolve
from ks.training.recorder import Recorder, run_recorded
from ks.training.samples import Samples, make_samples
from ks.training.schedule import Schedule
from ks.training.steps import runnable
from ks.training.trainable_chain import TrainableChain

# Any function or module of (prediction, target) that returns a scalar can stand here: torch.nn.functional.l1_loss,
# torch.nn.HuberLoss(delta=0.5), or a `def criterion(prediction, target)` in place of this line. Both tensors have the
# shape (batch, m), with the outputs in the order of W's rows, in units of the root mean square of W x, so that a target
# has a mean square of about 1. Floors, verdicts, gauss_newton and --loss_metric model_loss exist for mean_squared_error
# alone; under that metric both tensors are turned and weighted such that ‖prediction − target‖² is ‖G^{1/2} (y − ŷ)‖².
criterion = mean_squared_error  # edit here


def metrics(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return more numbers to follow, by name; edit here. Both tensors are as for the criterion.

    The files show their means over validation batches of at most 1,024 samples, weighted by the sizes of the batches.
    For example: return {"cosine": torch.nn.functional.cosine_similarity(prediction, target).mean()}
    """
    return {}


def train(config: TrainerConfig, problem: Problem, run: Recorder) -> None:
    """Train the chain of rank `config.rank` by the criterion, and record every epoch.

    Everything inside is in internal coordinates, in which the zero predictor has a loss of 1
    (`ks.training.whitening`). A resumed run is bit-identical to one that was not interrupted.
    """
    weight = problem.internal_weight()
    chain = TrainableChain(config, problem, weight)
    samples = make_samples(config, problem, weight, chain.output_rows)  # targets in the order of the chain's outputs
    optimizer = make_optimizer(problem.optimizer, config, chain.factors, problem.metric, samples.whitened_steps)
    schedule = Schedule(config, samples.steps_per_epoch)
    guarded = GuardedMetrics(metrics, lambda warning: run.warn("metrics", warning))

    def step(x, y, lr):
        prediction = chain(x)
        loss, gradient = loss_and_gradient(criterion, prediction, y, optimizer.scale(lr), chain.output_metric)
        chain.backward(gradient, optimizer)  # writes the gradients of the factors to where the update reads them
        norm = optimizer.update(lr, loss)
        return loss, norm

    take_step, how = runnable(step, *samples.first(), optimizer)  # captured as a CUDA graph on a GPU
    run.record_choice("impl", *chain.impl)
    run.record_choice("steps", *how)
    run.begin(weight, chain, optimizer, schedule)
    for epoch in run.epochs():
        taken = []
        for number, x, y in samples.epoch(epoch):
            lr = schedule.rate(number)
            optimizer.prepare(number)  # Gauss–Newton measures the curvature anew if that is due
            taken.append(take_step(x, y, lr))
        optimizer.end_epoch()
        val_loss, values = validate(chain, samples, guarded)
        schedule.end_epoch(val_loss)
        run.record(taken, val_loss, values, lr)
    run.finish()


@torch.no_grad()
def validate(chain: TrainableChain, samples: Samples, guarded: GuardedMetrics) -> tuple[float, dict[str, float | None]]:
    """Return the criterion and the metrics, averaged over the validation samples."""
    losses, values = [], []
    for x, y in samples.validation:
        prediction = chain.predict(x)  # in the order of W's rows, unlike training batches
        losses.append(loss_of(criterion, prediction, y))
        values.append(guarded(prediction, y))
    fractions = samples.validation_fractions  # of the samples that are in each batch
    return (torch.stack(losses) @ fractions).item(), averages(values, fractions)


def build_parser() -> Parser[TrainerConfig]:
    return Parser(TrainerConfig, __doc__)


@console.script
def main(argv=None) -> int:
    stop_with_parent()
    config = build_parser().parse(argv)
    problem = resolve(config, edits_of(__file__))
    names, warnings = check_edits(criterion, metrics, problem)
    if config.check:
        print("\n".join(names))
        print("\n".join(warnings), end="", file=sys.stderr)
        return console.EXIT_OK
    return run_recorded(train, config, problem)


if __name__ == "__main__":
    sys.exit(main())
