"""Everything that only a machine with a GPU can tell, in one command, and what follows from it.

    python -m benchmarks.hardware_check [--minutes N] [--jobs N] [--resume FILE] [--data DIR]
                                        [--sanitizer] [--logs DIR] [--records DIR] [--verdicts]
                                        [STEM ...]

benchmarks/README.md lists the steps. Each runs in a process of its own with a time limit, those
that time nothing --jobs at once; what has been found is written to <records>/<gpu>.json after each.
Exit code 0: nothing failed; 1: something did; 2: no GPU; 3: --minutes were over before the end, and
--resume FILE goes on.

The record: gpu, compute_capability, driver, torch, triton, commit; operators and triton_operators,
{stem: {verdict: pass|fail|skip, error, speed, source_sha256}}; steps, {name: {verdict, error,
seconds, source}}; training, what benchmarks/training_check.py found.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.report import ROOT, environment, markdown_table, replace_between, write_json
from benchmarks.run import STEMS
from benchmarks.static_check import load_script
from speedrun.ops import _dispatch

VERDICTS = ROOT / "python" / "speedrun" / "ops" / "verdicts.json"
RECORDS = ROOT / "records" / "hardware"
TABLES = {"cuda": "operators", "triton": "triton_operators"}  # backend -> where in a record

# What is worth most comes first: a lent machine may be gone before the end.
PRIORITY = (
    "head_logits",
    "attention_strip",
    "fp8_matmul",
    "relu2_mlp",
    "fp8_quantize",
    "softcap_ce",
    "attention",
    "sym_matmul",
    "polar_express",
    "polar_chain",
    "qk_norm_rope",
    "attention_epilogue",
    "residual_mix",
    "dc_attention",
    "transpose",
    "adam_step",
    "normuon_step",
)
LIMITS_S = {"build": 1500, "test": 600, "check": 300, "bench": 420, "train": 900, "sanitizer": 300}
LEAST_S = 15  # with less than this left no step is begun
NO_TESTS = {"good_codes": (0, 5)}  # pytest's 5: there was nothing to do


@dataclasses.dataclass(frozen=True)
class Step:
    """One process. `read(folder)`: what its files say, merged into the step's entry."""

    name: str
    command: list[str]
    limit_s: float
    source: str = ""  # what it depends on: an entry of --resume made from other sources is redone
    read: Callable[[Path], dict] = lambda folder: {}
    good_codes: tuple[int, ...] = (0,)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# ---- Running steps ---------------------------------------------------------------------------


def run_step(step: Step, limit_s: float, logs: Path | None = None) -> dict:
    """The step's entry: verdict, error, seconds. Survives whatever the process does.

    Its whole output goes to a file in `logs`, and the end of it into the entry of a failure.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch), Path(scratch, "log.txt")
        command = [part.replace("{folder}", scratch) for part in step.command]
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**variables, **step.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
            try:
                code, error = process.wait(limit_s), ""
            except subprocess.TimeoutExpired:
                code, error = None, f"no end after {limit_s:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if logs:
            shutil.copy(log, logs / f"{step.name.replace(' ', '_')}.txt")
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if code is not None and code < 0:
            error = f"killed by {signal.Signals(-code).name}"
        elif code is not None and code not in step.good_codes:
            error = f"exit code {code}: {lines[-1] if lines else 'no output'}"
        entry = {"verdict": "fail" if error else "pass", "error": error, "source": step.source}
        entry |= {"seconds": round(time.monotonic() - start, 1), **step.read(folder)}
        if entry["verdict"] == "fail":
            entry["tail"] = lines[-15:]
            if code != 1 and error not in entry["error"]:  # a crash after wrong results: both
                entry["error"] = "; ".join(filter(None, (entry["error"], error)))
        return entry


def run_steps(
    groups: Iterator[list[Step]],
    record: dict,
    write: Callable[[], None],
    deadline: float,
    jobs: int = 1,
    logs: Path | None = None,
) -> bool:
    """Runs what `record` lacks, and calls `write` after each step; False: the time was over before.

    The steps of a group need nothing of each other: `jobs` of them run at once. What ran out of
    memory beside others runs once more alone.
    """

    def run_one(step: Step) -> bool:
        left_s = deadline - time.monotonic()
        if left_s < LEAST_S:
            print(f"stopped before {step.name}: the time is over")
            return False
        entry = run_step(step, min(step.limit_s, left_s), logs)
        if entry["error"].startswith("no end after") and left_s < step.limit_s:
            print(f"stopped in {step.name}: the time is over")  # its own limit was not reached
            return False
        record["steps"][step.name] = entry
        seconds = entry["seconds"]
        print(f"{entry['verdict']:4} {step.name} ({seconds} s) {entry['error']}", flush=True)
        return True

    for group in groups:
        known = {step.name: record["steps"].get(step.name, {"source": None}) for step in group}
        missing = [step for step in group if known[step.name]["source"] != step.source]
        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(run_one, step) for step in missing]
            for one in as_completed(running):
                if one.result():
                    write()
        if not all(one.result() for one in running):
            return False
        for step in missing:
            if jobs > 1 and "out of memory" in record["steps"][step.name]["error"]:
                if not run_one(step):
                    return False
                write()
    return True


# ---- The steps -------------------------------------------------------------------------------


def in_order(stems: list[str]) -> list[str]:
    first = [stem for stem in PRIORITY if stem in stems]
    return first + sorted(set(stems) - set(first))


def source_of(stem: str, backend: str) -> str:
    """Of what a step would try; for CUDA the checkout's sources, which the build step builds."""
    if backend == "triton":
        return _dispatch.source_sha256(stem, "triton")
    return load_script(ROOT / "pyext" / "source_hashes.py").source_hashes().get(stem, "")


