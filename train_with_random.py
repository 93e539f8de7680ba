"""Train one Kronecker-sparse chain of a given rank to stand in for a dense weight W, on random inputs.

    python train_with_random.py --weight_path my_weight.pth --rank 16
    python train_with_random.py --weight_path model.safetensors --weight_key encoder.dense.weight --chain butterfly

Inputs are x ~ N(0, σ²I), targets W x. Written to --output_dir after every epoch, under --save_prefix:
PREFIX_rank_R_loss_curves.csv and .json, PREFIX_training_log.json; at the end PREFIX_final.pth and PREFIX_best.pth
(lowest validation loss; both load with `ks.load`); PREFIX_config.json; PREFIX_epoch_N.pth every --save_interval epochs.
Exit codes: 0 well, 1 diverged or out of memory, 2 bad input, 130 interrupted.
"""

import copy
import math
import signal
import sys
import time

import torch

from ks import cli, results
from ks.layer import KSLinear
from ks.problem import Problem, resolve
from ks.step import Optimiser, Samples, Schedule, seeded_generator
from ks.weights import DTYPES

SCRIPT = "train_with_random.py"


class Diverged(Exception):
    """The loss is not finite any more."""


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    cli.add_shared_training_groups(parser, num_epochs=100, save_interval=10)
    parser.add_argument("--rank", type=cli.positive_int, default=4, help="rank of the chain (default: 4)")
    cli.add_output_flags(parser, output_dir="./trained_models", save_prefix="ks_chain")
    return parser


def criterion(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The training loss, on outputs in internal units; edit here.

    Reported losses are this times `predict_zero_loss`, which is right for a loss quadratic in its arguments.
    """
    return torch.nn.functional.mse_loss(prediction, target)


def train(config, problem: Problem, files: results.RunFiles) -> dict:
    """Train the chain of rank `config.rank`; curves and checkpoints are on disk whenever an epoch has ended.

    Returns:
        the last row of the curves.
    Raises:
        Diverged: a loss that is not finite.
    """
    dtype = DTYPES[config.dtype]
    patterns = problem.chain.patterns(config.rank)
    samples = Samples(
        problem.internal_weight(),
        problem.num_train,
        problem.num_validation,
        config.batch_size,
        sampling=problem.sampling,
        seed=config.seed,
        batch_last=config.bs_last,
        dtype=dtype,
    )
    model = KSLinear.from_patterns(patterns, impl=problem.impl, batch_last=config.bs_last)
    initialise(model, seeded_generator(config.seed, "init"))
    model.to(problem.device)
    optimiser = Optimiser(
        config.optimizer,
        model.parameters(),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_scaling=dtype == torch.float16,
    )
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

    def loss_of(inputs, targets):
        with torch.autocast(problem.device.type, dtype, enabled=dtype != torch.float32):
            prediction = model(inputs)
        return criterion(prediction.float(), targets)

    curves, best_loss, best_model = [], math.inf, None
    losses, norms = torch.empty(2, samples.steps_per_epoch, device=problem.device)
    try:
        for epoch in range(1, config.num_epochs + 1):
            started = time.perf_counter()
            for step, (inputs, targets) in enumerate(samples.epoch(epoch)):
                loss = loss_of(inputs, targets)
                norms[step] = optimiser.step(loss, schedule.rate(epoch, step))
                losses[step] = loss.detach()
            with torch.no_grad():
                val_losses = torch.stack([loss_of(*batch) for batch in samples.validation])
            train_loss, val_loss = losses.mean().item(), (val_losses @ samples.validation_shares).item()

            row = {
                "epoch": epoch,
                "train_loss": train_loss * problem.predict_zero_loss,
                "val_loss": val_loss * problem.predict_zero_loss,
                "rank": config.rank,
                "lr": schedule.rate(epoch, step),
                "epoch_seconds": time.perf_counter() - started,
            }
            if config.log_grad_norm:
                row["grad_norm"] = norms.mean().item()
            curves.append(row)
            results.write_curves(files, curves, {"parameters": problem.chain.parameters(config.rank)})
            report(config, row, losses * problem.predict_zero_loss, norms)
            check_finite(row, losses)

            schedule.end_epoch(val_loss)
            if val_loss < best_loss:
                best_loss, best_model = val_loss, rescaled(model, problem.unit)
            if config.save_interval and epoch % config.save_interval == 0:
                save(rescaled(model, problem.unit), files.epoch_checkpoint(epoch))
        save(rescaled(model, problem.unit), files.final)
    finally:
        if best_model is not None:
            save(best_model, files.best)
    return curves[-1]


def initialise(model: KSLinear, generator: torch.Generator) -> None:
    """Left-most factor zero, so that training starts from predicting 0; the others keep the variance of their input."""
    model.reset_parameters(generator)
    with torch.no_grad():
        model.factors[0].zero_()


def rescaled(model: KSLinear, unit: float) -> KSLinear:
    """A copy in the user's units: `unit` times the model's dense weight, the scale shared evenly by the factors."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for factor in scaled.factors:
            factor.mul_(unit ** (1 / len(scaled.factors)))
    return scaled


def save(model: KSLinear, path) -> None:
    with results.atomic_path(path) as temporary:
        model.save(temporary)


def check_finite(row: dict, losses: torch.Tensor) -> None:
    """Raise Diverged, naming the first step whose loss is not finite."""
    if math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]):
        return
    bad = (~torch.isfinite(losses)).nonzero()
    step = f"step {bad[0].item() + 1} of {len(losses)}" if len(bad) else "validation"
    raise Diverged(f"the loss is not finite at epoch {row['epoch']}, {step}; lower --lr or use --dtype float32")


