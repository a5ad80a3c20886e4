"""Zero-shot classification of webdataset shards: DIR/val/*.tar with an image and its class number a sample.

    clipbench probe --backbone clip-vitb16 --task shards-zeroshot --data-root DIR --classes FILE --templates FILE

Classes are named by --classes, or by DIR/classnames.txt; one name a line, in the order of the numbers.
"""

family = "zeroshot"
dataset = "shards"  # registry.yaml: where the data lie and where to get them

# --- text -------------------------------------------------------------------------------------------------------------
# A list of strings, a published list by name, or a file: .txt (one a line) or .json. Templates have {} or {c} where the
# class's name goes. `classes`: "imagenet", "dataset" (the data set's own names), or a file in the order of its classes.
classes = "dataset"
templates = "openai-imagenet"  # "openai-imagenet" (80), "simple" (7), "toyworld" (3)

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(zeroshot=dict())  # cosine similarity in the joint space; the logit scale changes no rank

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
val_data = dict(type="shards", split="val")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # nothing to choose

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=8, eval_batch=128)
