"What models answer, servers refuse with and people's files hold: properties where a kind has a space."
import io, json, zipfile

import numpy as np
import pytest
from endpoint import Endpoint
from hypothesis import given, settings, strategies as st
from PIL import Image

from digiq.released.episodes import Pictures, find_form, screens_of
from digiq.core import ConfigError, DataError, from_dict
from digiq.data import decode_screen
from digiq.foreign import disguise, pause, reason
from digiq.play.judges import Judge, JudgeSettings, Verdict, read_verdict
from digiq.runs import Preset, load_preset
from digiq.method.autoui import AutoUIPolicy
from digiq.play.recording import SELECTORS, wrap
from digiq.released.agents import read_weights
from digiq.tasks import MARKS, Task, overlap
from digiq.released.torchfile import TorchFile

thinks = ("think", "thinking", "thought", "reasoning")
prose = st.one_of(st.text(), st.text(alphabet='{}[]":, \nab')).filter(lambda t: "<" not in t and "◁" not in t and "[TH" not in t.upper())
verdicts = st.builds(Verdict, st.one_of(st.text(), st.sampled_from(['a "list" of {lamps}', "so </think> it is", "two\nlines", "C:\\temp", "{"])), st.booleans())


def written(verdict, ascii, order): return json.dumps({k: getattr(verdict, k) for k in order}, ensure_ascii=ascii)


@settings(max_examples=500, deadline=None)
@given(prose, verdicts, prose, st.booleans(), st.permutations(["reasoning", "success"]))
def test_any_prose_around_any_verdict(before, verdict, after, ascii, order):
    assert read_verdict(before + written(verdict, ascii, order) + after) == verdict


@settings(max_examples=200, deadline=None)
@given(verdicts, verdicts, prose, st.sampled_from(thinks))
def test_thinking_does_not_count(draft, verdict, before, tag):
    thought, answer = json.dumps(vars(draft)), json.dumps(vars(verdict))
    assert read_verdict(f"<{tag}>{before}{thought}</{tag}>{answer}") == read_verdict(f"{thought}{before}</{tag}>{answer}") == verdict
    with pytest.raises(ValueError, match="is no verdict"): read_verdict(f"<{tag}>{before}{thought}")


@settings(max_examples=200, deadline=None)
@given(verdicts)
def test_line_breaks_and_python(verdict):
    loose = json.dumps(vars(verdict), ensure_ascii=False).replace("\\n", "\n").replace("\\t", "\t")
    if "\\" not in verdict.reasoning: assert read_verdict(loose) == verdict
    assert read_verdict(repr(vars(verdict))) == verdict


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='a" ,.:{}\n', max_size=30), st.booleans(), prose)
def test_quotation_marks_within_a_verdict(reasoning, success, after):
    assert read_verdict(f'{{"reasoning": "{reasoning.replace("}", "")}", "success": {json.dumps(success)}}}{after}').success == success


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.binary(), st.recursive(st.none() | st.booleans() | st.text() | st.integers(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["error", "message", "detail", "loc", "metadata", "raw", "x"]), x), max_leaves=9).map(json.dumps)))
def test_any_refusal_has_a_reason_in_one_line(body):
    assert "\n" not in reason(body) and (reason(body) or not body.strip() or isinstance(body, bytes) or json_empty(body))


def json_empty(text): return not text.split() or text.lstrip("\ufeff").strip()[:1] in '"<{['


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["Retry-After", "retry-after-ms", "Date"]), st.text(alphabet="0123456789.,-+ :GMTuehNov") | st.sampled_from(["Thu, 26 Nov 2026 12:00:00 GMT", "nan", "inf", "1e9"])))
def test_any_header_gives_a_pause(headers): assert 0 <= pause(headers) < 10**40


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 59), st.integers(1, 59), st.sampled_from(["header", "words", "field"]))
def test_any_duration_is_a_pause(hours, minutes, seconds, where):
    said = f"{hours}h"*(hours > 0) + f"{minutes}m"*(minutes > 0) + f"{seconds}.5s"
    headers, body = dict(header=({"Retry-After": said}, ""), words=({}, f"Please try again in {said}. Thanks"), field=({}, json.dumps({"details": [{"retryDelay": said}]})))[where]
    assert pause(headers, body) == 3600*hours + 60*minutes + seconds + .5


word = st.text(alphabet="abc_-. ", min_size=1, max_size=4).filter(lambda t: t.strip(". ") == t and t)


