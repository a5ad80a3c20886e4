"""Zero-shot classification of any folder of class folders: DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg.

    clipbench probe --backbone clip-vitb16 --task folder-zeroshot --data-root DIR
    clipbench probe --backbone clip-vitb16 --task folder-zeroshot --data-root DIR --classes FILE --templates FILE

Classes are the folders, sorted; without --classes their names are the folders' (underscores as spaces), or those of
DIR/classes.txt. A class file has one name a line in that order, or is a JSON object from folder to name.
"""

family = "zeroshot"
dataset = "folder"  # registry.yaml: where the data lie and where to get them

# --- text -------------------------------------------------------------------------------------------------------------
# A list of strings, a published list by name, or a file: .txt (one a line) or .json. Templates have {} or {c} where the
# class's name goes. `classes`: "imagenet", "dataset" (the data set's own names), or a file in the order of its classes.
classes = "dataset"
templates = "openai-imagenet"  # "openai-imagenet" (80), "simple" (7), "toyworld" (3)

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(zeroshot=dict())  # cosine similarity in the joint space; the logit scale changes no rank

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
val_data = dict(type="folder", split="val")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # nothing to choose

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=8, eval_batch=128)
