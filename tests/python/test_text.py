"""From text to tokens and back, with tokenizers of all kinds."""

import json
import time

import pytest
from based import FormatError
from based._text import Detokenizer, IncrementalDecoder, StopStringFinder
from based._tokenizer import LazyTokenizer, read_tokenizer
from based._tokenizer_json import BYTE_LETTERS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers_of_all_kinds import KINDS, LETTERS, SPECIAL

TEXT = st.text(st.sampled_from("  hello world <>|. 'é你😀\n\ufffd"), max_size=24) | st.text(max_size=8)
TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
TEXTS = {kind: Detokenizer(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
BYTE_FALLBACK = ["llama", "llama_unigram", "llama_with_start"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def pieces(kind: str, prompt: list[int], ids: list[int], **options: bool) -> list[str]:
    decoder = IncrementalDecoder(TEXTS[kind], prompt, **options)
    return [*(decoder.add(token) for token in ids), decoder.flush()]


def lazy(tokenizer: Tokenizer) -> LazyTokenizer:
    return LazyTokenizer(lambda: tokenizer)


# ---- tokens to text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=TEXT, at=st.integers(0, 30), special=st.booleans())
def test_a_text_cut_anywhere_is_the_tokenizers_text(kind: str, skip: bool, text: str, at: int, special: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text + "<|sep|>" + text if special else text).ids
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    before = tokenizer.decode(ids[:at], skip_special_tokens=skip)
    if before.endswith(REPLACEMENT) or not whole.startswith(before):  # the prompt ends inside a character
        return
    assert before + "".join(pieces(kind, ids[:at], ids[at:], skip_special_tokens=skip)) == whole


@pytest.mark.parametrize("prompt", ["hello 😀😀", "hello 😀", "你好", "привет", "ééé", "é" * 100, "hello", "hello\n"])
@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_first_space_stays(kind: str, prompt: str) -> None:
    ids = TOKENIZERS[kind].encode(prompt).ids
    world = TOKENIZERS[kind].token_to_id("▁world")
    assert pieces(kind, ids, [world, world]) == [" world", " world", ""]
    # The same when a sequence goes on from what only its state knows.
    assert pieces(kind, [], [world, world], at_start=False) == [" world", " world", ""]
    assert pieces(kind, [], [world, world]) == ["world", " world", ""]


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_bytes_that_make_no_character(kind: str) -> None:
    """As a streaming UTF-8 decoder shows them; the tokenizer makes U+FFFD of the right ones beside them, too."""
    tokenizer = TOKENIZERS[kind]

    def ids(data: bytes) -> list[int]:
        return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]

    world = tokenizer.token_to_id("▁world")
    hello = tokenizer.encode("hello").ids
    found = pieces(kind, hello, [*ids("😀".encode()), *ids(b"\xff"), world])
    assert found == ["", "", "", "😀", REPLACEMENT, " world", ""]
    assert pieces(kind, hello, [*ids(b"\xf0\x9f"), world]) == ["", "", REPLACEMENT + " world", ""]
    assert pieces(kind, hello, ids(b"\xe4\xbd")) == ["", "", REPLACEMENT]
    assert pieces(kind, hello, ids(b"\xe4\xe4\xbd\xa0")) == ["", REPLACEMENT, "", "你", ""]


@given(data=st.binary(max_size=40) | st.lists(st.sampled_from(b"a\xff\xe4\xbd\xa0\xf0\x9f\x98\x80\xed\xc3")).map(bytes))
def test_any_bytes(data: bytes) -> None:
    """What bytes.decode makes of them, and never more than 3 of them waiting."""
    for kind in ("byte_level", "llama", "llama_unigram", "mixed_byte_level"):
        tokenizer = TOKENIZERS[kind]
        if "byte_level" in kind:
            letters = {v: k for k, v in _letters().items()}
            ids = [tokenizer.token_to_id(letters[byte]) for byte in data]
        else:
            ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
        prompt = tokenizer.encode("hello").ids
        found = pieces(kind, prompt, ids)
        assert "".join(found) == data.decode(errors="replace")
        for end in range(4, len(ids) + 1):
            shown = "".join(found[:end])
            assert shown.startswith(data[: end - 3].decode(errors="ignore")[:-1]) or REPLACEMENT in shown
            assert len(shown) >= len(data[: end - 3].decode(errors="ignore"))


def _letters() -> dict[str, int]:
    from based._tokenizer_json import BYTE_LETTERS

    return {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


def test_whole_characters_of_a_token_do_not_wait_for_its_last_bytes() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    cut = tokenizer.token_to_id("aä")  # an a, and the first byte of 你
    rest = [tokenizer.token_to_id(letter) for letter in ("½", "ł")]
    assert pieces("byte_level", [], [cut, *rest]) == ["a", "", "你", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_constant_cost_per_token(kind: str) -> None:
    """Of end tokens and of bytes that are never a character."""
    tokenizer = TOKENIZERS[kind]
    repeated = [tokenizer.token_to_id("</s>")]
    for name in ("<0xFF>", "ÿ", "<0xF0>", "ð"):
        if (token := tokenizer.token_to_id(name)) is not None:
            repeated.append(token)
    for token in repeated:
        decoder = IncrementalDecoder(TEXTS[kind], [0])

        def seconds(count: int, decoder: IncrementalDecoder = decoder, token: int = token) -> float:
            best = float("inf")
            for _ in range(4):
                start = time.perf_counter()
                for _ in range(count):
                    decoder.add(token)
                best = min(best, time.perf_counter() - start)
            return best

        early = seconds(200)
        for _ in range(4_000):
            decoder.add(token)
        assert seconds(200) < 8 * early + 0.002
        assert len(decoder._pending) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_single_tokens(kind: str) -> None:
    """With their spaces: that of a word in the middle of a text."""
    tokenizer, texts = TOKENIZERS[kind], TEXTS[kind]
    for token, spelled in (("▁world", " world"), ("Ġwo", " wo"), ("</s>", "</s>"), ("##lo", "lo")):
        if (id := tokenizer.token_to_id(token)) is not None:
            assert texts.token_text(id).endswith(spelled)
            assert texts.token_text(id).strip() == spelled.strip()


# ---- stop strings ----------------------------------------------------------------------------------------------------


def test_stop_strings_of_special_tokens() -> None:
    finder = StopStringFinder(["\n<e>!", "xy"], include=False, with_hidden=["\n<e>!"])
    assert finder.add("a\n", may_stop=True) == ("a", None)
    assert finder.add("", may_stop=True, hidden="<e>") == ("", None)
    assert finder.add("?x", may_stop=True) == ("\n?", None)
    assert finder.add("", may_stop=True, hidden="<e>") == ("", None)
    assert finder.add("y", may_stop=True) == ("", "xy")
    finder = StopStringFinder(["\n<e>!"], include=False, with_hidden=["\n<e>!"])
    assert finder.add("a\n", may_stop=True, hidden="<e>") == ("a", None)
    assert finder.add("! b", may_stop=True) == ("", "\n<e>!")
    finder = StopStringFinder(["<e>"], include=True, with_hidden=["<e>"])
    assert finder.add("a", may_stop=True, hidden="<e>") == ("a<e>", "<e>")


# ---- text to tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama_unigram", "llama_with_start", "metaspace", "byte_level"])
@settings(max_examples=40)
@given(text=st.text("helo wrd", min_size=1, max_size=12), at=st.integers(0, 12))
def test_text_in_parts_is_one_text(kind: str, text: str, at: int) -> None:
    tokenizer = lazy(TOKENIZERS[kind])
    ids = tokenizer.encode(text[:at], at_start=True) if text[:at] else tokenizer.encode("", at_start=True)
    more = tokenizer.encode(text[at:], at_start=not text[:at])
    whole = TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text).ids)
    assert TOKENIZERS[kind].decode([*ids, *more]) == whole


@pytest.mark.parametrize("kind", ["llama", "llama_unigram", "metaspace"])
def test_words_in_parts(kind: str) -> None:
    tokenizer = lazy(TOKENIZERS[kind])
    parts = [*tokenizer.encode("hel", at_start=True), *tokenizer.encode("lo", at_start=False)]
    assert "".join(TOKENIZERS[kind].id_to_token(id) for id in parts) == "▁hello"


def test_only_the_first_space_is_left_out() -> None:
    """What a special token in a text is followed by is read as in any text."""
    tokenizer = TOKENIZERS["llama"]
    encoded = lazy(tokenizer).encode("lo<|sep|>hel lo", at_start=False)
    assert encoded == tokenizer.encode("hel lo<|sep|>hel lo", add_special_tokens=False).ids[-len(encoded) :]
    assert tokenizer.decode(encoded, skip_special_tokens=False) == "lo<|sep|> hel lo"
    assert lazy(tokenizer).encode("<|sep|>lo", at_start=False)[0] == tokenizer.token_to_id("<|sep|>")


def test_a_prefix_space_of_byte_level_tokenizers() -> None:
    tokenizer = KINDS["byte_level"](prefix=True)
    assert tokenizer.decode(lazy(tokenizer).encode("lo", at_start=True)) == " lo"
    assert tokenizer.decode(lazy(tokenizer).encode("lo", at_start=False)) == "lo"


@pytest.mark.parametrize("kind", ["byte_level", "llama", "llama_unigram"])
def test_special_tokens_as_letters(kind: str) -> None:
    tokenizer = lazy(TOKENIZERS[kind])
    special = {TOKENIZERS[kind].token_to_id(token.content) for token in SPECIAL}
    for at_start in (True, False):
        ids = tokenizer.encode("a</s>b", at_start=at_start)
        assert special & {*ids}
        letters = tokenizer.encode("a</s>b", at_start=at_start, split_special_tokens=True)
        assert not special & {*letters}
        assert TOKENIZERS[kind].decode(letters) == "a</s>b"
    assert tokenizer.encode("</s>", at_start=True)[-1] in special  # the tokenizer itself is as it was


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


def test_settings_of_a_training_are_left_out(tmp_path) -> None:
    tokenizer = KINDS["llama"]()
    text = "hello world hello world"
    whole = tokenizer.encode(text).ids
    for change in (
        lambda t: t.enable_truncation(3),
        lambda t: t.enable_truncation(3, direction="left", strategy="only_first"),
        lambda t: t.enable_padding(length=32, pad_id=2, pad_token="</s>"),
        lambda t: t.enable_padding(pad_to_multiple_of=64, direction="left"),
        lambda t: setattr(t.model, "dropout", 0.9),
    ):
        changed = KINDS["llama"]()
        change(changed)
        (tmp_path / "tokenizer.json").write_text(changed.to_str())
        read = read_tokenizer(tmp_path / "tokenizer.json")
        assert all(read.encode(text).ids == whole for _ in range(5))
        description = json.loads(read.to_str())
        assert (description["truncation"], description["padding"]) == (None, None)


def without(tokenizer: Tokenizer, *letters: str, **changes: object) -> str:
    document = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if not set("".join(pair)) & {*letters}]
    document["model"]["vocab"] = {token: id for token, id in vocabulary.items() if not set(token) & {*letters}}
    document["model"] |= changes
    return json.dumps(document)


@pytest.mark.parametrize("as_normalizer", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "mixed_byte_level"])
def test_a_byte_without_a_token(kind: str, as_normalizer: bool, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = KINDS[kind]()
    if as_normalizer:
        tokenizer.pre_tokenizer, tokenizer.normalizer = None, normalizers.ByteLevel()
    path.write_text(without(tokenizer))
    assert read_tokenizer(path).decode(read_tokenizer(path).encode("é€x").ids) == "é€x"
    for letters, found in (
        ("Ã", 'found no token "\\u00c3", the letter of byte 195'),
        ("Ãb", "a text would lose bytes 98, 195"),
        ([*"abcdefghij", "Ġ"], "bytes 32, 97, 98, 99, 100, 101, 102, 103 and 3 more"),
        (BYTE_LETTERS[0], "byte 0"),
        (BYTE_LETTERS[0xF4], "byte 244"),
        (BYTE_LETTERS[0xBF], "byte 191"),
    ):
        path.write_text(without(tokenizer, *letters))
        with pytest.raises(FormatError) as error:
            read_tokenizer(path)
        assert str(error.value).startswith(f"{path}: model.vocab: found no token")
        assert found in str(error.value)
        assert "expected one for each byte of a text, since there is no unk_token" in str(error.value)


def test_a_byte_that_needs_no_token(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = KINDS["byte_level"]()
    path.write_text(without(tokenizer, *(BYTE_LETTERS[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100)))))
    read_tokenizer(path)  # UTF-8 has no such bytes
    path.write_text(without(tokenizer, "Ã", unk_token="a"))
    assert read_tokenizer(path).encode("é").tokens == ["a", "©"]
    tokenizer.normalizer = normalizers.Lowercase()
    path.write_text(without(tokenizer, *LETTERS.upper()))
    assert read_tokenizer(path).decode(read_tokenizer(path).encode("Éa B").ids) == "éa b"
    path.write_text(without(tokenizer, *LETTERS.upper(), "b"))
    with pytest.raises(FormatError, match="would lose byte 98"):
        read_tokenizer(path)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_all_kinds_are_read(kind: str, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(KINDS[kind]().to_str())
    text = "hello world"
    assert read_tokenizer(tmp_path / "tokenizer.json").encode(text).ids == TOKENIZERS[kind].encode(text).ids
