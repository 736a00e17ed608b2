import gzip
import hashlib
import itertools
import pickle
import subprocess
import sys
import textwrap
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import TensorDataset

from bsprof.errors import BsprofError
from bsprof.model import Settings
from bsprof.workloads.imagefolder import CorruptImageError
from bsprof.workloads.loading import EndlessSampler, build_loader
from bsprof.workloads.registry import (
    Data,
    DataRequest,
    ImageShape,
    build_data,
    build_model,
    catalogue,
    check_names,
    prepare_data,
)

# From Python 3.12 on: real DataLoader workers are forked here, beside torch's idle threads, as in any training.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CIFAR = ImageShape(3, 32, 32)


@pytest.fixture
def request_(tmp_path):
    return DataRequest(cache=tmp_path / "cache")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the working directory under a name of its own; returns `write(source) -> name`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "restores-sys.path-at-the-end"))
    numbers = itertools.count()

    def write(source):
        name = f"own_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return name

    return write


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def settings(**chosen):
    return Settings(pin_memory=None, **chosen)


def train_once(model, shape, batch=2):
    output = model.train()(torch.randn(batch, *shape))
    assert isinstance(output, torch.Tensor)
    torch.nn.functional.cross_entropy(output, torch.zeros(batch, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return output


# --- names ------------------------------------------------------------------------------------------


def test_the_catalogue_lists_every_classification_model_of_torchvision_and_the_founding_workloads():
    names = {kind: {entry.name for entry in catalogue() if entry.kind == kind} for kind in ("model", "data")}
    founding = {"resnet20", "alexnet_cifar", "vgg19_bn_cifar", "mnist_cnn"}
    assert names["model"] == founding | set(torchvision.models.list_models(module=torchvision.models))
    assert names["data"] == {
        *("jpeg", "imagefolder", "synthetic"),
        *("cifar10", "cifar100", "mnist", "places365"),
    }
    assert all(entry.summary for entry in catalogue())


@pytest.mark.parametrize(
    ("model", "data", "message", "hint"),
    [
        ("resnet2", "jpeg", "unknown model 'resnet2'", "resnet20"),
        ("resnet20", "jpg", "unknown data 'jpg'", "jpeg"),
        ("resnet20", "jpg:500x375", "no module named 'jpg'", "did you mean jpeg"),
        ("quux", "jpeg", "unknown model 'quux'", "bsprof workloads"),
        ("resnet20", "jpeg:500", "'500' is neither a size WxH nor a count n=N", "jpeg[:WxH,n=N]"),
        ("resnet20", "jpeg:n=3", "at least one image for each of 10 classes", None),
        ("resnet20", "jpeg:4x4", "8 to 8192 pixels", None),
        ("resnet20", "synthetic:3x32", "neither a size CxHxW", None),
        ("resnet20", "synthetic:n=1,n=2", "'n=2'", None),
        ("resnet20", "synthetic:3x32x32,n=0", "at least one", None),
        ("resnet20", "cifar10:small", "takes no options", "cifar10"),
        ("resnet20", "imagefolder", "needs a path", "imagefolder:PATH"),
    ],
)
def test_a_name_that_cannot_be_found_or_read_is_one_line_and_a_hint(model, data, message, hint):
    with pytest.raises(BsprofError) as caught:
        check_names(model, data)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert hint is None or hint in caught.value.hint


def test_good_names_pass_and_nothing_is_generated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in ("jpeg", "jpeg:64x48,n=20", "jpeg:n=20", "synthetic:1x28x28", "cifar10", "imagefolder:elsewhere"):
        check_names("mobilenet_v2", data)
    assert not list(tmp_path.iterdir())


# --- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [
        ("resnet20", CIFAR, 0.265e6, 0.275e6),  # He et al. 2015, table 6: 0.27 M
        ("alexnet_cifar", CIFAR, 2.45e6, 2.50e6),
        ("vgg19_bn_cifar", CIFAR, 20.0e6, 20.1e6),
        # (25 + 1) 10 + (250 + 1) 20 + (180 + 1) 40 + (40 + 1) 10, by hand
        ("mnist_cnn", ImageShape(1, 28, 28), 12_930, 12_930),
    ],
)
def test_the_founding_models_have_their_published_size_and_train(name, shape, low, high):
    model = build_model(name, classes=10, shape=shape, seed=0)
    assert low <= parameters(model) <= high
    assert train_once(model, shape).shape == (2, 10)


