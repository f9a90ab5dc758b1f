"""Made-up runs and logs, for judging and for records' folders."""

import dataclasses
import json

from speedrun import recipes, runlog
from speedrun.runlog import RunLog

H100 = "NVIDIA H100 80GB HBM3"
UNTRAINED = 10.83


def write_run(folder, seed, final, *, recipe="record_089", num_steps=20, last=None, **changes):
    """A run's folder as RunLog leaves it: an H100 run of a commit, with 16 and 4 steps' loss.

    last: the step at which it was cut off. changes: of the header's values, "a.b" as a__b.
    """
    config = recipes.load(recipe)
    schedule = dataclasses.replace(config.schedule, num_steps=num_steps, extension_steps=0)
    model = dataclasses.replace(config.model, vocab_size=50_257)  # the data's, as training does
    config = dataclasses.replace(config, schedule=schedule, model=model)
    facts = {
        "seed": seed,
        "device": H100,
        "world_size": 8,
        "record_eligible": True,
        "record_obstacles": [],
        "dtype": "torch.bfloat16",
        "fp8": True,
        "train_data": ["data/fineweb_train_000001.bin"],
        "val_data": ["data/fineweb_val_000000.bin"],
        "tokenizer": "gpt2",
    }
    folder.mkdir(parents=True)
    log = RunLog(folder, num_steps, log_interval=1)
    log.header(config, facts)
    log.validation(0, UNTRAINED, 0.0)
    for step in range(1, num_steps + 1):
        if last is not None and step > last:
            break
        log.training(step, 4.0 - 0.7 * step / num_steps + 1e-3 * seed, 2.0 * step, 100 * step)
        if step % 4 == 0 and step < num_steps:
            log.validation(step, 3.9 - 0.6 * step / num_steps + 1e-3 * seed, 2.0 * step)
    if last is None:
        log.validation(num_steps, final, 2.0 * num_steps + 0.1 * seed)
    log.close()
    change_header(folder, environment__commit="0123abc", **changes)
    return folder


def change_header(folder, **changes):
    path = folder / "metrics.jsonl"
    first, _, rest = path.read_text().partition("\n")
    header = json.loads(first)
    for key, value in changes.items():
        *way, name = key.split("__")
        place = header
        for word in way:
            place = place[word]
        place[name] = value
    path.write_text(f"{json.dumps(header)}\n{rest}")


def without_slow_facts(monkeypatch):
    """Hashing the package and asking git once a test is enough."""
    monkeypatch.setattr(
        runlog, "source_hashes", lambda: {"train.py": "ab" * 32, "_C.so": "cd" * 32}
    )
    monkeypatch.setattr(runlog, "git_commit", lambda: "0123abc")


SMI = (
    "| {i}  NVIDIA H100 80GB HBM3          On  |   00000000:{i}A:00.0 Off |                    0 |"
)


def public_log(final, *, total=20, restart=False, unit="ms", source="", cut=None, shift=0.0):
    """A log as public programs print it; `cut`: characters left out at its end.

    restart: the clock starts again after step 10, whose average is not a number before.
    """
    lines = ["=" * 100, "Running Python 3.12", "Running PyTorch 2.10"] if source else []
    lines += [SMI.format(i=f"  {i}") for i in range(8)]
    lines.append("=" * 100)
    for step in range(total + 1):
        time_ms = 80 * (step - 10 if restart and step > 10 else step)
        average = "nan" if restart and step <= 10 else f"{time_ms / max(step, 1):.2f}"
        time = f"{time_ms}ms" if unit == "ms" else f"{time_ms / 1000:.3f}s"
        if step:
            lines.append(f"step:{step}/{total} train_time:{time} step_avg:{average}ms")
        if step % 5 == 0:
            loss = final if step == total else UNTRAINED if step == 0 else 5 - step / 10 + shift
            lines.append(
                f"step:{step}/{total} val_loss:{loss:.4f} train_time:{time} step_avg:{average}ms"
            )
    lines.append("peak memory allocated: 30220 MiB reserved: 38672 MiB")
    text = source + "\n".join(lines) + "\n"
    return text if cut is None else text[:-cut]
