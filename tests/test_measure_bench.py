"""The benchmark: rows, what they refuse to say, and when it stops."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cassetta.kernels import dispatch, engines
from cassetta.layers import ConvBlock
from cassetta.measure import bench, cases, charts, correct, passes, peers, roofs, rows, stages
from cassetta.measure.passes import in_memory
from cassetta.measure.spending import Budget

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Roofs by decree, and few rounds."""
    monkeypatch.setattr(roofs, "roofs", lambda device, dtype: roofs.Roofs(1e10, 1e11))


def plan(folder, *names, **options):
    chosen = {"dtypes": ["fp32"], "small": True, "rounds": 2, "passes": ["forward+backward"]}
    return bench.Plan([cases.find(name) for name in names], CPU, folder, **{**chosen, **options})


def run(one):
    """What was reported, and whether there was time for all of it."""
    reported = []
    complete = bench.run(one, lambda group, found: reported.append((group, found)))
    return reported, complete


def written(folder):
    return {path.name: rows.read([path]) for path in folder.glob("*/*.csv")}


def test_rows_have_these_columns_and_say_what_they_rest_on(tmp_path):
    reported, complete = run(plan(tmp_path, "block-5-d1", "passes-21", passes=bench.PASSES))
    assert complete
    assert [group.what for group, _ in reported] == [*bench.PASSES, *passes.NAMES]
    files = written(tmp_path)
    assert set(files) == {"block.csv", "pass.csv"}
    (path,) = tmp_path.glob("*/block.csv")
    assert path.read_text().splitlines()[0] == (
        "case,pass,engine,dtype,layout,ms,p20,p80,peak_mib,kept_mib,gflop,moved_mib,roof_fraction,best_peer,"
        "ratio_to_best_peer,error,gpu,driver,torch,triton,cudnn,commit,date"
    )
    for row in files["block.csv"] + files["pass.csv"]:
        assert row["error"] == ""
        assert float(row["p20"]) <= float(row["ms"]) <= float(row["p80"])
        assert float(row["roof_fraction"]) > 0
        assert row["gpu"].startswith("cpu: ")
        assert row["torch"] == torch.__version__
        assert row["commit"]
        assert row["case"].endswith(" (small)")
    block = [(r["engine"], r["layout"]) for r in files["block.csv"][:4]]
    assert block == [(e, layout) for layout in peers.LAYOUTS for e in ("reference", "eager")]
    assert all(float(r["gflop"]) > 0 for r in files["block.csv"])
    image = 5 * 16**3 * 4 / 2**20
    touched = {"inference": 2, "forward+backward": 5, "step": 5}
    for row in files["block.csv"]:
        assert float(row["moved_mib"]) == pytest.approx(touched[row["pass"]] * image, rel=1e-4)
    images = {
        row["pass"]: float(row["moved_mib"]) for row in files["pass.csv"] if row["engine"] != "copy"
    }
    assert images["prologue_dgrad"] == pytest.approx(3 * 21 * 8**3 * 4 / 2**20, rel=1e-4)
    assert all(bool(r["kept_mib"]) == (r["pass"] != "inference") for r in files["block.csv"])


def test_ratios_are_to_the_best_peer(tmp_path):
    run(plan(tmp_path, "block-5-d1"))
    (found,) = written(tmp_path).values()
    eager = {r["layout"]: float(r["ms"]) for r in found if r["engine"] == "eager"}
    best = min(eager, key=eager.__getitem__)
    for row in found:
        if row["engine"] == "eager":
            assert row["best_peer"] == row["ratio_to_best_peer"] == ""
        else:
            assert row["best_peer"] == f"eager {best}"
            expected = eager[best] / float(row["ms"])
            assert float(row["ratio_to_best_peer"]) == pytest.approx(expected, rel=1e-3)


