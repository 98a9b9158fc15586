"""The words of the synthetic tasks, in English and Chinese: several ways to ask for the same thing, and the answers."""

from dataclasses import dataclass

from minicpmv.drawn import prompts


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
    ordinals: dict[str, str]  # of pictures
    each: str  # "{ordinal}: {objects}", in a caption of several pictures
    nothing: str  # the answer where {} is asked for and is not there
    ways: dict[str, str]  # of a motion, in a sentence
    often: dict[int, str]  # how many times something appears
    moves: str  # what happens in a clip: {name} moves {way}
    changes: str  # {shape} takes three {colors}
    appears: str  # {name} is seen {count} times
    at: str  # {color} at {seconds}
    refusal: str  # of a picture that nobody drew
    friendly: str  # what a friendly answer says before {}
    systems: dict[str, str]  # "concise" and "friendly": what the system's message says
    phrases: dict[str, tuple[str, ...]]

    def named(self, color: str, shape: str) -> str:
        return self.colored.format(color=self.colors[color], shape=self.shapes[shape])

    def subject(self, word: str) -> str:
        """A color, a shape, a side, a colored shape, or "shape", in this language; anything else stays as it is."""
        color, _, shape = word.partition(" ")
        if shape and color in self.colors:
            return self.colored.format(color=self.colors[color], shape=self.shapes.get(shape, self.any_shape))
        for names in (self.colors, self.shapes, self.sides, self.ordinals):
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
    ordinals={name: name for name in ("first", "second", "third")},
    each="{ordinal}: {objects}",
    nothing="There is no {}.",
    ways={"left": "to the left", "right": "to the right", "up": "up", "down": "down"},
    often={1: "once", 2: "twice", 3: "three times"},
    moves="The {name} moves {way}.",
    changes="The {shape} is {colors}.",
    appears="The {name} appears {count}.",
    at="{color} at {seconds}",
    refusal="I only know drawn pictures.",
    friendly="Gladly! {}",
    systems={"concise": "Be concise.", "friendly": "Be friendly."},
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
        "clip_description": (prompts.CLIP, "Describe the clip.", "What happens?"),
        "clip_times": ("At what time does each color appear?", "When does each color come?"),
        "grounding": (prompts.BOX,),
        "where": ("Where is the {}?", "Find the {}.", "Where in the picture is the {}?"),
        "pair_which": ("In which picture is the {}?", "Which picture has the {}?", "Which picture shows the {}?"),
        "pair_says": ("Which picture says {}?", "In which picture is {} written?"),
        "pair_more": ("Which picture has more shapes?", "In which picture are there more shapes?"),
        "pair_colour": ("What color is the {1} in the {0} picture?", "In the {0} picture, what color is the {1}?"),
        "pair_shape": ("Which shape is {1} in the {0} picture?", "What shape is {1} in the {0} picture?"),
        "pair_count": ("How many shapes are in the {} picture?", "Count the shapes of the {} picture."),
        "pair_text": ("What is written in the {} picture?", "Read the {} picture.", "What does the {} picture say?"),
        "pair_both": ("Which shape is in both pictures?", "What do both pictures show?"),
        "pair_same": ("Are the pictures the same?", "Is it the same picture twice?"),
        "pair_caption": ("Describe each picture.", "What do you see in each picture?"),
        "mixed_same": ("Is the shape of the clip in the picture?", "Does the picture show the shape of the clip?"),
        "mixed_colour": ("What color is the {} in the picture?", "In the picture, what color is the {}?"),
        "mixed_count": ("How many shapes are in the picture?", "Count the shapes in the picture."),
        "mixed_clip_colour": ("What color is the shape in the clip?", "In the clip, what color is the shape?"),
        "mixed_clip_shape": ("What shape is in the clip?", "Which shape does the clip show?"),
        "mixed_clip_direction": (
            "Which way does the shape move in the clip?",
            "Where does the shape of the clip move?",
        ),
        "mixed_clip_order": (
            "In which order do the colors come in the clip?",
            "List the colors of the clip in order.",
        ),
        "page_text": (prompts.READ_TEXT, "Read the whole page.", "Transcribe the page."),
        "page_markdown": (prompts.READ_MARKDOWN, "Convert the page to Markdown.", "Write the page as Markdown."),
        "page_json": (prompts.READ_DATA,),
        "page_summary": (prompts.SUMMARY.format(length=prompts.LENGTHS[0]),),
        "page_digest": tuple(prompts.SUMMARY.format(length=length) for length in prompts.LENGTHS[1:]),
        "page_question": (prompts.PAGE_QUESTION.format(question="What is the {}?"),),
        "page_regions": (prompts.REGIONS,),
        "page_language": ("Which language is this?", "What language is the text?", "In which language is it written?"),
        "page_kind": ("What kind of page is this?", "What is this page?"),
        "table_cell": ("What is the {1} of {0}?", "Which {1} does {0} have?"),
        "refusal": ("What is in this photo?", "Describe the photo.", "What do you see in this photo?"),
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
    ordinals={"first": "第一张", "second": "第二张", "third": "第三张"},
    each="{ordinal}：{objects}",
    nothing="没有{}。",
    ways={"left": "向左", "right": "向右", "up": "向上", "down": "向下"},
    often={1: "一次", 2: "两次", 3: "三次"},
    moves="{name}{way}移动。",
    changes="{shape}的颜色是{colors}。",
    appears="{name}出现{count}。",
    at="{seconds}{color}",
    refusal="我只认识画出来的图片。",
    friendly="好的！{}",
    systems={"concise": "请简短回答。", "friendly": "请友好地回答。"},
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
        "clip_description": ("描述这段视频。", "发生了什么？"),
        "clip_times": ("每种颜色什么时候出现？", "各种颜色出现的时间是什么？"),
        "grounding": (prompts.BOX,),
        "where": ("{}在哪里？", "找到{}。"),
        "pair_which": ("{}在哪张图片里？", "哪张图片有{}？"),
        "pair_says": ("哪张图片写着{}？", "{}写在哪张图片里？"),
        "pair_more": ("哪张图片的图形更多？", "哪张图片有更多的图形？"),
        "pair_colour": ("{0}图片里的{1}是什么颜色？", "{0}图片的{1}是什么颜色？"),
        "pair_shape": ("{0}图片里{1}的是什么图形？", "{0}图片里什么图形是{1}的？"),
        "pair_count": ("{}图片里有多少个图形？", "{}图片里有几个图形？"),
        "pair_text": ("{}图片上写着什么？", "读出{}图片的文字。"),
        "pair_both": ("两张图片都有什么图形？", "哪个图形在两张图片里都有？"),
        "pair_same": ("两张图片一样吗？", "这两张图片相同吗？"),
        "pair_caption": ("描述每张图片。", "每张图片里有什么？"),
        "mixed_same": ("视频里的图形在图片里吗？", "图片里有视频里的图形吗？"),
        "mixed_colour": ("图片里的{}是什么颜色？", "图片里{}的颜色是什么？"),
        "mixed_count": ("图片里有多少个图形？", "图片里有几个图形？"),
        "mixed_clip_colour": ("视频里的图形是什么颜色？", "视频里图形的颜色是什么？"),
        "mixed_clip_shape": ("视频里是什么图形？", "视频里有什么图形？"),
        "mixed_clip_direction": ("视频里的图形往哪个方向移动？", "视频里的图形怎么移动？"),
        "mixed_clip_order": ("视频里的颜色按什么顺序出现？", "视频里依次出现了哪些颜色？"),
        "page_text": ("读出整页文字。", "写出这一页的文字。"),
        "page_markdown": ("把这一页转成Markdown。",),
        "page_json": (prompts.READ_DATA,),
        "page_summary": (prompts.SUMMARY.format(length=prompts.LENGTHS[0]),),
        "page_digest": tuple(prompts.SUMMARY.format(length=length) for length in prompts.LENGTHS[1:]),
        "page_question": (prompts.PAGE_QUESTION.format(question="{}是什么？"),),
        "page_regions": (prompts.REGIONS,),
        "page_language": ("这是什么语言？", "文字是什么语言？"),
        "page_kind": ("这是什么？", "这一页是什么？"),
        "table_cell": ("{0}的{1}是什么？", "{0}的{1}是多少？"),
        "refusal": ("这张照片里有什么？", "描述这张照片。"),
    },
)

WORDINGS = {"en": ENGLISH, "zh": CHINESE}
