"""Plain text from a small grammar, with long-range structure.

Each document makes its free choices in its first sentence and then follows from
them for hundreds of tokens (a cycle declared at the start, or counting), so that a
continuation is determined and a trained model is sure of it.
"""

NAMES = ("Anna", "Zoë", "Omar", "Mei", "Jürgen", "Ines")
PLACES = ("the café", "北京", "Köln", "the river", "the market", "the old town")
FOODS = ("tea", "bread", "plums", "soup", "rice", "a crème")
WEATHER = ("sun", "rain", "snow", "wind", "fog", "storms")
ANIMALS = ("fox", "owl", "cat", "naïve goat", "hen", "bear")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _listed(items):
    return ", ".join(items[:-1]) + " and " + items[-1]


def _diary(rng, lines):
    name, foods = rng.choice(NAMES), rng.sample(FOODS, rng.randint(2, 4))
    days = (f" On {DAYS[i % 7]} {name} had {foods[i % len(foods)]}." for i in range(lines))
    return f"{name} likes {_listed(foods)}." + "".join(days)


def _forecast(rng, lines):
    place, weather = rng.choice(PLACES), rng.sample(WEATHER, rng.randint(2, 4))
    days = (f"\n{DAYS[i % 7]}: {weather[i % len(weather)]} in {place}." for i in range(lines))
    return f"Weather for {place}: {_listed(weather)}." + "".join(days)


def _count(rng, lines):
    step = rng.randint(1, 5)
    numbers = ", ".join(str(step * (i + 1)) for i in range(3 * lines))
    return f"Count by {step}: {numbers}."


def _story(rng, lines):
    name, animals = rng.choice(NAMES), rng.sample(ANIMALS, rng.randint(2, 3))
    turns = (
        f"\nGrüße! {name} meets the {animals[i % len(animals)]} and says 👋."
        for i in range(lines)
    )
    return f"A story of {name}, the {_listed(animals)}." + "".join(turns) + "\nThe end."


def document(rng, lines=None):
    """One document of the given number of lines (random when None)."""
    kind = rng.choice((_diary, _forecast, _count, _story))
    return kind(rng, lines or rng.randint(6, 40))
