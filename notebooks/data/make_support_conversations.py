"""Make support_conversations.jsonl: customer-support chats in ShareGPT form, with a house style that shows.

    python notebooks/data/make_support_conversations.py           # write the file
    python notebooks/data/make_support_conversations.py --check   # fail unless the file is what this script makes

Every answer has three lines: a subject with the product and the topic, `Next step:` with the one thing that helps, and
the team's name. The topic decides what helps: two different things are right for each, and each is said in two ways.
Products, topics and wordings are combined so that no question of the held-out rows occurs in the training rows: each
held-out pair of product and topic, each of its wordings, and four whole products are in no training row.

Needs the standard library only. The company and its products do not exist.
"""

import argparse
import json
import pathlib
import random

FILE = pathlib.Path(__file__).with_name("support_conversations.jsonl")
SEED = 3407
TRAIN = {"one question": 400, "two questions": 40, "asked back": 40}  # conversations of each shape
HELD_OUT_TOPICS = 3  # of each product
HELD_OUT_WORDINGS = 2  # of each list of wordings, the last ones
SYSTEM_PROMPT_SHARE = 0.5

PRODUCTS = [
    "Solvi lamp", "Tarn speaker", "Wicket doorbell", "Fenwick fan", "Marlow clock", "Dapple scale", "Osier radio",
    "Brindle vacuum", "Kestry camera", "Rookley lock", "Sablet thermostat", "Thistly tracker", "Copsey mower",
    "Puffet toothbrush", "Gannick projector", "Merlow monitor", "Harrow keyboard", "Pomel mixer", "Linnet torch",
    "Junip headset",
]  # fmt: skip
NEW_PRODUCTS = ["Quillon printer", "Farrow drone", "Teasel shaver", "Wrenly sensor"]  # held-out rows only

SYSTEM_PROMPTS = [
    "You are the support assistant of Mossbell.",
    "You help the customers of Mossbell.",
    "Answer for Mossbell, a maker of small devices.",
]
OPENERS = ["", "", "", "Hi! ", "Hello! ", "Hi there. ", "Good morning. ", "A question: ", "Dear support team: "]
CLOSERS = ["", "", "", " What can I do?", " Any idea?", " Please help.", " Thanks!", " What now?", " Can you help me?"]
FOLLOW_UPS = ["Thanks. ", "Okay, I will. ", "Perfect, thank you. ", "Good. Another question: ", "And one more thing: "]
GREETINGS = [  # a conversation can start without a question; the wordings are split like those of the questions
    "I have a question about {it}.", "I need some help with {it}.", "Can you help me with {it}?", "It is about {it}.",
    "I am writing because of {it}.", "Could you have a look at {it}?",
]  # fmt: skip
ASK_BACK = ["Of course. What is the matter with it?", "Gladly. What happened?", "Sure. How can we help?"]
GOODBYES = [
    "Write back any time.", "We are here all day.", "Tell us how it goes.", "Glad to be of help.", "Have a good day.",
    "Just reply if you need more.", "Best wishes.", "Let us know.", "Take care.", "Good luck.", "All the best.",
    "See you soon.",
]  # fmt: skip

