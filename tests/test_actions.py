"Actions: what no lesson can show, by brute force."
import random

from hypothesis import given, settings, strategies as st

from digiq.actions import KINDS, NEW_KINDS, Action, ActionError, complete, decision, impossible, is_valid, long_press, open_app, parse, press, render, swipe, tap, type_text, wait

unit = st.floats(0, 1)
plans = st.lists(st.sampled_from(KINDS + NEW_KINDS), max_size=8).map(tuple)
actions = st.one_of(
    st.builds(lambda y, x: tap(y, x), unit, unit),
    st.builds(swipe, unit, unit, unit, unit),
    st.builds(type_text, st.text()),
    st.builds(press, st.sampled_from(["back", "home", "enter"])),
    st.builds(complete, st.text()), st.builds(impossible), st.builds(wait), st.builds(long_press, unit, unit), st.builds(open_app, st.text(min_size=1).filter(str.strip)),
    st.builds(lambda text, plan: Action("TYPE", text=text, plan=plan), st.text(alphabet='"\\,[]{}:; \n\té日🛒'), plans),
    st.builds(lambda y, x, plan: Action("DUAL_POINT", (y, x), (x, y), plan=plan), unit, unit, plans))


@settings(max_examples=2000, deadline=None)
@given(actions)
def test_round_trip(action):
    text = render(action)
    assert parse(text) == action and is_valid(text)
    assert render(parse(text)) == text
    assert text.endswith(decision(text)) and parse("  " + text + " \n") == action


@settings(max_examples=2000, deadline=None)
@given(st.text())
def test_any_text(text):
    try: parse(text)
    except ActionError as e: assert str(e) and "\n" not in str(e)


def test_unescaped_published_text():
    form = 'Action Plan: [TYPE] ; Action Decision: "action_type": "TYPE", "touch_point": "[-1.0, -1.0]", "lift_point": "[-1.0, -1.0]", "typed_text": "{}"'
    for text in ['what is a "buffer"', '"', "newegg.com", "C:\\n", "a, b]", "", "5' 10\""]:
        assert parse(form.format(text)).text == text and render(type_text(text)) == form.format(text)


def mutate(text, rng, other):
    "One of the ways in which a weak or cut-off policy spoils a sentence."
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return rng.choice([
        lambda: text[:i], lambda: text[i:], lambda: text[:i] + text[j:], lambda: text[:j] + text[i:],
        lambda: text[:i] + other[i:], lambda: text[:i] + rng.choice('"\\[],.:;-0123456789eE_ \n\0é🛒naninf') + text[i:],
        lambda: text[:i] + rng.choice('"[],.-019') + text[i + 1:], lambda: text.replace(rng.choice(text or " "), rng.choice('"[ 9-٣'), 1)])()


def test_mutations_raise_only_action_errors():
    rng = random.Random(0)
    seeds = [render(a) for a in (tap(.5, .25), swipe(.8, .5, .2, .5), type_text('a "b" \\ [c], d'), press("back"), complete(), long_press(.1, .2),
                                 Action("TYPE", text="lamp", plan=KINDS))]
    valid = 0
    for _ in range(100_000):
        text = rng.choice(seeds)
        for _ in range(rng.randint(1, 4)): text = mutate(text, rng, rng.choice(seeds))
        try: action = parse(text)
        except ActionError: continue
        valid += 1
        assert parse(render(action)) == action
    assert 0 < valid < 50_000
