"""Generation: golden ids, text, stop strings, streaming, sessions."""

import asyncio
import itertools
import json
import time
from pathlib import Path

import based
import numpy as np
import pytest
from based._text import IncrementalDecoder, StopStringFinder
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
GREEDY = based.SamplingParams(max_tokens=24, temperature=0)


def greedy(**fields):
    return based.SamplingParams(temperature=0, **({"max_tokens": 24} | fields))


# ---- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["based-tiny", "based-tiny-bf16"])
def test_greedy_ids_match_golden(case, models, golden):
    expected = golden(case)
    outputs = models(case).generate(expected["input_ids"], GREEDY)
    for output, ids in zip(outputs, expected["greedy_ids"], strict=True):
        assert output.prompt is None
        assert output.prompt_token_ids + output.outputs[0].token_ids == ids.tolist()
        assert output.outputs[0].finish_reason == "length"


def test_short_prompts_match_golden(model, golden):
    expected = golden("based-tiny", "short")
    for n in (1, 2, 3):
        outputs = model.generate(expected[f"input_ids_{n}"], GREEDY)
        found = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
        assert found == expected[f"greedy_ids_{n}"].tolist()


def test_neighbours_and_batch_size_do_not_matter(model):
    prompts = ["a", "bc" * 40, [5], np.arange(17), "d"]
    params = [based.SamplingParams(max_tokens=n, seed=n, n=1 + n % 3) for n in (3, 9, 1, 14, 6)]
    together = model.generate(prompts, params, max_batch_size=3)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        assert model.generate(prompt, one) == [output]
        assert [c.index for c in output.outputs] == list(range(one.n))
        assert all(len(c.token_ids) == one.max_tokens for c in output.outputs)
    assert together[0].prompt == "a"
    assert together[0].prompt_token_ids == [97]
    assert together[2].prompt is None