def test_resnet20_takes_any_size_and_number_of_channels():
    shape = ImageShape(1, 28, 20)
    assert train_once(build_model("resnet20", classes=7, shape=shape, seed=0), shape).shape == (2, 7)


def test_the_option_a_shortcut_adds_no_parameters():
    names = [name for name, _ in build_model("resnet20", classes=10, shape=CIFAR, seed=0).named_parameters()]
    weights = [name for name in names if name.endswith("weight")]
    assert len(weights) == 2 * 19 + 1  # 19 convolutions, each with its batch norm, and the linear layer


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((name, 32) for name in ("mobilenet_v2", "mobilenet_v3_small", "resnet18", "densenet121", "squeezenet1_1")),
        *((name, 32) for name in ("shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5", "efficientnet_b0", "swin_t")),
        ("efficientnet_v2_s", 32),  # documented as 33, works at 32
        ("googlenet", 32),
        ("inception_v3", 75),
        ("alexnet", 63),
        ("convnext_tiny", 32),
        ("vit_b_32", 64),
        ("vit_b_16", 32),
    ],
)
def test_families_of_torchvision_train_at_their_smallest_or_a_small_size(name, side):
    shape = ImageShape(3, side, side)
    assert train_once(build_model(name, classes=10, shape=shape, seed=0), shape).shape == (2, 10)


