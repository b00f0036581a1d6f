"""`based eval`: models of this package in lm-evaluation-harness."""

import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import cli

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is missing: pip install "based[eval]"')

pytestmark = pytest.mark.filterwarnings("default")  # the harness and its own dependencies warn

from based.eval import TASKS, BasedLM, load_tasks
from based.eval import _factbook as factbook
from based.eval import _report as report
from based.eval._sharing import WORTH, prefilled
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

WORDS = ["", "the state", " of a fixed size", "\n", "def f(x):", " x" * 80, "Grüße, 世界 🙂 " * 12, "0123456789" * 9]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0, ("task", i, 1)) for i, each in enumerate(arguments)]


def texts(seed: int, count: int) -> list[str]:
    """Texts of which many begin alike, and some are equal."""
    rng = random.Random(seed)
    return ["".join(rng.choice(WORDS) for _ in range(rng.randrange(5))) for _ in range(count)]


@pytest.fixture(scope="module")
def bundled() -> based.Model:
    """The model in the package, which has a bos token."""
    return based.load(dtype="float32")


# ---- shared prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 40, 64])
@pytest.mark.parametrize("seed", range(4))
def test_prompts_that_begin_alike_give_what_they_give_alone(model: based.Model, seed: int, batch_size: int) -> None:
    prompts = [np.array(model.encode(text), dtype=np.int64)[:300] for text in texts(seed, 40) if text]
    seen: list[int] = []
    fed = 0
    for batch in prefilled(model, prompts, batch_size):
        fed += batch.num_fed
        seen += batch.members
        assert batch.session.batch_size <= batch_size
        assert batch.session.num_tokens == [len(prompts[i]) for i in batch.members]
        for i, logits in zip(batch.members, batch.logits, strict=True):
            assert logits is not None
            np.testing.assert_allclose(logits, model.session().prefill([prompts[i]])[0], atol=2e-4)
    assert sorted(seen) == list(range(len(prompts)))
    assert fed < sum(map(len, prompts))


def test_the_states_go_on_alike(model: based.Model) -> None:
    prompts = [np.array(model.encode("a" * 200 + end), dtype=np.int64) for end in ("b", "c", "bb", "b", "")]
    for batch in prefilled(model, prompts, 8):
        stepped = batch.session.step([7] * len(prompts))
        for i, logits in zip(batch.members, stepped, strict=True):
            session = model.session()
            session.prefill([prompts[i]])
            np.testing.assert_allclose(logits, session.step([7])[0], atol=2e-4)


def test_a_document_is_read_once_for_all_its_questions(model: based.Model) -> None:
    """Across batches, too; a last token is read again, for its logits."""
    document = np.arange(1000) % 251
    prompts = [np.append(document, [i % 7, i]) for i in range(24)]
    for batch_size in (4, 32):
        fed = sum(batch.num_fed for batch in prefilled(model, prompts, batch_size))
        assert 1000 <= fed < 1000 + 4 * len(prompts)
    apart = sum(batch.num_fed for batch in prefilled(model, prompts, 32, share=False))
    assert apart == 24 * 1002


def test_short_common_beginnings_are_not_forked(model: based.Model) -> None:
    prompts = [np.array([1, 2, 3, i, *range(50)]) for i in range(5)]
    (batch,) = prefilled(model, prompts, 8)
    assert WORTH > 3 * 4 and batch.num_fed == 5 * 54


# ---- the harness' class ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs_of_texts() -> list[tuple[str, str]]:
    contexts = [text for text in texts(7, 12) if text.strip()]
    return [(context, end) for context in contexts for end in (" a", " bc", "d", " and more of it")]


def test_loglikelihood_is_score(model: based.Model, pairs_of_texts: list[tuple[str, str]]) -> None:
    lm = BasedLM(model, batch_size=5)
    found = lm.loglikelihood(instances("loglikelihood", pairs_of_texts))
    assert lm.num_fed_tokens < lm.num_prompt_tokens / 3
    for (context, end), (logprob, is_greedy) in zip(pairs_of_texts, found, strict=True):
        stripped = context.rstrip()  # spaces at the end go over to the continuation
        expected = model.score(stripped, context[len(stripped) :] + end)
        assert logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert is_greedy == expected.is_greedy


