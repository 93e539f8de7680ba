"""Train one Kronecker-sparse chain of a given rank to stand in for a dense weight W, on random inputs.

    python train_with_random.py --weight_path my_weight.pth --rank 16
    python train_with_random.py --weight_path model.safetensors --weight_key encoder.dense.weight --chain butterfly

Inputs are x ~ N(0, σ²I), targets W x. Written to --output_dir after every epoch, under --save_prefix:
PREFIX_rank_R_loss_curves.csv and .json, PREFIX_training_log.json; at the end PREFIX_final.pth and PREFIX_best.pth
(lowest validation loss; both load with `ks.load`); PREFIX_config.json; PREFIX_epoch_N.pth every --save_interval epochs.
PREFIX_resume.pth is where --resume goes on after an interrupt or a crash; it goes when the training is finished.
Without --resume a rerun under the same prefix replaces these files, also for another rank.
Exit codes: 0 well, 1 diverged or out of memory, 2 bad input, 130 interrupted.
"""

import contextlib
import copy
import functools
import math
import os
import sys
import time

# Threads that wait for the next product sleep instead of spinning: on cores shared with one other process, spinning
# made an epoch 6 times longer. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from ks import cli, launch, results, resume
from ks.chain import ChainPasses, choose_impl
from ks.factorize import population_loss, sampled_loss_range
from ks.layer import KSLinear
from ks.lock import locked
from ks.problem import Problem, resolve
from ks.step import (
    Optimiser,
    Samples,
    Schedule,
    loss_and_gradient,
    make_epochs,
    seeded_generator,
    squared_error_and_gradient,
    useful_threads,
)
from ks.weights import DTYPES

SCRIPT = "train_with_random.py"


class Diverged(Exception):
    """The loss is not finite any more."""


class InternalError(Exception):
    """A result that cannot be right: a fault of this program."""


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    cli.add_shared_training_groups(parser, num_epochs=100, save_interval=10)
    parser.add_argument("--rank", type=cli.positive_int, default=4, help="rank of the chain (default: 4)")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run of the same settings stopped")
    cli.add_output_flags(parser, output_dir="./trained_models", save_prefix="ks_chain")
    return parser


