"""Open-vocabulary segmentation without training on toyworld, the built-in data set: 20 classes of rendered rooms.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone openclip:ViT-B-32 --task toy-zeroshot-seg

The recipes of `ade20k-zeroshot` at a small size, on the ADE20K layout that toyworld is written in, with the words of
toyworld's captions for its classes. For trying things out and for tests: scores say nothing about real images, only
about the order of backbones.
"""

family = "open-vocabulary"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- texts ------------------------------------------------------------------------------------------------------------
# A list of clipbench/data/queries, "dataset" for the data set's own names, or a file: one line a class, synonyms
# separated by commas. None: each head's own.
classes = None
templates = "toyworld"  # three; a query's embeddings are averaged

# --- heads ------------------------------------------------------------------------------------------------------------
# short_side, window and stride in pixels; `window=None, stride=None` for the whole image at once.
image_size = 128
words = [
    *("wall", "floor", "ceiling", "window", "painting", "door", "rug"),
    *("ball", "bottle", "vase", "box", "book", "barrel", "stool", "chair", "table"),
    *("sofa", "television", "plant", "lamp"),
]
common = dict(short_side=image_size, long_side=4 * image_size, window=image_size, stride=image_size // 2, classes=words)
heads = dict(
    clip=dict(variant="vanilla", logit_scale=40, **common),
    maskclip=dict(variant="maskclip", logit_scale=40, **common),
    sclip=dict(variant="sclip", logit_scale=40, **common),
    naclip=dict(variant="naclip", logit_scale=40, **common),
    clearclip=dict(variant="clearclip", logit_scale=50, **common),
)

# --- data -------------------------------------------------------------------------------------------------------------
# Images and masks keep their original size; each head resizes the image for itself.
test_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
# The ADE20K names of what toyworld shows, in the order of `words`; everything else is ignored.
shown = (
    *("wall", "floor", "ceiling", "windowpane", "painting", "door", "rug"),
    *("ball", "bottle", "vase", "box", "book", "barrel", "stool", "chair", "table"),
    *("sofa", "television receiver", "plant", "lamp"),
)
val_data = [
    dict(
        type="ADE20KDataset",
        metainfo=dict(classes=shown),
        data_prefix=dict(
            img_path="ADEChallengeData2016/images/validation",
            seg_map_path="ADEChallengeData2016/annotations/validation",
        ),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # how images are cut is a head's own setting

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, window_batch=8)
