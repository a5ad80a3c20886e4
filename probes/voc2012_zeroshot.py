"""PASCAL VOC 2012, open-vocabulary segmentation without training: 20 classes and background.

    clipbench probe --backbone clip-vitb16 --task voc2012-zeroshot --head sclip
    clipbench probe --backbone my-clip --task voc2012-zeroshot --head clip,maskclip,sclip,naclip,clearclip

Nothing is trained. Patch embeddings of a two-tower ViT are compared with texts (the 21 classes, background by 26 words
of scenery or one); each head changes the last block as its authors do and takes the settings of their code for this
data set.

Check against, before trusting a new installation: OpenAI CLIP ViT-B/16, head sclip: 59.63 mIoU (SCLIP repository).

clipbench itself has not been run on the real data yet: reader, heads and metric are exercised on the built-in data.

Values marked * are clipbench's choice; the others are those of the authors' code (docs/protocols.md gives the
reasons). Settings move mIoU by points: a row of one preset says nothing about a row of another, and larger towers are
not better here (ViT-L/14 is below ViT-B/16 for most of these methods, says ClearCLIP's comparison).
"""

family = "open-vocabulary"
dataset = "voc2012"  # registry.yaml: where the data lie and where to get them

# --- texts ------------------------------------------------------------------------------------------------------------
# A list of clipbench/data/queries, "dataset" for the data set's own names, or a file: one line a class, synonyms
# separated by commas, without the background. None: each head's own.
classes = None
templates = "openai-imagenet"  # 80 of them; a query's embeddings are averaged

# --- heads ------------------------------------------------------------------------------------------------------------
# short_side, window and stride in pixels; `window=None, stride=None` for the whole image at once.
# SCLIP's; clip and maskclip take them too*, so that these three differ in the last block alone.
common = dict(
    short_side=336,
    long_side=2048,
    window=224,
    stride=112,
    logit_scale=65,
    classes="voc",
    background="scenery",  # 26 words for what has no class
    prob_threshold=0.1,  # below it, background
    area_threshold=0.1,  # of the image's foreground; classes that cover no more are taken off
)
heads = dict(
    clip=dict(variant="vanilla", **common),
    maskclip=dict(variant="maskclip", **common),
    sclip=dict(variant="sclip", **common),
    # Without PAMR, which NACLIP's headline figures have.
    naclip=dict(
        variant="naclip",
        short_side=336,
        long_side=2048,
        window=224,
        stride=112,
        logit_scale=40,
        classes="voc",
        background="scenery",
        prob_threshold=0.1,
        area_threshold=0.0,
    ),
    clearclip=dict(
        variant="clearclip",
        short_side=448,
        long_side=2048,
        window=448,
        stride=224,
        logit_scale=50,
        classes="voc-plain",
        background="word",  # "background"
        prob_threshold=0.5,
        area_threshold=0.0,
    ),
)

# --- data -------------------------------------------------------------------------------------------------------------
# Images and masks keep their original size; each head resizes the image for itself.
test_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
val_data = [
    dict(
        type="PascalVOCDataset",
        ann_file="ImageSets/Segmentation/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # how images are cut is a head's own setting

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, window_batch=8)