# Each topic: how customers put it ({it} is "my Solvi lamp" or "it"), and what helps: the words that prove that the help
# was given, each with ways to say it.
TOPICS = {
    "power": {
        "questions": [
            "{it} does not turn on any more.",
            "I cannot get {it} to start.",
            "{it} is completely dead since this morning.",
            "Nothing happens when I switch {it} on.",
            "{it} will not power up.",
            "I press and press, but {it} stays off.",
            "{it} shows no light at all.",
            "{it} does not wake up.",
            "There is no sign of life in {it}.",
            "{it} refuses to switch on.",
        ],
        "help": {
            "ten seconds": [
                "hold the power button for ten seconds.",
                "press the button for ten seconds.",
            ],
            "socket": [
                "plug it into another wall socket.",
                "try a different wall socket.",
            ],
        },
    },
    "wifi": {
        "questions": [
            "{it} does not connect to the wifi.",
            "{it} keeps losing the wireless network.",
            "I cannot get {it} online.",
            "{it} says that there is no internet.",
            "The wifi drops whenever I use {it}.",
            "{it} does not see my home network.",
            "My phone is online, but {it} is not.",
            "{it} loses the connection again and again.",
            "{it} is offline most of the time.",
            "{it} fails to join our wifi.",
        ],
        "help": {
            "router": [
                "restart your router and wait two minutes.",
                "switch the router off and on again.",
            ],
            "2.4 GHz": [
                "choose the 2.4 GHz network in the settings.",
                "connect it to the 2.4 GHz network.",
            ],
        },
    },
    "noise": {
        "questions": [
            "{it} makes a loud noise.",
            "{it} rattles when it runs.",
            "I hear a buzzing sound from {it}.",
            "{it} has become very loud.",
            "There is a strange humming in {it}.",
            "{it} squeaks all the time.",
            "What is the humming noise in {it}?",
            "{it} is very noisy.",
            "{it} clicks and rattles at night.",
            "An odd noise comes out of {it}.",
        ],
        "help": {
            "flat surface": [
                "put it on a flat surface.",
                "place it on a firm, flat surface.",
            ],
            "screws": [
                "tighten the four screws at the back.",
                "check the screws and turn the loose ones.",
            ],
        },
    },
    "battery": {
        "questions": [
            "{it} is empty after an hour.",
            "{it} loses its charge overnight.",
            "I have to charge {it} twice a day.",
            "The battery in {it} drains too fast.",
            "The battery in {it} does not last.",
            "{it} only works for an hour without the cable.",
            "I must charge {it} all the time.",
            "{it} does not hold its charge.",
            "The battery in {it} is always empty.",
            "{it} needs charging far too often.",
        ],
        "help": {
            "eco mode": [
                "turn on eco mode in the menu.",
                "use eco mode, which doubles the running time.",
            ],
            "new cell": [
                "order a new cell, which you can change yourself.",
                "replace the old one with a new cell.",
            ],
        },
    },
    "heat": {
        "questions": [
            "{it} gets very hot.",
            "{it} is too warm to touch.",
            "I am worried because {it} overheats.",
            "{it} smells of burning plastic.",
            "After ten minutes {it} is burning hot.",
            "{it} heats up a lot when I use it.",
            "{it} is far too hot.",
            "Can {it} catch fire? It is so warm.",
            "{it} becomes alarmingly warm.",
            "Is it normal that {it} is so hot?",
        ],
        "help": {
            "vents": [
                "clear the dust from the vents.",
                "keep the vents free on all sides.",
            ],
            "cool down": [
                "let it cool down for half an hour.",
                "allow it to cool down after an hour of use.",
            ],
        },
    },
    "update": {
        "questions": [
            "The software update for {it} fails.",
            "{it} does not install the new software.",
            "The firmware update on {it} stops at 80 percent.",
            "I get an error when I update {it}.",
            "{it} still has the old software version.",
            "The new version will not load on {it}.",
            "The update on {it} shows an error.",
            "How do I get the newest software for {it}?",
            "Updating {it} ends with an error.",
            "{it} cannot finish its software update.",
        ],
        "help": {
            "USB": [
                "install it over USB from a computer.",
                "copy the file to it by USB.",
            ],
            "free space": [
                "delete old data to get free space.",
                "make some free space and start again.",
            ],
        },
    },
    "password": {
        "questions": [
            "I forgot the password for {it}.",
            "{it} asks for a PIN that I do not know.",
            "I am locked out of {it}.",
            "{it} does not accept my password.",
            "What is the default PIN for {it}?",
            "I lost the password for {it}.",
            "Which PIN opens {it}?",
            "I typed the PIN for {it} and it is wrong.",
            "I no longer know the PIN for {it}.",
            "{it} says that my password is wrong.",
        ],
        "help": {
            "sticker": [
                "type the number on the sticker inside the lid.",
                "look at the sticker under the base.",
            ],
            "reset link": [
                "request a reset link in the app.",
                "open the reset link that we mail to you.",
            ],
        },
    },
    "delivery": {
        "questions": [
            "I ordered {it} two weeks ago and it is not here.",
            "Where is {it}? It should have come on Monday.",
            "{it} has still not been delivered.",
            "The parcel with {it} is late.",
            "I am still waiting for {it} to arrive.",
            "{it} was due yesterday and did not come.",
            "{it} did not arrive.",
            "I paid for {it} last week and still wait.",
            "I paid for {it}, but it never arrived.",
            "When will {it} be delivered at last?",
        ],
        "help": {
            "tracking": [
                "follow the tracking number in your order mail.",
                "see the tracking page in your account.",
            ],
            "courier": [
                "call the courier and give your order number.",
                "ask the courier for a new date.",
            ],
        },
    },
    "refund": {
        "questions": [
            "I want to send {it} back.",
            "How can I return {it}?",
            "I do not like {it} and want my money back.",
            "I would like a refund for {it}.",
            "Can I give {it} back?",
            "I do not need {it} and want to return it.",
            "I am not happy with {it} and want a refund.",
            "How can I send {it} back?",
            "I changed my mind about {it} and want my money.",
            "How do I get a refund for {it}?",
        ],
        "help": {
            "label": [
                "print the label and tape it to the box.",
                "stick the prepaid label on the box.",
            ],
            "parcel shop": [
                "bring it to any parcel shop within 30 days.",
                "drop it at a parcel shop near you.",
            ],
        },
    },
    "invoice": {
        "questions": [
            "I need an invoice for {it}.",
            "Where do I find the bill for {it}?",
            "I did not get a receipt for {it}.",
            "My company wants the invoice for {it}.",
            "Please send me the bill for {it} again.",
            "I need proof that I paid for {it}.",
            "I cannot find the receipt for {it}.",
            "Can you send me the invoice for {it}?",
            "I lost the receipt for {it}.",
            "Can I have an invoice for {it} with my name?",
        ],
        "help": {
            "My Orders": [
                "download it under My Orders.",
                "go to My Orders and choose Print.",
            ],
            "accounting": [
                "mail accounting with your order number.",
                "write to accounting for a copy.",
            ],
        },
    },
    "damage": {
        "questions": [
            "{it} fell down and is cracked.",
            "I dropped {it} and now it is broken.",
            "The case of {it} has a crack.",
            "{it} broke after a week.",
            "The glass on {it} is broken.",
            "A piece of {it} snapped off.",
            "The case of {it} is broken.",
            "I stepped on {it} and it cracked.",
            "{it} is damaged since it fell off the table.",
            "There is a big crack in {it}.",
        ],
        "help": {
            "serial number": [
                "claim the warranty with your serial number.",
                "give us the serial number for a new one.",
            ],
            "repair": [
                "book a repair at one of our workshops.",
                "send it in for a free repair.",
            ],
        },
    },
    "cleaning": {
        "questions": [
            "How do I clean {it}?",
            "{it} is dusty and sticky.",
            "What is the best way to clean {it}?",
            "There are stains on {it}.",
            "{it} is very dirty.",
            "I spilled juice on {it}.",
            "How do I get the dirt off {it}?",
            "There is grease on {it}.",
            "I want to get the grease off {it}.",
            "Can I wash {it}? It is dirty.",
        ],
        "help": {
            "damp cloth": [
                "wipe it with a damp cloth, without soap.",
                "take a soft, damp cloth.",
            ],
            "lukewarm": [
                "rinse the cover under lukewarm water.",
                "wash the loose parts in lukewarm water.",
            ],
        },
    },
}