def test_a_ratio_needs_a_peer_and_a_number():
    empty = dict.fromkeys(rows.COLUMNS, "")
    ours, broken = {**empty, "engine": "auto", "ms": 2.0}, {**empty, "engine": "library"}
    rows.compare([ours, broken], [{**empty, "engine": "eager"}])
    assert ours["best_peer"] == ""
    slow = {**empty, "engine": "eager", "layout": "last", "ms": 6.0}
    fast = {**empty, "engine": "monai", "layout": "first", "ms": 3.0}
    rows.compare([ours, broken], [slow, fast])
    assert (ours["best_peer"], ours["ratio_to_best_peer"]) == ("monai first", 1.5)
    assert broken["best_peer"] == fast["best_peer"] == ""


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    one = plan(tmp_path, "block-5-d1", layouts=["first"])
    assert len(run(one)[0]) == 1
    assert run(one) == ([], True)
    assert len(run(one._replace(layouts=peers.LAYOUTS))[0]) == 1
    assert len(run(one._replace(again=True))[0]) == 1
    elsewhere = {**rows.facts(CPU), "commit": "another"}
    monkeypatch.setattr(rows, "facts", lambda device: elsewhere)
    assert len(run(one)[0]) == 1
    (found,) = written(tmp_path).values()
    assert len(found) == 2 + 4 + 2 + 2


@pytest.fixture
def clock(monkeypatch):
    """The time, which only those move who measure: seconds by group of cases."""
    fake = SimpleNamespace(now=0.0, takes={"network": 100.0, "block": 10.0})
    monkeypatch.setattr(time, "monotonic", lambda: fake.now)

    def measure(group, plan, budget):
        fake.now += fake.takes[group.case.group]
        return [{**bench._empty(group, plan, one), "ms": 1.0} for one in bench._rivals(group, plan)]

    monkeypatch.setattr(bench, "measure", measure)
    return fake


def test_what_would_not_end_within_the_budget_is_not_begun(tmp_path, clock):
    """By what its kind has taken; what is shorter is, and another run goes on."""
    one = plan(tmp_path, "block-5-d1", "meshnet", "unet3d-instance", "block-5-d2", budget=205)
    reported, complete = run(one)
    assert not complete
    assert [group.case.name for group, _ in reported] == ["block-5-d1", "meshnet", "block-5-d2"]
    assert clock.now == 120
    reported, complete = run(one)
    assert complete
    assert [group.case.name for group, _ in reported] == ["unet3d-instance"]


def test_a_group_that_cannot_end_in_time_leaves_no_row(tmp_path, monkeypatch):
    """Its rivals are compared: some of them would tell nothing."""
    budget, prepare = Budget(60), stages.NetworkStage.prepare

    def slow(self, rival):
        budget.seconds = 0.0
        return prepare(self, rival)

    monkeypatch.setattr(stages.NetworkStage, "prepare", slow)
    one, reported = plan(tmp_path, "block-5-d1", layouts=["first"]), []
    assert not bench.run(one, lambda group, found: reported.append(group), budget)
    assert not reported
    assert not written(tmp_path)


def test_it_is_told_where_the_time_went(tmp_path):
    budget = Budget(1000)
    bench.run(plan(tmp_path, "block-5-d1", layouts=["first"]), lambda *_: None, budget)
    assert {*budget.spent} == {
        ("all engines", "roofs"), ("all engines", "truth"),
        ("reference", "first run"), ("reference", "check"), ("reference", "memory"),
        ("eager", "first run"), ("eager", "memory"),
        ("reference", "timing"), ("eager", "timing"),
    }  # fmt: skip
    assert 0 < sum(budget.spent.values()) <= 1000 - budget.left


