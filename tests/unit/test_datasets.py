"""The built-in sets: digits, Fashion-MNIST's IDX files, and made pictures; none is downloaded."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knl.config import Data
from knl.data.arrays import read_digits, read_fashion_mnist, read_idx
from knl.data.dataset import open_dataset
from knl.errors import InputError

quick = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
FILES += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(values):
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + shape + values.astype(np.uint8).tobytes()


def refusal(path, dimensions=1):
    with pytest.raises(InputError) as caught:
        read_idx(path, dimensions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nearest_mean(train, test):
    """Share of test pictures whose class has the nearest mean of training pictures."""
    (images, labels), (tests, answers) = train, test
    means = np.stack([images[labels == k].mean(axis=0).ravel() for k in np.unique(labels)])
    rows = tests.reshape(len(tests), -1)
    distances = (means**2).sum(axis=1) - 2 * rows @ means.T
    return float((np.unique(labels)[distances.argmin(axis=1)] == answers).mean())


def test_digits_are_split_into_two_parts_that_share_no_picture():
    from sklearn.datasets import load_digits

    train, test = read_digits("")
    assert train.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int64
    assert set(train.labels) == set(test.labels) == set(range(10))
    images, labels = load_digits(return_X_y=True)
    mean, spread = float(images.mean()), float(images.std())
    together = [
        (label, tuple(np.rint(image.ravel() * spread + mean).astype(int)))
        for split in (train, test)
        for image, label in zip(split.images, split.labels)
    ]
    # All of scikit-learn's pictures, each as often as there: nothing is in both parts.
    assert sorted(together) == sorted((k, tuple(row.astype(int))) for row, k in zip(images, labels))


def test_digits_are_the_same_every_time_and_scaled_by_the_training_part():
    (train, test), (again, test_again) = read_digits(""), read_digits("")
    np.testing.assert_array_equal(train.images, again.images)
    np.testing.assert_array_equal(test.labels, test_again.labels)
    assert abs(train.images.mean()) < 1e-5 and abs(train.images.std() - 1) < 1e-5
    assert nearest_mean((train.images, train.labels), (test.images, test.labels)) > 0.85


@pytest.mark.parametrize("packed", [False, True])
@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 2**32))
def test_an_idx_file_reads_back_as_written(tmp_path, packed, shape, seed):
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / ("file.gz" if packed else "file")
    path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    found = read_idx(tmp_path / "file", len(shape))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)


@quick
@given(cut=st.integers(0, 27), packed=st.booleans())
def test_a_file_cut_short_anywhere_is_named(tmp_path_factory, cut, packed):
    path = tmp_path_factory.mktemp("cut") / "labels"
    whole = idx(np.arange(20))[:cut]
    if packed:
        path.with_name("labels.gz").write_bytes(gzip.compress(whole))
    else:
        path.write_bytes(whole)
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("content", "dimensions"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(20), 1),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1]) + bytes(4), 1),  # floats, not bytes
        (idx(np.zeros((2, 3))), 1),
        (idx(np.zeros(6)), 3),
        (idx(np.zeros(6)) + b"x", 1),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**22, 2**21, 2**21), 3),  # product 2^64
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, content, dimensions):
    path = tmp_path / "images"
    path.write_bytes(content)
    assert str(path) in refusal(path, dimensions)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not packed", "empty"])
def test_a_damaged_gz_file_is_named(tmp_path, damage):
    packed = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 9, 2000))))
    contents = {
        "cut": packed[:-100],
        "flipped": packed[:20] + bytes(b ^ 0xFF for b in packed[20:60]) + packed[60:],
        "not packed": b"labels",
        "empty": b"",
    }
    (tmp_path / "labels.gz").write_bytes(contents[damage])
    assert str(tmp_path / "labels") in refusal(tmp_path / "labels")


def test_a_missing_file_is_named_with_the_key_to_set(tmp_path):
    message = refusal(tmp_path / "labels")
    assert str(tmp_path / "labels") in message and "data.path" in message


def write_fashion(folder, packed=False, **changes):
    """40 and 20 pictures, each class a bright row, in Fashion-MNIST's layout."""
    random = np.random.default_rng(0)
    for count, part in ((40, "train"), (20, "t10k")):
        labels = np.arange(count) % 10
        images = random.integers(0, 50, (count, 28, 28))
        images[np.arange(count), 2 * labels] = 255
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(changes.get(f"{part}_{kind[:6]}", values))
            path = folder / f"{part}-{kind}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_a_fashion_mnist_folder_becomes_a_data_set(tmp_path, packed):
    write_fashion(tmp_path, packed)
    dataset = open_dataset(Data(name="fashion-mnist", path=str(tmp_path)), seed=0)
    assert (dataset.train_samples, dataset.test_samples) == (40, 20)
    assert (dataset.channels, dataset.classes, dataset.pixels) == (1, 10, 28)
    images, labels = dataset.train_batch(np.array([13, 7]), 0)
    assert images.shape == (2, 1, 28, 28) and labels.tolist() == [3, 7]
    assert [int(image.mean(axis=2).argmax()) for image in images] == [6, 14]
    everything = dataset.train_batch(np.arange(40), 0)[0]
    assert abs(everything.mean()) < 1e-5 and abs(everything.std() - 1) < 1e-5
    tests, labels = dataset.test_batch(np.arange(20))
    np.testing.assert_array_equal(tests, read_fashion_mnist(str(tmp_path))[1].images)
    assert labels.tolist() == [*range(10), *range(10)] and (tests != everything[:20]).any()


