"""Train one Kronecker-sparse chain of a given rank to stand in for a dense weight W, on random inputs.

    python train_with_random.py --weight_path my_weight.pth --rank 16
    python train_with_random.py --weight_path model.safetensors --weight_key encoder.dense.weight --inputs inputs.pt

Inputs x are random: isotropic, or as --inputs says that the layer sees them. Targets are W x.
Written to --output_dir while it trains, under --save_prefix: PREFIX_rank_R_loss_curves.csv and .json,
PREFIX_training_log.json; at the end PREFIX_final.pth and PREFIX_best.pth (lowest validation loss; both load with
`ks.load`); PREFIX_config.json; PREFIX_epoch_N.pth every --save_interval epochs.
--resume continues from PREFIX_resume.pth; with more --num_epochs, it continues a finished training too. Without
--resume, a rerun under the same prefix replaces these files, also those of another rank.
Exit codes: 0 well, 1 diverged or out of memory, 2 bad input, 4 internal error, 130 interrupted.
"""

import functools
import math
import sys
import time
from typing import Any

from ks.cli import startup

if __name__ == "__main__":
    startup.begin(__file__)

import torch

from ks import signals
from ks.bounds.floors import no_floor_reason
from ks.bounds.population_loss import population_loss
from ks.cli import console
from ks.cli.flags import TrainerConfig
from ks.cli.parser import Parser
from ks.errors import one_line
from ks.files.atomic import delete_leftovers, prepare_output_dir
from ks.files.curves import curves_if_any, write_curves
from ks.files.layout import RunFiles
from ks.files.lock import locked
from ks.files.ownership import check_free, delete, recorded
from ks.files.weights import DTYPES
from ks.layer import KSLinear
from ks.product.passes import ChainPasses, choose_working_impl
from ks.sweep.lifeline import stop_with_parent
from ks.training.best_model import BestModel
from ks.training.checkpoints import Checkpoints, is_finished, is_resumable, settings_of
from ks.training.checks import check_finite, check_validation
from ks.training.choose_optimiser import choose_for_criterion, make_optimiser
from ks.training.cuda_graph import make_epochs
from ks.training.epochs import useful_threads
from ks.training.fused_step import FusedStep
from ks.training.initial_values import sketch_rows
from ks.training.latency import measure_latency
from ks.training.losses import kind_of, loss_and_gradient, squared_error_and_gradient
from ks.training.observers import ConsoleReport, CurvesOnDisk, EpochEnd, Observer
from ks.training.problem import Problem, resolve
from ks.training.record import RunRecord
from ks.training.samples import seeded_generator
from ks.training.samples_file import make_samples
from ks.training.schedule import Schedule
from ks.training.target import target_of
from ks.training.trackers import TrackerReport


def build_parser() -> Parser[TrainerConfig]:
    return Parser(TrainerConfig, __doc__)