def test_samples_of_one_request_differ_and_repeat(model):
    params = based.SamplingParams(n=4, seed=3, max_tokens=12)
    outputs = model.generate("x", params)[0].outputs
    assert len({tuple(c.token_ids) for c in outputs}) == 4
    assert model.generate("x", params)[0].outputs == outputs
    params.seed = None
    unseeded = [tuple(model.generate("x", params)[0].outputs[0].token_ids) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_logprobs(model):
    params = greedy(max_tokens=5, logprobs=3)
    (completion,) = model.generate("Hello", params)[0].outputs
    scores = model.score([*b"Hello", *completion.token_ids])[-5:]
    np.testing.assert_allclose([entry[t].logprob for entry, t in pairs(completion)], scores, atol=1e-4)
    assert completion.cumulative_logprob == pytest.approx(scores.sum(), abs=1e-3)
    for entry, token in pairs(completion):
        assert sorted(p.rank for p in entry.values()) == [1, 2, 3]
        assert entry[token].rank == 1
        assert entry[token].decoded_token == model.tokenizer.decode([token])
    (none,) = model.generate("Hello", greedy(max_tokens=5))[0].outputs
    assert none.logprobs is None
    assert none.cumulative_logprob == completion.cumulative_logprob

    hot = based.SamplingParams(temperature=50, seed=0, max_tokens=30, logprobs=0)
    (completion,) = model.generate("Hello", hot)[0].outputs
    assert all(list(entry) == [token] for entry, token in pairs(completion))
    assert {entry[token].rank for entry, token in pairs(completion)} == {None}


def pairs(completion):
    return zip(completion.logprobs, completion.token_ids, strict=True)


def test_stop_tokens(model, mute_model):
    free = model.generate("Hello", GREEDY)[0].outputs[0]
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    params = greedy(stop_token_ids=[stop])
    (stopped,) = model.generate("Hello", params)[0].outputs
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == decode(model, stopped.token_ids[:-1])
    params.include_stop_str_in_output = True
    assert model.generate("Hello", params)[0].outputs[0].text == decode(model, stopped.token_ids)
    late = greedy(stop_token_ids=[stop], min_tokens=10)
    assert len(model.generate("Hello", late)[0].outputs[0].token_ids) >= 10
    with pytest.raises(ValueError, match=r"stop_token_ids.*258"):
        mute_model.generate([1], greedy(stop_token_ids=[258]))


def test_end_token(model):
    config = json.loads(model.config.to_json())
    config["eos_token_id"] = 65
    ending = based.Model.random(based.ModelConfig.from_json(json.dumps(config)))
    bias = {65: 100.0}
    (completion,) = ending.generate([1], greedy(logit_bias=bias, min_tokens=4))[0].outputs
    assert completion.token_ids[4:] == [65]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    (completion,) = ending.generate([1], greedy(logit_bias=bias, ignore_eos=True))[0].outputs
    assert completion.token_ids == [65] * 24
    assert completion.finish_reason == "length"
    (completion,) = ending.generate([1], greedy(logit_bias=bias, ignore_eos=True, stop_token_ids=[65]))[0].outputs
    assert (completion.token_ids, completion.stop_reason) == ([65], 65)


@pytest.mark.parametrize(
    ("prompts", "params", "error", "text"),
    [
        ("", None, ValueError, "prompt 0 is empty"),
        ([[]], None, ValueError, "prompt 0 is empty"),
        ([1, "a"], None, TypeError, "prompt 0: token id at index 1 must be an integer, not str 'a'"),
        ([1.5], None, TypeError, "not float 1.5"),
        (None, None, TypeError, "not NoneType None"),
        (np.zeros((1, 2, 3), np.int64), None, ValueError, "must be a 1-D array"),
        (np.array(3), None, ValueError, r"prompt 0: token ids must be a 1-D array, not one of shape \(\)"),
        (np.array("a"), None, ValueError, r"prompt 0: token ids must be a 1-D array, not one of shape \(\)"),
        (["a", "b"], [GREEDY], ValueError, "2 prompts, but 1 SamplingParams"),
        ("a", [GREEDY, GREEDY], ValueError, "1 prompts, but 2 SamplingParams"),
        ("a", {"temperature": 0}, TypeError, r"not dict: write based.SamplingParams\(\*\*params\)"),
        ("a", "greedy", TypeError, "params must be SamplingParams, not str"),
        ({"a": 1}, None, TypeError, "must be a sequence of integers, not dict"),
        ({"a"}, None, TypeError, "must be a sequence of integers, not set"),
        ("a", [None], TypeError, "params must be SamplingParams, not NoneType"),
    ],
)
def test_bad_requests(model, prompts, params, error, text):
    with pytest.raises(error, match=text):
        model.generate(prompts, params)
    with pytest.raises(error, match=text):
        model.session(1).generate(prompts, params)
    assert model.generate([]) == []


@pytest.mark.parametrize("prompt", [np.array(3), np.array("a")])
def test_an_array_without_a_length_is_no_prompt(model, prompt):
    async def read():
        return [chunk async for chunk in model.astream(prompt)]

    shape = r"token ids must be a 1-D array, not one of shape \(\)"
    for call in (lambda: next(model.stream(prompt)), lambda: model.score(prompt), lambda: asyncio.run(read())):
        with pytest.raises(ValueError, match=shape):
            call()
    with pytest.raises(ValueError, match=shape):
        model.session().prefill(prompt)


BAD_ROWS = [
    ("", "prompt 1 is empty"),
    ([], "prompt 1 is empty"),
    ([258], "prompt 1: token id 258 at index 0"),
    (1, "prompt 1: token ids must be a sequence of integers, not int 1"),
    (None, "prompt 1: token ids must be a sequence of integers, not NoneType"),
    (float("nan"), "prompt 1: token ids must be a sequence of integers, not float nan"),
    (["a"], "prompt 1: token id at index 0 must be an integer, not str 'a'"),
    (np.zeros((2, 2), np.int64), "prompt 1: token ids must be a 1-D array"),
    (np.array(3), "prompt 1: token ids must be a 1-D array"),
]


@pytest.mark.parametrize(("row", "text"), BAD_ROWS)
def test_one_bad_prompt_is_one_failed_result(model, row, text):
    params = greedy(max_tokens=5, n=2, logprobs=1)
    for batch in (1, None):
        first, bad, last = model.generate(["ab", row, "ab"], params, max_batch_size=batch)
        assert first == last == model.generate("ab", params)[0]
        assert (bad.prompt, bad.prompt_token_ids, len(bad.outputs)) == ("" if isinstance(row, str) else None, [], 2)
        for i, output in enumerate(bad.outputs):
            assert (output.index, output.text, output.token_ids, output.logprobs) == (i, "", [], [])
            assert output.finish_reason == "error" and text in output.error
    (only,) = model.generate_iter([row], params)
    assert only.outputs[0].finish_reason == "error"
    assert [output.outputs[0].finish_reason for output in model.generate(["", row])] == ["error"] * 2
    session = model.session(2)
    with pytest.raises((TypeError, ValueError), match="prompt 1"):
        session.generate(["ab", row])
    assert session.num_tokens == [0, 0]


def test_what_is_wrong_with_all_prompts_is_raised(model, mute_model):
    for generate in (mute_model.generate, lambda *args: list(mute_model.generate_iter(*args))):
        with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
            generate(["a", "b"])
        with pytest.raises(ValueError, match="logit_bias"):
            generate([[1], [2]], based.SamplingParams(logit_bias={258: 1.0}))
        with pytest.raises(TypeError, match="not NoneType"):
            generate([[1], [2]], [GREEDY, None])
        with pytest.raises(ValueError, match="SamplingParams"):
            generate([[1], [2]], iter([GREEDY]))


def test_sampling_parameters_in_the_wrong_place(model):
    session = model.session()
    for call in (model.generate, model.generate_iter, model.stream, model.astream, session.generate, session.stream):
        with pytest.raises(TypeError, match=r"takes no max_tokens: .*based\.SamplingParams\(max_tokens=…\)"):
            call("a", max_tokens=5)
        with pytest.raises(TypeError, match="max_new_tokens"):
            call("a", max_new_tokens=5)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError), ("8", TypeError)]
)
def test_bad_max_batch_size(model, size, error):
    with pytest.raises(error, match="max_batch_size"):
        model.generate("a", max_batch_size=size)


