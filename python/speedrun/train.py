"""The training program: `speedrun train`, or `torchrun --nproc_per_node=N -m speedrun.train`.

main() is the program; below it are its phases in call order. Environment variables are read in
`start_run` only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun import hardware, recipes, trackers
from speedrun.autosave import Checkpoints, Start, describe, find_start
from speedrun.baseline_model import BaselineGPT
from speedrun.batch import MicroBatch
from speedrun.checkpoint import checkpoints_of
from speedrun.comms import Comms
from speedrun.config import BaselineConfig, Config, ConfigError, to_dict
from speedrun.config_check import check
from speedrun.data import StepBatch
from speedrun.estimate import Precision
from speedrun.evaluate import evaluate
from speedrun.failures import EXIT_CODES, EXIT_STOPPED, Stopped, Watchdog
from speedrun.guards import Guard
from speedrun.model import GPT
from speedrun.ops import backends_used
from speedrun.ops._dispatch import decide
from speedrun.ops.attention import attention_backends
from speedrun.ops.softcap_ce import NO_TARGET
from speedrun.optim import Optimizer
from speedrun.overrides import apply_overrides
from speedrun.passes import PassGraphs, forward_backward
from speedrun.peers import connect
from speedrun.plot import plot_loss
from speedrun.prefix_table import build_prefix_table
from speedrun.preflight import check_port, preflight
from speedrun.runlog import Clock, LossQueue, RunError, RunLog, new_run_folder
from speedrun.schedule import Schedule, StepPlan, scaled
from speedrun.sources import (
    DataSource,
    batch_shapes,
    made_up_batch,
    to_micro_batches,
    training_loader,
    validation_data,
)
from speedrun.step_dump import Origin
from speedrun.target import target_of
from speedrun.tokenizer import Tokenizer
from speedrun.world_size import check_world_size, record_obstacles


def main(args: argparse.Namespace, watchdog: Watchdog) -> None:
    """One run. ConfigError, DataError and RunError have a message for the user; or Stopped."""
    config = configure(args)
    run = start_run(args, config, watchdog)
    start = find_start(args, run.comms)
    precision = Precision(run.dtype, run.fp8)
    config, data, tokenizer = preflight(args, config, run.comms, run.device, precision)
    schedule = Schedule(config.schedule)
    log = start_log(args, config, data, run, watchdog, start)

    model = build_model(config, run, args.seed)
    model.compile(choose_compile(args.compile, run))
    optimizer = Optimizer(model.named_parameters(), config.optim, run.comms, model.named_buffers)
    graphs = None
    if config.cuda_graph and run.device.type == "cuda":
        graphs = PassGraphs(model, optimizer)
    warm_up(model, optimizer, schedule, config, data, run, tokenizer, graphs)
    log.kernels(backends_used(), attention_backends())
    origin = Origin(to_argv(args), data.format, precision)
    guard = Guard(config, model, run.comms, log, origin, watchdog)
    losses = LossQueue(guard.look, schedule.tokens_before(start.step))
    clock = Clock(run.device)
    described = describe(args.seed, config, data, precision, run.comms)
    checkpoints = Checkpoints(args, described, optimizer, guard, log)
    checkpoints.restore(start, clock)
    position, ranks = start.position, (run.comms.rank, run.comms.world_size)
    loader = training_loader(config, data, schedule, *ranks, start.step, position)
    with log, loader, guard:
        log.say(f"ready to train {hardware.process_age_s():.1f} s after the start")
        clock.start()
        guard.prefix_table = prefix_table = load_prefix_table(tokenizer, config, run)
        for plan in schedule.plans_from(start.step):
            watchdog.step(plan.step)
            checkpoints.before_step(plan, position, clock, losses)
            if plan.validate:
                losses.log_all(log)
                with clock.paused(), watchdog.phase("validation"):
                    val_loss = validate(model, config, data, plan, run, watchdog.beat)
                    log.validation(plan.step, val_loss, clock.elapsed_s)
            if plan.last:
                break
            batch = loader.next_step()
            batches = to_micro_batches(batch, config, run.device)
            inputs = (model, optimizer, batches, plan, prefix_table, graphs)
            position = batch.position
            loss, is_good = guard.run(plan, batch, functools.partial(forward_backward, *inputs))
            if is_good:
                optimizer.step(plan)
                losses.push(loss, plan, clock.now_s(), run.comms, watchdog.stop_requested)
            else:
                optimizer.leave_out(plan)
            losses.log_ready(log)
    checkpoints.finish(plan, position, clock)
    with watchdog.phase("the end", allowed_s=600):
        finish(config, data, log)


def configure(args: argparse.Namespace) -> Config:
    """The recipe with --set and --steps applied, checked."""
    config = apply_overrides(recipes.load(args.recipe), args.set)
    if args.steps is not None:
        config = dataclasses.replace(config, schedule=scaled(config.schedule, args.steps))
    if args.repeat_data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, repeat=True))
    check(config)
    return config


@dataclasses.dataclass(frozen=True)
class Run:
    """Where this process runs. `dtype` is that of parameters and activations."""

    comms: Comms
    device: torch.device
    dtype: torch.dtype
    fp8: bool = False


def start_run(args: argparse.Namespace, config: Config, watchdog: Watchdog) -> Run:
    """Read torchrun's environment, choose the device, join the process group."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    check_world_size(config, world_size)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and args.out and not args.resume:
        args.resume = "auto"  # torchrun --max-restarts: the attempt before left what it had saved
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is there
        torch.use_deterministic_algorithms(True)
    if args.device == "cuda" and torch.cuda.device_count() < local_world_size:
        raise ConfigError(
            f"{local_world_size} ranks, but {torch.cuda.device_count()} GPUs are visible: "
            "use --device cpu or fewer ranks"
        )
    if args.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, hardware.num_cpus() // local_world_size))
        hardware.keep_freed_memory()
    comms = Comms(rank, world_size)
    if world_size > 1:
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            check_port(os.environ.get("MASTER_PORT"))
        peers = connect(rank, world_size, os.environ)
        watchdog.join(peers, comms)
        peers.init_process_group("nccl" if device.type == "cuda" else "gloo")
    wanted = hardware.best_precision(device) if config.precision == "auto" else config.precision
    dtype = torch.float32 if wanted == "float32" else torch.bfloat16
    has_fp8 = not isinstance(config.model, BaselineConfig)
    return Run(comms, device, dtype, fp8=has_fp8 and wanted == "recipe")


