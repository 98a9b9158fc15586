"""The words of the synthetic tasks, in English and Chinese: several ways to ask for the same thing, and the answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """One language. In `phrases`, {} is filled from the scene."""

    colors: dict[str, str]
    shapes: dict[str, str]
    sides: dict[str, str]
    any_shape: str
    yes: str
    no: str
    comma: str  # between the parts of a list
    colored: str  # {color} and {shape}
    seen: str  # a thought that lists what is there
    article: bool  # whether a name in a list takes "a" or "an"
    price: str  # "{name} costs {price}", in a question
    repeated: str  # {thing} that is there {times}, or more often
    times: dict[int, str]  # words for the numbers in it that have one
    phrases: dict[str, tuple[str, ...]]

    def named(self, color: str, shape: str) -> str:
        return self.colored.format(color=self.colors[color], shape=self.shapes[shape])

    def subject(self, word: str) -> str:
        """A color, a shape, a side, a colored shape, or "shape", in this language; anything else stays as it is."""
        color, _, shape = word.partition(" ")
        if shape and color in self.colors:
            return self.colored.format(color=self.colors[color], shape=self.shapes.get(shape, self.any_shape))
        for names in (self.colors, self.shapes, self.sides):
            if word in names:
                return names[word]
        return self.any_shape if word == "shape" else word

    def with_article(self, name: str) -> str:
        if not self.article:
            return name
        return ("an " if name[0] in "aeiou" else "a ") + name

    def at_least(self, name: str, times: int) -> str:
        """So many of a thing, or more: in the words that `claims_by_rule` has for a thing that a caption repeats."""
        return self.repeated.format(thing=self.with_article(name), times=self.times.get(times, times))

    def listing(self, names) -> str:
        return self.comma.join(self.with_article(name) for name in names)


ENGLISH = Wording(
    colors={name: name for name in ("red", "orange", "yellow", "green", "blue", "purple")},
    shapes={name: name for name in ("circle", "square", "triangle", "star", "cross")},
    sides={name: name for name in ("left", "right", "top", "bottom", "up", "down")},
    any_shape="shape",
    yes="yes",
    no="no",
    comma=", ",
    colored="{color} {shape}",
    seen="I see {}.",
    article=True,
    price="a {name} costs {price}",
    repeated="{thing} at least {times}",
    times={2: "twice"} | {number: f"{number} times" for number in range(3, 8)},
    phrases={
        "printed_line": ("Read the text.", "What is written here?", "What does it say?", "What is the text?"),
        "text_colour": ("What color is the text?", "What colour is the text?", "Which color is the text?"),
        "form_value": ("What is the {}?", "What is the value of {}?", "Read the {}.", "{}?"),
        "colour": (
            "What color is the {}?",
            "What colour is the {}?",
            "Which color is the {}?",
            "The {} is what color?",
        ),
        "shape": ("What shape is {}?", "Which shape is {}?", "What is the {} shape?", "What is the {} thing?"),
        "only_shape": ("What shape is this?", "What shape is in the picture?", "Which shape is it?"),
        "count": (
            "How many {}s are there?",
            "How many {}s are in the picture?",
            "How many {}s do you see?",
            "Count the {}s.",
        ),
        "position": ("What shape is on the {}?", "Which shape is on the {}?", "What is on the {}?"),
        "position_colour": ("What color is the shape on the {}?", "What colour is the {} shape?"),
        "absent_object": ("Is there {}?", "Is there {} in the picture?", "Do you see {}?"),
        "repeated_object": ("Is there {}?", "Do you see {}?"),
        "caption": ("Describe the picture.", "Describe this picture.", "What do you see?"),
        "chart_value": ("What is the value of {}?", "How high is {}?", "What value does {} have?"),
        "chart_highest": (
            "Which bar is the highest?",
            "Which bar has the highest value?",
            "Which is the highest bar?",
        ),
        "chart_lowest": ("Which bar is the lowest?", "Which bar has the lowest value?", "Which is the lowest bar?"),
        "chart_bars": ("How many bars are there?", "How many bars does the chart have?", "Count the bars."),
        "multistep_sum": ("What is the result?", "Compute the result.", "What does it add up to?"),
        "multistep_price": ("If {}, what do all the shapes cost?", "Suppose {}. What is the total?"),
        "video_direction": (
            "Which way does the shape move?",
            "Where does the shape move?",
            "In which direction does it move?",
        ),
        "video_order": (
            "In which order do the colors come?",
            "Which colors come one after the other?",
            "List the colors in order.",
        ),
        "video_first": ("Which color comes first?", "What color comes first?", "What is the first color?"),
        "video_last": ("Which color comes last?", "What color comes last?", "What is the last color?"),
        "video_count": (
            "How many times does the shape appear?",
            "How many times does it flash?",
            "Count the flashes.",
        ),
    },
)

CHINESE = Wording(
    colors=dict(zip(ENGLISH.colors, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色"), strict=True)),
    shapes=dict(zip(ENGLISH.shapes, ("圆形", "方形", "三角形", "星形", "十字形"), strict=True)),
    sides=dict(zip(ENGLISH.sides, ("左边", "右边", "上面", "下面", "向上", "向下"), strict=True)),
    any_shape="图形",
    yes="是",
    no="否",
    comma="，",
    colored="{color}{shape}",
    seen="我看到{}。",
    article=False,
    price="{name}的价格是{price}",
    repeated="至少{times}个{thing}",
    times={},
    phrases={
        "printed_line": ("读出文字。", "这里写着什么？", "上面写的是什么？"),
        "text_colour": ("文字是什么颜色？", "文字的颜色是什么？"),
        "form_value": ("{}是什么？", "{}的值是什么？", "读出{}。"),
        "colour": ("{}是什么颜色？", "{}的颜色是什么？"),
        "shape": ("{}的是什么图形？", "什么图形是{}的？"),
        "only_shape": ("这是什么图形？", "图中是什么图形？"),
        "count": ("有多少个{}？", "图中有几个{}？", "数一数{}。"),
        "position": ("{}是什么图形？", "{}的图形是什么？"),
        "position_colour": ("{}的图形是什么颜色？", "{}图形的颜色是什么？"),
        "absent_object": ("有{}吗？", "图中有{}吗？", "你看到{}了吗？"),
        "repeated_object": ("有{}吗？", "你看到{}了吗？"),
        "caption": ("描述这张图片。", "你看到了什么？"),
        "chart_value": ("{}的值是多少？", "{}有多高？"),
        "chart_highest": ("哪个柱子最高？", "最高的是哪个？"),
        "chart_lowest": ("哪个柱子最低？", "最低的是哪个？"),
        "chart_bars": ("有多少个柱子？", "图中有几个柱子？"),
        "multistep_sum": ("结果是多少？", "算出结果。"),
        "multistep_price": ("如果{}，所有图形一共多少钱？", "假设{}。总价是多少？"),
        "video_direction": ("图形往哪个方向移动？", "图形怎么移动？"),
        "video_order": ("颜色按什么顺序出现？", "依次出现了哪些颜色？"),
        "video_first": ("先出现什么颜色？", "第一个颜色是什么？"),
        "video_last": ("最后出现什么颜色？", "最后一个颜色是什么？"),
        "video_count": ("图形出现了几次？", "闪了多少次？"),
    },
)

WORDINGS = {"en": ENGLISH, "zh": CHINESE}