# Regnets read a tensor while they are built, which the meta device has not; one is built for real above.
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models, exclude="regnet*"))
def test_every_model_of_torchvision_builds_and_maps_224_px_to_the_classes(name):
    shape = ImageShape(3, 224, 224)
    with torch.device("meta"):  # shapes alone: the largest has 640 M parameters
        model = build_model(name, classes=17, shape=shape, seed=0)
        assert model.train()(torch.empty(2, *shape)).shape == (2, 17)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mnist_cnn", ImageShape(3, 224, 224), "takes 28x28 images, the data gives 224x224"),
        ("alexnet_cifar", ImageShape(3, 224, 224), "takes 32x32"),
        ("vgg19_bn_cifar", ImageShape(3, 28, 28), "takes 32x32"),
        ("mobilenet_v2", ImageShape(1, 28, 28), "takes images of 3 channels, the data has 1"),
        ("inception_v3", CIFAR, "at least 75 px, the data gives 32x32"),
        ("alexnet", CIFAR, "at least 63 px"),
        ("googlenet", ImageShape(3, 8, 8), "at least 15 px"),
        ("vit_b_16", ImageShape(3, 30, 30), "cannot be built for 30x30 images"),
        ("vit_b_16", ImageShape(3, 32, 48), "square images"),
        ("maxvit_t", CIFAR, "cannot be built for 32x32 images"),
    ],
)
def test_images_that_do_not_fit_are_said_so_before_training(name, shape, message):
    with pytest.raises(BsprofError) as caught:
        build_model(name, classes=10, shape=shape, seed=0)
    assert message in caught.value.message


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (
        build_model("resnet20", classes=10, shape=CIFAR, seed=seed).state_dict()["0.0.weight"] for seed in (5, 5, 6)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


# --- the user's own model ---------------------------------------------------------------------------


def test_a_model_factory_in_the_working_directory_is_given_the_classes_if_it_wants_them(module):
    name = module("""
        from torch import nn
        def wants(num_classes): return nn.Linear(4, num_classes)
        def through(**options): return nn.Linear(4, options["num_classes"])
        def does_not(): return nn.Linear(4, 3)
        class Net(nn.Linear):
            def __init__(self, num_classes=2): super().__init__(4, num_classes)
    """)
    out = {
        factory: build_model(f"{name}:{factory}", classes=7, shape=CIFAR, seed=0).out_features
        for factory in ("wants", "through", "does_not", "Net")
    }
    assert out == {"wants": 7, "through": 7, "does_not": 3, "Net": 7}


@pytest.mark.parametrize(
    ("attribute", "message", "hint"),
    [
        ("mke", "has no 'mke'", "make"),
        ("number", "is a int, not a factory", "function"),
        ("instance", "is a Linear, not a factory", "function"),
        ("make", "returned a int", "torch.nn.Module"),
    ],
)
def test_a_factory_that_is_none_is_explained(module, attribute, message, hint):
    name = module("""
        from torch import nn
        number, instance = 3, nn.Linear(1, 1)
        def make(): return 3
    """)
    with pytest.raises(BsprofError) as caught:
        build_model(f"{name}:{attribute}", classes=7, shape=CIFAR, seed=0)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_module_that_cannot_be_imported_says_why(module):
    missing_dependency = module("import surely_not_installed")
    with pytest.raises(BsprofError, match="raised ModuleNotFoundError: No module named 'surely_not_installed'"):
        check_names(f"{missing_dependency}:make", "jpeg")
    with pytest.raises(BsprofError, match=r"no module named 'nowhere'"):
        check_names("nowhere.at.all:make", "jpeg")
    with pytest.raises(BsprofError, match="unknown model"):
        check_names("not a module:make", "jpeg")


def test_what_a_factory_raises_passes_through(module):
    name = module("def make(): raise ZeroDivisionError('mine')")
    with pytest.raises(ZeroDivisionError, match="mine"):
        build_model(f"{name}:make", classes=7, shape=CIFAR, seed=0)
    with pytest.raises(ZeroDivisionError, match="mine"):
        build_data(f"{name}:make", DataRequest(cache=Path()))


# --- the user's own data ----------------------------------------------------------------------------

OWN_DATA = """
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
    images, labels = torch.zeros(6, 3, 8, 9), torch.tensor([0, 4, 2, 0, 1, 3])

    def plain():
        dataset = TensorDataset(images, labels)
        dataset.targets = labels
        return dataset
    def pair(): return TensorDataset(images, labels), 12
    def named():
        dataset = TensorDataset(images, labels)
        dataset.classes = ["a", "b", "c", "d", "e"]
        return dataset
    class Stream(IterableDataset):
        classes = range(5)
        def __iter__(self): return zip(images, labels.tolist())
    def unknown_classes(): return TensorDataset(images, labels)
    def loader(): return DataLoader(pair()[0])
    def integers(): return TensorDataset(images.int(), labels), 5
    def flat(): return TensorDataset(images[0], labels[:3]), 5
    def empty(): return TensorDataset(images[:0], labels[:0]), 5
    def array(): return [1, 2]
    def no_classes(): return TensorDataset(images, labels), 0

    def arguments(root, image_size=64, train=False, other=1):
        seen = TensorDataset(torch.zeros(2, 3, image_size, image_size), torch.zeros(2, dtype=torch.long))
        seen.root, seen.train = root, train
        return seen, 1
"""


@pytest.mark.parametrize(("factory", "classes"), [("plain", 5), ("pair", 12), ("named", 5), ("Stream", 5)])
def test_a_data_factory_is_taken_with_its_classes_and_shape(module, request_, factory, classes):
    name = module(OWN_DATA)
    prepare_data(f"{name}:{factory}", request_)
    data = build_data(f"{name}:{factory}", request_)
    assert (data.classes, data.shape) == (classes, ImageShape(3, 8, 9))
    images, labels = next(iter(build_loader(data, settings(batch_size=4), seed=0)))
    assert (images.shape, labels.shape) == ((4, 3, 8, 9), (4,))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("unknown_classes", "how many classes"),
        ("loader", "returned a DataLoader"),
        ("integers", "a sample is a tuple of (a tensor of torch.int32 (3, 8, 9), a tensor of torch.int64 ())"),
        ("flat", "a tensor of torch.float32 (8, 9)"),
        ("empty", "is empty"),
        ("array", "returned a list of (a int, a int), a torch"),
        ("no_classes", "0 is no number of classes"),
    ],
)
def test_data_that_cannot_be_trained_on_is_explained(module, request_, factory, message):
    with pytest.raises(BsprofError) as caught:
        build_data(f"{module(OWN_DATA)}:{factory}", request_)
    assert message in caught.value.message