def start_log(
    args: argparse.Namespace,
    config: Config,
    data: DataSource,
    run: Run,
    watchdog: Watchdog,
    start: Start,
) -> RunLog:
    """The run's folder, on rank 0; the other ranks learn whether it could be made."""
    folder, problem = None, None
    if run.comms.rank == 0:
        try:
            folder = start.folder or new_run_folder(args.out, config.name)
        except RunError as error:
            problem = str(error)
    shared, problem = run.comms.gather_objects((folder, problem))[0]
    if problem:
        raise RunError(problem)
    watchdog.log_to(shared)
    log = RunLog(folder, config.schedule.total_steps, config.log_interval)
    obstacles = record_obstacles(config, run.comms.world_size)
    log.header(
        config,
        {
            "seed": args.seed,
            "device": hardware.device_name(run.device),
            "world_size": run.comms.world_size,
            "record_eligible": not obstacles,
            "record_obstacles": obstacles,
            "dtype": str(run.dtype),
            "fp8": run.fp8,
            "train_data": [str(path) for path in data.train],
            "val_data": [str(path) for path in data.val],
            "tokenizer": data.format.tokenizer,
            "target_loss": target_of(config, data)[0],
        },
        start.step,
    )
    trackers.attach(args.trackers, log, to_dict(config) | {"seed": args.seed})
    log.say(
        f"recipe {config.name}: {config.schedule.total_steps} steps on {run.comms.world_size} x "
        f"{hardware.device_name(run.device)}, {str(run.dtype).removeprefix('torch.')}; "
        f"log in {folder}"
    )
    for note in start.notes:
        log.say(note)
    if start.checkpoint is not None:
        log.say(f"goes on at step {start.step}, from {start.checkpoint}")
    for obstacle in obstacles:
        log.say(f"no record: {obstacle}")
    if run.device.type == "cpu" and (config.cuda_graph or config.optim.cuda_graph):
        log.say("cuda_graph is for GPUs: here every launch is made by itself")
    if config.data.repeat:
        log.say("data.repeat is on: after the last shard the token stream starts again")
    return log