def test_values_that_became_bad_are_refused(model):
    params = based.SamplingParams()
    params.temperature = float("nan")
    with pytest.raises(ValueError, match="temperature"):
        model.generate("a", params)
    with pytest.raises(ValueError, match="logit_bias"):
        model.generate("a", based.SamplingParams(logit_bias={258: 1.0}))


# ---- text ------------------------------------------------------------------------------------------------------------


def decode(model, ids):
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def test_text_is_what_the_tokenizer_says(model):
    for seed in range(20):
        (completion,) = model.generate("x", based.SamplingParams(max_tokens=60, seed=seed))[0].outputs
        assert completion.text == decode(model, completion.token_ids)


def test_models_without_tokenizer(mute_model):
    (completion,) = mute_model.generate([1, 2], greedy(logprobs=1))[0].outputs
    assert completion.text == ""
    assert len(completion.token_ids) == 24
    assert all(p.decoded_token is None for entry in completion.logprobs for p in entry.values())
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        mute_model.generate("a")
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        mute_model.session().prefill("a")
    with pytest.raises(ValueError, match="a stop string needs a tokenizer"):
        mute_model.generate([1], based.SamplingParams(stop="a"))
    assert mute_model.tokenizer is None


@pytest.fixture(scope="module")
def byte_tokenizer():
    return Tokenizer.from_file(str(GOLDEN / "based-tiny" / "tokenizer.json"))


def pieces(tokenizer, prompt, ids):
    decoder = IncrementalDecoder(tokenizer, prompt)
    return [*(decoder.add(token) for token in ids), decoder.flush()]


@given(st.text(max_size=20), st.text(max_size=3))
def test_no_piece_ends_inside_a_character(byte_tokenizer, text, prompt):
    found = pieces(byte_tokenizer, list(prompt.encode()), list(text.encode()))
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)
        ends = list(itertools.accumulate(len(character.encode()) for character in text))
        assert [i + 1 for i, piece in enumerate(found) if piece] == ends


@given(st.lists(st.integers(0, 257), max_size=30), st.lists(st.integers(0, 257), min_size=1, max_size=8))
def test_any_bytes_become_the_tokenizers_text(byte_tokenizer, ids, prompt):
    assert "".join(pieces(byte_tokenizer, prompt, ids)) == byte_tokenizer.decode(ids, skip_special_tokens=True)


def test_spaces_that_depend_on_the_prompt():
    """A tokenizer of words, whose decoder drops the first one's space."""
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3}
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
                "post_processor": None,
                "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
            }
        )
    )
    assert pieces(tokenizer, [1], [2, 3, 1]) == [" world", "s", " Hello", ""]
    assert pieces(tokenizer, [], [1, 2, 3]) == ["Hello", " world", "s", ""]


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_string_finder(texts, stops):
    """Whatever the cuts, the text ends before the first stop string to be complete, and nothing is held in vain."""
    finder = StopStringFinder(stops, include=False)
    shown = fed = ""
    for text in texts:
        fed += text
        safe, found = finder.add(text, may_stop=True)
        shown += safe
        if found is not None:
            assert found in stops
            assert fed.startswith(shown + found)
            assert all(stop not in fed[: len(fed) - len(text)] for stop in stops)
            assert min(fed.find(stop) for stop in stops if stop in fed) == len(shown)
            return
        held = fed[len(shown) :]
        assert shown + held == fed
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert all(stop not in fed for stop in stops)
    assert shown + finder.flush() == fed


def test_stop_strings(model):
    free = model.generate("Hello", based.SamplingParams(max_tokens=60, seed=5, temperature=2))[0].outputs[0]
    assert len(free.text) > 30
    tried = 0
    for start, length in itertools.product(range(0, 20, 3), (1, 2, 5)):
        stop = free.text[start : start + length]
        if "\ufffd" in stop:  # bytes that were no character yet: they come late
            continue
        tried += 1
        at = free.text.index(stop)
        params = based.SamplingParams(max_tokens=60, seed=5, temperature=2, stop=["never seen", stop])
        (completion,) = model.generate("Hello", params)[0].outputs
        assert completion.text == free.text[:at]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
        assert stop in decode(model, completion.token_ids)
        assert stop not in decode(model, completion.token_ids[:-1])
        params.include_stop_str_in_output = True
        assert model.generate("Hello", params)[0].outputs[0].text == free.text[: at + length]
    assert tried > 5


def test_stop_strings_wait_for_min_tokens(model):
    bias = {97: 100.0}  # "a" for ever
    params = greedy(logit_bias=bias, stop="aa", min_tokens=7)
    (completion,) = model.generate("Hello", params)[0].outputs
    assert completion.token_ids == [97] * 7
    assert completion.finish_reason == "stop"


# ---- streams ---------------------------------------------------------------------------------------------------------


def joined(chunks, index=0):
    mine = [chunk for chunk in chunks if chunk.index == index]
    text = "".join(chunk.text for chunk in mine)
    ids = [token for chunk in mine for token in chunk.token_ids]
    return text, ids, mine[-1].finish_reason, mine[-1].stop_reason


