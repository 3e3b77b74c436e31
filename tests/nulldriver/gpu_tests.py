"""Each way into the package, on a machine whose GPUs `standin` pretends."""

import nibabel
import pytest
import standin
import torch
from as_reference import answered
from torch import nn

import cassetta
from cassetta import cli
from cassetta.backbones import UNet
from cassetta.kernels import BackendError, boxes, dispatch, evidence, machine, plans, why_reference
from cassetta.kernels.evidence import Record
from cassetta.layers import Conv, ConvBlock
from cassetta.measure import agreement, cases, checking, roofs, rows, timing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own
GPU = torch.device("cuda", 0)


def have(*capabilities):
    """The machine has GPUs of these compute capabilities."""
    standin.capabilities[:] = capabilities
    torch.cuda._cached_device_count = None
    machine._gpu.cache_clear()
    evidence.forget()


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch):
    have((9, 0), (9, 0))
    monkeypatch.setattr(standin, "place", 0)
    monkeypatch.setattr(dispatch, "SMALL", 0)
    standin.launched.clear()


def image(*shape):
    return torch.randn(shape or (2, 8, 6, 6), requires_grad=True)


def block(**options):
    return ConvBlock(2, 8, 8, norm="instance", activation="ReLU", order="cnda", **options)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_which_gpus_run_kernels(capability):
    have(capability)
    why = why_reference(image())
    if capability >= (8, 0):
        assert why is None
        assert boxes.are_copied(torch.device("cpu"))
        assert boxes.are_copied(GPU) == (capability == (9, 0))
        assert dispatch.passes(image()) is dispatch._triton_passes()
        with cassetta.use_backend("triton"):
            assert why_reference(image()) is None
        return
    assert why == "this GPU has compute capability 7.5, and 8.0 is needed"
    block()(image()).sum().backward()
    assert not standin.launched
    with pytest.raises(BackendError, match="the best has 7.5"):
        cassetta.set_backend("triton")


def test_of_two_gpus_each_is_judged_by_itself(monkeypatch):
    have((7, 5), (9, 0))
    assert "compute capability 7.5" in why_reference(image())
    assert dispatch.passes(image()) is not dispatch._triton_passes()
    monkeypatch.setattr(standin, "place", 1)
    assert why_reference(image()) is None
    assert cassetta.explain(block(), image())[0].engine == "library"


def test_without_a_visible_gpu(monkeypatch, capsys):
    """As with CUDA_VISIBLE_DEVICES="", of a torch built for CUDA."""
    have()
    monkeypatch.setattr(standin, "place", None)
    assert cassetta.explain(block(), image())[0].reason == "the image is on the CPU"
    with pytest.raises(BackendError, match="torch finds no NVIDIA GPU"):
        cassetta.set_backend("triton")
    assert cli.main(["doctor"]) == 0
    assert "none that torch can use" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("engine", ["library", "gemm"])
def test_a_block_is_launched_on_the_gpu_of_its_image(monkeypatch, engine, place):
    """Forward and backward, by Triton's own launcher; the current GPU stays the first."""
    monkeypatch.setattr(standin, "place", place)
    x, net = image(), block()
    with dispatch.use_engine(engine):
        count = standin.DRIVER.null_launches()
        y = net(x)
        forward = len(standin.launched)
        y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert {*standin.launched} == {place}
    assert len(standin.launched) == standin.DRIVER.null_launches() - count > forward > 1
    assert standin.current == 0


def test_a_network_is_launched():
    """Of our own convolutions, and with the passes that go down and up by interpolation."""
    net = UNet(2, 4, nb_levels=2, nb_conv_per_level=1, norm="batch", pool_mode="interpolate")
    with dispatch.use_engine("gemm"), torch.autocast("cuda", torch.bfloat16):
        net(image(1, 4, 8, 8)).float().sum().backward()
    assert {*standin.launched} == {0}
    assert all(one.grad is not None for one in net.parameters())


def test_boxes_are_described_to_the_driver():
    """By tensor maps, which Triton's launcher asks the driver to encode."""
    boxed = plans.GemmPlan(64, 16, 16, 2, True)
    with dispatch.use_engine("gemm"), plans.use_plan(boxed):
        block()(image()).sum().backward()
    assert standin.DRIVER.null_tensor_maps() > 2