def build_model(config: Config, run: Run, seed: int) -> GPT | BaselineGPT:
    if isinstance(config.model, BaselineConfig):
        model = BaselineGPT(config.model, run.dtype)
    else:
        model = GPT(config.model, run.dtype, run.fp8)
    model.init_weights(seed)
    return model.to(run.device)


def choose_compile(mode: str, run: Run) -> str:
    """What --compile auto means on this device: nothing where kernels of ours do the elementwise
    work of a layer, since ten kinds of layer in eight shapes take minutes to compile."""
    if mode != "auto":
        return mode
    if run.device.type != "cuda" or decide("residual_mix", run.device, triton=True) != "torch":
        return "off"
    return "regional"


def warm_up(
    model: GPT,
    optimizer: Optimizer,
    schedule: Schedule,
    config: Config,
    data: DataSource,
    run: Run,
    tokenizer: Tokenizer | None,
    graphs: PassGraphs | None,
) -> None:
    """Run every shape once on made-up tokens, before the clock; then put all state back."""
    snapshot = optimizer.snapshot()
    prefix_table = None
    if tokenizer is not None:  # the real one is made when the clock runs
        size = config.model.padded_vocab_size
        prefix_table = torch.full((size,), NO_TARGET, device=run.device)
    shapes = batch_shapes(config, schedule, run.comms.world_size)
    for i, (shape, start) in enumerate(zip(shapes, schedule.starts, strict=True)):
        made_up = made_up_batch(config, shape, data.format.vocab_size, run.comms.world_size, seed=i)
        batches = to_micro_batches(made_up, config, run.device)
        plan = schedule.plan(start)
        for step in range(config.schedule.adam_interval):
            due = step == config.schedule.adam_interval - 1
            forward_backward(model, optimizer, batches, plan, prefix_table, graphs)
            optimizer.step(dataclasses.replace(plan, step=step, adam=due))
        evaluate(model, batches, plan.windows, run.comms)
    optimizer.restore(snapshot)


def validate(
    model: GPT,
    config: Config,
    data: DataSource,
    plan: StepPlan,
    run: Run,
    beat: Callable[[], None],
) -> float:
    """Mean validation loss, with this step's windows. `beat` is called in front of each part."""

    def batches() -> Iterator[MicroBatch]:
        for part in validation_data(config, data, run.comms.rank, run.comms.world_size):
            beat()
            arrays = [part.inputs, part.targets, part.cu_seqlens, part.bigram_rows, part.sign_rows]
            rows = [None if array is None else array[None] for array in arrays]
            yield from to_micro_batches(StepBatch(*rows, position=None), config, run.device)

    return evaluate(model, batches(), plan.windows, run.comms)


def load_prefix_table(tokenizer: Tokenizer | None, config: Config, run: Run) -> Tensor | None:
    """(V,) on the device; None without a prefix term. A run's clock pays for it."""
    if tokenizer is None:
        return None
    table = build_prefix_table(tokenizer, config.model.padded_vocab_size)
    return torch.from_numpy(table).to(run.device)


