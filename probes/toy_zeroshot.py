"""Zero-shot classification on toyworld, the built-in data set: what stands in a rendered room.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone openclip:ViT-B-32 --task toy-zeroshot

The recipe of `imagenet-zeroshot` on the ImageNet layout that toyworld is written in. For trying things out and for
tests: scores say nothing about real images, only about the order of backbones.
"""

family = "zeroshot"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- text -------------------------------------------------------------------------------------------------------------
# A list of strings, a published list by name, or a file: .txt (one a line) or .json. Templates have {} or {c} where the
# class's name goes. `classes`: "imagenet", "dataset" (the data set's own names), or a file in the order of its classes.
classes = "toyworld"
templates = "toyworld"  # "openai-imagenet" (80), "simple" (7), "toyworld" (3)

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(zeroshot=dict())  # cosine similarity in the joint space; the logit scale changes no rank

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
val_data = dict(type="imagenet", folder="imagenet", split="val")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # nothing to choose

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, eval_batch=32)