def test_a_wrong_engine_has_no_number(tmp_path, monkeypatch):
    class Off(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return 1.01 * self.net(x)

    monkeypatch.setattr(peers, "as_it_is", Off)
    run(plan(tmp_path, "block-5-d1"))
    (found,) = written(tmp_path).values()
    for row in found:
        if row["engine"] == "reference":
            assert row["error"].startswith("wrong: its output is off by 0.01 of its size")
            assert row["ms"] == row["ratio_to_best_peer"] == row["gflop"] == ""
        else:
            assert float(row["ms"]) > 0


def test_a_wrong_pass_has_no_number(tmp_path, monkeypatch):
    wrong = correct.Expected([torch.ones(1)], [torch.ones(1)])
    monkeypatch.setattr(passes.Work, "expected", lambda self, what: wrong)
    run(plan(tmp_path, "passes-21"))
    (found,) = written(tmp_path).values()
    for row in found:
        assert row["error"].startswith("wrong: ") == (row["engine"] == "reference")
        assert bool(row["ms"]) == (row["engine"] == "copy")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (RuntimeError("no\n  engine"), "RuntimeError: no engine"),
    ],
)
def test_a_rival_that_fails_is_a_row_too(tmp_path, monkeypatch, error, words):
    prepare = stages.NetworkStage.prepare

    def failing(self, rival):
        if rival.engine == "eager":
            raise error
        return prepare(self, rival)

    monkeypatch.setattr(stages.NetworkStage, "prepare", failing)
    run(plan(tmp_path, "block-5-d1", layouts=["first"]))
    ((ours, eager),) = written(tmp_path).values()
    assert (eager["error"], eager["ms"]) == (words, "")
    assert ours["ms"]
    assert ours["best_peer"] == ""


def test_without_memory_for_the_test_nothing_is_timed(tmp_path, monkeypatch):
    def failing(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(correct, "truth", failing)
    (((_, found),), complete) = run(plan(tmp_path, "block-5-d1"))
    assert complete
    assert {row["error"] for row in found} == {"before any rival ran: out of memory"}
    assert {row["ms"] for row in found} == {""}


def test_other_packages_must_have_the_same_network(tmp_path, monkeypatch):
    case = cases.find("block-5-d1")
    monkeypatch.setitem(peers._OTHERS, case.name, {"monai": peers._basic_unet})
    one = plan(tmp_path, case.name, layouts=["first"], passes=["inference"], again=True)
    makers = [None, lambda *args: case.make(), lambda *args: nn.Conv3d(5, 7, 1)]
    found = []
    for make in makers:
        module = None if make is None else SimpleNamespace(BasicUNet=make)
        monkeypatch.setitem(sys.modules, "monai.networks.nets", module)
        ((_, reported),), _ = run(one)
        found.append({row["engine"]: row for row in reported}["monai"])
    missing, same, different = found
    assert missing["error"].startswith("ImportError: skipped: ")
    assert "pip install monai" in missing["error"]
    assert same["ms"]
    assert same["error"] == ""
    assert "not the same network: " in different["error"]
    assert different["ms"] == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its compiler's own imports
@pytest.mark.parametrize("mode", ["compiled", "max-autotune"])
def test_compiled_networks_meet_compiled_networks(tmp_path, monkeypatch, mode):
    asked = []
    compile = lambda net, **options: asked.append(options) or net  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile)
    run(plan(tmp_path, "block-5-d1", "passes-21", modes=[mode], layouts=["first"]))
    ((ours, theirs),) = written(tmp_path).values()
    assert (ours["engine"], theirs["engine"]) == (f"auto {mode}", mode)
    assert ours["best_peer"] == f"{mode} first"
    assert {one["mode"] for one in asked} == {"default" if mode == "compiled" else mode}
    assert peers.mode_of(ours["engine"]) == peers.mode_of(theirs["engine"]) == mode


def test_on_a_gpu_every_engine_meets_every_peer():
    """Asked of a device that need not be there."""
    gpu = torch.device("cuda")
    case = cases.find("nnunet-plain")
    found = [(r.engine, r.role) for r in peers.rivals(case, gpu, "eager", ["last"])]
    ours = [(name, "ours") for name in ("auto", "library", "gemm", "reference")]
    assert found == [*ours, ("eager", "peer"), ("nnunet", "peer")]
    signal = peers.rivals(cases.find("unet1d"), gpu, "eager", peers.LAYOUTS)
    assert {r.layout for r in signal} == {"first"}
    assert [r.engine for r in passes.rivals(gpu, ["first"])] == ["library", "reference", "copy"]


