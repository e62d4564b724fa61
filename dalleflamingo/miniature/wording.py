"""The words of the miniature world: what its people call things, grounds and relations.

Annotators choose among these words (`annotators.py`), the parser reads all of them (`scene_graph.parse`). The first
name of a thing is its kind.
"""

NAMES = {
    "cat": ("cat", "kitten", "kitty"),
    "bird": ("bird", "songbird"),
    "fish": ("fish", "trout"),
    "house": ("house", "home", "cottage"),
    "tree": ("tree", "oak"),
    "boat": ("boat", "ship", "sailboat"),
    "car": ("car", "vehicle", "automobile"),
    "umbrella": ("umbrella", "parasol"),
    "cup": ("cup", "mug", "teacup"),
    "hat": ("hat", "cap"),
    "flower": ("flower", "blossom", "bloom"),
    "apple": ("apple", "fruit"),
    "star": ("star", "pentagram"),
    "chair": ("chair", "seat", "stool"),
    "kite": ("kite", "paper kite"),
    "balloon": ("balloon", "party balloon"),
    "mushroom": ("mushroom", "toadstool"),
    "rocket": ("rocket", "spaceship", "spacecraft"),
    "snail": ("snail", "garden snail"),
    "butterfly": ("butterfly", "moth"),
    "crown": ("crown", "tiara"),
    "bell": ("bell", "handbell"),
    "key": ("key", "door key"),
    "heart": ("heart", "valentine"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
GROUND_PHRASES = {
    "grass": ("on the grass", "on the lawn", "in a field", "in a meadow"),
    "sand": ("on the sand", "on the beach", "in the desert", "at the seaside"),
    "snow": ("in the snow", "in winter", "on a snowy day", "on the ice"),
    "water": ("on the water", "in the sea", "in the ocean", "on a lake"),
    "night": ("at night", "in the dark", "after dark", "in the moonlight"),
}
# "subject … object"; "beside" leaves open on which side
RELATION_PHRASES = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
    "beside": ("beside", "next to", "alongside"),
}
# behind the second of two things: "a car with a cat to its left"
RELATION_TO_IT_PHRASES = {
    "left": ("to its left", "on its left"),
    "right": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
    "beside": ("beside it", "next to it"),
}
# behind each of two things: "a cat on the left and a car on the right"
SIDE_PHRASES = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "above": ("at the top", "in the upper half"),
    "below": ("at the bottom", "in the lower half"),
}
ACTIONS = {
    "cat": ("sitting", "standing", "waiting"),
    "bird": ("flying", "sitting", "singing"),
    "fish": ("swimming", "resting"),
    "tree": ("growing", "standing"),
    "boat": ("sailing", "floating"),
    "car": ("parked", "standing"),
    "flower": ("growing", "blooming"),
    "mushroom": ("growing",),
    "kite": ("flying",),
    "balloon": ("floating", "flying"),
    "rocket": ("flying", "landing"),
    "snail": ("crawling", "resting"),
    "butterfly": ("flying", "fluttering"),
    "star": ("shining",),
    "heart": ("floating",),
}
OPENINGS = (
    "",
    "there is",
    "a picture of",
    "we can see",
    "an image of",
    "this is",
    "a drawing of",
    "here is",
    "a cartoon of",
    "i see",
)
