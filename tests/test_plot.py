"""`speedrun plot`: which runs are one curve, what is drawn of them, and what is refused."""

import itertools
import json
import math
import sys

import pytest

from record_helpers import UNTRAINED, public_log, without_slow_facts, write_run
from speedrun import cli, plot
from speedrun.curves import curves_of
from speedrun.record_logs import LogError, read_all

pytest.importorskip("matplotlib")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    without_slow_facts(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def drawn(folder, monkeypatch, capsys):
    """Runs the verb, which writes no file; (exit code, panels, stdout, stderr)."""
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))

    def run(*words):
        code = cli.main(["plot", *map(str, words)])
        return code, figures[-1].axes if figures else [], *capsys.readouterr()

    return run


def curves(*paths):
    return curves_of(read_all([str(path) for path in paths]))[0]


def test_seeds_are_one_curve(folder):
    """Another config, or other sources, are another; the label says in what they differ."""
    for seed in range(3):
        write_run(folder / f"s{seed}", seed, 3.27 + 0.001 * seed)
    write_run(folder / "lr", 0, 3.2, config__optim__adam__lr=0.5)
    write_run(folder / "src", 0, 3.1, sources={"train.py": "other"})
    write_run(folder / "gpu", 0, 3.1, device="other GPU")
    runs = ("s0", "s1", "s2", "lr", "src", "gpu", "s1")  # s1 twice counts once
    seeds, lr, sources, device = curves(*runs)
    assert len(seeds.runs) == 3 and "record_089" in seeds.label
    assert "mean and range, n=3" in seeds.label
    assert "optim.adam.lr=0.5" in lr.label and lr.label.startswith("lr ")
    assert "sources=" in sources.label and "n=" not in sources.label
    assert "device=other GPU" in device.label
    assert seeds.means()[-1].loss == pytest.approx(3.271)
    assert [row[-1] for row in seeds.ranges()] == [3.27, pytest.approx(3.272)]
    assert seeds.target == 3.28


def test_axes(folder):
    """Tokens and time of a validation, and of the steps between."""
    (curve,) = curves(write_run(folder / "a", 0, 3.27))
    points = [(p.step, p.tokens, p.time) for p in curve.means()]
    assert points[:3] == [(0, 0, 0.0), (4, 400, 8.0), (8, 800, 16.0)]
    assert points[-1] == (20, 2000, 40.0)
    assert curve.training[0][2][:3] == (3, 300, 6.0)


def test_another_number_of_validations(folder):
    """A run that goes on isn't drawn into the band of those that ended."""
    for seed, last in enumerate((None, None, 10)):
        write_run(folder / f"s{seed}", seed, 3.27, last=last)
    ended, other = curves("s0", "s1", "s2")
    assert len(ended.runs) == 2 and len(other.runs) == 1 and other.means()[-1].step == 8


def test_public_logs_of_one_program(folder):
    """They begin with their program; without it each is a curve of its own."""
    for name, source in (
        ("a", "x = 1\n"),
        ("b", "x = 1\n"),
        ("c", "x = 2\n"),
        ("d", ""),
        ("e", ""),
    ):
        (folder / f"{name}.txt").write_text(public_log(3.27, source=source))
    assert [len(curve.runs) for curve in curves(folder)] == [2, 1, 1, 1]
    (curve, *_) = curves(folder)
    assert curve.target == 3.28 and all(math.isnan(p.tokens) for p in curve.means())
    assert curve.training == ((), ())


def test_resumed_runs_steps_count_once(folder):
    run = write_run(folder / "a", 0, 3.27)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [line for line in lines if '"training"' in line][5:]
    (run / "metrics.jsonl").write_text("\n".join(lines + again) + "\n")
    (curve,) = curves(run)
    assert [p.step for p in curve.training[0]] == list(range(1, 21))


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")],
    ids=["png", "svg", "pdf"],
)
def test_file(folder, suffix, begins, capsys):
    """The same runs give the same file."""
    run = write_run(folder / "a", 0, 3.27)
    for name in ("one", "two"):
        assert cli.main(["plot", str(run), "--x", "step", "--out", f"new/{name}.{suffix}"]) == 0
        assert f"new/{name}.{suffix}: 1 curve of 1 run, over step" in capsys.readouterr().out
    one, two = (folder / "new" / f"{name}.{suffix}" for name in ("one", "two"))
    assert one.read_bytes().startswith(begins) and one.read_bytes() == two.read_bytes()


def test_panels(folder, drawn):
    for seed in range(2):
        write_run(folder / f"s{seed}", seed, 3.27 + 0.001 * seed)
    write_run(folder / "lr", 0, 3.2, config__optim__adam__lr=0.5)
    code, panels, out, _ = drawn("s0", "s1", "lr")
    assert code == 0 and "loss.png: 2 curves of 3 runs, over step, tokens, time" in out
    labels = [panel.get_xlabel() for panel in panels]
    assert labels == ["step", "training tokens (thousands)", "training time (s)"]
    for panel, last in zip(panels, (20, 2, 40), strict=True):
        band, lr, target = panel.lines
        assert band.get_xdata()[-1] == pytest.approx(last, rel=0.01)
        assert band.get_ydata()[-1] == pytest.approx(3.2705) and lr.get_ydata()[-1] == 3.2
        assert list(target.get_ydata()) == [3.28, 3.28] and len(panel.collections) == 1
        assert panel.get_ylim()[1] < 4.5  # the untrained model's loss of 10.8 leaves no room
    names = [text.get_text() for text in panels[0].figure.legends[0].get_texts()]
    assert len(names) == 3 and "n=2" in names[0] and names[2] == "target 3.28"


