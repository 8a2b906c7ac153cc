"""ImageNet's labels, and label files."""

from pathlib import Path

import pytest

from dpn_jax.images.labels import imagenet_labels, read_labels


def test_imagenet_labels() -> None:
    labels = imagenet_labels()
    assert len(labels) == 1000 == len({label.synset for label in labels})
    assert labels is imagenet_labels()
    assert (labels[281].synset, labels[281].name) == ("n02123045", "tabby, tabby cat")
    assert labels[207].name == "golden retriever"
    assert labels[999].name.startswith("toilet tissue")
    assert all(label.synset[0] == "n" and label.synset[1:].isdigit() and label.name.strip() for label in labels)


@pytest.mark.parametrize(
    "text", ["cat\ndog\nfüchse\n", "cat\ndog\nfüchse", "\ufeffcat\r\ndog\r\nfüchse\r\n", " cat\ndog \nfüchse\n\n\n"]
)
def test_read_labels(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode())
    assert read_labels(path, 3) == ("cat", "dog", "füchse")


def test_read_labels_splits_only_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("a\x0bb\u2028c\nd".encode())
    assert read_labels(tmp_path / "labels.txt", 2) == ("a\x0bb\u2028c", "d")


@pytest.mark.parametrize(
    "text",
    [
        '["cat", "dog"]',
        '{\n "1": "dog",\n "0": "cat"\n}\n',
        '{"0": ["n02121808", "cat"], "1": ["n02084071", "dog"]}',
    ],
)
def test_read_labels_from_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    assert read_labels(tmp_path / "labels.json", 2) == ("cat", "dog")


@pytest.mark.parametrize("text", ['{"cat": 0, "dog": 1}', "[0, 1]", '{"1": "cat", "2": "dog"}', "[[], []]", "[{}, 2]"])
def test_read_labels_from_json_of_another_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ValueError, match="labels: label file is JSON, but no list of names"):
        read_labels(tmp_path / "labels", 2)


@pytest.mark.parametrize("text", ["a\n\nc\n", '["a", " ", "c"]'])
def test_read_labels_with_an_empty_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=r"labels\.txt: label file has no name for class 1"):
        read_labels(tmp_path / "labels.txt", 3)


def test_a_name_may_begin_like_json(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("[unknown]\n{other}\n")
    assert read_labels(tmp_path / "labels.txt", 2) == ("[unknown]", "{other}")


@pytest.mark.parametrize(("text", "found"), [("a\nb\n", 2), ("", 0), ("\n\n", 0), ("a\nb\nc\nd\n", 4)])
def test_read_labels_of_another_length(tmp_path: Path, text: str, found: int) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"labels.txt: label file has {found} labels.* has 3 classes"):
        read_labels(tmp_path / "labels.txt", 3)


def test_read_labels_missing_or_not_text(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="no such label file"):
            read_labels(path, 3)
    (tmp_path / "labels.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"labels\.txt: label file cannot be read as UTF-8"):
        read_labels(tmp_path / "labels.txt", 1)
