"""The command line, as it is typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
import torch

import cassetta
from cassetta.cli import COMMANDS, main, model
from cassetta.cli.patches import Sampler
from cassetta.io import make_loadable
from cassetta.kernels import dispatch, evidence
from cassetta.measure import cases, roofs, stages
from cassetta.models import SegNet

TINY = ["--resolution", "6", "--patch", "6", "--steps", "4", "--batch", "2", "--device", "cpu"]
# what nibabel and its like warn about is theirs to mend
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:nibabel|nilearn|matplotlib")


def command(*words, **environment):
    """Run `python -m cassetta` in a process of its own."""
    env = {**os.environ, **environment}
    line = [sys.executable, "-m", "cassetta", *words]
    return subprocess.run(line, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a demo that ran for a moment."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", *TINY, "--out", str(folder)]) == 0
    return folder


def phantom(folder, shape=(30, 40, 20), affine=None, dtype=np.float32):
    """A bright ball in a brighter shell, with labels 3 and 7, as two NIfTI files."""
    affine = np.diag([4.0, 4.0, 4.0, 1.0]) if affine is None else affine
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    half = (np.array(shape) - 1) / 2
    radius = np.linalg.norm((grid - half) / half, axis=-1)
    labels = np.where(radius < 0.5, 7, np.where(radius < 0.9, 3, 0)).astype(np.int16)
    noise = np.random.default_rng(0).normal(size=shape)
    image = (100 * (labels == 3) + 200 * (labels == 7) + noise).astype(dtype)
    for name, values in {"image": image, "labels": labels}.items():
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    return folder / "image.nii.gz", folder / "labels.nii.gz", labels


@pytest.mark.parametrize(
    ("asked", "code", "text"),
    [
        ("", 0, "reference (plain PyTorch)"),
        ("auto", 0, "no NVIDIA GPU" if not torch.cuda.is_available() else "triton"),
        ("reference", 0, "the backend 'reference' was asked for"),
        ("triton", 1, "cannot run"),
        ("Cuda", 1, "CASSETTA_BACKEND='Cuda' is not a backend"),
    ],
)
def test_doctor_says_whether_the_request_can_be_met(asked, code, text, monkeypatch, capsys):
    monkeypatch.setenv("CASSETTA_BACKEND", asked)
    assert main(["doctor"]) == code
    out = " ".join(capsys.readouterr().out.split())
    assert text in out
    for name in ("cassetta", "python", torch.__version__, "triton", "torch-interpol", "GPUs"):
        assert name in out


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_every_kernel_compiles_for_every_architecture():
    """Ahead of time, without a GPU; and a fault would be the exit code."""
    done = command("compile-check", "--arch", "all", "--part", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    # architectures; activations, passes; three gradients by result; norms
    kernels = 3 * (13 * 22 + 3 + 36)
    # half precision by all plans; float32 by all, in full and in TF32; for sm_90 boxes, both halves
    runs = 2 * (5 + 2 * 3) + (2 * 8 + 2 * 4)
    kernels += 12 * runs
    # the architectures of which a part is compiled: two activations, half precision
    kernels, runs = kernels + 3 * (2 * 22 + 12 * 5), runs + 3 * 5
    found = int(re.findall(r"(\d+) compilations", done.stdout)[0])
    # a run has two convolutions that leave moments, combined in one or two stages; PReLU none
    assert kernels + runs < found <= kernels + 4 * runs
    assert "0 at fault" in done.stdout
    for name in (
        "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "moments_kernel",
        "prologue_dgrad_kernel", "norm_finalize",
    ):  # fmt: skip
        assert name in done.stdout


def test_interpreted_kernels_do_not_compile():
    done = command("compile-check", "--arch", "sm_80", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_the_exit_code_reaches_the_shell():
    assert command("doctor", CASSETTA_BACKEND="auto").returncode == 0
    assert command("doctor", CASSETTA_BACKEND="triton").returncode == 1


@pytest.mark.parametrize("words", [[], ["dance"], ["predict"], ["demo", "--ndim", "4"]])
def test_wrong_words_show_the_usage(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: cassetta" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "usage: cassetta" in capsys.readouterr().out


def test_without_any_extra_the_command_line_works_and_says_what_is_missing():
    code = (
        "import sys\n"
        "for name in ('nibabel', 'nilearn', 'matplotlib', 'scipy', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        "from cassetta.cli import main\n"
        "print(main(['doctor']), main(['demo']), main(['predict', 'x.nii', '--weights', 'w.pt']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("0 2 2"), done.stderr
    assert "extra demo      lacks nibabel, nilearn, matplotlib" in done.stdout
    assert "pip install 'cassetta-triton[demo]'" in done.stderr


def rows(out):
    """The tables that were printed: the words of each line, by the first of them."""
    return {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}


def test_summary_says_what_a_network_costs_and_how_much_fits(capsys):
    words = ["--size", "32", "24", "16", "--batch", "2", "--memory", "0.25"]
    assert main(["summary", "Fedorov", *words]) == 0
    out = capsys.readouterr().out
    found = cassetta.summary(SegNet.preset("fedorov"), (2, 1, 32, 24, 16))
    assert rows(out)["total"][1] == "72,516"
    assert rows(out)["total"][3] == f"{found.kept_bytes / 2**20:.2f}"
    assert rows(out)["training"][-2:] == [
        f"{found.peak_bytes / 2**20:.2f}", f"{found.fused_peak_bytes / 2**20:.2f}",
    ]  # fmt: skip
    assert "largest in 0.25 GiB" in out
    net = SegNet.preset("fedorov")
    for n, fused in ((-2, False), (-1, True)):
        batch = cassetta.largest(net, (2, 1, 32, 24, 16), 2**28, fused=fused)[0]
        assert rows(out)["batch"][n] == str(batch)
    edge = cassetta.largest(net, (2, 1, 32, 24, 16), 2**28, vary="size")[-1]
    assert rows(out)["volume"][-5:] == [str(edge), "x", str(edge), "x", str(edge)]


def test_summary_takes_any_backbone_in_any_precision(capsys):
    words = ["unet", "--ndim", "2", "--channels", "8", "--option", "nb_levels=2", "--size", "64"]
    kept = []
    for precision in ("float32", "bfloat16", "float16"):
        assert main(["summary", *words, "--precision", precision]) == 0
        out = capsys.readouterr().out
        assert "1 x 8 x 64 x 64" in out
        kept.append(float(rows(out)["total"][3]))
    assert kept[0] > 1.5 * kept[1]
    assert kept[1] == kept[2]


def test_summary_of_a_saved_network_for_inference(trained, capsys):
    path = str(trained / "weights.pt")
    assert main(["summary", path, "--size", "32", "--memory", "0.02", "--inference"]) == 0
    out = capsys.readouterr().out
    net = SegNet.load_from(path)
    shape = (1, 1, 32, 32, 32)
    assert "x 32 x 32 x 32" in out
    batch = cassetta.largest(net, shape, int(0.02 * 2**30), inference=True)[0]
    assert rows(out)["batch"][-1] == str(batch)
    training = cassetta.largest(net, shape, int(0.02 * 2**30))[0]
    assert training < batch


def test_summary_says_where_nothing_fits(capsys):
    assert main(["summary", "fedorov", "--size", "64", "--memory", "0.02"]) == 0
    assert rows(capsys.readouterr().out)["batch"][-2:] == ["-", "-"]  # but volumes do
    assert main(["summary", "fedorov", "--size", "64", "--memory", "0.0001"]) == 2
    assert "--memory 0.0001: memory=107374 is too small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh"], "MODEL='mesh' is unknown: use 'MeshNet'"),
        (["no.pt"], "or the path of a file that cassetta saved"),
        (["TEXT"], "cannot be read"),
        (["LINEAR"], "holds a LoadableLinear, which does not say its ndim and inp_channels"),
        (["WEIGHTS", "--ndim", "2"], "--ndim cannot change"),
        (["WEIGHTS", "--option", "norm=batch"], "--option cannot change"),
        (["WEIGHTS", "--channels", "3"], "--channels cannot change"),
        (["fedorov", "--option", "norm=batch"], "--option cannot change fedorov: leave it out"),
        (["UNet", "--option", "norm"], "--option norm is not of the form NAME=VALUE"),
        (["UNet", "--option", "norm=bach"], "norm='bach'"),
        (["UNet", "--option", "nb_featuers=3"], "nb_featuers"),
        (["UNet", "--ndim", "4"], "ndim=4 is too large"),
        (["UNet", "--channels", "0"], "--channels=0 is too small"),
        (["UNet", "--size", "4"], "need (8, 8, 8)"),
        (["UNet", "--size", "0"], "--size[0]=0 is too small"),
        (["UNet", "--size", "9", "9", "9", "9"], "has 4 values for ndim=3"),
        (["UNet", "--size", "2000000000"], "2000000000"),
        (["UNet", "--batch", "-1"], "--batch=-1 is too small"),
        (["UNet", "--memory", "0"], "--memory 0.0 must be a number of GiB"),
        (["UNet", "--memory", "nan"], "--memory nan must be a number of GiB"),
        (["UNet", "--memory", "1e300"], "--memory 1e+300 must be a number of GiB"),
        (["UNet", "--inference"], "--inference says what has to fit: give --memory too"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_summary_refuses(words, message, trained, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("TEXT", "LINEAR")}
    files["TEXT"].write_text("not a network")
    make_loadable(torch.nn.Linear)(2, 3).save(files["LINEAR"])
    files["WEIGHTS"] = trained / "weights.pt"
    assert main(["summary", *(str(files.get(word, word)) for word in words)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out


def test_demo_leaves_its_results(trained):
    assert sorted(p.name for p in trained.iterdir()) == ["picture.png", "result.json", "weights.pt"]
    result = json.loads((trained / "result.json").read_text())
    assert set(result["dice"]) == {"grey matter", "white matter"}
    assert all(0 <= score <= 1 for score in result["dice"].values())
    assert result["ms_per_step"] > 0
    assert "MiB" in result["peak_memory"]
    assert result["versions"]["torch"] == torch.__version__
    assert (trained / "picture.png").read_bytes()[1:4] == b"PNG"
    assert SegNet.load_from(trained / "weights.pt").out_channels == 3


def test_demo_says_what_the_data_is(tmp_path, capsys):
    main(["demo", *TINY, "--out", str(tmp_path)])
    out = " ".join(capsys.readouterr().out.split())
    assert "ICBM152 template" in out
    assert "average of 152 brains" in out
    assert "learn from the front 11 slices, test on the back 11, with 8 between them" in out


def test_demo_is_the_same_with_the_same_seed(trained, tmp_path):
    for seed, name in (("0", "same"), ("1", "other")):
        assert main(["demo", *TINY, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    first, same, other = (
        json.loads((folder / "result.json").read_text())
        for folder in (trained, tmp_path / "same", tmp_path / "other")
    )
    assert first["dice"] == same["dice"]
    assert first["final_loss"] == same["final_loss"] != other["final_loss"]
    weights = [
        SegNet.load_from(f / "weights.pt").state_dict() for f in (trained, tmp_path / "same")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("ndim", ["1", "2", "3"])
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("UNet", ["nb_features=[2, 3]", "nb_levels=2", "norm=instance", "residual=True"]),
        ("MeshNet", ["nb_features=2", "dilation=[1, 2]", "activation=ELU", "dropout=0.1"]),
        ("ATrousNet", ["nb_features=2"]),
    ],
)
def test_any_backbone_its_options_and_dimensions(backbone, options, ndim, tmp_path):
    words = [word for option in options for word in ("--option", option)]
    words += ["--backbone", backbone, "--ndim", ndim, "--out", str(tmp_path)]
    assert main(["demo", *TINY, *words]) == 0
    net = SegNet.load_from(tmp_path / "weights.pt")
    assert type(net[1]).__name__ == backbone
    assert net[0].ndim == int(ndim)


def test_train_on_your_own_image_and_predict_it(tmp_path):
    image, labels, truth = phantom(tmp_path)
    words = ["--image", str(image), "--labels", str(labels), "--resolution", "4", "--patch", "8",
             "--steps", "80", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(["demo", *words]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["dice"]) == {"label 3", "label 7"}
    assert min(result["dice"].values()) > 0.9
    out = tmp_path / "guess.nii.gz"
    weights = str(tmp_path / "out" / "weights.pt")
    assert main(["predict", str(image), "--weights", weights, "--out", str(out)]) == 0
    written = nibabel.load(out)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, nibabel.load(image).affine)
    guess = np.asarray(written.dataobj)
    assert set(np.unique(guess)) == {0, 3, 7}
    assert (guess == truth).mean() > 0.95


AFFINES = {
    "flipped": np.diag([-3.0, 3.0, 5.0, 1.0]),
    "permuted": np.array([[0, 0, 4.0, 7], [-4, 0, 0, 3], [0, 3, 0, -9], [0, 0, 0, 1.0]]),
    "oblique": np.array([[2.9, -0.8, 0, 5], [0.8, 2.9, 0, -3], [0, 0, 3.0, 1], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_predict_keeps_the_grid_of_any_image(name, trained, tmp_path, monkeypatch):
    affine = AFFINES[name]
    image, _, _ = phantom(tmp_path, shape=(25, 31, 18), affine=affine, dtype=np.int16)
    loaded = nibabel.load(image)
    loaded.header.set_sform(affine, code=4)
    loaded.header.set_qform(affine, code=1)
    nibabel.save(loaded, image)
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(image), "--weights", str(trained / "weights.pt")]) == 0
    written = nibabel.load(tmp_path / "image_labels.nii.gz")
    assert written.shape == (25, 31, 18)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert (written.header["sform_code"], written.header["qform_code"]) == (4, 1)
    assert not list(tmp_path.glob("*part*"))


def test_ctrl_c_leaves_usable_weights(tmp_path, monkeypatch, capsys):
    draw = Sampler.__call__
    calls = []

    def interrupted(sampler, count):
        calls.append(count)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return draw(sampler, count)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    assert main(["demo", *TINY, "--steps", "1000000", "--out", str(tmp_path)]) == 130
    assert "stopped after 3 steps; the weights are in" in " ".join(capsys.readouterr().out.split())
    image, _, _ = phantom(tmp_path)
    weights = str(tmp_path / "weights.pt")
    out = str(tmp_path / "labels_of_it.nii")
    assert main(["predict", str(image), "--weights", weights, "--out", out, "--device", "cpu"]) == 0


def test_ctrl_c_as_a_terminal_sends_it(tmp_path):
    words = ["demo", *TINY, "--steps", "1000000", "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "cassetta", *words], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith("network"):
                    break
            time.sleep(3)
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone", "Unett"], "backbone='Unett' is unknown: use 'UNet'"),
        (["--option", "nb_features"], "--option nb_features is not of the form NAME=VALUE"),
        (["--option", "nb_featuers=3"], "nb_featuers"),
        (["--option", "norm=bach"], "norm='bach'"),
        (["--backbone", "ConvEncoder"], "every voxel needs a label"),
        (["--steps", "0"], "--steps 0 must be positive"),
        (["--lr", "-1"], "--lr -1.0 must be positive"),
        (["--resolution", "nan"], "--resolution nan must be positive"),
        (["--resolution", "1e-9"], "must lie between 0.1 and 20 mm"),
        (["--option", "mul_dilation=1e300"], "mul_dilation=1e+300 must be positive"),
        (["--option", "nb_features=30000000"], "not enough memory"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--lr", "inf"], "--lr inf must be positive and finite"),
        (["--seed", "-1"], "--seed -1 must lie between"),
        (["--patch", "1"], "--patch 1"),
        (["--patch", "11"], "too short for a gap of 12 between two parts of at least 11"),
        (["--backbone", "UNet", "--option", "nb_levels=4"], "4 levels need (8, 8, 8)"),
        (["--patch", "200"], "too short for a gap of 201 between two parts of at least 200"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--image", "x.nii"], "--image and --labels go together"),
        (["--image", "no.nii", "--labels", "no.nii"], "no.nii cannot be read as an image"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_demo_refuses_before_it_trains(words, message, tmp_path, capsys):
    assert main(["demo", *TINY, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", ["1", "2", "3", "5", "6", "7"])
def test_any_number_of_steps(steps, tmp_path):
    assert main(["demo", *TINY, "--steps", steps, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("ndim", ["1", "2", "3"])
def test_the_usual_patch_shrinks_with_the_image(ndim, tmp_path):
    words = ["--resolution", "8", "--steps", "2", "--ndim", ndim, "--device", "cpu"]
    assert main(["demo", *words, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("asked", "message"), [("triton", "cannot run"), ("fast", "not a backend")]
)
def test_a_backend_that_cannot_run_ends_every_command(
    asked, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CASSETTA_BACKEND", asked)
    image, _, _ = phantom(tmp_path)
    for words in (["demo", *TINY], ["predict", str(image), "--weights", "none.pt"]):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path, capsys):
    image, _, _ = phantom(tmp_path)
    weights = ["--weights", str(trained / "weights.pt")]
    for words in (
        ["demo", *TINY, "--out", str(image)],
        ["demo", *TINY, "--out", str(image / "below")],
        ["predict", str(image), *weights, "--out", str(image / "labels.nii")],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "cannot be made a folder" in err
        assert "learning" not in err


def test_a_loss_that_explodes_ends_the_training(tmp_path, capsys):
    words = ["--lr", "1e30", "--steps", "20", "--out", str(tmp_path)]
    assert main(["demo", *TINY, *words]) == 2
    assert "use a smaller learning rate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_before_the_training_is_no_traceback(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cassetta.cli.demo.template", interrupt)
    assert main(["demo", *TINY]) == 130


def test_images_that_cannot_be_used(tmp_path, capsys):
    image, labels, _ = phantom(tmp_path)
    (tmp_path / "other").mkdir()
    _, shifted, _ = phantom(tmp_path / "other", affine=np.diag([5.0, 5, 5, 1]))
    four = tmp_path / "four.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), four)
    flat = tmp_path / "flat.nii"
    nibabel.save(
        nibabel.Nifti1Image(np.ones((30, 40, 20), np.float32), np.diag([4.0, 4, 4, 1])), flat
    )
    text = tmp_path / "text.nii"
    text.write_text("not an image")
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(image.read_bytes()[:5000])
    colors = tmp_path / "colors.nii"
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), colors)
    nowhere = tmp_path / "nowhere.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), nowhere)
    header = bytearray(nowhere.read_bytes())
    header[280:296] = bytes(16)  # the first row of the affine
    nowhere.write_bytes(header)
    for one, other, message in [
        (image, shifted, "lie on different grids"),
        (four, labels, "has shape (4, 4, 4, 2), but a 3-D image is needed"),
        (flat, labels, "the image is constant"),
        (image, flat, "holds only the value 1"),
        (text, labels, "cannot be read as an image"),
        (cut, labels, "cannot be read as an image"),
        (colors, labels, "one number per voxel is needed"),
        (nowhere, labels, "its affine is singular"),
        (image, image, "it is no map of labels"),
    ]:
        assert main(["demo", *TINY, "--image", str(one), "--labels", str(other)]) == 2
        assert message in capsys.readouterr().err


def test_predict_refuses_what_it_cannot_use(trained, tmp_path, capsys):
    image, _, _ = phantom(tmp_path)
    weights = str(trained / "weights.pt")
    bare = tmp_path / "bare.pt"
    SegNet(2, 1, 3, backbone="MeshNet").save(bare)
    evil = tmp_path / "evil.pt"
    torch.save({"cassetta.Loadable": "1.0", "x": pytest.raises}, evil)
    for words, message in [
        ([str(image), "--weights", str(tmp_path / "no.pt")], "no.pt cannot be read"),
        ([str(image), "--weights", str(bare)], "was not written by `cassetta demo`"),
        ([str(image), "--weights", str(evil)], "cannot be read"),
        ([str(image), "--weights", weights, "--out", str(image)], "would overwrite the image"),
        ([str(image), "--weights", weights, "--out", "x.png"], "must end in .nii or .nii.gz"),
        ([str(tmp_path / "no.nii"), "--weights", weights], "cannot be read as an image"),
    ]:
        assert main(["predict", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (3, "was not written by"),
        ({"patch": 0}, "patch=0"),
        ({"patch": "x"}, "patch='x'"),
        ({"resolution": float("nan")}, "resolution=nan"),
        ({"values": []}, "0 values"),
        ({"values": ["a", "b", "c"]}, "values='a'"),
        ({"names": ["background"]}, "names 1 labels"),
    ],
    ids=str,
)
def test_weights_whose_surroundings_are_wrong(change, message, trained, tmp_path, capsys):
    image, _, _ = phantom(tmp_path)
    packed = torch.load(trained / "weights.pt", weights_only=True)
    known = packed["cassetta.predict"]
    packed["cassetta.predict"] = {**known, **change} if isinstance(change, dict) else change
    torch.save(packed, tmp_path / "weights.pt")
    assert main(["predict", str(image), "--weights", str(tmp_path / "weights.pt")]) == 2
    assert message in capsys.readouterr().err


def test_the_demo_reaches_its_dice(tmp_path):
    """The demo as `make demo` runs it: 0.88 for grey, 0.90 for white matter are promised."""
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["dice"]["grey matter"] >= 0.88
    assert result["dice"]["white matter"] >= 0.90


BENCH = ["bench", "--case", "block-5-d1", "--pass", "inference", "--layout", "first", "--small"]


def test_bench_measures_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert main(BENCH) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "block-5-d1, inference" in out
    assert "s went, of 500 s" in out
    assert torch.cuda.is_available() or "These are figures of a CPU, for tiny images" in out
    assert torch.cuda.is_available() or re.search(r"reference first [\d. ]+ x eager first", out)
    (path,) = (tmp_path / "bench" / "results").glob("*/block.csv")
    written = path.read_text()
    assert main(BENCH) == 0
    assert "0 groups of rows measured now" in capsys.readouterr().out
    assert path.read_text() == written


def test_bench_says_when_the_budget_is_spent(tmp_path, capsys):
    assert main([*BENCH, "--out", str(tmp_path), "--budget", "1e-9"]) == 0
    assert "run it again, and it goes on" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_bench_lists_its_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--list", "--case", "network", "passes-21"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "meshnet" in lines[1]
    assert "1 x 21 x 256 x 256 x 256" in lines[1]
    assert not any("block-" in line for line in lines)
    assert not [*tmp_path.iterdir()]


def test_bench_draws(tmp_path, capsys):
    results, pictures = tmp_path / "results", tmp_path / "pictures"
    assert main([*BENCH, "--out", str(results)]) == 0
    capsys.readouterr()
    assert main(["bench", "--out", str(results), "--charts", str(pictures)]) == 0
    drawn = capsys.readouterr().out.split()
    assert sorted(drawn) == sorted(map(str, pictures.iterdir()))
    assert len(drawn) >= 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--case", "mesnet"], "name='mesnet' is no case: 'meshnet' is one"),
        (["--budget", "0"], "--budget 0.0 must be positive and finite: try 500"),
        (["--charts", "pictures"], "holds no results: run `cassetta bench` first"),
    ],
)
def test_bench_refuses(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert reason in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_bench_says_which_folder_is_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*BENCH, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    line = ["bench", "--out", str(tmp_path), "--charts", str(tmp_path / "file")]
    assert main(line) == 2
    assert f"--charts {tmp_path / 'file'} cannot be made a folder" in capsys.readouterr().err


@pytest.fixture
def open_choice(monkeypatch):
    """On this CPU too there is a choice, between plain PyTorch and the fused blocks on it."""
    monkeypatch.setattr(dispatch, "_why_no_kernel", lambda x: None)


TUNE = ["tune", "--device", "cpu"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tune_finds_what_bench_meets(open_choice, capsys, precision):
    """The very blocks: image, precision, layout and use are in the key of a record."""
    assert main([*TUNE, "--case", "block-5-d1", "--precision", precision]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "block-5-d1 1 x 5 x 16 x 16 x 16" in out.replace(",", "")
    table = evidence.table(torch.device("cpu"))
    assert f"kept in {table.path}" in out
    assert json.loads(table.path.read_text())["about"] == table.about
    case = cases.find("block-5-d1")
    dtype = model.PRECISIONS[precision] or torch.float32
    task = stages.Task(case, "forward+backward", dtype, torch.device("cpu"), small=True)
    image = stages.NetworkStage(task, ["first"], roofs.Roofs(1e10, 1e11)).images["first"][0]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        (row,) = cassetta.explain(case.make(), image)
    assert row.evidence.startswith("measured here: ")
    assert main([*TUNE, "--case", "block-5-d1", "--precision", precision]) == 0
    assert row.evidence.split()[2] in capsys.readouterr().out


def test_tune_takes_presets_backbones_and_files(open_choice, trained, capsys):
    small = ["--size", "8", "--inference"]
    for words in (["model5_gw_ae"], ["MeshNet", "--channels", "3", "--option", "nb_layers=2"],
                  [str(trained / "weights.pt")]):  # fmt: skip
        assert main([*TUNE, *words, *small]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{words[0]}, 1 x ")
        assert "inference" in out
        assert "reference" in out


def test_tune_stops_and_goes_on(open_choice, monkeypatch, capsys):
    line = [*TUNE, "MeshNet", "--channels", "3", "--size", "8"]
    assert main([*line, "--budget", "1e-9"]) == 0
    assert "blocks are left: tune again, to go on" in capsys.readouterr().out
    assert main(line) == 0
    assert "are left" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give a MODEL or --case, and not both"),
        (["fedorov", "--case", "meshnet"], "give a MODEL or --case, and not both"),
        (["--case", "mesnet"], "name='mesnet' is no case: 'meshnet' is one"),
        (["mesnet"], "MODEL='mesnet' is unknown"),
        (["fedorov", "--budget", "nan"], "--budget nan must be positive and finite"),
        (["UNet", "--channels", "4", "--size", "3"], "inp has size (3, 3, 3), but 3 levels need"),
        (["fedorov", "--size", "0"], "--size[0]=0 is too small"),
        (["fedorov", "--device", "nowhere"], "--device nowhere cannot be used here"),
    ],
    ids=str,
)
def test_tune_refuses(words, reason, capsys):
    assert main(["tune", *words]) == 2
    assert reason in capsys.readouterr().err