def test_a_data_factory_gets_what_it_accepts_and_keeps_its_defaults(module, tmp_path):
    name = module(OWN_DATA)
    plain = build_data(f"{name}:arguments", DataRequest(cache=tmp_path))
    assert (plain.shape.height, plain.dataset.train, plain.dataset.root) == (64, True, tmp_path / "datasets")
    asked = build_data(f"{name}:arguments", DataRequest(cache=tmp_path, image_size=16, root=tmp_path / "mine"))
    assert (asked.shape.height, asked.dataset.root) == (16, tmp_path / "mine")


# --- jpeg -------------------------------------------------------------------------------------------


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/*/*.jpg"))
    }


def test_jpeg_files_are_like_photographs_the_same_everywhere_and_made_once(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for cache in (first, second):
        prepare_data("jpeg:n=20", DataRequest(cache=cache))
    assert digests(first) == digests(second)
    assert len(set(digests(first).values())) == 20

    paths = sorted(first.glob("jpeg-500x375-n20-v1/*/*.jpg"))
    sizes = [path.stat().st_size for path in paths]
    assert 40_000 < np.mean(sizes) < 80_000
    for path in paths[:3]:
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
            pixels = np.asarray(image.convert("L"), dtype=float)
        # Most energy is at low frequency, as in photographs and unlike white noise (there 1 : 1).
        spectrum = np.abs(np.fft.fft2(pixels - pixels.mean())) ** 2
        radius = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None, :])
        assert spectrum[radius < 0.05].mean() > 100 * spectrum[radius > 0.2].mean()

    before = [path.stat().st_mtime_ns for path in paths]
    prepare_data("jpeg:n=20", DataRequest(cache=first))
    assert before == [path.stat().st_mtime_ns for path in paths]


def test_jpeg_is_decoded_cropped_and_normalised(request_):
    data = build_data("jpeg:80x60,n=20", request_)
    assert (data.classes, data.shape, len(data.dataset)) == (10, ImageShape(3, 224, 224), 20)
    small = build_data("jpeg:80x60,n=20", DataRequest(cache=request_.cache, image_size=32))
    image, label = small.dataset[0]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 0)
    assert -2.2 < image.min() < 0 or 0 < image.max() < 2.7
    assert [label for _, label in small.dataset.samples] == sorted(list(range(10)) * 2)


@pytest.mark.parametrize("damage", ["truncate", "delete", "add", "manifest"])
def test_a_damaged_cache_is_made_again(request_, damage):
    prepare_data("jpeg:40x30,n=10", request_)
    (folder,) = request_.cache.glob("jpeg-*-v1")
    before = digests(request_.cache)
    victim = next(folder.glob("*/*.jpg"))
    match damage:
        case "truncate":
            victim.write_bytes(victim.read_bytes()[:100])
        case "delete":
            victim.unlink()
        case "add":
            victim.with_name("another.jpg").write_bytes(victim.read_bytes())
        case "manifest":
            (folder / "manifest.json").unlink()
    prepare_data("jpeg:40x30,n=10", request_)
    assert digests(request_.cache) == before


def test_several_processes_may_generate_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from bsprof.workloads.registry import *;"
        "print(len(build_data('jpeg:200x150,n=60', DataRequest(cache=Path(sys.argv[1]))).dataset))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["60", "60"]
    assert [process.returncode for process in started] == [0, 0]
    assert not list(tmp_path.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BsprofError, match=r"cannot write images to .*file"):
        prepare_data("jpeg:40x30,n=10", DataRequest(cache=tmp_path / "file"))


