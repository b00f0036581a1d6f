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
        (["a", ""], None, ValueError, "prompt 1 is empty"),
        ([[1], [258]], None, ValueError, "prompt 1: token id 258 at index 0"),
        ([1, "a"], None, TypeError, "prompt 0: token id at index 1 must be an integer, not str 'a'"),
        (["a", 1], None, TypeError, "prompt 1: token ids must be a sequence of integers, not int 1"),
        ([1.5], None, TypeError, "not float 1.5"),
        (None, None, TypeError, "not NoneType None"),
        (np.zeros((1, 2, 3), np.int64), None, ValueError, "must be a 1-D array"),
        (["a", "b"], [GREEDY], ValueError, "2 prompts, but 1 SamplingParams"),
        ("a", [GREEDY, GREEDY], ValueError, "1 prompts, but 2 SamplingParams"),
        ("a", {"temperature": 0}, TypeError, "params must be SamplingParams, not str"),
        ("a", [None], TypeError, "params must be SamplingParams, not NoneType"),
    ],
)
def test_bad_requests(model, prompts, params, error, text):
    with pytest.raises(error, match=text):
        model.generate(prompts, params)
    with pytest.raises(error, match=text):
        model.session(1).generate(prompts, params)
    assert model.generate([]) == []


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)]
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
    from based._generate import encode

    assert encode(text, model._tokenizer, add_special_tokens=True) == expected


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
