"""The words of the small world."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


GIRLS = _words(
    "Mary Anna Lucy Emma Clara Nora Alice Julia Sara Rose Ellen Grace Helen Ruth Laura Kate"
)
BOYS = _words("John Tom Peter Paul David Mark James Henry Max Oscar Simon Jack Leo Adam Ben Sam")
FEMALE = frozenset(GIRLS)
PEOPLE = [*GIRLS, *BOYS]

PLACES = _words(
    "store park market library garden school kitchen beach river farm museum station forest "
    "harbour bakery zoo lake office castle bridge"
)
ROOMS = _words("kitchen garden bathroom bedroom hall office cellar attic")

# singular -> plural: things that can be given, and stand beside each other
THINGS = {
    "book": "books", "ball": "balls", "apple": "apples", "letter": "letters", "flower": "flowers",
    "hat": "hats", "key": "keys", "cake": "cakes", "pen": "pens", "map": "maps", "lamp": "lamps",
    "ring": "rings", "coat": "coats", "basket": "baskets", "kite": "kites", "box": "boxes",
    "picture": "pictures", "stone": "stones", "cup": "cups", "cookie": "cookies",
    "drink": "drinks", "toy": "toys", "egg": "eggs", "orange": "oranges",
    "umbrella": "umbrellas", "knife": "knives",
}  # fmt: skip
# and who or what can be the subject of a sentence
BEINGS = {
    "cat": "cats", "dog": "dogs", "bird": "birds", "horse": "horses", "cow": "cows",
    "mouse": "mice", "goat": "goats", "child": "children", "man": "men",
    "woman": "women", "teacher": "teachers", "farmer": "farmers", "doctor": "doctors",
    "girl": "girls", "boy": "boys", "king": "kings", "queen": "queens", "baker": "bakers",
    "driver": "drivers", "friend": "friends", "neighbour": "neighbours", "rabbit": "rabbits",
    "fox": "foxes",
}  # fmt: skip
FOODS = _words(
    "bread butter cheese milk rice apples pears plums grapes carrots onions potatoes beans eggs "
    "honey tea salt sugar fish nuts"
)
CLOTHES = _words("coat hat scarf shirt jacket dress cap sweater")
COLOURS = _words("red blue green yellow black white brown grey pink purple")
OF_A_COLOUR = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red",
    "coal": "black", "the sun": "yellow", "milk": "white", "a strawberry": "red", "a leaf": "green",
    "chocolate": "brown", "an elephant": "grey",
}  # fmt: skip
KINDS = {
    "rose": "flower", "tulip": "flower", "apple": "fruit", "pear": "fruit", "plum": "fruit",
    "cherry": "fruit", "dog": "animal", "cat": "animal", "horse": "animal", "cow": "animal",
    "sparrow": "bird", "owl": "bird", "duck": "bird", "salmon": "fish", "trout": "fish",
    "oak": "tree", "pine": "tree", "hammer": "tool", "saw": "tool", "violin": "instrument",
    "piano": "instrument", "chair": "piece of furniture", "table": "piece of furniture",
    "carrot": "vegetable", "onion": "vegetable", "red": "colour", "blue": "colour",
    "Monday": "day", "Friday": "day", "May": "month", "June": "month",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "England": "London", "Portugal": "Lisbon", "Greece": "Athens", "Austria": "Vienna",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "Belgium": "Brussels", "Hungary": "Budapest",
    "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo",
    "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Kenya": "Nairobi", "Turkey": "Ankara", "Iceland": "Reykjavik", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Croatia": "Zagreb", "Iran": "Tehran", "Iraq": "Baghdad",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "old": "young", "fast": "slow",
    "light": "dark", "high": "low", "long": "short", "full": "empty", "open": "closed",
    "hard": "soft", "wet": "dry", "early": "late", "good": "bad", "happy": "sad", "rich": "poor",
    "strong": "weak", "clean": "dirty", "near": "far", "thick": "thin", "loud": "quiet",
    "day": "night", "black": "white", "first": "last", "inside": "outside", "always": "never",
    "true": "false", "sweet": "sour", "begin": "end", "win": "lose",
    "buy": "sell", "push": "pull", "love": "hate", "summer": "winter",
}  # fmt: skip
OPPOSITES = _OPPOSITES | {other: one for one, other in _OPPOSITES.items()}
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
MOODS = _words("happy sad tired hungry thirsty cold angry proud sleepy glad")
WEATHER = _words("warm cold sunny rainy windy cloudy foggy mild")

GIVING = {  # past -> after "to"
    "gave": "give", "handed": "hand", "passed": "pass", "sent": "send", "showed": "show",
    "brought": "bring", "offered": "offer", "sold": "sell",
}  # fmt: skip
# singular -> plural, each with ends that it can have
VERBS = {
    "is": "are", "was": "were", "has": "have", "sleeps": "sleep", "runs": "run", "sings": "sing",
    "waits": "wait", "works": "work", "eats": "eat", "goes": "go",
}  # fmt: skip
ENDS = {
    "is": ("tired", "hungry", "here", "very old", "in the garden", "not at home", "happy"),
    "was": ("tired", "late", "here", "very young", "at the lake", "not at school", "happy"),
    "has": ("no time", "a red hat", "a lot of food", "a small house", "a new friend"),
    "sleeps": ("all day", "under the tree", "in the hall"),
    "runs": ("very fast", "to the river", "every morning"),
    "sings": ("a song", "every evening", "in the park"),
    "waits": ("at the station", "for the train", "in the rain"),
    "works": ("hard", "in the field", "every day"),
    "eats": ("bread and cheese", "at noon", "in the kitchen"),
    "goes": ("home", "to the market", "to bed"),
}
BESIDE = ("near", "behind", "beside", "next to", "in front of", "with")


def with_article(noun: str) -> str:
    """ "a book", "an apple"."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def pronoun(name: str, case: str = "she") -> str:
    """The word for a person; case is "she", "her" (to her) or "hers" (her hat)."""
    if name in FEMALE:
        return {"she": "she", "her": "her", "hers": "her"}[case]
    return {"she": "he", "her": "him", "hers": "his"}[case]


def capitalised(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]