# --- image folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_corrupt_file_is_named_by_the_error_that_reaches_training(request_, workers, damage):
    prepare_data("jpeg:80x60,n=10", request_)
    victim = next(request_.cache.glob("jpeg-*-v1/class_3/*.jpg"))
    content = victim.read_bytes()
    # The length stays, so that the cache still counts as complete: as a bad disk would leave it.
    bad = {"garbage": b"\0" * len(content), "truncated": content[:400].ljust(len(content), b"\0"), "empty": b""}[damage]
    folder = victim.parents[1]
    victim.write_bytes(bad)
    spec = f"imagefolder:{folder}" if damage == "empty" else "jpeg:80x60,n=10"
    data = build_data(spec, DataRequest(cache=request_.cache, image_size=16))
    batches = iter(build_loader(data, settings(batch_size=5, workers=workers), seed=0, endless=False))
    with pytest.raises(CorruptImageError) as caught:
        list(batches)
    assert f"cannot decode {victim}" in str(caught.value)
    # The error's traceback holds the iterator in a cycle; left to the garbage collector, the workers' queues are
    # finalised before the iterator can tell them to end, and each worker is waited for 5 s.
    if workers:
        batches._shutdown_workers()


def test_a_file_cut_short_is_named(tmp_path, request_):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    path = tmp_path / "images" / "cat" / "one.jpg"
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptImageError, match=r"one\.jpg: .*truncated"):
        build_data(f"imagefolder:{tmp_path / 'images'}", request_).dataset[0]


def test_an_image_folder_is_read_as_it_is(tmp_path, request_):
    for label, mode in (("cat", "RGB"), ("dog", "L"), ("eel", "RGBA")):
        (tmp_path / label).mkdir()
        Image.new(mode, (30, 20)).save(tmp_path / label / "one.png")
    spec = f"imagefolder:{tmp_path}"
    prepare_data(spec, request_)
    data = build_data(spec, request_)
    assert (data.classes, data.shape) == (3, ImageShape(3, 224, 224))
    assert [(image.shape, label) for image, label in data.dataset] == [((3, 224, 224), label) for label in range(3)]


@pytest.mark.parametrize("content", ["nothing", "no classes", "empty class", "a file"])
def test_a_folder_without_images_is_named(tmp_path, request_, content):
    folder = tmp_path / "images"
    match content:
        case "no classes":
            folder.mkdir()
        case "empty class":
            (folder / "cat").mkdir(parents=True)
        case "a file":
            folder.write_text("")
    with pytest.raises(BsprofError) as caught:
        prepare_data(f"imagefolder:{folder}", request_)
    assert str(folder) in caught.value.message
    assert "one subfolder" in caught.value.hint


# --- synthetic --------------------------------------------------------------------------------------


def test_synthetic_samples_are_fixed_and_share_a_bounded_memory(request_):
    data = build_data("synthetic:3x224x224,n=100000", request_)
    assert (len(data.dataset), data.shape) == (100_000, ImageShape(3, 224, 224))
    storages = {data.dataset[index][0].untyped_storage().data_ptr() for index in range(0, 100_000, 9973)}
    assert len(storages) == 1
    assert data.dataset[0][0].untyped_storage().nbytes() <= 32 * 1024**2
    assert torch.equal(data.dataset[3][0], build_data("synthetic:n=100000", request_).dataset[3][0])
    assert {label for _, label in itertools.islice(data.dataset, 50)} == set(range(data.classes))


def test_image_size_overrides_the_size_of_synthetic_data(request_):
    asked = DataRequest(cache=request_.cache, image_size=40)
    assert build_data("synthetic:1x28x28", asked).shape == ImageShape(1, 40, 40)
    assert build_data("synthetic:1x28x28", asked).dataset[0][0].shape == (1, 40, 40)


# --- torchvision's data sets ------------------------------------------------------------------------