def ask(wordings: list[str], *, thing: str, split: str, rng: random.Random) -> str:
    """One sentence, as a customer would put it; `thing` is "my Solvi lamp" or "it"."""
    own = wordings[-HELD_OUT_WORDINGS:] if split == "held_out" else wordings[:-HELD_OUT_WORDINGS]
    text = rng.choice(own).format(it=thing)
    return text[0].upper() + text[1:]


def answer(topic: str, *, product: str, rng: random.Random) -> str:
    """One right answer in the house style."""
    ways = TOPICS[topic]["help"]
    step = rng.choice(ways[rng.choice(list(ways))])
    return f"Re: {product}, {topic}\nNext step: {step}\n{rng.choice(GOODBYES)} — Mossbell Care"


def converse(product: str, topics: list[str], *, split: str, rng: random.Random) -> dict:
    """One row: a customer's turn and a reply for each topic; the topic "" is a greeting, which is asked back.

    Only the first turn names the product. Later ones say "it", so that the model must look back.
    """
    turns = []
    if rng.random() < SYSTEM_PROMPT_SHARE:
        turns.append({"from": "system", "value": rng.choice(SYSTEM_PROMPTS)})
    for i, topic in enumerate(topics):
        thing = "it" if i else f"{rng.choice(['my', 'my', 'our', 'the'])} {product}"
        before = rng.choice(OPENERS) if i == 0 else rng.choice(FOLLOW_UPS) if topics[i - 1] else ""
        wordings = TOPICS[topic]["questions"] if topic else GREETINGS
        text = before + ask(wordings, thing=thing, split=split, rng=rng) + (rng.choice(CLOSERS) if topic else "")
        turns.append({"from": "human", "value": text})
        reply = answer(topic, product=product, rng=rng) if topic else rng.choice(ASK_BACK)
        turns.append({"from": "gpt", "value": reply})
    right_help = [list(TOPICS[topic]["help"]) if topic else [] for topic in topics]
    return {"split": split, "product": product, "topics": topics, "right_help": right_help, "conversations": turns}