def criterion(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The training loss, on outputs in internal units and in the chain's own order (the same for both); edit here.

    Reported losses are this times `predict_zero_loss`, which is right for a loss quadratic in its arguments. Population
    losses and floors are those of the mean squared error: with another criterion they are left out.
    """
    return torch.nn.functional.mse_loss(prediction, target)


def train(config, problem: Problem, impl: str, files: results.RunFiles, checkpoints: resume.Checkpoints) -> dict:
    """Train the chain of rank `config.rank`; the curves are on disk whenever an epoch has ended.

    What `checkpoints` found is gone on from, to the bit.

    Returns:
        the last row of the curves.
    Raises:
        Diverged: a loss that is not finite.
    """
    if checkpoints.found:
        torch.set_num_threads(checkpoints.found["threads"])
    threads = torch.get_num_threads()
    dtype = DTYPES[config.dtype]
    weight = problem.internal_weight()
    model = make_model(config, problem, weight)
    factors = [factor.detach() for factor in model.factors]

    @functools.cache
    def passes(batch):
        layout = {"batch_last": config.bs_last, "block_order": True}
        precision = config.float32_precision
        return ChainPasses(model.patterns, batch, problem.device, dtype, **layout, impl=impl, precision=precision)

    samples = Samples(
        weight.float(),
        problem.num_train,
        problem.num_validation,
        config.batch_size,
        sampling=problem.sampling,
        seed=config.seed,
        output_rows=lambda batch: passes(batch).output_rows,
        batch_last=config.bs_last,
        dtype=dtype,
    )
    torch.set_num_threads(useful_threads(problem.chain.parameters(config.rank) * config.batch_size))
    optimiser = Optimiser(
        config.optimizer,
        factors,
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

    measured = is_mean_squared_error(criterion, samples.validation[0][1])
    loss_gradient = squared_error_and_gradient if measured else functools.partial(loss_and_gradient, criterion)
    training = passes(config.batch_size)

    def step(inputs, targets, lr):
        values = [factor.to(dtype) for factor in factors]
        prediction, *inner = training.forward(inputs, values)
        loss, gradient = loss_gradient(prediction, targets, optimiser.scale)
        training.backward(gradient, inputs, values, inner, out=optimiser.gradients)
        return loss, optimiser.update(lr)

    def validate():
        values = [factor.to(dtype) for factor in factors]
        batches = ((passes(x.shape[config.bs_last]), x, y) for x, y in samples.validation)
        outputs = ((validation.forward(x, values, keep=False)[0], y) for validation, x, y in batches)
        return torch.stack([criterion(y.float(), target) for y, target in outputs]) @ samples.validation_shares

    epochs, how = make_epochs(step, samples, optimiser.state(), captured=problem.device.type == "cuda")
    cli.note(f"steps: {how}", config.quiet)
    population_interval = math.ceil(config.num_epochs / 10)
    best = Best(model, weight, keep_start=measured and config.init == "hierarchical")
    curves = []
    if checkpoints.found:
        curves = checkpoints.restore(optimiser, schedule, best)
        results.write_curves(files, curves)
    try:
        for epoch in range(len(curves) + 1, config.num_epochs + 1):
            started = time.perf_counter()
            rates = [schedule.rate(epoch, step) for step in range(samples.steps_per_epoch)]
            losses, norms = epochs.run(epoch, rates)
            train_loss, val_loss = losses.mean().item(), validate().item()
            row = {
                "epoch": epoch,
                "train_loss": train_loss * problem.predict_zero_loss,
                "val_loss": val_loss * problem.predict_zero_loss,
                "rank": config.rank,
                "lr": rates[-1],
                "epoch_seconds": time.perf_counter() - started,
            }
            if measured and (epoch % population_interval == 0 or epoch == config.num_epochs):
                row["population_loss"] = population_loss(weight, model.factors) * problem.predict_zero_loss
            if config.log_grad_norm:
                row["grad_norm"] = norms.mean().item()
            curves.append(row)
            best.offer(val_loss, row)  # first, so that an epoch on disk has a best model whenever a signal comes
            results.write_curves(files, curves)
            report(config, row, losses * problem.predict_zero_loss, norms)
            check_finite(row, losses)

            schedule.end_epoch(val_loss)
            checkpoints.offer(threads, curves, optimiser, schedule, best)
            if config.save_interval and epoch % config.save_interval == 0:
                save(model, problem.unit, files.epoch_checkpoint(epoch))
        save(model, problem.unit, files.final)
        if measured:
            epsilon = 2**-10 if config.float32_precision == "tf32" else torch.finfo(dtype).eps
            val_loss = curves[-1]["val_loss"] / problem.predict_zero_loss
            check_validation(weight, factors, val_loss, problem.num_validation, 4 * len(factors) * epsilon)
    except BaseException:
        checkpoints.write_latest()
        raise
    finally:
        if best.row is not None:
            if measured:
                best.row["population_loss"] = best.population_loss() * problem.predict_zero_loss
                results.write_curves(files, curves)
            save(best.chosen(), problem.unit, files.best)
    return curves[-1]


def make_model(config, problem: Problem, weight: torch.Tensor) -> KSLinear:
    """The chain at its initial values, in internal units.

    random: the left-most factor is zero, so that training starts from predicting 0; the others keep the variance of
    their input. hierarchical: the factorisation of W.
    """
    patterns = problem.chain.patterns(config.rank)
    if config.init == "hierarchical":
        return KSLinear.from_dense(weight, patterns=patterns, batch_last=config.bs_last).float()
    model = KSLinear.from_patterns(patterns, batch_last=config.bs_last)
    model.reset_parameters(seeded_generator(config.seed, "init"))
    with torch.no_grad():
        model.factors[0].zero_()
    return model.to(problem.device)


class Best:
    """The model with the lowest validation loss; with `keep_start`, the start unless its population loss was beaten.

    Args:
        model: the one in training.
        weight: W in internal units, float64.
        keep_start: whether the start is a result in its own right (a factorisation of W).
    """

    def __init__(self, model: KSLinear, weight: torch.Tensor, keep_start: bool):
        self.model, self.weight = model, weight
        self.start = copy.deepcopy(model) if keep_start else None
        self.val_loss, self.row, self.kept = math.inf, None, None

    def offer(self, val_loss: float, row: dict) -> None:
        if val_loss < self.val_loss:
            self.val_loss, self.row, self.kept = val_loss, row, copy.deepcopy(self.model)

    def state(self) -> dict:
        """All that changes, for a checkpoint."""
        return {"val_loss": self.val_loss, "epoch": self.row["epoch"], "factors": [*self.kept.state_dict().values()]}

    def restore(self, state: dict, curves: list[dict]) -> None:
        self.offer(state["val_loss"], curves[state["epoch"] - 1])
        for factor, values in zip(self.kept.factors, state["factors"]):
            factor.data.copy_(values)

    def population_loss(self) -> float:
        return population_loss(self.weight, self.kept.factors)

    def chosen(self) -> KSLinear:
        if self.start is not None and population_loss(self.weight, self.start.factors) <= self.population_loss():
            return self.start
        return self.kept


def check_validation(weight: torch.Tensor, factors, val_loss: float, num_validation: int, rounding: float) -> None:
    """Check that a validation loss agrees with the population loss of the same chain, within sampling error.

    Args:
        weight: W in internal units, float64.
        factors: of the chain.
        val_loss: in internal units.
        num_validation: samples behind it.
        rounding: of the root mean squared error of an output, in internal units.
    Raises:
        InternalError: it does not.
    """
    low, high = sampled_loss_range(weight, factors, num_validation)
    low, high = max(0.0, max(low, 0.0) ** 0.5 - rounding) ** 2, (high**0.5 + rounding) ** 2
    if not low <= val_loss <= high:
        raise InternalError(
            f"the validation loss is {val_loss:.6g} of predicting 0; the population loss of the same chain allows "
            f"{low:.6g} to {high:.6g}. One of them is computed wrongly: please report it with the command line"
        )


def is_mean_squared_error(loss, target: torch.Tensor) -> bool:
    """Whether a criterion is the mean squared error, tried on targets and a prediction off by uneven amounts."""
    prediction = target + torch.linspace(-1, 2, target.numel(), device=target.device).reshape(target.shape)
    return torch.allclose(loss(prediction, target), torch.nn.functional.mse_loss(prediction, target))


def save(model: KSLinear, unit: float, path) -> None:
    """Save a model in the user's units: `unit` times its dense weight, the scale shared evenly by the factors."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for factor in scaled.factors:
            factor.mul_(unit ** (1 / len(scaled.factors)))
    results.save_tensors(scaled.to_payload(), path)


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


def is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def main(argv=None) -> int:
    interrupted = cli.interrupt_on_signals()
    launch.stop_with_parent()
    config = build_parser().parse_config(argv)
    with contextlib.ExitStack() as held:
        with cli.usage_errors(SCRIPT):
            problem = resolve(config)
            files = results.RunFiles(results.prepare_output_dir(config.output_dir), config.save_prefix, config.rank)
            held.enter_context(locked(files.lock, "another training", wait=10))
            settings = resume.settings_of(config, problem) | {"rank": config.rank}
            if not (config.resume and resume.goes_on(files, settings)):
                files.remove()
            elif resume.is_finished(files, config.num_epochs):
                print(f"rank {config.rank}: finished before; {files.final}")
                return cli.EXIT_OK
        return run(config, problem, settings, files, interrupted)


def run(config, problem: Problem, settings: dict, files: results.RunFiles, interrupted) -> int:
    """Train, with everything recorded that a reader of the results may ask for.

    Returns:
        the exit code.
    """
    dtype, precision = DTYPES[config.dtype], config.float32_precision
    patterns = problem.chain.patterns(config.rank)
    impl, reason = choose_impl(config.impl, problem.device, patterns, config.batch_size, dtype, precision)
    for text in (*problem.notes, f"impl {impl}: {reason}"):
        cli.note(text, config.quiet)
    record = {
        "settings": settings,
        "arguments": vars(config),
        "problem": problem.describe(),
        "impl": {"name": impl, "reason": reason},
        "provenance": results.provenance(),
    }
    results.write_json(files.config, record)
    before = results.read_json(files.training_log) or {}
    log = {"status": "running", "started": results.now()}
    results.write_json(files.training_log, log)
    checkpoints = resume.Checkpoints(files, settings, config.resume_interval, look=config.resume)
    spent = before.get("train_seconds", 0.0) if checkpoints.found else 0.0
    started = time.perf_counter()
    code = cli.EXIT_FAILED
    try:
        last = train(config, problem, impl, files, checkpoints)
        log["status"], code = "finished", cli.EXIT_OK
    except Diverged as error:
        log |= {"status": "diverged", "error": str(error)}
    except BaseException as error:
        if interrupted.is_set():
            log |= {"status": "interrupted", "error": "interrupted; the epochs so far are kept, --resume goes on"}
            code = cli.EXIT_INTERRUPTED
        elif is_out_of_memory(error):
            smaller = max(1, config.batch_size // 2)
            advice = f"try --batch_size {smaller}, fewer --num_samples or --dtype bfloat16"
            log |= {"status": "out of memory", "error": f"out of memory on {problem.device}; {advice}"}
        elif isinstance(error, OSError):
            advice = "mend that and run the same command with --resume"
            log |= {"status": "failed", "error": f"{error.strerror}: {error.filename or files.directory}; {advice}"}
        else:
            log |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            raise
    finally:
        log |= {"ended": results.now(), "train_seconds": spent + time.perf_counter() - started}
        with contextlib.suppress(OSError):  # a full disk has been reported
            results.write_json(files.config, record | {"ended": log["ended"]} | results.peak_memory(problem.device))
            results.write_json(files.training_log, log)
    if code != cli.EXIT_OK:
        print(f"{SCRIPT}: {log['error']}", file=sys.stderr)
        return code
    files.resume.unlink(missing_ok=True)
    share = f", {last['val_loss'] / problem.predict_zero_loss:.2%} of predicting 0" if "population_loss" in last else ""
    print(f"rank {config.rank}: validation loss {last['val_loss']:.6g}{share}; {files.final}")
    return code


if __name__ == "__main__":
    sys.exit(main())