def criterion(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the training loss; edit here.

    Both arguments have the outputs in the order in which the chain makes them, in internal units: predicting 0 has a
    mean squared error of 1. A loss that is quadratic in its arguments is reported in the squared unit of the outputs,
    any other as it is. Floors, population losses and verdicts exist for the mean squared error alone.
    """
    return torch.nn.functional.mse_loss(prediction, target)


def train(
    config: TrainerConfig, problem: Problem, files: RunFiles, checkpoints: Checkpoints, record: RunRecord
) -> dict:
    """Train the chain of rank `config.rank`; its curves are on disk while it trains.

    Resume from `checkpoints.found` if it is set; the result is bit-identical to an uninterrupted run.

    Returns:
        the last row of the curves.
    Raises:
        Diverged: a loss is not finite.
        InternalError: the final validation loss contradicts the population loss.
    """
    if checkpoints.found:
        torch.set_num_threads(checkpoints.found.threads)
    threads = torch.get_num_threads()
    dtype, device = DTYPES[config.dtype], problem.device
    weight = problem.internal_weight()
    model = make_model(config, problem, weight)
    factors = [factor.detach() for factor in model.factors]

    layout: dict[str, Any] = {"batch_last": config.bs_last, "block_order": True, "precision": config.float32_precision}
    impl, reason, warning = choose_working_impl(config.impl, model.patterns, config.batch_size, device, dtype, **layout)
    record.decide("impl", impl, reason, warning)

    @functools.cache  # one for the training batches, one or two for those of validation
    def passes(batch: int) -> ChainPasses:
        return ChainPasses(model.patterns, batch, device, dtype, impl=impl, **layout)

    samples = make_samples(config, problem, weight, lambda batch: passes(batch).output_rows)
    torch.set_num_threads(useful_threads(problem.chain.parameters(config.rank) * config.batch_size))
    kind = kind_of(criterion, samples.validation[0][1])
    record.decide("loss", kind.value, "the criterion of train_with_random.py")
    optimizer, other = choose_for_criterion(config.optimizer, problem.optimizer, kind)
    if other:
        record.decide("optimizer", optimizer, other)
    optimiser = make_optimiser(optimizer, config, factors, problem.inputs, loss_scaling=dtype == torch.float16)
    schedule = Schedule(
        config.scheduler,
        config.lr,
        samples.steps_per_epoch,
        config.num_epochs,
        patience=config.scheduler_patience,
        factor=config.scheduler_factor,
        step_size=config.step_size,
        gamma=config.gamma,
    )
    loss_gradient = squared_error_and_gradient if kind.has_floors else functools.partial(loss_and_gradient, criterion)
    unit_of_loss = kind.unit(problem.predict_zero_loss)
    training = passes(config.batch_size)

    def step(inputs, targets, lr):
        values = [factor.to(dtype) for factor in factors]
        prediction, *inner = training.forward(inputs, values)
        loss, gradient = loss_gradient(prediction, targets, optimiser.scale)
        training.backward(gradient, inputs, values, inner, out=optimiser.gradients, scaling=optimiser.scaling)
        return loss, optimiser.update(lr, loss)

    def validate():
        values = [factor.to(dtype) for factor in factors]
        batches = ((passes(x.shape[config.bs_last]), x, y) for x, y in samples.validation)
        outputs = ((validation.forward(x, values, keep=False)[0], y) for validation, x, y in batches)
        return torch.stack([criterion(y.float(), target) for y, target in outputs]) @ samples.validation_shares

    fused = None
    if config.impl == "triton" and kind.has_floors and device.type == "cuda":
        fused = FusedStep(training, optimiser, samples)
    epochs, how, warning = make_epochs(step, samples, optimiser.state(), device, optimiser.prepare, fused)
    record.decide("steps", how, "a CUDA graph needs a GPU" if device.type == "cpu" else "on a GPU", warning)
    stop_loss = -math.inf if config.stop_below is None else config.stop_below * unit_of_loss
    population_interval = math.ceil(config.num_epochs / 10) if config.stop_below is None else 1
    best = BestModel(model, weight, problem.inputs, keep_start=kind.has_floors and config.init == "hierarchical")
    observers: list[Observer] = [CurvesOnDisk(files), ConsoleReport(config)]
    if config.log_to:
        observers.append(TrackerReport(config, files, checkpoints.settings))
    curves: list[dict] = []
    if checkpoints.found:
        curves = checkpoints.restore(optimiser, schedule, best)
        write_curves(files, curves)
        record.resume(len(curves))
    try:
        for epoch in range(len(curves) + 1, config.num_epochs + 1):
            started = time.perf_counter()
            rates = [schedule.rate(epoch, step) for step in range(samples.steps_per_epoch)]
            losses, norms = epochs.run(epoch, rates)
            val_loss = validate().item()
            row = {
                "epoch": epoch,
                "train_loss": losses.mean().item() * unit_of_loss,
                "val_loss": val_loss * unit_of_loss,
                "rank": config.rank,
                "lr": rates[-1],
                "epoch_seconds": time.perf_counter() - started,
                "segment": checkpoints.segment,
            }
            if kind.has_floors and (epoch % population_interval == 0 or epoch == config.num_epochs):
                row["population_loss"] = population_loss(weight, factors, problem.inputs) * unit_of_loss
            if config.log_grad_norm or config.log_to:
                row["grad_norm"] = norms.mean().item()
            curves.append(row)
            best.offer(val_loss, row)  # first, so that an epoch on disk has a best model whenever a signal comes
            for observer in observers:
                observer.epoch_ended(EpochEnd(curves, losses * unit_of_loss, norms))
            if trouble := optimiser.trouble():
                record.warn("optimizer", trouble)
            check_finite(row, losses)

            schedule.end_epoch(val_loss)
            checkpoints.offer(threads, curves, optimiser, schedule, best)
            if config.save_interval and epoch % config.save_interval == 0:
                record.own(files.epoch_checkpoint(epoch))
                problem.save(model, files.epoch_checkpoint(epoch))
            if row.get("population_loss", math.inf) <= stop_loss:
                break
        record.finish(len(curves), curves[-1].get("population_loss"))
        problem.save(model, files.final)
        if kind.has_floors:
            tf32 = config.float32_precision == "tf32"
            check_validation(curves[-1]["val_loss"] / unit_of_loss, weight, model, problem, dtype, tf32)
        if config.latency_seconds:
            place = (dtype, config.impl, threads, config.latency_seconds)
            record.keep_latency(lambda: measure_latency(model, weight, *place))
        checkpoints.write_latest()
    except BaseException:
        checkpoints.write_latest()
        raise
    finally:
        if best.row is not None:
            if kind.has_floors:
                best.row["population_loss"] = best.population_loss() * unit_of_loss
            for observer in observers:
                observer.training_ended(curves)
            problem.save(best.chosen(), files.best)
    return curves[-1]


def make_model(config: TrainerConfig, problem: Problem, weight: torch.Tensor) -> KSLinear:
    """Return the chain at its initial values, in internal coordinates.

    random: the left-most factor is zero, so that training starts from predicting 0; the others keep the variance of
    their input. For coupled inputs, the rows of the right-most one are random combinations of those of W.
    hierarchical: the factorisation of W for the second moment of the inputs.
    """
    patterns = problem.chain.patterns(config.rank)
    if config.init == "hierarchical":
        start = KSLinear.from_dense(weight, patterns=patterns, input_moments=problem.inputs, batch_last=config.bs_last)
        return start.float()
    model = KSLinear.from_patterns(patterns, batch_last=config.bs_last)
    generator = seeded_generator(config.seed, "init")
    model.reset_parameters(generator)
    with torch.no_grad():
        if no_floor_reason(problem.chain) is None and problem.inputs.coupling(patterns[-1].a) is not None:
            sketch_rows(model.factors[-1], weight, patterns[-2].d, generator)
        model.factors[0].zero_()
    return model.to(problem.device)


@console.script
def main(argv=None) -> int:
    stop_with_parent()
    config = build_parser().parse(argv)
    problem = resolve(config)
    target = target_of(config, problem)
    files = RunFiles(prepare_output_dir(config.output_dir), config.save_prefix, config.rank)
    with locked(files.lock, "another training", wait=10), signals.deferred():
        settings = settings_of(config, problem) | {"rank": config.rank}
        inputs = config.files_read()
        delete_leftovers([*files.results(), *files.epoch_checkpoints()])
        owned = recorded(files.config, [*files.results(), *files.epoch_checkpoints()])
        resumable = config.resume and is_resumable(files, settings)
        planned = files.epoch_checkpoints() if config.save_interval else []
        check_free([*files.results(), *planned], owned, inputs, "choose another --output_dir or --save_prefix")
        if not resumable:
            delete(owned, inputs)
        elif is_finished(
            files, config.num_epochs, curves_if_any(files.curves_csv), "the training is not finished", config.stop_below
        ):
            last = curves_if_any(files.curves_csv)[-1]
            print("\n".join([f"rank {config.rank}: finished before; {files.final}", *target.outcome(last)]))
            return console.EXIT_OK
        for text in (*problem.notes, *target.notes):
            console.note(text, config.quiet)
        checkpoints = Checkpoints(files, settings, config.resume_interval, resume=config.resume)
        resumed = bool(checkpoints.found)
        kept = owned if resumable else set()
        with RunRecord(config, problem, settings, files, resumed=resumed, owned=kept) as record:
            record.begin()
            last = train(config, problem, files, checkpoints, record)
        if record.message is not None:
            print(f"train_with_random.py: {one_line(record.message)}", file=sys.stderr)
            return record.exit_code
        known = "population_loss" in last
        share = f", {last['val_loss'] / problem.validation_predict_zero_loss:.2%} of predicting 0" if known else ""
        said = f"rank {config.rank}: validation loss {last['val_loss']:.6g}{share}; {files.final}"
        print("\n".join([said, *target.outcome(last)]))
        return record.exit_code


if __name__ == "__main__":
    sys.exit(main())
