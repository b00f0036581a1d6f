"""vocab.json and merges.txt: the tokenizer that they make, and what damaged ones are answered with."""

import json
import shutil
from pathlib import Path

import based
import pytest
from based import FormatError
from based._tokenizer import read_tokenizer
from based._tokenizer_files import find_tokenizer, read_tokenizer_json
from based._tokenizer_json import BYTE_LETTERS
from based.convert import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer

from tests.reference.checkpoints import golden_like

END = "<|endoftext|>"
TEXTS = [
    "",
    " ",
    "Hello, world! It's the year 2024.",
    "  two  spaces\tand a tab\n\n\nnewlines \r\n end ",
    "naïve café, Ünïcödé; 日本語のテキスト, русский, عربى",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji \U0001f9d1\u200d\U0001f4bb",
    "\0\x01\x7f\x80\xad\u2028\ufeff\U0010ffff",
    "the quick brown fox jumps over the lazy dog " * 40,
    f"before{END}after {END}{END} x<|endoftext",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A directory with the vocab.json and merges.txt of a small training."""
    directory = tmp_path_factory.mktemp("trained")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([*TEXTS, Path(__file__).read_text()] * 3, vocab_size=700, special_tokens=[END])
    tokenizer.save_model(str(directory))
    assert (directory / "merges.txt").read_text().startswith("#version")
    return directory


@pytest.fixture
def files(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "files"))


def expected_tokenizer(directory: Path, **options) -> ByteLevelBPETokenizer:
    made = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), **options)
    made.add_special_tokens([END])
    return made


def read(directory: Path) -> Tokenizer:
    return read_tokenizer(find_tokenizer(directory, None))


def change(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_the_library_gives(trained, text):
    made, expected = read(trained), expected_tokenizer(trained)
    assert made.encode(text).ids == expected.encode(text).ids
    assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text
    assert made.get_vocab() == expected.get_vocab()


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text(trained, text):
    made = read(trained)
    assert made.encode(text).ids == expected_tokenizer(trained).encode(text).ids
    assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


def test_the_end_token_is_special_though_no_file_says_so(trained):
    made = read(trained)
    (id,) = made.encode(END).ids
    assert made.get_added_tokens_decoder()[id].special
    assert made.decode([id]) == ""


def test_prefix_space_and_start_token(files):
    options = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True, "bos_token": END}
    (files / "tokenizer_config.json").write_text(json.dumps(options))
    made, expected = read(files), expected_tokenizer(files, add_prefix_space=True)
    assert made.encode("Hello").ids == [made.token_to_id(END), *expected.encode("Hello").ids]
    assert made.encode("Hello", add_special_tokens=False).ids == expected.encode("Hello").ids


def test_special_tokens_of_all_files(files):
    size = len(json.loads((files / "vocab.json").read_text()))
    pad = {"__type": "AddedToken", "content": "<pad>", "lstrip": True, "rstrip": False, "single_word": False}
    decoder = {str(size): {"content": "<a>", "special": True}, str(size + 1): {"content": "<b>", "special": False}}
    config = {"tokenizer_class": "GPT2TokenizerFast", "pad_token": pad, "added_tokens_decoder": decoder}
    (files / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, "model_max_length": 1024}))
    (files / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<c>": size + 2}))
    (files / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": END, "normalized": False}, "additional_special_tokens": ["<d>", "<c>"]})
    )
    made = read(files)
    ids = {token: made.token_to_id(token) for token in ("<a>", "<b>", "<c>", "<pad>", "<d>")}
    assert list(ids.values()) == list(range(size, size + 5))
    added = made.get_added_tokens_decoder()
    assert {added[id].content: added[id].special for id in ids.values()} == dict.fromkeys(ids, True) | {"<b>": False}
    assert added[ids["<pad>"]].lstrip
    assert made.encode("x  <pad><d>").ids == [*made.encode("x").ids, ids["<pad>"], ids["<d>"]]

    library = expected_tokenizer(files)
    library.add_tokens([AddedToken(token) for token in ("<a>", "<b>", "<c>")])
    assert made.encode("x<a> <b>y<c>").ids == library.encode("x<a> <b>y<c>").ids


def test_convert_and_load(files, tmp_path, monkeypatch):
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "cache"))
    checkpoint = golden_like()
    size = len(json.loads((files / "vocab.json").read_text()))
    for config in (checkpoint.config, checkpoint.expected):
        config["vocab_size"] = size
    checkpoint.expected["padded_vocab_size"] = -(-size // 8) * 8
    published = tmp_path / "published"
    checkpoint.write(published)
    for path in files.iterdir():
        shutil.copy(path, published)

    convert(published, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    ids = expected_tokenizer(files).encode("Hello, world").ids
    assert based.load(tmp_path / "model", device="cpu").encode("Hello, world") == ids
    assert based.load(published, device="cpu").encode("Hello, world") == ids
    other = tmp_path / "other"
    golden_like().write(other)
    assert based.load(other, device="cpu", tokenizer=files).encode("Hello, world") == ids
    convert(other, tmp_path / "second", tokenizer=files)
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()

    (published / "tokenizer.json").write_text('{"a": 1}')  # is what counts where it is
    assert find_tokenizer(published, None) == published / "tokenizer.json"


def test_a_changed_merges_file_is_noticed(files, tmp_path, monkeypatch):
    """What load() keeps in its cache depends on it."""
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "cache"))
    golden_like().write(tmp_path / "published")
    shutil.copy(files / "vocab.json", tmp_path / "published")
    (tmp_path / "published" / "merges.txt").write_text("#version: 0.2\n")
    based.load(tmp_path / "published", device="cpu")
    shutil.copy(files / "merges.txt", tmp_path / "published")
    based.load(tmp_path / "published", device="cpu")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_half_of_the_files(files):
    (files / "merges.txt").unlink()
    with pytest.raises(FormatError, match=r"vocab\.json: found no merges\.txt beside it, expected both.*--tokenizer"):
        find_tokenizer(files, None)
    (files / "vocab.json").rename(files / "other")
    assert find_tokenizer(files, None) is None
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
        find_tokenizer(files, files)


def edit_vocab(edit):
    return lambda files: change(files / "vocab.json", edit)


def merges(text):
    return lambda files: (files / "merges.txt").write_text(text, encoding="utf-8")


def config(**values):
    return lambda files: (files / "tokenizer_config.json").write_text(json.dumps(values))


def added(**values):
    return lambda files: (files / "added_tokens.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda files: (files / "vocab.json").write_text("[]"), "vocab.json: found list, expected an object"),
        (lambda files: (files / "vocab.json").write_text('{"a": 1, "a": 2}'), "vocab.json: not valid JSON: key 'a'"),
        (lambda files: (files / "vocab.json").write_bytes(b"{\xff"), "vocab.json: not valid JSON"),
        (edit_vocab(lambda v: v.update({"x!": 3})), 'and "x!": found id 3 for both'),
        (edit_vocab(lambda v: v.update({"x!": -1})), 'token "x!": found id -1, expected an integer from 0'),
        (edit_vocab(lambda v: v.update({"x!": True})), 'token "x!": found id true'),
        (edit_vocab(lambda v: v.update({"x!": 2**40})), 'token "x!": found id 1099511627776'),
        (edit_vocab(lambda v: v.update({"x!": 1.0})), 'token "x!": found id 1.0'),
        (edit_vocab(lambda v: v.update({"": 9999})), 'vocab.json: a token: found "", expected a text'),
        (edit_vocab(lambda v: v.update({"\ud800": 9999})), "half of a surrogate pair"),
        (edit_vocab(lambda v: v.pop(BYTE_LETTERS[0])), "the letter of byte 0, expected all 256"),
        (edit_vocab(lambda v: [v.pop(x) for x in BYTE_LETTERS[:3]]), "byte 0, nor those of 2 other bytes"),
        (merges("#version: 0.2\na zzzz\n"), 'merges.txt: line 2: found token "zzzz", expected one that vocab.json has'),
        (merges("#version: 0.2\nq z\n"), 'merges.txt: line 2: found token "qz", expected one that vocab.json has'),
        (merges("t h\n\nt h\n"), 'merges.txt: line 2: found "", expected two tokens with one space'),
        (merges("t h\nt h"), 'merges.txt: line 2: found "t h", which line 1 has already'),
        (merges("t  h"), 'merges.txt: line 1: found "t  h", expected two tokens'),
        (merges("t h e"), 'merges.txt: line 1: found "t h e", expected two tokens'),
        (merges("t h\0"), 'merges.txt: line 1: found token "h\\u0000"'),
        (
            lambda files: (files / "merges.txt").write_bytes(b"t h\n\xff"),
            "merges.txt: found bytes that are not UTF-8 at 4",
        ),
        (merges("version https://git-lfs.github.com/spec/v1\n"), "merges.txt: found a Git LFS pointer"),
        (config(tokenizer_class="Qwen2Tokenizer"), 'tokenizer_class: found "Qwen2Tokenizer", expected GPT2Tokenizer'),
        (config(add_prefix_space=1), "tokenizer_config.json: add_prefix_space: found 1, expected true or false"),
        (config(add_bos_token=True, bos_token=None), "add_bos_token: found true, expected a bos_token"),
        (config(bos_token=3), "tokenizer_config.json: bos_token: found 3, expected a text"),
        (config(bos_token={"lstrip": True}), "bos_token: found null, expected a text"),
        (config(pad_token={"content": "x", "lstrip": "no"}), 'lstrip: found "no", expected true or false'),
        (config(additional_special_tokens="x"), 'additional_special_tokens: found "x", expected a list'),
        (config(additional_special_tokens=[""]), "additional_special_tokens: entry 0: found"),
        (config(added_tokens_decoder=[1]), "added_tokens_decoder: found [1], expected an object"),
        (config(added_tokens_decoder={"x": "y"}), 'added_tokens_decoder: "x": expected a token\'s id'),
        (config(added_tokens_decoder={"3": "y!"}), 'found id 3 for "y!", which is that of'),
        (config(added_tokens_decoder={"9": END}), f'found id 9 for "{END}", which has id 0 already'),
        (added(x9=700000), 'added_tokens.json: token "x9": found id 700000, expected'),
        (added(x9="1"), 'added_tokens.json: token "x9": found id "1"'),
        (added(x9=None), 'added_tokens.json: token "x9": found id null'),
        (lambda files: (files / "special_tokens_map.json").write_text("3"), "special_tokens_map.json: found int"),
    ],
)
def test_damage(files, damage, fragment):
    damage(files)
    with pytest.raises(FormatError) as caught:
        read_tokenizer_json(files)
    assert fragment in str(caught.value)
    assert str(files) in str(caught.value)


def test_files_of_other_systems(files):
    """\\r\\n, no last newline, no first line of a version."""
    ids = read(files).encode(TEXTS[2]).ids
    lines = (files / "merges.txt").read_bytes().removesuffix(b"\n").split(b"\n")
    for changed in (b"\r\n".join(lines), b"\n".join(lines[1:]), b"\n".join(lines[1:]) + b"\n"):
        (files / "merges.txt").write_bytes(changed)
        assert read(files).encode(TEXTS[2]).ids == ids


def test_cut_anywhere(files):
    """A vocab.json that was cut is never taken; merges.txt may end after any line."""
    for name, every_cut in (("vocab.json", True), ("merges.txt", False)):
        whole = (files / name).read_bytes()
        refusals = []
        for size in range(0, len(whole), max(1, len(whole) // 60)):
            (files / name).write_bytes(whole[:size])
            try:
                read_tokenizer_json(files)
            except FormatError as error:
                refusals.append(str(error))
        (files / name).write_bytes(whole)
        assert len(refusals) >= 60 if every_cut else refusals
        assert all(name in refusal for refusal in refusals)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_huge_files(files, name):
    with (files / name).open("ab") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(FormatError, match=rf"{name}: {(32 << 20) + 1} bytes.*expected at most {32 << 20}"):
        read_tokenizer_json(files)