def write_cifar(root, kind, monkeypatch, label_key):
    """Write a tiny set in CIFAR's format and let torchvision take its checksums for the true ones."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch():
        return {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), label_key: [0, 1, 2, 3]}

    for names in ("train_list", "test_list"):
        monkeypatch.setattr(kind, names, [[name, write(name, batch())] for name, _ in getattr(kind, names)])
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [str(label) for label in range(10)]})
    monkeypatch.setattr(kind, "meta", meta)


@pytest.mark.parametrize(
    ("name", "kind", "label_key", "classes", "count"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels", 10, 20),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels", 100, 4),
    ],
)
def test_cifar_is_read_augmented_and_resized(tmp_path, monkeypatch, name, kind, label_key, classes, count):
    write_cifar(tmp_path, kind, monkeypatch, label_key)
    prepare_data(name, DataRequest(cache=tmp_path / "cache", root=tmp_path))
    for image_size, side in ((None, 32), (32, 32), (48, 48)):
        request = DataRequest(cache=tmp_path / "cache", root=tmp_path, image_size=image_size)
        data = build_data(name, request)
        assert (data.classes, data.shape, len(data.dataset)) == (classes, ImageShape(3, side, side), count)
        image, label = data.dataset[1]
        assert (image.shape, image.dtype, label) == ((3, side, side), torch.float32, 1)


def write_mnist(root):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, 12, 28, 28))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, 12))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(range(12)))
    return folder


def test_mnist_is_read_and_trains_the_small_cnn(tmp_path):
    write_mnist(tmp_path)
    request = DataRequest(cache=tmp_path / "cache", root=tmp_path)
    prepare_data("mnist", request)
    data = build_data("mnist", request)
    assert (data.classes, data.shape, len(data.dataset)) == (10, ImageShape(1, 28, 28), 12)
    model = build_model("mnist_cnn", classes=data.classes, shape=data.shape, seed=0)
    images, _ = next(iter(build_loader(data, settings(batch_size=5), seed=0)))
    assert model(images).shape == (5, 10)


def test_a_half_written_mnist_does_not_pass_for_the_whole(tmp_path):
    images = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(BsprofError, match="mnist is not in"):
        prepare_data("mnist", DataRequest(cache=tmp_path / "cache", root=tmp_path))


def test_places365_is_read_from_its_file_list(tmp_path, monkeypatch):
    kind = torchvision.datasets.Places365

    def write(name, text):
        (tmp_path / name).write_text(text)
        return name, hashlib.md5(text.encode()).hexdigest()

    categories = "".join(f"/a/place{index} {index}\n" for index in range(365))
    monkeypatch.setattr(kind, "_CATEGORIES_META", write("categories_places365.txt", categories))
    listed = write("places365_train_standard.txt", "/a/place3/one.jpg 3\n/a/place4/two.jpg 4\n")
    monkeypatch.setattr(kind, "_FILE_LIST_META", {"train-standard": listed})
    request = DataRequest(cache=tmp_path / "cache", root=tmp_path)
    with pytest.raises(BsprofError, match=r"no images in .*data_256_standard"):
        prepare_data("places365", request)
    for label, name in (("place3", "one"), ("place4", "two")):
        folder = tmp_path / "data_256_standard" / "a" / label
        folder.mkdir(parents=True)
        Image.new("RGB", (256, 256)).save(folder / f"{name}.jpg")
    prepare_data("places365", request)
    data = build_data("places365", request)
    assert (data.classes, data.shape, len(data.dataset)) == (365, ImageShape(3, 224, 224), 2)
    assert (data.dataset[1][0].shape, data.dataset[1][1]) == ((3, 224, 224), 4)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "places365"])
def test_absent_data_names_the_place_and_both_cures(tmp_path, name):
    for root in (None, tmp_path / "nowhere"):
        request = DataRequest(cache=tmp_path, root=root)
        with pytest.raises(BsprofError) as caught:
            prepare_data(name, request)
        assert f"{name} is not in {request.datasets}" in caught.value.message
        assert "--download" in caught.value.hint and "--data-root" in caught.value.hint
        assert not request.datasets.exists()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def file_server(tmp_path, monkeypatch):
    """A folder served over HTTP on this machine, in place of MNIST's mirrors."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield folder
        server.shutdown()
        thread.join()