@pytest.mark.parametrize("stop", [None, "e", ["\ufffd", "zz"]])
def test_stream_is_generate(model, stop):
    for seed in range(5):
        params = based.SamplingParams(max_tokens=40, seed=seed, n=3, stop=stop, logprobs=1)
        chunks = list(model.stream("Hello", params))
        for completion in model.generate("Hello", params)[0].outputs:
            c = completion
            assert joined(chunks, c.index) == (c.text, c.token_ids, c.finish_reason, c.stop_reason)
        assert all(len(chunk.token_ids) == len(chunk.logprobs) == 1 for chunk in chunks)
        assert sum(chunk.finish_reason is not None for chunk in chunks) == 3


def test_stream_checks_its_arguments_at_once(model):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.stream("")
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.astream("")
    with pytest.raises(TypeError, match="not str"):
        model.stream(["a", "b"])


def test_closing_a_stream_cancels(model):
    stream = model.stream("Hello", based.SamplingParams(max_tokens=10**9))
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()
    assert list(stream) == []


def test_astream_is_stream(model):
    params = based.SamplingParams(max_tokens=20, seed=1, n=2)

    async def collect():
        return [chunk async for chunk in model.astream("Hello", params)]

    async def several():
        return await asyncio.gather(collect(), collect(), collect())

    expected = list(model.stream("Hello", params))
    assert asyncio.run(several()) == [expected] * 3


def test_cancelling_astream_stops_the_work(model):
    prompt = np.zeros(3_000_000, np.int64)  # half a minute of prefill

    async def consume(prompt):
        async for _ in model.astream(prompt, based.SamplingParams(max_tokens=10**9)):
            pass

    async def run(prompt):
        task = asyncio.create_task(consume(prompt))
        await asyncio.sleep(0.3)
        loop = asyncio.get_running_loop()
        start = loop.time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return loop.time() - start

    assert asyncio.run(run(prompt)) < 1
    assert asyncio.run(run([1])) < 1


def test_breaking_out_of_astream(model):
    async def take(count):
        found = []
        stream = model.astream("Hello", greedy())
        async for chunk in stream:
            found.append(chunk.token_ids[0])
            if len(found) == count:
                break
        await stream.aclose()
        return found

    assert asyncio.run(take(5)) == model.generate("Hello", greedy())[0].outputs[0].token_ids[:5]


def test_astream_reads_long_texts_off_the_event_loop(model):
    text = "word " * 100_000
    begin = time.perf_counter()
    expected = model.tokenizer.encode(text).ids
    alone = time.perf_counter() - begin

    async def run():
        stream = model.astream(text, greedy())
        first, gaps = asyncio.ensure_future(anext(stream)), [time.perf_counter()]
        while len(gaps) < 2 or gaps[-1] - gaps[0] < 3 * alone:  # the prompt itself is read for longer
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter())
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return max(b - a for a, b in itertools.pairwise(gaps))

    assert asyncio.run(run()) < alone / 2
    assert model.encode(text) == expected


# ---- sessions --------------------------------------------------------------------------------------------------------


def replay(model, *token_lists):
    """Logits of the next step in a session that was fed these tokens."""
    session = model.session(len(token_lists))
    session.prefill([list(tokens) for tokens in token_lists])
    return session.step([1] * len(token_lists))


def test_session_has_seen_what_generate_returned(model):
    session = model.session(2)
    first = session.generate(["Hello", [1, 2, 3]], [greedy(max_tokens=9), greedy(max_tokens=4)])
    assert session.num_tokens == [5 + 9, 3 + 4]
    second = session.generate([" and", "!"], greedy(max_tokens=3))
    fed = [
        a.prompt_token_ids + a.outputs[0].token_ids + b.prompt_token_ids + b.outputs[0].token_ids
        for a, b in zip(first, second, strict=True)
    ]
    assert session.num_tokens == [len(tokens) for tokens in fed]
    np.testing.assert_allclose(session.step([1, 1]), replay(model, *fed), atol=1e-4)
    assert first[0].outputs == model.generate("Hello", greedy(max_tokens=9))[0].outputs


