"""Flickr30k image-text retrieval of two-tower models: 1,000 test images with five captions each.

    clipbench probe --backbone clip-vitb16 --task flickr30k-retrieval

Karpathy's test split (arXiv 1412.2306). R@1, R@5 and R@10 both ways: an image is found if one of its captions is among
the first K; a caption, if its image is. Ties count against the model; the mean of the six is the main score.
"""

family = "retrieval"
dataset = "flickr30k"  # registry.yaml: where the data lie and where to get them

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(retrieval=dict())  # cosine similarity in the joint space

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
# Karpathy's JSON and the images, relative to the root.
val_data = dict(json="dataset_flickr30k.json", images="flickr30k-images", split="test")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict(captions=5)  # of each image, the first ones; None for all

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=8, eval_batch=128)
