"""Make the support conversations, English and Chinese: customer-support chats in ShareGPT form, with a house style.

    python notebooks/data/make_support_conversations.py           # write both files
    python notebooks/data/make_support_conversations.py --check   # fail unless the files are what this script makes

Every answer has three lines: a subject with the product and the topic, `Next step:` with the one thing that helps, and
the team's name. The topic decides what helps: two different things are right for each, and each is said in two ways.
Products, topics and wordings are combined so that no question of the held-out rows occurs in the training rows: each
held-out pair of product and topic, each of its wordings, and the new products are in no training row.

Needs the standard library only. The company and its products do not exist.
"""

import argparse
import dataclasses
import json
import pathlib
import random

FOLDER = pathlib.Path(__file__).parent
SEED = 3407
HELD_OUT_WORDINGS = 2  # of each list of wordings, the last ones
SYSTEM_PROMPT_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Language:
    """What one file is made of."""

    file: str
    train: dict[str, int]  # conversations of each shape
    held_out_topics: int  # of each product
    products: list[str]
    new_products: list[str]  # held-out rows only
    system_prompts: list[str]
    openers: list[str]
    closers: list[str]
    follow_ups: list[str]
    things: list[str]  # what a customer calls the product
    it: str  # and what later, once it was named
    greetings: list[str]  # where a conversation starts without a question; split like the wordings of the questions
    ask_back: list[str]
    goodbyes: list[str]
    reply: str  # the house style
    topics: dict[str, dict]


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

ENGLISH = Language(
    file="support_conversations.jsonl",
    train={"one question": 400, "two questions": 40, "asked back": 40},
    held_out_topics=3,
    products=[
        "Solvi lamp", "Tarn speaker", "Wicket doorbell", "Fenwick fan", "Marlow clock", "Dapple scale", "Osier radio",
        "Brindle vacuum", "Kestry camera", "Rookley lock", "Sablet thermostat", "Thistly tracker", "Copsey mower",
        "Puffet toothbrush", "Gannick projector", "Merlow monitor", "Harrow keyboard", "Pomel mixer", "Linnet torch",
        "Junip headset",
    ],
    new_products=["Quillon printer", "Farrow drone", "Teasel shaver", "Wrenly sensor"],
    system_prompts=[
        "You are the support assistant of Mossbell.",
        "You help the customers of Mossbell.",
        "Answer for Mossbell, a maker of small devices.",
    ],
    openers=["", "", "", "Hi! ", "Hello! ", "Hi there. ", "Good morning. ", "A question: ", "Dear support team: "],
    closers=[
        "", "", "", " What can I do?", " Any idea?", " Please help.", " Thanks!", " What now?", " Can you help me?",
    ],
    follow_ups=[
        "Thanks. ", "Okay, I will. ", "Perfect, thank you. ", "Good. Another question: ", "And one more thing: ",
    ],
    things=["my {product}", "my {product}", "our {product}", "the {product}"],
    it="it",
    greetings=[
        "I have a question about {it}.", "I need some help with {it}.", "Can you help me with {it}?",
        "It is about {it}.", "I am writing because of {it}.", "Could you have a look at {it}?",
    ],
    ask_back=["Of course. What is the matter with it?", "Gladly. What happened?", "Sure. How can we help?"],
    goodbyes=[
        "Write back any time.", "We are here all day.", "Tell us how it goes.", "Glad to be of help.",
        "Have a good day.", "Just reply if you need more.", "Best wishes.", "Let us know.", "Take care.", "Good luck.",
        "All the best.", "See you soon.",
    ],
    reply="Re: {product}, {topic}\nNext step: {step}\n{goodbye} — Mossbell Care",
    topics=TOPICS,
)  # fmt: skip


