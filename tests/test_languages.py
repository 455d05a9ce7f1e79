"Whatever a model says, reading it gives an action or an `ActionError`."
import random

import pytest

from digiq.actions import Action, ActionError, complete, impossible, long_press, open_app, press, swipe, tap, type_text, wait
from digiq.languages import LANGUAGES

SPOILERS = ["", "\0", "\n", "'", '"', "\\", "(", ")", "[", "]", "{", "}", ",", ":", "<", ">", "-", "1e999", "9" * 30, "NaN", "null", "true", "Action:", "<tool_call>", "</tool_call>", "<point>", "日", "\ud83d"]


@pytest.mark.parametrize("name", LANGUAGES)
def test_mutated_answers(name):
    rng, language, size, read = random.Random(name), LANGUAGES[name], (448, 1000), 0
    whole = [tap(.1, .2), swipe(.8, .5, .2, .5), long_press(1, 0), type_text("it's a \"lamp\"\n"), press("back"), wait(), open_app("Clock"), complete("5"), impossible()]
    texts = [language.render(a, size, "" if name == "auto-ui" else "Thought: Action: look.") for a in whole]
    for _ in range(20_000):
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 4)):
            at, cut = rng.randrange(len(text) + 1), rng.choice([0, 0, 1, 2, 20])
            text = text[:at] + rng.choice(SPOILERS) + text[at + cut:]
        try: read += isinstance(language.parse(text, size).action, Action)
        except ActionError as e: assert str(e)
    assert 0 < read < 20_000