def test_units():
    """Of an axis by its label."""
    sizes = {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "minutes": 60, "(s)": 1, "step": 1}
    for _, unit, label in itertools.chain.from_iterable(plot.UNITS.values()):
        assert unit == next(size for word, size in sizes.items() if word in label)


@pytest.mark.parametrize("losses", [(3.4, float("nan")), (float("nan"), float("nan"))])
def test_a_run_that_diverged(folder, drawn, losses):
    """Its curve has a gap; the panels begin and end where there are numbers."""
    lines = [f"step:0/10 val_loss:{UNTRAINED:.4f} train_time:0ms step_avg:nanms"]
    for step, loss in zip((5, 10), losses, strict=True):
        lines.append(f"step:{step}/10 val_loss:{loss:.4f} train_time:{step}00ms step_avg:100ms")
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    code, panels, _, _ = drawn("log.txt", "--target", 3.28)
    assert code == 0
    for panel in panels:
        low, high = panel.get_ylim()
        assert low < 3.28 < high < 4


def test_options(folder, drawn):
    run = write_run(folder / "a", 0, 3.27)
    words = ("--x", "time", "--target", 3.0, "--loss", 3.2, 3.5, "--training")
    code, (panel,), _, _ = drawn(run, *words)
    assert code == 0
    training, validation, target = panel.lines
    assert len(training.get_xdata()) == 20 and len(validation.get_xdata()) == 6
    assert target.get_ydata()[0] == 3.0 and panel.get_ylim() == (3.2, 3.5)
    assert panel.get_xlim()[0] == 24.0  # of the last validation above 3.5


def test_what_a_log_does_not_tell(folder, drawn):
    (folder / "public.txt").write_text(public_log(3.27))
    write_run(folder / "ours", 0, 3.27)
    code, panels, out, _ = drawn("public.txt", "ours")
    assert code == 0 and len(panels) == 3
    assert "not over tokens, which its log doesn't tell: public.txt" in out
    assert len(drawn("public.txt")[1]) == 2
    code, _, _, error = drawn("public.txt", "--x", "tokens")
    assert code == 1 and "--x tokens: no log here tells it; there is step, time" in error
    (folder / "statistics.md").write_text("losses = [3.27, 3.28]\n")
    code, _, out, _ = drawn("public.txt", "statistics.md")
    assert code == 0 and "statistics.md#1: a list of final losses, so without a curve" in out


def test_many_curves_differ(folder, drawn):
    for i in range(8):
        (folder / f"{i}.txt").write_text(public_log(3.27, shift=i / 100))
    _, panels, _, _ = drawn(*(f"{i}.txt" for i in range(8)))
    looks = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines[:-1]}
    assert len(looks) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["a", "--out", "x.gif"], "--out x.gif: must end in .png, .svg, .pdf"),
        (["a", "--out", "a/log.txt/x.png"], "a/log.txt: "),
        (["a", "--loss", "4", "3"], "--loss 4.0 3.0: the lower one goes first"),
        (["young"], "nothing to draw: young: no validation yet"),
        (["empty"], "empty/metrics.jsonl: empty; the run has not begun"),
    ],
)
def test_refusals(folder, drawn, words, message):
    run = write_run(folder / "a", 0, 3.27)
    header = (run / "metrics.jsonl").read_text().partition("\n")[0]
    for name, text in (("young", f"{header}\n"), ("empty", "")):
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text(text)
    code, _, _, error = drawn(*words)
    assert code == 1 and error.startswith("speedrun plot: error: ") and message in error


def test_without_matplotlib(folder, monkeypatch, capsys):
    run = write_run(folder / "a", 0, 3.27)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", str(run)]) == 1
    assert "pip install 'nanogpt-speedrun[cli]'" in capsys.readouterr().err


def test_targets(folder):
    """gzip's, where the header has its figure; none where its loss can't be compared."""
    runs = [
        write_run(folder / "a", 0, 1.5, recipe="tiny", target_loss=1.6),
        write_run(folder / "b", 0, 1.5, recipe="tiny", target_loss=None),
        write_run(folder / "c", 0, 1.5, recipe="tiny"),  # of an earlier version
    ]
    assert [curve.target for run in runs for curve in curves(run)] == [1.6, None, None]


def test_a_cut_line_is_left_out(folder):
    run = write_run(folder / "a", 0, 3.27)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "validation"})[:12])
    assert curves(run)[0].means()[-1].loss == 3.27
    with pytest.raises(LogError, match="is no JSON"):
        (run / "metrics.jsonl").write_text("{\n")
        curves(run)