def finish(config: Config, data: DataSource, log: RunLog) -> None:
    """The verdict, the picture and what to try next, on rank 0."""
    if log.folder is None or log.val_loss is None:
        return
    target, what = target_of(config, data)
    if target is None:
        log.say(f"final val_loss {log.val_loss:.4f} nats a token")
    else:
        verdict = "reached" if log.val_loss <= target else "not reached"
        log.say(f"final val_loss {log.val_loss:.4f}; target {target:.4f}, {what}: {verdict}")
    try:
        log.say(f"loss curve: {plot_loss(log.folder, config.name, target)}")
    except ImportError:
        log.say("no loss curve: matplotlib is missing (pip install 'nanogpt-speedrun[cli]')")
    sample = f"  text from it      speedrun sample {log.folder}\n"
    sample *= bool(checkpoints_of(log.folder))
    log.say(NEXT_STEPS.format(recipe=config.name, folder=log.folder, sample=sample))
    log.end()
    log.close()


NEXT_STEPS = """next:
{sample}  your own text     speedrun train --recipe tiny --text FILE
  what it computes  speedrun explain --recipe {recipe}
  worth of a part   speedrun ablate --recipe {recipe}
  two processes     torchrun --standalone --nproc_per_node=2 -m speedrun.train --recipe {recipe}
  beside others     speedrun plot {folder} OTHER
  every number      {folder}/metrics.jsonl, config.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="tiny", help=f"one of: {', '.join(recipes.names())}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a config value"
    )
    parser.add_argument("--steps", type=int, help="total steps; the schedule scales with it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="DIR", help="folder of token shards")
    source.add_argument("--text", metavar="FILE", help="any text, as bytes: 90 %% train, 10 %% val")
    parser.add_argument(
        "--repeat-data", action="store_true", help="start again after the last shard"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the run (default: runs/TIME_RECIPE)"
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "off", "regional", "full"),
        default="auto",
        help="torch.compile: each kind of layer, or the whole trunk (auto: regional on a GPU where "
        "kernels of ours don't serve)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: 0)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where a GPU is visible",
    )

    parser.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="without progress, after which a run of several ranks is ended (default: ten times "
        "the longest step so far, at least 10; 0: never)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="only PyTorch operations that give the same bits each time, which may be slower; "
        "so a resumed run is bitwise the uninterrupted one, on as many ranks",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="write a checkpoint every so many steps and at the end (default: when a signal stops "
        "the run, and at the end of a run with less than 100 MB to save)",
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=2,
        help="newest checkpoints that are kept (default: 2; 0: none is ever written)",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest good checkpoint of a run's folder, or (auto) of --out's, if "
        "there is one; or start a new run from one checkpoint",
    )
    trackers.add_arguments(parser)
    parser.epilog = EXIT_CODES


def to_argv(args: argparse.Namespace) -> list[str]:
    """The arguments again as a command line, for the processes that torchrun starts."""
    argv = [f"--set={override}" for override in args.set]
    for name in ("recipe", "steps", "data", "text", "out", "compile", "seed", "device", "resume"):
        value = getattr(args, name)
        argv += [] if value is None else [f"--{name}={value}"]
    argv += [f"--save-every={args.save_every}", f"--keep={args.keep}"]
    argv += [] if args.hang_timeout is None else [f"--hang-timeout={args.hang_timeout}"]
    argv += ["--deterministic"] * args.deterministic
    argv += [f"--{name}" for name in args.trackers]
    return argv + ["--repeat-data"] * args.repeat_data


def run(args: argparse.Namespace) -> int:
    """main() with readable errors; the process's exit code."""
    rank = os.environ.get("RANK")
    who = "speedrun" if rank is None else f"speedrun: rank {rank}"
    warnings.showwarning = lambda message, *_: print(f"{who}: warning: {message}", file=sys.stderr)
    with Watchdog(None if rank is None else int(rank), args.hang_timeout) as watchdog:
        try:
            main(args, watchdog)
            code = 0
        except Stopped as stopped:
            print(f"{who}: {stopped}", file=sys.stderr, flush=True)
            code = EXIT_STOPPED
        except (Exception, KeyboardInterrupt) as error:
            code = watchdog.fail(error)
        if dist.is_initialized():
            dist.destroy_process_group()
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="speedrun.train", description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
