"""COCO-Stuff 164k, open-vocabulary segmentation without training: 171 classes.

    clipbench probe --backbone clip-vitb16 --task coco-stuff-zeroshot --head sclip
    clipbench probe --backbone my-clip --task coco-stuff-zeroshot --head clip,maskclip,sclip,naclip,clearclip

Nothing is trained. Patch embeddings of a two-tower ViT are compared with texts (the 171 classes of things and stuff);
each head changes the last block as its authors do and takes the settings of their code for this data set (ClearCLIP's
class names are taken to be SCLIP's*).

Check against, before trusting a new installation: OpenAI CLIP ViT-B/16: sclip 22.77 mIoU (SCLIP repository), clearclip
23.9 (ClearCLIP repository).

clipbench itself has not been run on the real data yet: reader, heads and metric are exercised on the built-in data.

Values marked * are clipbench's choice; the others are those of the authors' code (docs/protocols.md gives the
reasons). Settings move mIoU by points: a row of one preset says nothing about a row of another, and larger towers are
not better here (ViT-L/14 is below ViT-B/16 for most of these methods, says ClearCLIP's comparison).
"""

family = "open-vocabulary"
dataset = "coco-stuff"  # registry.yaml: where the data lie and where to get them

# --- texts ------------------------------------------------------------------------------------------------------------
# A list of clipbench/data/queries, "dataset" for the data set's own names, or a file: one line a class, synonyms
# separated by commas. None: each head's own.
classes = None
templates = "openai-imagenet"  # 80 of them; a query's embeddings are averaged

# --- heads ------------------------------------------------------------------------------------------------------------
# short_side, window and stride in pixels; `window=None, stride=None` for the whole image at once.
# SCLIP's; clip and maskclip take them too*, so that these three differ in the last block alone.
common = dict(short_side=448, long_side=2048, window=224, stride=112, logit_scale=40, classes="coco-stuff")
heads = dict(
    clip=dict(variant="vanilla", **common),
    maskclip=dict(variant="maskclip", **common),
    sclip=dict(variant="sclip", **common),
    # Without PAMR, which NACLIP's headline figures have. Its repository has had the shorter side at 448 too:
    # --set heads.naclip.short_side=448.
    naclip=dict(
        variant="naclip", short_side=336, long_side=2048, window=224, stride=112, logit_scale=40, classes="coco-stuff"
    ),
    clearclip=dict(
        variant="clearclip",
        short_side=448,
        long_side=2048,
        window=448,
        stride=224,
        logit_scale=50,
        classes="coco-stuff",
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
        type="COCOStuffDataset",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # how images are cut is a head's own setting

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, window_batch=8)