def test_an_engine_that_comes_later_is_a_row_and_runs(monkeypatch):
    """By nothing but its name in the table of engines; and a wrong one is refused."""
    ran = []

    def halo(*args):
        ran.append(args)
        y, _ = engines.library.fprop(*args)
        return y if len(ran) <= nb_right else 1.1 * y, None

    engine = SimpleNamespace(**{**vars(engines.library), "fprop": halo})
    monkeypatch.setitem(engines.ENGINES, "halo", engine)
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: None)
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)
    make = lambda: ConvBlock(3, 5, 5, activation="SiLU", norm="instance")  # noqa: E731
    case = cases.find("block-5-d1")._replace(make=make)  # smooth: no kink for rounding to flip
    rivals = {r.engine: r for r in peers.rivals(case, torch.device("cuda"), "eager", ["first"])}
    assert [*rivals] == ["auto", "library", "gemm", "halo", "reference", "eager"]
    task = stages.Task(case, "forward+backward", torch.float32, CPU, small=True)
    stage = stages.NetworkStage(task, ["first"], roofs.Roofs(1e10, 1e11))
    nb_right = 1000
    ready = stage.prepare(rivals["halo"])
    before = len(ran)
    ready.run(1)
    assert len(ran) == before + 1
    stage.prepare(rivals["library"])
    assert len(ran) == before + 1
    nb_right = 0
    with pytest.raises(stages.Wrong, match="its output is off by"):
        stage.prepare(rivals["halo"])
    assert dispatch._forced is None


def test_agreement_is_relative_to_plain_pytorch_in_the_same_dtype():
    truth = [torch.tensor([1.0, 2.0]), torch.tensor([1.0]), torch.tensor([1e-9])]
    same = [truth[0] * 1.01, *truth[1:]]
    known = correct.Expected(truth, same)
    good = [truth[0] * 0.985, truth[1], torch.tensor([-1e-8])]
    assert correct.agrees(good, known) is None
    off = [truth[0] * 1.03, *truth[1:]]
    assert "its output is off by 0.03" in correct.agrees(off, known)
    assert "its gradient is off by 2 " in correct.agrees([truth[0], -truth[1], truth[2]], known)
    assert "its gradient is off by 1 " in correct.agrees([*truth[:2], truth[1]], known)
    nan = [truth[0] * float("nan"), *truth[1:]]
    assert "off by nan" in correct.agrees(nan, known)
    assert "its output is (1,) in float32" in correct.agrees([truth[1], *truth[1:]], known)


def test_layouts_and_inputs(tmp_path):
    x = torch.randn(2, 3, 4, 5)
    assert in_memory(x, "last").is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(in_memory(x, "last"), x)
    task = stages.Task(cases.find("block-5-d1"), "step", torch.float32, CPU, small=True)
    stage = stages.NetworkStage(task, peers.LAYOUTS, roofs.Roofs(1e10, 1e11))
    for layout in peers.LAYOUTS:
        assert len({image.data_ptr() for image in stage.images[layout]}) == 3
    rival = peers.rivals(task.case, CPU, "eager", ["last"])[0]
    ready = stage.prepare(rival)
    before = [p.clone() for p in stage.net.parameters()]
    ready.run(1)
    for parameter, known in zip(stage.net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, known, rtol=0, atol=0)  # a copy of it was trained


def test_files_of_another_version_are_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("case,ms\nmeshnet,1\n")
    with pytest.raises(ValueError, match=r"old.csv has other columns than this version: move it"):
        rows.read([path])
    assert rows.read([tmp_path / "none.csv"]) == []


@pytest.mark.parametrize("cut", [1, 4, 40])
def test_a_row_that_was_cut_off_is_measured_again_and_spoils_no_other(tmp_path, cut):
    one = plan(tmp_path, "block-5-d1", layouts=["first"])
    run(one)
    (path,) = tmp_path.glob("*/block.csv")
    whole = path.read_text()
    path.write_text(whole[:-cut])
    assert [row["engine"] for row in rows.read([path])] == ["reference"]
    assert len(run(one)[0]) == 1
    assert [row["engine"] for row in rows.read([path])] == ["reference", "reference", "eager"]
    assert len(charts.draw(rows.read([path]), tmp_path / "pictures")) > 0
    assert run(one) == ([], True)