def test_session_sees_all_tokens_of_a_stop_string(model):
    session = model.session()
    (output,) = session.generate("Hello", greedy(logit_bias={97: 100.0}, stop="aaa"))
    assert output.outputs[0].token_ids == [97] * 3
    assert output.outputs[0].text == ""
    assert session.num_tokens == [8]
    np.testing.assert_allclose(session.step([1]), replay(model, b"Helloaaa"), atol=1e-4)


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_session_goes_on_without_a_prompt(model, tmp_path):
    """From where it is, by whatever it got there: prompt, step, generation, fork, rollback, copy, file."""
    whole = model.generate("Hello", greedy(max_tokens=20))[0].outputs[0].token_ids
    session = model.session()
    first = session.generate("Hello", greedy(max_tokens=6))[0].outputs[0].token_ids
    session.save_state(tmp_path / "state")
    checkpoint, state, fork = session.checkpoint(), session.state(), session.fork()
    assert first + session.generate("", greedy(max_tokens=14))[0].outputs[0].token_ids == whole
    session.rollback(checkpoint)
    assert first + session.generate([[]], greedy(max_tokens=14))[0].outputs[0].token_ids == whole
    assert first + fork.generate("", greedy(max_tokens=14))[0].outputs[0].token_ids == whole
    loaded = model.session()
    loaded.load_state(tmp_path / "state")
    batch = model.session(states=[state, state])
    batch.generate(["", "x"], greedy(max_tokens=3))
    batch.copy(0, 1)
    for b in range(2):
        assert batch.num_tokens[b] == 14
    for other in (loaded, model.session(states=[state])):
        chunks = list(other.stream("", greedy(max_tokens=14)))
        assert first + [token for chunk in chunks for token in chunk.token_ids] == whole
        assert other.num_tokens == [25]

    prefilled, stepped = model.session(), model.session()
    prefilled.prefill("Hello")
    stepped.prefill("Hell")
    stepped.step([ord("o")])
    for other in (prefilled, stepped):
        assert other.generate("", greedy(max_tokens=20))[0].outputs[0].token_ids == whole


def test_sampling_goes_on_as_if_it_had_not_stopped(model):
    params = {"seed": 5, "temperature": 1.0, "ignore_eos": True}
    whole = model.generate("Hello", based.SamplingParams(max_tokens=12, **params))[0].outputs[0].token_ids
    session = model.session()
    parts = [
        session.generate(prompt, based.SamplingParams(max_tokens=4, **params))[0].outputs[0].token_ids
        for prompt in ("Hello", "", "")
    ]
    assert [token for part in parts for token in part] == whole


def test_some_sequences_go_on_and_others_get_a_prompt(model):
    session = model.session(3)
    session.prefill(["Hello", "abc", "x"])
    outputs = session.generate(["", " and", ""], greedy(max_tokens=5))
    for text, output in zip(("Hello", "abc and", "x"), outputs, strict=True):
        assert output.outputs[0].token_ids == model.generate(text, greedy(max_tokens=5))[0].outputs[0].token_ids


def test_nothing_to_go_on_from(model):
    session = model.session()
    with pytest.raises(ValueError, match="prompt 0 is empty, and its sequence has seen nothing"):
        session.generate([[]])
    with pytest.raises(ValueError, match="prompt 0 is empty: at least one token"):
        model.generate([[]])
    assert session.num_tokens == [0]


def test_penalties_see_earlier_turns(model, tmp_path):
    """A token is chosen once: then a penalty of 2 on a bias of 1.5 makes it the unlikeliest of the biased ones."""
    bias = dict.fromkeys(range(97, 105), 90.0)
    params = greedy(max_tokens=1, logit_bias=bias, presence_penalty=2.0, frequency_penalty=2.0)
    turns = 5
    whole = (
        model.generate(
            "Hello", greedy(max_tokens=turns, **{"logit_bias": bias, "presence_penalty": 2.0, "frequency_penalty": 2.0})
        )[0]
        .outputs[0]
        .token_ids
    )
    session = model.session()
    found = [session.generate("Hello", params)[0].outputs[0].token_ids[0]]
    for turn in range(1, turns):
        if turn == 2:  # what was counted is in the saved state, too
            session.save_state(tmp_path / "state")
            session = model.session()
            session.load_state(tmp_path / "state")
        if turn == 3:
            session = model.session(states=[session.state()])
        found += session.generate("", params)[0].outputs[0].token_ids
    assert found == whole


# ---- failures of one row ---------------------------------------------------------------------------------------------


def impossible(model, **options):
    """Every token is a stop token, and one must come before any of those."""
    return based.SamplingParams(min_tokens=1, stop_token_ids=list(range(model.config.vocab_size)), **options)


def test_one_impossible_request_loses_no_other(model):
    good = greedy(max_tokens=4)
    (alone,) = model.generate("abc", good)
    for batch in (1, 2, 8):
        first, bad, last = model.generate(
            ["abc", "def", "abc"], [good, impossible(model, n=2), good], max_batch_size=batch
        )
        assert first.outputs == last.outputs == alone.outputs
        for output in bad.outputs:
            assert (output.finish_reason, output.token_ids, output.text) == ("error", [], "")
            assert "leave no token" in output.error
    assert alone.outputs[0].error is None


def test_a_session_counts_what_was_yielded_before_a_failure(model):
    vocabulary = model.config.vocab_size
    prompt = [token for token in range(vocabulary) if token != 7]
    params = greedy(repetition_penalty=1e300, logit_bias=dict.fromkeys(range(vocabulary), -100.0))
    session = model.session()
    chunks = list(session.stream(prompt, params))
    assert [chunk.token_ids for chunk in chunks] == [[7], []]
    assert chunks[-1].finish_reason == "error"
    assert session.num_tokens == [vocabulary]
    np.testing.assert_allclose(session.step([5]), replay_step(model, [*prompt, 7], 5), atol=1e-4)


def replay_step(model, tokens, token):
    session = model.session()
    session.prefill([tokens])
    return session.step([token])