def plan(args: argparse.Namespace, stems: list[str], record: dict) -> Iterator[list[Step]]:
    """The list of README.md, in groups. A generator: later ones depend on what is found before."""
    sources = {(stem, b): source_of(stem, b) for stem in stems for b in TABLES}
    pairs = [(stem, backend) for (stem, backend), source in sources.items() if source]
    if args.device == "cuda":
        yield [build_step()]
        if record["steps"]["build"]["verdict"] == "fail":  # a library that lies about is no proof
            pairs = [(stem, backend) for stem, backend in pairs if backend != "cuda"]
        tests = [test_step(stem, backend, sources[stem, backend]) for stem, backend in pairs]
        tests.append(rest_step(record["commit"]))
    else:
        tests, pairs = [], [(stem, "torch") for stem in stems]
    checks = [check_step(args, stem, b, sources.get((stem, b), "")) for stem, b in pairs]
    yield [*tests, *checks]
    for stem in stems:
        passed = [b for s, b in pairs if s == stem and verdict_of(record, stem, b)[0] == "pass"]
        source = " ".join(sources.get((stem, b), "")[:16] for b in passed)
        if passed:
            yield [bench_step(args, stem, passed, source)]
            if record["steps"][f"bench {stem}"]["verdict"] == "fail":  # a peer's fault, or ours?
                yield [bench_step(args, stem, passed, source, peers=False)]
    yield [train_step(args, record["commit"])]
    if args.sanitizer:
        yield list(sanitizer_steps(args, stems))


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def pytest(arguments: list[str]) -> list[str]:
    return python("-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", *arguments)


def build_step() -> Step:
    """Builds and installs _C into the package's folder, unless it is what the sources say."""
    check = """
        from benchmarks import static_check
        from speedrun.ops import _dispatch
        hashes = static_check.load_script(static_check.ROOT / "pyext" / "source_hashes.py")
        assert not _dispatch.library_problem(), _dispatch.library_problem()
        assert _dispatch._built_sources() == hashes.source_hashes(), "built from other sources"
    """
    code = f"""
        import pathlib, shutil, subprocess, sys, speedrun
        from benchmarks import static_check
        check = [sys.executable, "-c", {textwrap.dedent(check)!r}]
        if subprocess.run(check, stderr=subprocess.DEVNULL).returncode:
            built = static_check.build("_C", "_host")
            for file in built.glob("_[Ch]*.so"):
                shutil.copy2(file, pathlib.Path(speedrun.__file__).parent / file.name)
            sys.exit(subprocess.run(check).returncode)
    """
    source = json.dumps(load_script(ROOT / "pyext" / "source_hashes.py").source_hashes())
    return Step("build", python("-c", textwrap.dedent(code)), LIMITS_S["build"], source)


