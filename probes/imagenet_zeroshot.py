"""ImageNet-1k zero-shot classification of two-tower models: top-1 and top-5 on the 50,000 validation images.

    clipbench probe --backbone clip-vitb16 --task imagenet-zeroshot
    clipbench probe --backbone clip-vitb16 --task imagenet-zeroshot --set templates=simple

open_clip's 1,000 class names and 80 templates (`open_clip.zero_shot_metadata`; Radford et al., arXiv 2103.00020): the
embeddings of a class are normalised, averaged over templates and normalised again.

Check against, before trusting a new installation: OpenAI CLIP ViT-B/16, 68.3 % top-1 (open_clip's results table).
clipbench itself has not been run on the real ImageNet yet: its classifier is tested to equal open_clip's, its reader
on the built-in data in the same layout.
"""

family = "zeroshot"
dataset = "imagenet"  # registry.yaml: where the data lie and where to get them

# --- text -------------------------------------------------------------------------------------------------------------
# A list of strings, a published list by name, or a file: .txt (one a line) or .json. Templates have {} or {c} where the
# class's name goes. `classes`: "imagenet", "dataset" (the data set's own names), or a file in the order of its classes.
classes = "imagenet"
templates = "openai-imagenet"  # "openai-imagenet" (80), "simple" (7), "toyworld" (3)

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(zeroshot=dict())  # cosine similarity in the joint space; the logit scale changes no rank

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
val_data = dict(type="imagenet", split="val")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # nothing to choose

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=8, eval_batch=128)