# The same for the Chinese file; {it} is "我的栖禾台灯" (my lamp) or "它" (it).
TOPICS_ZH = {
    "开机": {
        "questions": [
            "{it}开不了机了。", "{it}怎么按都没反应。",
            "{it}今天早上突然启动不了。", "{it}插着电也不亮。",
            "{it}无法正常开机。", "按下电源键后，{it}毫无反应。",
            "{it}就是打不开，一点动静都没有。", "{it}始终无法启动。",
        ],
        "help": {
            "十秒": ["请长按电源键十秒。", "请按住电源键，满十秒再松手。"],
            "插座": ["请换一个墙上的插座试试。", "请把电源线直接插到别的插座上。"],
        },
    },
    "充电": {
        "questions": [
            "{it}充不进电。", "{it}充了一晚上还是没电。",
            "{it}充电特别慢。", "{it}插上充电线没有任何显示。",
            "{it}充电时断时续。", "{it}的电量一直停在百分之二十。",
            "{it}怎么充都充不满。", "{it}接通电源后无法充电。",
        ],
        "help": {
            "原装": ["请改用原装充电线。", "请用原装充电器再充一次。"],
            "触点": ["请用干布擦净充电触点。", "请检查充电触点上有没有灰尘。"],
        },
    },
    "Wi-Fi": {
        "questions": [
            "{it}连不上 Wi-Fi。", "{it}老是掉线。",
            "{it}搜不到家里的 Wi-Fi。", "手机能上网，{it}却不行。",
            "{it}一直显示网络未连接。", "{it}无法接入家里的无线网络。",
            "{it}的 Wi-Fi 隔一会儿就断。", "{it}配网总是失败。",
        ],
        "help": {
            "路由器": ["请重启路由器，等两分钟再连。", "请先关掉路由器，再重新打开。"],
            "2.4 GHz": ["请在设置里选择 2.4 GHz 网络。", "请让设备连接 2.4 GHz 的网络。"],
        },
    },
    "升级": {
        "questions": [
            "{it}升级失败了。", "{it}升级到一半就卡住了。",
            "{it}收不到新版本。", "{it}更新固件时报错。",
            "{it}的系统还是旧版本。", "怎么给{it}更新系统？",
            "{it}装不上最新版本。", "{it}的固件一直无法更新。",
        ],
        "help": {
            "USB": ["请用 USB 线连接电脑来升级。", "请用 USB 线把升级包拷到设备里。"],
            "存储空间": ["请先清理存储空间，再升级一次。", "请删掉旧数据，腾出存储空间。"],
        },
    },
    "清洁": {
        "questions": [
            "{it}怎么清洁？", "{it}脏了，怎么弄干净？",
            "{it}的外壳有点脏。", "{it}落了厚厚一层灰。",
            "{it}用久了，积了不少灰。", "清洁{it}时需要注意什么？",
            "{it}看着灰扑扑的，怎么打理？", "{it}应当如何清洗？",
        ],
        "help": {
            "软布": ["请用微湿的软布擦拭。", "请拿软布蘸少许清水擦干净。"],
            "毛刷": ["请用软毛刷扫掉灰尘。", "请用小毛刷把边角刷干净。"],
        },
    },
    "退货": {
        "questions": [
            "想退掉{it}。", "{it}不合适，能退吗？",
            "怎么把{it}退回去？", "对{it}不太满意，想退款。",
            "改主意了，想把{it}退掉。", "{it}可以无理由退货吗？",
            "{it}用不上，怎么退？", "希望为{it}办理退货。",
        ],
        "help": {
            "退货单": ["请打印退货单，放进包装盒。", "请填好退货单，随货寄回。"],
            "驿站": ["请在七天内送到附近的快递驿站。", "请把包裹交给就近的快递驿站。"],
        },
    },
    "破损": {
        "questions": [
            "{it}摔了一下，外壳裂了。", "{it}掉到地上摔坏了。",
            "{it}收到时外壳就有裂纹。", "{it}才用了一周就裂了。",
            "{it}的按键断了。", "不小心碰倒了{it}，裂开了一道口子。",
            "{it}被孩子摔坏了。", "{it}的表面出现了明显裂痕。",
        ],
        "help": {
            "序列号": ["请把机身底部的序列号发给我们，办理保修。", "请提供序列号，我们给您换新。"],
            "维修点": ["请送到就近的维修点。", "请预约一家维修点，免费检修。"],
        },
    },
    "发票": {
        "questions": [
            "想开一张{it}的发票。", "{it}的发票在哪里下载？",
            "还没收到{it}的发票。", "公司报销要用{it}的发票。",
            "能补开{it}的发票吗？", "{it}的发票找不到了。",
            "怎么给{it}开发票？", "{it}的发票抬头可以写公司吗？",
        ],
        "help": {
            "我的订单": ["请在“我的订单”里下载。", "请打开“我的订单”，点“申请开票”。"],
            "财务": ["请把订单号和抬头发到财务邮箱。", "请凭订单号联系财务开具。"],
        },
    },
}  # fmt: skip

CHINESE = Language(
    file="support_conversations_zh.jsonl",
    train={"one question": 32, "two questions": 8, "asked back": 8},
    held_out_topics=2,
    products=[
        "栖禾台灯", "雀语音箱", "穗风风扇", "絮白吸尘器", "青檐摄像头", "汀兰投影仪", "沐岚加湿器", "轻棠体重秤",
        "苇笛收音机", "云屿净化器",
    ],
    new_products=["墨笺打印机", "拾尘扫地机"],
    system_prompts=[
        "你是 Mossbell 的客服助手。", "你负责解答 Mossbell 顾客的问题。", "请代表小家电品牌 Mossbell 回答顾客。",
    ],
    openers=["", "", "", "你好，", "您好！", "在吗？", "客服您好，", "打扰一下，", "早上好！"],
    closers=["", "", "", "谢谢！", "麻烦帮忙看看。", "麻烦您了。", "请尽快回复。", "在线等。", "辛苦了！"],
    follow_ups=["明白了。另外，", "好的，我试试。还有，", "收到。对了，", "好的。还有一件事：", "知道了。还有个问题："],
    things=["我的{product}", "我的{product}", "我买的{product}", "我这台{product}"],
    it="它",
    greetings=[
        "想咨询一下{it}的问题。", "有件事想请您帮忙，是关于{it}的。", "能帮我看看{it}吗？",
        "有个关于{it}的问题想请教。", "想问问{it}的事。", "{it}的事，可以找您吗？",
    ],
    ask_back=["好的，请问是什么问题？", "好的，请您说说具体情况。", "您好，请问有什么可以帮您？"],
    goodbyes=[
        "有问题随时找我们", "我们全天在线", "期待您的反馈", "很高兴为您服务", "祝您生活愉快", "如需帮助，请直接回复",
        "感谢您的支持", "祝您一切顺利",
    ],
    reply="关于：{product}，{topic}\n下一步：{step}\n{goodbye} — Mossbell 客服",
    topics=TOPICS_ZH,
)  # fmt: skip