def test_step(stem: str, backend: str, source: str) -> Step:
    """The operator's own tests of one backend; `cuda` in a test's name is its parameter."""
    chosen = ["-k", backend] if backend == "triton" else ["-m", "gpu or sm90"]
    command = pytest([f"tests/ops/test_{stem}.py", *chosen])
    return Step(f"test {stem} {backend}", command, LIMITS_S["test"], source, **NO_TESTS)


def rest_step(commit: str) -> Step:
    """The GPU tests of everything that is no operator with kernels of its own."""
    operators = [f"--ignore=tests/ops/test_{stem}.py" for stem in STEMS]
    command = pytest(["-m", "gpu or sm90", "tests", *operators])
    return Step("test rest", command, LIMITS_S["test"], commit, **NO_TESTS)


def benchmark_command(args: argparse.Namespace, stem: str, backends: list[str]) -> list[str]:
    options = [f"--backend={backend}" for backend in backends]
    shared = ["--shapes", "record", "--device", args.device, "--json", "{folder}/out.json"]
    return python("-m", "benchmarks.run", "--op", stem, *options, *shared)


def read_json(folder: Path) -> dict:
    path = folder / "out.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_step(args: argparse.Namespace, stem: str, backend: str, source: str) -> Step:
    """Every case of the record's shapes against float64, nothing timed."""

    def read(folder: Path) -> dict:
        checks = read_json(folder).get("checks", [])
        failed = [f"{c['case']}: {c['error']}" for c in checks if c["verdict"] == "fail"]
        skipped = [c["error"] for c in checks if c["verdict"] == "skip"]
        found = {"cases": len(checks) - len(skipped)}
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            return {**found, "verdict": "fail", "error": failed[0] + more}
        if skipped and len(skipped) == len(checks):
            return {**found, "verdict": "skip", "error": skipped[0]}
        return found

    command = [*benchmark_command(args, stem, [backend]), "--no-timing", "--no-peers"]
    return Step(f"check {stem} {backend}", command, LIMITS_S["check"], source, read)


def bench_step(
    args: argparse.Namespace, stem: str, backends: list[str], source: str, peers: bool = True
) -> Step:
    """Times `backends`, the reference and, if `peers`, those."""

    def read(folder: Path) -> dict:
        content = read_json(folder)
        speeds = {b: speed_of(content.get("rows", []), b) for b in backends if b != "torch"}
        return {"speeds": speeds, "roofs": content.get("roofs", {})}

    command = benchmark_command(args, stem, list(dict.fromkeys([*backends, "torch"])))
    if args.modded_nanogpt:
        command += ["--modded-nanogpt", str(args.modded_nanogpt)]
    name = f"bench {stem}" if peers else f"bench {stem} without peers"
    command += [] if peers else ["--no-peers"]
    return Step(name, command, LIMITS_S["bench"], source, read)


def speed_of(rows: list[dict], backend: str) -> dict | None:
    """{times_torch, mode, cases: {case: {us, roof_frac, others}}} in the mode nearest to training.

    times_torch: geometric mean over the cases of the time of the reference, plain or compiled by
    Inductor, whichever is faster, over ours. None where nothing was timed.
    """
    modes = [mode for mode in ("cold/graph", "cold/plain", "cpu") if rows]
    mine = [r for mode in modes for r in rows if (r["name"], r["mode"]) == (backend, mode)]
    mine = [row for row in mine if row["mode"] == mine[0]["mode"]]
    cases, ratios = {}, []
    for row in mine:
        others = row["ratios"]
        found = [others[name] for name in ("torch", "inductor") if name in others]
        ratios += [min(found)] if found else []
        cases[row["case"]] = {
            "us": round(row["median_us"], 2),
            "roof_frac": row["roof_frac"] and round(row["roof_frac"], 3),
            "others": {name: round(ratio, 3) for name, ratio in others.items()},
        }
    if not ratios:
        return None
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return {"times_torch": round(mean, 3), "mode": mine[0]["mode"], "cases": cases}