def test_outside_of_git_the_source_has_a_fingerprint(monkeypatch):
    monkeypatch.setattr(rows, "_said", lambda line: "")
    version, digest = rows._commit().split("-")
    assert version == __import__("cassetta").__version__
    assert len(digest) == 7
    assert rows._driver() == ""
    assert rows._version("no-such-package") == ""


def fake(engine, ms, **others):
    row = {**dict.fromkeys(rows.COLUMNS, ""), "engine": engine, "ms": ms, "layout": "first"}
    row.update({"case": "meshnet", "pass": "forward+backward", "dtype": "bf16", "gpu": "Fake 1"})
    row.update(best_peer="eager first" if engine.startswith("auto") else "", **others)
    return rows.rounded(row)


def test_charts(tmp_path):
    measured = [
        fake("auto", 9.0, ratio_to_best_peer=0.1),
        fake("eager", 4.0, kept_mib=10.0, peak_mib=20.0),
        fake("auto", 2.0, ratio_to_best_peer=2.0, kept_mib=5.0, peak_mib=10.0),  # measured again
        fake("auto", 4.0, ratio_to_best_peer=0.9, layout="last"),
        fake("auto compiled", 2.0, ratio_to_best_peer=0.8, case="retired"),
        fake("library", "", error="wrong: the output"),
    ]
    path = tmp_path / "results" / "fake" / "network.csv"
    rows.append(path, measured)
    measured = rows.read([path])
    assert charts._speed(measured[1:], "eager") == {"meshnet": {"forward+backward": 2.0}}
    assert charts._memory(measured[1:]) == {"meshnet": {"kept": 0.5, "peak": 0.5}}
    drawn = charts.draw(measured, tmp_path / "pictures")
    names = ["speed-eager", "speed-compiled", "memory"]
    expected = [f"Fake-1-bf16-{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert [one.name for one in drawn] == expected
    assert all(one.stat().st_size > 5000 for one in drawn)
    assert charts.draw([], tmp_path / "nothing") == []


def test_kernels_that_cannot_run_say_so(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "this is a test")
    task = stages.Task(cases.find("passes-21"), "moments", torch.float32, CPU, small=True)
    stage = stages.PassStage(task, ["first"], roofs.Roofs(1e10, 1e11))
    library = peers.Rival("library", "first", "ours", "triton", peers.as_it_is)
    with pytest.raises(dispatch.BackendError, match="cannot run: this is a test"):
        stage.prepare(library)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "cpu: AMD EPYC 7763 64-Core Processor"])
@pytest.mark.parametrize("count", [1, 64])
def test_no_word_of_a_chart_is_cut_off_or_written_over(gpu, count):
    """Ratios from far below to far above 1, few cases and all of them."""
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    ratios = (0.02, 0.996, 1.0, 3.0, 71.8)
    names = cases.NAMES[:count]
    speed = {
        name: {what: ratios[(n + k) % 5] for k, what in enumerate(stages.PASSES)}
        for n, name in enumerate(names)
    }
    memory = {name: {"kept": ratios[n % 5]} for n, name in enumerate(names)}
    figures = [
        charts._speed_figure(speed, f"{gpu}, bf16, max-autotune"),
        charts._memory_figure(memory, f"{gpu}, bf16"),
    ]
    for figure in figures:
        backend.FigureCanvasAgg(figure)
        figure.tight_layout()
        figure.draw_without_rendering()
        panels = figure.axes
        words = [figure._suptitle, *(one.title for one in panels)]
        for one in panels:
            left, right = one.get_xlim()
            words += [tick.label1 for tick in one.xaxis.get_major_ticks()
                      if left <= tick.get_loc() <= right]  # fmt: skip
        words += panels[0].get_yticklabels()
        words += [text for one in panels for text in one.texts]
        boxes = [word.get_window_extent() for word in words if word.get_text()]
        whole = figure.bbox
        for n, box in enumerate(boxes):
            assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
            assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
            assert not any(box.overlaps(other) for other in boxes[:n])
