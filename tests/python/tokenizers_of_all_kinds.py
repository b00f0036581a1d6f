"""Small tokenizers of the kinds that models have."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [("h", "e"), ("l", "o"), ("▁", "h"), ("▁h", "el"), ("▁hel", "lo"), ("w", "o"), ("▁", "wo"), ("r", "l")]
SPECIAL = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<|sep|>")]


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_level(*, prefix: bool = False) -> Tokenizer:
    """GPT-2's kind: every token is bytes."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("l", "o"), ("h", "e"), ("Ġ", "w"), ("Ġw", "o"), ("ð", "Ł"), ("ä", "½"), ("a", "ä")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def _with_bytes() -> dict[str, int]:
    vocabulary = {"<unk>": 0}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for token in ("▁", *LETTERS, "▁world", "he", "el", "lo", *(left + right for left, right in MERGES)):
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


def llama() -> Tokenizer:
    """Llama's kind: a space before each text, bytes for letters that the vocabulary lacks."""
    merges = [*MERGES, ("e", "l")]
    model = models.BPE(vocab=_with_bytes(), merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(tokenizer)


def llama_unigram() -> Tokenizer:
    """SentencePiece's Unigram with bytes, its space put by Metaspace."""
    scores = [(token, -float(len(token) == 1) - 2.0) for token in _with_bytes()]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _with_special(tokenizer)


def llama_with_start() -> Tokenizer:
    """Llama's kind, which puts <s> before each text."""
    tokenizer = llama()
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's kind, without bytes."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_special(tokenizer)


def wordpiece() -> Tokenizer:
    """BERT's kind."""
    vocabulary = {"[UNK]": 0}
    for token in (*LETTERS, *("##" + c for c in LETTERS), "hello", "##lo", "world", ".", ",", "'"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def end_of_word() -> Tokenizer:
    """The first BPE's kind: a word's last token says that it ends."""
    vocabulary = {token: i for i, token in enumerate((*LETTERS, *(c + "</w>" for c in LETTERS), "lo</w>"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("l", "o</w>")], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return _with_special(tokenizer)


def mixed_byte_level() -> Tokenizer:
    """Bytes in each token, and a step behind them."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def no_decoder() -> Tokenizer:
    """Words, joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_special(tokenizer)


KINDS = {
    make.__name__: make
    for make in (
        byte_level,
        llama,
        llama_unigram,
        llama_with_start,
        metaspace,
        wordpiece,
        end_of_word,
        mixed_byte_level,
        no_decoder,
    )
}