def test_what_is_known_of_a_gpu():
    have((8, 0), (9, 0))
    assert [one.capability for one in machine.gpus()] == [(8, 0), (9, 0)]
    assert machine.known(torch.device("cuda", 1)).shared == 232_448
    about = evidence.about(torch.device("cuda", 1))
    assert (about["gpu"], about["driver"]) == ("NVIDIA Null 9.0", "12080")


@pytest.mark.parametrize("choice", ["reference", "library", "gemm"])
def test_a_measurement_is_found_and_explained(choice):
    net, x = block(), image()
    (ran,) = cassetta.explanation.watch(net, x)
    evidence.table(x.device).add(ran.key, Record(choice, {choice: 1.0}, {}))
    evidence.forget()
    (row,) = cassetta.explain(net, x)
    assert row.engine == choice
    assert row.evidence == f"measured here: {choice} 1 ms"


def test_doctor(capsys):
    have((8, 6), (12, 0))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA Null 8.6, capability 8.6, 80 GiB" in out
    assert "NVIDIA Null 12.0, capability 12.0" in out
    assert "runs       triton" in out


def traced(net, x):
    """What dynamo makes of a network, as a whole, in words; it is run, forward and backward."""
    found = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        assert all(one.device.type == "cuda" for one in inputs if isinstance(one, torch.Tensor))
        found.append(graph.print_readable(print_output=False))
        return graph.forward

    y = torch.compile(net, fullgraph=True, backend=backend)(x)
    if torch.is_grad_enabled():
        y.sum().backward()
    (graph,) = found
    return graph


def unet():
    return UNet(2, 4, nb_levels=2, nb_conv_per_level=1, norm="instance")


def test_a_network_is_compiled_whole():
    """`torch.compile(fullgraph=True)`, with tensors that are fake, and on a GPU."""
    graph = traced(unet(), image(1, 4, 8, 8))
    for name in ("norm_statistics", "norm_sums", "max_pool", "concatenate"):
        assert f"cassetta.{name}" in graph
    assert standin.launched


def test_a_block_of_our_own_convolutions_is_compiled_whole():
    with dispatch.use_engine("gemm"):
        assert "cassetta.conv_wgrad" in traced(block(), image())