def test_cancelling_stops_while_tokens_come(model):
    generator = based._core.Generator(model._core, [[1, 2]], [greedy(max_tokens=500)], 1)
    generator.next()
    generator.cancel()
    with pytest.raises(based.Error, match="cancelled"):
        generator.next()


def test_closing_a_session_stream_keeps_what_came(model):
    session = model.session()
    stream = session.stream("Hello", greedy())
    came = [chunk.token_ids[0] for chunk in itertools.islice(stream, 3)]
    for call in (
        lambda: session.step([1]),
        lambda: session.prefill("a"),
        lambda: session.generate("a"),
        lambda: next(session.stream("a")),
        session.fork,
        session.checkpoint,
        session.reset,
        lambda: session.save_state("x"),
    ):
        with pytest.raises(based.SessionBusyError, match="stream"):
            call()
    stream.close()
    assert session.num_tokens == [8]
    np.testing.assert_allclose(session.step([1]), replay(model, [*b"Hello", *came]), atol=1e-4)


def test_session_stream_to_its_end(model):
    session, other = model.session(), model.session()
    chunks = list(session.stream("Hello", greedy()))
    (output,) = other.generate("Hello", greedy())
    assert joined(chunks)[:2] == (output.outputs[0].text, output.outputs[0].token_ids)
    assert session.num_tokens == other.num_tokens == [29]
    unread = session.stream("Hello")
    del unread
    assert session.num_tokens == [29]


def test_session_is_restored_when_generate_raises(model, monkeypatch):
    session = model.session()
    session.prefill("Hello")
    expected = session.fork().step([1])
    calls = itertools.count()

    def fail(*_):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(IncrementalDecoder, "add", fail)
    with pytest.raises(KeyboardInterrupt):
        session.generate(" there", greedy())
    assert session.num_tokens == [5]
    np.testing.assert_array_equal(session.step([1]), expected)


def test_session_generation_has_one_sample_per_sequence(model):
    session = model.session(2)
    with pytest.raises(ValueError, match="n is 2"):
        session.generate(["a", "b"], based.SamplingParams(n=2))
    with pytest.raises(ValueError, match="1 prompts, the session has 2 sequences"):
        session.generate("a")
    with pytest.raises(ValueError, match="1 prompts, the session has 2 sequences"):
        session.stream("a")
    assert session.num_tokens == [0, 0]


# ---- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_for_terminals(model, capsys, monkeypatch):
    model.generate(["a", "b"], greedy(), progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    model.generate(["a", "b"], greedy(), progress=True)
    found = capsys.readouterr()
    assert found.out == ""
    assert "2/2 samples, 48 tokens" in found.err
    model.generate("a", greedy())
    assert capsys.readouterr() == ("", "")


# ---- many prompts ----------------------------------------------------------------------------------------------------


def texts_of(outputs):
    return [[completion.text for completion in output.outputs] for output in outputs]


def test_prompts_of_any_iterable(model):
    params = greedy(max_tokens=4)
    prompts = ["a", "bc", "d" * 9]
    expected = model.generate(prompts, params)
    assert [output.index for output in expected] == [0, 1, 2]
    for form in (tuple(prompts), iter(prompts), (p for p in prompts), dict.fromkeys(prompts).keys(), map(str, prompts)):
        assert model.generate(form, params) == expected
    assert model.generate((i for i in (1, 2, 3)), params) == model.generate([1, 2, 3], params)
    each = [greedy(max_tokens=n) for n in (1, 2, 3)]
    assert model.generate(iter(prompts), iter(each)) == model.generate(prompts, each)
    assert model.generate(iter([])) == []
    session = model.session(3)
    assert texts_of(session.generate(iter(prompts), params)) == texts_of(expected)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 16, None])
def test_generate_iter_is_generate(model, batch, ordered):
    prompts = [None if i % 5 == 3 else "abc"[: 1 + i % 3] for i in range(23)]
    params = [based.SamplingParams(max_tokens=1 + i % 7, n=1 + i % 4, seed=i) for i in range(23)]
    expected = model.generate(prompts, params)
    found = list(model.generate_iter(iter(prompts), iter(params), max_batch_size=batch, ordered=ordered))
    indices = [output.index for output in found]
    assert indices == list(range(23)) if ordered else sorted(indices) == list(range(23))
    assert [output.outputs for output in sorted(found, key=lambda output: output.index)] == [
        output.outputs for output in expected
    ]


def test_generate_iter_takes_prompts_when_it_has_room(model):
    """Endless prompts: a result comes after two batches of them at most, and the number taken stays near that given."""
    taken = itertools.count()
    outputs = model.generate_iter(
        ("a" * (1 + next(taken) % 3) for _ in itertools.count()), greedy(max_tokens=2), max_batch_size=4
    )
    for count in range(1, 30):
        next(outputs)
        assert next(taken) <= count + 3 * 4 + count  # this line takes one, too
    outputs.close()
    assert list(outputs) == []
    with pytest.raises(TypeError, match=r"generate_iter\(\[prompt\]\)"):
        model.generate_iter("a")

    def breaks():
        yield "a"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(model.generate_iter(breaks()))