@settings(max_examples=60, deadline=None)
@given(above=st.lists(word, max_size=3), others=st.lists(st.lists(word, min_size=1, max_size=4), max_size=4), windows=st.booleans())
def test_a_picture_is_the_one_that_is_meant_or_none(above, others, windows, tmp_path_factory):
    place = tmp_path_factory.mktemp("zip")/"images.zip"
    wanted = "/".join([*above, "images", "test1", "1700_3.png"])
    names = {wanted: b"full"} | {"/".join([*o, "test1", "1700_3.png"]): b"other" for o in others}
    names[wanted] = b"full"
    with zipfile.ZipFile(place, "w") as z:
        for name, data in names.items(): z.writestr(name, data)
    asked = "/home/author/" + wanted
    try: found = Pictures(place).find(asked.replace("/", "\\") if windows else asked)
    except DataError as e: assert "may be" in str(e)
    else: assert found == b"full"


@given(before=st.text(alphabet="ab/\\_.0", max_size=9), steps=st.integers(1, 12), width=st.integers(1, 4), ending=st.sampled_from([".png", ".PNG", ".jpg"]))
def test_collected_episodes_show_the_screen_before_the_action(before, steps, width, ending):
    name = lambda t: f"{before}_{t:0{width}}{ending}"
    collected = [dict(image_path=name(t + 1)) for t in range(steps)]
    assert find_form(collected) == "collected" and screens_of(collected, "collected") == [name(t) for t in range(steps + 1)]


@given(st.integers(0, 65535))
def test_a_grey_of_16_bits_is_as_bright_as_it_was(level):
    Image.fromarray(np.full((2, 2), level, np.uint16)).save(out := io.BytesIO(), "PNG")
    assert decode_screen(out.getvalue()).getpixel((0, 0)) == (round(level / 257),)*3


@given(st.lists(st.text(alphabet="ab c", min_size=1).filter(str.strip), min_size=1, max_size=3), st.sampled_from(sorted(MARKS)), st.sampled_from(sorted(MARKS)), st.sampled_from([str.upper, str.title, lambda t: f" {t}  "]))
def test_goals_are_the_same_in_any_quotation_marks(queries, left, right, written):
    task = lambda q: Task("x", f"Search for {q}", 2, "", q, "test")
    assert len(overlap([task(q) for q in queries], [task(written(chr(left) + q + chr(right))) for q in queries])) == len(queries)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"])).filter(lambda t: not SELECTORS.search(t)))
def test_no_letter_of_a_film_is_lost(text): assert "".join(wrap(text, 200, 15, 99)) == text


@settings(max_examples=30, deadline=None)
@given(st.integers(-10**20, 10**20))
def test_names_that_came_as_numbers_are_text_again(number):
    found = load_preset(task_set=number, policy=number, evaluation=dict(split=number, episodes="40"))
    assert (found.task_set, found.policy, found.evaluation.split) == (str(number),)*3 and found.evaluation.episodes == 40


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["temperature", "horizon", "threads"]), value=st.one_of(st.integers(-3, 3), st.floats(), st.text(max_size=4), st.none(), st.booleans()))
def test_a_setting_is_a_number_that_may_be_meant_or_refused(name, value):
    try: found = getattr(from_dict(Preset, {name: value}), name)
    except ConfigError as e: assert name in str(e) and "\n" not in str(e)
    else: assert found >= (0 if name == "temperature" else 1) and found < float("inf")


texts = {"a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "an HTML page": b"<!doctype html><html><title>Sign in</title>", "an XML message": b'<?xml version="1.0"?><Error><Message>Access denied</Message></Error>',
         "a JSON message": b'{"error": "gated"}', "empty": b""}


@pytest.mark.parametrize("kind", texts)
def test_text_in_the_place_of_any_binary(kind, tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors", "webshop.pt", "images.zip"): (tmp_path/name).write_bytes(texts[kind])
    reads = [lambda: read_weights(tmp_path/"pytorch_model.bin"), lambda: read_weights(tmp_path/"model.safetensors"), lambda: TorchFile(tmp_path/"webshop.pt"), lambda: Pictures(tmp_path/"images.zip"), lambda: AutoUIPolicy.from_pretrained(tmp_path)]
    for read in reads:
        with pytest.raises(DataError, match=f"is {kind}") as told: read()
        assert "\n" not in str(told.value) and "weights_only" not in str(told.value)


@given(st.binary(max_size=99))
def test_anything_is_a_binary_or_is_told(data): assert "\n" not in disguise(data)


def test_what_a_server_says_is_kept_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret/+key")
    with Endpoint(lambda *_: {"reasoning": "so", "success": True}, "sk-secret/+key") as endpoint:
        judge = Judge(JudgeSettings("m", endpoint.url, "JUDGE_KEY", tries=1), tmp_path)
        for status, body in ((400, '{"detail": "no sk-secret\\/+key"}'), (403, '[{"error": {"message": "not for sk-secret/+key"}}]'), (503, "busy with sk-secret/+key")):
            endpoint.faults.append(("refuses", status, body))
            with pytest.raises(Exception, match=r"\*\*\*") as told: judge.ask("Go", Image.new("RGB", (9, 9)))
            assert "secret" not in str(told.value)