def serve_mnist(folder, scratch, monkeypatch):
    resources = []
    for path in sorted(write_mnist(scratch).iterdir()):
        content = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(content)
        resources.append((f"{path.name}.gz", hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)


def test_download_fetches_once_and_prints_nothing_on_stdout(tmp_path, file_server, monkeypatch, capsys):
    serve_mnist(file_server, tmp_path / "scratch", monkeypatch)
    request = DataRequest(cache=tmp_path / "cache", download=True)
    prepare_data("mnist", request)
    for path in file_server.iterdir():
        path.unlink()
    prepare_data("mnist", request)
    assert len(build_data("mnist", request).dataset) == 12
    assert not capsys.readouterr().out


def test_a_failed_download_is_one_line_and_leaves_nothing_that_passes_for_complete(tmp_path, file_server, monkeypatch):
    serve_mnist(file_server, tmp_path / "scratch", monkeypatch)
    (file_server / "train-images-idx3-ubyte.gz").write_bytes(b"cut short")
    request = DataRequest(cache=tmp_path / "cache", download=True)
    with pytest.raises(BsprofError) as caught:
        prepare_data("mnist", request)
    assert f"cannot download mnist into {request.datasets}" in caught.value.message
    assert "\n" not in caught.value.message
    with pytest.raises(BsprofError, match="mnist is not in"):
        prepare_data("mnist", DataRequest(cache=tmp_path / "cache"))


# --- loading ----------------------------------------------------------------------------------------


def numbered(count):
    labels = torch.arange(count)
    return Data(dataset=TensorDataset(torch.zeros(count, 1, 2, 2), labels), classes=count, shape=ImageShape(1, 2, 2))


def test_the_endless_sampler_visits_everything_once_a_pass_each_time_in_a_new_order():
    indices = list(itertools.islice(EndlessSampler(50, seed=3), 150))
    passes = [indices[:50], indices[50:100], indices[100:]]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert indices == list(itertools.islice(EndlessSampler(50, seed=3), 150))
    assert indices != list(itertools.islice(EndlessSampler(50, seed=4), 150))


def test_nothing_to_sample_from_is_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="nothing"):
        EndlessSampler(0, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_loader_gives_full_batches_past_the_end_of_a_small_set(workers):
    loader = build_loader(numbered(3), settings(batch_size=8, workers=workers), seed=0)
    batches = [labels for _, labels in itertools.islice(loader, 5)]
    assert [len(labels) for labels in batches] == [8] * 5
    assert torch.bincount(torch.cat(batches)).tolist() in ([14, 13, 13], [13, 14, 13], [13, 13, 14])


def test_a_finite_loader_ends_can_be_iterated_again_and_may_be_longer_than_the_set():
    for length, batches in ((None, 2), (8, 2), (4, 1), (40, 10)):
        loader = build_loader(numbered(10), settings(batch_size=4), seed=0, endless=False, length=length)
        for _ in range(2):
            assert [len(labels) for _, labels in loader] == [4] * batches
    whole = build_loader(numbered(10), settings(batch_size=10), seed=0, endless=False)
    assert sorted(next(iter(whole))[1].tolist()) == list(range(10))
    with pytest.raises(ValueError, match="endless"):
        build_loader(numbered(10), settings(), seed=0, length=4)


def test_settings_reach_the_loader_and_null_means_not_passed():
    data = numbered(4)
    chosen = build_loader(data, settings(batch_size=2, workers=2, prefetch=5, persistent_workers=True), seed=0)
    assert (chosen.num_workers, chosen.prefetch_factor, chosen.persistent_workers) == (2, 5, True)
    assert (chosen.batch_size, chosen.pin_memory, chosen.drop_last) == (2, False, True)
    plain = build_loader(data, settings(workers=2, prefetch=None, persistent_workers=None), seed=0)
    assert (plain.prefetch_factor, plain.persistent_workers) == (2, False)
    alone = build_loader(data, settings(workers=0, prefetch=2, persistent_workers=True), seed=0)
    assert (alone.num_workers, alone.prefetch_factor) == (0, None)


def test_workers_augment_the_same_way_for_the_same_seed(request_):
    data = build_data("jpeg:80x60,n=10", DataRequest(cache=request_.cache, image_size=16))
    first, same, other = (
        next(iter(build_loader(data, settings(batch_size=10, workers=1), seed=seed)))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