def test_a_request_is_compiled(monkeypatch):
    """The backend "triton" is asked for, and what is no block runs by torch's convolution."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with torch.no_grad():
        assert "cassetta.norm_statistics" in traced(nn.Sequential(block(), Conv(2, 8, 8)), image())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_a_network_is_exported(strict):
    net, x = unet().eval(), image(1, 4, 8, 8).detach()
    with torch.no_grad():
        graph = str(torch.export.export(net, (x,), strict=strict).graph)
    assert "cassetta.norm_statistics" in graph
    assert "capability" not in graph


def wrong(whys):
    """Those of these reasons that are more than wrong numbers, as are all that no kernel wrote."""
    numbers = ("is off by", "gives other bits")
    return [why for why in whys if not any(n in why for n in numbers) or "it fails" in why]


def test_tune():
    """What no kernel wrote is wrong, and refused; what is left is timed, and kept."""
    x = image().detach()
    with torch.no_grad():
        (*_, row) = cassetta.tune(block().eval(), x)
    assert row.choice in ("reference", "library", "gemm")
    assert row.is_new
    evidence.forget()
    records = evidence.table(x.device).records
    assert row.key in records
    assert not wrong(why for one in records.values() for why in one.refused.values())
    assert standin.launched


@pytest.fixture
def small(monkeypatch):
    """The case block-5-d1, on a GPU as small as on a CPU."""
    case = cases.find("block-5-d1")
    monkeypatch.setitem(cases._CASES, case.name, case._replace(shape=case.small))


def test_tune_where_all_is_right(small, monkeypatch, capsys):
    """By decree: the first plan of every pass is run and timed, and nothing is refused."""
    tried = plans.candidates
    monkeypatch.setattr(plans, "candidates", lambda *what: tried(*what)[:1])
    monkeypatch.setattr(agreement, "judge", lambda *args, **options: None)
    assert cli.main(["tune", "--case", "block-5-d1"]) == 0
    out = capsys.readouterr().out
    assert "s went, of " in out
    for name in ("check", "first run", "timing"):
        assert name in out
    records = evidence.table(GPU).records
    assert {"library", "gemm"} <= {engine for one in records.values() for engine in one.ms}
    assert not [one.refused for one in records.values() if one.refused]


def test_check(monkeypatch, capsys):
    """One comparison of each kind: what no kernel wrote is wrong, and nothing else is."""
    kinds = {}
    for one in checking.comparisons(GPU):
        is_network = one.part == "networks"
        kinds.setdefault(one.case.split(", ")[-1] if is_network else one.what, one)
    assert {"library", "gemm", "conv_transposed", *agreement.PASSES} < kinds.keys()
    found = {name: one.run() for name, one in kinds.items()}
    assert not wrong(why for why in found.values() if why)
    assert standin.launched
    monkeypatch.setattr(checking, "comparisons", lambda device: [kinds["moments"]])
    assert cli.main(["check"]) == 1
    assert "1 comparisons on this GPU" in capsys.readouterr().out


@pytest.fixture
def right(monkeypatch):
    """The reference computes what kernels should have written."""
    passes = answered()
    monkeypatch.setattr(dispatch, "_triton_passes", lambda: passes)


def test_check_where_all_is_right(right, monkeypatch):
    moments = [one for one in checking.comparisons(GPU) if one.what == "moments"][:3]
    monkeypatch.setattr(checking, "comparisons", lambda device: moments)
    assert cli.main(["check"]) == 0
    assert standin.launched


@pytest.mark.filterwarnings("ignore::DeprecationWarning:nibabel|nilearn|matplotlib")
def test_demo_and_predict(right, tmp_path):
    """Train on the template; then label another image."""
    tiny = ["--resolution", "6", "--patch", "6", "--steps", "2", "--batch", "2"]
    assert cli.main(["demo", *tiny, "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert "NVIDIA Null 9.0" in (tmp_path / "result.json").read_text()
    launched = len(standin.launched)
    assert launched > 100
    image, out = (str(tmp_path / f"{name}.nii.gz") for name in ("image", "labels"))
    voxels = torch.rand(12, 13, 14).cpu().numpy()
    nibabel.save(nibabel.Nifti1Image(voxels, torch.eye(4).numpy()), image)
    words = ["--weights", str(tmp_path / "weights.pt"), "--device", "cuda", "--out", out]
    assert cli.main(["predict", image, *words]) == 0
    assert nibabel.load(out).shape == voxels.shape
    assert len(standin.launched) > launched


def test_bench(monkeypatch, tmp_path, capsys):
    """What no kernel wrote is wrong; nothing else is, and who is right is timed."""
    monkeypatch.setattr(roofs, "roofs", lambda device, dtype: roofs.Roofs(1e10, 1e11))
    line = ["bench", "--case", "block-5-d1", "passes-32", "--mode", "eager", "--dtype", "fp32"]
    line += ["--pass", "step", "--layout", "first", "--small"]
    assert cli.main([*line, "--out", str(tmp_path)]) == 0
    assert "s went, of 500 s" in capsys.readouterr().out
    found = rows.read(tmp_path.glob("*/*.csv"))
    assert {row["engine"] for row in found} > {"library", "reference", "copy"}
    assert {row["case"] for row in found} == {"block-5-d1 (small)", "passes-32 (small)"}
    assert not wrong(row["error"] for row in found if row["error"])
    assert all(row["error"] or float(row["ms"]) > 0 for row in found)


def test_what_is_timed():
    """By CUDA's events, and its record of memory."""
    facts = rows.facts(GPU)
    assert facts["gpu"] == "NVIDIA Null 9.0"
    assert "driver" in facts
    ran = []
    times = timing.interleaved({"one": ran.append}, GPU, rounds=3, warmup=1)
    assert times["one"].ms >= 0
    assert len(ran) == 4
    assert timing.nb_inputs(2**18, GPU) == 8
    assert timing.peak_bytes(ran.append, GPU) == 0