def report(config, row: dict, losses: torch.Tensor, norms: torch.Tensor) -> None:
    """Progress of one epoch on stderr."""
    if config.quiet:
        return
    if config.verbose:
        for step in range(config.log_interval - 1, len(losses), config.log_interval):
            norm = f", gradient norm {norms[step]:.4g}" if config.log_grad_norm else ""
            cli.note(f"  step {step + 1}/{len(losses)}: loss {losses[step]:.6g}{norm}")
    norm = f", gradient norm {row['grad_norm']:.4g}" if "grad_norm" in row else ""
    cli.note(
        f"epoch {row['epoch']}/{config.num_epochs}: train {row['train_loss']:.6g}, "
        f"validation {row['val_loss']:.6g}{norm}, {row['epoch_seconds']:.2f} s"
    )


def interrupt(signum, frame):
    raise KeyboardInterrupt


def main(argv=None) -> int:
    signal.signal(signal.SIGTERM, interrupt)
    config = build_parser().parse_config(argv)
    with cli.usage_errors(SCRIPT):
        problem = resolve(config)
        files = results.RunFiles(results.prepare_output_dir(config.output_dir), config.save_prefix, config.rank)
    for text in problem.notes:
        cli.note(text, config.quiet)
    files.remove()
    results.write_json(
        files.config, {"arguments": vars(config), "problem": problem.describe(), "provenance": results.provenance()}
    )
    log = {"status": "running", "started": results.now()}
    results.write_json(files.training_log, log)
    started = time.perf_counter()
    code = cli.EXIT_FAILED
    try:
        last = train(config, problem, files)
        log["status"], code = "finished", cli.EXIT_OK
    except Diverged as error:
        log |= {"status": "diverged", "error": str(error)}
    except torch.OutOfMemoryError:
        advice = f"use a --batch_size below {config.batch_size}, fewer --num_samples or --dtype bfloat16"
        log |= {"status": "out of memory", "error": f"out of memory on {problem.device}; {advice}"}
    except KeyboardInterrupt:
        log |= {"status": "interrupted", "error": "interrupted; the epochs so far are kept"}
        code = cli.EXIT_INTERRUPTED
    finally:
        log |= {"ended": results.now(), "train_seconds": time.perf_counter() - started}
        results.write_json(files.training_log, log)
    if code != cli.EXIT_OK:
        print(f"{SCRIPT}: {log['error']}", file=sys.stderr)
        return code
    relative = last["val_loss"] / problem.predict_zero_loss
    print(f"rank {config.rank}: validation loss {last['val_loss']:.6g}, {relative:.2%} of predicting 0; {files.final}")
    return code


if __name__ == "__main__":
    sys.exit(main())
