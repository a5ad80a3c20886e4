"""Training CLIP with pseudo-labels of model-zoo experts beside its contrastive loss.

    recipe     what a run is; read from the configs in train/
    stream     labelled shards as an endless stream, exact to the position
    transforms what moves the image moves its labels alike
    model      an open_clip model with light heads on the patch map of its image tower
    losses     contrastive (open_clip's), segmentation, depth, normals

Importing this package is cheap.
"""