def test_a_greedy_continuation_is_greedy(bundled: based.Model) -> None:
    context = "Hello, world"
    end = bundled.generate(context, based.SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].text
    found = BasedLM(bundled).loglikelihood(instances("loglikelihood", [(context, end), (context, end[::-1] + "#")]))
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_the_order_and_the_batch_size_do_not_matter(model: based.Model, pairs_of_texts: list[tuple[str, str]]) -> None:
    expected = BasedLM(model, batch_size=1, share=False).loglikelihood(instances("loglikelihood", pairs_of_texts))
    order = list(range(len(pairs_of_texts)))
    random.Random(3).shuffle(order)
    for size in (1, 7, 64):
        found = BasedLM(model, batch_size=size).loglikelihood(
            instances("loglikelihood", [pairs_of_texts[i] for i in order])
        )
        for i, (logprob, is_greedy) in zip(order, found, strict=True):
            assert logprob == pytest.approx(expected[i][0], abs=1e-3) and is_greedy == expected[i][1]


def test_no_context_is_the_bos_token(bundled: based.Model) -> None:
    bos = bundled.config.bos_token_id
    assert bos is not None
    (found,) = BasedLM(bundled).loglikelihood(instances("loglikelihood", [("", "abc")]))
    assert found[0] == pytest.approx(bundled.score([bos, *b"abc"]).sum(), abs=1e-4)
    (spaces,) = BasedLM(bundled).loglikelihood(instances("loglikelihood", [("  ", "abc")]))
    assert spaces[0] == pytest.approx(bundled.score([bos, *b"  abc"]).sum(), abs=1e-4)


def test_rolling_is_the_whole_text_or_windows(bundled: based.Model) -> None:
    text = "constant memory " * 5
    ids, bos = list(text.encode()), bundled.config.bos_token_id
    whole, empty = BasedLM(bundled).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,), ("",)]))
    assert whole == pytest.approx(bundled.score([bos, *ids]).sum(), abs=1e-3) and empty == 0
    (cut,) = BasedLM(bundled, max_length=32).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    # 32, 32 and the 16 that are left, which are given 16 before them, and so are these.
    parts = [bundled.score([bos, *ids[:32]]), bundled.score(ids[31:64]), bundled.score(ids[47:80])[-16:]]
    assert cut == pytest.approx(sum(part.sum() for part in parts), abs=1e-3)