def train_step(args: argparse.Namespace, commit: str) -> Step:
    def read(folder: Path) -> dict:
        return {"training": read_json(folder)}

    command = python("-m", "benchmarks.training_check", "--json", "{folder}/out.json")
    command += ["--device", args.device, *(["--data", str(args.data)] if args.data else [])]
    command += ["--recipe", "tiny"] if args.device == "cpu" else []
    return Step("train", command, LIMITS_S["train"], commit, read)


def sanitizer_steps(args: argparse.Namespace, stems: list[str]) -> Iterator[Step]:
    """compute-sanitizer over the smoke programs; caching hides what is out of bounds."""
    plain = {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    }
    for stem in stems:
        for program in sorted((ROOT / "csrc" / "tests").glob(f"{stem}*_smoke.cu")):
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
                code = (
                    "import subprocess, sys; from benchmarks import static_check;"
                    f"program = static_check.build('{program.stem}') / '{program.stem}';"
                    "sys.exit(subprocess.run(['compute-sanitizer', '--error-exitcode=9',"
                    f"'--tool={tool}', str(program)]).returncode)"
                )
                name, limit = f"sanitizer {tool} {program.stem}", LIMITS_S["sanitizer"]
                yield Step(
                    name, python("-c", code), limit, source_of(stem, "cuda"), environment=plain
                )


# ---- What follows ----------------------------------------------------------------------------


def verdict_of(record: dict, stem: str, backend: str) -> tuple[str, str]:
    """(pass|fail|skip, error), from the operator's tests, its check and its benchmark."""
    steps = record["steps"]
    names = [f"test {stem} {backend}", f"check {stem} {backend}", f"bench {stem} without peers"]
    found = [(name, steps[name]) for name in names if name in steps]
    for name, entry in found:
        if entry["verdict"] == "fail":
            return "fail", f"{name}: {entry['error']}"
    check = steps.get(names[1])
    if check is None:
        return "skip", "not checked yet"
    return check["verdict"], check["error"]


def update_operators(record: dict, stems: list[str]) -> None:
    """Fills the record's two tables from its steps."""
    record["training"] = record["steps"].get("train", {}).get("training", {})
    for backend, table in TABLES.items():
        for stem in stems:
            check = record["steps"].get(f"check {stem} {backend}")
            if check is None and f"test {stem} {backend}" not in record["steps"]:
                continue
            verdict, error = verdict_of(record, stem, backend)
            source = (check or record["steps"][f"test {stem} {backend}"])["source"]
            speed = None
            for name in (f"bench {stem}", f"bench {stem} without peers"):
                speed = record["steps"].get(name, {}).get("speeds", {}).get(backend) or speed
            record[table][stem] = {
                "verdict": verdict,
                "error": error,
                "speed": speed,
                "source_sha256": source,
            }


def forget_stale(record: dict, stems: list[str]) -> None:
    """Drops the steps of operators whose sources have changed since."""
    steps = record["steps"]
    for stem in stems:
        for backend in TABLES:
            own = [f"test {stem} {backend}", f"check {stem} {backend}"]
            made_from = {steps[name]["source"] for name in own if name in steps}
            if made_from - {source_of(stem, backend)}:
                for name in (*own, f"bench {stem}", f"bench {stem} without peers"):
                    steps.pop(name, None)


def verdicts_from(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """What dispatch reads: operator -> backend -> a row for each GPU that it was tried on."""
    verdicts: dict[str, dict[str, list[dict]]] = {}
    for record in sorted(records, key=lambda record: record["gpu"]):
        for backend, table in TABLES.items():
            for stem, entry in sorted(record[table].items()):
                if entry["verdict"] == "skip":
                    continue
                row = {key: record[key] for key in ("gpu", "compute_capability", "commit")}
                row |= {key: entry[key] for key in ("verdict", "source_sha256")}
                row["speed"] = entry["speed"] and entry["speed"]["times_torch"]
                verdicts.setdefault(stem, {}).setdefault(backend, []).append(row)
    return dict(sorted(verdicts.items()))


def status_table(records: list[dict]) -> str:
    """Of records/hardware/README.md."""
    rows = []
    for record in sorted(records, key=lambda record: record["gpu"]):
        for backend, table in TABLES.items():
            for stem, entry in sorted(record[table].items()):
                speed = entry["speed"]
                rows.append(
                    (
                        record["gpu"],
                        stem,
                        backend,
                        entry["verdict"],
                        f"{speed['times_torch']:.2f}" if speed else "-",
                        entry["error"].replace("|", "/") or "-",
                        record["commit"],
                    )
                )
    if not rows:
        return "Nothing has been tried on hardware yet."
    return markdown_table(
        ("GPU", "operator", "backend", "verdict", "× torch", "error", "commit"), rows
    )


def read_records(folder: Path) -> list[dict]:
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != VERDICTS.name]
    return [json.loads(path.read_text()) for path in paths]


