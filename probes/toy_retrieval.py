"""Image-text retrieval on toyworld, the built-in data set: rendered rooms with five captions each.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone openclip:ViT-B-32 --task toy-retrieval

The recipe of `flickr30k-retrieval` on the same layout. For trying things out and for tests: scores say nothing about
real images, only about the order of backbones.
"""

family = "retrieval"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(retrieval=dict())  # cosine similarity in the joint space

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
# Karpathy's JSON and the images, relative to the root.
val_data = dict(json="flickr30k/dataset_flickr30k.json", images="flickr30k/flickr30k-images", split="test")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict(captions=5)  # of each image, the first ones; None for all

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, eval_batch=32)
