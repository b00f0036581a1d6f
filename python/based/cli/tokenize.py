"""Turn text into token ids, or with --decode ids into text.

Ids are written on one line, separated by spaces; they are read separated by spaces, commas or newlines.
"""

import argparse

from based._tokenizer_json import tokenizer_errors
from based.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    _common.add_text_arguments(parser, "text")
    _common.add_model_arguments(parser)
    parser.add_argument("-d", "--decode", action="store_true", help="the input is token ids, the output their text")
    parser.add_argument("--json", action="store_true", help="one JSON object: text, token_ids, tokens")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from based._loading import find_tokenizer

    text = _common.read_text(args, "text")
    ids = _common.parse_ids(text) if args.decode else []
    found = find_tokenizer(args.model, args.revision, args.tokenizer)
    tokenizer = _common.require_tokenizer(found.get(), args.model)
    if args.decode:
        for token in ids:
            if not 0 <= token < tokenizer.get_vocab_size():
                raise ValueError(f"token id {token} is outside [0, {tokenizer.get_vocab_size()})")
        with tokenizer_errors("the tokenizer failed on these tokens"):
            text = tokenizer.decode(ids, skip_special_tokens=False)
    else:
        ids = found.encode(text, at_start=True, split_special_tokens=args.split_special_tokens)
    if args.json:
        tokens = [tokenizer.id_to_token(token) for token in ids]
        print(_common.to_json({"text": text, "token_ids": ids, "tokens": tokens}))
    else:
        print(text if args.decode else " ".join(map(str, ids)))