def test_max_length_cuts_from_the_left(model: based.Model) -> None:
    lm = BasedLM(model, max_length=10)
    (found,) = lm.loglikelihood(instances("loglikelihood", [("x" * 50 + "abcdefgh", "ij")]))
    assert found[0] == pytest.approx(model.score(list(b"xabcdefgh"), list(b"ij")).logprob, abs=1e-4)
    with pytest.raises(ValueError, match="request 0 of task task, document 0: the continuation has 11 tokens"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b" * 11)]))
    (text,) = lm.generate_until(instances("generate_until", [("x" * 50 + "abc", {"max_gen_toks": 6})]))
    assert text == model.generate(list(b"xabc"), based.SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    with pytest.raises(ValueError, match="expected less than max_length 10"):
        lm.generate_until(instances("generate_until", [("x", {"max_gen_toks": 10})]))


def test_generate_until_is_generate(model: based.Model) -> None:
    contexts = [text for text in texts(5, 30) if text]
    params = based.SamplingParams(temperature=0, max_tokens=20, stop=["e", "\n"])
    expected = [output.outputs[0].text for output in model.generate(contexts, params)]
    for size in (1, 4, 64):
        options = {"until": ["e", "", "\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}
        lm = BasedLM(model, batch_size=size)
        assert lm.generate_until(instances("generate_until", [(text, options) for text in contexts])) == expected
        assert lm.num_fed_tokens < lm.num_prompt_tokens


def test_samples_differ_and_can_be_repeated(model: based.Model) -> None:
    options = {"until": "\n", "max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
    requests = instances("generate_until", [("Hello", options)] * 3 + [("world", options)])
    first = BasedLM(model, batch_size=4).generate_until(requests)
    assert len(set(first[:3])) == 3
    assert BasedLM(model, batch_size=1).generate_until(requests) == first
    assert BasedLM(model, seed=9).generate_until(requests) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "request 1 .*num_beams is not known: expected some of until, max_gen_toks"),
        ({"max_gen_toks": 0}, "request 1 of task task, document 1: .*max_tokens"),
        ({"until": [5]}, "expected strings"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_wrong_arguments_of_a_generation_name_the_request(
    model: based.Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BasedLM(model).generate_until(instances("generate_until", [("a", {}), ("b", options)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_wrong_arguments_of_a_model(model: based.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BasedLM(model, **options)


def test_a_model_without_a_tokenizer(mute_model: based.Model) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        BasedLM(mute_model)


def test_the_registry_knows_it() -> None:
    assert get_model("based") is BasedLM
    lm = BasedLM.create_from_arg_obj({}, {"batch_size": "auto", "device": "cpu"})
    assert lm.model.num_parameters == based.load().num_parameters


# ---- tasks -----------------------------------------------------------------------------------------------------------

PAGES = {
    "europe/xa.json": {
        "Introduction": {"Background": {"text": "A long story of a small country. " * 40}},
        "Geography": {"Area": {"total": {"text": "83,871 sq km"}, "land": {"text": "82,445 sq km"}}},
        "Government": {"Capital": {"name": {"text": "Port Anna"}}, "Empty": {"text": None}},
    },
    "africa/xb.json": {
        "Geography": {"Coastline": {"text": "17 km"}, "Area": {"total": {"text": "12 sq km"}}},
        "Economy": {"Notes": {"text": "So many words that nobody would ever ask for all of them."}},
    },
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factbook") / "package"
    for name, page in PAGES.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(page))
    (folder / "europe" / "empty.json").write_text("")
    (folder / "package.json").write_text("[]")
    with tarfile.open(folder.parent / "book.tgz", "w:gz") as archive:
        archive.add(folder, "package")
    return folder


def test_pages_become_lines(pages: Path) -> None:
    first, second = factbook.read(pages)
    assert first.name == "africa/xb.json" and first.lines[:2] == [("Coastline", "17 km"), ("Area - total", "12 sq km")]
    assert [key for key, _ in second.lines] == ["Background", "Area - total", "Area - land", "Capital - name"]
    assert factbook.read(pages.parent / "book.tgz") == [first, second]


def test_questions_hold_their_answers_once(pages: Path, model: based.Model) -> None:
    assert model.tokenizer is not None
    found = factbook.choose(factbook.read(pages), model.tokenizer, 160, 100, seed=1)
    assert {(q.page, q.key) for q in found} == {
        ("africa/xb.json", "Coastline"),
        ("africa/xb.json", "Area - total"),
        ("europe/xa.json", "Area - total"),
        ("europe/xa.json", "Area - land"),
        ("europe/xa.json", "Capital - name"),
    }
    for question in found:
        for length in (160, 500, 100_000):
            prompt = question.prompt(length, twice=False)
            context = prompt.removesuffix(f"\n{question.key}:")
            assert f"{question.key}: {question.value}" in context
            assert len(model.encode(context)) <= length
            told = question.prompt(length, twice=True)
            assert told == f"Information about {question.key}. {context}\n{context}\n{question.key}:"
    assert len(model.encode(question.prompt(500, twice=False))) <= 500 + len(question.key) + 2
    again = factbook.choose(factbook.read(pages), model.tokenizer, 160, 2, seed=1)
    assert again == found[:2] != factbook.choose(factbook.read(pages), model.tokenizer, 160, 2, seed=2)


def test_factbook_scores_what_contains_the_answer(pages: Path, model: based.Model) -> None:
    (task,) = load_tasks(["factbook"], model, lengths=[160], factbook=pages)
    assert task.task_name == "factbook_160" and task.VERSION == 1
    for doc in task.test_docs():
        assert task.doc_to_text(doc) == doc["text"]
        assert task.process_results(doc, [f" it is {doc['answer'].upper()}!"]) == {"contains": 1.0}
        assert task.process_results(doc, [doc["answer"][:-1]]) == {"contains": 0.0}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["factbook"], {"lengths": [100]}, "factbook is missing"),
        (["factbook"], {}, "length is missing"),
        (["pairs"], {"lengths": [100]}, "length is for factbook"),
        (["pairs"], {"twice": True}, "twice is for factbook alone"),
        (["pairs", "pairs"], {}, "named twice"),
        (["ruler_vt"], {"lengths": [4096]}, "its example is at most 500 tokens"),
        (["ruler_cwe"], {"lengths": [512]}, "length is 512: ruler_cwe needs at least"),
        (["ruler_fwe"], {"lengths": [128]}, "length is 128: ruler_fwe needs at least"),
    ],
)
def test_wrong_tasks(model: based.Model, names: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(names, model, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "absent"),
        (lambda folder: folder, "no page found"),
        (lambda folder: folder / "text.tgz", "neither a folder nor a package"),
        (lambda folder: folder / "wrong", "a.json is no JSON"),
        (lambda folder: folder / "list", "b.json is no page: expected an object, found list"),
    ],
)
def test_wrong_factbooks(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    where = make(tmp_path)
    (tmp_path / "text.tgz").write_text("no archive")
    if where.name in ("wrong", "list"):
        where.mkdir()
        (where / ("a.json" if where.name == "wrong" else "b.json")).write_text("{" if where.name == "wrong" else "[1]")
    with pytest.raises((OSError, ValueError), match=message):
        factbook.read(where)


@pytest.mark.parametrize("name", ["swde", "fda", "squad_completion"])
def test_the_papers_tasks_need_the_hub(model: based.Model, name: str) -> None:
    with pytest.raises(OSError, match=f"{name}: .*could not be fetched from the hub"):
        load_tasks([name], model)


def test_the_papers_figures_stand_beside_ours() -> None:
    results = {"results": {"swde": {"contains,none": 0.25}}, "versions": {"swde": 1}}
    text = report.paper_table(results, "mine")
    assert "| based-360m, authors (version 0) | 25.65 | 14.34 | 24.23 |" in text
    assert "| mine, here | 25.00 (version 1) |  |  |" in text and "not comparable" in text


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_bundled_model_recalls_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its README says; through the harness."""
    assert cli.main(["eval", "--tasks", "pairs", "-o", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr()
    assert "|pairs|" in printed.out and printed.err == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["results"]["pairs"]["exact,none"] >= 0.95
    assert found["num_documents"]["pairs"] == {"original": 1024, "effective": 1024}
    assert found["versions"] == {"pairs": 1} and found["model"]["fingerprint"] == based.load().fingerprint
    assert found["context_tokens"]["read"] < found["context_tokens"]["all"] / 10
    assert found["packages"]["lm_eval"].startswith("0.4.") and found["settings"]["tasks"] == ["pairs"]


def test_factbook_by_lengths(pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["eval", "--tasks", "factbook", "--factbook", str(pages), "--length", "160", "--length", "300", "--json"]
    assert cli.main([*run, "--limit", "3"]) == 0
    once = json.loads(capsys.readouterr().out)
    assert list(once["results"]) == ["factbook_160", "factbook_300"]
    assert once["num_documents"]["factbook_300"] == {"original": 5, "effective": 3}
    assert cli.main([*run, "--twice"]) == 0
    assert list(json.loads(capsys.readouterr().out)["results"]) == ["factbook_twice_160", "factbook_twice_300"]


def test_ruler_from_its_texts_to_a_score(bundled: based.Model) -> None:
    asked: list[Any] = []

    class Knows(BasedLM):
        """Knows the answers of every second text."""

        def generate_until(self, requests: list[Instance]) -> list[str]:
            asked.extend(requests)
            super().generate_until(requests)
            return [", ".join(each.doc["outputs"]) if each.doc_id % 2 == 0 else "none" for each in requests]

    tasks = load_tasks(["niah_multikey_2", "ruler_fwe"], bundled, lengths=[1536])
    results = report.evaluate(Knows(bundled), tasks, limit=4)
    for name in ("niah_multikey_2_1536", "ruler_fwe_1536"):
        assert results["results"][name]["string_match_all,none"] == 0.5
        assert results["n-samples"][name] == {"original": 500, "effective": 4}
    assert len(asked) == 8 and bundled.tokenizer is not None
    for request in asked:
        prompt, until = request.args
        assert 768 < len(bundled.tokenizer.encode(prompt).ids) <= 1536 and until["max_gen_toks"] > 0
        assert all(output in prompt for output in request.doc["outputs"])


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TASKS)


@pytest.mark.parametrize(
    ("status", "fragment", "args"),
    [
        (2, "--tasks is missing", []),
        (2, "names no task", ["--tasks", ","]),
        (2, "there is no folder", ["--tasks", "pairs", "-o", "no/such/folder.json"]),
        (2, "--questions is factbook's", ["--tasks", "pairs", "--questions", "3"]),
        (1, "--twice is for factbook", ["--tasks", "pairs", "--twice"]),
        (1, "--length is missing", ["--tasks", "ruler_vt"]),
        (1, "--max-length is 1, expected", ["--tasks", "pairs", "--max-length", "1"]),
    ],
)
def test_wrong_usage(status: int, fragment: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", *args]) == status
    printed = capsys.readouterr()
    assert printed.out == "" and fragment in printed.err.splitlines()[-1]


# ---- the harness as a client of `based serve` ------------------------------------------------------------------------

CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: DATA/questions.jsonl, cache_dir: DATA/cache}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT_TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: DATA/questions.jsonl, cache_dir: DATA/cache}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"question": "def f(x):", "choices": ["\n    return", " x", "🙂"], "answer": 0},
    {"question": "Grüße, 世界", "choices": ["!", " and", "?"], "answer": 1},
    {"question": "import ", "choices": ["os", "sys", "re\n"], "answer": 1},
    {"question": "x " * 300, "choices": ["x", "y", "xx"], "answer": 0},
]


def test_the_harness_client_of_servers(bundled: based.Model, tmp_path: Path) -> None:
    """`lm_eval --model local-completions` finds at `based serve` what `based eval` finds."""
    for name in ("aiohttp", "tenacity", "requests"):
        pytest.importorskip(name, reason='the harness\' client of servers needs it: pip install "lm_eval[api]"')
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from tests.python.serving import serving

    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in (("choice", CHOICE_TASK), ("text", TEXT_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path)))

    def results(lm: Any) -> tuple[list[Any], list[Any]]:
        """Metrics, and the answers themselves, by task and document."""
        found = lm_eval.simple_evaluate(
            lm,
            tasks=["local_choice", "local_text"],
            task_manager=TaskManager(include_defaults=False, include_path=str(tmp_path)),
            bootstrap_iters=0,
            random_seed=None,
        )
        answers = [
            sample["filtered_resps"]
            for task in ("local_choice", "local_text")
            for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        ]
        return [found["results"][task] for task in ("local_choice", "local_text")], answers

    metrics, answers = results(BasedLM(bundled, progress=False))
    assert len(answers) == 8
    with serving(bundled) as server:
        for options in ({"batch_size": 3}, {"num_concurrent": 3, "tokenized_requests": False}):
            client = LocalCompletionsAPI(f"{server.url}/v1/completions", model="tiny", max_retries=1, **options)
            assert client.tokenizer_backend == "remote"  # found by itself: the tokenizer is the server's, too
            theirs, given = results(client)
            assert theirs == metrics
            assert given[4:] == answers[4:]  # texts
            for ours, choices in zip(answers[:4], given[:4], strict=True):
                for (logprob, is_greedy), (found, greedy) in zip(ours, choices, strict=True):
                    assert found == pytest.approx(logprob, abs=1e-3) and greedy == is_greedy