@pytest.mark.parametrize("name", FILES)
def test_each_file_missing_from_a_fashion_mnist_folder_is_named(tmp_path, name):
    write_fashion(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        read_fashion_mnist(str(tmp_path))


@pytest.mark.parametrize("labels", [np.arange(19) % 10, np.arange(20)])
def test_labels_that_do_not_fit_the_pictures_are_refused(tmp_path, labels):
    write_fashion(tmp_path, t10k_labels=labels)
    with pytest.raises(InputError, match="t10k"):
        read_fashion_mnist(str(tmp_path))


@pytest.mark.parametrize("shape", [(20, 28, 30), (20, 14, 14)])
def test_pictures_that_are_not_square_or_of_two_sizes_are_refused(tmp_path, shape):
    write_fashion(tmp_path, t10k_images=np.zeros(shape))
    with pytest.raises(InputError, match=r"must be square, of one size"):
        read_fashion_mnist(str(tmp_path))


def synthetic(seed=0, **keys):
    return open_dataset(Data(name="synthetic", **keys), seed)


@quick
@given(st.integers(8, 70), st.integers(2, 1500), st.integers(1, 10**9))
def test_made_pictures_come_in_any_size_and_number_of_classes(size, classes, samples):
    dataset = synthetic(image_size=size, classes=classes, samples=samples)
    numbers = np.array([0, samples - 1])
    images, labels = dataset.train_batch(numbers, 0)
    assert images.shape == (2, 3, size, size) and images.dtype == np.float32
    assert labels.dtype == np.int64 and ((labels >= 0) & (labels < classes)).all()
    assert (dataset.classes, dataset.pixels, dataset.train_samples) == (classes, size, samples)
    for again, epoch in ((dataset, 5), (synthetic(9, image_size=size, classes=classes), 0)):
        np.testing.assert_array_equal(again.train_batch(numbers, epoch)[0], images)


def test_a_made_picture_larger_than_the_bank_of_noise_is_made():
    images, _ = synthetic(image_size=600, samples=4).train_batch(np.arange(2), 0)
    assert np.isfinite(images).all() and (images[0] != images[1]).mean() > 0.9


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_made_pictures_can_be_told_apart_by_what_was_trained_on(classes):
    dataset = synthetic(image_size=16, classes=classes, samples=2000)
    train, test = dataset.train_batch(np.arange(2000), 0), dataset.test_batch(np.arange(200))
    assert len(set(test[1])) > 0.8 * classes
    assert nearest_mean(train, test) > 0.9


def test_made_test_pictures_are_never_trained_on():
    dataset = synthetic(image_size=8, samples=500)
    assert dataset.test_samples == 50
    trained = {image.tobytes() for image in dataset.train_batch(np.arange(500), 0)[0]}
    tested = {image.tobytes() for image in dataset.test_batch(np.arange(50))[0]}
    assert len(trained) == 500 and len(tested) == 50 and not trained & tested


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_augmented_pictures_change_with_the_epoch_and_test_pictures_do_not(name):
    data = Data(name=name, image_size=8, crop=6, augment="crop-flip", samples=100)
    one, again = open_dataset(data, seed=3), open_dataset(data, seed=3)
    samples = np.arange(50)
    first, labels = one.train_batch(samples, 0)
    assert first.shape[2:] == (6, 6) and one.test_batch(samples[:5])[0].shape[2:] == (6, 6)
    np.testing.assert_array_equal(again.train_batch(samples[::-1], 0)[0][::-1], first)
    later, same_labels = one.train_batch(samples, 1)
    assert (later != first).any(axis=(1, 2, 3)).mean() > 0.8
    np.testing.assert_array_equal(same_labels, labels)
    other_seed = open_dataset(data, seed=4)
    assert (other_seed.train_batch(samples, 0)[0] != first).any()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "packed"}, ["packed"]),
        ({"name": "digits", "augment": "random-resized-crop"}, ["data.augment", "crop-flip"]),
        ({"name": "digits", "image_size": 28}, ["data.image_size = 28", "8"]),
        ({"name": "digits", "crop": 9}, ["data.crop = 9", "8"]),
        ({"name": "synthetic", "image_size": 7}, ["data.image_size = 7", "8"]),
        ({"name": "fashion-mnist", "path": "/nowhere"}, ["/nowhere", "data.path"]),
    ],
)
def test_what_a_set_cannot_be_is_refused_by_the_key(keys, words):
    with pytest.raises(InputError) as caught:
        open_dataset(Data(**keys), seed=0)
    assert all(word in str(caught.value) for word in words)