LANGUAGES = [ENGLISH, CHINESE]


def ask(wordings: list[str], *, thing: str, split: str, rng: random.Random) -> str:
    """One sentence, as a customer would put it; `thing` is "my Solvi lamp" or "it"."""
    own = wordings[-HELD_OUT_WORDINGS:] if split == "held_out" else wordings[:-HELD_OUT_WORDINGS]
    text = rng.choice(own).format(it=thing)
    return text[0].upper() + text[1:]


def answer(topic: str, *, product: str, language: Language, rng: random.Random) -> str:
    """One right answer in the house style."""
    ways = language.topics[topic]["help"]
    step = rng.choice(ways[rng.choice(list(ways))])
    return language.reply.format(product=product, topic=topic, step=step, goodbye=rng.choice(language.goodbyes))


def converse(product: str, topics: list[str], *, split: str, language: Language, rng: random.Random) -> dict:
    """One row: a customer's turn and a reply for each topic; the topic "" is a greeting, which is asked back.

    Only the first turn names the product. Later ones say "it", so that the model must look back.
    """
    turns = []
    if rng.random() < SYSTEM_PROMPT_SHARE:
        turns.append({"from": "system", "value": rng.choice(language.system_prompts)})
    for i, topic in enumerate(topics):
        thing = language.it if i else rng.choice(language.things).format(product=product)
        before = rng.choice(language.openers) if i == 0 else rng.choice(language.follow_ups) if topics[i - 1] else ""
        wordings = language.topics[topic]["questions"] if topic else language.greetings
        asked = ask(wordings, thing=thing, split=split, rng=rng)
        after = rng.choice(language.closers) if topic else ""
        turns.append({"from": "human", "value": before + asked + after})
        reply = answer(topic, product=product, language=language, rng=rng) if topic else rng.choice(language.ask_back)
        turns.append({"from": "gpt", "value": reply})
    right_help = [list(language.topics[topic]["help"]) if topic else [] for topic in topics]
    return {"split": split, "product": product, "topics": topics, "right_help": right_help, "conversations": turns}


def deal_held_out(language: Language, rng: random.Random) -> dict[str, list[str]]:
    """The held-out topics of each product, dealt so that every topic comes up equally often."""
    products, count = language.new_products + language.products, language.held_out_topics
    deck = []
    while len(deck) < len(products) * count:
        deck += rng.sample(list(language.topics), len(language.topics))
    return {product: deck[i * count : (i + 1) * count] for i, product in enumerate(products)}


def make_rows(language: Language, seed: int = SEED) -> list[dict]:
    """All rows, the training rows first; the same seed makes the same rows."""
    rng = random.Random(seed)
    held_out = deal_held_out(language, rng)
    trained = {
        product: [topic for topic in language.topics if topic not in held_out[product]] for product in language.products
    }
    pairs = [(product, topic) for product in language.products for topic in trained[product]]
    rng.shuffle(pairs)
    shapes = [shape for shape, count in language.train.items() for _ in range(count)]
    rows = []
    for i, shape in enumerate(shapes):
        product, topic = pairs[i % len(pairs)]
        other = rng.choice([other for other in trained[product] if other != topic])
        topics = {"one question": [topic], "two questions": [topic, other], "asked back": ["", topic]}[shape]
        rows.append(converse(product, topics, split="train", language=language, rng=rng))
    rng.shuffle(rows)
    for i, (product, (*alone, second, third)) in enumerate(held_out.items()):
        topics = [second, third] if i % 6 == 5 else ["", second] if i % 2 else [second]
        for asked in [*([topic] for topic in alone), topics]:
            rows.append(converse(product, asked, split="held_out", language=language, rng=rng))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    check = parser.parse_args().check
    for language in LANGUAGES:
        file = FOLDER / language.file
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(language))
        if not check:
            file.write_text(text, encoding="utf-8", newline="\n")
        elif not file.is_file() or file.read_bytes() != text.encode():
            raise SystemExit(f"{file.name} is not what this script makes: run it without --check, then git diff")
        print(f"{file.name}: {text.count(chr(10))} conversations")


if __name__ == "__main__":
    main()