def verdicts_text(records: list[dict], about: list[str]) -> str:
    content = {"about": about, "verdicts": verdicts_from(records)}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_conclusions(folder: Path, verdicts: Path) -> None:
    """verdicts.json and the table of README.md, from all records in `folder`."""
    records = read_records(folder)
    about = json.loads(VERDICTS.read_text())["about"]
    verdicts.write_text(verdicts_text(records, about))
    readme = folder / "README.md"
    if readme.exists():
        content = replace_between(readme.read_text(), "status", status_table(records))
        readme.write_text(content)


# ---- The program -----------------------------------------------------------------------------


def new_record(device: str) -> dict:
    facts = environment()
    keys = ("gpu", "compute_capability", "driver", "torch", "triton", "commit")
    record = {key: facts[key] for key in keys}
    if device == "cpu":
        record |= {"gpu": "cpu", "compute_capability": ""}
    today = datetime.date.today().isoformat()
    return {**record, "date": today, **{table: {} for table in TABLES.values()}, "steps": {}}


def resumed(path: Path, record: dict) -> dict:
    """The record of `path`, to be gone on with; SystemExit if it is another GPU's."""
    old = json.loads(path.read_text())
    if old["gpu"] != record["gpu"]:
        sys.exit(f"{path} is of a {old['gpu']}, and this is a {record['gpu']}")
    return {**old, **{k: v for k, v in record.items() if k not in ("steps", *TABLES.values())}}


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM", help=f"of {', '.join(STEMS)}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before they are over")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="tests and checks at once (1)"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep each step's whole output")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a record to go on with")
    parser.add_argument("--data", type=Path, metavar="DIR", help="token shards for the training")
    parser.add_argument("--modded-nanogpt", type=Path, metavar="FOLDER", help="a peer's kernels")
    parser.add_argument("--sanitizer", action="store_true", help="compute-sanitizer, too")
    parser.add_argument("--records", type=Path, metavar="DIR", help="write there, and verdicts too")
    parser.add_argument("--verdicts", action="store_true", help="only conclude from the records")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    args = parser.parse_args()
    start = time.monotonic()
    records = args.records or RECORDS
    verdicts = args.records / "verdicts.json" if args.records else VERDICTS
    if args.verdicts:
        write_conclusions(records, verdicts)
        return 0
    if unknown := set(args.stems) - set(STEMS):
        parser.error(f"no checks of {', '.join(sorted(unknown))}; there are {', '.join(STEMS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("hardware_check needs a GPU, and torch sees none here; nothing was written.")
        return 2
    if args.device == "cpu" and not args.records:
        parser.error("--device cpu writes no record of ours: name a folder by --records")
    stems = in_order(args.stems or STEMS)
    record = new_record(args.device)
    if args.resume:
        record = resumed(args.resume, record)
        forget_stale(record, stems)
    path = records / file_name(record["gpu"])

    def write() -> None:
        update_operators(record, stems)
        write_json(path, record)

    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    deadline = start + args.minutes * 60
    done = run_steps(plan(args, stems, record), record, write, deadline, args.jobs, args.logs)
    write()
    write_conclusions(records, verdicts)
    failed = [name for name, entry in record["steps"].items() if entry["verdict"] == "fail"]
    print(f"{len(record['steps'])} steps, {len(failed)} failed; written to {path} and {verdicts}")
    if not done:
        print(f"go on: python -m benchmarks.hardware_check --resume {path}")
        return 3
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
