"""Full-text search in a user's history, in every script, and with any text as the question."""

import pytest

from storage import words
from storage.history import ImportItem

TEXTS = [
    "The cat sleeps on the warm keyboard",
    "My dog barks at every postman",
    "Кошка спит на тёплой клавиатуре",
    "Собака лает на почтальона",
    "私は東京タワーに行きたいです",
    "大阪の食べ物が好きです",
    "我昨天在北京吃了烤鸭",
    "서울에서 친구를 만났어요",
    "ฉันชอบกินข้าวผัด",
    "Ποιος ξέρει την αλήθεια",
    "אני גר בתל אביב",
    "Le café crème est prêt",
    "error E1234 in foo_bar.py: don't panic",
]


@pytest.fixture
async def library(history, ann, now):
    await history.import_(ann.id, [ImportItem(text, now, str(at)) for at, text in enumerate(TEXTS)], count=len, now=now)


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("cat", 0),
        ("CATS sleeping?", 0),
        ("where is the postman", 1),
        ("кошка", 2),
        ("КЛАВИАТУРЕ!", 2),
        ("почтальона", 3),
        ("東京", 4),
        ("タワーはどこ", 4),
        ("大阪", 5),
        ("食べ物", 5),
        ("北京", 6),
        ("烤鸭好吃吗", 6),
        ("서울", 7),
        ("친구를", 7),
        ("ข้าวผัด", 8),
        ("αλήθεια", 9),
        ("אביב", 10),
        ("cafe creme", 11),
        ("E1234", 12),
        ("foo_bar.py", 12),
        ("ｃａｔ", 0),
    ],
)
async def test_words_are_found_in_every_script(library, history, ann, question, found):
    best = (await history.search(ann.id, question, limit=3))[0]
    assert best.text == TEXTS[found]


@pytest.mark.parametrize("question", ["zebra", "京東", "лошадь", "", " ", "?!", "\0", "a", "“”", "…", "'"])
async def test_what_is_not_there_is_not_found(library, history, ann, question):
    assert await history.search(ann.id, question, limit=3) == []


@pytest.mark.parametrize(
    "question",
    [
        'cat"',
        '"cat',
        "cat AND NOT",
        "NEAR(cat, 2)",
        "cat*",
        "words:cat",
        "cat) OR (1=1",
        "-cat ^cat",
        "'; DROP TABLE entries; --cat",
        "cat \0 \ud800",
        "cat " * 10_000,
        " ".join(f"w{at}" for at in range(30)) + " cat",
    ],
)
async def test_a_question_is_only_words_whatever_it_holds(library, history, ann, question):
    assert (await history.search(ann.id, question, limit=1))[0].text == TEXTS[0]


async def test_the_better_match_comes_first(history, ann, now):
    texts = ["I like tea", "I like green tea from Japan", "I like coffee", "nothing to do with it"]
    await history.import_(ann.id, [ImportItem(text, now) for text in texts], count=len, now=now)
    found = await history.search(ann.id, "green tea", limit=10)
    assert [entry.text for entry in found] == [texts[1], texts[0]]


async def test_a_rare_word_counts_more_than_a_common_one(history, ann, now):
    texts = [*(f"the weather on day {at}" for at in range(20)), "the umbrella", "the weather the weather"]
    await history.import_(ann.id, [ImportItem(text, now) for text in texts], count=len, now=now)
    assert (await history.search(ann.id, "the weather, the umbrella", limit=1))[0].text == "the umbrella"


async def test_threat_13_the_order_tells_nothing_of_what_others_wrote(history, ann, bob, now):
    texts = ["apples and some more words", "pears and some more words", "nothing at all"]
    await history.import_(ann.id, [ImportItem(text, now) for text in texts], count=len, now=now)
    before = [entry.text for entry in await history.search(ann.id, "apples pears", limit=5)]
    for word in ("apples", "pears"):
        theirs = [ImportItem(f"{word} {at}", now) for at in range(50)]
        await history.import_(bob.id, theirs, count=len, now=now)
        assert [entry.text for entry in await history.search(ann.id, "apples pears", limit=5)] == before


async def test_limit_before_and_exclude(history, ann, now):
    await history.import_(ann.id, [ImportItem(f"tea {at}", now) for at in range(8)], count=len, now=now)
    ids = [entry.id for entry in await history.search(ann.id, "tea", limit=100)]
    assert sorted(ids) == list(range(1, 9))
    assert ids == sorted(ids, reverse=True)
    assert [entry.id for entry in await history.search(ann.id, "tea", limit=2)] == [8, 7]
    assert [entry.id for entry in await history.search(ann.id, "tea", limit=2, before=4)] == [3, 2]
    assert [entry.id for entry in await history.search(ann.id, "tea", limit=2, exclude=[8, 6])] == [7, 5]
    assert await history.search(ann.id, "tea", limit=0) == []


async def test_turns_and_replies_are_found_and_corrections_are_not(place, answer, history, ann):
    replied = await answer(await place("where is my umbrella"), "In the wardrobe.")
    await history.feedback(ann.id, replied, None, "In the attic.")
    assert {entry.id for entry in await history.search(ann.id, "wardrobe umbrella", limit=5)} == {1, 2}
    assert await history.search(ann.id, "attic", limit=5) == []


def test_threat_16_a_question_of_a_million_words_asks_for_32():
    assert len(words.phrases(" ".join(f"word{at}" for at in range(1_000_000)))) == 32


@pytest.mark.parametrize(("text", "expected"), [("東京", " 東  京 "), ("tea", "tea"), ("a東b", "a 東 b")])
def test_characters_of_spaceless_scripts_are_indexed_alone(text, expected):
    assert words.indexed(text) == expected