def test_results_that_came_before_a_slow_prompt_are_not_held(model):
    params = [greedy(max_tokens=200), *[greedy(max_tokens=1)] * 5]
    outputs = model.generate_iter(["a"] * 6, params, max_batch_size=2, ordered=False)
    assert [output.index for output in outputs] == [1, 2, 3, 4, 5, 0]


def test_a_generator_forgets_what_has_ended(model):
    generator = based._core.Generator(model._core, [[1]], [greedy(max_tokens=2, n=3)], 2)
    seen = {0: 0}
    for number in range(1, 200):
        assert generator.add([number % 250], greedy(max_tokens=1 + number % 3)) == number
        for event in generator.next():
            seen[event.request] = seen.get(event.request, 0) + 1
            generator.finish(0, 0)
    while not generator.done():
        for event in generator.next():
            seen[event.request] = seen.get(event.request, 0) + 1
    assert seen.pop(0) <= 6
    assert seen == {number: 1 + number % 3 for number in range(1, 200)}
    generator.finish(5, 0)  # has ended
    with pytest.raises(ValueError, match="no sample 0 of request 200"):
        generator.finish(200, 0)
    with pytest.raises(ValueError, match="token id 258"):
        generator.add([258], greedy())
    session = model.session()
    with pytest.raises(ValueError, match="no more requests"):
        based._core.Generator(session._core, [[1]], [greedy()]).add([1], greedy())


def test_default_batch_size(monkeypatch):
    from based import _devices

    size = _devices.default_batch_size
    monkeypatch.setattr(_devices, "available_memory", lambda: 400_000)
    gpu = _devices.DeviceInfo("cuda:1", "a GPU", "sm_90", 10_000_000, 8_000_000, None)
    monkeypatch.setattr(_devices, "devices", lambda: [gpu])
    assert [size("cpu", nbytes) for nbytes in (10, 3_125, 10_000, 1_000_000)] == [32, 32, 10, 1]
    assert [size("cuda:1", nbytes) for nbytes in (10, 10_000, 5_000_000)] == [1024, 400, 1]


def test_available_memory_is_of_this_machine():
    from based import _devices

    assert 1 << 20 < _devices.available_memory() < 1 << 50


# ---- special tokens, no limit, nothing to begin with -----------------------------------------------------------------


@pytest.fixture(scope="module")
def with_ends(model):
    """The golden model with bos 256 and eos 257, which are its tokenizer's <bos> and <eos>."""
    config = json.loads(model.config.to_json()) | {"bos_token_id": 256, "eos_token_id": 257}
    ending = based.Model.random(based.ModelConfig.from_json(json.dumps(config)), device="cpu")
    ending._tokenizer = model._tokenizer
    return ending


@pytest.mark.parametrize("stop", ["<eos>", ["never", "<eos>"], "a<eos>", "<eos><eos>", "<eos>a"])
def test_stop_strings_with_special_tokens(with_ends, stop):
    bias = dict.fromkeys([97, 257], 90.0)
    params = based.SamplingParams(ignore_eos=True, max_tokens=200, seed=4, temperature=5, logit_bias=bias)
    free = with_ends.generate("x", params)[0].outputs[0]
    raw = "".join("a" if token == 97 else "<eos>" for token in free.token_ids)
    wanted = stop if isinstance(stop, str) else stop[-1]
    before = raw[: raw.index(wanted)]
    for skip in (True, False):
        for include in (False, True):
            params = based.SamplingParams(
                ignore_eos=True, max_tokens=200, seed=4, temperature=5, logit_bias=bias, stop=stop,
                skip_special_tokens=skip, include_stop_str_in_output=include,
            )  # fmt: skip
            found = with_ends.generate("x", params)[0].outputs[0]
            assert (found.finish_reason, found.stop_reason) == ("stop", wanted)
            shown = before.replace("<eos>", "") if skip else before
            assert found.text == shown + (wanted if include else "")
            ended = "".join("a" if token == 97 else "<eos>" for token in found.token_ids)
            assert ended == before + wanted
            assert "".join(chunk.text for chunk in with_ends.stream("x", params)) == found.text


def test_special_tokens_in_the_text(with_ends):
    params = greedy(max_tokens=3, ignore_eos=True, logit_bias={257: 100.0})
    assert with_ends.generate("x", params)[0].outputs[0].text == ""
    params.skip_special_tokens = False
    assert with_ends.generate("x", params)[0].outputs[0].text == "<eos>" * 3
    params.ignore_eos = False
    assert with_ends.generate("x", params)[0].outputs[0].text == ""
    params.include_stop_str_in_output = True
    assert with_ends.generate("x", params)[0].outputs[0].text == "<eos>"


def test_special_tokens_in_a_prompt(with_ends):
    letters = list(b"a<eos>")
    assert with_ends.encode("a<eos>") == [97, 257]
    assert with_ends.encode("a<eos>", split_special_tokens=True) == letters
    options = {"split_special_tokens": True}
    expected = with_ends.generate([letters], greedy())[0].outputs[0]
    assert with_ends.generate(["a<eos>"], greedy(), **options)[0].outputs == [expected]
    assert next(with_ends.generate_iter(["a<eos>"], greedy(), **options)).outputs == [expected]
    assert joined(list(with_ends.stream("a<eos>", greedy(), **options)))[0] == expected.text
    sessions = [with_ends.session() for _ in range(3)]
    assert sessions[0].generate("a<eos>", greedy(), **options)[0].outputs == [expected]
    assert joined(list(sessions[1].stream("a<eos>", greedy(), **options)))[0] == expected.text
    sessions[2].prefill("a<eos>", **options)
    assert sessions[2].num_tokens == [len(letters)]