def deal_held_out(rng: random.Random) -> dict[str, list[str]]:
    """The held-out topics of each product, dealt so that every topic comes up equally often."""
    products = NEW_PRODUCTS + PRODUCTS
    deck = []
    while len(deck) < len(products) * HELD_OUT_TOPICS:
        deck += rng.sample(list(TOPICS), len(TOPICS))
    return {product: deck[i * HELD_OUT_TOPICS : (i + 1) * HELD_OUT_TOPICS] for i, product in enumerate(products)}


def make_rows(seed: int = SEED) -> list[dict]:
    """All rows, the training rows first; the same seed makes the same rows."""
    rng = random.Random(seed)
    held_out = deal_held_out(rng)
    trained = {product: [topic for topic in TOPICS if topic not in held_out[product]] for product in PRODUCTS}
    pairs = [(product, topic) for product in PRODUCTS for topic in trained[product]]
    rng.shuffle(pairs)
    shapes = [shape for shape, count in TRAIN.items() for _ in range(count)]
    rows = []
    for i, shape in enumerate(shapes):
        product, topic = pairs[i % len(pairs)]
        other = rng.choice([other for other in trained[product] if other != topic])
        topics = {"one question": [topic], "two questions": [topic, other], "asked back": ["", topic]}[shape]
        rows.append(converse(product, topics, split="train", rng=rng))
    rng.shuffle(rows)
    for i, (product, (first, second, third)) in enumerate(held_out.items()):
        topics = [second, third] if i % 6 == 5 else ["", second] if i % 2 else [second]
        rows.append(converse(product, [first], split="held_out", rng=rng))
        rows.append(converse(product, topics, split="held_out", rng=rng))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows())
    if not parser.parse_args().check:
        FILE.write_text(text, encoding="utf-8", newline="\n")
    elif not FILE.is_file() or FILE.read_bytes() != text.encode():
        raise SystemExit(f"{FILE.name} is not what this script makes: run it without --check, then git diff")
    print(f"{FILE.name}: {text.count(chr(10))} conversations")


if __name__ == "__main__":
    main()