def test_no_limit(with_ends):
    params = based.SamplingParams(max_tokens=None, min_tokens=30, temperature=0, logit_bias={257: 100.0})
    found = with_ends.generate("x", params)[0].outputs[0]
    assert (len(found.token_ids), found.finish_reason) == (31, "stop")
    session = with_ends.session()
    assert len(list(session.stream("x", params))) == 31
    assert session.num_tokens == [32]
    assert len(list(itertools.islice(with_ends.stream("x", based.SamplingParams(max_tokens=None)), 300))) > 0
    assert based.SamplingParams(max_tokens=None).max_tokens is None
    with pytest.raises(ValueError, match="max_tokens is 0, expected at least 1"):
        based.SamplingParams(max_tokens=0)


def test_an_empty_prompt_is_the_start_token(with_ends):
    expected = with_ends.generate([256], greedy())[0]
    for prompt in ("", [], np.zeros(0, np.int64)):
        found = with_ends.generate([prompt, "a"], greedy())[0]
        assert (found.prompt_token_ids, found.outputs) == ([256], expected.outputs)
        session = with_ends.session()
        assert session.generate([prompt], greedy())[0].outputs == expected.outputs
        assert session.num_tokens == [25]
        session.generate([prompt], greedy(max_tokens=2))  # goes on
        assert session.num_tokens == [27]
    np.testing.assert_array_equal(with_ends.forward(""), with_ends.forward([256]))
    assert with_ends.encode("") == [256]


# ---- continuations ---------------------------------------------------------------------------------------------------


def test_scores_of_continuations(model):
    contexts = ["Hello", "Hello", "a", "Hello"]
    continuations = [" there", "!", "bcd", " there"]
    found = model.score(contexts, continuations)
    for context, continuation, score in zip(contexts, continuations, found, strict=True):
        ids = [*(context + continuation).encode()]
        assert score.token_ids == ids[len(context) :]
        expected = model.score(ids)[len(context) - 1 :]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.logprob == pytest.approx(expected.sum(), abs=1e-3)
        likeliest = model.forward(ids)[len(context) - 1 : -1].argmax(axis=1)
        assert score.is_greedy == (likeliest.tolist() == score.token_ids)
    assert model.score("Hello", continuations)[:2] == found[:2]
    assert model.score(contexts, continuations, max_batch_size=1) == found
    assert model.score([*b"Hello"], [*b" there"]) == found[0] == model.score("Hello", " there")
    greedy_text = model.generate([*b"Hello"], greedy(max_tokens=5))[0].outputs[0].token_ids
    assert model.score("Hello", greedy_text).is_greedy
    assert not model.score("Hello", [greedy_text[0] ^ 1, *greedy_text[1:]]).is_greedy


def test_continuations_whose_tokens_reach_into_the_context(with_ends):
    """The tokens of the whole text are scored, from the first on that the context alone does not have."""
    from based._tokenizer import LazyTokenizer
    from tokenizers_of_all_kinds import KINDS

    for kind, context, continuation, expected in [
        ("llama_with_start", "h", "e", ["▁", "he"]),
        ("llama", "hello", " world", None),
        ("llama", "hello ", "world", None),
    ]:
        tokenizer = KINDS[kind]()
        config = json.loads(with_ends.config.to_json()) | {"vocab_size": 320, "padded_vocab_size": 320}
        other = based.Model.random(based.ModelConfig.from_json(json.dumps(config)), device="cpu")
        other._tokenizer = LazyTokenizer(lambda tokenizer=tokenizer: tokenizer)
        whole = tokenizer.encode(context + continuation).ids
        score = other.score(context, continuation)
        assert whole[-len(score.token_ids) :] == score.token_ids
        np.testing.assert_allclose(score.logprobs, other.score(whole)[-len(score.token_ids) :], atol=1e-4)
        if expected is not None:
            assert [tokenizer.id_to_token(id) for id in score.token_ids] == expected


def test_scores_without_a_context(model, with_ends):
    expected = with_ends.score([256, *b"abc"])
    for context, continuation in (("", "abc"), ([], [*b"abc"]), ("", [*b"abc"])):
        np.testing.assert_allclose(with_ends.score(context, continuation).logprobs, expected, atol=1e-4)
    with pytest.raises(ValueError, match="context 0 is empty"):
        model.score("", "abc")
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        model.score("a", ["b", ""])
    with pytest.raises(ValueError, match="2 contexts, but 3 continuations"):
        model.score(["a", "b"], ["c"] * 3)
    with pytest.raises(ValueError, match="max_batch_size"):
        model.score("a", "b", max_batch_size=0)
    assert model.score([], []) == []
